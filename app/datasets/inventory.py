"""An archive → what it holds, with every byte verified but no picture decoded. Runs at upload, and again at ingest."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.datasets import archive, layout
from app.datasets.archive import ArchiveLimits
from app.datasets.layout import File, Kind, Layout
from app.errors import TooLarge
from app.vision.images import ImageLimits, why_not_a_picture

_SNIFFED_BYTES = 16


@dataclass(frozen=True)
class Inventory:
    """All of an archive but what operating systems leave about. tables: paths of files that `layout.is_table`."""

    files: Sequence[File]
    folders: Sequence[str]
    tables: Sequence[str]


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
    tables: dict[str, bytes] = {}
    found = take_inventory(
        path,
        limits=limits,
        image_limits=image_limits,
        tick=tick,
        on_picture=on_picture,
        on_table=tables.__setitem__ if kind == "labelled" else None,
    )
    unread = [File(path, "a table, and no labels are asked for") for path in found.tables if path not in tables]
    return layout.recognise([*found.files, *unread], folders=found.folders, tables=tables, kind=kind)


def take_inventory(
    path: Path,
    *,
    limits: ArchiveLimits,
    image_limits: ImageLimits,
    tick: Callable[[float], None] = lambda _fraction: None,
    on_picture: Callable[[str, bytes], None] | None = None,
    on_table: Callable[[str, bytes], None] | None = None,
) -> Inventory:
    """Reads the archive once from end to end, in constant memory but for its names.

    tick: called for each member with the share of the archive read, 0 to 1; may raise to stop.
    on_picture: called with the path and the bytes of each file that looks like a picture, which are then held whole,
    one at a time.
    on_table: the same for each file that `layout.is_table`; all of them together may be as large as one member.
    Raises ArchiveRefused or TooLarge for all that is structurally wrong; nothing is left on disk by this.
    """
    size_bytes = max(path.stat().st_size, 1)
    files: list[File] = []
    folders: list[str] = []
    tables: list[str] = []
    table_bytes = 0
    for member, pieces in archive.stream(path, limits=limits):
        tick(min(member.position / size_bytes, 1.0))
        if member.is_folder:
            folders.append(member.path)
        elif layout.is_table(member.path):
            tables.append(member.path)
            if on_table is not None:
                table = _whole(pieces, max_bytes=limits.max_member_bytes - table_bytes)
                table_bytes += len(table)
                on_table(member.path, table)
        elif not layout.is_junk(member.path):
            head = _head(pieces)
            file = File(member.path, why_not_a_picture(head[:_SNIFFED_BYTES], image_limits))
            files.append(file)
            if on_picture is not None and file.why_not is None:
                on_picture(file.path, b"".join([head, *pieces]))
    return Inventory(files, folders, tables)


def _whole(pieces: Iterator[bytes], *, max_bytes: int) -> bytes:
    """All of a table. max_bytes: what the tables before it have left of what all may have together."""
    content = bytearray()
    for piece in pieces:
        content += piece
        if len(content) > max_bytes:
            raise TooLarge(
                f"The archive's tables ({', '.join(layout.TABLE_NAMES)}) are larger together than a member may be "
                "(GRAFT_MAX_MEMBER_BYTES): leave out those that do not say which picture has which label."
            )
    return bytes(content)


def _head(pieces: Iterator[bytes]) -> bytes:
    """As many pieces as it takes to tell the format, and no more."""
    head = b""
    for piece in pieces:
        head += piece
        if len(head) >= _SNIFFED_BYTES:
            break
    return head
