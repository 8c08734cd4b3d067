"""One eval transform, equal to torchvision's own."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from app.vision.backbones import BACKBONES
from app.vision.preprocessing import Preprocessing, eval_pixels, normalise, pack_side

CLASSIC = Preprocessing(
    resize=256, crop=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bilinear"
)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth shading, an edge and grain, as photographs have. uint8 (height, width, 3)."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (9 + 5 * c)) + np.cos(y / (17 - 3 * c)) for c in range(3)]
    pixels = 128 + 40 * np.stack(waves, axis=-1) + generator.normal(0, 8, (height, width, 3))
    pixels[height // 3 :, width // 2 :] -= 60
    return pixels.clip(0, 255).astype(np.uint8)


# Bicubic weights are negative in places. Where an edge overshoots 0 or 255, it shows whether clipping happens between
# the two passes, as in Pillow, or after them: in fewer than one value in ten thousand, by up to 3.
@pytest.mark.parametrize(("interpolation", "largest"), [("bilinear", 1), ("bicubic", 3)])
@pytest.mark.parametrize("size", [(256, 384), (640, 300), (256, 256), (100, 100), (31, 200)])
def test_eval_pixels_are_torchvisions_within_a_grey_level(
    size: tuple[int, int], interpolation: str, largest: int
) -> None:
    pixels = picture(*size)
    reference = Compose([Resize(256, InterpolationMode(interpolation)), CenterCrop(224)])(Image.fromarray(pixels))
    preprocessing = Preprocessing(256, 224, CLASSIC.mean, CLASSIC.std, interpolation)

    ours = eval_pixels(pixels, preprocessing)

    assert ours.shape == (3, 224, 224)
    assert ours.dtype == torch.uint8
    difference = abs(np.asarray(reference).astype(int) - ours.permute(1, 2, 0).numpy().astype(int))
    assert difference.max() <= largest
    assert (difference > 1).mean() < 1e-4


def test_a_crop_larger_than_the_resized_picture_is_padded_with_black_as_torchvision_does() -> None:
    pixels = picture(64, 64)
    reference = Compose([Resize(64), CenterCrop(96)])(Image.fromarray(pixels))

    ours = eval_pixels(pixels, Preprocessing(64, 96, CLASSIC.mean, CLASSIC.std, "bilinear"))

    assert np.array_equal(ours.permute(1, 2, 0).numpy(), np.asarray(reference))


def test_read_only_packed_pixels_are_taken_without_a_warning() -> None:
    pixels = picture(256, 300)
    pixels.setflags(write=False)

    assert torch.equal(eval_pixels(pixels, CLASSIC), eval_pixels(torch.from_numpy(pixels.copy()), CLASSIC))


def test_normalise_is_torchvisions_to_tensor_and_normalize() -> None:
    pixels = picture(224, 224)
    reference = Compose([ToTensor(), Normalize(CLASSIC.mean, CLASSIC.std)])(Image.fromarray(pixels))

    ours = normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None], CLASSIC, torch.float32)

    torch.testing.assert_close(ours[0], reference, rtol=0, atol=1e-6)


def test_normalise_can_be_trained_on_after_it_was_used_in_inference_mode() -> None:
    batch = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    statistics = Preprocessing(2, 2, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    with torch.inference_mode():
        normalise(batch, statistics)
    weight = torch.ones(1, requires_grad=True)

    (normalise(batch, statistics) * weight).sum().backward()

    assert weight.grad is not None


def test_normalise_gives_the_precision_that_is_asked_for() -> None:
    batch = torch.full((1, 3, 2, 2), 200, dtype=torch.uint8)

    assert torch.equal(normalise(batch, CLASSIC, torch.bfloat16), normalise(batch, CLASSIC).bfloat16())


def test_another_image_size_keeps_the_ratio_and_moves_to_the_pack_side_that_fits() -> None:
    larger = CLASSIC.with_image_size(320)

    assert (larger.resize, larger.crop, larger.side) == (366, 320, 384)
    assert (CLASSIC.resize, CLASSIC.crop, CLASSIC.side) == (256, 224, 256)


@pytest.mark.parametrize(("resize", "side"), [(1, 256), (256, 256), (257, 384), (640, 640), (2000, 640)])
def test_pack_side_is_the_smallest_that_fits(resize: int, side: int) -> None:
    assert pack_side(resize) == side


@pytest.mark.parametrize("name", BACKBONES)
def test_preprocessing_survives_json(name: str) -> None:
    for weights in BACKBONES[name].weights:
        record = json.loads(json.dumps(weights.preprocessing.to_dict()))
        assert Preprocessing.from_dict(record) == weights.preprocessing


@pytest.mark.parametrize(
    "wrong",
    [{"crop": 0}, {"resize": 10**9}, {"interpolation": "nearest"}, {"std": (0.1, 0.0, 0.1)}, {"mean": (0.5, 0.5)}],
)
def test_a_record_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Preprocessing.from_dict(CLASSIC.to_dict() | wrong)
