"""Pictures from strangers decoded in processes that may be killed: what one of them does to its decoder ends there.

A few programs (decoder.py), each bounded in memory and, per picture, in processor time. Bytes go and pixels come by
shared memory, a word on a socket says when. Small plain JPEGs, whose cost their header bounds, are decoded where they
are: see docs/decisions/0027-decoding-in-processes.md. Knows pictures and processes; not models, not requests.
"""

import contextlib
import fcntl
import json
import mmap
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from typing import Self

import numpy as np

from app.errors import ImageRefused, Overloaded
from app.settings import Settings
from app.vision.decoder import ANSWER, REQUEST
from app.vision.device import usable_cores
from app.vision.images import ImageLimits, Pixels, decode, is_simple

PROGRAM = (sys.executable, "-m", "app.vision.decoder")

# Memory that a large picture took is given back; what most take is kept for the next one.
_KEPT_BYTES = 8 * 1024**2
# By its own time a picture ends itself; this is for a process that does not run at all, and the machine may be busy.
_WALL_TIMES, _WALL_SECONDS = 10, 60.0
# A process that was killed from outside, for memory perhaps, says nothing of its picture.
_TRIES = 2


class Decoders:
    """A pool of decoding processes, started when needed; safe to use from many threads. End with `close()`."""

    def __init__(self, limits: ImageLimits, *, processes: int, memory_bytes: int, cpu_seconds: float) -> None:
        """processes: 0 decodes in the caller's thread. memory_bytes: what a process may take beyond its start.

        cpu_seconds: of a process, for one picture.
        """
        self.limits = limits
        self._processes = processes
        self._memory_bytes = memory_bytes
        self._cpu_seconds = cpu_seconds
        self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()  # None: one to be started
        for _ in range(processes):
            self._idle.put(None)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        count = settings.decode_processes
        return cls(
            ImageLimits.from_settings(settings),
            processes=max(2, usable_cores()) if count is None else count,
            memory_bytes=settings.decode_memory_bytes,
            cpu_seconds=settings.decode_cpu_seconds,
        )

    @classmethod
    def trusting(cls, limits: ImageLimits) -> Self:
        """Without processes: for pictures that do no harm."""
        return cls(limits, processes=0, memory_bytes=0, cpu_seconds=0)

    def decode(self, encoded: bytes, *, side: int) -> Pixels:
        """As `images.decode`. Raises ImageRefused, also for what takes too much memory or time, or ends its decoder.

        Raises Overloaded when decoders are killed from outside: that says nothing of the picture.
        """
        if not self._processes or is_simple(encoded):
            return decode(encoded, side=side, limits=self.limits)
        if len(encoded) > self.limits.max_bytes:
            raise ImageRefused(f"larger than {self.limits.max_bytes} bytes")
        for _ in range(_TRIES):
            try:
                with self._process() as process:
                    return process.decode(encoded, side=side)
            except _Ended as ended:
                if ended.status == -signal.SIGPROF:
                    raise ImageRefused(f"takes more than {self._cpu_seconds:g} s to decode") from None
                if ended.status != -signal.SIGKILL:
                    raise ImageRefused("ends the process that decodes it: damaged, or made to do harm") from None
        raise Overloaded(
            "The processes that decode pictures are killed, perhaps for the machine's memory; try again soon.",
            retry_after_seconds=5,
        )

    def close(self) -> None:
        """Ends the processes that are idle; one that is at work ends when it comes back."""
        for _ in range(self._processes):
            with contextlib.suppress(queue.Empty):
                process = self._idle.get_nowait()
                if process is not None:
                    process.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _process(self) -> Iterator["_Process"]:
        process = self._idle.get()
        try:
            if process is not None and process.has_ended:
                process.end()
                process = None
            if process is None:
                process = _Process(self.limits, memory_bytes=self._memory_bytes, cpu_seconds=self._cpu_seconds)
            yield process
        finally:
            self._idle.put(process)


class _Ended(Exception):
    """A decoder that is no more. status: its exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


class _Process:
    """One decoder, asked by one thread at a time."""

    def __init__(self, limits: ImageLimits, *, memory_bytes: int, cpu_seconds: float) -> None:
        # Only what is touched takes memory.
        self._shared_bytes = max(limits.max_bytes, 3 * limits.max_pixels)
        descriptor = _shared_memory(self._shared_bytes)
        self._shared = mmap.mmap(descriptor, self._shared_bytes)
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(_WALL_SECONDS + _WALL_TIMES * cpu_seconds)
        order = {
            "limits": asdict(limits) | {"extra_formats": sorted(limits.extra_formats)},
            "socket": theirs.fileno(),
            "shared": descriptor,
            "shared_bytes": self._shared_bytes,
            "memory_bytes": memory_bytes,
            "cpu_seconds": cpu_seconds,
        }
        try:
            self._process = subprocess.Popen(
                [*PROGRAM, json.dumps(order)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), descriptor),
                env=_environment(),
            )
        finally:
            theirs.close()
            os.close(descriptor)
        try:
            self._received(1)
        except (EOFError, OSError):
            status = self.end()
            if status >= 0:
                raise RuntimeError(f"the decoder does not start: exit status {status}") from None
            raise _Ended(status) from None

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def decode(self, encoded: bytes, *, side: int) -> Pixels:
        """Raises ImageRefused, and _Ended if the process ends or does not answer."""
        try:
            self._shared[: len(encoded)] = encoded
            self._socket.sendall(REQUEST.pack(len(encoded), side))
            height, width, reason_bytes = ANSWER.unpack(self._received(ANSWER.size))
            reason = self._received(min(reason_bytes, 1000)).decode(errors="replace")
            pixel_bytes = 3 * height * width
            if not reason and not 0 < pixel_bytes <= self._shared_bytes:
                raise EOFError("no decoder of ours answers so")
        except (EOFError, OSError):
            raise _Ended(self.end()) from None
        if reason:
            raise ImageRefused(reason)
        pixels = np.frombuffer(self._shared, np.uint8, pixel_bytes).reshape(height, width, 3).copy()
        if max(pixel_bytes, len(encoded)) > _KEPT_BYTES and hasattr(mmap, "MADV_REMOVE"):
            self._shared.madvise(mmap.MADV_REMOVE)
        return pixels

    def end(self) -> int:
        """Returns the exit status; that of a process that ended by itself is its own."""
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(0.5)
        self._process.kill()
        return self._process.wait()

    def _received(self, count: int) -> bytes:
        received = self._socket.recv(count, socket.MSG_WAITALL) if count else b""
        if len(received) != count:
            raise EOFError("the decoder has ended")
        return received


def _shared_memory(size: int) -> int:
    """A file in memory that neither side can make shorter: a shorter one would end who reads it."""
    if sys.platform != "linux":
        with tempfile.TemporaryFile() as file:
            file.truncate(size)
            return os.dup(file.fileno())
    descriptor = os.memfd_create("pictures", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return descriptor


def _environment() -> dict[str, str]:
    """Without our settings, which may hold passwords."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}
    return kept | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
