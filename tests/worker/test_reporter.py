"""What a job says is stored as often as it should be, and what it hears ends it. Only the clock is not real."""

from dataclasses import dataclass

import pytest
from queue_builders import claim_next, claimed, crash, epoch, event_log, find, history, request_cancel
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app.db.engine import Database
from app.jobs import queue
from app.jobs.queue import Claim
from worker.reporter import Cancelled, ClaimLost, Reporter, ShuttingDown
from worker.wakeup import Wakeup


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def shutdown() -> Wakeup:
    return Wakeup()


@pytest.fixture
def claim(database: Database) -> Claim:
    return claimed(database)


@pytest.fixture
def reporter(database: Database, claim: Claim, clock: Clock, shutdown: Wakeup) -> Reporter:
    return Reporter(database, claim, shutdown=shutdown, monotonic=clock)


def fractions_stored(database: Database, claim: Claim) -> list[float]:
    return [event.data["fraction"] for event in event_log(database, claim.job_id) if event.event == "progress"]


def test_progress_is_written_once_a_second_and_told_every_two(
    reporter: Reporter, clock: Clock, database: Database, claim: Claim
) -> None:
    for tenth in range(50):
        clock.now = 100.0 + tenth / 10
        reporter.progress("train", fraction=tenth / 100, epoch=1, epochs=3, images_per_second=400.0, eta_seconds=9.0)

    job = find(database, claim.job_id)
    assert job.ticks == 5
    assert job.progress == {
        "stage": "train",
        "epoch": 1,
        "epochs": 3,
        "fraction": 0.4,
        "images_per_second": 400.0,
        "eta_seconds": 9.0,
    }
    assert fractions_stored(database, claim) == [0.0, 0.2, 0.4]


def test_what_is_known_of_epochs_outlasts_a_stage_and_speed_does_not(
    reporter: Reporter, clock: Clock, database: Database, claim: Claim
) -> None:
    reporter.progress("train", fraction=0.5, epoch=2, epochs=3, images_per_second=400.0)
    clock.now += 1
    reporter.progress("evaluate")

    assert find(database, claim.job_id).progress == {
        "stage": "evaluate",
        "epoch": 2,
        "epochs": 3,
        "fraction": 0.5,
        "images_per_second": None,
        "eta_seconds": None,
    }


def test_ticks_move_the_watchdog_and_nothing_else(
    reporter: Reporter, clock: Clock, database: Database, claim: Claim
) -> None:
    for second in range(3):
        clock.now = 100.0 + second
        reporter.tick()
        reporter.tick()
    job = find(database, claim.job_id)
    assert (job.ticks, job.progress) == (3, None)


def test_epoch_shows_the_latest_progress_whenever_that_was(
    reporter: Reporter, database: Database, claim: Claim
) -> None:
    reporter.progress("train", fraction=0.1, epoch=1, epochs=2)
    reporter.progress("train", fraction=0.5, epoch=1, epochs=2)
    reporter.epoch(epoch(1), metrics={"val_accuracy": 0.5})

    job = find(database, claim.job_id)
    assert job.progress is not None
    assert (job.progress["fraction"], job.metrics) == (0.5, {"val_accuracy": 0.5})
    assert [row.epoch for row in history(database, claim.job_id)] == [1]


def test_a_fraction_never_goes_back(reporter: Reporter, database: Database, claim: Claim) -> None:
    reporter.progress("train", fraction=0.5, epoch=1, epochs=2)
    reporter.epoch(epoch(1), progress={"stage": "train", "epoch": 1, "epochs": 4, "fraction": 0.25})

    progress = find(database, claim.job_id).progress
    assert progress is not None
    assert (progress["fraction"], progress["epochs"]) == (0.5, 4)


def test_cancel_ends_the_work_at_the_next_write(
    reporter: Reporter, clock: Clock, database: Database, claim: Claim
) -> None:
    reporter.progress("train")
    request_cancel(database, claim.job_id)
    clock.now += 1
    with pytest.raises(Cancelled):
        reporter.progress("train")


def test_stop_is_for_the_work_to_heed(reporter: Reporter, clock: Clock, database: Database, claim: Claim) -> None:
    reporter.tick()
    assert not reporter.stop_requested
    with database.write() as session:
        queue.request_stop(session, claim.job_id)
    clock.now += 1
    reporter.tick()
    assert reporter.stop_requested


def test_shutdown_ends_the_work_at_the_next_call_but_lets_it_store_a_checkpoint(
    reporter: Reporter, shutdown: Wakeup, database: Database, claim: Claim
) -> None:
    reporter.tick()
    shutdown.set()
    with pytest.raises(ShuttingDown):
        reporter.tick()
    reporter.checkpoint(7)
    assert find(database, claim.job_id).durable_step == 7


def test_lost_claim_ends_the_work_whatever_it_says(reporter: Reporter, database: Database, claim: Claim) -> None:
    crash(database, claim)
    claim_next(database)
    for say in (
        reporter.tick,
        lambda: reporter.checkpoint(1),
        lambda: reporter.log("Still here."),
        lambda: reporter.epoch(epoch(1)),
    ):
        with pytest.raises(ClaimLost):
            say()


def test_unreachable_database_costs_a_line_of_progress_and_not_the_job(
    reporter: Reporter, clock: Clock, database: Database, claim: Claim
) -> None:
    reporter.progress("train", fraction=0.1)
    with database.write() as session:
        session.execute(text("ALTER TABLE jobs RENAME TO jobs_away"))
    clock.now += 1
    reporter.progress("train", fraction=0.2)
    with database.write() as session:
        session.execute(text("ALTER TABLE jobs_away RENAME TO jobs"))
    clock.now += 1
    reporter.progress("train", fraction=0.3)

    assert fractions_stored(database, claim) == [0.1, 0.3]


def test_final_transaction_is_tried_until_it_is_stored_and_runs_whole_each_time(
    reporter: Reporter, database: Database, claim: Claim
) -> None:
    attempts = 0

    def register(session: Session) -> None:
        nonlocal attempts
        attempts += 1
        queue.record_log(session, claim, "Registered.")
        if attempts == 1:
            raise OperationalError("COMMIT", {}, Exception("connection lost"))
        queue.succeed(session, claim)

    reporter.transaction(register)

    assert attempts == 2
    assert find(database, claim.job_id).status == "succeeded"
    assert [event.data for event in event_log(database, claim.job_id) if event.event == "log"] == [
        {"message": "Registered."}
    ]


def test_shutdown_ends_the_wait_for_an_unreachable_database(
    reporter: Reporter, shutdown: Wakeup, database: Database, claim: Claim
) -> None:
    def fail_while_shutting_down(session: Session) -> None:
        shutdown.set()
        raise OperationalError("COMMIT", {}, Exception("connection lost"))

    with pytest.raises(ShuttingDown):
        reporter.transaction(fail_while_shutting_down)
