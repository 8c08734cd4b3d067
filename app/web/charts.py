"""Where the lines of a chart run: numbers in, coordinates out. Templates draw them as SVG.

Colours are the style sheet's, by their number; coordinates are those of the SVG's viewBox.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 520, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 34
# More would only hide the line under its dots.
MOST_DOTS = 40
COLOURS = 6  # in the style sheet


@dataclass(frozen=True)
class Series:
    name: str
    points: Sequence[tuple[float, float | None]]  # None is a gap
    colour: int = 0
    is_dashed: bool = False


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Line:
    name: str
    colour: int  # 0 to COLOURS - 1
    is_dashed: bool
    path: str
    dots: Sequence[Dot]


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    title: str
    summary: str  # for those who hear it
    lines: Sequence[Line]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    x_name: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True)
class Axis:
    """A range of numbers on a stretch of the drawing."""

    low: float
    high: float
    start: float
    end: float

    def at(self, number: float) -> float:
        share = (number - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.start + share * (self.end - self.start), 1)


def line_chart(
    title: str, series: Sequence[Series], *, x_name: str = "epoch", is_share: bool = False, unit: str = ""
) -> Chart | None:
    """None where there is nothing to draw. is_share: numbers from 0 to 1, told in percent."""
    drawn = [each for each in series if any(y is not None for _, y in each.points)]
    if not drawn:
        return None
    xs = [x for each in drawn for x, _ in each.points]
    ys = [y for each in drawn for _, y in each.points if y is not None and math.isfinite(y)]
    x_low, x_high = min(xs), max(xs)
    y_steps = steps(*_range(ys, is_share=is_share))
    x_axis = Axis(x_low, x_high, LEFT, WIDTH - RIGHT)
    y_axis = Axis(y_steps[0], y_steps[-1], HEIGHT - BOTTOM, TOP)

    def told(y: float) -> str:
        return f"{100 * y:.3g} %" if is_share else f"{y:.4g}{unit}"

    lines = [_line(each, x_axis, y_axis, x_name, told) for each in drawn]
    whole = [step for step in steps(x_low, x_high) if x_low <= step <= x_high and float(step).is_integer()]
    last = "; ".join(f"{each.name} {told(y)}" for each in drawn if (y := _last(each)) is not None)
    return Chart(
        title=title,
        summary=f"{title} by {x_name}, at the end: {last}.",
        lines=lines,
        x_ticks=[Tick(x_axis.at(step), f"{step:g}") for step in whole],
        y_ticks=[Tick(y_axis.at(step), told(step)) for step in y_steps],
        x_name=x_name,
    )


def steps(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, evenly spaced; at least two."""
    span = high - low or abs(high) or 1.0
    raw = span / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * place, 12) for place in range(first, max(last, first + 1) + 1)]


def _range(ys: Sequence[float], *, is_share: bool) -> tuple[float, float]:
    if not ys:
        return 0.0, 1.0
    low, high = min(ys), max(ys)
    margin = (high - low) * 0.05 or (0.02 if is_share else abs(high) * 0.1 or 1.0)
    low, high = low - margin, high + margin
    return (max(0.0, low), min(1.0, high)) if is_share else (max(0.0, low) if min(ys) >= 0 else low, high)


def _line(series: Series, x_axis: Axis, y_axis: Axis, x_name: str, told: Callable[[float], str]) -> Line:
    path, dots, is_down = [], [], False
    for x, y in series.points:
        if y is None or not math.isfinite(y):
            is_down = False
            continue
        at = x_axis.at(x), y_axis.at(y)
        path.append(f"{'L' if is_down else 'M'}{at[0]:g} {at[1]:g}")
        dots.append(Dot(*at, f"{series.name}, {x_name} {x:g}: {told(y)}"))
        is_down = True
    kept = dots if len(dots) <= MOST_DOTS else []
    return Line(series.name, series.colour % COLOURS, series.is_dashed, " ".join(path), kept)


def _last(series: Series) -> float | None:
    return next((y for _, y in reversed(series.points) if y is not None), None)
