"""Packed pixels to batches of uint8 tensors, in an order and with random changes that follow from the seed alone.

Nothing here has a state to save: order, crops and mixing are functions of (seed, epoch, step), so a job resumed at any
step sees exactly the batches it would have seen. Where there is a core for it, the next batches are made in one thread
while the current one trains.
"""

import queue
import threading
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Protocol, TypeVar

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
_KEPT_SHARE = 4  # of a GPU's free memory, a fourth
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

    def keeping(self, kept: "Kept") -> "Source":
        """The same for many passes: what training batches are made of stays on the GPU, if there is room for all."""
        ...


@dataclass
class Kept:
    """Tensors that stay on a GPU for speed alone, by name, as far as they fit into so many bytes.

    Sending a batch, or making it of pictures on the CPU, takes longer than a small network's step on it.
    """

    device: torch.device
    free: int
    _tensors: dict[Hashable, Tensor] = field(default_factory=dict)

    @classmethod
    def within_reason(cls, device: torch.device) -> "Kept":
        """With room for a part of what is free there; for none where the device is no GPU."""
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        return cls(device, free // _KEPT_SHARE)

    def get(self, name: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What is kept by this name; else what is made, which is kept from then on, where there is room."""
        if (found := self._tensors.get(name)) is not None:
            return found
        made = make()
        if made.nbytes > self.free:
            return made
        try:
            there = made.to(self.device)
        except torch.OutOfMemoryError:
            self.free = 0
            return made
        self._tensors[name] = there
        self.free -= made.nbytes
        return there

    def give_up(self) -> bool:
        """For want of memory: keeps nothing more. Returns whether anything was kept."""
        had_any, self.free = bool(self._tensors), 0
        self._tensors.clear()
        return had_any


@dataclass(frozen=True)
class PixelSource:
    """Batches of pixels.

    prepare: uint8 (H, W, 3), which it must not write to -> uint8 (3, S, S), not random, as serving does it. augment:
    None where training sees them as they are served. kept: where the pictures are once they have been trained on.
    """

    split: Split
    augment: Augment | None
    prepare: Callable[[Tensor], Tensor]
    kept: Kept | None = None
    is_light = False

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.split.labels

    def __len__(self) -> int:
        return len(self.split)

    def training_batch(
        self, positions: NDArray[np.int64], *, seed: int, epoch: int, step: int, device: torch.device = CPU
    ) -> Batch:
        if self.augment is None:
            return self.batch(positions, device=device)
        pixels = self.augment(self._pictures(positions, self.kept), random_stream(seed, AUGMENT, epoch, step), device)
        return Batch(pixels, pinned(torch.from_numpy(self.labels[positions]), device))

    def batch(self, positions: NDArray[np.int64], *, device: torch.device = CPU) -> Batch:
        pixels = stacked([self.prepare(picture) for picture in self._pictures(positions, None)])
        return Batch(pinned(pixels, device), pinned(torch.from_numpy(self.labels[positions]), device))

    def keeping(self, kept: Kept) -> "PixelSource":
        if self.augment is None:
            return self
        free = kept.free
        for index in self.split.indices.tolist():
            free -= self.split.images[index].nbytes
            if free < 0:
                return self
        return replace(self, kept=kept)

    def _pictures(self, positions: NDArray[np.int64], kept: Kept | None) -> list[Tensor]:
        def picture(index: int) -> Tensor:
            return as_tensor(self.split.images[index])

        indices = self.split.indices[positions].tolist()
        if kept is None:
            return [picture(index) for index in indices]
        return [kept.get(("picture", index), partial(picture, index)) for index in indices]


@dataclass(frozen=True)
class KeptSource:
    """A source that is passed again and again in its own order, whose batches stay on the GPU once they are made."""

    source: Source
    kept: Kept

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

        def made() -> Tensor:
            return self.source.batch(positions, device=device).inputs

        inputs = self.kept.get(("batch", int(positions[0]), len(positions)), made)
        return Batch(inputs, torch.from_numpy(self.labels[positions]))

    def keeping(self, kept: Kept) -> "KeptSource":
        return KeptSource(self.source.keeping(kept), self.kept)


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


class TrainingBatches:
    """The batches of a run's epochs. An epoch's first ones are made while the one before is still being validated.

    Has to be closed.
    """

    def __init__(
        self, source: Source, *, batch_size: int, seed: int, epochs: int, fewest: int, device: torch.device
    ) -> None:
        self._source, self._device, self._epochs = source, device, epochs
        self._of = {"batch_size": batch_size, "seed": seed, "fewest": fewest}
        self._steps = steps_per_epoch(len(source), batch_size, fewest=fewest)
        self._made: Generator[Batch, None, None] | None = None
        self._place = 0  # of the batch that is made next, among those of all epochs

    def rest_of(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """The epoch's batches from this one on. What is not asked for in the order of a run is made anew."""
        place = epoch * self._steps + first_step
        if self._made is None or self._place != place:
            self.close()
            batches = self._from(epoch, first_step)
            self._made = prefetched(batches, device=self._device, are_light=self._source.is_light)
            self._place = place
        for _ in range(first_step, self._steps):
            self._place += 1
            yield next(self._made)

    def close(self) -> None:
        if self._made is not None:
            self._made.close()

    def _from(self, epoch: int, first_step: int) -> Iterator[Batch]:
        for each in range(epoch, self._epochs):
            first = first_step if each == epoch else 0
            yield from training_batches(self._source, epoch=each, first_step=first, device=self._device, **self._of)


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
    batches: Iterable[Batch], *, device: torch.device, are_light: bool = False, depth: int = _PREPARED_BATCHES
) -> Generator[Batch, None, None]:
    """Batches for work on `device`, made ahead by `prefetch`; close it where it may be left early.

    But where that work keeps all cores busy itself, made one by one as they are asked for: a thread beside it takes a
    core from every parallel step, and an epoch of mobilenet_v3_small took 1.76 s in place of 1.50 (two cores). So are
    those that are light, as Source has it: handing them over would take longer.
    """
    is_crowded = device.type == "cpu" and (are_light or torch.get_num_threads() >= usable_cores())
    if device.type == "cuda":
        return _taken_over(prefetch(_on_a_stream(batches, device), depth=depth), device)
    return (batch for batch in batches) if is_crowded else prefetch(batches, depth=depth)


def _on_a_stream(batches: Iterable[Batch], device: torch.device) -> Generator[tuple[Batch, torch.Event], None, None]:
    """Batches made on a stream of their own, and when each will be there.

    On the stream of the steps, the kernels that make a batch would run between two steps; so they run beside one.
    """
    stream, iterator = _stream_beside(device), iter(batches)
    while True:
        # Not around the loop: leaving it may fall to another thread, whose stream it would change.
        with torch.cuda.stream(stream):
            batch = next(iterator, None)
            made = stream.record_event()
        if batch is None:
            return
        yield batch, made


@lru_cache  # its allocator keeps memory for each stream
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _taken_over(
    made: Generator[tuple[Batch, torch.Event], None, None], device: torch.device
) -> Generator[Batch, None, None]:
    """The batches for the stream that this is run on, which waits for each; the CPU does not."""
    with closing(made):
        for batch, is_made in made:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(is_made)
            for tensor in (batch.inputs, batch.labels):
                if tensor.is_cuda:
                    tensor.record_stream(stream)  # its memory is not taken before this stream is done with it
            yield batch


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


class _Writable:
    """The same memory, said to be writable; it lives as long as what is made from this."""

    def __init__(self, values: NDArray[Any]) -> None:
        self._values = values
        interface = values.__array_interface__
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}


def as_tensor(values: NDArray[Any]) -> Tensor:
    """A tensor that shares the array's memory: of a picture in the store only what is looked at is read from disk.

    The store is mapped read-only, which torch.from_numpy warns about since torch has no tensors of that kind. Writing
    into this one would end the process, and leave the store as it is.
    """
    return torch.from_numpy(values if values.flags.writeable else np.asarray(_Writable(values)))
