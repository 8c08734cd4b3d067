"""Batches: complete, in an order that follows from the seed, made ahead in a thread that ends."""

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_builders as builders
from numpy.typing import NDArray

from app.datasets.packed import PackedPixels, PackedWriter
from app.vision.device import usable_cores
from worker.training.pixels import (
    CPU,
    Batch,
    Kept,
    KeptSource,
    PixelSource,
    Source,
    Split,
    TrainingBatches,
    batch_positions,
    ordered_batches,
    prefetch,
    random_stream,
    steps_per_epoch,
    torch_seed,
    training_batches,
)


@pytest.mark.parametrize(("count", "batch_size"), [(22, 5), (21, 5), (20, 5), (3, 5), (1, 1), (2, 1)])
@pytest.mark.parametrize("fewest", [1, 2, 4])
def test_every_image_comes_once_an_epoch(count: int, batch_size: int, fewest: int) -> None:
    batches = batch_positions(count, batch_size, seed=3, epoch=1, fewest=fewest)
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
    assert len(batches) == steps_per_epoch(count, batch_size, fewest=fewest)


def test_a_last_batch_of_too_few_images_joins_the_one_before_it() -> None:
    assert [len(b) for b in batch_positions(21, 5, seed=0, epoch=0)] == [5, 5, 5, 5, 1]
    assert [len(b) for b in batch_positions(21, 5, seed=0, epoch=0, fewest=2)] == [5, 5, 5, 6]
    assert [len(b) for b in batch_positions(22, 5, seed=0, epoch=0, fewest=2)] == [5, 5, 5, 5, 2]
    assert [len(b) for b in batch_positions(23, 5, seed=0, epoch=0, fewest=4)] == [5, 5, 5, 8]
    assert [len(b) for b in batch_positions(3, 5, seed=0, epoch=0, fewest=4)] == [3]
    assert [len(b) for b in batch_positions(3, 1, seed=0, epoch=0, fewest=2)] == [1, 1, 1]


def test_the_order_is_another_in_each_epoch_and_for_each_seed() -> None:
    orders = {
        tuple(np.concatenate(batch_positions(50, 8, seed=seed, epoch=epoch)).tolist())
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_random_streams_are_the_same_on_every_platform() -> None:
    assert random_stream(0, 1, 2, 3).integers(0, 1000, 4).tolist() == [584, 601, 903, 548]
    assert torch_seed(0, 1, 2, 3) == 6463705122041852897


def test_a_batch_begun_in_the_middle_of_an_epoch_is_the_one_it_would_have_been() -> None:
    plan = builders.plan()

    def batches(first_step: int) -> list[torch.Tensor]:
        made = training_batches(plan.train, batch_size=5, seed=7, epoch=2, first_step=first_step)
        return [batch.inputs for batch in made]

    whole, rest = batches(0), batches(3)
    assert len(whole) == 5
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], rest, strict=True))


def test_validation_keeps_the_splits_order() -> None:
    source = builders.plan(train=builders.split(7)).train
    labels = [label for b in ordered_batches(source, batch_size=3) for label in b.labels]
    assert [int(label) for label in labels] == source.labels.tolist()


def test_prefetching_gives_the_same_items_in_the_same_order() -> None:
    assert list(prefetch(range(10))) == list(range(10))


def test_an_exception_in_the_thread_arrives_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("a damaged picture")

    made = prefetch(items())
    assert next(made) == 1
    with pytest.raises(ValueError, match="a damaged picture"):
        next(made)
    assert _prefetch_threads() == 0


def test_leaving_early_ends_the_thread() -> None:
    made = prefetch(iter(lambda: 0, 1))
    assert next(made) == 0
    assert _prefetch_threads() == 1
    made.close()
    assert _prefetch_threads() == 0


def test_only_a_few_items_are_made_ahead() -> None:
    taken = []

    def items() -> Iterator[int]:
        for i in range(100):
            taken.append(i)
            yield i

    made = prefetch(items(), depth=2)
    for _ in range(5):
        next(made)
    made.close()
    # Five used, two waiting, and at most one in the hand of the thread.
    assert len(taken) <= 8


def _prefetch_threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_pictures_of_a_store_are_read_in_place_and_without_a_warning(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (20 + i, 30, 3), np.uint8) for i in range(6)]
    with PackedWriter(tmp_path / "packed") as writer:
        for picture in pictures:
            writer.append(picture)
        writer.finish(range(6))
    stored = Split(PackedPixels(tmp_path / "packed"), np.arange(6), np.zeros(6, dtype=np.int64))
    in_memory = replace(stored, images=builders.ListedImages(pictures))
    seen: list[int] = []

    def looked_at(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(pixels.data_ptr())
        return builders.prepare(pixels)

    found, expected = (
        [b.inputs for b in ordered_batches(PixelSource(split, None, looked_at), batch_size=4)]
        for split in (stored, in_memory)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(batch.is_contiguous(memory_format=torch.channels_last) for batch in found)
    assert seen[:6] == [stored.images[i].__array_interface__["data"][0] for i in range(6)]


@pytest.mark.parametrize("augmentation", ["none", "classic", "strong"])
def test_a_training_batch_has_its_pictures_with_their_labels(augmentation: str) -> None:
    plan = builders.plan(augmentation=augmentation)
    made = training_batches(plan.train, batch_size=5, seed=0, epoch=0, first_step=0)
    for positions, batch in zip(batch_positions(22, 5, seed=0, epoch=0), made, strict=True):
        assert batch.labels.tolist() == plan.train.labels[positions].tolist()
        assert batch.inputs.shape == (len(positions), 3, 16, 16)


@pytest.fixture
def own_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("own_threads")
@pytest.mark.parametrize("threads", [1, usable_cores()])
@pytest.mark.parametrize(
    "asked",
    [
        # One after the other, left in the middle and gone on with, from the start again, behind the end of an epoch.
        [(0, 0, 5), (1, 0, 2), (1, 2, 3), (1, 0, 5), (2, 1, 4), (0, 3, 2)],
        # Taken up while an epoch was validated, gone on with, and gone back from there.
        [(0, 5, 0), (1, 0, 5), (2, 0, 5)],
        [(0, 5, 0), (0, 0, 5), (1, 0, 5), (2, 0, 5)],
    ],
)
def test_a_runs_batches_are_those_of_its_epochs_wherever_it_is_taken_up(
    threads: int, asked: list[tuple[int, int, int]]
) -> None:
    torch.set_num_threads(threads)
    source, options = builders.plan().train, {"batch_size": 5, "seed": 3, "fewest": 2, "device": CPU}
    feed = TrainingBatches(source, epochs=3, **options)  # type: ignore[arg-type]
    for epoch, first_step, taken in asked:
        expected = training_batches(source, epoch=epoch, first_step=first_step, **options)  # type: ignore[arg-type]
        found = list(itertools.islice(feed.rest_of(epoch, first_step), max(taken, 1)))
        assert len(found) == taken
        for ours, theirs in zip(found, itertools.islice(expected, taken), strict=True):
            assert torch.equal(ours.inputs, theirs.inputs)
            assert torch.equal(ours.labels, theirs.labels)
    feed.close()
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.usefixtures("own_threads")
@pytest.mark.skipif(usable_cores() < 2, reason="with one core nothing is made ahead")
def test_an_epochs_first_batches_are_made_while_the_one_before_is_validated() -> None:
    torch.set_num_threads(1)
    source, made = builders.plan().train, threading.Semaphore(0)

    class Counted:
        labels, is_light = source.labels, False

        def __len__(self) -> int:
            return len(source)

        def training_batch(self, positions: NDArray[np.int64], **options: Any) -> Batch:
            made.release()
            return source.training_batch(positions, **options)

    feed = TrainingBatches(Counted(), batch_size=5, seed=0, epochs=2, fewest=2, device=CPU)  # type: ignore[arg-type]
    assert len(list(feed.rest_of(0, 0))) == 5
    for _ in range(5 + 2):
        assert made.acquire(timeout=20)
    feed.close()


def test_a_kept_source_makes_a_batch_once_as_far_as_there_is_room_and_gives_all_up_when_asked() -> None:
    source = builders.plan().val
    made: list[tuple[int, ...]] = []

    class Counted:
        labels, is_light = source.labels, source.is_light

        def __len__(self) -> int:
            return len(source)

        def training_batch(self, positions: NDArray[np.int64], **options: Any) -> Batch:
            return source.training_batch(positions, **options)

        def batch(self, positions: NDArray[np.int64], *, device: torch.device = CPU) -> Batch:
            made.append(tuple(positions.tolist()))
            return source.batch(positions, device=device)

        def keeping(self, kept: Kept) -> "Counted":
            return self

    one_batch = source.batch(np.arange(5)).inputs.nbytes
    kept = Kept(CPU, free=2 * one_batch)
    passed = KeptSource(Counted(), kept)
    expected = list(ordered_batches(source, batch_size=5))
    for _ in range(3):
        for ours, theirs in zip(ordered_batches(passed, batch_size=5), expected, strict=True):
            assert torch.equal(ours.inputs, theirs.inputs)
            assert torch.equal(ours.labels, theirs.labels)
    whole, last = [tuple(range(5)), tuple(range(5, 10))], tuple(range(10, 12))
    assert made == [*whole, last, last, last]  # two batches of five have taken all the room
    assert kept.give_up()
    assert not kept.give_up()
    made.clear()
    list(ordered_batches(passed, batch_size=5))
    list(ordered_batches(passed, batch_size=5))
    assert made == [*whole, last] * 2


@pytest.mark.parametrize("augmentation", ["none", "classic", "strong"])
def test_pictures_that_are_kept_give_the_same_batches_and_are_read_once_if_there_is_room_for_all(
    augmentation: str,
) -> None:
    plain = builders.plan(augmentation=augmentation).train
    read: list[int] = []

    class Counted:
        def __len__(self) -> int:
            return len(plain.split.images)

        def __getitem__(self, index: int, /) -> NDArray[np.uint8]:
            read.append(index)
            return plain.split.images[index]

    def batches(source: Source) -> list[Batch]:
        return [
            batch
            for epoch in range(2)
            for batch in training_batches(source, batch_size=5, seed=0, epoch=epoch, first_step=0)
        ]

    counted = replace(plain, split=replace(plain.split, images=Counted()))
    size = sum(plain.split.images[index].nbytes for index in range(22))
    for free, epochs_read in ((size, 1), (size - 1, 2)):
        kept = Kept(CPU, free)
        source = counted.keeping(kept)
        read.clear()
        for ours, theirs in zip(batches(source), batches(plain), strict=True):
            assert torch.equal(ours.inputs, theirs.inputs)
            assert torch.equal(ours.labels, theirs.labels)
        # Those that are not changed at random are no pictures by then, so they are not kept.
        assert sorted(read) == sorted([*range(22)] * (2 if augmentation == "none" else epochs_read))
    assert not kept.give_up()
