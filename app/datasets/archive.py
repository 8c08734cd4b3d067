"""Archives from strangers → their members, in order, one at a time, each exactly what the archive says it is.

An archive must mean one thing to every reader, so zips are parsed here: local headers and directory must tell the
same story, byte for byte, with no gap, no overlap and nothing before or after. Declared sizes are never trusted:
bytes are counted as they are unpacked. Nothing is ever extracted to a path. Knows names and bytes; not pictures.
"""

import gzip
import io
import re
import stat
import struct
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from app.errors import ArchiveRefused, TooLarge
from app.names import has_control_characters
from app.settings import Settings

MAX_NAME_BYTES = 1024
MAX_DEPTH = 16
# Small archives of flat drawings compress well; only above this much is a high ratio an attack.
RATIO_FREE_BYTES = 16 * 1024**2
# Extended attributes of macOS take some kilobytes; nothing honest takes a megabyte.
MAX_PAX_HEADER_BYTES = 1024**2

_CHUNK_BYTES = 256 * 1024


@dataclass(frozen=True)
class ArchiveLimits:
    """What an archive may unpack to."""

    max_unpacked_bytes: int
    max_member_bytes: int
    max_members: int
    max_compression_ratio: float  # unpacked bytes / archive bytes, once RATIO_FREE_BYTES are unpacked

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        return cls(
            max_unpacked_bytes=settings.max_unpacked_bytes,
            max_member_bytes=settings.max_member_bytes,
            max_members=settings.max_members,
            max_compression_ratio=settings.max_compression_ratio,
        )


@dataclass(frozen=True, slots=True)
class Member:
    """One file or folder of an archive. path: relative, "/" between parts, NFC, safe to show."""

    path: str
    is_folder: bool
    position: int  # bytes of the archive that lie before it, roughly, for progress


def stream(path: Path, *, limits: ArchiveLimits) -> Iterator[tuple[Member, Iterator[bytes]]]:
    """Each member with its bytes in pieces, in the order of the archive; pieces left over are read and checked too.

    Raises ArchiveRefused with a code that says what is wrong, or TooLarge beyond the limits; for a zip, everything
    but the members' checksums is verified before the first member is given out.
    """
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        head = file.read(512)
        file.seek(0)
        if head.startswith(_ZIP_STARTS):
            members = _zip_members(file, size, limits)
        elif head.startswith(b"\x1f\x8b"):
            members = _gzipped_tar_members(file, size, limits)
        elif _is_tar_header(head):
            members = _tar_members(_Source(file, file, size, limits), limits)
        elif _find_end_record(file, size) is not None:
            raise _corrupt("there are bytes before its first member")
        else:
            raise ArchiveRefused(
                "This is not an archive that can be read: send a zip, a tar or a tar.gz of images.",
                code="not-an-archive",
            )
        for member, pieces in members:
            yield member, pieces
            for _ in pieces:
                pass


def iterate(path: Path, *, limits: ArchiveLimits) -> Iterator[tuple[Member, bytes]]:
    """Each file with its bytes, verified, one at a time; folders are passed over. Raises as `stream` does."""
    for member, pieces in stream(path, limits=limits):
        if not member.is_folder:
            yield member, b"".join(pieces)


def _corrupt(what: str) -> ArchiveRefused:
    return ArchiveRefused(f"The archive is damaged: {what}. Make it anew and send it again.", code="corrupt-archive")


# Names ----------------------------------------------------------------------------------------------------------------


class _Names:
    """Checks each name, and that no two members claim the same place."""

    def __init__(self, limits: ArchiveLimits, *, are_folders_repeatable: bool) -> None:
        self._limits = limits
        self._are_folders_repeatable = are_folders_repeatable
        self._files: set[str] = set()
        self._folders: set[str] = set()  # with an entry of their own
        self._parents: set[str] = set()  # of anything
        self._count = 0

    def accept(self, name: str, *, is_folder: bool) -> str:
        """The name as a safe relative path ("" for the root itself, a folder). Raises ArchiveRefused or TooLarge."""
        self._count += 1
        if self._count > self._limits.max_members:
            raise TooLarge(f"The archive has more than {self._limits.max_members} members.")
        path = safe_path(name)
        if not path and not is_folder:
            raise _unsafe(name, "is a file in place of the folder that holds all")
        is_twice = path in self._files or (path in self._folders and not (is_folder and self._are_folders_repeatable))
        if is_twice and path:
            raise ArchiveRefused(f"The archive holds {shown(path)} twice.", code="duplicate-member")
        (self._folders if is_folder else self._files).add(path)
        parent = path.rpartition("/")[0]
        while parent and parent not in self._parents:
            self._parents.add(parent)
            parent = parent.rpartition("/")[0]
        if (not is_folder and path in self._parents) or self._has_file_above(path):
            raise ArchiveRefused(
                f"The archive holds {shown(path)} where a name is both a file and a folder.", code="duplicate-member"
            )
        return path

    def _has_file_above(self, path: str) -> bool:
        parent = path.rpartition("/")[0]
        while parent:
            if parent in self._files:
                return True
            parent = parent.rpartition("/")[0]
        return False


_DRIVE = re.compile(r"[A-Za-z]:")


def safe_path(name: str) -> str:
    """A member's name as a relative path with "/" between parts, in NFC; "" for the archive's root itself.

    Raises ArchiveRefused (unsafe-path) for whatever could mean a place outside, or two things to two readers.
    """
    name = unicodedata.normalize("NFC", name)
    if "\\" in name:
        if "/" in name:
            raise _unsafe(name, "mixes slashes and backslashes")
        name = name.replace("\\", "/")
    # "Icon\r" is what the macOS Finder calls a folder's icon.
    if has_control_characters(name.removesuffix("Icon\r")):
        raise _unsafe(name, "has control characters in its name")
    if name.startswith("/"):
        raise _unsafe(name, "has an absolute path")
    if _DRIVE.match(name):
        raise _unsafe(name, "names a drive")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise _unsafe(name, f"has a name longer than {MAX_NAME_BYTES} bytes")
    parts = [part for part in name.split("/") if part not in {"", "."}]
    if ".." in parts:
        raise _unsafe(name, 'climbs out with ".."')
    if len(parts) > MAX_DEPTH:
        raise _unsafe(name, f"lies deeper than {MAX_DEPTH} folders")
    return "/".join(parts)


def shown(name: str) -> str:
    """A caller's file name, quoted and escaped, short enough for a message."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    return f'"{text if len(text) <= 120 else text[:60] + "…" + text[-59:]}"'


def listed_path(path: str) -> str:
    """A path for the report, as it is where a member may have it; what else a table names, as `shown` has it."""
    is_too_long = len(path.encode(errors="surrogatepass")) > MAX_NAME_BYTES
    return shown(path) if is_too_long or has_control_characters(path) else path


def _unsafe(name: str, why: str) -> ArchiveRefused:
    return ArchiveRefused(f"The archive's member {shown(name)} {why}.", code="unsafe-path")


class _Meter:
    """Counts what is unpacked and refuses what is too much."""

    def __init__(self, archive_bytes: int, limits: ArchiveLimits) -> None:
        self._archive_bytes = archive_bytes
        self._limits = limits
        self.unpacked_bytes = 0

    def add(self, count: int) -> None:
        self.unpacked_bytes += count
        allowed = self._limits.max_compression_ratio * self._archive_bytes
        if self.unpacked_bytes > RATIO_FREE_BYTES and self.unpacked_bytes > allowed:
            raise ArchiveRefused(
                f"The archive unpacks to more than {self._limits.max_compression_ratio:g} times its size.",
                code="archive-bomb",
            )
        if self.unpacked_bytes > self._limits.max_unpacked_bytes:
            raise TooLarge(f"The archive unpacks to more than {self._limits.max_unpacked_bytes} bytes.")


def _check_member_size(path: str, size: int, limits: ArchiveLimits) -> None:
    if size > limits.max_member_bytes:
        raise TooLarge(f"The archive's member {shown(path)} is larger than {limits.max_member_bytes} bytes.")


# Zip ------------------------------------------------------------------------------------------------------------------
# Source of the layout: PKWARE APPNOTE 6.3.10, sections 4.3 and 4.5.

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_LOCATOR64 = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")

_END_SIGNATURE = b"PK\x05\x06"
_ZIP_STARTS = (b"PK\x03\x04", _END_SIGNATURE, b"PK\x06\x06", b"PK\x07\x08", b"PK00PK\x03\x04")

_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # "see the Zip64 record"
_ENCRYPTED, _DESCRIPTOR, _PATCHED, _STRONG, _UTF8, _MASKED = 0x1, 0x8, 0x20, 0x40, 0x800, 0x2000
_STORED, _DEFLATED, _AES = 0, 8, 99
_EXTRA_ZIP64, _EXTRA_NAME = 0x0001, 0x7075
_NEWEST_VERSION = 63  # of the format, times ten: what other readers know; nothing that is accepted here needs more
_UNIX_SYSTEMS = {3, 19}  # Unix, Darwin: only theirs have a file type in the high half of the attributes


@dataclass(frozen=True, slots=True)
class _Entry:
    """One line of a zip's directory."""

    path: str
    raw_name: bytes
    is_folder: bool
    flags: int
    method: int
    crc: int
    packed_bytes: int
    unpacked_bytes: int
    offset: int


def _zip_members(file: BinaryIO, size: int, limits: ArchiveLimits) -> Iterator[tuple[Member, Iterator[bytes]]]:
    entries, directory_offset = _read_directory(file, size, limits)
    entries.sort(key=lambda entry: entry.offset)
    starts = _check_local_headers(file, entries, directory_offset)
    meter = _Meter(size, limits)
    for entry, start in zip(entries, starts, strict=True):
        member = Member(entry.path, entry.is_folder, entry.offset)
        yield member, _unpack(file, entry, start, meter)


def _find_end_record(file: BinaryIO, size: int) -> int | None:
    """Where the one end record begins, which must reach exactly to the end of the file; None if there is none."""
    tail_bytes = min(size, _END.size + _FULL16)
    file.seek(size - tail_bytes)
    tail = file.read(tail_bytes)
    found = tail.rfind(_END_SIGNATURE)
    if found < 0 or found + _END.size > len(tail):
        return None
    comment_bytes = int.from_bytes(tail[found + 20 : found + 22], "little")
    if found + _END.size + comment_bytes != len(tail):
        raise _corrupt("there are bytes after its end")
    # A second record, in a comment or before, is what another reader might believe.
    start = max(0, found - _END.size - _FULL16)
    other = tail.rfind(_END_SIGNATURE, start, found)
    while other >= 0:
        comment_bytes = int.from_bytes(tail[other + 20 : other + 22], "little")
        if other + _END.size + comment_bytes == len(tail):
            raise _corrupt("it has two ends")
        other = tail.rfind(_END_SIGNATURE, start, other)
    return size - tail_bytes + found


def _read_directory(file: BinaryIO, size: int, limits: ArchiveLimits) -> tuple[list[_Entry], int]:
    """The directory's entries, in its own order, and where it begins."""
    end_offset = _find_end_record(file, size)
    if end_offset is None:
        raise _corrupt("its end is missing")
    file.seek(end_offset)
    _, disk, first_disk, here, count, length, offset, _ = _END.unpack(file.read(_END.size))
    directory_end = end_offset
    zip64 = _read_end64(file, end_offset)
    if zip64 is not None:
        directory_end, count64, length64, offset64 = zip64
        narrow = ((count, _FULL16, count64), (here, _FULL16, count64), (length, _FULL32, length64))
        for value, full, wide in (*narrow, (offset, _FULL32, offset64)):
            if value not in {full, wide}:
                raise _corrupt("its two end records differ")
        count, here, length, offset = count64, count64, length64, offset64
        disk, first_disk = disk % _FULL16, first_disk % _FULL16
    if disk or first_disk or here != count:
        raise ArchiveRefused("The archive is one part of several; send it in one piece.", code="split-archive")
    if offset + length != directory_end:
        raise _corrupt("its directory does not lie where its end record says")
    if count > limits.max_members:
        raise TooLarge(f"The archive has more than {limits.max_members} members.")

    names = _Names(limits, are_folders_repeatable=False)
    entries: list[_Entry] = []
    file.seek(offset)
    # Who packs more than 65,535 members without Zip64, as client-zip in browsers, says 65,535.
    is_counted = zip64 is not None or count != _FULL16
    while len(entries) < count or (not is_counted and file.tell() < directory_end):
        entries.append(_read_entry(file, names))
        if len(entries) > limits.max_members:
            raise TooLarge(f"The archive has more than {limits.max_members} members.")
    if file.tell() != directory_end:
        raise _corrupt("its directory does not have as many entries as it says")
    # Before anything is unpacked, by what it says of itself; what it really holds is counted later.
    _Meter(size, limits).add(sum(entry.unpacked_bytes for entry in entries))
    for entry in entries:
        _check_member_size(entry.path, entry.unpacked_bytes, limits)
    return entries, offset


def _read_end64(file: BinaryIO, end_offset: int) -> tuple[int, int, int, int] | None:
    """(where the Zip64 end record begins, entries, directory bytes, directory offset), or None without one."""
    locator_offset = end_offset - _LOCATOR64.size
    if locator_offset < 0:
        return None
    file.seek(locator_offset)
    signature, disk, record_offset, disks = _LOCATOR64.unpack(file.read(_LOCATOR64.size))
    if signature != b"PK\x06\x07":
        return None
    if disk or disks > 1 or record_offset + _END64.size > locator_offset:
        raise _corrupt("its Zip64 records are wrong")
    file.seek(record_offset)
    signature, length, _, _, disk, first_disk, here, count, directory_bytes, directory_offset = _END64.unpack(
        file.read(_END64.size)
    )
    is_whole = length == _END64.size - 12 and record_offset + _END64.size == locator_offset
    if signature != b"PK\x06\x06" or not is_whole or disk or first_disk or here != count:
        raise _corrupt("its Zip64 records are wrong")
    return record_offset, count, directory_bytes, directory_offset


def _read_entry(file: BinaryIO, names: _Names) -> _Entry:
    header = _read_exactly(file, _CENTRAL.size)
    (
        signature, made_by, needed, flags, method, _, _, crc, packed, unpacked,
        name_bytes, extra_bytes, comment_bytes, disk, _, attributes, offset,
    ) = _CENTRAL.unpack(header)  # fmt: skip
    if signature != b"PK\x01\x02":
        raise _corrupt("its directory is not one")
    raw_name = _read_exactly(file, name_bytes)
    name = _decoded(raw_name, flags)
    extras = _extras(_read_exactly(file, extra_bytes), name)
    _read_exactly(file, comment_bytes)
    unpacked, packed, offset, disk = _widened(extras.get(_EXTRA_ZIP64), unpacked, packed, offset, disk)
    is_folder = name.endswith(("/", "\\"))
    _check_kind(name, is_folder=is_folder, system=made_by >> 8, mode=attributes >> 16)
    if flags & (_ENCRYPTED | _STRONG | _MASKED) or method == _AES:
        raise ArchiveRefused("The archive is encrypted; send it without a password.", code="encrypted-archive")
    if method not in {_STORED, _DEFLATED} or flags & _PATCHED or needed & 0xFF > _NEWEST_VERSION:
        raise ArchiveRefused(
            f"The archive's member {shown(name)} is packed in a way that is not read here; use plain zip (deflate).",
            code="unsupported-compression",
        )
    if disk:
        raise ArchiveRefused("The archive is one part of several; send it in one piece.", code="split-archive")
    if is_folder and unpacked:
        raise _corrupt(f"the folder {shown(name)} has content")
    if method == _STORED and packed != unpacked:
        raise _corrupt(f"{shown(name)} has two sizes")
    path = names.accept(name, is_folder=is_folder)
    return _Entry(path, raw_name, is_folder, flags, method, crc, packed, unpacked, offset)


def _check_kind(name: str, *, is_folder: bool, system: int, mode: int) -> None:
    kind = stat.S_IFMT(mode)
    if kind == stat.S_IFLNK:
        raise ArchiveRefused(f"The archive's member {shown(name)} is a link.", code="archive-link")
    if system not in _UNIX_SYSTEMS:
        return
    if kind not in {0, stat.S_IFREG, stat.S_IFDIR}:
        raise ArchiveRefused(f"The archive's member {shown(name)} is no regular file.", code="special-file")
    if kind and (kind == stat.S_IFDIR) != is_folder:
        raise _corrupt(f"{shown(name)} is both a file and a folder")


def _decoded(raw_name: bytes, flags: int) -> str:
    try:
        return raw_name.decode("utf-8")
    except UnicodeDecodeError:
        if flags & _UTF8:
            raise _corrupt("a name that should be UTF-8 is not") from None
        return raw_name.decode("cp437")


def _extras(raw: bytes, name: str) -> dict[int, bytes]:
    """Extra fields by their id. Refused: malformed ones, and a second name."""
    fields: dict[int, bytes] = {}
    position = 0
    while position < len(raw):
        if position + 4 > len(raw):
            raise _corrupt(f"the extra fields of {shown(name)} are cut off")
        kind, length = struct.unpack_from("<2H", raw, position)
        position += 4
        if position + length > len(raw):
            raise _corrupt(f"the extra fields of {shown(name)} are cut off")
        if kind == _EXTRA_ZIP64 and kind in fields:
            raise _corrupt(f"{shown(name)} has two sizes")
        fields[kind] = raw[position : position + length]
        position += length
        if kind == _EXTRA_NAME and fields[kind][5:] != name.encode():
            raise _corrupt(f"{shown(name)} has a second name")
    return fields


def _widened(zip64: bytes | None, *values: int) -> tuple[int, int, int, int]:
    """unpacked and packed size, offset and disk, each from the Zip64 field where the narrow one is full."""
    fulls = (_FULL32, _FULL32, _FULL32, _FULL16)
    field = io.BytesIO(zip64 or b"")
    widened = []
    for value, full, length in zip(values, fulls, (8, 8, 8, 4), strict=True):
        if value == full and zip64 is not None:
            raw = field.read(length)
            if len(raw) != length:
                raise _corrupt("a Zip64 field is cut off")
            widened.append(int.from_bytes(raw, "little"))
        else:
            widened.append(value)
    if field.read():
        raise _corrupt("a Zip64 field is longer than it should be")
    unpacked, packed, offset, disk = widened
    return unpacked, packed, offset, disk


def _check_local_headers(file: BinaryIO, entries: list[_Entry], directory_offset: int) -> list[int]:
    """Where each entry's packed bytes begin; every byte from 0 to the directory must belong to exactly one entry."""
    starts = []
    position = 0
    for index, entry in enumerate(entries):
        if entry.offset != position:
            raise _corrupt("its members overlap or leave gaps")
        limit = entries[index + 1].offset if index + 1 < len(entries) else directory_offset
        start = _check_local_header(file, entry)
        starts.append(start)
        position = start + entry.packed_bytes
        if position > limit:
            raise _corrupt("its members overlap or leave gaps")
        if entry.flags & _DESCRIPTOR:
            _check_descriptor(file, entry, position, limit)
            position = limit
    if position != directory_offset:
        raise _corrupt("its members overlap or leave gaps")
    return starts


def _check_local_header(file: BinaryIO, entry: _Entry) -> int:
    file.seek(entry.offset)
    signature, needed, flags, method, _, _, crc, packed, unpacked, name_bytes, extra_bytes = _LOCAL.unpack(
        _read_exactly(file, _LOCAL.size)
    )
    told_by_both = _ENCRYPTED | _DESCRIPTOR | _UTF8
    raw_name = _read_exactly(file, name_bytes)
    if (
        signature != b"PK\x03\x04"
        or raw_name != entry.raw_name
        or method != entry.method
        or needed & 0xFF > _NEWEST_VERSION
        or (flags ^ entry.flags) & told_by_both
    ):
        raise _corrupt(f"the header of {shown(entry.path)} and the directory differ")
    extras = _extras(_read_exactly(file, extra_bytes), _decoded(raw_name, flags))
    if extras.get(_EXTRA_ZIP64) and packed == unpacked == _FULL32:
        unpacked, packed = struct.unpack_from("<2Q", extras[_EXTRA_ZIP64].ljust(16, b"\xff"))
    # With a data descriptor the header may leave these at zero, since they were not known yet.
    allowed_zero = {0} if flags & _DESCRIPTOR else set()
    for value, expected in ((crc, entry.crc), (packed, entry.packed_bytes), (unpacked, entry.unpacked_bytes)):
        if value != expected and value not in allowed_zero:
            raise _corrupt(f"the header of {shown(entry.path)} and the directory differ")
    return file.tell()


def _check_descriptor(file: BinaryIO, entry: _Entry, position: int, limit: int) -> None:
    """Its length says which of the four forms it has: with or without signature, 32 or 64 bits."""
    length = limit - position
    if length not in {12, 16, 20, 24}:
        raise _corrupt("its members overlap or leave gaps")
    file.seek(position)
    raw = _read_exactly(file, length)
    if length in {16, 24}:
        if raw[:4] != b"PK\x07\x08":
            raise _corrupt("its members overlap or leave gaps")
        raw = raw[4:]
    told = struct.unpack("<3I" if len(raw) == 12 else "<I2Q", raw)
    if told != (entry.crc, entry.packed_bytes, entry.unpacked_bytes):
        raise _corrupt(f"the descriptor of {shown(entry.path)} and the directory differ")


def _unpack(file: BinaryIO, entry: _Entry, start: int, meter: _Meter) -> Iterator[bytes]:
    pieces = _inflated(file, entry, start) if entry.method == _DEFLATED else _stored(file, entry, start)
    unpacked = crc = 0
    for piece in pieces:
        unpacked += len(piece)
        if unpacked > entry.unpacked_bytes:
            raise _corrupt(f"{shown(entry.path)} is larger than it says")
        meter.add(len(piece))
        crc = zlib.crc32(piece, crc)
        yield piece
    if unpacked != entry.unpacked_bytes or crc != entry.crc:
        raise _corrupt(f"{shown(entry.path)} does not match its checksum")


def _stored(file: BinaryIO, entry: _Entry, start: int) -> Iterator[bytes]:
    file.seek(start)
    left = entry.packed_bytes
    while left:
        piece = _read_exactly(file, min(left, _CHUNK_BYTES))
        left -= len(piece)
        yield piece


def _inflated(file: BinaryIO, entry: _Entry, start: int) -> Iterator[bytes]:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        for packed in _stored(file, entry, start):
            if inflater.eof:
                raise _corrupt(f"{shown(entry.path)} ends before its bytes do")
            waiting = packed
            # At the end of the stream zlib hands back what is left again and again, and keeps a copy each time.
            while waiting and not inflater.eof:
                piece = inflater.decompress(waiting, _CHUNK_BYTES)
                waiting = inflater.unconsumed_tail
                yield piece
        while not inflater.eof and (piece := inflater.decompress(b"", _CHUNK_BYTES)):
            yield piece
    except zlib.error:
        raise _corrupt(f"{shown(entry.path)} cannot be unpacked") from None
    if not inflater.eof or inflater.unused_data:
        raise _corrupt(f"{shown(entry.path)} ends before or after its bytes do")


def _read_exactly(file: BinaryIO, count: int) -> bytes:
    raw = file.read(count)
    if len(raw) != count:
        raise _corrupt("it is cut off")
    return raw


# Tar ------------------------------------------------------------------------------------------------------------------
# Source of the layout: POSIX.1-2017 pax and ustar, GNU tar's "L" headers and base-256 numbers.

_BLOCK_BYTES = 512
_ZEROS = bytes(_BLOCK_BYTES)


class _Source:
    """Bytes of a tar, unpacked and counted. `file` is what lies on disk, for progress."""

    def __init__(self, unpacked: BinaryIO, file: BinaryIO, archive_bytes: int, limits: ArchiveLimits) -> None:
        self._unpacked = unpacked
        self._file = file
        self._meter = _Meter(archive_bytes, limits)

    def read(self, count: int) -> bytes:
        """Exactly so many bytes. Raises ArchiveRefused if there are fewer."""
        raw = self.read_up_to(count)
        if len(raw) != count:
            raise _corrupt("it is cut off")
        return raw

    def read_up_to(self, count: int) -> bytes:
        try:
            raw = self._unpacked.read(count)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise _corrupt("it cannot be unpacked to its end") from None
        self._meter.add(len(raw))
        return raw

    @property
    def position(self) -> int:
        return self._file.tell()


def _gzipped_tar_members(file: BinaryIO, size: int, limits: ArchiveLimits) -> Iterator[tuple[Member, Iterator[bytes]]]:
    with gzip.GzipFile(fileobj=file, mode="rb") as unpacked:
        try:
            head = unpacked.read(_BLOCK_BYTES)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise _corrupt("it cannot be unpacked") from None
        if not _is_tar_header(head):
            raise ArchiveRefused(
                "This is a compressed file, but no tar.gz; send a zip, a tar or a tar.gz of images.",
                code="not-an-archive",
            )
        unpacked.seek(0)
        yield from _tar_members(_Source(unpacked, file, size, limits), limits)  # type: ignore[arg-type]


def _is_tar_header(block: bytes) -> bool:
    if len(block) != _BLOCK_BYTES or block == _ZEROS:
        return False
    stated = block[148:156].strip(b" \x00")
    if not re.fullmatch(rb"[0-7]{1,7}", stated):
        return False
    return int(stated, 8) == sum(block) - sum(block[148:156]) + 8 * ord(" ")


def _tar_members(source: _Source, limits: ArchiveLimits) -> Iterator[tuple[Member, Iterator[bytes]]]:
    names = _Names(limits, are_folders_repeatable=True)
    while (header := _next_tar_header(source)) is not None:
        name, size, is_folder, position = header
        path = names.accept(name, is_folder=is_folder)
        _check_member_size(path, size, limits)
        pieces = _tar_pieces(source, size)
        if path:
            yield Member(path, is_folder, position), pieces
    while rest := source.read_up_to(_CHUNK_BYTES):
        if rest.strip(b"\x00"):
            raise _corrupt("there are bytes after its end")


def _tar_pieces(source: _Source, size: int) -> Iterator[bytes]:
    left = size
    while left:
        piece = source.read(min(left, _CHUNK_BYTES))
        left -= len(piece)
        yield piece
    source.read(-size % _BLOCK_BYTES)


def _next_tar_header(source: _Source) -> tuple[str, int, bool, int] | None:
    """(name, size, is a folder, position) of the next member, with pax and GNU headers applied; None at the end."""
    long_name: bytes | None = None
    pax: dict[str, bytes] = {}
    while True:
        position = source.position
        block = source.read(_BLOCK_BYTES)
        if block == _ZEROS:
            if long_name is not None or pax:
                raise _corrupt("it ends in the middle of a member")
            return None
        if not _is_tar_header(block):
            raise _corrupt("a header is not one")
        kind = block[156:157]
        size = _tar_number(block[124:136])
        if kind in {b"x", b"g", b"L", b"K"}:
            if size > MAX_PAX_HEADER_BYTES:
                raise TooLarge(f"The archive has a header larger than {MAX_PAX_HEADER_BYTES} bytes.")
            raw = b"".join(_tar_pieces(source, size))
            if kind == b"L":
                long_name = raw.rstrip(b"\x00")
            elif kind == b"x":
                pax = _pax_records(raw)
            elif kind == b"g" and {"path", "size"} & _pax_records(raw).keys():
                raise _corrupt("it gives one name or size to all members")
            continue
        return _tar_member(block, kind, size, long_name, pax, position)


def _tar_member(
    block: bytes, kind: bytes, size: int, long_name: bytes | None, pax: dict[str, bytes], position: int
) -> tuple[str, int, bool, int]:
    raw_name = block[:100].split(b"\x00", 1)[0]
    prefix = block[345:500].split(b"\x00", 1)[0] if block[257:263] == b"ustar\x00" else b""
    if prefix:
        raw_name = prefix + b"/" + raw_name
    if long_name is not None:
        raw_name = long_name
    raw_name = pax.get("path", raw_name)
    name = _decoded(raw_name, 0)
    if kind in {b"1", b"2"}:
        raise ArchiveRefused(f"The archive's member {shown(name)} is a link.", code="archive-link")
    if kind not in {b"0", b"\x00", b"5"} or any(key.startswith("GNU.sparse") for key in pax):
        raise ArchiveRefused(f"The archive's member {shown(name)} is no regular file.", code="special-file")
    if "size" in pax:
        if not re.fullmatch(rb"[0-9]{1,15}", pax["size"]):
            raise _corrupt("a size is not a number")
        size = int(pax["size"])
    # Before POSIX a folder was a file whose name ended in a slash.
    is_folder = kind == b"5" or raw_name.endswith(b"/")
    if is_folder and size:
        raise _corrupt(f"the folder {shown(name)} has content")
    return name, size, is_folder, position


def _tar_number(field: bytes) -> int:
    if field[0] == 0x80:  # base 256, for more than 8 GiB
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \x00") or b"0"
    if not re.fullmatch(rb"[0-7]+", digits):
        raise _corrupt("a size is not a number")
    return int(digits, 8)


def _pax_records(raw: bytes) -> dict[str, bytes]:
    """Records of the form "<length> <key>=<value>\\n"."""
    records: dict[str, bytes] = {}
    position = 0
    while position < len(raw):
        match = re.compile(rb"(\d{1,7}) ([^=]+)=").match(raw, position)
        end = position + int(match[1]) if match else 0
        if match is None or end > len(raw) or end <= match.end() or raw[end - 1 : end] != b"\n":
            raise _corrupt("a pax header is malformed")
        records[match[2].decode("utf-8", "replace")] = raw[match.end() : end - 1]
        position = end
    return records
