"""Figures of an evaluation, against values computed by hand."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from worker.training.evaluate import (
    TEMPERATURE_RANGE,
    evaluate,
    expected_calibration_error,
    fit_temperature,
    wilson_interval,
)


def test_figures_of_a_small_confusion_matrix() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    predicted = np.array([0, 0, 1, 1, 2, 2])
    logits = torch.log(functional.one_hot(torch.from_numpy(predicted), 4).float() * 0.6 + 0.1)
    found = evaluate(logits, labels, ["a", "b", "c", "unseen"], temperature=1.0)
    assert found.confusion.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert found.accuracy == pytest.approx(4 / 6)
    assert [(r.name, r.precision, r.recall, r.support) for r in found.classes] == [
        ("a", 1.0, pytest.approx(2 / 3), 3),
        ("b", 0.5, 0.5, 2),
        ("c", 0.5, 1.0, 1),
        ("unseen", 0.0, 0.0, 0),
    ]
    assert [r.f1 for r in found.classes] == pytest.approx([0.8, 0.5, 2 / 3, 0.0])
    assert found.macro_f1 == pytest.approx((0.8 + 0.5 + 2 / 3) / 3)
    assert found.loss == pytest.approx(-(4 * math.log(0.7) + 2 * math.log(0.1)) / 6, rel=1e-6)
    # Each is 70 % sure, and two thirds are right.
    assert found.expected_calibration_error == pytest.approx(0.7 - 4 / 6, abs=1e-6)
    assert [(m.position, m.true_label, m.predicted_label) for m in found.mistakes] == [(2, 0, 1), (4, 1, 2)]
    assert found.mistakes[0].score == pytest.approx(0.7)


def test_metrics_name_their_split() -> None:
    found = evaluate(torch.eye(2), np.array([0, 1]), ["a", "b"], temperature=1.0)
    assert set(found.metrics("val")) == {
        "val_accuracy",
        "val_accuracy_ci95",
        "val_loss",
        "macro_f1",
        "expected_calibration_error",
    }
    assert set(found.metrics("test")) == {
        "test_accuracy",
        "test_accuracy_ci95",
        "test_loss",
        "test_macro_f1",
        "test_expected_calibration_error",
    }


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe 1998, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_the_published_ones(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_calibration_error_weighs_each_bin_by_its_images() -> None:
    probabilities = torch.tensor([[0.95, 0.05]] * 3 + [[0.45, 0.55]])
    truth = torch.tensor([0, 0, 1, 1])
    assert expected_calibration_error(probabilities, truth) == pytest.approx(
        (abs(3 * 0.95 - 2) + abs(0.55 - 1)) / 4, abs=1e-6
    )


@pytest.mark.parametrize("factor", [0.7, 1.5, 4.0])
def test_the_temperature_undoes_a_factor_on_calibrated_logits(factor: float) -> None:
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.normal(size=(4000, 5)) * 2)
    probabilities = logits.softmax(1).numpy()
    labels = np.array([random.choice(5, p=row / row.sum()) for row in probabilities])
    assert fit_temperature((logits * factor).float(), labels) == pytest.approx(factor, rel=0.06)


def test_the_temperature_stays_in_range_where_validation_cannot_tell() -> None:
    all_right = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    assert fit_temperature(all_right, np.array([0, 1])) == pytest.approx(TEMPERATURE_RANGE[0], rel=1e-3)
    assert fit_temperature(all_right, np.array([1, 0])) == pytest.approx(TEMPERATURE_RANGE[1], rel=1e-3)
