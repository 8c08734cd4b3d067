"""Small things to train on: a few noisy pictures per class, a network of a few thousand parameters, a plan."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from app.vision.preprocessing import Preprocessing, eval_pixels, normalise
from worker.training.augment import training_transform
from worker.training.loop import Plan
from worker.training.optim import Schedule, build_optimizer
from worker.training.pixels import PixelSource, Split, steps_per_epoch
from worker.training.state import LoopState
from worker.training.tasks import Tasks

SMALL = Preprocessing(resize=20, crop=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), interpolation="bilinear")


class ListedImages:
    """Pictures in memory, in the shape that training reads."""

    def __init__(self, images: Sequence[NDArray[np.uint8]]) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        return self._images[index]


def split(count: int, *, classes: int = 3, seed: int = 0, sides: tuple[int, int] = (24, 30)) -> Split:
    """Noise around a brightness that tells the class."""
    random = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % classes
    images = [
        (random.integers(0, 120, (*sides, 3)) + 60 * int(label)).clip(0, 255).astype(np.uint8) for label in labels
    ]
    return Split(ListedImages(images), np.arange(count), labels)


def network(*, classes: int = 3, seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(8, classes),
    )


def plan(**changes: Any) -> Plan:
    """Two epochs of 22 images in batches of 5 (4 full, one of 2), validated on 12."""
    train = changes.pop("train", None) or split(22)
    batch_size, epochs = changes.pop("batch_size", 5), changes.pop("epochs", 2)
    augmentation = changes.pop("augmentation", "classic")
    augment = training_transform(
        augmentation,
        image_size=SMALL.crop,
        crop_scale=(0.3, 1.0),
        horizontal_flip=True,
        interpolation="bilinear",
    )
    defaults = Plan(
        train=PixelSource(train, augment, prepare),
        val=PixelSource(split(12, seed=1), augment, prepare),
        tasks=Tasks((3,)),
        epochs=epochs,
        batch_size=batch_size,
        seed=0,
        schedule=Schedule("constant", epochs, steps_per_epoch(len(train), batch_size)),
        normalise=prepared,
    )
    return replace(defaults, **changes)


def prepared(batch: Tensor) -> Tensor:
    return normalise(batch, SMALL)


def prepare(pixels: Tensor) -> Tensor:
    return eval_pixels(pixels, SMALL)


def state(net: nn.Module, *, optimizer: str = "sgd", rate: float = 0.05, ema: float = 0.0) -> LoopState:
    built = build_optimizer(
        [(net, rate)],
        optimizer="sgd" if optimizer == "sgd" else "adamw",
        momentum=0.9 if optimizer == "sgd" else None,
        weight_decay=0.0,
        device_type="cpu",
    )
    return LoopState.begin(net, built, precision="fp32", ema=ema)


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
