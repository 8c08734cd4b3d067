"""Encoded pictures → the pixels a person sees. The only decoder: what ingest packs, prediction feeds.

Knows bytes and numbers; not data sets, not networks, not HTTP. Everything here is safe to call from many threads.
"""

import io
import math
import re
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from app.errors import ImageRefused
from app.settings import Settings

Pixels = NDArray[np.uint8]

# Imported above, so that no thread has to register a plugin while others decode.
_PLUGINS = (JpegImagePlugin, PngImagePlugin, WebPImagePlugin, TiffImagePlugin, BmpImagePlugin)

# Pillow's own limit only warns at 89 million pixels and is one number for the whole process; ImageLimits is checked
# instead, from the header, before any pixel is decoded.
Image.MAX_IMAGE_PIXELS = None

STANDARD_FORMATS = frozenset({"JPEG", "PNG", "WEBP"})

_WHITE = (255, 255, 255)
_STRIP_PIXELS = 1_000_000  # converted at a time: a few MB of temporaries instead of copies of a 40 Mpx picture

# EXIF tag 0x0112: what to do with the stored picture to see it upright.
_ORIENTATION_TAG = 0x0112
_UPRIGHT: dict[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow raises on damaged input, depending on format and place of the damage.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


@dataclass(frozen=True)
class ImageLimits:
    """What a picture may cost. Checked before it is decoded."""

    max_bytes: int  # encoded
    max_pixels: int
    max_side: int  # pixels
    max_aspect: float  # long side / short side
    max_jpeg_scans: int
    extra_formats: frozenset[str] = frozenset()  # of "TIFF", "BMP"

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        return cls(
            max_bytes=settings.max_image_bytes,
            max_pixels=settings.max_image_pixels,
            max_side=settings.max_image_side,
            max_aspect=settings.max_image_aspect,
            max_jpeg_scans=settings.max_jpeg_scans,
            extra_formats=frozenset(settings.extra_image_formats),
        )

    @property
    def formats(self) -> frozenset[str]:
        return STANDARD_FORMATS | self.extra_formats


# For pictures of our own, and those that were let in before.
NO_LIMITS = ImageLimits(
    max_bytes=sys.maxsize,
    max_pixels=sys.maxsize,
    max_side=sys.maxsize,
    max_aspect=math.inf,
    max_jpeg_scans=sys.maxsize,
    extra_formats=frozenset({"TIFF", "BMP"}),
)


def sniff(head: bytes) -> str | None:
    """The format that the first 16 bytes of a file speak of: "JPEG", "PNG", "WEBP", "TIFF", "BMP", or None."""
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith((b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")):
        return "TIFF"
    # "BM" alone begins many a text; the four reserved bytes are zero in every bitmap.
    if head.startswith(b"BM") and head[6:10] == bytes(4):
        return "BMP"
    return None


def decode(encoded: bytes, *, side: int, limits: ImageLimits) -> Pixels:
    """The picture as a person sees it: the canonical pixels for training and prediction alike.

    side: the short side is reduced to this if it is larger (antialiased, bilinear), never enlarged; the long side
    keeps the ratio, rounded down, as torchvision's Resize does.
    Returns uint8 (H, W, 3), RGB, C-contiguous, writable.
    Raises ImageRefused with a short reason: not a picture, beyond the limits, truncated, damaged.
    """
    image_format = _accepted_format(encoded, limits)
    _CHECKS[image_format](encoded, limits)
    try:
        with Image.open(io.BytesIO(encoded), formats=[image_format]) as image:
            _check_size(image.size, limits)
            size = _target_size(image.size, side=side)
            # Scaled while decoding: the cheapest of 1/1, 1/2, 1/4, 1/8 that keeps both sides at `side` or more.
            image.draft(None, (side, side))
            image.load()
            orientation = _orientation(image)
            seen = _as_rgb(image, side=side)
            if seen.size != size:
                seen = seen.resize(size, Image.Resampling.BILINEAR)
            return np.array(seen.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else seen)
    except _DAMAGE as error:
        kind = "truncated" if "truncated" in str(error).lower() or isinstance(error, EOFError) else "damaged"
        raise ImageRefused(f"{kind} {_shown(image_format)}") from error


def decoded_bytes(encoded: bytes, *, side: int, limits: ImageLimits) -> int:
    """How many bytes of pixels `decode` makes of this picture, by its header: nothing is decoded.

    Raises ImageRefused for what the header already shows; a picture that it says nothing against may still be damaged.
    """
    image_format = _accepted_format(encoded, limits)
    try:
        with Image.open(io.BytesIO(encoded), formats=[image_format]) as image:
            _check_size(image.size, limits)
            # Turning it upright swaps the sides, which changes nothing here.
            width, height = _target_size(image.size, side=side)
            return width * height * 3
    except _DAMAGE as error:
        raise ImageRefused(f"damaged {_shown(image_format)}") from error


# What costs no more than a few milliseconds and megabytes, whatever its bytes are.
_SIMPLE_PIXELS, _SIMPLE_BYTES, _SIMPLE_SEGMENTS = 4_000_000, 4 * 1024**2, 64


def is_simple(encoded: bytes) -> bool:
    """Whether this is a small JPEG of one pass over one scan, as cameras and `save` make them, by its markers alone.

    What is not exactly that is not simple: several scans, progressive or arithmetic coding, many segments, many pixels.
    """
    if len(encoded) > _SIMPLE_BYTES or sniff(encoded[:16]) != "JPEG":
        return False
    position, components = 2, 0
    for _ in range(_SIMPLE_SEGMENTS):
        if encoded[position : position + 1] != b"\xff" or len(encoded) < position + 4:
            return False
        code, length = encoded[position + 1], int.from_bytes(encoded[position + 2 : position + 4], "big")
        segment = encoded[position + 4 : position + 2 + length]
        position += 2 + length
        if code in (0xC0, 0xC1):
            if components or len(segment) < 6:
                return False
            height, width, components = (
                int.from_bytes(segment[1:3], "big"),
                int.from_bytes(segment[3:5], "big"),
                segment[5],
            )
            if not 0 < width * height <= _SIMPLE_PIXELS or not 1 <= components <= 4:
                return False
        elif code == _SOS:
            # All components in this scan, and no other behind it.
            return len(segment) > 0 and components == segment[0] and _next_segment(encoded, position) == _EOI
        elif not (code in (0xC4, 0xDB, 0xDD, 0xFE) or 0xE0 <= code <= 0xEF) or length < 2:
            return False
    return False


def _next_segment(encoded: bytes, position: int) -> int | None:
    """The code of the marker that ends a scan's data."""
    marker = _NEXT_JPEG_MARKER.search(encoded, position)
    return None if marker is None else encoded[marker.start() + 1]


def encode_thumbnail(pixels: Pixels, *, side: int = 160) -> bytes:
    """A JPEG of the picture, its long side at most `side`."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=85)
    return encoded.getvalue()


def why_not_a_picture(head: bytes, limits: ImageLimits) -> str | None:
    """The reason why a file that begins like this cannot be one of our pictures; None if it can."""
    image_format = sniff(head)
    if image_format in limits.formats:
        return None
    if not head:
        return "empty file"
    if image_format is not None:
        return f"{_shown(image_format)} is not enabled on this server"
    names = sorted(_shown(name) for name in limits.formats)
    return f"not a picture: {', '.join(names[:-1])} and {names[-1]} are read"


def _accepted_format(encoded: bytes, limits: ImageLimits) -> str:
    if len(encoded) > limits.max_bytes:
        raise ImageRefused(f"larger than {limits.max_bytes} bytes")
    head = encoded[:16]
    reason = why_not_a_picture(head, limits)
    if reason is not None:
        raise ImageRefused(reason)
    image_format = sniff(head)
    assert image_format is not None
    return image_format


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if min(size) < 1:
        raise ImageRefused("no pixels")
    if width * height > limits.max_pixels:
        raise ImageRefused(f"{width}×{height} pixels, more than {limits.max_pixels} in all")
    if max(size) > limits.max_side:
        raise ImageRefused(f"{width}×{height} pixels, a side longer than {limits.max_side}")
    if max(size) > limits.max_aspect * min(size):
        raise ImageRefused(f"{width}×{height} pixels, a longer strip than {limits.max_aspect:g} to 1")


# Markers after entropy-coded data: any 0xFF but a stuffed zero, a restart marker or a fill byte.
_NEXT_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SOS, _EOI = 0xDA, 0xD9


def _check_jpeg(encoded: bytes, limits: ImageLimits) -> None:
    """Counts scans by walking the markers: each costs a pass over the whole picture, and a scan can be 10 bytes."""
    scans = 0
    position = 2
    while True:
        # A marker may be preceded by any number of fill bytes; junk between segments is skipped as libjpeg does.
        marker = _NEXT_JPEG_MARKER.search(encoded, position)
        if marker is None:
            raise ImageRefused("truncated JPEG")
        code = encoded[marker.start() + 1]
        if code == _EOI:
            if scans == 0:
                raise ImageRefused("damaged JPEG")
            return
        if 0x01 <= code < 0xC0:  # has no length; inside a scan it is what a flipped bit leaves
            if scans:
                raise ImageRefused("damaged JPEG")
            position = marker.end()
            continue
        length = int.from_bytes(encoded[marker.end() : marker.end() + 2], "big")
        position = marker.end() + max(length, 2)
        if code == _SOS:
            scans += 1
            if scans > limits.max_jpeg_scans:
                raise ImageRefused(f"JPEG with more than {limits.max_jpeg_scans} scans")


def _check_png(encoded: bytes, limits: ImageLimits) -> None:
    """Verifies the checksums of what makes the picture; Pillow skips those of the pixel data."""
    position = 8
    view = memoryview(encoded)
    while position + 12 <= len(encoded):
        length = int.from_bytes(encoded[position : position + 4], "big")
        end = position + 12 + length
        if end > len(encoded):
            break
        kind = encoded[position + 4 : position + 8]
        is_critical = not kind[0] & 0x20 or kind == b"tRNS"
        checksum = int.from_bytes(encoded[end - 4 : end], "big")
        if is_critical and zlib.crc32(view[position + 4 : end - 4]) != checksum:
            raise ImageRefused("damaged PNG")
        if kind == b"IEND":
            return
        position = end
    raise ImageRefused("truncated PNG")


def _check_webp(encoded: bytes, limits: ImageLimits) -> None:
    if 8 + int.from_bytes(encoded[4:8], "little") > len(encoded):
        raise ImageRefused("truncated WebP")


def _check_nothing(encoded: bytes, limits: ImageLimits) -> None:
    """TIFF and BMP: Pillow finds all that can be found."""


_CHECKS: dict[str, Callable[[bytes, ImageLimits], None]] = {
    "JPEG": _check_jpeg,
    "PNG": _check_png,
    "WEBP": _check_webp,
    "TIFF": _check_nothing,
    "BMP": _check_nothing,
}


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DAMAGE:  # a picture with unreadable EXIF is still a picture
        return 1
    return orientation if isinstance(orientation, int) else 1


def _target_size(size: tuple[int, int], *, side: int) -> tuple[int, int]:
    width, height = size
    short = min(size)
    if short <= side:
        return size
    # Rounded down in integers; a float product can land below a whole number.
    return width * side // short, height * side // short


def _as_rgb(image: Image.Image, *, side: int) -> Image.Image:
    """The loaded picture as RGB; a much too large one comes out smaller, but no side below twice `side`.

    Strip by strip, since converting a large picture in one go would hold several copies of it.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    width, height = image.size
    factor = max(1, min(width, height) // (2 * side))
    if factor == 1:
        return _on_white(image)
    seen = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    rows = max(1, _STRIP_PIXELS // (width * factor)) * factor
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        seen.paste(_on_white(strip).reduce(factor), (0, top // factor))
    return seen


def _on_white(image: Image.Image) -> Image.Image:
    """One picture, or one strip of it, as 8-bit RGB on white."""
    transparency = image.info.get("transparency")
    if image.mode.startswith("I") or image.mode == "F":
        return _from_wide_grey(np.asarray(image), transparency)
    if image.mode in {"LA", "La", "PA", "RGBA", "RGBa"} or transparency is not None:
        see_through = image.convert("RGBA")
        seen = Image.new("RGB", image.size, _WHITE)
        seen.paste(see_through, mask=see_through.getchannel("A"))
        return seen
    return image.convert("RGB")


def _from_wide_grey(values: NDArray[np.generic], transparency: object) -> Image.Image:
    """Grey of 16 bits, scaled so that 65535 is white; Pillow's own conversion clips at 255."""
    if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 65535:
        raise ImageRefused("pixels that are neither 8 nor 16 bits deep")
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if isinstance(transparency, int):
        grey[values == transparency] = 255
    return Image.fromarray(grey).convert("RGB")


def _shown(image_format: str) -> str:
    return "WebP" if image_format == "WEBP" else image_format
