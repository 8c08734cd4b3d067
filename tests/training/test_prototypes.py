"""Prototypes: the head that is computed, against its definition and against scikit-learn's discriminant analysis."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor
from torch.nn import functional

from worker.training import prototypes
from worker.training.prototypes import SHRINKAGE, fit_prototypes


def clouds(
    count: int, *, width: int = 6, classes: int = 3, distance: float = 2.0, seed: int = 0
) -> tuple[Tensor, NDArray[np.int64]]:
    random = np.random.default_rng(seed)
    centres = distance * np.random.default_rng(9).normal(size=(classes, width))
    labels = np.arange(count, dtype=np.int64) % classes
    return torch.from_numpy((centres[labels] + random.normal(size=(count, width))).astype(np.float32)), labels


def test_a_class_is_the_mean_of_its_images() -> None:
    features, labels = clouds(30)
    found = fit_prototypes(features, labels, 3, seed=0)
    for label in range(3):
        torch.testing.assert_close(found.means[label], features[torch.from_numpy(labels == label)].mean(0))


@pytest.mark.parametrize(("width", "at_once"), [(6, 4096), (6, 7), (50, 4096), (50, 7)])
def test_the_metric_is_the_inverse_of_the_shrunken_scatter_within_classes(
    monkeypatch: pytest.MonkeyPatch, width: int, at_once: int
) -> None:
    monkeypatch.setattr(prototypes, "_AT_ONCE", at_once)
    features, labels = clouds(30, width=width)
    found = fit_prototypes(features, labels, 3, seed=0)

    exact = features.double()
    within = exact - found.means.double()[torch.from_numpy(labels)]
    spread = (exact - exact.mean(0)).square().mean()
    expected = torch.linalg.inv(within.T @ within / 30 + SHRINKAGE * spread * torch.eye(width))
    # Up to the scale, which the log loss of held-out images chose.
    torch.testing.assert_close(
        found.metric.double() / found.metric[0, 0], expected / expected[0, 0], rtol=1e-4, atol=1e-5
    )


def test_predictions_are_those_of_scikit_learns_discriminant_analysis() -> None:
    features, labels = clouds(300, distance=1.0)
    found = fit_prototypes(features, labels, 3, seed=0)
    new, _ = clouds(200, distance=1.0, seed=1)

    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.5, priors=[1 / 3] * 3)
    reference.fit(features.numpy(), labels)
    agree = found.logits(new).argmax(1).numpy() == reference.predict(new.numpy())
    assert agree.mean() > 0.95


def test_many_images_cost_no_more_than_their_number() -> None:
    features, labels = clouds(20_000)  # a matrix of all by all would be 3 GB, and solving it a matter of hours
    found = fit_prototypes(features, labels, 3, seed=0)
    assert (found.logits(features).argmax(1).numpy() == labels).mean() > 0.9


def test_distances_are_scaled_so_that_their_probabilities_are_worth_something() -> None:
    features, labels = clouds(60, width=50, distance=0.25)
    new, truth = clouds(600, width=50, distance=0.25, seed=1)
    logits = fit_prototypes(features, labels, 3, seed=0).logits(new)
    losses = {scale: functional.cross_entropy(scale * logits, torch.from_numpy(truth)).item() for scale in (0.25, 1, 4)}
    assert losses[1] == min(losses.values())


def test_one_image_a_class_is_enough_and_so_are_two() -> None:
    for count in (3, 6):
        features, labels = clouds(count)
        found = fit_prototypes(features, labels, 3, seed=0)
        assert found.logits(features).argmax(1).tolist() == labels.tolist()
        assert found.metric.isfinite().all()
        doubled = fit_prototypes(2 * features, labels, 3, seed=0)
        # Whatever the features' unit, the distances are the same.
        torch.testing.assert_close(4 * doubled.metric, found.metric)


@pytest.mark.parametrize("count", [3, 6, 60])
def test_a_class_without_images_is_never_the_likeliest_and_takes_next_to_nothing(count: int) -> None:
    features, labels = clouds(count, width=200, distance=0.3)
    new, _ = clouds(300, width=200, distance=0.3, seed=1)
    found = fit_prototypes(features, labels, 4, seed=0).logits(new)
    assert found.softmax(1)[:, 3].max() < 0.01
    torch.testing.assert_close(found[:, :3], fit_prototypes(features, labels, 3, seed=0).logits(new))


@pytest.mark.parametrize("count", [3, 60])
def test_images_that_are_all_alike_are_no_reason_to_fail(count: int) -> None:
    labels = np.arange(count, dtype=np.int64) % 3
    found = fit_prototypes(torch.ones(count, 5), labels, 3, seed=0)
    assert found.metric.isfinite().all()
    assert found.logits(torch.ones(1, 5)).isfinite().all()
