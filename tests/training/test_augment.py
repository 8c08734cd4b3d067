"""Augmentation against torchvision's own, and what it must leave alone."""

from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from worker.training.augment import erase, mixup, random_crop_box, resize, training_transform, trivial_augment

SIZE = 32


def picture(height: int = 48, width: int = 64) -> Tensor:
    random = np.random.default_rng(0)
    return torch.from_numpy(random.integers(0, 256, (height, width, 3), np.uint8))


def transform(augmentation: Literal["none", "classic", "strong"], picture: Tensor, seed: int) -> Tensor:
    made = training_transform(
        augmentation,
        image_size=SIZE,
        crop_scale=(0.08, 1.0),
        horizontal_flip=True,
        interpolation="bilinear",
        eval_transform=lambda pixels: pixels[:SIZE, :SIZE].permute(2, 0, 1),
    )
    return made(picture, np.random.default_rng(seed))


@pytest.mark.parametrize("size", [(48, 64), (200, 20), (20, 200), (1, 1)])
def test_crop_boxes_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    height, width = size
    random = np.random.default_rng(0)
    ours = np.array([random_crop_box(height, width, scale=(0.08, 1.0), random=random) for _ in range(3000)])
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [v2.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
        if hasattr(v2.RandomResizedCrop, "get_params")
        else [_torchvision_box(image) for _ in range(3000)]
    )
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    # Means of 3000 draws: four standard errors apart at most.
    standard_error = np.sqrt((ours.var(0) + theirs.var(0)) / 3000)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) <= 4 * standard_error + 1e-9).all()


def _torchvision_box(image: Tensor) -> list[int]:
    params = v2.RandomResizedCrop(SIZE).make_params([image])
    return [params[name] for name in ("top", "left", "height", "width")]


def test_a_crop_is_resized_as_torchvision_resizes_it() -> None:
    image = picture().permute(2, 0, 1)
    expected = v2.functional.resized_crop(image, 4, 5, 30, 40, [SIZE, SIZE], antialias=True)
    found = resize(image[:, 4:34, 5:45], (SIZE, SIZE), "bilinear")
    # torch has two uint8 kernels, by memory layout, which round differently by one.
    assert (found.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("augmentation", ["none", "classic", "strong"])
def test_the_same_random_numbers_give_the_same_picture(
    augmentation: Literal["none", "classic", "strong"],
) -> None:
    for seed in range(20):
        first, second = (transform(augmentation, picture(), seed) for _ in range(2))
        assert torch.equal(first, second)
        assert (first.dtype, first.shape) == (torch.uint8, (3, SIZE, SIZE))


def test_classic_mirrors_half_of_the_pictures() -> None:
    # Left half black, right half white: which side is brighter tells a mirrored one, whatever the crop.
    halves = torch.zeros(40, 40, 3, dtype=torch.uint8)
    halves[:, 20:] = 255
    mirrored = [
        bool((t := transform("classic", halves, seed).float())[..., :4].mean() > t[..., -4:].mean())
        for seed in range(400)
    ]
    upright = [
        bool((t := transform("classic", halves, seed).float())[..., :4].mean() < t[..., -4:].mean())
        for seed in range(400)
    ]
    assert sum(mirrored) / (sum(mirrored) + sum(upright)) == pytest.approx(0.5, abs=0.1)


def test_every_operation_of_strong_keeps_shape_and_type() -> None:
    image = picture(SIZE, SIZE).permute(2, 0, 1).contiguous()
    before = image.clone()
    for seed in range(200):
        changed = trivial_augment(image, np.random.default_rng(seed))
        assert (changed.shape, changed.dtype) == (image.shape, torch.uint8)
        erased = erase(image, np.random.default_rng(seed))
        assert erased.shape == image.shape
    assert torch.equal(image, before)


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
