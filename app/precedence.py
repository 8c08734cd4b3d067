"""Who waits for an answer goes first: what a server says of its pictures, and what a job on the same machine does then.

A few bytes in a file that both map into memory: the server writes until when it will be busy, a job looks between two
steps, which costs a microsecond. A server that dies is busy no longer than a moment. Knows a file and a clock.
"""

import hashlib
import mmap
import struct
import time
from pathlib import Path

import structlog

from app.settings import Settings

# Longer than the longest batch of a small network on a CPU; each picture and each batch says it anew.
BUSY_SECONDS = 0.1
# A job waits no longer than this between two steps, and no more than so many times what it worked since: under load
# without pause it becomes slower, and does not stand.
MOST_SECONDS, MOST_TIMES = 0.2, 3.0
_LOOK_SECONDS = 0.001
# This machine since it was started, whose clock it is; and when the server will be free, in seconds of that clock.
_RECORD = struct.Struct("<16sd")

log = structlog.get_logger(__name__)


class Precedence:
    """One end of the file; either end may be opened first."""

    def __init__(self, path: Path) -> None:
        """Where the file cannot be made, nobody is told and nobody waits: neither serving nor a job fails of it."""
        try:
            self._bytes = _mapped(path)
        except OSError as error:
            log.warning("jobs do not give way to predictions", error=type(error).__name__)
            self._bytes = mmap.mmap(-1, _RECORD.size)
        self._machine = _this_machine()
        self._worked_from = time.monotonic()

    @classmethod
    def of(cls, settings: Settings) -> "Precedence":
        return cls(settings.data_dir / "serving-busy")

    def claim(self) -> None:
        """Pictures wait, or are worked on."""
        self._write(time.monotonic() + BUSY_SECONDS)

    def release(self) -> None:
        """None waits any more."""
        self._write(time.monotonic())

    def give_way(self) -> float:
        """Waits while a server is busy, within limits. Returns the seconds waited. For one thread."""
        start = now = time.monotonic()
        latest = start + min(MOST_SECONDS, MOST_TIMES * (start - self._worked_from))
        while now < min(self._busy_until(), latest):
            time.sleep(_LOOK_SECONDS)
            now = time.monotonic()
        self._worked_from = now
        return now - start

    def _write(self, busy_until: float) -> None:
        _RECORD.pack_into(self._bytes, 0, self._machine, busy_until)

    def _busy_until(self) -> float:
        machine, busy_until = _RECORD.unpack_from(self._bytes)
        if machine != self._machine:  # a folder that several machines share, or of before the last start
            return 0.0
        return float(busy_until)


def _mapped(path: Path) -> mmap.mmap:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.seek(0, 2) < _RECORD.size:
            # Real bytes and no hole: a full disk says so here, and not by a signal at the first write to the map.
            file.write(bytes(_RECORD.size))
            file.flush()
        return mmap.mmap(file.fileno(), _RECORD.size)


def _this_machine() -> bytes:
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        started = b""
    return hashlib.sha256(started).digest()[:16]
