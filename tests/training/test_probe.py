import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional

from worker.training.probe import (
    DEFAULT_STRENGTH,
    MAX_FOLDS,
    STRENGTHS,
    Probe,
    assign_folds,
    fit_probe,
    learning_curve,
    out_of_fold,
)


def clouds(
    count: int, width: int, classes: int, *, seed: int = 0, distance: float = 0.3
) -> tuple[Tensor, NDArray[np.int64]]:
    """Classes as overlapping clouds, in features of very different scales and with neighbours that resemble."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = distance * torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    points = torch.randn(count, width, generator=generator) + centres[labels]
    features = points + points.roll(1, dims=1)
    scales = torch.logspace(-2, 2, width)
    return features * scales + 3 * scales, labels.numpy().astype(np.int64)


def objective(probe: Probe, features: Tensor, labels: NDArray[np.int64], weights: Tensor | None = None) -> float:
    """The probe's objective, computed from its weights on raw features."""
    losses = functional.cross_entropy(probe.logits(features).double(), torch.from_numpy(labels), reduction="none")
    deviation = features.double().std(0, correction=0)
    penalty = (probe.weight.double() * deviation).square().sum()
    total = (losses * (torch.ones(len(labels)) if weights is None else weights)).sum()
    return (total + probe.strength / 2 * penalty).item()


def sklearn_probe(features: Tensor, labels: NDArray[np.int64], strength: float, weights: Tensor | None = None) -> Probe:
    mean, deviation = features.double().mean(0), features.double().std(0, correction=0)
    standard = ((features.double() - mean) / deviation).numpy()
    # With two classes scikit-learn has one vector w, for our ±w/2: its penalty on it is twice ours.
    two = len(np.unique(labels)) == 2
    model = LogisticRegression(C=(2 if two else 1) / strength, max_iter=5000, tol=1e-8)
    model.fit(standard, labels, sample_weight=None if weights is None else weights.numpy())
    coefficients, intercept = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    if two:
        coefficients = torch.cat([-coefficients / 2, coefficients / 2])
        intercept = torch.cat([-intercept / 2, intercept / 2])
    weight = coefficients / deviation
    return Probe(weight.float(), (intercept - weight @ mean).float(), strength, None, None)


@pytest.mark.parametrize("strength", [0.1, 10.0, 1000.0])
@pytest.mark.parametrize(("count", "width", "classes"), [(60, 100, 2), (300, 40, 5), (90, 200, 3), (400, 20, 2)])
def test_as_good_as_sklearn_at_the_same_strength(count: int, width: int, classes: int, strength: float) -> None:
    features, labels = clouds(count, width, classes)
    fresh, _ = clouds(1000, width, classes, seed=1)

    found = fit_probe(features, labels, classes, seed=0, strength=strength)

    reference = sklearn_probe(features, labels, strength)
    assert objective(found, features, labels) <= objective(reference, features, labels) * (1 + 1e-4)
    same = found.logits(fresh).argmax(1) == reference.logits(fresh).argmax(1)
    assert same.double().mean() >= 0.995


def test_class_weights_are_sklearns_sample_weights() -> None:
    features, labels = clouds(300, 30, 3)
    class_weights = (0.2, 1.0, 5.0)
    weights = torch.tensor(class_weights)[torch.from_numpy(labels)]

    found = fit_probe(features, labels, 3, seed=0, strength=10.0, class_weights=class_weights)

    reference = sklearn_probe(features, labels, 10.0, weights)
    assert objective(found, features, labels, weights) <= objective(reference, features, labels, weights) * (1 + 1e-4)


@pytest.mark.parametrize(("count", "width"), [(60, 100), (200, 30)])
def test_the_chosen_strength_is_as_good_on_fresh_images_as_any(count: int, width: int) -> None:
    features, labels = clouds(count, width, 3)
    fresh, truth = clouds(3000, width, 3, seed=1)

    def loss(probe: Probe) -> float:
        return functional.cross_entropy(probe.logits(fresh), torch.from_numpy(truth)).item()

    chosen = fit_probe(features, labels, 3, seed=0)

    assert chosen.strength in STRENGTHS
    best = min(loss(fit_probe(features, labels, 3, seed=0, strength=strength)) for strength in STRENGTHS)
    assert loss(chosen) <= best + 0.02
    assert chosen.cv_loss == pytest.approx(loss(chosen), abs=0.15)


def test_the_same_input_gives_the_same_bits() -> None:
    features, labels = clouds(80, 120, 4)

    first, second = (fit_probe(features.clone(), labels, 4, seed=3) for _ in range(2))

    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)
    assert (first.strength, first.cv_loss, first.cv_accuracy) == (second.strength, second.cv_loss, second.cv_accuracy)


def test_input_is_left_as_it_was() -> None:
    features, labels = clouds(30, 10, 2)
    before = features.clone()

    fit_probe(features, labels, 2, seed=0)

    assert torch.equal(features, before)


@pytest.mark.parametrize("count", [20, 100])
def test_constant_features_get_no_weight(count: int) -> None:
    features, labels = clouds(count, 40, 2)
    features[:, 7] = 1234.567
    features[:, 8] = 0

    probe = fit_probe(features, labels, 2, seed=0)

    assert probe.weight[:, 7:9].abs().max() == 0
    assert probe.weight.isfinite().all()


def test_a_class_without_images_is_possible_and_unlikely() -> None:
    features, labels = clouds(60, 20, 2)

    probe = fit_probe(features, np.where(labels == 1, 3, 0), 4, seed=0)

    assert probe.weight[1:3].abs().max() == 0
    assert set(probe.logits(features).argmax(1).tolist()) == {0, 3}
    mean = probe.logits(features).softmax(1)[:, 1].mean().item()
    assert 0 < mean < 0.05


@pytest.mark.parametrize("class_weights", [None, (1.0, 1.0, 30.0)])
def test_a_class_of_a_single_image(class_weights: tuple[float, ...] | None) -> None:
    features, labels = clouds(41, 60, 2)
    labels[40] = 2

    probe = fit_probe(features, labels, 3, seed=0, class_weights=class_weights)

    assert probe.weight.isfinite().all()
    assert probe.cv_loss is not None and np.isfinite(probe.cv_loss)


@pytest.mark.parametrize("labels", [[0, 1], [0], [1, 1, 1], [0, 0, 1]])
def test_next_to_nothing_to_learn_from(labels: list[int]) -> None:
    features, _ = clouds(len(labels), 5, 1)

    probe = fit_probe(features, np.array(labels), 2, seed=0)

    assert probe.weight.isfinite().all() and probe.bias.isfinite().all()
    assert probe.logits(features).argmax(1).tolist()[:1] == labels[:1]


def test_without_anything_to_hold_out_the_strength_is_the_default() -> None:
    features, _ = clouds(4, 5, 1)

    probe = fit_probe(features, np.array([0, 1, 0, 1]), 2, seed=0, groups=np.array([0, 1, 0, 1]))

    assert (probe.strength, probe.cv_loss, probe.cv_accuracy) == (DEFAULT_STRENGTH, None, None)


def test_folds_are_balanced_by_class_and_keep_groups_together() -> None:
    labels = np.repeat([0, 1, 2], [50, 22, 2])
    groups = np.concatenate([np.arange(25).repeat(2), 25 + np.arange(11).repeat(2), [90, 91]])

    folds = assign_folds(labels, groups, seed=0)

    assert set(folds) == set(range(MAX_FOLDS))
    assert all(len(set(folds[groups == group])) == 1 for group in groups)
    assert np.bincount(folds[labels == 0]).tolist() == [10] * 5
    assert set(np.bincount(folds[labels == 1], minlength=5)) == {4, 6}
    assert len(set(folds[labels == 2])) == 2


def test_folds_are_fewer_for_small_classes() -> None:
    assert set(assign_folds(np.array([0, 1, 0, 1, 1]), None, seed=0)) == {0, 1, 2}


def test_groups_keep_the_choice_from_seeing_copies() -> None:
    features, labels = clouds(60, 100, 2, distance=0.0)  # nothing to learn but the images themselves
    twice, both = torch.cat([features, features]), np.concatenate([labels, labels])

    blind = fit_probe(twice, both, 2, seed=0)
    grouped = fit_probe(twice, both, 2, seed=0, groups=np.tile(np.arange(60), 2))

    assert blind.cv_accuracy is not None and blind.cv_accuracy > 0.85
    assert grouped.cv_accuracy is not None and grouped.cv_accuracy < 0.7


def test_out_of_fold_is_blind_to_an_image_and_its_group() -> None:
    features, labels = clouds(60, 100, 2, distance=0.0)
    groups = np.tile(np.arange(60), 2)

    found = out_of_fold(torch.cat([features] * 2), np.concatenate([labels] * 2), 2, groups=groups, seed=0, strength=1.0)

    assert found.shape == (120, 2) and found.dtype == torch.float32
    assert torch.allclose(found.sum(1), torch.ones(120))
    accuracy = (found.argmax(1).numpy() == np.concatenate([labels] * 2)).mean()
    assert accuracy < 0.7


def test_out_of_fold_is_what_a_probe_of_the_other_folds_says() -> None:
    features, labels = clouds(1000, 10, 2)
    folds = assign_folds(labels, None, seed=4)

    found = out_of_fold(features, labels, 2, seed=4, strength=5.0)

    for fold in range(MAX_FOLDS):
        kept = torch.from_numpy(folds != fold)
        # The same penalty only up to the scale of features, which the folds share.
        other = fit_probe(features[kept], labels[folds != fold], 2, seed=0, strength=5.0)
        assert torch.allclose(other.logits(features[~kept]).softmax(1), found[~kept], atol=0.03)


def test_out_of_fold_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clouds(100, 30, 3)
    together = out_of_fold(features, labels, 3, seed=0, strength=5.0)

    monkeypatch.setattr("worker.training.probe._MAX_PROBABILITIES", 600)

    assert torch.allclose(out_of_fold(features, labels, 3, seed=0, strength=5.0), together, atol=1e-3)


def test_a_strength_chosen_on_a_part_serves_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clouds(900, 30, 3)
    chosen = fit_probe(features, labels, 3, seed=0)

    monkeypatch.setattr("worker.training.probe._CHOICE_IMAGES", 300)
    on_part = fit_probe(features, labels, 3, seed=0, groups=np.arange(900) // 2)

    assert on_part.strength in STRENGTHS
    assert objective(chosen, features, labels) > 0
    fresh, truth = clouds(3000, 30, 3, seed=1)
    losses = [
        functional.cross_entropy(probe.logits(fresh), torch.from_numpy(truth)).item() for probe in (chosen, on_part)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=0.02)


def test_the_learning_curve_rises_and_holds_every_class() -> None:
    features, labels = clouds(400, 60, 4)
    fresh, truth = clouds(800, 60, 4, seed=1)

    curve = learning_curve(features, labels, fresh, truth, 4, seed=0, strength=10.0)

    # Small shares more than once, since what they show depends on which images they are.
    assert [images for images, _ in curve] == [40, 40, 40, 100, 100, 100, 200, 200, 400]
    assert max(accuracy for images, accuracy in curve if images == 40) < curve[-1][1]
    whole = fit_probe(features, labels, 4, seed=0, strength=10.0)
    assert curve[-1][1] == pytest.approx((whole.logits(fresh).argmax(1).numpy() == truth).mean())


def test_shares_that_come_to_the_same_images_are_drawn_once_for_all() -> None:
    features, labels = clouds(4, 6, 2)

    curve = learning_curve(features, labels, features, labels, 2, seed=0, strength=1.0)

    assert sorted({images for images, _ in curve}) == [2, 4]
    assert [images for images, _ in curve].count(4) == 1
