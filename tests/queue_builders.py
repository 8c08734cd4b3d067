"""Jobs in every state, for tests of the queue and of the worker."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from app.db.engine import Database
from app.db.tables import EpochRow, EventRow, JobRow
from app.jobs import events, owner, queue
from app.jobs.queue import Claim
from app.jobs.states import JobKind, JobStatus

MAX_CRASHES = 3
ERROR = {"code": "diverged", "detail": "The loss is not a number."}


def submit(database: Database, *, kind: JobKind = JobKind.training, dataset_id: str = "ds_1", **spec: Any) -> str:
    with database.write() as session:
        return queue.submit(session, kind=kind, dataset_id=dataset_id, spec=spec).id


def claim_next(database: Database, *, kind: JobKind = JobKind.training, worker_id: str = "w1") -> Claim | None:
    with database.write() as session:
        return queue.claim_next(session, kind=kind, worker_id=worker_id, owner=owner.current_process())


def claimed(database: Database, *, kind: JobKind = JobKind.training, dataset_id: str = "ds_1") -> Claim:
    """A fresh job, running. Only for databases whose queue is empty."""
    submit(database, kind=kind, dataset_id=dataset_id)
    claim = claim_next(database, kind=kind)
    assert claim is not None
    return claim


def crash(database: Database, claim: Claim) -> JobStatus:
    with database.write() as session:
        return queue.crashed(session, claim, "It crashed.", max_crashes=MAX_CRASHES)


def request_cancel(database: Database, job_id: str) -> None:
    with database.write() as session:
        queue.request_cancel(session, job_id)


def find(database: Database, job_id: str, *, kind: JobKind = JobKind.training) -> JobRow:
    with database.read() as session:
        return queue.find(session, job_id, kind=kind)


@contextmanager
def write_locked(database: Database) -> Iterator[None]:
    """Nobody else can write meanwhile (on SQLite)."""
    with database.write() as session:
        session.connection()  # a transaction begins with its first statement
        yield


def event_log(database: Database, job_id: str) -> list[EventRow]:
    with database.read() as session:
        return events.read_after(session, job_id, 0, 10_000)


def statuses(database: Database, job_id: str) -> list[str]:
    """Every status the job has had, in order."""
    return [event.data["status"] for event in event_log(database, job_id) if event.event == "status"]


def history(database: Database, job_id: str) -> list[EpochRow]:
    with database.read() as session:
        return queue.history(session, job_id)


def epoch(number: int, *, val_accuracy: float = 0.5) -> dict[str, Any]:
    return {
        "epoch": number,
        "train_loss": 1.0,
        "train_accuracy": 0.4,
        "val_loss": 1.1,
        "val_accuracy": val_accuracy,
        "learning_rate": 0.001,
        "seconds": 2.0,
    }


@dataclass(frozen=True)
class Snapshot:
    """All that the queue keeps of a job."""

    job: dict[str, Any] | None
    events: list[dict[str, Any]]
    epochs: list[dict[str, Any]]


def snapshot(database: Database, job_id: str) -> Snapshot:
    with database.read() as session:
        job = session.query(JobRow).filter(JobRow.id == job_id).one_or_none()
        return Snapshot(
            job=None if job is None else _columns(job),
            events=[_columns(row) for row in events.read_after(session, job_id, 0, 10_000)],
            epochs=[_columns(row) for row in queue.history(session, job_id)],
        )


def _columns(row: Any) -> dict[str, Any]:
    return {column.key: getattr(row, column.key) for column in row.__table__.columns}
