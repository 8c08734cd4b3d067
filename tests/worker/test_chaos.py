"""Four workers whose processes are killed and frozen at random: nothing is lost, and nothing is done twice."""

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from running import command_of
from sqlalchemy import select
from workshop import Workshop, is_stopped, wait_until

from app.db.engine import Database
from app.db.tables import EventRow, JobRow, ModelRow
from app.jobs.states import JobStatus

KILLS = int(os.environ.get("GRAFT_TEST_KILLS", "200"))
WORKERS = 4
UNFINISHED = 12  # jobs that there are at least while it goes on
POISON_EVERY = 25  # jobs
LEASE_SECONDS = 4.0
# A healthy job may be killed more than once in a row before its first step; a poison one always is.
MAX_CRASHES = 5
SETTLE_SECONDS = 120.0


class Thawer(threading.Thread):
    """Lets what was frozen go on after 1.3 to 2.2 leases. It never touches the database: somebody who was frozen in
    the middle of a commit keeps everybody else out of an SQLite file."""

    def __init__(self, pids: Callable[[], list[int]], chance: random.Random) -> None:
        super().__init__(daemon=True)
        self._pids, self._chance = pids, chance
        self._until: dict[int, float] = {}
        self.is_over = threading.Event()
        self.count = 0

    def run(self) -> None:
        while not self.is_over.wait(0.05):
            now = time.monotonic()
            for pid in self._pids():
                if is_stopped(pid) and pid not in self._until:
                    self._until[pid] = now + self._chance.uniform(1.3, 2.2) * LEASE_SECONDS
                    self.count += 1
            for pid in [pid for pid, until in self._until.items() if until <= now]:
                del self._until[pid]
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)


def family(workshop: Workshop) -> list[psutil.Process]:
    """The living workers and their children."""
    found = []
    for worker in workshop.workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(worker.pid)
            found += [process, *process.children()]
    return found


@pytest.mark.slow
@pytest.mark.timeout(600 + 3 * KILLS)
def test_nothing_is_lost_and_nothing_done_twice_under_kills_and_pauses(tmp_path: Path, any_database: Database) -> None:
    chance = random.Random(0)
    workshop = Workshop(tmp_path, any_database)
    thawer = Thawer(lambda: [process.pid for process in family(workshop)], random.Random(1))
    poison: set[str] = set()

    def start_worker() -> None:
        workshop.start_worker(lease_seconds=LEASE_SECONDS, max_crashes_without_progress=MAX_CRASHES, log_level="error")

    def submit_what_is_missing() -> None:
        with any_database.read() as session:
            statuses = list(session.scalars(select(JobRow.status)))
        unfinished = sum(not JobStatus(status).is_final for status in statuses)
        for number in range(len(statuses), len(statuses) + UNFINISHED - unfinished):
            is_poison = number % POISON_EVERY == 1
            job = workshop.submit("crash_always" if is_poison else "count")
            if is_poison:
                poison.add(job)

    try:
        for _ in range(WORKERS):
            start_worker()
        thawer.start()
        kills = 0
        while kills < KILLS:
            submit_what_is_missing()
            time.sleep(chance.uniform(0.02, 0.5))
            living = family(workshop)
            workers = [process for process in living if process.pid in {worker.pid for worker in workshop.workers}]
            children = [process for process in living if "training" in command_of(process)]
            is_child = chance.random() < 0.6
            victim = chance.choice((children if is_child else workers) or workers)
            if not is_child and chance.random() < 0.2:
                victim.suspend()
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
                kills += 1
            for worker in [worker for worker in workshop.workers if worker.poll() is not None]:
                workshop.workers.remove(worker)
                start_worker()

        def are_all_over() -> bool:
            with any_database.read() as session:
                return all(JobStatus(status).is_final for status in session.scalars(select(JobRow.status)))

        wait_until(are_all_over, within_seconds=SETTLE_SECONDS)
    finally:
        thawer.is_over.set()
        workshop.close()
    assert thawer.count > KILLS / 20  # how many of those that are frozen are seen so depends on the machine
    look_back(workshop, poison)


def look_back(workshop: Workshop, poison: set[str]) -> None:
    with workshop.database.read() as session:
        jobs = {job.id: job for job in session.scalars(select(JobRow))}
        events = list(session.scalars(select(EventRow).order_by(EventRow.id)))
        models = list(session.scalars(select(ModelRow)))
    told = [(event.job_id, event.fence, event.data["status"]) for event in events if event.event == "status"]

    assert Counter(job.status for id, job in jobs.items() if id not in poison) == {"succeeded": len(jobs) - len(poison)}
    assert {jobs[id].status for id in poison} == {"failed"}
    assert {(jobs[id].error or {})["code"] for id in poison} == {"crash_loop"}
    # Each run has one owner, each job one end, by its newest run, and one model, of that run.
    claims = Counter((job, fence) for job, fence, status in told if status == "running")
    assert set(claims.values()) == {1}
    newest = {job: max(fence for each, fence in claims if each == job) for job in jobs}
    ends = [(job, fence) for job, fence, status in told if JobStatus(status).is_final]
    assert sorted(ends) == sorted(newest.items())
    assert sorted(model.id for model in models) == sorted(f"mdl_{id}_{newest[id]}" for id in jobs if id not in poison)
    # Each run goes on from what the runs before it were told is stored, or further.
    notes = {
        path.name: [int(line) for line in path.read_text().split()] for path in workshop.storage.path("notes").iterdir()
    }
    for job in jobs.keys() - poison:
        stored = 0
        for fence in range(1, newest[job] + 1):
            steps = notes.get(f"{job}-{fence}") or [stored]
            assert steps[0] >= stored, (job, fence)
            stored = max(stored, *steps[1:], 0)
