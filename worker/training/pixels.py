"""Packed pixels to batches of uint8 tensors, in an order and with random changes that follow from the seed alone.

Nothing here has a state to save: order, crops and mixing are functions of (seed, epoch, step), so a job resumed at any
step sees exactly the batches it would have seen. Where there is a core for it, the next batches are made in one thread
while the current one trains.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.vision.device import usable_cores

T = TypeVar("T")
# A batch changed at random: pictures, uint8 (H, W, 3) of any sizes, which it must not write to; random numbers; and
# where the result is wanted -> uint8 (N, 3, S, S) in channels-last memory, on that device.
Augment = Callable[[Sequence[Tensor], np.random.Generator, torch.device], Tensor]

# What a random stream is for; each purpose has its own, so that one more draw here shifts nothing there.
ORDER, AUGMENT, MIX, NETWORK, HEAD, VIEW = range(6)
_PREPARED_BATCHES = 2
KEPT_BYTES = 1024**3  # of a GPU's memory, for validation: 7,000 pictures
CPU = torch.device("cpu")


class Images(Protocol):
    """Decoded pictures by index: uint8 (H, W, 3), of any size. app.datasets.packed.PackedPixels is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> NDArray[np.uint8]: ...


@dataclass(frozen=True)
class Split:
    """The part of a data set that is trained or validated on. indices: places in `images`; labels: int64, one each."""

    images: Images
    indices: NDArray[np.int64]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class Batch:
    """inputs: uint8 pixels (N, 3, S, S) in channels-last memory, or cached activations; labels: int64 (N,).

    Made for cuda they are there already, or on the CPU in pinned memory, from where copies need not be waited for.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


class Source(Protocol):
    """What is trained or validated on, as batches. positions: places within the source, from 0 to len - 1."""

    @property
    def labels(self) -> NDArray[np.int64]: ...

    @property
    def is_light(self) -> bool:
        """Whether a batch, and a step on it, is so little work that a second thread costs more than it brings."""
        ...

    def __len__(self) -> int: ...

    def training_batch(
        self, positions: NDArray[np.int64], *, seed: int, epoch: int, step: int, device: torch.device = CPU
    ) -> Batch:
        """The images at these positions, changed at random as follows from (seed, epoch, step), for use on `device`."""
        ...

    def batch(self, positions: NDArray[np.int64], *, device: torch.device = CPU) -> Batch:
        """The images at these positions, as they are served; on the CPU, and pinned where `device` is cuda."""
        ...


@dataclass(frozen=True)
class PixelSource:
    """Batches of pixels.

    prepare: uint8 (H, W, 3), which it must not write to -> uint8 (3, S, S), not random, as serving does it. augment:
    None where nothing is trained on them.
    """

    split: Split
    augment: Augment | None
    prepare: Callable[[Tensor], Tensor]
    is_light = False

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.split.labels

    def __len__(self) -> int:
        return len(self.split)

    def training_batch(
        self, positions: NDArray[np.int64], *, seed: int, epoch: int, step: int, device: torch.device = CPU
    ) -> Batch:
        assert self.augment is not None, "a source to be trained on"
        pixels = self.augment(_pictures(self.split, positions), random_stream(seed, AUGMENT, epoch, step), device)
        return Batch(pixels, pinned(torch.from_numpy(self.labels[positions]), device))

    def batch(self, positions: NDArray[np.int64], *, device: torch.device = CPU) -> Batch:
        pixels = stacked([self.prepare(picture) for picture in _pictures(self.split, positions)])
        return Batch(pinned(pixels, device), torch.from_numpy(self.labels[positions]))


@dataclass
class KeptSource:
    """A source that is passed again and again, whose batches stay on the GPU once they are made, as far as they fit.

    Making them takes longer there than a pass through a small network.
    """

    source: Source
    _kept: dict[tuple[int, int], Batch] = field(default_factory=dict)
    _free: int = KEPT_BYTES

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.source.labels

    @property
    def is_light(self) -> bool:
        return self.source.is_light

    def __len__(self) -> int:
        return len(self.source)

    def training_batch(
        self, positions: NDArray[np.int64], *, seed: int, epoch: int, step: int, device: torch.device = CPU
    ) -> Batch:
        return self.source.training_batch(positions, seed=seed, epoch=epoch, step=step, device=device)

    def batch(self, positions: NDArray[np.int64], *, device: torch.device = CPU) -> Batch:
        """As a source has it, of positions that follow each other; on the device where it is kept."""
        place = int(positions[0]), len(positions)
        if (found := self._kept.get(place)) is not None:
            return found
        made = self.source.batch(positions, device=device)
        if made.inputs.nbytes > self._free:
            return made
        try:
            kept = Batch(made.inputs.to(device), made.labels)
        except torch.OutOfMemoryError:
            self._free = 0
            return made
        self._kept[place] = kept
        self._free -= made.inputs.nbytes
        return kept

    def give_up(self) -> bool:
        """For want of memory: keeps nothing more. Returns whether anything was kept."""
        had_any, self._free = bool(self._kept), 0
        self._kept.clear()
        return had_any


def random_stream(seed: int, purpose: int, *position: int) -> np.random.Generator:
    """Random numbers that follow from these integers alone, the same on every platform."""
    return np.random.default_rng([seed, purpose, *position])


def torch_seed(seed: int, purpose: int, *position: int) -> int:
    """A seed for torch's own generators, mixed from these integers; below 2^63."""
    return int(np.random.SeedSequence([seed, purpose, *position]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def batch_positions(count: int, batch_size: int, *, seed: int, epoch: int, fewest: int = 1) -> list[NDArray[np.int64]]:
    """The epoch's batches as positions within a split, shuffled; every position once, the last batch smaller.

    fewest: a last batch of fewer images joins the batch before it.
    """
    order = random_stream(seed, ORDER, epoch).permutation(count)
    ends = [batch_size * step for step in range(1, steps_per_epoch(count, batch_size, fewest=fewest))]
    return np.split(order, ends)


def steps_per_epoch(count: int, batch_size: int, *, fewest: int = 1) -> int:
    """len(batch_positions(...)) without making them."""
    whole, left = divmod(count, batch_size)
    return whole + 1 if left > 0 and (left >= fewest or whole == 0) else whole


def training_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    first_step: int,
    fewest: int = 1,
    device: torch.device = CPU,
) -> Iterator[Batch]:
    """The epoch's batches from `first_step` on, made for training on `device`."""
    positions = batch_positions(len(source), batch_size, seed=seed, epoch=epoch, fewest=fewest)
    for step in range(first_step, len(positions)):
        yield source.training_batch(positions[step], seed=seed, epoch=epoch, step=step, device=device)


def ordered_batches(source: Source, *, batch_size: int, device: torch.device = CPU) -> Iterator[Batch]:
    """The source once, in its own order; on the CPU, and pinned where `device` is cuda."""
    for start in range(0, len(source), batch_size):
        yield source.batch(np.arange(start, min(start + batch_size, len(source))), device=device)


def prefetch(items: Iterable[T], *, depth: int = _PREPARED_BATCHES) -> Generator[T, None, None]:
    """The same items, made up to `depth` ahead in one thread; close it (or exhaust it) to end the thread.

    An exception in the thread is raised here, at the place where its item would have come.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def offer(entry: tuple[T | None, BaseException | None]) -> bool:
        while not stopped.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not offer((item, None)):
                    return
            offer((None, StopIteration()))
        except BaseException as error:  # noqa: BLE001 (carried over to the consumer, not handled)
            offer((None, error))

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]  # an entry without error has an item
    finally:
        stopped.set()
        thread.join()


def prefetched(
    items: Iterable[T], *, device: torch.device, are_light: bool = False, depth: int = _PREPARED_BATCHES
) -> "closing[Generator[T, None, None]]":
    """Batches for work on `device`, as a context, for loops that may leave early: made ahead by `prefetch`.

    But where that work keeps all cores busy itself, made one by one as they are asked for: a thread beside it takes a
    core from every parallel step, and an epoch of mobilenet_v3_small took 1.76 s in place of 1.50 (two cores). So are
    those that are light, as Source has it: handing them over would take longer.
    """
    is_crowded = device.type == "cpu" and (are_light or torch.get_num_threads() >= usable_cores())
    return closing((item for item in items) if is_crowded else prefetch(items, depth=depth))


def class_counts(labels: NDArray[np.int64], class_count: int) -> NDArray[np.int64]:
    return np.bincount(labels, minlength=class_count)


def stacked(images: Sequence[Tensor]) -> Tensor:
    """N images (3, S, S) as one batch (N, 3, S, S) in channels-last memory."""
    # Stacked with colours last, as eval_pixels leaves them: rearranging planes costs as much as resizing does.
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in memory from which cuda copies without the CPU waiting; for other devices as it is."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, on its way there when this returns."""
    return pinned(tensor, device).to(device, non_blocking=True)


def _pictures(split: Split, positions: NDArray[np.int64]) -> list[Tensor]:
    return [_shared(split.images[index]) for index in split.indices[positions].tolist()]


class _Writable:
    """The same memory, said to be writable; it lives as long as what is made from this."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self._pixels = pixels
        interface = pixels.__array_interface__
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}


def _shared(pixels: NDArray[np.uint8]) -> Tensor:
    """A tensor that shares the picture's memory: of a picture in the store only what is looked at is read from disk.

    The store is mapped read-only, which torch.from_numpy warns about since torch has no tensors of that kind. Writing
    into this one would end the process, and leave the store as it is.
    """
    return torch.from_numpy(pixels if pixels.flags.writeable else np.asarray(_Writable(pixels)))
