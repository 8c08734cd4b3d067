"""The drawing in docs/job-states.md, the table in states.py and what queue.py does are one and the same."""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from queue_builders import ERROR, MAX_CRASHES, claim_next, claimed, crash, find, request_cancel, submit
from sqlalchemy.orm import Session

from app.db.engine import Database
from app.db.migrate import upgrade
from app.db.tables import DEFAULT_WORKSPACE
from app.errors import Conflict, NotFound
from app.jobs import owner, queue
from app.jobs.queue import Cancelled, Claim, ClaimLost
from app.jobs.states import FOLLOWERS, JobKind, JobStatus

Move = tuple[str, str, str]  # from, to, by

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "job-states.md"


def documented_moves() -> set[Move]:
    return set(re.findall(r"^\| (\w+) \| (\w+) \| `(\w+)` \|", DOCUMENT.read_text(), re.MULTILINE))


def queued(database: Database) -> Claim:
    return Claim(submit(database), 0, DEFAULT_WORKSPACE, JobKind.training, "ds_1", {}, attempt=1)


def running_and_asked_to_cancel(database: Database) -> Claim:
    claim = claimed(database)
    request_cancel(database, claim.job_id)
    return claim


def running_for_the_last_time(database: Database) -> Claim:
    claim: Claim | None = claimed(database)
    for _ in range(MAX_CRASHES - 1):
        assert claim is not None
        crash(database, claim)
        claim = claim_next(database)
    assert claim is not None
    return claim


def ended(end: Callable[[Session, Claim], object]) -> Callable[[Database], Claim]:
    def build(database: Database) -> Claim:
        claim = claimed(database)
        with database.write() as session:
            end(session, claim)
        return claim

    return build


def cancelled(database: Database) -> Claim:
    claim = running_and_asked_to_cancel(database)
    with database.write() as session:
        queue.finish_cancelled(session, claim)
    return claim


STATES: list[Callable[[Database], Claim]] = [
    queued,
    claimed,
    running_and_asked_to_cancel,
    running_for_the_last_time,
    ended(lambda session, claim: queue.succeed(session, claim)),
    ended(lambda session, claim: queue.fail(session, claim, ERROR)),
    cancelled,
]

FUNCTIONS: dict[str, Callable[[Session, Claim], object]] = {
    "claim_next": lambda session, claim: queue.claim_next(
        session, kind=JobKind.training, worker_id="w", owner=owner.current_process()
    ),
    "request_cancel": lambda session, claim: queue.request_cancel(session, claim.job_id),
    "request_stop": lambda session, claim: queue.request_stop(session, claim.job_id),
    "cancel_ingest": lambda session, claim: queue.cancel_ingest(session, claim.dataset_id),
    "beat": queue.beat,
    "tick": queue.tick,
    "record_progress": lambda session, claim: queue.record_progress(session, claim, {}, event=True),
    "record_checkpoint": lambda session, claim: queue.record_checkpoint(session, claim, 0),
    "record_log": lambda session, claim: queue.record_log(session, claim, "A line."),
    "succeed": queue.succeed,
    "fail": lambda session, claim: queue.fail(session, claim, ERROR),
    "finish_cancelled": queue.finish_cancelled,
    "give_back": queue.give_back,
    "crashed": lambda session, claim: queue.crashed(session, claim, "It crashed.", max_crashes=MAX_CRASHES),
    "reclaim": lambda session, claim: queue.reclaim(session, claim.job_id, claim.fence, 0, max_crashes=MAX_CRASHES),
}


@pytest.fixture(scope="module")
def moves(tmp_path_factory: pytest.TempPathFactory) -> Iterator[set[Move]]:
    """Every change of status that any function makes in any state."""
    from_queue = set()
    path = tmp_path_factory.mktemp("states")
    database = Database(f"sqlite:///{path / 'graft.db'}").within(DEFAULT_WORKSPACE)
    upgrade(str(database.engine.url))
    for build in STATES:
        for name, function in FUNCTIONS.items():
            claim = build(database)
            before = find(database, claim.job_id).status
            with suppress(ClaimLost, Cancelled, Conflict, NotFound), database.write() as session:
                function(session, claim)
            after = find(database, claim.job_id).status
            if before != after:
                from_queue.add((before, after, name))
            empty_queue(database, claim.job_id)
    yield from_queue
    database.dispose()


def empty_queue(database: Database, job_id: str) -> None:
    """Ends the job, whatever it does, so that the next test's claim cannot take it."""
    with suppress(Conflict):
        request_cancel(database, job_id)


def test_the_document_says_what_the_queue_does(moves: set[Move]) -> None:
    assert documented_moves() == moves


def test_states_say_which_status_may_follow_which(moves: set[Move]) -> None:
    allowed = {(start, end) for start, followers in FOLLOWERS.items() for end in followers}
    assert {(start, end) for start, end, _ in moves} == allowed


def test_the_drawing_names_every_function_that_moves_a_job(moves: set[Move]) -> None:
    drawing = DOCUMENT.read_text().split("```")[1]
    assert {name for _, _, name in moves if name not in drawing} == set()
    assert {status for status in JobStatus if status not in drawing} == set()


def test_final_states_are_those_with_no_way_out() -> None:
    assert {status for status in JobStatus if status.is_final} == {"succeeded", "failed", "cancelled"}
    assert {status for status in JobStatus if status.is_cancellable} == {"queued", "running"}
