"""The wall clock jumps by hours, days and decades, for workers at work: no healthy job pays for it."""

import random
from datetime import timedelta
from pathlib import Path

import pytest
from other_clock import LIBRARIES, Clock
from queue_builders import event_log, find
from workshop import Workshop, wait_until

from app.db.tables import utc_now

JUMPS = ("+3600", "-3600", "+30d", "-10y", "+0", "+10y", "-86400", "+90000")

pytestmark = pytest.mark.skipif(not LIBRARIES, reason="needs libfaketime (apt-get install libfaketime)")


@pytest.mark.slow
def test_jobs_at_work_are_neither_stolen_nor_called_poison(workshop: Workshop, tmp_path: Path) -> None:
    clocks = [Clock(tmp_path / f"clock-{i}") for i in range(2)]
    for clock in clocks:
        workshop.start_worker(environment=clock.environment, lease_seconds=4.0, max_crashes_without_progress=1)
    jobs = [workshop.submit("work_until_released") for _ in range(2)]
    for job in jobs:
        workshop.wait_for(job, "running")

    jumps = random.Random(5)
    for _ in range(24):
        jumps.choice(clocks).set(jumps.choice(JUMPS))
        seen = [find(workshop.database, job).ticks for job in jobs]
        # Both go on working by the clock that they have now.
        wait_until(
            lambda seen=seen: all(find(workshop.database, job).ticks > n for job, n in zip(jobs, seen, strict=True))
        )
    workshop.release()

    for job in jobs:
        assert workshop.wait_for(job, "succeeded", "failed") == "succeeded"
        row = find(workshop.database, job)
        assert (row.attempt, row.fence) == (1, 1)
        statuses = [event.data["status"] for event in event_log(workshop.database, job) if event.event == "status"]
        assert statuses == ["queued", "running", "succeeded"]


@pytest.mark.slow
def test_a_dead_worker_is_noticed_whatever_the_clocks_say(workshop: Workshop, tmp_path: Path) -> None:
    """Decades apart from each other, and the job of the dead one is taken over after a lease."""
    clocks = [Clock(tmp_path / f"clock-{i}") for i in range(2)]
    clocks[0].set("+20y")
    first = workshop.start_worker(environment=clocks[0].environment, lease_seconds=2.0)
    job = workshop.submit("work_until_released")
    workshop.wait_for(job, "running")
    assert find(workshop.database, job).started_at - utc_now() > timedelta(days=19 * 365)
    clocks[1].set("-20y")
    workshop.start_worker(environment=clocks[1].environment, lease_seconds=2.0)
    first.kill()
    first.wait()
    wait_until(lambda: find(workshop.database, job).attempt == 2 and workshop.status(job) == "running")
    workshop.release()
    assert workshop.wait_for(job, "succeeded", "failed") == "succeeded"
