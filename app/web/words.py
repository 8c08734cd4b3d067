"""Figures as people read them: the filters of the templates. Pure."""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

DASH = "–"


def percent(share: float | None, digits: int = 1) -> str:
    return DASH if share is None else f"{100 * share:.{digits}f} %"


def interval(bounds: Sequence[float | None] | None) -> str:
    """A 95 % interval of shares: "91 to 98 %"."""
    if bounds is None or None in bounds:
        return DASH
    low, high = bounds
    assert low is not None
    assert high is not None
    return f"{100 * low:.0f} to {100 * high:.0f} %"


def figure(number: float | None, digits: int = 3) -> str:
    """A few significant digits, and no exponent where a person would write none."""
    if number is None:
        return DASH
    return f"{number:.{digits}g}" if abs(number) < 1000 else f"{number:,.0f}"


def count(number: int) -> str:
    return f"{number:,}"


def plural(number: int, one: str, many: str = "") -> str:
    """ "1 picture", "2,000 pictures"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def size(number: float | None) -> str:
    """Bytes in decimal units, as disks and downloads are told."""
    if number is None:
        return DASH
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if number >= 100 or unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min"


def ago(then: datetime) -> str:
    seconds = (datetime.now(UTC) - then).total_seconds()
    for limit, unit_seconds, unit in ((90, 1, "s"), (5400, 60, "min"), (129_600, 3600, "h")):
        if seconds < limit:
            return f"{max(0, round(seconds / unit_seconds))} {unit} ago"
    return f"{round(seconds / 86_400)} days ago"


def stamp(then: datetime) -> str:
    return then.strftime("%Y-%m-%d %H:%M UTC")


def spoken(name: str | None) -> str:
    """An identifier as words: "fine_tuning" → "fine tuning"."""
    return DASH if name is None else name.replace("_", " ")


def without_api(detail: str) -> str:
    """A problem's sentence without its last clause, where that says what to ask of the API."""
    return re.sub(r"; (?:GET /v1/|/docs )[^;]*$", ".", detail)


def short(identifier: str) -> str:
    """Enough of an id to tell it from others by eye."""
    return identifier[:12]


def stem(path: str) -> str:
    return path.rpartition("/")[2]


FILTERS: Mapping[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        *(percent, interval, figure, count, plural, size, duration, ago, stamp),
        *(spoken, without_api, short, stem),
    )
}
