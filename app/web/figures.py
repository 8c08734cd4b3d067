"""What is drawn of a model: its confusion matrix, how far to believe its scores, what more pictures would bring."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.api.schemas import ClassQuality, ReliabilityBin, SplitEvaluation
from app.web.charts import Axis, Dot, Tick, steps

SHADES = 9  # of a cell, in the style sheet: 0 is none
SIDE, MARGIN = 300, 44  # of the reliability diagram
FORECAST_WIDTH, FORECAST_HEIGHT, FORECAST_MARGIN = 420, 220, 48


@dataclass(frozen=True)
class Cell:
    true: str
    predicted: str
    count: int
    shade: int  # 0 to SHADES, by the share of the true class
    is_right: bool


@dataclass(frozen=True)
class Matrix:
    classes: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    left_out: int  # classes that there was no room for


@dataclass(frozen=True)
class Bar:
    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class Reliability:
    """Bars up to the share that is right, over the mean score; the diagonal is where both agree."""

    bars: Sequence[Bar]
    dots: Sequence[Dot]
    ticks: Sequence[Tick]
    low: float
    high: float
    side: int = SIDE


@dataclass(frozen=True)
class Forecast:
    """The curve from half the pictures to eight times as many; a bar for each interval."""

    path: str
    dots: Sequence[Dot]
    intervals: Sequence[Bar]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    sentence: str
    width: int = FORECAST_WIDTH
    height: int = FORECAST_HEIGHT
    margin: int = FORECAST_MARGIN


def matrix(shown: SplitEvaluation, *, most: int) -> Matrix:
    """All classes, or the `most` of them that take part in most mistakes, in their order."""
    counts = shown.confusion_matrix
    places = range(len(shown.classes))
    wrong = {i: sum(counts[i]) + sum(row[i] for row in counts) - 2 * counts[i][i] for i in places}
    kept = sorted(sorted(places, key=lambda i: -wrong[i])[:most])

    def cell(i: int, j: int) -> Cell:
        count, total = counts[i][j], sum(counts[i])
        shade = max(1, round(SHADES * count / total)) if count else 0
        return Cell(shown.classes[i], shown.classes[j], count, shade, i == j)

    return Matrix(
        [shown.classes[i] for i in kept],
        [[cell(i, j) for j in kept] for i in kept],
        len(shown.classes) - len(kept),
    )


def worst_first(classes: Sequence[ClassQuality]) -> list[ClassQuality]:
    """By F1, in their own order where it is the same; those without validation pictures last."""
    return sorted(classes, key=lambda each: (not each.support, each.f1 or 0.0))


def reliability(bins: Sequence[ReliabilityBin]) -> Reliability:
    low, high = MARGIN, SIDE - 12
    x_axis, y_axis = Axis(0, 1, low, high), Axis(0, 1, SIDE - MARGIN, 12)
    bars, dots = [], []
    for each in bins:
        text = f"scores {each.low:.2f} to {each.high:.2f}: {each.images} pictures, {each.accuracy:.0%} right"
        left, right, top = x_axis.at(each.low), x_axis.at(each.high), y_axis.at(each.accuracy)
        bars.append(Bar(left + 1, top, round(right - left - 2, 1), round(y_axis.start - top, 1), text))
        dots.append(Dot(x_axis.at(each.confidence), top, text))
    ticks = [Tick(x_axis.at(share / 4), f"{share * 25} %") for share in range(5)]
    return Reliability(bars, dots, ticks, low=low, high=high)


def forecast(found: Mapping[str, Any], metrics: Mapping[str, Any]) -> Forecast:
    """found: as an evaluation's `forecast`, which is accuracy(n) = limit - scale * n ** -exponent."""
    twice, four_times = found["twice"], found["four_times"]
    now = twice["train_images"] / 2
    sizes = [now * 2 ** (step / 4) for step in range(-4, 13)]
    curve = [found["limit"] - found["scale"] * size ** -found["exponent"] for size in sizes]
    lows = [each["accuracy_ci95"][0] for each in (twice, four_times)]
    y_steps = steps(max(0.0, min(*curve, *lows)), 1.0, most=4)
    x_axis = Axis(0, len(sizes) - 1, FORECAST_MARGIN, FORECAST_WIDTH - 16)
    y_axis = Axis(y_steps[0], y_steps[-1], FORECAST_HEIGHT - 36, 12)
    points = [(x_axis.at(place), y_axis.at(max(y_steps[0], share))) for place, share in enumerate(curve)]
    path = " ".join(f"{'L' if place else 'M'}{x:g} {y:g}" for place, (x, y) in enumerate(points))
    dots = [Dot(x_axis.at(4), y_axis.at(found["now"]), f"now, {now:,.0f} pictures: {found['now']:.1%}")]
    intervals = []
    for place, each in ((8, twice), (12, four_times)):
        low, high = each["accuracy_ci95"]
        text = f"{each['train_images']:,} pictures: {each['accuracy']:.1%} ({low:.1%} to {high:.1%})"
        dots.append(Dot(x_axis.at(place), y_axis.at(each["accuracy"]), text))
        top = y_axis.at(high)
        intervals.append(Bar(x_axis.at(place), top, 0, round(y_axis.at(low) - top, 1), text))
    return Forecast(
        path=path,
        dots=dots,
        intervals=intervals,
        x_ticks=[Tick(x_axis.at(place), f"{sizes[place]:,.0f}") for place in (0, 4, 8, 12, 16)],
        y_ticks=[Tick(y_axis.at(step), f"{100 * step:.3g} %") for step in y_steps],
        sentence=found["sentence"],
    )
