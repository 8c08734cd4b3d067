"""Random changes of training images, on uint8 tensors; and mixup on whole batches.

The random numbers come in as arguments: pixels.py derives them from (seed, epoch, step).
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from worker.training.pixels import Augment

_CROP_RATIO = (3 / 4, 4 / 3)  # torchvision's RandomResizedCrop, as its number of attempts
_CROP_ATTEMPTS = 10
_ERASE_PROBABILITY = 0.25
_ERASE_SCALE = (0.02, 0.2)
_ERASE_RATIO = (0.3, 3.3)


def training_transform(
    augmentation: Literal["none", "classic", "strong"],
    *,
    image_size: int,
    crop_scale: tuple[float, float],
    horizontal_flip: bool,
    interpolation: Literal["bilinear", "bicubic"],
    eval_transform: Callable[[Tensor], Tensor],
) -> Augment:
    """uint8 (H, W, 3) and random numbers -> uint8 (3, image_size, image_size).

    none: the evaluation's own resize and centre crop, nothing random. classic: random resized crop and flip.
    strong: the same, then one random operation of TrivialAugment's kind and random erasing.
    """
    if augmentation == "none":
        return lambda pixels, _random: eval_transform(pixels)

    def classic(pixels: Tensor, random: np.random.Generator) -> Tensor:
        height, width = pixels.shape[:2]
        top, left, box_height, box_width = random_crop_box(height, width, scale=crop_scale, random=random)
        flip = random.random() < 0.5 and horizontal_flip
        crop = pixels[top : top + box_height, left : left + box_width].permute(2, 0, 1)
        out = resize(crop, (image_size, image_size), interpolation)
        return out.flip(-1) if flip else out

    def strong(pixels: Tensor, random: np.random.Generator) -> Tensor:
        return erase(trivial_augment(classic(pixels, random), random), random)

    return classic if augmentation == "classic" else strong


def resize(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """uint8 (3, H, W) -> uint8 (3, *size), antialiased."""
    # On a channels-last view this is torch's vectorised uint8 kernel: no conversion to float and back.
    out: Tensor = functional.interpolate(image.unsqueeze(0), size=size, mode=interpolation, antialias=True)
    return out.squeeze(0)


def random_crop_box(
    height: int, width: int, *, scale: tuple[float, float], random: np.random.Generator
) -> tuple[int, int, int, int]:
    """A box (top, left, height, width) distributed as torchvision's RandomResizedCrop draws it."""
    area = height * width
    low, high = math.log(_CROP_RATIO[0]), math.log(_CROP_RATIO[1])
    for _ in range(_CROP_ATTEMPTS):
        target = area * random.uniform(*scale)
        ratio = math.exp(random.uniform(low, high))
        box_width, box_height = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(random.integers(0, height - box_height + 1))
            left = int(random.integers(0, width - box_width + 1))
            return top, left, box_height, box_width
    # An elongated picture: the largest centre box within the allowed ratios.
    in_ratio = width / height
    box_width = round(height * _CROP_RATIO[1]) if in_ratio > _CROP_RATIO[1] else width
    box_height = round(width / _CROP_RATIO[0]) if in_ratio < _CROP_RATIO[0] else height
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def trivial_augment(image: Tensor, random: np.random.Generator) -> Tensor:
    """One operation at one strength, both uniform (TrivialAugment, Müller and Hutter 2021, moderate ranges)."""
    strength = random.random()
    sign = 1.0 if random.random() < 0.5 else -1.0
    side = image.shape[-1]
    operations: list[Callable[[], Tensor]] = [
        lambda: image,
        lambda: transforms.adjust_brightness(image, 1 + sign * 0.6 * strength),
        lambda: transforms.adjust_contrast(image, 1 + sign * 0.6 * strength),
        lambda: transforms.adjust_saturation(image, 1 + sign * 0.9 * strength),
        lambda: transforms.adjust_sharpness(image, 1 + sign * 0.9 * strength),
        lambda: transforms.posterize(image, bits=8 - round(4 * strength)),
        lambda: transforms.solarize(image, threshold=255 * (1 - 0.5 * strength)),
        lambda: transforms.autocontrast(image),
        lambda: transforms.equalize(image),
        lambda: _affine(image, angle=sign * 30 * strength),
        lambda: _affine(image, shear=(math.degrees(math.atan(sign * 0.3 * strength)), 0.0)),
        lambda: _affine(image, shear=(0.0, math.degrees(math.atan(sign * 0.3 * strength)))),
        lambda: _affine(image, translate=(round(sign * 0.15 * strength * side), 0)),
        lambda: _affine(image, translate=(0, round(sign * 0.15 * strength * side))),
    ]
    return operations[int(random.integers(len(operations)))]()


def erase(image: Tensor, random: np.random.Generator) -> Tensor:
    """Fills a random box with grey, one time in four (Zhong et al. 2017)."""
    if random.random() >= _ERASE_PROBABILITY:
        return image
    height, width = image.shape[-2:]
    target = height * width * random.uniform(*_ERASE_SCALE)
    ratio = math.exp(random.uniform(math.log(_ERASE_RATIO[0]), math.log(_ERASE_RATIO[1])))
    box_height = min(height, max(1, round(math.sqrt(target * ratio))))
    box_width = min(width, max(1, round(math.sqrt(target / ratio))))
    top = int(random.integers(0, height - box_height + 1))
    left = int(random.integers(0, width - box_width + 1))
    erased = image.clone()
    erased[:, top : top + box_height, left : left + box_width] = 127
    return erased


def mixup(images: Tensor, targets: Tensor, *, alpha: float, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Convex mixtures of the batch with itself in another order (Zhang et al. 2018).

    images: float (N, 3, S, S). targets: float (N, C), rows sum to 1. The larger share stays with the row's own image.
    """
    share = float(random.beta(alpha, alpha))
    share = max(share, 1 - share)
    order = torch.from_numpy(random.permutation(len(images))).to(images.device)
    return images * share + images[order] * (1 - share), targets * share + targets[order] * (1 - share)


def _affine(
    image: Tensor,
    *,
    angle: float = 0.0,
    translate: tuple[int, int] = (0, 0),
    shear: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    moved: Tensor = transforms.affine(
        image,
        angle=angle,
        translate=list(translate),
        scale=1.0,
        shear=list(shear),
        interpolation=InterpolationMode.BILINEAR,
        fill=[127.0, 127.0, 127.0],
    )
    return moved
