"""Several processes, or threads, at one queue: each job is given out once, and each race has one winner."""

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from queue_builders import claim_next, claimed, event_log, find, submit
from sqlalchemy import make_url, text

from app.db import engine
from app.db.engine import Database
from app.db.migrate import upgrade
from app.db.tables import DEFAULT_WORKSPACE
from app.errors import Conflict, Overloaded
from app.jobs import queue
from app.jobs.queue import Cancelled, Claim
from app.jobs.states import JobKind

CLAIMER = Path(__file__).with_name("claimer.py")
JOBS = int(os.environ.get("GRAFT_TEST_CLAIMS", "100"))
PROCESSES = 4 if JOBS <= 100 else 8
RACES = int(os.environ.get("GRAFT_TEST_RACES", "30"))

FREEZES_WITHIN_ITS_CLAIM = """
import os, signal, sys
from app.db import engine
from app.jobs import owner, queue
from app.jobs.states import JobKind
engine.IDLE_IN_TRANSACTION_SECONDS = 2
with engine.Database(sys.argv[1]).write() as session:
    queue.claim_next(session, kind=JobKind.training, worker_id="w1", owner=owner.current_process())
    print("claimed", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
"""


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


def test_a_process_frozen_within_a_transaction_holds_nobody_up_for_long(empty_postgres_url: Callable[[], str]) -> None:
    url = empty_postgres_url()
    upgrade(url)
    database = Database(url).within(DEFAULT_WORKSPACE)
    for _ in range(3):
        submit(database)
    claim_next(database)  # so that there is a row that says whose turn it is
    frozen = subprocess.Popen(
        [sys.executable, "-c", FREEZES_WITHIN_ITS_CLAIM, url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert frozen.stdout is not None
    assert frozen.stdout.readline() == "claimed\n"
    with ThreadPoolExecutor(1) as pool:
        try:
            assert pool.submit(claim_next, database, worker_id="w2").result(timeout=15) is not None
        finally:
            frozen.send_signal(signal.SIGCONT)
            said = frozen.communicate(timeout=30)[1]
    assert "app.errors.Overloaded: The database does not answer" in said
    database.dispose()


def test_who_waits_for_a_row_for_too_long_is_told_to_come_again(
    empty_postgres_url: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "LOCK_TIMEOUT_SECONDS", 1)
    url = empty_postgres_url()
    upgrade(url)
    first, second = Database(url), Database(url)
    lock = text("SELECT id FROM workspaces FOR UPDATE")
    with first.write() as session:
        session.execute(lock)
        with pytest.raises(Overloaded, match="is busy"), second.write() as waiting:
            waiting.execute(lock)
    first.dispose()
    second.dispose()


def test_what_the_url_says_of_waiting_goes_before(postgres_url: str) -> None:
    options = "-c lock_timeout=5000 -c search_path=ours"
    url = make_url(postgres_url).update_query_dict({"options": options}).render_as_string(hide_password=False)
    database = Database(url)
    with database.read() as session:
        shown = [
            session.scalar(text(f"SHOW {name}"))
            for name in ("lock_timeout", "search_path", "idle_in_transaction_session_timeout")
        ]
    assert shown == ["5s", "ours", "25s"]
    database.dispose()
