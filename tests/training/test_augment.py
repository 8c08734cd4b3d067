"""Augmentation against torchvision's own, and what it must leave alone."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as transforms

from worker.training import crops, operations
from worker.training.augment import cutmix, erase, mixup, random_crop_boxes, training_transform, trivial_augment
from worker.training.crops import Interpolation, by_interpolation, by_matrices

SIZE = 32
CPU = torch.device("cpu")


def picture(height: int = 48, width: int = 64, seed: int = 0) -> Tensor:
    """Smooth shading, an edge and grain, as photographs have. uint8 (height, width, 3)."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (9 + 5 * c)) + np.cos(y / (17 - 3 * c)) for c in range(3)]
    pixels = 128 + 40 * np.stack(waves, axis=-1) + random.normal(0, 8, (height, width, 3))
    pixels[height // 3 :, width // 2 :] -= 60
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))


def batch(count: int, side: int = SIZE) -> Tensor:
    """uint8 (count, 3, side, side) in channels-last memory."""
    return torch.stack([picture(side, side, seed) for seed in range(count)]).permute(0, 3, 1, 2)


def transform(augmentation: Literal["classic", "strong"], pictures: list[Tensor], seed: int) -> Tensor:
    made = training_transform(
        augmentation,
        image_size=SIZE,
        crop_scale=(0.08, 1.0),
        horizontal_flip=True,
        interpolation="bilinear",
    )
    assert made is not None
    return made(pictures, np.random.default_rng(seed), CPU)


def apart(first: Tensor, second: Tensor) -> int:
    """The largest difference in grey levels."""
    return int((first.int() - second.int()).abs().max())


@pytest.mark.parametrize("size", [(48, 64), (200, 20), (20, 200), (1, 1)])
def test_crop_boxes_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    height, width = size
    ours = random_crop_boxes(np.array([size] * 3000), scale=(0.08, 1.0), random=np.random.default_rng(0))
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([_torchvision_box(image) for _ in range(3000)])
    assert (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    # Means of 3000 draws: four standard errors apart at most.
    standard_error = np.sqrt((ours.var(0) + theirs.var(0)) / 3000)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) <= 4 * standard_error + 1e-9).all()


def _torchvision_box(image: Tensor) -> list[int]:
    params = v2.RandomResizedCrop(SIZE).make_params([image])
    return [params[name] for name in ("top", "left", "height", "width")]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop", [by_interpolation, by_matrices])
def test_boxes_are_cropped_resized_and_mirrored_as_torchvision_does_it(
    crop: Callable[..., Tensor], interpolation: Interpolation
) -> None:
    # Smaller and larger than the result, and both; a line, a point; whole pictures and parts of them.
    sizes = [(48, 64), (300, 200), (20, 31), (16, 200), (1, 40), (1, 1), (40, 40)]
    boxes = np.array(
        [(4, 5, 30, 40), (0, 0, 300, 200), (1, 2, 8, 9), (0, 50, 16, 100), (0, 3, 1, 30), (0, 0, 1, 1), (8, 0, 32, 32)]
    )
    flips = np.array([False, True, True, False, True, False, False])
    pictures = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    made = crop(pictures, boxes, flips, size=SIZE, interpolation=interpolation, device=CPU)
    assert (made.dtype, made.shape) == (torch.uint8, (7, 3, SIZE, SIZE))
    assert made.is_contiguous(memory_format=torch.channels_last)
    for found, whole, box, flip in zip(made, pictures, boxes.tolist(), flips, strict=True):
        expected = transforms.resized_crop(
            whole.permute(2, 0, 1), *box, [SIZE, SIZE], InterpolationMode(interpolation), antialias=True
        )
        assert apart(found, expected.flip(-1) if flip else expected) <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_matrices_crop_as_torchs_kernel_does_within_two_levels(
    interpolation: Interpolation, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crops, "_PICTURES_AT_ONCE", 10)
    monkeypatch.setitem(crops._MULTIPLIED_AS, "cpu", dtype)  # what other devices multiply as
    random = np.random.default_rng(0)
    # Noise is the worst case: neighbours differ by up to 255.
    pictures = [
        torch.from_numpy(random.integers(0, 256, (*random.integers(20, 200, 2), 3), np.uint8)) for _ in range(24)
    ]
    boxes = random_crop_boxes(
        np.array([whole.shape[:2] for whole in pictures]), scale=(0.08, 1.0), random=np.random.default_rng(1)
    )
    options: dict[str, Any] = {"size": 64, "interpolation": interpolation, "device": CPU}
    flips = random.random(24) < 0.5
    kernel, matrices = (crop(pictures, boxes, flips, **options) for crop in (by_interpolation, by_matrices))
    difference = (kernel.int() - matrices.int()).abs()
    assert difference.max() <= 2
    assert (difference > 1).float().mean() < 1e-3


@pytest.mark.parametrize("augmentation", ["classic", "strong"])
def test_the_same_random_numbers_give_the_same_batch(augmentation: Literal["classic", "strong"]) -> None:
    pictures = [picture(48, 64, seed) for seed in range(20)] + [picture(33, 90), picture(90, 33)]
    before = [whole.clone() for whole in pictures]
    first, second = (transform(augmentation, pictures, 5) for _ in range(2))
    assert torch.equal(first, second)
    assert (first.dtype, first.shape) == (torch.uint8, (22, 3, SIZE, SIZE))
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(whole, old) for whole, old in zip(pictures, before, strict=True))
    assert not torch.equal(first, transform(augmentation, pictures, 6))


def test_classic_mirrors_half_of_the_pictures() -> None:
    # Left half black, right half white: which side is brighter tells a mirrored one, whatever the crop.
    halves = torch.zeros(40, 40, 3, dtype=torch.uint8)
    halves[:, 20:] = 255
    made = transform("classic", [halves] * 400, 0).float()
    left, right = made[..., :4].mean((1, 2, 3)), made[..., -4:].mean((1, 2, 3))
    mirrored, upright = int((left > right).sum()), int((left < right).sum())
    assert mirrored / (mirrored + upright) == pytest.approx(0.5, abs=0.1)


COLOURS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda image, _strength: image,
    "brightness": lambda image, strength: transforms.adjust_brightness(image, 1 + 0.6 * strength),
    "contrast": lambda image, strength: transforms.adjust_contrast(image, 1 + 0.6 * strength),
    "saturation": lambda image, strength: transforms.adjust_saturation(image, 1 + 0.9 * strength),
    "sharpness": lambda image, strength: transforms.adjust_sharpness(image, 1 + 0.9 * strength),
    "posterize": lambda image, strength: transforms.posterize(image, bits=8 - round(4 * abs(strength))),
    "solarize": lambda image, strength: transforms.solarize(image, threshold=255 * (1 - 0.5 * abs(strength))),
    "autocontrast": lambda image, _strength: transforms.autocontrast(image),
    "equalize": lambda image, _strength: transforms.equalize(image),
}
MOVES: dict[str, Callable[[float], dict[str, Any]]] = {
    "rotation": lambda strength: {"angle": 30 * strength},
    "shear_x": lambda strength: {"shear": [float(np.degrees(np.arctan(0.3 * strength))), 0.0]},
    "shear_y": lambda strength: {"shear": [0.0, float(np.degrees(np.arctan(0.3 * strength)))]},
    "translation_x": lambda strength: {"translate": [float(round(0.15 * strength * SIZE)), 0.0]},
    "translation_y": lambda strength: {"translate": [0.0, float(round(0.15 * strength * SIZE))]},
}
STRENGTHS = np.array([-1.0, -0.4, 0.0, 0.3, 0.7, 1.0])


def changed(operation: str) -> Tensor:
    made = batch(len(STRENGTHS))
    operations.apply(made, [operation] * len(STRENGTHS), STRENGTHS)
    return made


def test_every_operation_has_its_test() -> None:
    assert {*COLOURS, *MOVES} == set(operations.OPERATIONS)


@pytest.mark.parametrize("operation", COLOURS)
def test_colours_change_as_in_torchvision(operation: str) -> None:
    for found, image, strength in zip(changed(operation), batch(len(STRENGTHS)), STRENGTHS, strict=True):
        assert apart(found, COLOURS[operation](image.contiguous(), strength)) <= 1


@pytest.mark.parametrize("operation", ["autocontrast", "equalize", "contrast", "sharpness"])
@pytest.mark.parametrize("side", [1, 2, 8])
def test_pictures_of_one_colour_or_few_pixels_change_as_in_torchvision(operation: str, side: int) -> None:
    plain = torch.full((1, side, side, 3), 77, dtype=torch.uint8)
    plain[..., 1] = torch.arange(side, dtype=torch.uint8)
    image = plain.permute(0, 3, 1, 2)
    expected = COLOURS[operation](image[0].contiguous(), 0.8)
    operations.apply(image, [operation], np.array([0.8]))
    assert apart(image[0], expected) <= 1


@pytest.mark.parametrize("operation", MOVES)
def test_pictures_move_as_in_torchvision_and_leave_grey(operation: str) -> None:
    for found, image, strength in zip(changed(operation), batch(len(STRENGTHS)), STRENGTHS, strict=True):
        options = {"angle": 0.0, "translate": [0.0, 0.0], "shear": [0.0, 0.0]} | MOVES[operation](strength)

        def moved(pixels: Tensor, fill: float, options: dict[str, Any] = options) -> Tensor:
            return transforms.affine(
                pixels, **options, scale=1.0, interpolation=InterpolationMode.BILINEAR, fill=[fill] * 3
            )

        expected = moved(image.contiguous(), 127.0)
        # At the border torchvision takes the picture's part twice; ours is the mean of picture and grey.
        covered = moved(torch.full_like(image, 255).contiguous(), 0.0)
        assert apart(found[covered == 255], expected[covered == 255]) <= 1
        assert (found[covered == 0].int() - 127).abs().le(1).all()


def test_images_of_one_batch_change_each_in_its_own_way() -> None:
    names = list(operations.OPERATIONS) * 2
    strengths = np.random.default_rng(0).uniform(-1, 1, len(names))
    together = batch(len(names))
    operations.apply(together, names, strengths)
    for i, (name, strength) in enumerate(zip(names, strengths, strict=True)):
        alone = batch(len(names))[i : i + 1]
        operations.apply(alone, [name], np.array([strength]))
        # One after the other in one large product, or alone: the last bit of a sum may differ.
        assert apart(together[i], alone[0]) <= 1


def test_strong_draws_every_operation() -> None:
    images = batch(1).expand(300, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    trivial_augment(images, np.random.default_rng(0))
    unchanged = int((images == batch(1)).flatten(1).all(1).sum())
    # One in 14, and the few whose strength changes nothing.
    assert 10 <= unchanged <= 45


def test_a_quarter_of_the_pictures_has_a_grey_box() -> None:
    images = torch.zeros(400, SIZE, SIZE, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    erase(images, np.random.default_rng(0))
    erased = (images == operations.FILL).all(1)
    shares = erased.flatten(1).float().mean(1)
    assert (shares > 0).float().mean() == pytest.approx(0.25, abs=0.06)
    assert shares.max() <= 0.25
    for mask in erased[shares > 0]:
        rows, columns = mask.any(1).sum(), mask.any(0).sum()
        assert mask.sum() == rows * columns


def test_mixup_keeps_each_rows_own_class_the_largest_and_targets_summing_to_one() -> None:
    images = torch.rand(6, 3, 4, 4)
    targets = torch.eye(6)
    mixed, soft = mixup(images, targets, alpha=0.4, random=np.random.default_rng(1))
    torch.testing.assert_close(soft.sum(1), torch.ones(6))
    assert (soft.diagonal() >= 0.5).all()
    share = float(np.random.default_rng(1).beta(0.4, 0.4))
    share = max(share, 1 - share)
    partner = (soft - torch.eye(6) * share).argmax(1)
    torch.testing.assert_close(mixed, share * images + (1 - share) * images[partner])


def test_cutmix_pastes_one_box_and_mixes_targets_as_its_area() -> None:
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 8, 10).contiguous()
    targets = torch.eye(6)
    before = images.clone()
    for seed in range(30):
        mixed, soft = cutmix(images, targets, alpha=1.0, random=np.random.default_rng(seed))
        torch.testing.assert_close(soft.sum(1), torch.ones(6))
        # Each pixel is worth the number of the image it comes from, so the mean is the target's.
        torch.testing.assert_close(mixed.mean((1, 2, 3)), soft @ torch.arange(6.0))
        pasted = (mixed != images)[:, 0]
        for mask in pasted[pasted.flatten(1).any(1)]:
            assert mask.sum() == mask.any(1).sum() * mask.any(0).sum()
    assert torch.equal(images, before)


def test_cutmix_boxes_cover_as_much_as_alpha_says() -> None:
    images, targets = torch.zeros(2, 3, 64, 64), torch.eye(2)
    shares = []
    for seed in range(400):
        _, soft = cutmix(images, targets, alpha=1.0, random=np.random.default_rng(seed))
        shares.append(1 - float(soft.diagonal().min()))
    # Half of the area on average, less what is cut off at the edges; half of the orders of two are the same order.
    assert 0.08 < np.mean(shares) < 0.25


def test_a_gpu_makes_of_a_batch_what_the_cpu_makes_of_it(cuda: torch.device) -> None:
    """Whole batches through `strong`, with its crops, operations and boxes: within a few grey levels."""
    made = training_transform(
        "strong",
        image_size=SIZE,
        crop_scale=(0.08, 1.0),
        horizontal_flip=True,
        interpolation="bicubic",
    )
    assert made is not None
    pictures = [picture(48 + seed % 7, 64 - seed % 5, seed) for seed in range(64)]
    ours, theirs = (made(pictures, np.random.default_rng(3), device).cpu() for device in (cuda, CPU))
    difference = (ours.int() - theirs.int()).abs().float()
    # An equalised or posterised picture turns one level of difference into a step of it.
    assert (difference.mean((1, 2, 3)) < 2).float().mean() > 0.85
    assert difference.mean() < 2
