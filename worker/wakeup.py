"""A sleep that a signal handler, another thread or a file descriptor can end."""

import os
import select
from collections.abc import Iterable


class Wakeup:
    """A flag that stays set, and a wait that ends when it is.

    Unlike threading.Event it can be set in a signal handler: an Event's lock may be held by the very thread that the
    handler interrupted.
    """

    def __init__(self) -> None:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._is_set = False

    @property
    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        if not self._is_set:
            self._is_set = True
            os.write(self._write_end, b"\0")

    def wait(self, timeout_seconds: float, *, descriptors: Iterable[int] = ()) -> bool:
        """Returns is_set, at once if it is, else after the time or as soon as a descriptor can be read."""
        select.select([self._read_end, *descriptors], [], [], max(0.0, timeout_seconds))
        return self._is_set

    def close(self) -> None:
        os.close(self._read_end)
        os.close(self._write_end)
