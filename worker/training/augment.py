"""Random changes of training images, a whole batch at a time: what is drawn, and mixtures of a batch with itself.

The random numbers come in as arguments: pixels.py derives them from (seed, epoch, step). They are drawn on the CPU, so
the same picture is cropped alike on every device. The pixels are changed in crops.py and operations.py.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.training import operations
from worker.training.crops import Interpolation, resized_crops
from worker.training.pixels import Augment, on_device

_CROP_RATIO = (3 / 4, 4 / 3)  # torchvision's RandomResizedCrop, as its number of attempts
_LOG_CROP_RATIO = (math.log(_CROP_RATIO[0]), math.log(_CROP_RATIO[1]))
_CROP_ATTEMPTS = 10
_ERASE_PROBABILITY = 0.25
_ERASE_SCALE = (0.02, 0.2)
_LOG_ERASE_RATIO = (math.log(0.3), math.log(3.3))


def training_transform(
    augmentation: Literal["none", "classic", "strong"],
    *,
    image_size: int,
    crop_scale: tuple[float, float],
    horizontal_flip: bool,
    interpolation: Interpolation,
) -> Augment | None:
    """The change that a batch of training pictures goes through, to uint8 (N, 3, image_size, image_size).

    none: None, so that they are seen as they are served. classic: random resized crop and flip. strong: the same, then
    one random operation of TrivialAugment's kind and random erasing.
    """

    def classic(pictures: Sequence[Tensor], random: np.random.Generator, device: torch.device) -> Tensor:
        sizes = np.array([picture.shape[:2] for picture in pictures], dtype=np.int64)
        boxes = random_crop_boxes(sizes, scale=crop_scale, random=random)
        flips = (random.random(len(pictures)) < 0.5) & horizontal_flip
        return resized_crops(pictures, boxes, flips, size=image_size, interpolation=interpolation, device=device)

    def strong(pictures: Sequence[Tensor], random: np.random.Generator, device: torch.device) -> Tensor:
        images = classic(pictures, random, device)
        trivial_augment(images, random)
        erase(images, random)
        return images

    return {"none": None, "classic": classic, "strong": strong}[augmentation]


def random_crop_boxes(
    sizes: NDArray[np.int64], *, scale: tuple[float, float], random: np.random.Generator
) -> NDArray[np.int64]:
    """One box for each picture, distributed as torchvision's RandomResizedCrop draws it.

    sizes: (N, 2), height and width. Returns (N, 4): top, left, height, width.
    """
    count = len(sizes)
    areas = sizes.prod(axis=1, keepdims=True) * random.uniform(*scale, size=(count, _CROP_ATTEMPTS))
    ratios = np.exp(random.uniform(*_LOG_CROP_RATIO, size=(count, _CROP_ATTEMPTS)))
    tries = np.stack([np.sqrt(areas / ratios), np.sqrt(areas * ratios)], axis=2).round().astype(np.int64)
    fits = np.asarray(((tries > 0) & (tries <= sizes[:, None])).all(axis=2))
    boxes = tries[np.arange(count), fits.argmax(axis=1)]  # the first that fits
    places = np.floor(random.random((count, 2)) * (sizes - boxes + 1)).astype(np.int64)
    # An elongated picture: the largest centre box within the allowed ratios.
    height, width = sizes.T
    largest = np.stack([(width / _CROP_RATIO[0]).round(), (height * _CROP_RATIO[1]).round()], axis=1).astype(np.int64)
    central = np.minimum(sizes, largest)
    fits_any = fits.any(axis=1, keepdims=True)
    return np.where(
        fits_any, np.concatenate([places, boxes], axis=1), np.concatenate([(sizes - central) // 2, central], axis=1)
    )


def trivial_augment(images: Tensor, random: np.random.Generator) -> None:
    """One operation for each image at one strength, both uniform (TrivialAugment, Müller and Hutter 2021).

    images: uint8 (N, 3, S, S) in channels-last memory, changed in place.
    """
    count = len(images)
    drawn = random.integers(len(operations.OPERATIONS), size=count)
    strengths = random.uniform(-1, 1, size=count)
    operations.apply(images, [operations.OPERATIONS[i] for i in drawn], strengths)


def erase(images: Tensor, random: np.random.Generator) -> None:
    """Fills a random box with grey, in one image of four (Zhong et al. 2017).

    images: uint8 (N, 3, S, S) in channels-last memory, changed in place.
    """
    count, side = len(images), images.shape[-1]
    is_erased = random.random(count) < _ERASE_PROBABILITY
    areas = side * side * random.uniform(*_ERASE_SCALE, size=count)
    ratios = np.exp(random.uniform(*_LOG_ERASE_RATIO, size=count))
    lengths = np.stack([np.sqrt(areas * ratios), np.sqrt(areas / ratios)], axis=1).round().clip(1, side)
    starts = np.floor(random.random((count, 2)) * (side - lengths + 1))
    edges = np.stack([starts, starts + lengths], axis=1).astype(np.int64)

    def filled(chosen: Tensor, members: NDArray[np.int64]) -> Tensor:
        place = torch.arange(side, device=chosen.device)
        start, end = on_device(torch.from_numpy(edges[members]), chosen.device).unsqueeze(3).unbind(1)
        inside = (place >= start) & (place < end)  # (M, 2, S): of rows, of columns
        mask = inside[:, 0, :, None] & inside[:, 1, None, :]
        return chosen.masked_fill(mask.unsqueeze(1), operations.FILL)

    operations.replace(images, np.flatnonzero(is_erased), filled)


def mixup(images: Tensor, targets: Tensor, *, alpha: float, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Convex mixtures of the batch with itself in another order (Zhang et al. 2018).

    images: float (N, 3, S, S). targets: float (N, C), rows sum to 1. The larger share stays with the row's own image.
    """
    share = float(random.beta(alpha, alpha))
    share = max(share, 1 - share)
    order = on_device(torch.from_numpy(random.permutation(len(images))), images.device)
    return images * share + images[order] * (1 - share), targets * share + targets[order] * (1 - share)


def cutmix(images: Tensor, targets: Tensor, *, alpha: float, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The batch with one box, the same for all, taken from itself in another order (Yun et al. 2019).

    images: float (N, 3, H, W). targets: float (N, C), rows sum to 1; mixed as the areas are, after the box was cut off
    at the picture's edge. The other image's share of the box before that is drawn from Beta(alpha, alpha).
    """
    height, width = images.shape[-2:]
    side = math.sqrt(random.beta(alpha, alpha))
    middle_row, middle_column = random.integers(height), random.integers(width)
    rows = slice(max(0, round(middle_row - side * height / 2)), min(height, round(middle_row + side * height / 2)))
    columns = slice(
        max(0, round(middle_column - side * width / 2)), min(width, round(middle_column + side * width / 2))
    )
    order = on_device(torch.from_numpy(random.permutation(len(images))), images.device)
    mixed = images.clone()
    mixed[:, :, rows, columns] = images[order][:, :, rows, columns]
    share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    return mixed, targets * share + targets[order] * (1 - share)
