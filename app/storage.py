"""Where bytes lie. The only file that knows: everyone else has keys such as "models/mdl_…".

What is published appears whole or not at all, and survives a power cut: it is written in staging, synced, renamed, and
the folders are synced. A failed sync is an error, never a warning. What is left in staging by a crash is swept.

Files come before the database row that speaks of them, and a crash may come between. So such a key is announced first,
and settled once it is known whether the row is there. Only announced keys are ever swept: a server that was pointed at
another database by mistake deletes nothing.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.errors import StorageFull

# Above this age nothing in staging can belong to a living request or job: uploads have body timeouts, and a worker
# stages only what it is about to publish.
STAGING_MAX_AGE_SECONDS = 24 * 3600
# Between announcing and settling lie one rename and one transaction; above this age nobody is at it any more.
ANNOUNCEMENT_MAX_AGE_SECONDS = 3600


class LocalStorage:
    """Storage in one folder of the local file system."""

    def __init__(self, root: Path, *, min_free_bytes: int = 0) -> None:
        """min_free_bytes: new data is refused when less would remain free."""
        self.root = root
        self._staging = root / "staging"
        self._announced = root / "announced"
        for folder in (self._staging, self._announced):
            folder.mkdir(parents=True, exist_ok=True)
        self._min_free_bytes = min_free_bytes

    @contextmanager
    def staging(self, suffix: str = "") -> Iterator[Path]:
        """A fresh path that does not exist yet, for a file or folder; whatever is left there at the end is removed."""
        path = self._staging / f"{uuid.uuid4().hex}{suffix}"
        try:
            yield path
        finally:
            remove(path)

    def publish(self, staged: Path, key: str) -> None:
        """Moves a staged file or folder to `key`, durably, replacing what was there before.

        Raises OSError if a sync or the rename fails; nothing is then visible under `key` that was not before.
        """
        target = self.path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        sync_tree(staged)
        if target.is_dir():
            # A folder cannot be renamed over a full one; only a retry of the same work publishes twice.
            with self.staging() as aside:
                target.rename(aside)
                staged.rename(target)
        else:
            staged.replace(target)
        for folder in (target.parent, *target.parent.parents):
            sync(folder)
            if folder == self.root:
                break

    def link(self, key: str, staged: Path) -> None:
        """A second name for a file, in staging: to be published, while the first stays whatever happens meanwhile.

        Raises OSError where even a copy cannot be made.
        """
        try:
            staged.hardlink_to(self.path(key))
        except OSError:  # a file system without such names
            shutil.copyfile(self.path(key), staged)

    def announce(self, key: str) -> None:
        """Notes that `key` is about to be published, and is worth nothing until a row speaks of it."""
        self._announcement(key).touch()
        sync(self._announced)

    def settle(self, key: str, *, is_wanted: bool) -> None:
        """Ends an announcement: the key stays, or is deleted."""
        if not is_wanted:
            self.delete(key)
        self._announcement(key).unlink(missing_ok=True)

    def announced(self, *, older_than_seconds: float = ANNOUNCEMENT_MAX_AGE_SECONDS) -> list[str]:
        """Keys whose publisher never came to settle them."""
        deadline = time.time() - older_than_seconds
        stale = [path for path in self._announced.iterdir() if path.stat().st_mtime < deadline]
        return sorted(path.name.replace("+", "/") for path in stale)

    def path(self, key: str) -> Path:
        """The local path of a key. Keys are made of our own ids, never of a caller's text."""
        path = (self.root / key).resolve()
        assert path.is_relative_to(self.root.resolve()), key
        return path

    def files(self, key: str) -> list[str]:
        """Keys of the files at or below a key. Raises FileNotFoundError if it goes meanwhile."""
        root = self.path(key)
        if root.is_file():
            return [key]
        return sorted(f"{key}/{path.relative_to(root).as_posix()}" for path in root.rglob("*") if path.is_file())

    def exists(self, key: str) -> bool:
        return self.path(key).exists()

    def delete(self, key: str) -> None:
        """Removes a key, and what lies below it; open files and memory maps of it stay readable."""
        path = self.path(key)
        if path.exists():
            # Renamed first, so that nobody sees it half deleted.
            with self.staging() as doomed, contextlib.suppress(FileNotFoundError):
                path.rename(doomed)

    def check_room(self, incoming_bytes: int = 0) -> None:
        """Raises StorageFull if storing this many bytes would leave less than the reserve free."""
        if self.spare_bytes() < incoming_bytes:
            raise StorageFull(
                "The server's disk is too full for this; delete data sets or models, or ask its operator."
            )

    def spare_bytes(self) -> int:
        """What is free beyond the reserve; negative when it is less."""
        return shutil.disk_usage(self.root).free - self._min_free_bytes

    def sweep(self, *, older_than_seconds: float = STAGING_MAX_AGE_SECONDS) -> int:
        """Removes what crashes have left in staging. Returns how many entries were removed."""
        deadline = time.time() - older_than_seconds
        stale = [path for path in self._staging.iterdir() if path.lstat().st_mtime < deadline]
        for path in stale:
            remove(path)
        return len(stale)

    def _announcement(self, key: str) -> Path:
        return self._announced / key.replace("/", "+")


def is_disk_full(error: BaseException | None) -> bool:
    """Whether what went wrong is that a disk, or what a user may have of it, is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if type(error).__name__ == "SafetensorError" and "(os error 28)" in str(error):  # its library speaks in texts
            return True
        error = error.__cause__
    return False


def file_sha256(path: Path) -> str:
    """Of the file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Removes a file, or a folder with all below it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_tree(path: Path) -> None:
    """Waits until the disk has a file, or a folder with all below it. Raises OSError."""
    if path.is_dir():
        for child in path.iterdir():
            sync_tree(child)
    sync(path)


def sync(path: Path) -> None:
    """Waits until the disk has a file's bytes, or a folder's names. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
