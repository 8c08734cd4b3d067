"""Images by formula: the same for the same numbers, of every family, labelled by what they were made of."""

from pathlib import Path

import numpy as np
import pytest
import torch

from worker.pretraining import shapes, textures
from worker.pretraining.scenes import NOT_ASKED, TASKS, Bank, Pool, scenes


@pytest.fixture(scope="module")
def bank() -> Bank:
    return Bank.render(textures=8, shapes=5, instances=2, side=48, seed=0)


@pytest.mark.parametrize("family", range(len(textures.FAMILIES)))
def test_a_texture_follows_from_its_class_and_instance(family: int) -> None:
    def made(kind: int, instance: int) -> np.ndarray:
        return textures.texture(32, np.random.default_rng(kind), np.random.default_rng(instance), family=family)

    assert made(1, 1).shape == (32, 32, 3)
    assert made(1, 1).dtype == np.uint8
    assert np.array_equal(made(1, 1), made(1, 1))
    others = [made(kind, instance) for kind, instance in ((1, 2), (2, 1))]
    assert not any(np.array_equal(made(1, 1), other) for other in others)


@pytest.mark.parametrize("family", range(len(shapes.FAMILIES)))
def test_a_shape_is_neither_empty_nor_everything(family: int) -> None:
    covered = []
    for kind in range(12):
        made = shapes.shape(48, np.random.default_rng(kind), np.random.default_rng(1), family=family)
        assert (made.shape, made.dtype) == ((48, 48), np.uint8)
        again = shapes.shape(48, np.random.default_rng(kind), np.random.default_rng(1), family=family)
        assert np.array_equal(made, again)
        covered.append(made.mean() / 255)
    assert 0.003 < np.median(covered) < 0.95


def test_scenes_have_a_label_for_what_is_asked_and_none_for_what_is_not(bank: Bank) -> None:
    pixels, labels = scenes(bank, slice(0, 250), side=48, seed=0)
    assert (pixels.shape, pixels.dtype) == ((250, 48, 48, 3), torch.uint8)
    assert labels.shape == (250, len(TASKS))
    for task, classes in enumerate(bank.class_counts):
        asked = labels[:, task][labels[:, task] != NOT_ASKED]
        assert set(asked.tolist()) == set(range(classes))
    shape, texture, ground = (labels == NOT_ASKED).numpy().T
    assert 0.05 < shape.mean() < 0.3  # the ground alone
    assert (texture[shape]).all()
    assert 0.15 < ground.mean() < 0.4  # before a plain one
    assert not (shape & ground).any()
    assert pixels.float().std((1, 2, 3)).min() > 0


def test_a_scene_is_always_the_same_and_another_seed_gives_others(bank: Bank) -> None:
    first, again, other = (scenes(bank, slice(250, 260), side=48, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


def test_a_pool_that_was_left_half_made_goes_on(bank: Bank, tmp_path: Path) -> None:
    whole = Pool.on_disk(tmp_path / "whole", bank, count=600, side=32, seed=3)
    half = Pool.on_disk(tmp_path / "half", bank, count=600, side=32, seed=3)
    half.pixels[250:] = 0
    (tmp_path / "half" / "done").write_text("250")
    del half
    resumed = Pool.on_disk(tmp_path / "half", bank, count=600, side=32, seed=3)
    assert len(resumed) == 600
    assert np.array_equal(resumed.pixels, whole.pixels)
    assert np.array_equal(resumed.labels, whole.labels)


def test_the_bank_is_the_same_for_the_same_seed(bank: Bank) -> None:
    again = Bank.render(textures=8, shapes=5, instances=2, side=48, seed=0)
    assert torch.equal(bank.textures, again.textures)
    assert torch.equal(bank.shapes, again.shapes)
    assert bank.class_counts == (5, 8, 8)
