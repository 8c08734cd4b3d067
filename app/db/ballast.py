"""A file of nothing beside the database, that is let go when deleting finds the disk full: deleting needs room, too.

Any process may let it go, and the API makes it again once there is room. Knows a file; not tables.
"""

import contextlib
import os
import shutil
from pathlib import Path

# It is made only where this many times its size is free: the last bytes of a disk are others'.
_TIMES_FREE = 4


class Ballast:
    """So many bytes in `path`, on the disk where the database is."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        """size_bytes: 0 for none."""
        self._path = path
        self._size_bytes = size_bytes

    def keep(self) -> bool:
        """Makes the file if it is not there and there is room. Returns whether it is there, or none is wanted."""
        if self._size_bytes == 0 or self._path.exists():
            return True
        part = self._path.with_name(f"{self._path.name}.{os.getpid()}.part")
        try:
            if shutil.disk_usage(self._path.parent).free < _TIMES_FREE * self._size_bytes:
                return False
            with part.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self._size_bytes)
            part.replace(self._path)
        except OSError:
            return False
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        return True

    def release(self) -> bool:
        """Whether there was something to let go."""
        try:
            self._path.unlink()
        except OSError:
            return False
        return True
