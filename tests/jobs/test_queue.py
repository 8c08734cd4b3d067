"""The queue's promises, one by one, on a real database."""

from collections.abc import Callable
from typing import Any

import pytest
from queue_builders import (
    ERROR,
    MAX_CRASHES,
    claim_next,
    claimed,
    crash,
    epoch,
    event_log,
    find,
    history,
    request_cancel,
    snapshot,
    statuses,
    submit,
    write_locked,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.db.engine import Database
from app.db.tables import DEFAULT_WORKSPACE, WorkspaceRow
from app.errors import Conflict, InvalidRequest, NotFound
from app.jobs import events, owner, queue
from app.jobs.events import KEPT_PROGRESS_EVENTS
from app.jobs.queue import Cancelled, Claim, ClaimLost, Signal
from app.jobs.states import JobKind, JobStatus

# Submitting and claiming


def test_submitted_job_is_queued_for_its_first_attempt(database: Database) -> None:
    job = find(database, submit(database, epochs=3))

    assert (job.status, job.attempt, job.fence, job.spec) == ("queued", 1, 0, {"epochs": 3})
    assert [(event.event, event.data) for event in event_log(database, job.id)] == [
        ("status", {"status": "queued", "attempt": 1})
    ]


def test_claim_takes_the_oldest_job_and_shows_who_has_it(database: Database) -> None:
    older, newer = submit(database, epochs=1), submit(database)

    claim = claim_next(database, worker_id="w7")

    assert claim == Claim(older, 1, DEFAULT_WORKSPACE, JobKind.training, "ds_1", {"epochs": 1}, attempt=1)
    job = find(database, older)
    assert (job.status, job.worker_id, job.owner) == ("running", "w7", owner.current_process())
    assert job.started_at is not None
    assert find(database, newer).status == "queued"


def test_a_workspace_with_many_jobs_makes_another_wait_for_one_of_them(any_database: Database) -> None:
    with any_database.write() as session:
        session.add(WorkspaceRow(id="ws_late", name="late"))
    late, everybodys = any_database.within("ws_late"), any_database.within(None)
    many = [submit(any_database) for _ in range(5)]
    first = claim_next(everybodys)
    few = [submit(late) for _ in range(2)]

    with late.read() as session:
        assert [queue.queue_position(session, queue.find(session, job)) for job in few] == [1, 3]
    taken = [claim_next(everybodys) for _ in range(6)]

    assert [claim and claim.job_id for claim in (first, *taken)] == [many[0], few[0], many[1], few[1], *many[2:]]


def test_a_job_that_was_given_back_goes_on_before_another_workspace_begins(any_database: Database) -> None:
    with any_database.write() as session:
        session.add(WorkspaceRow(id="ws_late", name="late"))
    everybodys = any_database.within(None)
    begun = claimed(any_database)
    submit(any_database.within("ws_late"))

    for give_up in (queue.give_back, lambda session, claim: queue.crashed(session, claim, "", max_crashes=MAX_CRASHES)):
        with everybodys.write() as session:
            give_up(session, begun)
        again = claim_next(everybodys)
        assert again is not None and again.job_id == begun.job_id
        begun = again


def test_turns_are_taken_for_each_kind_of_job(any_database: Database) -> None:
    with any_database.write() as session:
        session.add(WorkspaceRow(id="ws_late", name="late"))
    everybodys = any_database.within(None)
    claimed(any_database, kind=JobKind.ingest)
    ours, theirs = submit(any_database), submit(any_database.within("ws_late"))

    assert [claim and claim.job_id for claim in (claim_next(everybodys), claim_next(everybodys))] == [ours, theirs]


def test_second_worker_gets_nothing_while_the_only_job_runs(database: Database) -> None:
    claimed(database)
    assert claim_next(database, worker_id="w2") is None


def test_kinds_do_not_wait_for_each_other(database: Database) -> None:
    training, ingest = submit(database), submit(database, kind=JobKind.ingest)

    with database.read() as session:
        assert queue.queued_kinds(session) == {JobKind.training, JobKind.ingest}
    claims = [claim_next(database, kind=kind) for kind in (JobKind.ingest, JobKind.training)]
    assert [claim and claim.job_id for claim in claims] == [ingest, training]
    with database.read() as session:
        assert queue.queued_kinds(session) == set()


def test_idle_worker_looks_without_waiting_for_a_writer(database: Database) -> None:
    with write_locked(database), database.read() as session:
        assert queue.queued_kinds(session) == set()
        assert queue.running_leases(session) == []


def test_claim_survives_the_way_to_the_child(database: Database) -> None:
    claim = claimed(database)
    assert Claim.from_dict(claim.to_dict()) == claim


# What the owner reports


def test_beat_renews_the_lease_and_says_what_is_asked(database: Database) -> None:
    claim = claimed(database)
    with database.write() as session:
        queue.record_log(session, claim, "Loading weights.")
        queue.request_stop(session, claim.job_id)
        queue.request_cancel(session, claim.job_id)
    with database.write() as session:
        assert queue.beat(session, claim) == queue.Beat(lost=False, cancel_requested=True, stop_requested=True, ticks=1)
    assert find(database, claim.job_id).beat == 1


def test_progress_is_shown_and_becomes_an_event_when_asked(database: Database) -> None:
    claim = claimed(database)
    with database.write() as session:
        quiet = queue.record_progress(session, claim, {"fraction": 0.1}, event=False)
        queue.record_progress(session, claim, {"fraction": 0.2}, event=True)

    assert quiet == Signal(cancel_requested=False, stop_requested=False)
    job = find(database, claim.job_id)
    assert (job.progress, job.ticks) == ({"fraction": 0.2}, 2)
    assert [event.data for event in event_log(database, claim.job_id) if event.event == "progress"] == [
        {"fraction": 0.2}
    ]


def test_old_progress_events_are_dropped_and_nothing_else_is(database: Database) -> None:
    claim = claimed(database)
    with database.write() as session:
        queue.record_log(session, claim, "Loading weights.")
        for number in range(KEPT_PROGRESS_EVENTS + 3):
            queue.record_progress(session, claim, {"number": number}, event=True)

    kept = event_log(database, claim.job_id)
    assert [event.event for event in kept if event.event != "progress"] == ["status", "status", "log"]
    assert [event.data["number"] for event in kept if event.event == "progress"] == list(
        range(3, KEPT_PROGRESS_EVENTS + 3)
    )


def test_epochs_of_an_earlier_attempt_are_replaced_from_where_the_next_one_begins(database: Database) -> None:
    first = claimed(database)
    with database.write() as session:
        for number in (1, 2, 3):
            queue.record_epoch(session, first, epoch(number, val_accuracy=0.1), {"epoch": number})
    crash(database, first)
    second = claim_next(database)
    assert second is not None
    with database.write() as session:
        queue.record_epoch(session, second, epoch(2, val_accuracy=0.9), {"epoch": 2}, metrics={"val_accuracy": 0.9})

    assert [(row.epoch, row.val_accuracy) for row in history(database, first.job_id)] == [(1, 0.1), (2, 0.9)]
    job = find(database, first.job_id)
    assert (job.progress, job.metrics) == ({"epoch": 2}, {"val_accuracy": 0.9})
    assert [event.data["epoch"] for event in event_log(database, first.job_id) if event.event == "epoch"] == [
        1,
        2,
        3,
        2,
    ]


def test_durable_step_never_goes_back(database: Database) -> None:
    claim = claimed(database)
    with database.write() as session:
        queue.record_checkpoint(session, claim, 20)
        queue.record_checkpoint(session, claim, 10)
    assert find(database, claim.job_id).durable_step == 20


def test_events_are_read_on_from_the_last_one_seen(database: Database) -> None:
    claim = claimed(database)
    with database.write() as session:
        for number in range(3):
            queue.record_log(session, claim, f"Line {number}.")

    queued, running, first, second, third = event_log(database, claim.job_id)
    with database.read() as session:
        page = events.read_after(session, claim.job_id, running.id, 2)
        rest = events.read_after(session, claim.job_id, page[-1].id, 2)
    assert [event.id for event in page] == [first.id, second.id]
    assert [event.id for event in rest] == [third.id]
    assert [queued.fence, running.fence, third.fence] == [0, 1, 1]


# Ends


def test_success_stores_the_model_and_tells_it_before_the_end(database: Database) -> None:
    claim = claimed(database)
    with database.write() as session:
        queue.record_progress(session, claim, {"stage": "train", "epoch": 5, "fraction": 0.9}, event=False)
        queue.succeed(session, claim, model_id="mdl_1", metrics={"val_accuracy": 0.9})

    job = find(database, claim.job_id)
    assert (job.status, job.model_id, job.metrics, job.worker_id, job.owner) == (
        "succeeded",
        "mdl_1",
        {"val_accuracy": 0.9},
        None,
        None,
    )
    assert job.progress == {"stage": "done", "epoch": 5, "fraction": 1.0, "eta_seconds": 0.0}
    assert job.finished_at is not None
    assert [(event.event, event.data, event.is_final) for event in event_log(database, claim.job_id)[-2:]] == [
        ("model", {"model": "mdl_1", "metrics": {"val_accuracy": 0.9}}, False),
        ("status", {"status": "succeeded", "model": "mdl_1"}, True),
    ]


def test_failure_keeps_its_reason(database: Database) -> None:
    claim = claimed(database)
    with database.write() as session:
        assert queue.fail(session, claim, ERROR) is JobStatus.failed
    assert find(database, claim.job_id).error == ERROR
    assert event_log(database, claim.job_id)[-1].data == {"status": "failed", "error": ERROR}


def test_job_given_back_has_had_no_further_attempt(database: Database) -> None:
    claim = claimed(database)
    with database.write() as session:
        assert queue.give_back(session, claim) is JobStatus.queued
    job = find(database, claim.job_id)
    assert (job.attempt, job.crashes, job.owner) == (1, 0, None)


def test_crashed_job_is_queued_again_for_its_next_attempt(database: Database) -> None:
    claim = claimed(database)
    assert crash(database, claim) is JobStatus.queued

    job = find(database, claim.job_id)
    assert (job.status, job.attempt, job.crashes) == ("queued", 2, 1)
    assert event_log(database, claim.job_id)[-1].data == {
        "status": "queued",
        "attempt": 2,
        "reason": "It crashed.",
    }
    again = claim_next(database)
    assert again is not None
    assert (again.fence, again.attempt) == (2, 2)


def test_job_that_crashes_three_times_without_a_checkpoint_fails(database: Database) -> None:
    claim = claimed(database)
    outcomes = [crash(database, claim)]
    for _ in range(MAX_CRASHES - 1):
        again = claim_next(database)
        assert again is not None
        outcomes.append(crash(database, again))

    assert outcomes == ["queued", "queued", "failed"]
    job = find(database, claim.job_id)
    assert job.error is not None
    assert job.error["code"] == "crash_loop"
    assert job.error["detail"].endswith("The last time: It crashed.")
    assert job.attempt == 3


def test_job_that_gets_further_between_crashes_is_healthy(database: Database) -> None:
    job_id = submit(database)
    for step in range(10):
        claim = claim_next(database)
        assert claim is not None
        with database.write() as session:
            queue.record_checkpoint(session, claim, step + 1)
        crash(database, claim)

    job = find(database, job_id)
    assert (job.status, job.crashes, job.attempt) == ("queued", 0, 11)


def test_reclaim_needs_the_very_beat_that_was_seen(database: Database) -> None:
    claim = claimed(database)
    with database.write() as session:
        queue.beat(session, claim)
    with database.write() as session:
        assert queue.reclaim(session, claim.job_id, claim.fence, 0, max_crashes=MAX_CRASHES) is None
    assert find(database, claim.job_id).status == "running"
    with database.write() as session:
        assert queue.reclaim(session, claim.job_id, claim.fence, 1, max_crashes=MAX_CRASHES) is JobStatus.queued
    assert statuses(database, claim.job_id) == ["queued", "running", "queued"]


# Cancel and stop


def test_queued_job_is_cancelled_at_once(database: Database) -> None:
    job_id = submit(database)
    request_cancel(database, job_id)

    assert find(database, job_id).status == "cancelled"
    assert find(database, job_id).finished_at is not None
    assert statuses(database, job_id) == ["queued", "cancelled"]
    assert claim_next(database) is None


def test_running_job_is_cancelled_by_its_owner(database: Database) -> None:
    claim = claimed(database)
    request_cancel(database, claim.job_id)
    request_cancel(database, claim.job_id)
    assert find(database, claim.job_id).status == "running"

    with database.write() as session:
        assert queue.tick(session, claim).cancel_requested
        queue.finish_cancelled(session, claim)
    assert statuses(database, claim.job_id) == ["queued", "running", "cancelled"]


def test_success_after_a_cancel_is_refused_and_nothing_of_it_stays(database: Database) -> None:
    claim = claimed(database)
    request_cancel(database, claim.job_id)
    before = snapshot(database, claim.job_id)

    with pytest.raises(Cancelled), database.write() as session:
        queue.record_log(session, claim, "Registered.")
        queue.succeed(session, claim, model_id="mdl_1")
    assert snapshot(database, claim.job_id) == before


def give_back(session: Session, claim: Claim) -> JobStatus:
    return queue.give_back(session, claim)


def crashed(session: Session, claim: Claim) -> JobStatus:
    return queue.crashed(session, claim, "It crashed.", max_crashes=MAX_CRASHES)


def fail(session: Session, claim: Claim) -> JobStatus:
    return queue.fail(session, claim, ERROR)


def reclaimed(session: Session, claim: Claim) -> JobStatus | None:
    return queue.reclaim(session, claim.job_id, claim.fence, 0, max_crashes=MAX_CRASHES)


@pytest.mark.parametrize("end", [give_back, crashed, fail, reclaimed])
def test_cancel_wins_over_every_end_but_success(
    database: Database, end: Callable[[Session, Claim], JobStatus | None]
) -> None:
    claim = claimed(database)
    request_cancel(database, claim.job_id)
    with database.write() as session:
        assert end(session, claim) is JobStatus.cancelled
    assert statuses(database, claim.job_id)[-1] == "cancelled"


def test_nobody_cancels_a_job_unasked(database: Database) -> None:
    claim = claimed(database)
    with pytest.raises(ClaimLost), database.write() as session:
        queue.finish_cancelled(session, claim)
    assert find(database, claim.job_id).status == "running"


def test_ended_job_can_be_neither_cancelled_nor_stopped(database: Database) -> None:
    claim = claimed(database)
    with database.write() as session:
        queue.succeed(session, claim)

    with pytest.raises(Conflict, match="ended as succeeded") as cancel, database.write() as session:
        queue.request_cancel(session, claim.job_id)
    with pytest.raises(Conflict, match="succeeded") as stop, database.write() as session:
        queue.request_stop(session, claim.job_id)
    assert (cancel.value.code, stop.value.code) == ("job-finished", "job-not-running")


def test_queued_job_cannot_be_stopped(database: Database) -> None:
    job_id = submit(database)
    with pytest.raises(Conflict, match="queued"), database.write() as session:
        queue.request_stop(session, job_id)


def test_stop_is_still_known_after_a_crash(database: Database) -> None:
    claim = claimed(database)
    with database.write() as session:
        queue.request_stop(session, claim.job_id)
    crash(database, claim)
    again = claim_next(database)
    assert again is not None
    with database.write() as session:
        assert queue.tick(session, again).stop_requested


# A worker that lost its claim


STALE_WRITES: dict[str, Callable[[Session, Claim], Any]] = {
    "tick": queue.tick,
    "record_progress": lambda session, claim: queue.record_progress(session, claim, {"fraction": 1}, event=True),
    "record_epoch": lambda session, claim: queue.record_epoch(session, claim, epoch(1), {}),
    "record_checkpoint": lambda session, claim: queue.record_checkpoint(session, claim, 99),
    "record_log": lambda session, claim: queue.record_log(session, claim, "Still here."),
    "succeed": lambda session, claim: queue.succeed(session, claim, model_id="mdl_stale"),
    "fail": fail,
    "finish_cancelled": queue.finish_cancelled,
    "give_back": give_back,
    "crashed": crashed,
}


@pytest.mark.parametrize("write", STALE_WRITES.values(), ids=STALE_WRITES)
@pytest.mark.parametrize("successor", ["none yet", "running", "asked to cancel", "ended"])
def test_stale_worker_writes_nothing(
    database: Database, write: Callable[[Session, Claim], Any], successor: str
) -> None:
    stale = claimed(database)
    crash(database, stale)
    if successor != "none yet":
        current = claim_next(database, worker_id="w2")
        assert current is not None
        if successor == "asked to cancel":
            request_cancel(database, stale.job_id)
        if successor == "ended":
            with database.write() as session:
                queue.succeed(session, current, model_id="mdl_1")
    before = snapshot(database, stale.job_id)

    with pytest.raises(ClaimLost), database.write() as session:
        write(session, stale)
    assert snapshot(database, stale.job_id) == before


def test_stale_worker_learns_it_from_its_heartbeat(database: Database) -> None:
    stale = claimed(database)
    crash(database, stale)
    current = claim_next(database, worker_id="w2")
    assert current is not None

    with database.write() as session:
        assert queue.beat(session, stale) == queue.Beat(lost=True)
        assert queue.reclaim(session, stale.job_id, stale.fence, 0, max_crashes=MAX_CRASHES) is None
    assert find(database, stale.job_id).beat == 0


def test_database_itself_refuses_a_second_final_event(database: Database) -> None:
    claim = claimed(database)
    with database.write() as session:
        queue.succeed(session, claim)
    with pytest.raises(IntegrityError), database.write() as session:
        events.append(session, claim.job_id, claim.fence, "status", {"status": "failed"}, is_final=True)


# Looking, listing, deleting


def test_ingest_is_not_among_the_jobs(database: Database) -> None:
    ingest, training = submit(database, kind=JobKind.ingest), submit(database)

    with database.read() as session:
        assert [job.id for job in queue.list_jobs(session, limit=10)] == [training]
        with pytest.raises(NotFound):
            queue.find(session, ingest)
    with pytest.raises(NotFound), database.write() as session:
        queue.request_cancel(session, ingest)
    with pytest.raises(NotFound), database.write() as session:
        queue.delete(session, ingest)


def test_jobs_are_listed_newest_first_in_pages(database: Database) -> None:
    ids = [submit(database) for _ in range(5)]
    with database.read() as session:
        first = [job.id for job in queue.list_jobs(session, limit=2)]
        second = [job.id for job in queue.list_jobs(session, limit=2, after=first[-1])]
        third = [job.id for job in queue.list_jobs(session, limit=2, after=second[-1])]
        with pytest.raises(InvalidRequest, match="after"):
            queue.list_jobs(session, limit=2, after="job_unknown")
    assert first + second + third == ids[::-1]


def test_jobs_are_found_by_status_data_set_and_method(database: Database) -> None:
    with database.write() as session:
        ids = [
            queue.submit(session, kind=JobKind.training, dataset_id=dataset, method=method, spec={}).id
            for dataset in ("ds_1", "ds_2")
            for method in ("fine_tuning", "from_scratch")
        ]
    claim_next(database)
    with database.read() as session:

        def listed(**filters: Any) -> list[str]:
            return [job.id for job in queue.list_jobs(session, limit=10, **filters)]

        assert listed(status=JobStatus.running) == [ids[0]]
        assert listed(dataset="ds_2") == [ids[3], ids[2]]
        assert listed(dataset="ds_2", method="fine_tuning") == [ids[2]]
        assert queue.count_by_status(session) == {
            "queued": 3,
            "running": 1,
            "succeeded": 0,
            "failed": 0,
            "cancelled": 0,
        }


def test_queue_position_counts_those_ahead_of_the_same_kind(database: Database) -> None:
    running = claimed(database)
    submit(database, kind=JobKind.ingest)
    first, second = submit(database), submit(database)
    with database.read() as session:
        positions = [queue.queue_position(session, queue.find(session, id)) for id in (running.job_id, first, second)]
    assert positions == [None, 1, 2]


def test_data_set_is_needed_until_its_last_training_job_has_ended(database: Database) -> None:
    def is_needed(dataset_id: str = "ds_1") -> bool:
        with database.read() as session:
            return queue.needs_dataset(session, dataset_id)

    submit(database, kind=JobKind.ingest)
    assert not is_needed()
    claim = claimed(database)
    assert is_needed()
    assert not is_needed("ds_2")
    crash(database, claim)
    assert is_needed()
    request_cancel(database, claim.job_id)
    assert not is_needed()


def test_ingest_progress_is_that_of_data_sets_being_checked(database: Database) -> None:
    running = claimed(database, kind=JobKind.ingest)
    submit(database, kind=JobKind.ingest, dataset_id="ds_2")
    training = claimed(database, dataset_id="ds_3")

    def progress() -> dict[str, Any]:
        with database.read() as session:
            return queue.ingest_progress(session, ["ds_1", "ds_2", "ds_3"])

    with database.write() as session:
        queue.record_progress(session, running, {"fraction": 0.1}, event=False)
        queue.record_progress(session, training, {"fraction": 0.2}, event=False)
    assert progress() == {"ds_1": {"fraction": 0.1}}
    with database.write() as session:
        queue.succeed(session, running)
    assert progress() == {}


def test_ingest_is_cancelled_with_its_data_set_in_whatever_state(database: Database) -> None:
    running = claimed(database, kind=JobKind.ingest)
    queued = submit(database, kind=JobKind.ingest)
    other = submit(database, kind=JobKind.ingest, dataset_id="ds_2")
    training = submit(database)
    with database.write() as session:
        queue.cancel_ingest(session, "ds_1")

    assert find(database, queued, kind=JobKind.ingest).status == "cancelled"
    assert find(database, running.job_id, kind=JobKind.ingest).cancel_requested
    assert find(database, other, kind=JobKind.ingest).status == "queued"
    assert find(database, training).status == "queued"


def test_only_an_ended_job_is_deleted_with_all_that_is_told_of_it(database: Database) -> None:
    claim = claimed(database)
    with pytest.raises(Conflict, match="running") as refusal, database.write() as session:
        queue.delete(session, claim.job_id)
    assert refusal.value.code == "job-not-finished"

    with database.write() as session:
        queue.record_epoch(session, claim, epoch(1), {})
        queue.succeed(session, claim)
    with database.write() as session:
        queue.delete(session, claim.job_id)

    with pytest.raises(NotFound):
        find(database, claim.job_id)
    assert event_log(database, claim.job_id) == []
    assert history(database, claim.job_id) == []


def test_unfinished_jobs_of_both_kinds_are_known(database: Database) -> None:
    ended = claimed(database)
    with database.write() as session:
        queue.succeed(session, ended)
    expected = {claimed(database).job_id, submit(database), submit(database, kind=JobKind.ingest)}
    with database.read() as session:
        assert queue.unfinished_ids(session) == expected
