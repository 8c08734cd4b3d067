"""What time it is for what is kept for a while, where the wall clock may be set while a process runs.

A wall clock that jumps ahead makes everything look old, and one that was behind makes what was made meanwhile look old
once it is right again. So a process also counts on from the time at which it began, by a clock that nobody sets: it
forgets by whichever of the two is earlier, and what it dates with this clock it dates by whichever is later. What is
kept for a day is then kept for a day at least, as long as the process lives; one that starts believes the clock that it
finds.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta


def wall_clock() -> datetime:
    return datetime.now(UTC)


def monotonic_clock() -> float:
    """Seconds by a clock that nobody sets and that goes on while the machine sleeps, where there is one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class PatientClock:
    """Made when the process begins."""

    def __init__(
        self, wall: Callable[[], datetime] = wall_clock, monotonic: Callable[[], float] = monotonic_clock
    ) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._began, self._began_monotonic = wall(), monotonic()

    def before(self, age: timedelta) -> datetime:
        """What is dated before this is older than `age`, by both clocks."""
        return min(self._wall(), self._counted()) - age

    def date(self) -> datetime:
        """For what is made now, and is to be kept for a while."""
        return max(self._wall(), self._counted())

    def _counted(self) -> datetime:
        return self._began + timedelta(seconds=self._monotonic() - self._began_monotonic)
