"""Packed pixels to batches of uint8 tensors, in an order and with random changes that follow from the seed alone.

Nothing here has a state to save: order, crops and mixing are functions of (seed, epoch, step), so a job resumed at any
step sees exactly the batches it would have seen. The next batches are made in one thread while the current one trains.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")
# One image changed at random: uint8 (H, W, 3) and random numbers -> uint8 (3, S, S).
Augment = Callable[[Tensor, np.random.Generator], Tensor]

# What a random stream is for; each purpose has its own, so that one more draw here shifts nothing there.
ORDER, AUGMENT, MIX, NETWORK, HEAD, VIEW = range(6)
_PREPARED_BATCHES = 2


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
    """inputs: uint8 pixels (N, 3, S, S) in channels-last memory, or cached activations; labels: int64 (N,)."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


class Source(Protocol):
    """What is trained or validated on, as batches. positions: places within the source, from 0 to len - 1."""

    @property
    def labels(self) -> NDArray[np.int64]: ...

    def __len__(self) -> int: ...

    def training_batch(self, positions: NDArray[np.int64], *, seed: int, epoch: int, step: int) -> Batch:
        """The images at these positions, changed at random as follows from (seed, epoch, step)."""
        ...

    def batch(self, positions: NDArray[np.int64]) -> Batch:
        """The images at these positions, as they are served."""
        ...


@dataclass(frozen=True)
class PixelSource:
    """Batches of pixels. prepare: per image and not random, uint8 (H, W, 3) -> uint8 (3, S, S), as serving does it."""

    split: Split
    augment: Augment
    prepare: Callable[[Tensor], Tensor]

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.split.labels

    def __len__(self) -> int:
        return len(self.split)

    def training_batch(self, positions: NDArray[np.int64], *, seed: int, epoch: int, step: int) -> Batch:
        return _batch(self.split, positions, _changed(self.augment, random_stream(seed, AUGMENT, epoch, step)))

    def batch(self, positions: NDArray[np.int64]) -> Batch:
        return _batch(self.split, positions, self.prepare)


def random_stream(seed: int, purpose: int, *position: int) -> np.random.Generator:
    """Random numbers that follow from these integers alone, the same on every platform."""
    return np.random.default_rng([seed, purpose, *position])


def torch_seed(seed: int, purpose: int, *position: int) -> int:
    """A seed for torch's own generators, mixed from these integers; below 2^63."""
    return int(np.random.SeedSequence([seed, purpose, *position]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def batch_positions(
    count: int, batch_size: int, *, seed: int, epoch: int, merge_single: bool = False
) -> list[NDArray[np.int64]]:
    """The epoch's batches as positions within a split, shuffled; every position once, the last batch smaller.

    merge_single: a last batch of one image joins the batch before it, since batch-norm cannot train on one value.
    """
    order = random_stream(seed, ORDER, epoch).permutation(count)
    batches = [order[start : start + batch_size] for start in range(0, count, batch_size)]
    if merge_single and batch_size > 1 and len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [np.concatenate(batches[-2:])]
    return batches


def steps_per_epoch(count: int, batch_size: int, *, merge_single: bool = False) -> int:
    """len(batch_positions(...)) without making them."""
    steps = -(-count // batch_size)
    # Never so for batches of one, where the remainder is 0.
    return steps - 1 if merge_single and steps > 1 and count % batch_size == 1 else steps


def training_batches(
    source: Source, *, batch_size: int, seed: int, epoch: int, first_step: int, merge_single: bool
) -> Iterator[Batch]:
    """The epoch's batches from `first_step` on."""
    positions = batch_positions(len(source), batch_size, seed=seed, epoch=epoch, merge_single=merge_single)
    for step in range(first_step, len(positions)):
        yield source.training_batch(positions[step], seed=seed, epoch=epoch, step=step)


def ordered_batches(source: Source, *, batch_size: int) -> Iterator[Batch]:
    """The source once, in its own order."""
    for start in range(0, len(source), batch_size):
        yield source.batch(np.arange(start, min(start + batch_size, len(source))))


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


def prefetched(items: Iterable[T], *, depth: int = _PREPARED_BATCHES) -> "closing[Generator[T, None, None]]":
    """`prefetch` as a context, for loops that may leave early."""
    return closing(prefetch(items, depth=depth))


def class_counts(labels: NDArray[np.int64], class_count: int) -> NDArray[np.int64]:
    return np.bincount(labels, minlength=class_count)


def _changed(augment: Augment, random: np.random.Generator) -> Callable[[Tensor], Tensor]:
    return lambda pixels: augment(pixels, random)


def _batch(split: Split, positions: Sequence[int] | NDArray[np.int64], prepare: Callable[[Tensor], Tensor]) -> Batch:
    # A copy of each picture, since the store is mapped read-only and torch wants memory it may write to.
    prepared = [prepare(torch.from_numpy(np.array(split.images[int(split.indices[p])]))) for p in positions]
    pixels = torch.stack(prepared).contiguous(memory_format=torch.channels_last)
    return Batch(inputs=pixels, labels=torch.from_numpy(split.labels[positions]))
