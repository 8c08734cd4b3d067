"""Every picture as a person sees it, exact to the colour; what cannot be seen whole is refused with a reason."""

import io
import resource
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from builders import encoded, jpeg, picture
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from app.errors import ImageRefused
from app.settings import Settings
from app.vision.images import ImageLimits, Pixels, decode, encode_thumbnail, is_simple, sniff

LIMITS = ImageLimits.from_settings(Settings(_env_file=None))
ALL_FORMATS = replace(LIMITS, extra_formats=frozenset({"TIFF", "BMP"}))


def seen(data: bytes, *, side: int = 256, limits: ImageLimits = LIMITS) -> Pixels:
    return decode(data, side=side, limits=limits)


def refusal(data: bytes, *, limits: ImageLimits = LIMITS) -> str:
    with pytest.raises(ImageRefused) as refused:
        decode(data, side=256, limits=limits)
    return refused.value.detail


def one_colour(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (5, 4), colour)  # type: ignore[arg-type]


# Formats and modes


@pytest.mark.parametrize(
    ("image_format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {})]
)
def test_lossless_formats_give_back_the_very_pixels(image_format: str, options: dict[str, object]) -> None:
    pixels = picture(1)
    np.testing.assert_array_equal(seen(encoded(pixels, image_format, **options), limits=ALL_FORMATS), pixels)


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (one_colour("1", 1), (255, 255, 255)),
        (one_colour("L", 77), (77, 77, 77)),
        (one_colour("LA", (77, 255)), (77, 77, 77)),
        (one_colour("LA", (77, 0)), (255, 255, 255)),
        (one_colour("RGB", (10, 20, 30)), (10, 20, 30)),
        (one_colour("RGBA", (10, 20, 30, 255)), (10, 20, 30)),
        (one_colour("RGBA", (10, 20, 30, 0)), (255, 255, 255)),
        (one_colour("RGBA", (255, 0, 0, 51)), (255, 204, 204)),
    ],
)
def test_png_of_each_mode_shows_its_colour_on_white(image: Image.Image, colour: tuple[int, int, int]) -> None:
    pixels = seen(encoded(image))
    assert pixels.shape == (4, 5, 3)
    assert np.unique(pixels.reshape(-1, 3), axis=0).tolist() == [list(colour)]


@pytest.mark.parametrize(("value", "grey"), [(0, 0), (11565, 45), (32896, 128), (65535, 255)])
def test_grey_of_16_bits_is_scaled_and_not_clipped(value: int, grey: int) -> None:
    image = Image.fromarray(np.full((4, 5), value, dtype=np.uint16))
    assert np.unique(seen(encoded(image))).tolist() == [grey]


def test_colour_of_16_bits_is_scaled() -> None:
    rows = b"".join(b"\x00" + struct.pack(">3H", 65535, 11565, 0) * 5 for _ in range(4))
    header = struct.pack(">2I5B", 5, 4, 16, 2, 0, 0, 0)
    assert seen(png(header, rows))[0, 0].tolist() == [255, 45, 0]


def test_palette_is_looked_up() -> None:
    image = one_colour("P", 1)
    image.putpalette([0, 0, 0, 12, 34, 56])
    assert seen(encoded(image))[0, 0].tolist() == [12, 34, 56]


def test_transparent_entry_of_a_palette_is_white() -> None:
    image = one_colour("P", 1)
    image.putpalette([0, 0, 0, 12, 34, 56])
    assert seen(encoded(image, transparency=1))[0, 0].tolist() == [255, 255, 255]
    assert seen(encoded(image, transparency=b"\xff\x33"))[0, 0].tolist() == [206, 211, 215]


def test_transparent_colour_of_a_picture_without_alpha_is_white() -> None:
    assert seen(encoded(one_colour("RGB", (9, 8, 7)), transparency=(9, 8, 7)))[0, 0].tolist() == [255, 255, 255]
    grey = Image.fromarray(np.full((4, 5), 300, dtype=np.uint16))
    assert seen(encoded(grey, transparency=300))[0, 0].tolist() == [255, 255, 255]


def test_cmyk_jpeg_shows_its_ink() -> None:
    cyan = one_colour("CMYK", (255, 0, 0, 0)).resize((16, 16))
    np.testing.assert_allclose(seen(encoded(cyan, "JPEG", quality=100))[8, 8], [0, 255, 255], atol=2)


def test_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    animation = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert seen(animation)[0, 0].tolist() == [255, 0, 0]


def test_format_is_told_by_content() -> None:
    assert [sniff(encoded(picture(), name)[:16]) for name in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")] == [
        "JPEG",
        "PNG",
        "WEBP",
        "TIFF",
        "BMP",
        None,
    ]
    assert sniff(b"") is None
    assert sniff(b"BMW is a maker of cars") is None


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_each_orientation_is_turned_upright(orientation: int, image_format: str) -> None:
    """The stored picture is turned so that undoing it by the standard's own words gives the upright one."""
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :16] = (255, 0, 0)  # top left
    upright[8:, 16:] = (0, 0, 255)  # bottom right
    stored = STORED_AS[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if image_format == "WEBP" else {"quality": 100} if image_format == "JPEG" else {}
    found = seen(encoded(np.ascontiguousarray(stored), image_format, exif=exif.tobytes(), **options))
    assert found.shape == upright.shape
    np.testing.assert_allclose(found[[2, 13], [4, 27]], [[255, 0, 0], [0, 0, 255]], atol=4)
    np.testing.assert_allclose(found[[2, 13], [27, 4]], 0, atol=4)


# Where EXIF says that row 0 and column 0 of the stored picture are, for each orientation.
STORED_AS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif", [b"Exif\x00\x00garbage", b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff", b"Exif\x00\x00"]
)
def test_unreadable_exif_does_not_refuse_a_picture(exif: bytes) -> None:
    assert seen(encoded(picture(2), "JPEG", exif=exif)).shape == (40, 48, 3)


# Sizes


@pytest.mark.parametrize(
    ("size", "shape"),
    [((48, 40), (40, 48, 3)), ((1000, 500), (256, 512, 3)), ((333, 1001), (769, 256, 3)), ((256, 300), (300, 256, 3))],
)
@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_short_side_is_reduced_and_never_enlarged(
    size: tuple[int, int], shape: tuple[int, int, int], image_format: str
) -> None:
    pixels = seen(encoded(picture(3, size=size), image_format))
    assert (pixels.shape, pixels.dtype) == (shape, np.uint8)
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable


def test_jpeg_decoded_at_a_fraction_looks_like_the_whole_one_resized() -> None:
    original = picture(4, size=(1600, 1200))
    resized = np.asarray(Image.fromarray(original).resize((341, 256), Image.Resampling.BILINEAR))
    difference = np.abs(seen(encoded(original, "JPEG", quality=95)).astype(int) - resized)
    assert difference.mean() < 1.5


def test_large_picture_with_transparency_looks_like_the_whole_one_resized() -> None:
    original = np.dstack([picture(5, size=(1500, 1100)), picture(6, size=(1500, 1100))[:, :, 0]])
    image = Image.fromarray(original)
    on_white = Image.new("RGB", image.size, (255, 255, 255))
    on_white.paste(image, mask=image.getchannel("A"))
    expected = np.asarray(on_white.resize((87, 64), Image.Resampling.BILINEAR))
    difference = np.abs(seen(encoded(image), side=64).astype(int) - expected)
    assert difference.mean() < 1.5


def test_picture_of_one_pixel_is_a_picture() -> None:
    assert seen(encoded(Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1, 2, 3]]]


@given(
    pixels=st.builds(picture, st.integers(0, 2**32), size=st.tuples(st.integers(1, 40), st.integers(1, 40))),
    orientation=st.sampled_from(sorted(STORED_AS)),
    side=st.integers(1, 50),
)
@hypothesis_settings(max_examples=40, deadline=None)
def test_any_picture_comes_out_upright_and_no_larger(pixels: Pixels, orientation: int, side: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED_AS[orientation](pixels))
    found = seen(encoded(stored, exif=exif.tobytes()), side=side)
    height, width, _ = pixels.shape
    short = min(height, width)
    if short <= side:
        np.testing.assert_array_equal(found, pixels)
    else:
        assert found.shape == (height * side // short, width * side // short, 3)


# Refusals


def test_format_that_is_not_enabled_is_named() -> None:
    assert refusal(encoded(picture(), "TIFF")) == "TIFF is not enabled on this server"
    assert refusal(encoded(picture(), "GIF")) == "not a picture: JPEG, PNG and WebP are read"
    assert refusal(b"") == "empty file"


@pytest.mark.parametrize(("image_format", "shown"), [("JPEG", "JPEG"), ("PNG", "PNG"), ("WEBP", "WebP")])
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9, 0.999])
def test_cut_off_picture_is_refused(image_format: str, shown: str, kept: float) -> None:
    data = encoded(picture(7, size=(200, 150)), image_format)
    assert refusal(data[: int(len(data) * kept)]) == f"truncated {shown}"


@pytest.mark.parametrize("image_format", ["TIFF", "BMP"])
def test_cut_off_picture_of_an_extra_format_is_refused(image_format: str) -> None:
    data = encoded(picture(7, size=(200, 150)), image_format)
    assert refusal(data[: len(data) // 2], limits=ALL_FORMATS) in {
        f"truncated {image_format}",
        f"damaged {image_format}",
    }


def test_flipped_bit_in_a_png_is_refused() -> None:
    data = bytearray(encoded(picture(8)))
    data[len(data) // 2] ^= 1
    assert refusal(bytes(data)) == "damaged PNG"


def test_picture_that_is_only_a_header_is_refused() -> None:
    assert refusal(b"\xff\xd8\xff\xd9") == "damaged JPEG"
    assert refusal(b"\x89PNG\r\n\x1a\n") == "truncated PNG"


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((8000, 5001), "8000×5001 pixels, more than 40000000 in all"),
        ((20001, 250), "20001×250 pixels, a side longer than 20000"),
        ((101, 1), "101×1 pixels, a longer strip than 100 to 1"),
        ((1, 30000), "1×30000 pixels, a side longer than 20000"),
    ],
)
def test_size_beyond_the_limits_is_refused_by_the_header_alone(size: tuple[int, int], reason: str) -> None:
    """The header promises pixels that are not there: had they been looked for, the picture would be truncated."""
    assert refusal(png(struct.pack(">2I5B", *size, 8, 2, 0, 0, 0), b"\x00")) == reason


def test_size_at_the_limit_is_read() -> None:
    assert seen(encoded(Image.new("L", (100, 1), 3))).shape == (1, 100, 3)


def test_large_file_is_refused() -> None:
    assert refusal(jpeg(), limits=replace(LIMITS, max_bytes=100)) == "larger than 100 bytes"


def test_jpeg_of_too_many_scans_is_refused_before_it_is_decoded() -> None:
    progressive = encoded(picture(9), "JPEG", progressive=True)
    assert seen(progressive).shape == (40, 48, 3)
    end = progressive.rindex(b"\xff\xd9")
    last_scan = progressive[progressive.rindex(b"\xff\xda") : end]
    bomb = progressive[:end] + last_scan * 100 + b"\xff\xd9"
    assert refusal(bomb) == "JPEG with more than 100 scans"


def test_thumbnail_inside_a_jpeg_counts_as_no_scan() -> None:
    exif = b"Exif\x00\x00" + jpeg(10)
    with_thumbnail = encoded(picture(11), "JPEG", exif=exif)
    assert seen(with_thumbnail, limits=replace(LIMITS, max_jpeg_scans=1)).shape == (40, 48, 3)


def test_32_bit_pixels_are_refused_rather_than_guessed() -> None:
    wide: NDArray[np.float32] = np.ones((4, 4), dtype=np.float32)
    assert refusal(encoded(Image.fromarray(wide), "TIFF"), limits=ALL_FORMATS) == (
        "pixels that are neither 8 nor 16 bits deep"
    )


def test_memory_for_a_large_picture_is_bounded() -> None:
    """36 Mpx with alpha: 144 MB decoded, and only a few more to put it on white."""
    data = encoded(Image.new("RGBA", (6000, 6000), (255, 0, 0, 128)), compress_level=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert seen(data).shape == (256, 256, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_threads_see_the_same() -> None:
    files = [jpeg(i, size=(700, 500)) for i in range(8)] * 4
    with ThreadPoolExecutor(8) as pool:
        for data, pixels in zip(files, pool.map(seen, files), strict=True):
            np.testing.assert_array_equal(pixels, seen(data))


# What is decoded where it is


def parted(data: bytes) -> tuple[bytes, bytes]:
    """A JPEG before and from its start of scan on."""
    at = data.rindex(b"\xff\xda")
    return data[:at], data[at:]


def test_small_plain_jpegs_are_simple() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    grey, ink = (Image.fromarray(picture(1)).convert(mode) for mode in ("L", "CMYK"))
    for plain in (
        jpeg(),
        encoded(picture(1), "JPEG", exif=exif.tobytes()),
        encoded(grey, "JPEG"),
        encoded(ink, "JPEG"),
    ):
        assert is_simple(plain)
        assert decode(plain, side=64, limits=LIMITS).shape[2] == 3


def test_what_may_cost_more_than_its_size_says_is_not_simple() -> None:
    head, scan = parted(jpeg())
    frame = head.index(b"\xff\xc0")
    second_frame = head[frame : frame + 2 + int.from_bytes(head[frame + 2 : frame + 4], "big")]
    vast = head[: frame + 5] + b"\xff\xff\xff\xff" + head[frame + 9 :]
    costly = {
        "other formats": encoded(picture(1)),
        "progressive": encoded(picture(1), "JPEG", progressive=True),
        "two scans": head + scan[:-2] + scan,
        "two frames": head + second_frame + scan,
        "no frame": head.replace(second_frame, b"") + scan,
        "arithmetic": head.replace(b"\xff\xc0", b"\xff\xc9") + scan,
        "many pixels": vast + scan,
        "many segments": head[:2] + b"\xff\xfe\x00\x02" * 70 + head[2:] + scan,
        "many bytes": jpeg() + bytes(5 * 1024**2),
        "one component of three": head + scan[:4] + b"\x01" + scan[5:],
        "no end": jpeg()[:-2],
        "only a start": b"\xff\xd8\xff",
        "nothing": b"",
    }
    assert {name: is_simple(content) for name, content in costly.items()} == dict.fromkeys(costly, False)


# Thumbnails


def test_thumbnail_is_a_small_jpeg() -> None:
    thumbnail = Image.open(io.BytesIO(encode_thumbnail(picture(12, size=(400, 200)))))
    assert (thumbnail.format, thumbnail.size) == ("JPEG", (160, 80))


def png(header: bytes, rows: bytes) -> bytes:
    """A PNG of the given header and uncompressed rows, with right checksums."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
