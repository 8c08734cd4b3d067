"""Several processes, or threads, at one queue: each job is given out once, and each race has one winner."""

import os
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from queue_builders import claim_next, claimed, event_log, find

from app.db.engine import Database
from app.errors import Conflict
from app.jobs import queue
from app.jobs.queue import Cancelled, Claim
from app.jobs.states import JobKind

CLAIMER = Path(__file__).with_name("claimer.py")
JOBS = int(os.environ.get("GRAFT_TEST_CLAIMS", "100"))
PROCESSES = 4 if JOBS <= 100 else 8
RACES = int(os.environ.get("GRAFT_TEST_RACES", "30"))


def url_of(database: Database) -> str:
    return database.engine.url.render_as_string(hide_password=False)


@pytest.mark.timeout(300 + JOBS / 5)
def test_processes_racing_for_jobs_get_each_one_once(any_database: Database) -> None:
    with any_database.write() as session:
        jobs = [queue.submit(session, kind=JobKind.training, dataset_id="ds_1", spec={}).id for _ in range(JOBS)]
    claimers = [
        subprocess.Popen(
            [sys.executable, CLAIMER, url_of(any_database)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(PROCESSES)
    ]
    for claimer in claimers:
        assert claimer.stdout is not None
        assert claimer.stdout.readline() == "ready\n"

    for claimer in claimers:
        assert claimer.stdin is not None
        claimer.stdin.write("go\n")
        claimer.stdin.flush()
    with ThreadPoolExecutor(PROCESSES) as pool:
        told = list(pool.map(lambda claimer: claimer.communicate(timeout=60 + JOBS / 10)[0], claimers))
    claims = [claim for each in told for claim in each.split()]

    assert [claimer.returncode for claimer in claimers] == [0] * PROCESSES
    assert Counter(claims) == Counter(f"{job}/1" for job in jobs)


def test_cancel_racing_with_success_has_one_winner_and_both_know_it(any_database: Database) -> None:
    def succeed(claim: Claim) -> str:
        both_ready.wait(timeout=30)
        try:
            with any_database.write() as session:
                queue.succeed(session, claim, model_id="mdl_1")
            return "succeeded"
        except Cancelled:
            with any_database.write() as session:
                return queue.finish_cancelled(session, claim)

    def cancel(claim: Claim) -> str:
        both_ready.wait(timeout=30)
        try:
            with any_database.write() as session:
                queue.request_cancel(session, claim.job_id)
            return "cancelled"
        except Conflict:
            return "succeeded"

    both_ready = threading.Barrier(2)
    with ThreadPoolExecutor(2) as threads:
        for _ in range(RACES):
            claim = claimed(any_database)
            beliefs = threads.submit(succeed, claim), threads.submit(cancel, claim)
            outcome = find(any_database, claim.job_id).status if all(b.exception() is None for b in beliefs) else ""

            assert [belief.result() for belief in beliefs] == [outcome, outcome]
            finals = [event.data["status"] for event in event_log(any_database, claim.job_id) if event.is_final]
            assert finals == [outcome]


def test_observers_racing_for_a_dead_worker_s_job_count_its_crash_once(any_database: Database) -> None:
    def reclaim(claim: Claim) -> bool:
        all_ready.wait(timeout=30)
        with any_database.write() as session:
            return queue.reclaim(session, claim.job_id, claim.fence, 0, max_crashes=1000) is not None

    all_ready = threading.Barrier(3)
    with ThreadPoolExecutor(3) as threads:
        claim: Claim | None = claimed(any_database)
        for crashes in range(1, RACES + 1):
            assert claim is not None
            assert sorted(threads.map(reclaim, [claim] * 3)) == [False, False, True]
            assert find(any_database, claim.job_id).crashes == crashes
            claim = claim_next(any_database)
