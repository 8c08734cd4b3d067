"""Workspaces: who shares what, and how much of it. Knows rows; not HTTP, not keys.

That nobody sees another's rows is held in `app/db/tenancy.py`. Functions that take a Session of one workspace count
what is that workspace's.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, NoReturn

from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from app.db.tables import (
    DEFAULT_WORKSPACE,
    DatasetRow,
    JobRow,
    ModelRow,
    PredictionRow,
    UploadRow,
    UsageRow,
    WorkspaceRow,
    new_id,
)
from app.errors import Conflict, InvalidRequest, NotFound, TooManyRequests
from app.jobs.states import JobKind, JobStatus
from app.settings import Settings

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_UNFINISHED = tuple(status for status in JobStatus if not status.is_final)


@dataclass(frozen=True)
class Limits:
    """What a workspace may have and do; None where there is no limit."""

    max_bytes: int | None = None
    max_unfinished_jobs: int | None = None
    max_predictions_per_day: int | None = None
    requests_per_second: float | None = None

    @classmethod
    def from_settings(cls, settings: Settings) -> "Limits":
        return cls(
            settings.workspace_max_bytes,
            settings.workspace_max_unfinished_jobs,
            settings.workspace_max_predictions_per_day,
            settings.workspace_requests_per_second,
        )


@dataclass(frozen=True)
class Workspace:
    """A workspace, and the limits that hold for it."""

    id: str
    name: str
    limits: Limits

    @classmethod
    def of(cls, row: WorkspaceRow, defaults: Limits) -> "Workspace":
        own = {name: getattr(row, name) for name in Limits.__dataclass_fields__}
        return cls(row.id, row.name, Limits(**{n: getattr(defaults, n) if v is None else v for n, v in own.items()}))

    def check_room(self, session: Session, size_bytes: int) -> None:
        """Raises TooManyRequests if what there is and `size_bytes` more are beyond the quota.

        In a transaction that goes on to make what takes them, the sum never exceeds it, however many come at once.
        """
        if self.limits.max_bytes is None:
            return
        lock(session, self.id)
        used = bytes_used(session)
        if used + size_bytes > self.limits.max_bytes:
            self._refuse(
                "bytes",
                f"{used:,} of {self.limits.max_bytes:,} bytes are in use, and this needs {size_bytes:,}. "
                "Delete data sets or models that are not needed any more.",
            )

    def check_jobs(self, session: Session) -> None:
        """Raises TooManyRequests unless one more job may wait or run."""
        if self.limits.max_unfinished_jobs is None:
            return
        lock(session, self.id)
        if unfinished_jobs(session) >= self.limits.max_unfinished_jobs:
            self._refuse(
                "jobs",
                f"{self.limits.max_unfinished_jobs} jobs and batches wait or run already, as many as may at a time. "
                "Wait for one of them to end, or cancel one.",
                retry_after_seconds=30,
            )

    def check_predictions(self, done_today: int, more: int) -> None:
        """Raises TooManyRequests if so many more pictures are beyond what a day allows."""
        most = self.limits.max_predictions_per_day
        if most is not None and done_today + more > most:
            now = datetime.now(UTC)
            left_of_day = 86400 - (now.hour * 3600 + now.minute * 60 + now.second)
            self._refuse(
                "predictions",
                f"{done_today:,} of {most:,} pictures were predicted today (UTC), and this asks for {more:,} more.",
                retry_after_seconds=left_of_day,
            )

    def _refuse(self, what: str, sentence: str, *, retry_after_seconds: int | None = None) -> NoReturn:
        raise TooManyRequests(
            f"The quota of the workspace {self.name} is spent: {sentence}",
            code=f"quota-of-{what}-spent",
            title="Quota spent",
            retry_after_seconds=retry_after_seconds,
        )


def create(session: Session, name: str, limits: Limits) -> WorkspaceRow:
    """Raises InvalidRequest for a bad name, Conflict if there is one of this name."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            "A workspace's name has 1 to 63 characters: small letters, digits, '.', '_' and '-', the first a letter or "
            "digit."
        )
    if session.scalar(select(WorkspaceRow.id).where(WorkspaceRow.name == name)) is not None:
        raise Conflict(f"There is a workspace {name} already.")
    row = WorkspaceRow(id=new_id("ws"), name=name, **vars(limits))
    session.add(row)
    session.flush()
    return row


def change_limits(session: Session, name: str, changes: dict[str, Any]) -> WorkspaceRow:
    """changes: by the names of `Limits`; None lets the settings' hold again. Raises NotFound."""
    row = find_by_name(session, name)
    for limit, value in changes.items():
        setattr(row, limit, value)
    session.flush()
    return row


def find_by_name(session: Session, name: str) -> WorkspaceRow:
    """Raises NotFound."""
    row = session.scalar(select(WorkspaceRow).where(WorkspaceRow.name == name))
    if row is None:
        raise NotFound(f"There is no workspace {name}; `graft workspaces list` shows them.")
    return row


def exists(session: Session, workspace_id: str) -> bool:
    return session.scalar(select(WorkspaceRow.id).where(WorkspaceRow.id == workspace_id)) is not None


def load(session: Session, workspace_id: str, defaults: Limits) -> Workspace:
    """The workspace of a key or a job, which both refer to it."""
    row = session.get_one(WorkspaceRow, workspace_id)
    return Workspace.of(row, defaults)


def list_workspaces(session: Session) -> Sequence[WorkspaceRow]:
    """The first one first, the others by name."""
    rows = session.scalars(select(WorkspaceRow).order_by(WorkspaceRow.name)).all()
    return sorted(rows, key=lambda row: row.id != DEFAULT_WORKSPACE)


def bytes_used(session: Session) -> int:
    """Of archives, those that are still coming too, pixel stores, models and kept pictures."""
    of_batch = case((JobRow.kind == JobKind.prediction, JobRow.spec["size_bytes"].as_integer()), else_=0)
    of_upload = case((UploadRow.status == "open", UploadRow.size_bytes), else_=0)
    sizes = (
        DatasetRow.size_bytes + func.coalesce(DatasetRow.packed_bytes, 0),
        ModelRow.size_bytes,
        PredictionRow.size_bytes,
        of_batch,
        of_upload,
    )
    return sum(int(session.scalar(select(func.sum(size))) or 0) for size in sizes)


def unfinished_jobs(session: Session) -> int:
    """Trainings and batches that wait or run; ingests come with their data sets."""
    counted = select(func.count(JobRow.seq)).where(JobRow.status.in_(_UNFINISHED), JobRow.kind != JobKind.ingest)
    return session.scalar(counted) or 0


def predictions_on(session: Session, workspace_id: str, day: date) -> int:
    return session.scalar(select(UsageRow.predictions).filter_by(workspace_id=workspace_id, day=day)) or 0


def add_predictions(session: Session, workspace_id: str, day: date, count: int) -> int:
    """Counts so many more; returns all of that day: none of a workspace that was deleted meanwhile."""
    if not exists(session, workspace_id):
        return 0
    row = session.get(UsageRow, (workspace_id, day), with_for_update=True)
    if row is None:
        row = UsageRow(workspace_id=workspace_id, day=day, predictions=0)
        session.add(row)
    row.predictions += count
    session.flush()
    return row.predictions


def lock(session: Session, workspace_id: str) -> None:
    """Makes others that lock it, or add something to it, wait for this transaction's end. (SQLite's writers come one by
    one anyway.)"""
    session.scalar(select(WorkspaceRow.id).where(WorkspaceRow.id == workspace_id).with_for_update())
