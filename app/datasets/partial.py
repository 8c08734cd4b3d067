"""An archive that comes in pieces: a file that grows, and whose length is all there is to know of how much has come.

A piece counts once it is in the file and synced, so no crash takes back what was acknowledged. Who appends holds the
file's lock, which the kernel frees with the process that dies: several processes may share the folder.
"""

import base64
import contextlib
import fcntl
import hashlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import anyio
import anyio.to_thread

from app.datasets.incoming import BUFFER_BYTES, FileWriter, open_private, paced, write_all
from app.errors import GraftError, Locked, NotFound, StorageFull, TooLarge


class ChecksumMismatch(GraftError):
    status = 460  # of tus, which has no other that says so
    code = "checksum-mismatch"
    title = "The piece is not what its checksum says"


@dataclass(frozen=True)
class Checksum:
    """Of one piece. algorithm: a name that hashlib knows."""

    algorithm: str
    digest: bytes


@dataclass(frozen=True)
class Arrival:
    """How a piece is to arrive. check_room: raises StorageFull. staged: where one with a checksum waits for its end."""

    idle_timeout_seconds: float
    check_room: Callable[[int], None]
    staged: Path
    checksum: Checksum | None = None


def create(path: Path) -> None:
    open_private(path).close()


def arrived_bytes(path: Path) -> int:
    """How much of the archive is there and would outlast a power cut. Raises FileNotFoundError."""
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        os.fsync(file.fileno())
    return length


@contextmanager
def locked(path: Path) -> Iterator["PartialFile"]:
    """The file, for nobody else to append to or to take away meanwhile. Raises Locked, or NotFound if there is none."""
    try:
        file = FileIO(os.open(path, os.O_RDWR | os.O_APPEND), "ab")
    except FileNotFoundError:
        raise NotFound("There is no such upload any more; begin a new one.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked(
                "Another request is at this upload; ask for its offset in a second and go on from there.",
                retry_after_seconds=1,
            ) from None
        yield PartialFile(file)


class PartialFile:
    """A locked file, which grows by pieces."""

    def __init__(self, file: FileIO) -> None:
        self._file = file

    @property
    def size_bytes(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    async def append(self, body: AsyncIterator[bytes], arrival: Arrival, *, max_bytes: int) -> None:
        """Appends what comes. Of a piece that breaks off all that came stays, and is synced; but of one with a checksum
        nothing stays unless all has come and is right.

        Raises TooLarge beyond max_bytes, RequestTimeout, StorageFull, ChecksumMismatch, and whatever `body` raises.
        """
        chunks = paced(body, idle_timeout_seconds=arrival.idle_timeout_seconds)
        try:
            if arrival.checksum is None:
                await self._append(chunks, arrival, max_bytes=max_bytes)
            else:
                await self._append_if_right(chunks, arrival, arrival.checksum, max_bytes=max_bytes)
        except TooLarge:
            raise TooLarge("The piece goes beyond the length that was given for the upload.") from None

    async def _append(self, chunks: AsyncIterator[bytes], arrival: Arrival, *, max_bytes: int) -> None:
        writer = FileWriter(self._file, max_bytes=max_bytes, check_room=arrival.check_room)
        try:
            await _take(chunks, writer)
        finally:
            # Also where the client has left, or the server is about to: what came, came.
            with anyio.CancelScope(shield=True):
                with contextlib.suppress(StorageFull):  # told above, if there is anybody to tell
                    await writer.flush()
                await anyio.to_thread.run_sync(os.fsync, self._file.fileno())

    async def _append_if_right(
        self, chunks: AsyncIterator[bytes], arrival: Arrival, checksum: Checksum, *, max_bytes: int
    ) -> None:
        digest = hashlib.new(checksum.algorithm, usedforsecurity=False)
        with open_private(arrival.staged) as file:
            await _take(chunks, FileWriter(file, max_bytes=max_bytes, check_room=arrival.check_room, digest=digest))
        if digest.digest() != checksum.digest:
            found = base64.b64encode(digest.digest()).decode()
            raise ChecksumMismatch(
                f"The piece that arrived has the {checksum.algorithm} {found}, not the one that was sent with it; it "
                "was dropped. Send it again."
            )
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._append_file, arrival.staged)

    def _append_file(self, staged: Path) -> None:
        # Cut short, it leaves the beginning of the piece, which is right, too.
        try:
            with staged.open("rb") as piece:
                while block := piece.read(BUFFER_BYTES):
                    write_all(self._file, block)
        finally:
            os.fsync(self._file.fileno())


async def _take(chunks: AsyncIterator[bytes], writer: FileWriter) -> None:
    async for chunk in chunks:
        writer.append(chunk)
        await writer.flush_if_full()
    await writer.flush()
