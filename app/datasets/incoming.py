"""A request body on its way in → an open file, in constant memory.

Knows an asynchronous stream of bytes; not requests, not what is in them. Whose file it is, and what becomes of it when
the body breaks, is the caller's.
"""

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable
from io import FileIO
from pathlib import Path

import anyio
import anyio.to_thread

from app.errors import RequestTimeout, StorageFull, TooLarge

# Handed to a thread at a time: large enough that threads cost nothing, small enough for many uploads at once.
BUFFER_BYTES = 1024**2
_ROOM_CHECK_BYTES = 64 * 1024**2
# A client slower than this on average, once it had the time to start, holds a connection and a file for nothing.
_MIN_BYTES_PER_SECOND = 2048
_RATE_CHECK_AFTER_SECONDS = 20.0


async def paced(body: AsyncIterator[bytes], *, idle_timeout_seconds: float) -> AsyncIterator[bytes]:
    """The body's chunks; only the time spent waiting for the client counts against it.

    Raises RequestTimeout for a body that stops coming or trickles, and whatever `body` raises.
    """
    waited_seconds = 0.0
    received_bytes = 0
    while True:
        began = time.monotonic()
        try:
            async with asyncio.timeout(idle_timeout_seconds):
                chunk = await anext(body, None)
        except TimeoutError:
            raise RequestTimeout(
                f"The upload stopped for more than {idle_timeout_seconds:g} seconds; send it again."
            ) from None
        if chunk is None:
            return
        waited_seconds += time.monotonic() - began
        received_bytes += len(chunk)
        if waited_seconds > _RATE_CHECK_AFTER_SECONDS and received_bytes < _MIN_BYTES_PER_SECOND * waited_seconds:
            raise RequestTimeout("The upload is too slow to be kept waiting for; send it again.")
        yield chunk


def open_private(path: Path) -> FileIO:
    """A new, empty file that only its owner may read, as all that strangers upload; unbuffered."""
    return open(path, "wb", buffering=0, opener=_private)


def write_all(file: FileIO, data: bytes | bytearray) -> None:
    """Raises StorageFull; some of the data may have been written then."""
    view = memoryview(data)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        raise StorageFull("The server could not store the upload: its disk is full or failing.") from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class FileWriter:
    """The file being written: buffered and counted. Disk work happens in threads, in the two ways to flush."""

    def __init__(
        self,
        file: FileIO,
        *,
        max_bytes: int,
        check_room: Callable[[int], None],
        digest: "hashlib._Hash | None" = None,
    ) -> None:
        """file: unbuffered, written to from where it stands. max_bytes: that may be appended to it.

        check_room: called now and then with the bytes that are about to be written; raises StorageFull.
        digest: of all that is written, if it is wanted.
        """
        self._file = file
        self._max_bytes = max_bytes
        self._check_room = check_room
        self._digest = digest
        self._buffer = bytearray()
        self._room_checked_to = 0
        self.size_bytes = 0

    def append(self, data: bytes) -> None:
        """Raises TooLarge, and takes none of the data, if it is too much."""
        if self.size_bytes + len(data) > self._max_bytes:
            raise TooLarge(f"The upload is larger than {self._max_bytes} bytes, the most this server takes.")
        self.size_bytes += len(data)
        self._buffer += data

    async def flush_if_full(self) -> None:
        if len(self._buffer) >= BUFFER_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Raises StorageFull."""
        buffer, self._buffer = self._buffer, bytearray()
        await anyio.to_thread.run_sync(self._write, buffer)

    def _write(self, buffer: bytearray) -> None:
        if self.size_bytes >= self._room_checked_to:
            self._check_room(min(_ROOM_CHECK_BYTES, self._max_bytes))
            self._room_checked_to = self.size_bytes + _ROOM_CHECK_BYTES
        if self._digest is not None:
            self._digest.update(buffer)
        write_all(self._file, buffer)
