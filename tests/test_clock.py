"""What is kept for a while is kept that long, whatever is done to the wall clock."""

from datetime import UTC, datetime, timedelta

import pytest

from app.clock import PatientClock

START = datetime(2026, 1, 1, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


class Time:
    """Goes on as told, and the wall clock is set as told."""

    def __init__(self) -> None:
        self.passed, self.wrong_by = timedelta(), timedelta()
        self.clock = PatientClock(lambda: START + self.passed + self.wrong_by, lambda: self.passed.total_seconds())


def test_without_a_jump_it_is_what_it_is() -> None:
    time = Time()
    time.passed = 30 * HOUR

    assert time.clock.date() == START + 30 * HOUR
    assert time.clock.before(DAY) == START + 6 * HOUR


@pytest.mark.parametrize("jump", [timedelta(0), 2 * DAY, -2 * DAY, HOUR, 3650 * DAY])
@pytest.mark.parametrize("jump_back", [timedelta(0), 2 * DAY, -2 * DAY])
def test_nothing_is_forgotten_before_its_time(jump: timedelta, jump_back: timedelta) -> None:
    time = Time()
    time.passed, time.wrong_by = HOUR, jump
    made = time.clock.date()
    time.passed, time.wrong_by = 24 * HOUR, jump_back

    assert not made < time.clock.before(DAY)


def test_after_a_jump_ahead_it_is_forgotten_in_its_time() -> None:
    time = Time()
    made = time.clock.date()
    time.passed, time.wrong_by = 25 * HOUR, 2 * DAY

    assert made < time.clock.before(DAY)
