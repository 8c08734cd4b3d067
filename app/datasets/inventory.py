"""An archive → what it holds, with every byte verified but no picture decoded. Runs at upload, and again at ingest."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.datasets import archive, layout
from app.datasets.archive import ArchiveLimits
from app.datasets.layout import File, Kind, Layout
from app.vision.images import ImageLimits, why_not_a_picture

_SNIFFED_BYTES = 16


@dataclass(frozen=True)
class Inventory:
    """All of an archive but what operating systems leave about. tables: content of files that `layout.is_table`."""

    files: Sequence[File]
    folders: Sequence[str]
    tables: Mapping[str, bytes]


def inspect(
    path: Path,
    *,
    limits: ArchiveLimits,
    image_limits: ImageLimits,
    kind: Kind = "labelled",
    tick: Callable[[float], None] = lambda _fraction: None,
    on_picture: Callable[[str, bytes], None] | None = None,
) -> Layout:
    """The archive's layout. Takes and raises what `take_inventory` does, and ArchiveRefused without a usable layout."""
    found = take_inventory(path, limits=limits, image_limits=image_limits, tick=tick, on_picture=on_picture)
    return layout.recognise(found.files, folders=found.folders, tables=found.tables, kind=kind)


def take_inventory(
    path: Path,
    *,
    limits: ArchiveLimits,
    image_limits: ImageLimits,
    tick: Callable[[float], None] = lambda _fraction: None,
    on_picture: Callable[[str, bytes], None] | None = None,
) -> Inventory:
    """Reads the archive once from end to end, in constant memory but for its names and tables.

    tick: called for each member with the share of the archive read, 0 to 1; may raise to stop.
    on_picture: called with the path and the bytes of each file that looks like a picture, which are then held whole,
    one at a time.
    Raises ArchiveRefused or TooLarge for all that is structurally wrong; nothing is left on disk by this.
    """
    size_bytes = max(path.stat().st_size, 1)
    files: list[File] = []
    folders: list[str] = []
    tables: dict[str, bytes] = {}
    for member, pieces in archive.stream(path, limits=limits):
        tick(min(member.position / size_bytes, 1.0))
        if member.is_folder:
            folders.append(member.path)
        elif layout.is_table(member.path):
            tables[member.path] = b"".join(pieces)
        elif not layout.is_junk(member.path):
            head = _head(pieces)
            file = File(member.path, why_not_a_picture(head[:_SNIFFED_BYTES], image_limits))
            files.append(file)
            if on_picture is not None and file.why_not is None:
                on_picture(file.path, b"".join([head, *pieces]))
    return Inventory(files, folders, tables)


def _head(pieces: Iterator[bytes]) -> bytes:
    """As many pieces as it takes to tell the format, and no more."""
    head = b""
    for piece in pieces:
        head += piece
        if len(head) >= _SNIFFED_BYTES:
            break
    return head
