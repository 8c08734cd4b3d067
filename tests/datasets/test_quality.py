"""Copies are found though re-encoded, resized or brightened; pictures that resemble each other are no copies."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import Pixels, encoded, picture
from PIL import Image

from app.datasets.archive import ArchiveLimits, iterate
from app.datasets.quality import Fingerprints, fingerprint, group_near_copies
from app.settings import Settings
from app.vision.images import ImageLimits, decode

SETTINGS = Settings(_env_file=None)
LIMITS = ImageLimits.from_settings(SETTINGS)


def groups(pictures: Sequence[Pixels]) -> list[int]:
    fingerprints = [fingerprint(pixels) for pixels in pictures]
    thumbnails = np.stack([each.thumbnail for each in fingerprints])
    return group_near_copies(
        Fingerprints.of(fingerprints, thumbnails=thumbnails, rows=np.arange(len(fingerprints)))
    ).tolist()


def reencoded(pixels: Pixels, *, quality: int = 60) -> Pixels:
    return decode(encoded(pixels, "JPEG", quality=quality), side=256, limits=LIMITS)


def resized(pixels: Pixels, *, scale: float = 0.6) -> Pixels:
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS))


def brightened(pixels: Pixels, *, by: int = 15) -> Pixels:
    return np.clip(pixels.astype(int) + by, 0, 255).astype(np.uint8)


CHANGES = pytest.mark.parametrize(
    "change",
    [reencoded, resized, brightened, lambda pixels: reencoded(brightened(resized(pixels)))],
    ids=["re-encoded", "resized", "brightened", "all three"],
)


@CHANGES
def test_copy_is_found_and_others_are_left_alone(change: Callable[[Pixels], Pixels]) -> None:
    originals = [picture(seed, size=(160, 120)) for seed in range(40)]
    copies = [change(pixels) for pixels in originals[:10]]
    assert groups([*originals, *copies]) == [*range(40), *range(10)]


@CHANGES
@pytest.mark.parametrize("name", ["surface_defects", "hymenoptera"])
def test_copies_of_real_pictures_are_found_and_no_two_different_ones_merged(
    shared_data: Path, name: str, change: Callable[[Pixels], Pixels]
) -> None:
    limits = ArchiveLimits.from_settings(SETTINGS)
    members = iterate(shared_data / f"{name}.zip", limits=limits)
    originals = [decode(content, side=256, limits=LIMITS) for _, content in list(members)[::4]]
    copied = range(0, len(originals), 5)
    found = groups([*originals, *(change(originals[i]) for i in copied)])
    count = len(originals)
    assert found[:count] == list(range(count))
    missed = [i for i, group in zip(copied, found[count:], strict=True) if group != i]
    assert len(missed) <= len(copied) // 10


@pytest.mark.parametrize("name", ["sign_digits", "tiny_longtail"])
def test_hands_and_small_pictures_are_not_merged(shared_data: Path, name: str) -> None:
    members = iterate(shared_data / f"{name}.zip", limits=ArchiveLimits.from_settings(SETTINGS))
    found = groups([decode(content, side=256, limits=LIMITS) for _, content in members])
    assert found == list(range(len(found)))


def test_handwritten_digits_of_8_pixels_are_not_merged() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn ships the digits")
    digits = (datasets.load_digits().images * 15.9).astype(np.uint8)
    found = groups([np.repeat(digit[:, :, None], 3, axis=2) for digit in digits])
    assert found == list(range(len(digits)))


def test_plain_pictures_are_copies_only_if_equal() -> None:
    plain = [np.full((32, 32, 3), colour, dtype=np.uint8) for colour in (10, 11, 200, 10)]
    assert groups(plain) == [0, 1, 2, 0]


def test_many_plain_pictures_are_told_apart_quickly() -> None:
    """They share one hash; compared pair by pair, these would take minutes."""
    colours = np.random.default_rng(0).permutation(256**3)[:8_000]
    plain = [np.full((4, 4, 3), [c >> 16, c >> 8 & 255, c & 255], dtype=np.uint8) for c in colours.tolist()]
    assert groups(plain) == list(range(8_000))


def test_noise_is_not_merged() -> None:
    random = np.random.default_rng(0)
    noise = [random.integers(0, 255, (32, 32, 3), dtype=np.uint8) for _ in range(300)]
    assert groups(noise) == list(range(300))


def test_picture_and_its_stretched_form_are_no_copies() -> None:
    original = picture(1, size=(120, 120))
    assert groups([original, np.asarray(Image.fromarray(original).resize((160, 120)))]) == [0, 1]


def test_a_thousand_equal_pictures_are_one_group() -> None:
    assert groups([picture(1)] * 1000) == [0] * 1000


def test_of_many_frames_of_one_camera_only_pairs_that_may_tell_something_new_are_compared() -> None:
    scene = picture(0, size=(160, 120)).astype(int)
    noise = np.random.default_rng(0)
    frames = [
        fingerprint(np.clip(scene + noise.normal(0, 4, scene.shape), 0, 255).astype(np.uint8)) for _ in range(300)
    ]
    thumbnails = np.stack([each.thumbnail for each in frames]).view(Compared)
    found = group_near_copies(Fingerprints.of(frames, thumbnails=thumbnails, rows=np.arange(len(frames))))
    assert (set(found.tolist()), len(frames)) == ({0}, 300)
    # Two of each pair: those of the first blocks that are looked at, of 44,850 pairs.
    assert thumbnails.compared < 2 * 2 * 4096


class Compared(np.ndarray[Any, Any]):
    """Thumbnails that count how many of them are looked up to be compared."""

    compared = 0

    def __getitem__(self, rows: Any) -> Any:
        self.compared += len(rows)
        return np.asarray(super().__getitem__(rows))
