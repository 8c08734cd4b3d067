"""What is sent: archives, folders as zips made while they are sent, pictures. Memory stays flat whatever their size."""

import io
import mimetypes
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from graft_client.wire import Pieces

PathLike = str | os.PathLike[str]
# An archive's file, a folder of pictures, an archive's bytes, or an open file that can seek.
ArchiveSource = PathLike | bytes | BinaryIO
# A picture's file, its encoded bytes, an open file, or bytes with the name that the answer is to call them by.
Picture = PathLike | bytes | BinaryIO | tuple[str, bytes]
Pictures = Picture | Sequence[Picture]
# Bytes sent so far and in all; the first number falls back to 0 if an upload has to begin again.
OnProgress = Callable[[int, int], None]
NamedPicture = tuple[str, bytes]
_ARCHIVE_SUFFIX = re.compile(r"\.(zip|tar|tar\.gz|tgz)$", re.IGNORECASE)

PIECE_BYTES = 256 * 1024  # so that progress is seen on slow lines, too
# What one request may have, as the server is set up by default.
MOST_PICTURES = 64
MOST_PICTURE_BYTES = 48 * 1024**2


@dataclass(frozen=True)
class Upload:
    """An archive's body.

    name: of the file or folder, without the archive's suffix. length: in bytes; None for a folder, which is packed
    while it is sent.
    """

    name: str | None
    pieces: Pieces
    length: int | None


def upload_of(source: ArchiveSource, on_progress: OnProgress | None) -> Upload:
    """Raises FileNotFoundError, and ValueError for a folder without files."""
    if isinstance(source, bytes):
        pieces, size, name = _pieces_of(lambda: io.BytesIO(source)), len(source), None
    elif not isinstance(source, str | os.PathLike):
        start = source.tell()
        size = source.seek(0, os.SEEK_END) - start
        pieces, name = _pieces_from(source, start), None
    elif Path(source).is_dir():
        return _folder(Path(source), on_progress)
    else:
        path = Path(source)
        size, name = path.stat().st_size, _ARCHIVE_SUFFIX.sub("", _as_text(path.name))
        pieces = _pieces_of(lambda: path.open("rb"))
    return Upload(name, _told(pieces, size, on_progress), size)


def named_picture(picture: Picture) -> NamedPicture:
    """A picture's name and bytes. Blocking, where it is a file."""
    if isinstance(picture, tuple):
        return picture
    if isinstance(picture, bytes):
        return "picture", picture
    if isinstance(picture, str | os.PathLike):
        return _as_text(Path(picture).name), Path(picture).read_bytes()
    return _as_text(Path(getattr(picture, "name", "picture")).name), picture.read()


def as_sequence(pictures: Pictures) -> Sequence[Picture]:
    if isinstance(pictures, Sequence) and not isinstance(pictures, str | bytes) and not _is_named(pictures):
        return pictures
    return [cast(Picture, pictures)]


def grouped(pictures: Sequence[Picture]) -> Iterator[list[NamedPicture]]:
    """As many as one request may have, read when they are their turn. Blocking."""
    group: list[NamedPicture] = []
    size = 0
    for picture in pictures:
        named = named_picture(picture)
        if group and (len(group) == MOST_PICTURES or size + len(named[1]) > MOST_PICTURE_BYTES):
            yield group
            group, size = [], 0
        group.append(named)
        size += len(named[1])
    if group:
        yield group


def form_part(named: NamedPicture) -> tuple[str, tuple[str, bytes, str]]:
    name, encoded = named
    return "file", (name, encoded, mimetypes.guess_type(name)[0] or "application/octet-stream")


def files_of(folder: Path) -> list[Path]:
    """Every file in it that a data set may be made of: hidden ones are left out."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _folder(folder: Path, on_progress: OnProgress | None) -> Upload:
    files = files_of(folder)
    if not files:
        raise ValueError(f"The folder {folder} holds no files.")
    size = sum(path.stat().st_size for path in files)
    return Upload(_as_text(folder.resolve().name), _told(lambda: _zipped(folder, files), size, on_progress), None)


def _zipped(folder: Path, files: Sequence[Path]) -> Iterator[bytes]:
    """The pieces of a zip, the same bytes each time. Pictures are compressed already, so it only stores."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for path in files:
            name = "/".join(map(_as_text, path.relative_to(folder).parts))
            member = zipfile.ZipInfo.from_file(path, name, strict_timestamps=False)
            with path.open("rb") as file, archive.open(member, "w") as packed:
                while piece := file.read(PIECE_BYTES):
                    packed.write(piece)
                    if sink.size >= PIECE_BYTES:
                        yield sink.taken()
    yield sink.taken()


def _as_text(name: str) -> str:
    """A file's name. One that is not UTF-8, as old archives leave them, is taken for Latin-1: no two become one."""
    encoded = os.fsencode(name)
    try:
        return encoded.decode()
    except UnicodeDecodeError:
        return encoded.decode("latin-1")


class _Sink(io.RawIOBase):
    """Takes what zipfile writes, for somebody to take away; it cannot seek, so a zip is written from front to back."""

    def __init__(self) -> None:
        self._written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, piece: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        self._written += piece
        return len(piece)

    @property
    def size(self) -> int:
        return len(self._written)

    def taken(self) -> bytes:
        piece = bytes(self._written)
        self._written.clear()
        return piece


def _pieces_of(opened: Callable[[], BinaryIO]) -> Pieces:
    def pieces() -> Iterator[bytes]:
        with opened() as file:
            while piece := file.read(PIECE_BYTES):
                yield piece

    return pieces


def _pieces_from(file: BinaryIO, start: int) -> Pieces:
    def pieces() -> Iterator[bytes]:
        file.seek(start)
        while piece := file.read(PIECE_BYTES):
            yield piece

    return pieces


def _told(pieces: Pieces, size: int, on_progress: OnProgress | None) -> Pieces:
    if on_progress is None:
        return pieces

    def told() -> Iterator[bytes]:
        sent = 0
        for piece in pieces():
            on_progress(min(sent, size), size)
            yield piece
            sent += len(piece)
        on_progress(size, size)

    return told


def _is_named(pictures: Sequence[object]) -> bool:
    return isinstance(pictures, tuple) and [type(each) for each in pictures] == [str, bytes]
