"""What happened to a job, in order: for polling, and for streams that resume where they were cut.

Ids of one job's events grow in the order of their commits: each is appended after its transaction's guarded update of
the job, which makes other writers of that job wait. So a reader who has seen id n never misses one below n.
"""

from collections.abc import Collection
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import delete, exists, select
from sqlalchemy.orm import Session

from app.db.tables import EventRow, JobRow

EventKind = Literal["status", "progress", "epoch", "log", "model"]

# Progress is superseded by the next progress, so only the newest are kept: a month-long job has as many rows as a
# short one. Everything else stays while the job runs, and as long after its end as the operator says.
KEPT_PROGRESS_EVENTS = 200


def append(
    session: Session, job_id: str, fence: int, event: EventKind, data: dict[str, Any], *, is_final: bool = False
) -> None:
    """Adds an event, in the transaction of the change that it tells of and after that change's update."""
    session.add(EventRow(job_id=job_id, fence=fence, event=event, data=data, is_final=is_final))
    session.flush()
    if event == "progress":
        _drop_old_progress(session, job_id)


def read_after(session: Session, job_id: str, after_id: int, limit: int) -> list[EventRow]:
    """Up to `limit` events with ids above `after_id` (0 for all), oldest first."""
    return list(
        session.scalars(
            select(EventRow).where(EventRow.job_id == job_id, EventRow.id > after_id).order_by(EventRow.id).limit(limit)
        )
    )


def read_before(session: Session, job_id: str, before_id: int | None, limit: int) -> list[EventRow]:
    """Up to `limit` events with ids below `before_id` (None for all), newest first."""
    events = select(EventRow).where(EventRow.job_id == job_id).order_by(EventRow.id.desc()).limit(limit)
    if before_id is not None:
        events = events.where(EventRow.id < before_id)
    return list(session.scalars(events))


def jobs_with_log(session: Session, *, ended_before: datetime) -> list[str]:
    """Ids of jobs of every kind that ended so long ago and still have more events than that of their end."""
    has_log = exists().where(EventRow.job_id == JobRow.id, EventRow.is_final.is_(False))
    return list(session.scalars(select(JobRow.id).where(JobRow.finished_at < ended_before, has_log)))


def forget(session: Session, job_ids: Collection[str]) -> None:
    """Removes all events of ended jobs but the last one: who was cut off in the middle of a log still reads its end."""
    session.execute(
        delete(EventRow).where(EventRow.job_id.in_(job_ids), EventRow.is_final.is_(False)),
        execution_options={"synchronize_session": False},
    )


def _drop_old_progress(session: Session, job_id: str) -> None:
    of_progress = (EventRow.job_id == job_id, EventRow.event == "progress")
    newest_to_drop = (
        select(EventRow.id).where(*of_progress).order_by(EventRow.id.desc()).offset(KEPT_PROGRESS_EVENTS).limit(1)
    ).scalar_subquery()
    session.execute(
        delete(EventRow).where(*of_progress, EventRow.id <= newest_to_drop),
        execution_options={"synchronize_session": False},
    )
