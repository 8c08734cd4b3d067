"""Frozen features: what the network would have computed, computed once, and found again by whoever needs the same."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_builders as builders

from app.errors import StorageFull
from app.storage import LocalStorage
from app.vision.classifier import Classifier
from app.vision.folding import folded_prefix
from app.vision.preprocessing import normalise
from worker.training.augment import training_transform
from worker.training.features import Activations, ActivationSource, FeatureCache, activations
from worker.training.pixels import Kept, PixelSource, Source

CPU = torch.device("cpu")
IMAGES = 70  # more than one batch


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(LocalStorage(tmp_path), "ds_1", max_bytes=10**9)


def source(*, seed: int = 0) -> PixelSource:
    augment = training_transform(
        "classic",
        image_size=32,
        crop_scale=(0.3, 1.0),
        horizontal_flip=True,
        interpolation="bilinear",
    )
    return PixelSource(builders.split(IMAGES, seed=seed, sides=(40, 36)), augment, prepare)


def prepare(pixels: torch.Tensor) -> torch.Tensor:
    return builders.eval_pixels(pixels, replace(builders.SMALL, resize=36, crop=32))


def classifier(*, trainable: int, seed: int = 0, backbone: str = "resnet18") -> Classifier:
    made = Classifier.new(backbone, 3, seed=seed)
    made.freeze(trainable)
    return made.train()


def passed(network: Classifier, cache: FeatureCache | None, **changes: Any) -> tuple[Activations, int]:
    """The activations, and how many images went through the network for them."""
    images = 0

    def count(done: int, _total: int) -> None:
        nonlocal images
        images = done

    options: dict[str, Any] = {"views": None, "seed": 0, "precision": "fp32", "described": {"crop": 32}} | changes
    found = activations(
        network,
        options.pop("source", None) or source(),
        normalise=lambda batch: normalise(batch, builders.SMALL),
        device=CPU,
        cache=cache,
        on_batch=count,
        **options,
    )
    return found, images


@pytest.mark.parametrize("is_kept", [True, False])
def test_behind_them_the_trained_part_gives_the_networks_own_logits(cache: FeatureCache, is_kept: bool) -> None:
    network, pixels = classifier(trainable=1).eval(), source()
    found, _ = passed(network, cache if is_kept else None)
    rows = np.array([3, 69, 0])
    with torch.inference_mode():
        images = normalise(pixels.batch(rows).inputs, builders.SMALL)
        expected = network(images)
        kept = found.rows(0, rows)
        assert kept.shape == network.frozen_prefix(images).shape
        # Maps are kept in bfloat16, which has three significant digits.
        assert torch.allclose(network.trainable_suffix(kept.float()), expected, atol=0.05)


def test_what_the_head_sees_is_kept_exactly(cache: FeatureCache) -> None:
    network = classifier(trainable=0).eval()
    found, _ = passed(network, cache)
    with torch.inference_mode():
        first = folded_prefix(network)(normalise(source().batch(np.arange(64)).inputs, builders.SMALL))
    assert found.rows(0, np.arange(64)).dtype == torch.float32
    assert torch.equal(found.rows(0, np.arange(64)), first)


@pytest.mark.parametrize("backbone", ["swin_t", pytest.param("vit_b_16", marks=pytest.mark.slow), "mobilenet_v3_small"])
def test_maps_of_every_layout_keep_their_shape(backbone: str) -> None:
    network = classifier(trainable=1, backbone=backbone).eval()
    side = 224 if backbone == "vit_b_16" else 32
    big = replace(builders.SMALL, resize=side, crop=side)
    pixels = replace(
        source(), split=builders.split(2, sides=(side, side)), prepare=lambda p: builders.eval_pixels(p, big)
    )
    found, _ = passed(network, None, source=pixels)
    with torch.inference_mode():
        expected = network.frozen_prefix(normalise(pixels.batch(np.arange(2)).inputs, builders.SMALL))
    assert torch.equal(found.rows(0, np.arange(2)), expected.to(torch.bfloat16))


def test_a_second_job_finds_what_the_first_computed(cache: FeatureCache) -> None:
    network = classifier(trainable=1)
    first, computed = passed(network, cache, views=2)
    again, computed_again = passed(classifier(trainable=1), cache, views=2)
    assert (computed, computed_again) == (2 * IMAGES, 0)
    assert np.array_equal(first.values, again.values)


@pytest.mark.parametrize(
    "other",
    [{"views": 3}, {"seed": 1, "views": 2}, {"precision": "bf16"}, {"described": {"crop": 24}}, {"views": None}],
)
def test_whatever_changes_the_features_is_computed_anew(cache: FeatureCache, other: dict[str, Any]) -> None:
    passed(classifier(trainable=1), cache, views=2)
    _, computed = passed(classifier(trainable=1), cache, **({"views": 2} | other))
    assert computed > 0


def test_other_weights_or_another_boundary_have_other_features(cache: FeatureCache) -> None:
    passed(classifier(trainable=1), cache)
    assert passed(classifier(trainable=1, seed=1), cache)[1] == IMAGES
    assert passed(classifier(trainable=2), cache)[1] == IMAGES


def test_views_differ_from_each_other_and_each_epoch_takes_another(cache: FeatureCache) -> None:
    found, _ = passed(classifier(trainable=0), cache, views=3)
    plain, _ = passed(classifier(trainable=0), cache)
    made: Source = ActivationSource(source().labels, plain, np.arange(IMAGES), found, np.arange(IMAGES))
    everything = np.arange(IMAGES)
    epochs = [made.training_batch(everything, seed=5, epoch=epoch, step=0).inputs for epoch in range(4)]
    assert not any(torch.equal(epochs[0][i], epochs[1][i]) for i in range(IMAGES))
    assert torch.equal(epochs[0], epochs[3])  # once round
    for i in range(IMAGES):
        seen = {tuple(epoch[i].tolist()) for epoch in epochs}
        assert seen == {tuple(found.rows(view, np.array([i]))[0].tolist()) for view in range(3)}
    assert torch.equal(made.batch(everything).inputs, plain.rows(0, everything))


@pytest.mark.parametrize("trainable", [0, 1])
@pytest.mark.parametrize("views", [None, 3])
def test_activations_that_are_kept_give_the_same_batches_if_there_is_room_for_all(
    cache: FeatureCache, trainable: int, views: int | None
) -> None:
    plain, _ = passed(classifier(trainable=trainable), cache)
    augmented = passed(classifier(trainable=trainable), cache, views=views)[0] if views else None
    rows = np.arange(IMAGES)[::-1].copy()
    made = ActivationSource(source().labels, plain, rows, augmented, rows)
    room = (augmented or plain).values.nbytes
    assert made.keeping(Kept(CPU, room - 1)) is made
    kept = Kept(CPU, room)
    keeping = made.keeping(kept)
    for positions in (np.array([3, 60, 0]), np.array([7])):
        expected = made.training_batch(positions, seed=5, epoch=2, step=0)
        for _ in range(2):  # kept, and given up
            found = keeping.training_batch(positions, seed=5, epoch=2, step=0)
            assert found.inputs.dtype == expected.inputs.dtype
            assert found.inputs.stride() == expected.inputs.stride()
            assert torch.equal(found.inputs, expected.inputs)
            assert torch.equal(found.labels, expected.labels)
            kept.give_up()


def test_what_was_used_least_goes_first_and_what_cannot_fit_is_refused(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    kept_bytes = IMAGES * 512 * 4
    roomy = FeatureCache(storage, "ds_1", max_bytes=2 * kept_bytes)
    first, second, third = (classifier(trainable=0, seed=seed) for seed in range(3))
    held, _ = passed(first, roomy)
    before = held.rows(0, np.arange(IMAGES))
    passed(second, roomy)
    for key, stamp in zip(sorted(tmp_path.glob("datasets/ds_1/features/*")), (1, 2), strict=True):
        os.utime(key, (stamp, stamp))
    passed(first, roomy)  # used again, so the second is the older one
    passed(third, roomy)
    assert passed(first, roomy)[1] == 0
    assert passed(second, roomy)[1] == IMAGES
    assert torch.equal(held.rows(0, np.arange(IMAGES)), before)  # readable for whoever had it open
    with pytest.raises(StorageFull):
        passed(first, FeatureCache(LocalStorage(tmp_path / "other"), "ds_1", max_bytes=kept_bytes - 1))


def test_leaving_in_the_middle_leaves_nothing_behind(cache: FeatureCache) -> None:
    class Left(Exception):
        pass

    def leave(_done: int, _total: int) -> None:
        raise Left

    with pytest.raises(Left):
        activations(
            classifier(trainable=0),
            source(),
            views=None,
            seed=0,
            normalise=lambda batch: normalise(batch, builders.SMALL),
            device=CPU,
            precision="fp32",
            described={},
            cache=cache,
            on_batch=leave,
        )
    assert list(cache.storage.path("staging").iterdir()) == []
    assert not cache.storage.exists("datasets")


@pytest.mark.slow
def test_features_that_others_delete_meanwhile_fail_nobody(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    is_over = threading.Event()

    def come_and_go(number: int) -> None:
        cache = FeatureCache(storage, f"ds_other_{number}", max_bytes=10**9)
        while not is_over.is_set():
            for key in ("a", "b", "c"):
                with cache.writing(key, (1, 4), np.float32, channels_last=False) as values:
                    values[:] = 1
            storage.delete(f"datasets/ds_other_{number}")

    def look() -> None:
        cache = FeatureCache(storage, "ds_other_0", max_bytes=10**9)
        while not is_over.is_set():
            cache.find("a")

    # Room for two, so that what is written is at once taken from whoever would look for it again.
    small = FeatureCache(storage, "ds_mine", max_bytes=2 * IMAGES * 512 * 4)
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(come_and_go, 0), pool.submit(come_and_go, 1), pool.submit(look)]
        try:
            for i in range(150):
                with small.writing(f"{i}", (1, IMAGES), np.float32, channels_last=False) as values:
                    values[:] = i
        finally:
            is_over.set()
    for other in others:
        other.result()


@pytest.mark.slow
def test_features_are_returned_though_another_process_needs_their_room_at_once(tmp_path: Path) -> None:
    cache = FeatureCache(LocalStorage(tmp_path), "ds_1", max_bytes=10**9)
    expected, _ = passed(classifier(trainable=0), None)
    is_over = threading.Event()

    def evict() -> None:
        while not is_over.is_set():
            for path in tmp_path.glob("datasets/ds_1/features/*"):
                cache.storage.delete(path.relative_to(tmp_path).as_posix())

    with ThreadPoolExecutor(1) as pool:
        evicting = pool.submit(evict)
        try:
            for _ in range(3):
                found, computed = passed(classifier(trainable=0), cache)
                assert computed == IMAGES
                assert np.array_equal(found.values, expected.values)
        finally:
            is_over.set()
    evicting.result()
