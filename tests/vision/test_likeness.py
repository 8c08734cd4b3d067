"""Pictures made to look as another one was taken."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from app.vision.likeness import seen_alike


def scene(seed: int, side: int = 64) -> Tensor:
    """Soft blots and edges: uint8 (3, S, S)."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(60, 196, (8, 8, 3), dtype=np.uint8)).resize((side, side))
    pixels = np.array(coarse)
    pixels[side // 4 : side // 2, side // 4 : side // 2] //= 2
    return torch.from_numpy(pixels).permute(2, 0, 1)


def shifted(picture: Tensor, kind: str) -> Tensor:
    pixels = picture.permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels)
    if kind == "blur":
        pixels = np.array(image.filter(ImageFilter.GaussianBlur(2)))
    elif kind == "noise":
        pixels = (pixels + np.random.default_rng(0).normal(0, 25, pixels.shape)).clip(0, 255).astype(np.uint8)
    elif kind == "darker":
        pixels = pixels // 2
    elif kind == "flat":
        pixels = (pixels * 0.3 + 90).astype(np.uint8)
    elif kind == "jpeg":
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=8)
        pixels = np.array(Image.open(encoded))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def looks(picture: Tensor) -> Tensor:
    """Mean, contrast, and the size of differences between neighbouring pixels: 3 numbers."""
    values = picture.float()
    fine = (values[:, :, 1:] - values[:, :, :-1]).abs().mean()
    return torch.stack([values.mean(), values.std(), fine])


def test_pictures_taken_alike_are_left_as_they_are() -> None:
    picture = scene(0)

    (seen,) = seen_alike(picture.unsqueeze(0), picture)

    assert int((seen.int() - picture.int()).abs().max()) <= 1


@pytest.mark.parametrize("kind", ["blur", "noise", "darker", "flat", "jpeg"])
def test_picture_is_seen_as_the_other_one_was_taken(kind: str) -> None:
    picture = scene(0)
    target = shifted(picture, kind)

    (seen,) = seen_alike(picture.unsqueeze(0), target)

    before, after = ((looks(each) - looks(target)).abs() for each in (picture, seen))
    assert bool((after <= 0.25 * before + 1.0).all())


def test_what_is_in_the_picture_stays_where_it_is() -> None:
    ours, other = scene(0), shifted(scene(1), "flat")

    (seen,) = seen_alike(ours.unsqueeze(0), other)

    def alike(a: Tensor, b: Tensor) -> float:
        return float(torch.corrcoef(torch.stack([a.float().flatten(), b.float().flatten()]))[0, 1])

    assert alike(seen, ours) > 0.8
    assert abs(alike(seen, other)) < 0.5


def test_same_pictures_give_the_same_noise() -> None:
    pictures, target = torch.stack([scene(0), scene(1)]), shifted(scene(2), "noise")

    assert torch.equal(seen_alike(pictures, target), seen_alike(pictures, target))


def test_plain_grey_picture_gives_numbers() -> None:
    grey = torch.full((3, 64, 64), 128, dtype=torch.uint8)

    assert int(looks(seen_alike(scene(0).unsqueeze(0), grey)[0])[1]) <= 5
    assert seen_alike(grey.unsqueeze(0), scene(0)).shape == (1, 3, 64, 64)
