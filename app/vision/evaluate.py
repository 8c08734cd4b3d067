"""What a trained network is worth, from its logits on images it was not trained on: numbers and their uncertainty.

Pure arithmetic on logits and labels; the logits come from loop.predict_logits, with serving's own preprocessing.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
# What is believed of the logarithm of a temperature before any image is seen: 1, give or take this. Guo et al. 2017
# found 1 to 3 for networks trained on plain labels; label smoothing, as in the modern recipe, leads below 1.
LOG_TEMPERATURE_PRIOR_SD = 0.5
BOOTSTRAP_RESAMPLES = 1000
# Figures say little where chance alone moves the accuracy by more than this, or where classes have fewer images.
WIDEST_HALF_INTERVAL = 0.05
FEWEST_IMAGES_PER_CLASS = 30
_Z95 = NormalDist().inv_cdf(0.975)
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class ClassReport:
    name: str
    precision: float
    recall: float
    f1: float
    support: int
    recall_ci95: tuple[float, float] | None  # Wilson's; None without images


@dataclass(frozen=True)
class Mistake:
    """A wrongly predicted image: place in the split, labels, and the calibrated score of the wrong prediction."""

    position: int
    true_label: int
    predicted_label: int
    score: float


@dataclass(frozen=True)
class Evaluation:
    """All figures for one split. confusion: rows are true classes, columns predicted ones.

    predicted, probability_of_true: one for each image, in the split's order; the latter calibrated.
    warnings: sentences on why the figures are to be taken with care; none where there are images enough.
    """

    accuracy: float
    accuracy_ci95: tuple[float, float]
    loss: float
    macro_f1: float
    macro_f1_ci95: tuple[float, float]
    expected_calibration_error: float
    expected_calibration_error_uncalibrated: float
    classes: tuple[ClassReport, ...]
    confusion: NDArray[np.int64]
    mistakes: tuple[Mistake, ...]
    predicted: NDArray[np.int64]
    probability_of_true: NDArray[np.float64]
    warnings: tuple[str, ...]

    def metrics(self, prefix: str) -> dict[str, Any]:
        """The headline figures; prefix: "val" or "test"."""
        shared = "" if prefix == "val" else f"{prefix}_"
        figures = {
            f"{prefix}_accuracy": self.accuracy,
            f"{prefix}_accuracy_ci95": list(self.accuracy_ci95),
            f"{prefix}_loss": self.loss,
            f"{shared}macro_f1": self.macro_f1,
            f"{shared}macro_f1_ci95": list(self.macro_f1_ci95),
            f"{shared}expected_calibration_error": self.expected_calibration_error,
            f"{shared}expected_calibration_error_uncalibrated": self.expected_calibration_error_uncalibrated,
        }
        return figures | ({"validation_warning": " ".join(self.warnings) or None} if prefix == "val" else {})


def evaluate(
    logits: Tensor, labels: NDArray[np.int64], class_names: list[str], *, temperature: float, seen_before: int = 0
) -> Evaluation:
    """logits: float32 (N, C), N > 0. seen_before: how many of the images the backbone had been trained on.

    Loss is the mean cross-entropy before calibration, as in the epochs' history.
    """
    truth = torch.from_numpy(labels)
    predicted = logits.argmax(1)
    confusion = np.zeros((len(class_names), len(class_names)), dtype=np.int64)
    np.add.at(confusion, (labels, predicted.numpy()), 1)
    reports = _class_reports(confusion, class_names)
    calibrated = (logits.double() / temperature).softmax(1)
    correct = predicted == truth
    wrong = torch.nonzero(~correct).flatten().tolist()
    right = int(correct.sum())
    # Over the classes that occur: one without images here has no recall to speak of.
    macro_f1 = float(np.mean([report.f1 for report in reports if report.support > 0]))
    return Evaluation(
        accuracy=right / len(labels),
        accuracy_ci95=wilson_interval(right, len(labels)),
        loss=functional.cross_entropy(logits.double(), truth).item(),
        macro_f1=macro_f1,
        macro_f1_ci95=macro_f1_interval(confusion, macro_f1),
        expected_calibration_error=expected_calibration_error(calibrated, truth),
        expected_calibration_error_uncalibrated=expected_calibration_error(logits.double().softmax(1), truth),
        classes=reports,
        confusion=confusion,
        mistakes=tuple(
            Mistake(i, int(labels[i]), int(predicted[i]), calibrated[i, predicted[i]].item()) for i in wrong
        ),
        predicted=predicted.numpy(),
        probability_of_true=calibrated.gather(1, truth.unsqueeze(1)).squeeze(1).numpy(),
        warnings=_warnings(right, len(labels), class_count=len(class_names), seen_before=seen_before),
    )


def as_record(found: Evaluation, images: Sequence[tuple[str, str] | None]) -> dict[str, Any]:
    """As it is stored beside the model, JSON. images: id and path of each, in the split's order.

    An image without them is counted everywhere and not listed among the mistakes.
    """
    names = [report.name for report in found.classes]
    worst_first = sorted(found.mistakes, key=lambda mistake: -mistake.score)
    listed = [(mistake, image) for mistake in worst_first if (image := images[mistake.position]) is not None]
    return {
        "classes": names,
        "images": len(images),
        "accuracy": found.accuracy,
        "accuracy_ci95": list(found.accuracy_ci95),
        "loss": found.loss,
        "macro_f1": found.macro_f1,
        "macro_f1_ci95": list(found.macro_f1_ci95),
        "expected_calibration_error": found.expected_calibration_error,
        "expected_calibration_error_uncalibrated": found.expected_calibration_error_uncalibrated,
        "warnings": list(found.warnings),
        "confusion_matrix": found.confusion.tolist(),
        "per_class": [asdict(report) for report in found.classes],
        "mistakes": [
            {
                "image_id": image_id,
                "path": path,
                "true": names[mistake.true_label],
                "predicted": names[mistake.predicted_label],
                "score": mistake.score,
            }
            for mistake, (image_id, path) in listed
        ],
    }


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927): sound for few trials, and for 0 or all successes."""
    share = successes / trials
    denominator = 1 + _Z95**2 / trials
    centre = (share + _Z95**2 / (2 * trials)) / denominator
    half = _Z95 * math.sqrt(share * (1 - share) / trials + _Z95**2 / (4 * trials**2)) / denominator
    return max(0.0, centre - half), min(1.0, centre + half)


def macro_f1_interval(confusion: NDArray[np.int64], macro_f1: float) -> tuple[float, float]:
    """95 % interval of macro-F1: percentiles over resamples of the images (bootstrap; Efron 1979), the same each time.

    Images are drawn with one pseudo-error, shared among the classes, added to those there are: resampling what holds
    no error at all would never show one, and 8 of 8 right would come out as certainty. Beside hundreds of images it
    does not count.
    """
    occurring = np.flatnonzero(confusion.sum(1))
    weights = confusion.astype(np.float64)
    if len(confusion) > 1:
        weights[occurring, (occurring + 1) % len(confusion)] += 1 / len(occurring)
    # Only the cells that hold something are drawn: with a thousand classes a million of them are empty.
    true, predicted = np.nonzero(weights)
    random = np.random.default_rng(0)
    images, shares = int(confusion.sum()), weights[true, predicted] / weights.sum()
    resampled = np.concatenate(
        [
            _macro_f1(random.multinomial(images, shares, size=size).astype(np.float64), true, predicted, len(confusion))
            for size in (BOOTSTRAP_RESAMPLES // 10,) * 10  # a tenth at a time, for memory
        ]
    )
    # Small classes, which some resamples lack, lower F1 on average; that is the resampling's doing and taken back.
    bias = resampled.mean() - _macro_f1(shares[np.newaxis] * images, true, predicted, len(confusion))[0]
    low, high = np.percentile(resampled, [2.5, 97.5]) - bias
    return min(max(float(low), 0.0), macro_f1), max(min(float(high), 1.0), macro_f1)


def _macro_f1(
    drawn: NDArray[np.float64], true: NDArray[np.int64], predicted: NDArray[np.int64], class_count: int
) -> NDArray[np.float64]:
    """drawn: (R, K), images in each of the K cells of a confusion matrix at (true, predicted). Returns (R,)."""
    support = _sums(drawn, true, class_count)
    hits = _sums(drawn * (true == predicted), true, class_count)
    both = support + _sums(drawn, predicted, class_count)
    f1 = np.divide(2 * hits, both, out=np.zeros_like(both), where=both > 0)
    return np.asarray(f1.sum(1) / (support > 0).sum(1))


def _sums(values: NDArray[np.float64], groups: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Sums of columns by group: (R, K) and (K,) to (R, count)."""
    order = np.argsort(groups, kind="stable")
    found, starts = np.unique(groups[order], return_index=True)
    sums = np.zeros((len(values), count))
    sums[:, found] = np.add.reduceat(values[:, order], starts, axis=1)
    return sums


def expected_calibration_error(probabilities: Tensor, truth: Tensor) -> float:
    """Mean gap of confidence to accuracy over 15 equal bins of confidence, weighted by images (Guo et al. 2017)."""
    confidence, predicted = probabilities.max(1)
    correct = (predicted == truth).double()
    bins = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    gap = torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add_(0, bins, confidence.double() - correct)
    return gap.abs().sum().item() / len(truth)


def fit_temperature(logits: Tensor, labels: NDArray[np.int64]) -> float:
    """The most probable temperature in the light of the validation images, within TEMPERATURE_RANGE.

    Minimises the images' summed cross-entropy (Guo et al. 2017) plus (log T)^2 / (2 sd^2), which is a log-normal prior
    on T around 1 with LOG_TEMPERATURE_PRIOR_SD. The prior is for small sets: where all of eight images are right the
    cross-entropy alone has no minimum, would be fitted at the range's lower end, and would turn "8 of 8" into near
    certainty. It weighs as much whatever the number of images, so that it moves the temperature of 300 by a few
    percent of itself, which no confidence shows, and less of more. The minimum is found by golden section on log T.
    """
    truth = torch.from_numpy(labels)
    scores = logits.double()

    def loss(log_temperature: float) -> float:
        prior = log_temperature**2 / (2 * LOG_TEMPERATURE_PRIOR_SD**2)
        return functional.cross_entropy(scores / math.exp(log_temperature), truth, reduction="sum").item() + prior

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
        interval = wilson_interval(int(hits[i]), int(support[i])) if support[i] else None
        reports.append(ClassReport(name, precision, recall, f1, int(support[i]), interval))
    return tuple(reports)


def _warnings(right: int, images: int, *, class_count: int, seen_before: int) -> tuple[str, ...]:
    low, high = wilson_interval(right, images)
    found = []
    if high - low > 2 * WIDEST_HALF_INTERVAL:
        found.append(
            f"Measured on only {images} pictures: {right} are right ({right / images:.0%}), so the true accuracy may "
            f"well be anywhere between {low:.0%} and {high:.0%}. About {_images_needed(right, images)} pictures would "
            "tell it to within 5 points."
        )
    if images < FEWEST_IMAGES_PER_CLASS * class_count:
        found.append(
            f"With {images / class_count:.0f} pictures per class on average, the figures of single classes are rough; "
            f"they need about {FEWEST_IMAGES_PER_CLASS} each, {FEWEST_IMAGES_PER_CLASS * class_count} together."
        )
    if seen_before:
        found.append(
            f"The backbone had been trained on {seen_before} of the {images} pictures that this was measured on, so "
            "new ones may well be told apart less well."
        )
    return tuple(found)


def _images_needed(right: int, images: int) -> int:
    """Images from which on the interval is no wider than ±5 points, to two digits, rounded up.

    The share is taken as Agresti and Coull 1998 take it, with two more right and two more wrong: of 3 out of 3, that
    all would be right is not to be planned with.
    """
    share = (right + 2) / (images + 4)
    needed = _Z95**2 * share * (1 - share) / WIDEST_HALF_INTERVAL**2
    unit: int = 10 ** max(0, math.floor(math.log10(needed)) - 1)
    return math.ceil(needed / unit) * unit
