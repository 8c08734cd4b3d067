"""What is fuzzed: three doors for bytes from strangers. A target raises where a door does what it must not.

Used by the fuzzer (run.py) and, with what it once found, by the tests.
"""

import contextlib
import io
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from app.api.open_inference_wire import parse
from app.datasets.archive import ArchiveLimits, Member, stream
from app.datasets.inventory import inspect
from app.errors import ArchiveRefused, GraftError, ImageRefused, InvalidRequest
from app.vision.images import ImageLimits, decode, decoded_bytes

ARCHIVE_LIMITS = ArchiveLimits(
    max_unpacked_bytes=4 * 1024**2, max_member_bytes=1024**2, max_members=100, max_compression_ratio=50.0
)
# Small, so that a second holds many pictures: the ways through the code are the same.
IMAGE_LIMITS = ImageLimits(
    max_bytes=1024**2,
    max_pixels=250_000,
    max_side=2_000,
    max_aspect=100.0,
    max_jpeg_scans=20,
    extra_formats=frozenset({"TIFF", "BMP"}),
)
SIDE = 64


def archive(content: bytes) -> None:
    """Refused, or within the limits and, where it is a zip, what the standard library reads in it, too."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        path = Path(file.name)
        try:
            found = {member.path: b"".join(pieces) for member, pieces in _bounded(path) if not member.is_folder}
        except GraftError:
            return
        with contextlib.suppress(ArchiveRefused):
            inspect(path, limits=ARCHIVE_LIMITS, image_limits=IMAGE_LIMITS)
    assert len(found) <= ARCHIVE_LIMITS.max_members
    if content.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(content)) as other:
            read = [other.read(member) for member in other.infolist() if not member.is_dir()]
        assert sorted(read) == sorted(found.values()), "read otherwise by zipfile"


def _bounded(path: Path) -> Iterator[tuple[Member, Iterator[bytes]]]:
    """The archive's members, their names and the number of their bytes held against what was promised."""
    unpacked = 0

    def counted(pieces: Iterator[bytes]) -> Iterator[bytes]:
        nonlocal unpacked
        for piece in pieces:
            unpacked += len(piece)
            assert unpacked <= ARCHIVE_LIMITS.max_unpacked_bytes
            yield piece

    for member, pieces in stream(path, limits=ARCHIVE_LIMITS):
        assert not member.path.startswith("/")
        assert ".." not in member.path.split("/")
        yield member, counted(pieces)


def picture(content: bytes) -> None:
    """Refused with a reason, or pixels of the size that the header has promised."""
    try:
        promised = decoded_bytes(content, side=SIDE, limits=IMAGE_LIMITS)
    except ImageRefused:
        promised = None
    try:
        pixels = decode(content, side=SIDE, limits=IMAGE_LIMITS)
    except ImageRefused as refusal:
        assert len(refusal.detail) < 200
        return
    assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3)
    assert pixels.nbytes == promised
    assert min(pixels.shape[:2]) <= SIDE or min(pixels.shape[:2]) == 0


def open_inference(content: bytes) -> None:
    """Refused with a pointer, or as many pictures as the shape says. The first line is the header, "-" for none."""
    line, _, body = content.partition(b"\n")
    header = line.decode("latin-1")
    try:
        asked = parse(body, header_length=None if header == "-" else header, max_pictures=8, raw_shape=(3, 4, 4))
    except InvalidRequest:
        return
    assert 1 <= len(asked.tensor) <= 8
    if isinstance(asked.tensor, np.ndarray):
        assert (asked.tensor.dtype, asked.tensor.ndim) == (np.float32, 4)
    else:
        assert sum(map(len, asked.tensor)) <= len(body)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "archive": archive,
    "picture": picture,
    "open_inference": open_inference,
}
