"""Figures of an evaluation, against values computed by hand."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from app.vision import evaluate as figures
from app.vision.evaluate import (
    TEMPERATURE_RANGE,
    evaluate,
    expected_calibration_error,
    fit_temperature,
    macro_f1_interval,
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
        "macro_f1_ci95",
        "expected_calibration_error",
        "expected_calibration_error_uncalibrated",
        "validation_warning",
    }
    assert set(found.metrics("test")) == {
        "test_accuracy",
        "test_accuracy_ci95",
        "test_loss",
        "test_macro_f1",
        "test_macro_f1_ci95",
        "test_expected_calibration_error",
        "test_expected_calibration_error_uncalibrated",
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


def all_right(images: int, margin: float) -> tuple[torch.Tensor, np.ndarray]:
    """Two classes in turn, each image right by the same margin of logits."""
    labels = np.arange(images) % 2
    return functional.one_hot(torch.from_numpy(labels), 2).float() * margin, labels


def test_eight_of_eight_right_do_not_make_the_network_surer_of_itself() -> None:
    logits, labels = all_right(8, 5.0)
    assert fit_temperature(logits, labels) == pytest.approx(0.94, abs=0.01)
    # Even where it was hardly sure at all, the range's end is not reached.
    assert fit_temperature(*all_right(8, 1.0)) == pytest.approx(0.59, abs=0.01)


def test_the_temperature_stays_in_range_where_validation_cannot_tell() -> None:
    logits, labels = all_right(20000, 5.0)
    assert fit_temperature(logits, labels) == pytest.approx(TEMPERATURE_RANGE[0], rel=1e-3)
    assert fit_temperature(logits, 1 - labels) == pytest.approx(TEMPERATURE_RANGE[1], rel=1e-3)


@pytest.mark.parametrize("factor", [0.7, 2.0])
def test_the_prior_does_not_count_beside_three_hundred_images(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    logits = torch.from_numpy(random.normal(size=(300, 5)) * 3)
    labels = np.array([random.choice(5, p=row / row.sum()) for row in logits.softmax(1).numpy()])
    with_prior = fit_temperature(logits * factor, labels)
    monkeypatch.setattr(figures, "LOG_TEMPERATURE_PRIOR_SD", math.inf)
    without = fit_temperature(logits * factor, labels)
    assert with_prior == pytest.approx(without, rel=0.03)
    sure, surer = ((logits * factor / t).softmax(1).max(1).values for t in (with_prior, without))
    assert (sure - surer).abs().max() < 0.01


def test_the_interval_of_macro_f1_is_that_of_the_accuracy_where_classes_are_alike() -> None:
    confusion = np.array([[180, 20], [20, 180]])
    assert macro_f1_interval(confusion, 0.9) == pytest.approx(wilson_interval(360, 400), abs=0.006)
    assert macro_f1_interval(confusion, 0.9) == macro_f1_interval(confusion, 0.9)


def test_the_interval_of_macro_f1_is_as_wide_as_its_smallest_class_makes_it() -> None:
    alike, uneven = np.array([[90, 10], [10, 90]]), np.array([[171, 19], [1, 9]])
    widths = [high - low for low, high in (macro_f1_interval(alike, 0.9), macro_f1_interval(uneven, 0.71))]
    assert widths[1] > 1.5 * widths[0]


def test_all_right_is_not_taken_for_certainty() -> None:
    low, high = macro_f1_interval(np.diag([4, 4]), 1.0)
    assert high == 1.0
    assert 0.5 < low < 0.8
    assert macro_f1_interval(np.diag([5000, 5000]), 1.0)[0] > 0.999


def test_the_interval_of_macro_f1_leaves_classes_without_images_out() -> None:
    assert macro_f1_interval(np.array([[40, 0, 0], [0, 40, 0], [0, 0, 0]]), 1.0)[0] > 0.9
    assert macro_f1_interval(np.array([[3]]), 1.0) == (1.0, 1.0)


def test_each_class_has_an_interval_of_its_recall() -> None:
    logits, labels = all_right(8, 5.0)
    found = evaluate(logits, labels, ["a", "b"], temperature=1.0)
    assert [report.recall_ci95 for report in found.classes] == [wilson_interval(4, 4)] * 2
    wider = torch.cat([logits, torch.full((8, 1), -9.0)], 1)
    assert evaluate(wider, labels, ["a", "b", "unseen"], temperature=1.0).classes[2].recall_ci95 is None


def test_too_small_a_validation_is_said_to_be_with_what_it_would_take() -> None:
    found = evaluate(*all_right(8, 5.0), ["a", "b"], temperature=1.0)
    assert found.warnings == (
        "Measured on only 8 pictures: 8 are right (100%), so the true accuracy may well be anywhere between 68% and "
        "100%. About 220 pictures would tell it to within 5 points.",
        "With 4 pictures per class on average, the figures of single classes are rough; they need about 30 each, 60 "
        "together.",
    )
    assert found.metrics("val")["validation_warning"] == " ".join(found.warnings)


def test_images_enough_need_no_warning() -> None:
    found = evaluate(*all_right(300, 5.0), ["a", "b"], temperature=1.0)
    assert found.warnings == ()
    assert found.metrics("val")["validation_warning"] is None


def test_each_image_has_its_prediction_and_the_probability_of_what_it_is() -> None:
    logits = torch.log(torch.tensor([[0.9, 0.1], [0.7, 0.3]]))
    found = evaluate(logits, np.array([0, 1]), ["a", "b"], temperature=1.0)
    assert found.predicted.tolist() == [0, 0]
    assert found.probability_of_true.tolist() == pytest.approx([0.9, 0.3])
