"""What more pictures would bring: a learning curve through the accuracies of trainings on less, and on to more.

Pure arithmetic on points; the probes that are trained for them are somebody else's part.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Exponents that are tried. Learning curves of classifiers fall within (Figueroa et al. 2012, Hestness et al. 2017).
_EXPONENTS = np.arange(0.1, 2.01, 0.05)
# A curve has three parameters.
FEWEST_SIZES = 3
RESAMPLES = 500
# A gain that nobody would collect pictures for.
HARDLY_ANY_GAIN = 0.005
# Residuals beyond this many standard deviations count less (Huber 1964); the usual constant, 95 % efficient.
_HUBER = 1.345


@dataclass(frozen=True)
class Point:
    """A training on part of the pictures: how many, and the accuracy on how many validation images."""

    train_images: int
    accuracy: float
    val_images: int


@dataclass(frozen=True)
class Expected:
    """An accuracy that is expected, with its 95 % interval: for new pictures of the validation images' kind."""

    train_images: int
    accuracy: float
    accuracy_ci95: tuple[float, float]


@dataclass(frozen=True)
class Forecast:
    """now: the curve's accuracy at the pictures there are, which chance in the last point moves less than that point.

    The curve: accuracy(n) = limit - scale * n ** -exponent. sentence: the forecast for people.
    """

    now: float
    twice: Expected
    four_times: Expected
    limit: float
    scale: float
    exponent: float
    sentence: str


def forecast(points: Sequence[Point], *, seed: int = 0) -> Forecast | None:
    """The accuracy with two and four times the pictures; None for fewer than FEWEST_SIZES sizes, too few for a curve.

    points: in any order, several of a size where small subsets were drawn more than once; all measured on the same
    validation images. An inverse power law, whose error never grows with pictures and whose limit is at most 1, is
    fitted by weighted least squares, one exponent after another, with outliers weighed down.

    The interval holds two kinds of chance. That of the trainings and subsets, by a parametric bootstrap of the points,
    as large as points of the same size differ (binomial where there is but one of each). And that of the validation
    images, which all points share and which therefore moves the whole curve.
    """
    sizes = np.array([point.train_images for point in points], dtype=np.float64)
    accuracies = np.array([point.accuracy for point in points])
    binomial = np.array([_binomial_variance(point.accuracy, point.val_images) for point in points])
    if len(np.unique(sizes)) < FEWEST_SIZES:
        return None
    variances = binomial * _dispersion(sizes, accuracies, binomial)
    weights = 1 / variances
    largest = sizes.max()
    # Sizes as shares of the largest keep the powers near 1.
    shares = sizes / largest
    for _ in range(5):
        limit, scale, exponent = (float(v[0]) for v in _fit(shares, accuracies[np.newaxis], weights))
        residuals = np.abs(accuracies - _curve(shares, limit, scale, exponent)) / np.sqrt(variances)
        weights = np.minimum(1, _HUBER / np.maximum(residuals, 1e-12)) / variances

    random = np.random.default_rng(seed)
    expected = _curve(shares, limit, scale, exponent)
    drawn = expected + random.standard_normal((RESAMPLES, len(shares))) * np.sqrt(variances)
    limits, scales, exponents = _fit(shares, drawn, weights)
    now = float(_curve(1.0, limit, scale, exponent))
    shared = random.standard_normal(RESAMPLES) * np.sqrt(binomial[sizes == largest].mean())

    def at(times: int) -> Expected:
        likely = min(1.0, max(0.0, float(_curve(times, limit, scale, exponent))))
        found = np.clip(_curve(times, limits, scales, exponents) + shared, 0, 1)
        low, high = np.percentile(found, [2.5, 97.5])
        return Expected(round(times * largest), likely, (min(float(low), likely), max(float(high), likely)))

    twice, four_times = at(2), at(4)
    return Forecast(
        now=now,
        twice=twice,
        four_times=four_times,
        limit=limit,
        scale=scale * float(largest) ** exponent,
        exponent=exponent,
        sentence=_sentence(now, twice, four_times),
    )


def _binomial_variance(accuracy: float, images: int) -> float:
    """Of a measured accuracy; never 0, since two more right and two more wrong are added (Agresti and Coull 1998)."""
    share = (accuracy * images + 2) / (images + 4)
    return share * (1 - share) / images


def _dispersion(sizes: NDArray[np.float64], accuracies: NDArray[np.float64], binomial: NDArray[np.float64]) -> float:
    """How much points of one size differ, as a multiple of the binomial variance.

    Below 1 as a rule, since they share their validation images. Drawn towards 1 as if two more points had said so.
    """
    squares, degrees = 0.0, 0
    for size in np.unique(sizes):
        same = sizes == size
        squares += float(((accuracies[same] - accuracies[same].mean()) ** 2 / binomial[same]).sum())
        degrees += int(same.sum()) - 1
    return (squares + 2) / (degrees + 2)


def _curve(
    shares: NDArray[np.float64] | float,
    limit: NDArray[np.float64] | float,
    scale: NDArray[np.float64] | float,
    exponent: NDArray[np.float64] | float,
) -> NDArray[np.float64]:
    return np.asarray(limit - scale * np.power(shares, -np.asarray(exponent)))


def _fit(
    shares: NDArray[np.float64], accuracies: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Limit, scale and exponent for each row of accuracies: (R, N) to three of (R,)."""
    total = weights.sum()
    best = np.full(len(accuracies), np.inf)
    limits, scales, exponents = (np.zeros(len(accuracies)) for _ in range(3))
    mean = accuracies @ weights / total
    for exponent in _EXPONENTS:
        powers = shares**-exponent
        mean_power = float(powers @ weights / total)
        spread = float(weights @ (powers - mean_power) ** 2)
        slope = -(accuracies - mean[:, np.newaxis]) @ (weights * (powers - mean_power)) / spread
        scale = np.maximum(slope, 0)  # more pictures never harm
        limit = mean + scale * mean_power
        # A limit above 1 is held at 1, and the scale fitted to that.
        beyond = limit > 1
        held = np.maximum((1 - accuracies) @ (weights * powers) / float(weights @ powers**2), 0)
        limit, scale = np.where(beyond, 1, limit), np.where(beyond, held, scale)
        fitted = limit[:, np.newaxis] - scale[:, np.newaxis] * powers
        loss = (accuracies - fitted) ** 2 @ weights
        better = loss < best
        best = np.where(better, loss, best)
        limits, scales = np.where(better, limit, limits), np.where(better, scale, scales)
        exponents = np.where(better, exponent, exponents)
    return limits, scales, exponents


def _sentence(now: float, twice: Expected, four_times: Expected) -> str:
    if four_times.accuracy - now < HARDLY_ANY_GAIN:
        return (
            f"More pictures would hardly help: even four times as many would bring {_told(four_times)}, now {now:.2f}."
        )
    return f"Twice as many training pictures would bring about {_told(twice)}, now {now:.2f}."


def _told(expected: Expected) -> str:
    low, high = expected.accuracy_ci95
    return f"{expected.accuracy:.2f} ({low:.2f} to {high:.2f})"
