"""Where the fuzzer begins: small good files of every kind, and our attack files, each made by the tests' builders."""

import base64
import json
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
from builders import ZipMember, encoded, jpeg, picture, raw_zip, tar_of, zip_of
from PIL import Image

SMALL = {"a/1.jpg": b"\xff\xd8\xff" + b"1" * 40, "a/2.jpg": b"2", "b/1.png": b"\x89PNG\r\n\x1a\n", "b/2.png": b"4" * 50}


def archives() -> Iterator[bytes]:
    yield zip_of(SMALL)
    yield zip_of(SMALL, folders=["a", "b"], compression=zipfile.ZIP_DEFLATED)
    yield zip_of({"labels.csv": b"filename,label\n1.jpg,a\n", "1.jpg": b"\xff\xd8\xff"})
    yield zip_of({"metadata.jsonl": b'{"file_name": "1.jpg", "label": "a"}\n', "1.jpg": b"\xff\xd8\xff"})
    yield zip_of({f"train/{name}": content for name, content in SMALL.items()})
    yield tar_of(SMALL)
    yield tar_of(SMALL, mode="w:gz")
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.GNUTYPE_SPARSE, tarfile.DIRTYPE):
        member = tarfile.TarInfo("a.jpg")
        member.type, member.linkname = kind, "/etc/passwd"
        yield tar_of({"b.jpg": b"1"}, members=[member])
    plain = ZipMember("a/1.jpg", b"one")
    for members in (
        [ZipMember("a/1.jpg", b"one", has_descriptor=True), ZipMember("a/2.jpg", b"x" * 9, 8, has_descriptor=True)],
        [ZipMember("../a.jpg")],
        [ZipMember("/a\x00b.jpg")],
        [plain, ZipMember("A/1.jpg", b"two")],
        [plain, plain],
        [ZipMember("a.jpg", mode=stat.S_IFLNK | 0o777)],
        [ZipMember("a.jpg", flags=0x1)],
        [ZipMember("a.jpg", method=99)],
        [ZipMember("a.jpg", crc=1)],
        [ZipMember("a.jpg", size=2**32 - 1)],
        [ZipMember("a.jpg", bytes(200_000), 8, size=3)],
        [ZipMember("a.jpg", bytes(1_000_000), 8)],
        [ZipMember("a.jpg", local_name=b"b.jpg")],
        [ZipMember("a.jpg", is_listed=False), plain],
        [plain, ZipMember("b.jpg", offset=0)],
        [ZipMember("a.jpg", extra=struct.pack("<HHQQ", 1, 16, 7, 7))],
        [ZipMember("a.jpg", extra=b"\x75\x70\x09\x00\x01\x00\x00\x00\x00evil")],
        [ZipMember("a.jpg", needed_version=45)],
    ):
        yield raw_zip(members)
    yield raw_zip([plain], prefix=b"x")
    yield raw_zip([plain], gap=b"x")
    yield raw_zip([plain], trailing=b"x")
    yield raw_zip([plain], comment=b"made by hand")
    yield raw_zip([plain], count=2)


def pictures() -> Iterator[bytes]:
    small = picture(1, size=(12, 9))
    exif = Image.Exif()
    exif[0x0112] = 6
    for image_format in ("JPEG", "PNG", "WEBP", "TIFF", "BMP"):
        yield encoded(small, image_format)
        yield encoded(small, image_format)[:-5]
    yield encoded(small, "JPEG", progressive=True, exif=exif.tobytes())
    yield encoded(small, "WEBP", lossless=True, exif=exif.tobytes())
    yield encoded(Image.fromarray(small).convert("CMYK"), "JPEG")
    for mode in ("1", "L", "LA", "P", "RGBA"):
        yield encoded(Image.fromarray(small).convert(mode))
    yield encoded(Image.fromarray(small).convert("P"), transparency=b"\xff\x33")
    yield encoded(Image.fromarray(np.full((4, 5), 300, dtype=np.uint16)), transparency=300)
    yield encoded(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF")
    for compression in ("tiff_lzw", "packbits", "tiff_adobe_deflate"):
        yield encoded(small, "TIFF", compression=compression)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    yield encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    for size in ((8000, 5001), (101, 1), (1, 30000)):
        header = struct.pack(">2I5B", *size, 8, 2, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\x00")), (b"IEND", b""))
        yield b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    progressive = encoded(small, "JPEG", progressive=True)
    end = progressive.rindex(b"\xff\xd9")
    yield progressive[:end] + progressive[progressive.rindex(b"\xff\xda") : end] * 30 + b"\xff\xd9"


def messages() -> Iterator[bytes]:
    """The value of Inference-Header-Content-Length, or "-", and the body behind a line's end."""
    text = base64.b64encode(jpeg(1, size=(8, 8))).decode()
    image = {"name": "image", "datatype": "BYTES", "shape": [1, 1], "data": [text]}
    numbers = {"name": "preprocessed", "datatype": "FP32", "shape": [1, 3, 4, 4], "data": [0.5] * 48}
    for tensor in (image, image | {"data": [[text]]}, numbers, numbers | {"data": [[1, 2], [3]]}):
        yield b"-\n" + json.dumps({"id": "1", "inputs": [tensor]}).encode()
    output = {"name": "scores", "parameters": {"classification": 3, "binary_data": True}}
    yield b"-\n" + json.dumps({"inputs": [image], "outputs": [output]}).encode()
    for raw, shape, kind in (
        (struct.pack("<I", 3) + b"abc" + struct.pack("<I", 0), [2, 1], "BYTES"),
        (struct.pack("<I", 2**32 - 1) + b"abc", [1, 1], "BYTES"),
        (bytes(4 * 48), [1, 3, 4, 4], "FP32"),
        (bytes(4), [2**31, 3, 4, 4], "FP32"),
    ):
        name = "image" if kind == "BYTES" else "preprocessed"
        tensor = {"name": name, "datatype": kind, "shape": shape, "parameters": {"binary_data_size": len(raw)}}
        head = json.dumps({"inputs": [tensor]}).encode()
        yield str(len(head)).encode() + b"\n" + head + raw
    yield b"0\n" + bytes(4 * 48)
    yield b"0\n" + jpeg(1, size=(8, 8))
    for body in (b'{"a": 1, "a": 2}', b"[" * 40, b'{"id": NaN}', b'{"id": "\\ud800"}', b'{"id": 1e999}', b"\xff", b""):
        yield b"-\n" + body
    yield b"999999999999999999\n{}"
    yield b"-1\n{}"


SEEDS = {"archive": archives, "picture": pictures, "open_inference": messages}
