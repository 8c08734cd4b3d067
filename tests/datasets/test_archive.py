"""Archives that are what they say are read to the byte; all others are refused with a code of their own."""

import io
import random
import stat
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from builders import ZipMember, raw_zip, tar_of, written, zip_of
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from app.datasets.archive import ArchiveLimits, iterate, safe_path, shown, stream
from app.errors import ArchiveRefused, GraftError, TooLarge
from app.settings import MEBIBYTE, Settings

LIMITS = ArchiveLimits.from_settings(Settings(_env_file=None))
FILES = {"a/1.jpg": b"one", "a/2.jpg": b"two" * 100_000, "b/3.jpg": b""}


@pytest.fixture
def contents(tmp_path: Path) -> Callable[..., dict[str, bytes]]:
    """Reads an archive given as bytes into a dict."""

    def read(archive: bytes, *, limits: ArchiveLimits = LIMITS) -> dict[str, bytes]:
        path = written(tmp_path / "archive", archive)
        return {member.path: content for member, content in iterate(path, limits=limits)}

    return read


Contents = Callable[..., dict[str, bytes]]


def code_of(contents: Contents, archive: bytes) -> str:
    with pytest.raises(ArchiveRefused) as refused:
        contents(archive)
    return refused.value.code


# Good archives


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_is_read_in_its_own_order(contents: Contents, compression: int) -> None:
    found = contents(zip_of(FILES, folders=["a", "b"], compression=compression))
    assert (list(found), found) == (list(FILES), FILES)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_is_read_in_its_own_order(
    contents: Contents, monkeypatch: pytest.MonkeyPatch, mode: str, tar_format: int
) -> None:
    monkeypatch.setattr(tarfile.TarFile, "format", tar_format)
    found = contents(tar_of(FILES, mode=mode))
    assert (list(found), found) == (list(FILES), FILES)


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_with_long_and_foreign_names_is_read(
    contents: Contents, monkeypatch: pytest.MonkeyPatch, tar_format: int
) -> None:
    monkeypatch.setattr(tarfile.TarFile, "format", tar_format)
    files = {f"{'ä' * 90}/{'n' * 200}.jpg": b"one", "./b/2.jpg": b"two"}
    assert contents(tar_of(files)) == {f"{'ä' * 90}/{'n' * 200}.jpg": b"one", "b/2.jpg": b"two"}


def test_zip_with_descriptors_is_read(contents: Contents) -> None:
    members = [
        ZipMember("a/1.jpg", b"one", has_descriptor=True),
        ZipMember("a/2.jpg", b"x" * 9, 8, has_descriptor=True),
    ]
    assert contents(raw_zip(members)) == {"a/1.jpg": b"one", "a/2.jpg": b"x" * 9}


def test_zip_written_to_a_pipe_is_read(contents: Contents) -> None:
    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.written = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            self.written += bytes(data)  # type: ignore[call-overload]
            return len(data)  # type: ignore[arg-type]

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w") as archive:  # type: ignore[type-var]
        for name, content in FILES.items():
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                member.write(content)
    assert contents(bytes(pipe.written)) == FILES


def test_zip_of_more_members_than_it_can_count_is_read_to_its_end(contents: Contents) -> None:
    members = [ZipMember(f"{number}.jpg", content=b"", has_descriptor=True) for number in range(65_540)]
    archive = raw_zip(members, count=0xFFFF)

    assert len(contents(archive)) == 65_540
    with pytest.raises(TooLarge, match="more than 65539 members"):
        contents(archive, limits=replace(LIMITS, max_members=65_539))


def test_zip64_is_read(contents: Contents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    assert contents(zip_of(FILES)) == FILES


def test_archive_comment_and_wrong_dates_are_fine(contents: Contents) -> None:
    assert contents(raw_zip([ZipMember("a.jpg", b"one")], comment=b"made by hand")) == {"a.jpg": b"one"}


def test_name_without_the_utf8_flag_is_code_page_437_unless_it_is_utf8(contents: Contents) -> None:
    found = contents(raw_zip([ZipMember(b"M\x81ller.jpg", b"1"), ZipMember("Zoë.jpg".encode(), b"2")]))
    assert list(found) == ["Müller.jpg", "Zoë.jpg"]


def test_backslashes_alone_part_folders(contents: Contents) -> None:
    found = contents(raw_zip([ZipMember("a\\", b"", mode=0), ZipMember("a\\1.jpg", b"1")]))
    assert found == {"a/1.jpg": b"1"}


def test_empty_zip_holds_nothing(contents: Contents) -> None:
    assert contents(zip_of({})) == {}


def test_members_are_verified_even_if_nobody_reads_them(tmp_path: Path) -> None:
    path = written(tmp_path / "archive", raw_zip([ZipMember("a.jpg", crc=1), ZipMember("b.jpg")]))
    with pytest.raises(ArchiveRefused) as refused:
        for _member, _pieces in stream(path, limits=LIMITS):
            pass
    assert refused.value.code == "corrupt-archive"


def test_real_archives_are_read_like_the_standard_library_does(shared_data: Path) -> None:
    path = shared_data / "tiny_longtail.zip"
    with zipfile.ZipFile(path) as archive:
        expected = {
            entry.filename: zlib.crc32(archive.read(entry)) for entry in archive.infolist() if not entry.is_dir()
        }
    assert {member.path: zlib.crc32(content) for member, content in iterate(path, limits=LIMITS)} == expected


# Damaged archives


def test_bytes_behind_a_deflated_stream_longer_than_a_piece_are_refused(contents: Contents) -> None:
    """They were handed back by zlib for ever, in growing memory: 1 kB kept a core busy until the server ended."""
    member = ZipMember("a.jpg", bytes(1_000_000), 8)
    honest = raw_zip([member])
    packed = honest[30 + len("a.jpg") : honest.index(b"PK\x01\x02")] + b"more"
    longer = ZipMember("a.jpg", packed, 99, size=1_000_000, crc=zlib.crc32(member.content), local_size=1_000_000)
    assert (
        code_of(contents, raw_zip([longer]).replace(struct.pack("<H", 99), struct.pack("<H", 8))) == "corrupt-archive"
    )


# Not archives


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"P",
        b"hello, world" * 100,
        b"\x89PNG\r\n\x1a\n" + bytes(1000),
        b"7z\xbc\xaf\x27\x1c" + bytes(600),
        b"BZh91AY&SY" + bytes(600),
        bytes(2000),
    ],
)
def test_other_files_are_no_archives(contents: Contents, content: bytes) -> None:
    assert code_of(contents, content) == "not-an-archive"


def test_gzip_without_a_tar_is_no_archive(contents: Contents) -> None:
    deflater = zlib.compressobj(wbits=31)
    assert code_of(contents, deflater.compress(b"just text" * 100) + deflater.flush()) == "not-an-archive"


# Names


@pytest.mark.parametrize(
    "name",
    [
        "../a.jpg",
        "a/../../b.jpg",
        "a/..",
        "/etc/passwd",
        "//host/share/a.jpg",
        "\\\\host\\share\\a.jpg",
        "..\\a.jpg",
        "C:\\a.jpg",
        "c:a.jpg",
        "a\\b/c.jpg",
        "a\x00b.jpg",
        "a\nb.jpg",
        "a\x7f.jpg",
        "a\u0085.jpg",
        "n" * 1025,
        "/".join("abcdefghijklmnopq"),
        ".",
        "./.",
    ],
)
@pytest.mark.parametrize(
    "make", [lambda name: raw_zip([ZipMember(name)]), lambda name: raw_tar(name)], ids=["zip", "tar"]
)
def test_unsafe_name_is_refused(contents: Contents, make: Callable[[str], bytes], name: str) -> None:
    assert code_of(contents, make(name)) == "unsafe-path"


def test_nothing_is_read_out_of_a_file_that_is_called_as_the_root(contents: Contents) -> None:
    within = tar_of({"hidden/1.jpg": b"one"})
    archive = tar_of({".": within, **FILES})

    assert code_of(contents, archive) == "unsafe-path"


def raw_tar(name: str) -> bytes:
    """A tar with one file, its name as it is: tarfile's own reading of it cannot soften it."""
    member = tarfile.TarInfo("x")
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member.pax_headers = {"path": name}
        archive.addfile(member)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("./a//b/./c.jpg", "a/b/c.jpg"),
        ("a/", "a"),
        ("./", ""),
        ("Icon\r", "Icon\r"),
        ("Zoe\u0308.jpg", "Zo\u00eb.jpg"),
        ("...", "..."),
        ("a..b/c", "a..b/c"),
    ],
)
def test_harmless_name_is_made_plain(name: str, path: str) -> None:
    assert safe_path(name) == path


def test_names_are_shown_escaped_and_short() -> None:
    assert shown("a\u202eb\x1b[31m") == '"a\\u202eb\\x1b[31m"'
    assert len(shown("x" * 5000)) == 122


@pytest.mark.parametrize(
    "names",
    [
        ("a.jpg", "a.jpg"),
        ("a/b.jpg", "a//b.jpg"),
        ("Zoe\u0308.jpg", "Zo\u00eb.jpg"),
        ("a", "a/b.jpg"),
        ("a/b.jpg", "a"),
        ("a/", "a"),
        ("a/", "a/"),
        ("a/b", "a/b/c/d.jpg"),
    ],
)
def test_name_that_stands_twice_is_refused_in_a_zip(contents: Contents, names: tuple[str, str]) -> None:
    members = [ZipMember(name, b"", mode=0) for name in names]
    assert code_of(contents, raw_zip(members)) == "duplicate-member"


def test_name_that_stands_twice_is_refused_in_a_tar(contents: Contents) -> None:
    twice = [tarfile.TarInfo("a.jpg"), tarfile.TarInfo("a.jpg")]
    assert code_of(contents, tar_of({}, members=twice)) == "duplicate-member"


def test_folder_may_stand_twice_in_a_tar(contents: Contents) -> None:
    folder = tarfile.TarInfo("a")
    folder.type = tarfile.DIRTYPE
    assert contents(tar_of({"a/1.jpg": b"1"}, members=[folder, folder])) == {"a/1.jpg": b"1"}


# Kinds of member


@pytest.mark.parametrize(
    ("mode", "code"), [(stat.S_IFLNK, "archive-link"), (stat.S_IFIFO, "special-file"), (stat.S_IFCHR, "special-file")]
)
def test_zip_member_that_is_no_file_is_refused(contents: Contents, mode: int, code: str) -> None:
    assert code_of(contents, raw_zip([ZipMember("a.jpg", mode=mode | 0o644)])) == code


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (tarfile.SYMTYPE, "archive-link"),
        (tarfile.LNKTYPE, "archive-link"),
        (tarfile.CHRTYPE, "special-file"),
        (tarfile.BLKTYPE, "special-file"),
        (tarfile.FIFOTYPE, "special-file"),
        (tarfile.CONTTYPE, "special-file"),
        (tarfile.GNUTYPE_SPARSE, "special-file"),
    ],
)
def test_tar_member_that_is_no_file_is_refused(contents: Contents, kind: bytes, code: str) -> None:
    member = tarfile.TarInfo("a.jpg")
    member.type, member.linkname = kind, "/etc/passwd"
    assert code_of(contents, tar_of({"b.jpg": b"1"}, members=[member])) == code


def test_sparse_pax_member_is_refused(contents: Contents) -> None:
    member = tarfile.TarInfo("a.jpg")
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "b.jpg"}
    assert code_of(contents, tar_of({}, members=[member])) == "special-file"


@pytest.mark.parametrize(
    "member", [ZipMember("a.jpg", flags=0x1), ZipMember("a.jpg", flags=0x40), ZipMember("a.jpg", method=99)]
)
def test_encrypted_zip_is_refused(contents: Contents, member: ZipMember) -> None:
    assert code_of(contents, raw_zip([member])) == "encrypted-archive"


@pytest.mark.parametrize("method", [1, 9, 12, 14, 93, 95])
def test_zip_packed_in_another_way_is_refused(contents: Contents, method: int) -> None:
    assert code_of(contents, raw_zip([ZipMember("a.jpg", method=method)])) == "unsupported-compression"


def test_zip_of_a_later_format_is_refused(contents: Contents) -> None:
    assert contents(raw_zip([ZipMember("a.jpg", b"1", needed_version=63)])) == {"a.jpg": b"1"}
    assert code_of(contents, raw_zip([ZipMember("a.jpg", b"1", needed_version=64)])) == "unsupported-compression"


# Stories that differ


TWO = [ZipMember("a.jpg", b"one"), ZipMember("b.jpg", b"two")]


@pytest.mark.parametrize(
    "archive",
    [
        pytest.param(raw_zip(TWO)[:-1], id="cut by one byte"),
        pytest.param(raw_zip(TWO)[:60], id="cut in the middle"),
        pytest.param(raw_zip(TWO, prefix=b"#!/bin/sh\n"), id="bytes before"),
        pytest.param(b"#!/bin/sh\n" + raw_zip(TWO), id="bytes before, offsets unaware"),
        pytest.param(raw_zip(TWO, trailing=b"x"), id="bytes after"),
        pytest.param(raw_zip(TWO) + raw_zip(TWO), id="two archives"),
        pytest.param(raw_zip(TWO, comment=raw_zip(TWO)), id="an archive as comment"),
        pytest.param(raw_zip(TWO, comment=struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0, 0, 0, 0, 0)), id="two ends"),
        pytest.param(raw_zip(TWO, gap=b"hidden"), id="a gap before the directory"),
        pytest.param(raw_zip(TWO, count=1), id="fewer entries than counted"),
        pytest.param(raw_zip(TWO, count=3), id="more entries than counted"),
        pytest.param(raw_zip([TWO[0], ZipMember("b.jpg", b"two", is_listed=False)]), id="a member not listed"),
        pytest.param(raw_zip([TWO[0], ZipMember("b.jpg", b"two", offset=0)]), id="two entries for one member"),
        pytest.param(raw_zip([ZipMember("a.jpg", local_name=b"../../a.jpg")]), id="another name in the local header"),
        pytest.param(raw_zip([ZipMember("a.jpg", local_size=3)]), id="another size in the local header"),
        pytest.param(raw_zip([ZipMember("a.jpg", crc=1)]), id="a wrong checksum"),
        pytest.param(raw_zip([ZipMember("a.jpg", b"x" * 99, 8, size=98)]), id="larger than it says"),
        pytest.param(raw_zip([ZipMember("a.jpg", b"x" * 99, 8, size=100)]), id="smaller than it says"),
        pytest.param(raw_zip([ZipMember("a.jpg", b"x" * 99, size=100)]), id="stored with two sizes"),
        pytest.param(raw_zip([ZipMember("a/", b"content", mode=0o40755)]), id="a folder with content"),
        pytest.param(raw_zip([ZipMember("a", b"", mode=0o40755)]), id="a folder by mode, a file by name"),
        pytest.param(raw_zip([ZipMember(b"\xff.jpg", flags=0x800)]), id="a name that should be UTF-8 and is not"),
        pytest.param(raw_zip([ZipMember("a.jpg", extra=b"\x01")]), id="an extra field cut off"),
        pytest.param(raw_zip([ZipMember("a.jpg", extra=b"\x55\x54\x09\x00\x01")]), id="an extra field too short"),
        pytest.param(
            raw_zip([ZipMember("a.jpg", extra=struct.pack("<2HBI", 0x7075, 10, 1, 0) + b"b.jpg")]), id="a second name"
        ),
        pytest.param(raw_zip([ZipMember("a.jpg", extra=struct.pack("<2HQ", 1, 8, 5))]), id="a needless Zip64 size"),
    ],
)
def test_zip_that_tells_two_stories_is_refused(contents: Contents, archive: bytes) -> None:
    assert code_of(contents, archive) == "corrupt-archive"


def test_part_of_a_split_zip_is_refused(contents: Contents) -> None:
    archive = bytearray(raw_zip(TWO))
    archive[-18:-16] = b"\x01\x00"
    assert code_of(contents, bytes(archive)) == "split-archive"


@pytest.mark.parametrize(
    "archive",
    [
        pytest.param(tar_of(FILES)[:700], id="cut in a member"),
        pytest.param(tar_of({"a.jpg": b"1"})[:1024], id="without an end"),
        pytest.param(tar_of(FILES) + b"x", id="bytes after"),
        pytest.param(tar_of(FILES, mode="w:gz")[:-9], id="gzip cut off"),
        pytest.param(tar_of(FILES, mode="w:gz") + b"trailing", id="bytes after the gzip"),
        pytest.param(tar_of(FILES)[:512] + b"\xff" + tar_of(FILES)[513:1024] + b"\x01" * 512, id="no header"),
    ],
)
def test_damaged_tar_is_refused(contents: Contents, archive: bytes) -> None:
    assert code_of(contents, archive) == "corrupt-archive"


# Too much


def test_overlapping_bomb_is_refused(contents: Contents) -> None:
    """One kernel that every entry of the directory points to, as in D. Fifield's bomb."""
    kernel = ZipMember("0", bytes(10 * MEBIBYTE), 8)
    others = [ZipMember(str(i), kernel.content, 8, offset=0) for i in range(1, 4)]
    archive = raw_zip([kernel, *others])
    assert code_of(contents, archive) == "archive-bomb"
    assert code_of(contents, raw_zip([ZipMember("0", b"x"), ZipMember("1", b"x", offset=0)])) == "corrupt-archive"


def test_bomb_that_says_so_is_refused_before_it_is_unpacked(contents: Contents) -> None:
    assert code_of(contents, raw_zip([ZipMember("a", bytes(17 * MEBIBYTE), 8)])) == "archive-bomb"


def test_bomb_that_lies_is_refused_where_the_lie_ends(contents: Contents) -> None:
    assert code_of(contents, raw_zip([ZipMember("a", bytes(17 * MEBIBYTE), 8, size=1000)])) == "corrupt-archive"


def test_gzip_bomb_is_refused(contents: Contents) -> None:
    assert code_of(contents, tar_of({"a": bytes(17 * MEBIBYTE)}, mode="w:gz")) == "archive-bomb"


def test_well_compressed_archive_below_16_mebibytes_is_no_bomb(contents: Contents) -> None:
    assert len(contents(raw_zip([ZipMember("a", bytes(15 * MEBIBYTE), 8)]))["a"]) == 15 * MEBIBYTE


@pytest.mark.parametrize(
    "limits",
    [
        replace(LIMITS, max_members=2),
        replace(LIMITS, max_member_bytes=299_999),
        replace(LIMITS, max_unpacked_bytes=300_002),
    ],
)
@pytest.mark.parametrize(
    "archive", [zip_of(FILES), tar_of(FILES), tar_of(FILES, mode="w:gz")], ids=["zip", "tar", "tgz"]
)
def test_more_than_the_limits_is_too_large(contents: Contents, archive: bytes, limits: ArchiveLimits) -> None:
    with pytest.raises(TooLarge):
        contents(archive, limits=limits)


def test_zip_at_the_limits_is_read(contents: Contents) -> None:
    limits = replace(LIMITS, max_members=3, max_member_bytes=300_000, max_unpacked_bytes=300_003)
    assert contents(zip_of(FILES), limits=limits) == FILES


def test_giant_pax_header_is_refused_unread(contents: Contents) -> None:
    member = tarfile.TarInfo("a.jpg")
    member.pax_headers = {"comment": "x" * 2 * MEBIBYTE}
    with pytest.raises(TooLarge):
        contents(tar_of({}, members=[member]))


@pytest.mark.parametrize("make", [zip_of, tar_of, lambda files: tar_of(files, mode="w:gz")], ids=["zip", "tar", "tgz"])
def test_memory_does_not_grow_with_the_archive(tmp_path: Path, make: Callable[[dict[str, bytes]], bytes]) -> None:
    path = written(tmp_path / "archive", make({f"{i}": random.Random(i).randbytes(4 * MEBIBYTE) for i in range(10)}))
    tracemalloc.start()
    read = sum(len(piece) for _, pieces in stream(path, limits=LIMITS) for piece in pieces)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert read == 40 * MEBIBYTE
    assert peak < 3 * MEBIBYTE


# Whatever comes


@given(data=st.data())
@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_refused_or_read_like_others_do(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes changed at random: our own error, or the same names and content that the standard library finds."""
    archive = bytearray(
        zip_of({"a/1": b"one" * 20, "b/2": b"two" * 20}, folders=["a"], compression=zipfile.ZIP_DEFLATED)
    )
    for _ in range(data.draw(st.integers(1, 3))):
        archive[data.draw(st.integers(0, len(archive) - 1))] = data.draw(st.integers(0, 255))
    path = written(tmp_path / "archive", bytes(archive))
    try:
        found = {member.path: content for member, content in iterate(path, limits=LIMITS)}
    except GraftError:
        return
    with zipfile.ZipFile(io.BytesIO(archive)) as other:
        expected = {
            safe_path(e.filename): other.read(e) for e in other.infolist() if not e.filename.endswith(("/", "\\"))
        }
    assert found == expected


@given(noise=st.binary(max_size=700), start=st.sampled_from([b"", b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b\x08\x00"]))
@hypothesis_settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_noise_is_refused(tmp_path: Path, noise: bytes, start: bytes) -> None:
    path = written(tmp_path / "archive", start + noise)
    with pytest.raises(ArchiveRefused):
        list(iterate(path, limits=LIMITS))
