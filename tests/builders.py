"""Archives and pictures for tests, made from scratch: good ones, and hostile ones byte by byte.

Every picture of `picture` differs from every other with another seed, so that none is taken for a copy.
"""

import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


def picture(seed: int = 0, *, size: tuple[int, int] = (48, 40), tint: tuple[int, int, int] = (128, 128, 128)) -> Pixels:
    """Soft random blotches around a tint: uint8 (height, width, 3). size: (width, height)."""
    coarse = np.random.default_rng(seed).integers(-90, 90, (6, 6, 3)) + np.array(tint)
    small = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8))
    return np.asarray(small.resize(size, Image.Resampling.BICUBIC))


def encoded(pixels: Pixels | Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def jpeg(seed: int = 0, *, size: tuple[int, int] = (48, 40), tint: tuple[int, int, int] = (128, 128, 128)) -> bytes:
    return encoded(picture(seed, size=size, tint=tint), "JPEG", quality=90)


def slow_jpeg(*, scans: int = 95) -> bytes:
    """36 Mpx of one colour, gone over again and again: 217 kB and seconds of decoding, within every other limit."""
    progressive = encoded(Image.new("RGB", (6000, 6000), (40, 90, 200)), "JPEG", progressive=True)
    end = progressive.rindex(b"\xff\xd9")
    last_scan = progressive[progressive.rindex(b"\xff\xda") : end]
    return progressive[:end] + last_scan * (scans - progressive.count(b"\xff\xda")) + b"\xff\xd9"


def class_folders(
    per_class: int = 6, *, classes: Sequence[str] = ("cat", "dog"), root: str = "", first_seed: int = 0
) -> dict[str, bytes]:
    """Files of a data set in class folders, each class with a colour of its own, so that it can be learnt."""
    tints = [(200, 60, 60), (60, 60, 200), (60, 200, 60), (200, 200, 60)]
    return {
        f"{root}{name}/{i}.jpg": jpeg(first_seed + 1000 * c + i, tint=tints[c % len(tints)])
        for c, name in enumerate(classes)
        for i in range(per_class)
    }


def two_tasks(count: int, *, without: Mapping[int, str] | None = None, first_seed: int = 0) -> dict[str, bytes]:
    """Pictures and a labels.csv that tells two things of each: its colour and its light.

    without: picture → the task whose label it lacks.
    """
    tints = {("red", "bright"): (230, 90, 90), ("red", "dark"): (110, 0, 0)}
    tints |= {("blue", light): (b, g, r) for (_, light), (r, g, b) in list(tints.items())}
    files, rows = {}, ["filename,label:colour,label:light"]
    for i in range(count):
        labels = {"colour": ("red", "blue")[i % 2], "light": ("bright", "dark")[i // 2 % 2]}
        files[f"{i}.jpg"] = jpeg(first_seed + i, tint=tints[labels["colour"], labels["light"]])
        labels |= {task: "" for task in [(without or {}).get(i)] if task}
        rows.append(f"{i}.jpg,{labels['colour']},{labels['light']}")
    return {**files, "labels.csv": "\n".join(rows).encode()}


def zip_of(files: Mapping[str, bytes], *, folders: Sequence[str] = (), compression: int = zipfile.ZIP_STORED) -> bytes:
    """Always the same bytes for the same files, whatever the time."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for folder in folders:
            archive.writestr(zipfile.ZipInfo(f"{folder}/"), b"")
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=compression)
    return file.getvalue()


def tar_of(files: Mapping[str, bytes], *, mode: str = "w", members: Sequence[tarfile.TarInfo] = ()) -> bytes:
    """mode: "w" or "w:gz". members: further ones, without content."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in members:
            archive.addfile(member)
    return file.getvalue()


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@dataclass
class ZipMember:
    """One member of a zip that may lie about anything; None means the truth."""

    name: str | bytes
    content: bytes = b"content"
    method: int = 0
    flags: int = 0
    mode: int = 0o100644
    extra: bytes = b""
    local_name: bytes | None = None
    local_size: int | None = None
    size: int | None = None
    crc: int | None = None
    has_descriptor: bool = False
    offset: int | None = None  # in the directory
    is_listed: bool = True
    needed_version: int = 20  # times ten
    raw_name: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.raw_name = self.name.encode() if isinstance(self.name, str) else self.name


def raw_zip(
    members: Sequence[ZipMember],
    *,
    prefix: bytes = b"",
    gap: bytes = b"",
    trailing: bytes = b"",
    comment: bytes = b"",
    count: int | None = None,
) -> bytes:
    """A zip as `members` tell it. gap: bytes before the directory."""
    body = bytearray(prefix)
    directory = bytearray()
    for member in members:
        packed = _deflated(member.content) if member.method == 8 else member.content
        crc = zlib.crc32(member.content) if member.crc is None else member.crc
        size = len(member.content) if member.size is None else member.size
        flags = member.flags | (0x8 if member.has_descriptor else 0)
        offset = len(body) if member.offset is None else member.offset
        local_name = member.raw_name if member.local_name is None else member.local_name
        local = (
            (0, 0, 0)
            if member.has_descriptor
            else (crc, len(packed), size if member.local_size is None else member.local_size)
        )
        body += struct.pack(
            "<4s5H3I2H", b"PK\x03\x04", member.needed_version, flags, member.method, 0, 33, *local, len(local_name), 0
        )
        body += local_name + packed
        if member.has_descriptor:
            body += struct.pack("<4s3I", b"PK\x07\x08", crc, len(packed), size)
        if member.is_listed:
            directory += struct.pack(
                "<4s6H3I5H2I", b"PK\x01\x02", 3 << 8 | 20, member.needed_version, flags, member.method, 0, 33,
                crc, len(packed), size, len(member.raw_name), len(member.extra), 0, 0, 0, member.mode << 16, offset,
            )  # fmt: skip
            directory += member.raw_name + member.extra
    body += gap
    listed = sum(member.is_listed for member in members) if count is None else count
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, listed, listed, len(directory), len(body), len(comment))
    return bytes(body) + bytes(directory) + end + comment + trailing


def _deflated(content: bytes) -> bytes:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return deflater.compress(content) + deflater.flush()
