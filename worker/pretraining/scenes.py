"""Scenes by formula: a textured thing before a textured ground, with the three classes that it was made of.

A network that tells shape, texture and ground apart has to find edges, outlines and surfaces whatever their colour,
light and size: what is asked of it follows from the formula, so nothing has to be labelled. Scene i of a seed is always
the same on the same kind of device.
"""

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from app.vision.device import usable_cores
from worker.pretraining.shapes import shape
from worker.pretraining.textures import texture

TASKS = ("shape", "texture", "ground")
# The label of a task that a scene does not ask: the ground of one that is plain, the shape of one without a thing.
NOT_ASKED = -100

# Sides of what scenes are put together from, over the side of a scene.
TEXTURE_SCALE, SHAPE_SCALE = 2.0, 1.2
# Shares of scenes: with a plain ground, and with the ground alone.
_PLAIN, _BARE = 0.25, 0.15
_CLASS, _INSTANCE, _SCENE = range(3)
_OUTLINE, _SURFACE = range(2)
_AT_ONCE = 250
# Starting processes takes as long as rendering so many.
_FEWEST_FOR_PROCESSES = 500

Random = np.random.Generator


@dataclass(frozen=True)
class Bank:
    """Rendered classes. textures: uint8 (T, I, S, S, 3); shapes: uint8 (K, I, S, S); I instances of each."""

    textures: Tensor
    shapes: Tensor

    @classmethod
    def render(cls, *, textures: int, shapes: int, instances: int, side: int, seed: int) -> "Bank":
        """For scenes of `side`, by all cores."""
        large, small = round(TEXTURE_SCALE * side), round(SHAPE_SCALE * side)
        surfaces = [(_SURFACE, large, t, i, seed) for t in range(textures) for i in range(instances)]
        outlines = [(_OUTLINE, small, s, i, seed) for s in range(shapes) for i in range(instances)]
        made = _by_all_cores(surfaces + outlines)
        return cls(
            torch.from_numpy(np.stack(made[: len(surfaces)]).reshape(textures, instances, large, large, 3)),
            torch.from_numpy(np.stack(made[len(surfaces) :]).reshape(shapes, instances, small, small)),
        )

    @property
    def class_counts(self) -> tuple[int, int, int]:
        """Of each of TASKS."""
        return len(self.shapes), len(self.textures), len(self.textures)

    def to(self, device: torch.device) -> "Bank":
        return Bank(self.textures.to(device), self.shapes.to(device))


def _by_all_cores(asked: list[tuple[int, int, int, int, int]]) -> list[NDArray[np.uint8]]:
    if len(asked) < _FEWEST_FOR_PROCESSES:
        return [_rendered(one) for one in asked]
    with ProcessPoolExecutor(usable_cores(), multiprocessing.get_context("spawn")) as processes:
        return list(processes.map(_rendered, asked, chunksize=16))


def _rendered(asked: tuple[int, int, int, int, int]) -> NDArray[np.uint8]:
    task, side, number, instance, seed = asked
    kind, own = _random(seed, _CLASS, task, number), _random(seed, _INSTANCE, task, number, instance)
    return (texture if task == _SURFACE else shape)(side, kind, own, family=number)


@dataclass(frozen=True)
class Pool:
    """Scenes. pixels: uint8 (N, S, S, 3); labels: int64 (N, 3), one per task."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def on_disk(cls, folder: Path, bank: Bank, *, count: int, side: int, seed: int) -> "Pool":
        """The pool in `folder`, memory-mapped, made as far as it is not there; a run that was ended goes on."""
        folder.mkdir(parents=True, exist_ok=True)
        pixels_file, labels_file, done_file = folder / "pixels.npy", folder / "labels.npy", folder / "done"
        mode = "r+" if done_file.exists() else "w+"
        pixels = np.lib.format.open_memmap(pixels_file, mode=mode, dtype=np.uint8, shape=(count, side, side, 3))
        labels = np.lib.format.open_memmap(labels_file, mode=mode, dtype=np.int64, shape=(count, len(TASKS)))
        pool = cls(torch.from_numpy(pixels), torch.from_numpy(labels))
        done = int(done_file.read_text()) if done_file.exists() else 0
        for start in range(done, count, _AT_ONCE):
            pool._make(bank, start, seed)
            done_file.write_text(str(min(start + _AT_ONCE, count)))
        return pool

    @classmethod
    def in_memory(cls, bank: Bank, *, count: int, side: int, seed: int) -> "Pool":
        """In the memory of the device that the bank is on: a GPU makes tens of thousands of scenes a second."""
        device = bank.textures.device
        pool = cls(
            torch.empty((count, side, side, 3), dtype=torch.uint8, device=device),
            torch.empty((count, len(TASKS)), dtype=torch.int64, device=device),
        )
        for start in range(0, count, _AT_ONCE):
            pool._make(bank, start, seed)
        return pool

    def _make(self, bank: Bank, start: int, seed: int) -> None:
        some = slice(start, min(start + _AT_ONCE, len(self)))
        pixels, labels = scenes(bank, some, side=self.pixels.shape[1], seed=seed)
        self.pixels[some].copy_(pixels)
        self.labels[some].copy_(labels)


def scenes(bank: Bank, numbers: slice, *, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """The scenes of these numbers, which are as many as were ever made together: (N, side, side, 3), on the bank's
    device, and (N, 3)."""
    random, count = _random(seed, _SCENE, numbers.start), numbers.stop - numbers.start
    with torch.inference_mode():
        images, labels = _Composer(bank, side, random).compose(count)
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return pixels, torch.from_numpy(labels)


class _Composer:
    """Puts scenes together, many at a time; images are float32 (N, 3, side, side), mostly in 0..1."""

    def __init__(self, bank: Bank, side: int, random: Random) -> None:
        self._bank, self._side, self._random = bank, side, random
        self._device = bank.textures.device

    def _floats(self, values: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.float32)).to(self._device)

    def compose(self, count: int) -> tuple[Tensor, NDArray[np.int64]]:
        random = self._random
        labels = np.stack([random.integers(0, classes, count) for classes in self._bank.class_counts], axis=1)
        images, kind = self._surfaces(labels[:, 2]), random.random(count)
        plain, with_thing = np.flatnonzero(kind < _PLAIN), np.flatnonzero(kind < 1 - _BARE)
        bare = np.flatnonzero(kind >= 1 - _BARE)
        images[plain] = self._plain_grounds(len(plain))
        self._distract(images, with_thing[random.random(len(with_thing)) < 0.35])
        one_coloured = with_thing[self._add_things(images, with_thing, labels)]
        labels[bare, :2] = NOT_ASKED
        labels[plain, 2] = NOT_ASKED
        labels[one_coloured, 1] = NOT_ASKED
        return self._as_photographed(images), labels

    def _surfaces(self, classes: NDArray[np.int64]) -> Tensor:
        """A piece of an instance of each class, in other colours, light and contrast."""
        count, random = len(classes), self._random
        instances = random.integers(0, self._bank.textures.shape[1], count)
        whole = self._bank.textures[torch.from_numpy(classes), torch.from_numpy(instances)]
        matrix = self._floats(_affine(random, count, 0.35, 1.0, shift=0.6))
        pieces = self._sampled(whole.permute(0, 3, 1, 2), matrix, "reflection")
        pieces = self._recoloured(pieces, 0.3, saturation=(0.2, 1.1))
        middle, spread = pieces.mean((2, 3), keepdim=True), pieces.std((1, 2, 3), keepdim=True)
        wanted = self._floats(np.exp(random.uniform(math.log(0.06), math.log(0.3), (count, 1, 1, 1))))
        shade = self._floats(random.uniform(0.2, 0.8, (count, 3, 1, 1)))
        return (pieces - middle) * (wanted / (spread + 1e-3)).clamp(0.5, 4.0) + 0.5 * (middle + shade)

    def _plain_grounds(self, count: int) -> Tensor:
        """One colour that runs a little into another."""
        near, far = (self._floats(self._random.uniform(0, 1, (count, 3, 1, 1))) for _ in range(2))
        share = self._floats(self._random.uniform(0, 0.6, (count, 1, 1, 1))) * (0.5 + 0.5 * self._ramp(count))
        return near * (1 - share) + far * share

    def _masks(self, classes: NDArray[np.int64], smallest: float, largest: float) -> Tensor:
        """Where each shape is: (N, 1, side, side). Sizes are shares of the picture; most of it stays inside."""
        count, random = len(classes), self._random
        instances = random.integers(0, self._bank.shapes.shape[1], count)
        whole = self._bank.shapes[torch.from_numpy(classes), torch.from_numpy(instances)].unsqueeze(1)
        # From the picture to the shape, so the larger these numbers, the smaller it is seen.
        matrix = self._floats(_affine(random, count, 1 / largest, 1 / smallest, shift=0.0))
        zoom = matrix[:, :, :2]
        room = (0.75 - 0.7 / zoom.norm(dim=(1, 2))).clamp(min=0.05).view(-1, 1, 1)
        matrix[:, :, 2:] = -(zoom @ (self._floats(random.uniform(-1, 1, (count, 2, 1))) * room))
        return self._sampled(whole, matrix, "zeros")

    def _distract(self, images: Tensor, places: NDArray[np.int64]) -> None:
        """Small things that are not asked for, beneath the one that is."""
        shapes, surfaces, _ = self._bank.class_counts
        mask = self._masks(self._random.integers(0, shapes, len(places)), 0.2, 0.5)
        other = self._surfaces(self._random.integers(0, surfaces, len(places)))
        images[places] = images[places] * (1 - mask) + other * mask

    def _add_things(self, images: Tensor, places: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Lit, with shadows and darker edges. Returns which of them show nearly one colour and no texture."""
        count, random = len(places), self._random
        mask, thing = self._masks(labels[places, 0], 0.5, 1.15), self._surfaces(labels[places, 1])
        one_coloured = np.flatnonzero(random.random(count) < 0.2)
        colour = thing[one_coloured].mean((2, 3), keepdim=True)
        thing[one_coloured] = colour + 0.3 * (thing[one_coloured] - colour)
        thing = thing * (1 + self._sometimes(count, 0.5, chance=0.5) * self._ramp(count))
        thing = thing * (1 - self._sometimes(count, 1.0, chance=0.4) * (1 - functional.avg_pool2d(mask, 5, 1, 2)))
        shadow = functional.avg_pool2d(mask, 9, 1, 4).roll((3, 3), (2, 3))
        ground = images[places] * (1 - self._sometimes(count, 0.6, chance=0.4) * shadow)
        images[places] = ground * (1 - mask) + thing * mask
        return one_coloured

    def _as_photographed(self, images: Tensor) -> Tensor:
        """Other light, sometimes grey, blurred or grainy."""
        count, random = len(images), self._random
        images = self._recoloured(images, 0.1, saturation=(0.5, 1.1))
        middle = images.mean((2, 3), keepdim=True)
        images = (images - middle) * self._floats(random.uniform(0.7, 1.3, (count, 1, 1, 1))) + middle
        images = images + self._floats(random.uniform(-0.15, 0.15, (count, 1, 1, 1)))
        grey = np.flatnonzero(random.random(count) < 0.15)
        images[grey] = images[grey].mean(1, keepdim=True)
        blurred = np.flatnonzero(random.random(count) < 0.2)
        images[blurred] = functional.avg_pool2d(images[blurred], 3, 1, 1)
        grainy = np.flatnonzero(random.random(count) < 0.15)
        images[grainy] += 0.05 * self._noise(len(grainy))
        return images

    def _ramp(self, count: int) -> Tensor:
        """From -1 to 1 across the picture in any direction: (N, 1, side, side)."""
        angle = self._floats(self._random.uniform(0, 2 * math.pi, (count, 1, 1, 1)))
        line = torch.linspace(-1, 1, self._side, device=self._device)
        return line * angle.cos() + line.view(-1, 1) * angle.sin()

    def _sometimes(self, count: int, most: float, *, chance: float) -> Tensor:
        amounts = self._random.uniform(0, most, count) * (self._random.random(count) < chance)
        return self._floats(amounts).view(-1, 1, 1, 1)

    def _sampled(self, images: Tensor, matrix: Tensor, padding: str) -> Tensor:
        size = [len(images), images.shape[1], self._side, self._side]
        grid = functional.affine_grid(matrix, size, align_corners=False)
        sharp = images.float() / 255
        return functional.grid_sample(sharp, grid, padding_mode=padding, align_corners=False)

    def _recoloured(self, images: Tensor, strength: float, *, saturation: tuple[float, float]) -> Tensor:
        """Channels mixed at random, each image in its own way, and more or less grey."""
        count, random = len(images), self._random
        mixing = np.eye(3) + strength * random.normal(0, 1, (count, 3, 3))
        mixing = mixing / np.maximum(mixing.sum(axis=2, keepdims=True), 0.3)
        kept = random.uniform(*saturation, (count, 1, 1))
        # First towards grey, then mixed: one matrix.
        matrix = self._floats(mixing @ (kept * np.eye(3) + (1 - kept) / 3))
        return torch.bmm(matrix, images.flatten(2)).view_as(images)

    def _noise(self, count: int) -> Tensor:
        """Normal, float32 (N, 3, side, side); drawn on the device, where numpy would take longer than all the rest."""
        seed = int(self._random.integers(2**63))
        generator = torch.Generator(self._device).manual_seed(seed)
        return torch.randn((count, 3, self._side, self._side), generator=generator, device=self._device)


def _random(*key: int) -> Random:
    return np.random.default_rng(list(key))


def _affine(random: Random, count: int, smallest: float, largest: float, *, shift: float) -> NDArray[np.float64]:
    """(N, 2, 3): mostly upright, a little stretched and sheared. Sizes are drawn evenly on a logarithmic scale."""
    is_upright = random.random(count) < 0.8
    angle = np.where(is_upright, random.normal(0, 0.25, count), random.uniform(0, 2 * math.pi, count))
    size = np.exp(random.uniform(math.log(smallest), math.log(largest), count))
    stretch, shear = np.exp(random.uniform(-0.2, 0.2, count)), random.uniform(-0.2, 0.2, count)
    matrix = np.empty((count, 2, 3))
    matrix[:, 0, 0] = size * stretch * np.cos(angle)
    matrix[:, 0, 1] = size * (shear - np.sin(angle))
    matrix[:, 1, 0] = size * np.sin(angle)
    matrix[:, 1, 1] = size / stretch * np.cos(angle)
    matrix[:, :, 2] = shift * random.uniform(-1, 1, (count, 2))
    return matrix
