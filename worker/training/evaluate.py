"""What a trained network is worth, from its logits on images it was not trained on: numbers and their uncertainty.

Pure arithmetic on logits and labels; the logits come from loop.predict_logits, with serving's own preprocessing.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

CALIBRATION_BINS = 15
# A temperature beyond these says more about a small or perfectly separated validation set than about the network.
TEMPERATURE_RANGE = (0.5, 5.0)
_Z95 = NormalDist().inv_cdf(0.975)
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class ClassReport:
    name: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Mistake:
    """A wrongly predicted image: place in the split, labels, and the calibrated score of the wrong prediction."""

    position: int
    true_label: int
    predicted_label: int
    score: float


@dataclass(frozen=True)
class Evaluation:
    """All figures for one split. confusion: rows are true classes, columns predicted ones."""

    accuracy: float
    accuracy_ci95: tuple[float, float]
    loss: float
    macro_f1: float
    expected_calibration_error: float
    expected_calibration_error_uncalibrated: float
    classes: tuple[ClassReport, ...]
    confusion: NDArray[np.int64]
    mistakes: tuple[Mistake, ...]

    def metrics(self, prefix: str) -> dict[str, Any]:
        """The headline figures; prefix: "val" or "test"."""
        shared = "" if prefix == "val" else f"{prefix}_"
        return {
            f"{prefix}_accuracy": self.accuracy,
            f"{prefix}_accuracy_ci95": list(self.accuracy_ci95),
            f"{prefix}_loss": self.loss,
            f"{shared}macro_f1": self.macro_f1,
            f"{shared}expected_calibration_error": self.expected_calibration_error,
        }


def evaluate(logits: Tensor, labels: NDArray[np.int64], class_names: list[str], *, temperature: float) -> Evaluation:
    """logits: float32 (N, C), N > 0. Loss is the mean cross-entropy before calibration, as in the epochs' history."""
    truth = torch.from_numpy(labels)
    predicted = logits.argmax(1)
    confusion = np.zeros((len(class_names), len(class_names)), dtype=np.int64)
    np.add.at(confusion, (labels, predicted.numpy()), 1)
    reports = _class_reports(confusion, class_names)
    calibrated = (logits.double() / temperature).softmax(1)
    correct = predicted == truth
    wrong = torch.nonzero(~correct).flatten().tolist()
    right = int(correct.sum())
    return Evaluation(
        accuracy=right / len(labels),
        accuracy_ci95=wilson_interval(right, len(labels)),
        loss=functional.cross_entropy(logits.double(), truth).item(),
        # Over the classes that occur: one without images here has no recall to speak of.
        macro_f1=float(np.mean([report.f1 for report in reports if report.support > 0])),
        expected_calibration_error=expected_calibration_error(calibrated, truth),
        expected_calibration_error_uncalibrated=expected_calibration_error(logits.double().softmax(1), truth),
        classes=reports,
        confusion=confusion,
        mistakes=tuple(
            Mistake(i, int(labels[i]), int(predicted[i]), calibrated[i, predicted[i]].item()) for i in wrong
        ),
    )


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927): sound for few trials, and for 0 or all successes."""
    share = successes / trials
    denominator = 1 + _Z95**2 / trials
    centre = (share + _Z95**2 / (2 * trials)) / denominator
    half = _Z95 * math.sqrt(share * (1 - share) / trials + _Z95**2 / (4 * trials**2)) / denominator
    return max(0.0, centre - half), min(1.0, centre + half)


def expected_calibration_error(probabilities: Tensor, truth: Tensor) -> float:
    """Mean gap of confidence to accuracy over 15 equal bins of confidence, weighted by images (Guo et al. 2017)."""
    confidence, predicted = probabilities.max(1)
    correct = (predicted == truth).double()
    bins = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    gap = torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add_(0, bins, confidence.double() - correct)
    return gap.abs().sum().item() / len(truth)


def fit_temperature(logits: Tensor, labels: NDArray[np.int64]) -> float:
    """The temperature that minimises the validation loss, within TEMPERATURE_RANGE.

    The loss has one minimum in the temperature, so a golden-section search on its logarithm finds it; where all
    images are right the best would be 0, and the range's end is taken.
    """
    truth = torch.from_numpy(labels)
    scores = logits.double()

    def loss(log_temperature: float) -> float:
        return functional.cross_entropy(scores / math.exp(log_temperature), truth).item()

    low, high = (math.log(t) for t in TEMPERATURE_RANGE)
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    left_loss, right_loss = loss(left), loss(right)
    while high - low > 1e-4:
        if left_loss <= right_loss:
            high, right, right_loss = right, left, left_loss
            left = high - _GOLDEN * (high - low)
            left_loss = loss(left)
        else:
            low, left, left_loss = left, right, right_loss
            right = low + _GOLDEN * (high - low)
            right_loss = loss(right)
    return math.exp((low + high) / 2)


def _class_reports(confusion: NDArray[np.int64], class_names: list[str]) -> tuple[ClassReport, ...]:
    hits = confusion.diagonal()
    predicted, support = confusion.sum(0), confusion.sum(1)
    reports = []
    for i, name in enumerate(class_names):
        precision = float(hits[i] / predicted[i]) if predicted[i] else 0.0
        recall = float(hits[i] / support[i]) if support[i] else 0.0
        f1 = float(2 * hits[i] / (predicted[i] + support[i])) if predicted[i] + support[i] else 0.0
        reports.append(ClassReport(name, precision, recall, f1, int(support[i])))
    return tuple(reports)
