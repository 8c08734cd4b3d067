"""Removing a workspace with all it has, while servers and workers run.

First its keys end; from then on nobody sees it. Its jobs end, then its files go and its rows after them, some at a
time, and its own row last of all. So a removal that was cut off, wherever that was, has left the rows that say what is
still to be done, and is run again. A request that was let in before the keys ended may still add something: that
nothing is left is seen by the transaction that deletes the workspace's row. Knows tables and keys of the storage.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from sqlalchemy import ColumnElement, delete, exists, func, select
from sqlalchemy.orm import Session

from app import access, audit, holdings, workspaces
from app.db.engine import Database
from app.db.tables import (
    DEFAULT_WORKSPACE,
    AliasRow,
    ApiKeyRow,
    AuditRow,
    Base,
    DatasetRow,
    DeliveryRow,
    IdempotencyRow,
    JobRow,
    ModelRow,
    PredictionRow,
    UploadRow,
    WebhookRow,
    WorkspaceRow,
)
from app.errors import Conflict, InvalidRequest
from app.jobs import owner, queue
from app.jobs.states import JobStatus
from app.storage import LocalStorage

# Longer than a worker's lease (45 s) and the grace after a cancel (5 s) together: by then a living worker has ended
# what it ran, and what a dead one left.
LONGEST_WAIT_SECONDS = 120.0
LOOK_INTERVAL_SECONDS = 0.2
# Of one transaction; a job's events, some hundred, go with it.
ROWS_AT_A_TIME = 50
LINES_AT_A_TIME = 1000

# What people call these rows.
_NOUNS: Mapping[type[Any], str] = {
    JobRow: "jobs",
    UploadRow: "uploads",
    PredictionRow: "predictions",
    ModelRow: "models",
    DatasetRow: "data sets",
}


def possessions(database: Database, name: str) -> dict[str, int]:
    """How many of each kind a workspace has, batches and checks of data sets among its jobs. Raises NotFound."""
    with _within(database, name).read() as session:
        counts = {noun: session.scalar(select(func.count(table.seq))) or 0 for table, noun in _NOUNS.items()}
        return counts | {"keys": session.scalar(select(func.count(ApiKeyRow.id))) or 0}


def remove(
    database: Database,
    storage: LocalStorage,
    name: str,
    *,
    cancels_jobs: bool,
    wait_seconds: float = LONGEST_WAIT_SECONDS,
) -> None:
    """Returns when nothing of the workspace is left, in no table and in no file.

    Raises NotFound, InvalidRequest for the first workspace, and Conflict, with nothing changed, where it has jobs that
    are not to be cancelled, or where the server would be without any key. Raises Conflict, too, if jobs still run after
    `wait_seconds`; it can then be run again.
    """
    own = _within(database, name)
    _close(database, own, name, cancels_jobs=cancels_jobs)
    deadline = time.monotonic() + wait_seconds
    while True:
        _end_jobs(own, storage, deadline=deadline)
        for table in holdings.FOLDERS.keys() - {JobRow}:
            _delete_rows(own, storage, table)
        _delete_lines(own)
        if database.free(partial(_delete_rest, name=name)):
            return


def _within(database: Database, name: str) -> Database:
    with database.read() as session:
        return database.within(workspaces.find_by_name(session, name).id)


def _close(database: Database, own: Database, name: str, *, cancels_jobs: bool) -> None:
    """Ends all keys, unless something speaks against the removal."""
    if own.workspace_id == DEFAULT_WORKSPACE:
        raise InvalidRequest(
            f"The workspace {name} is the operator's, and the one of everybody without keys: it stays."
        )
    with database.within(DEFAULT_WORKSPACE).read() as session:
        is_guarded = access.has_keys(session)  # and stays so: rows of the first workspace's keys are never deleted
    with own.write() as session:
        if access.has_keys(session) and not is_guarded:
            raise Conflict(
                "The first workspace has no key, and without any the server would be open to everybody who reaches it: "
                "make one that stays, `graft keys create --scope admin`."
            )
        unfinished = queue.unfinished_ids(session)
        if unfinished and not cancels_jobs:
            raise Conflict(
                f"{len(unfinished)} jobs of {name} wait or run. Wait for their end, or cancel them: --cancel-jobs."
            )
        access.revoke_all(session)


def _end_jobs(own: Database, storage: LocalStorage, *, deadline: float) -> None:
    """Deletes what waits or has ended, and has what runs end."""
    while True:
        _delete_rows(own, storage, JobRow, JobRow.status != JobStatus.running)
        with own.read() as session:
            leases = queue.running_leases(session)
        if not leases:
            return
        for lease in leases:
            own.free(partial(_cancel, lease=lease))
        if time.monotonic() > deadline:
            raise Conflict(
                f"{len(leases)} jobs still run, though they were asked to end. Start a worker, which also ends what a "
                "dead one has left, and run this again; the workspace's keys have ended already."
            )
        time.sleep(LOOK_INTERVAL_SECONDS)


def _cancel(session: Session, lease: queue.Lease) -> None:
    """Asks the owner of a running job to end it, or ends it where the owner certainly is gone."""
    if queue.ask_to_cancel(session, lease) and owner.is_gone(lease.owner):
        queue.reclaim(session, lease.job_id, lease.fence, lease.beat, max_crashes=1)


def _delete_rows(own: Database, storage: LocalStorage, table: type[Any], *guard: ColumnElement[bool]) -> None:
    """Files first: a row whose files are gone is seen by nobody, files without a row are found by nobody."""
    while True:
        with own.read() as session:
            ids = list(session.scalars(select(table.id).where(*guard).limit(ROWS_AT_A_TIME)))
        if not ids:
            return
        for row_id in ids:
            for folder in holdings.FOLDERS[table]:
                storage.delete(f"{folder}/{row_id}")

        if table is ModelRow:
            _delete_engines(storage)
        own.free(partial(_delete_by_id, table=table, ids=ids, guard=guard))


def _delete_by_id(
    session: Session, *, table: type[Any], ids: Sequence[str], guard: Sequence[ColumnElement[bool]]
) -> None:
    if table is ModelRow:
        _delete(session, AliasRow, AliasRow.model_id.in_(ids))
    _delete(session, table, table.id.in_(ids), *guard)


def _delete_engines(storage: LocalStorage) -> None:
    """Of everybody's networks, since they bear nobody's name: what is still asked is built again, beside answering."""
    folder = storage.path("engines")
    for path in folder.iterdir() if folder.is_dir() else ():
        storage.delete(f"engines/{path.name}")


def _delete_lines(own: Database) -> None:
    """What may be a hundred thousand rows, and has no files."""
    lines: Mapping[type[Any], ColumnElement[bool]] = {
        DeliveryRow: DeliveryRow.webhook_id.in_(
            select(WebhookRow.id).where(WebhookRow.workspace_id == own.workspace_id)
        ),
        AuditRow: AuditRow.workspace_id == own.workspace_id,
    }
    for table, guard in lines.items():
        while True:
            with own.read() as session:
                few = list(session.scalars(select(table.seq).where(guard).limit(LINES_AT_A_TIME)))
            if not few:
                break
            own.free(partial(_delete_lines_of, table=table, seqs=few))


def _delete_lines_of(session: Session, *, table: type[Any], seqs: Sequence[int]) -> None:
    _delete(session, table, table.seq.in_(seqs))


def _delete_rest(session: Session, *, name: str) -> bool:
    """Whatever has no files, and the workspace itself; False, with nothing done, where anything with files came in
    meanwhile."""
    workspace_id = workspaces.find_by_name(session, name).id
    # Waits for those who are adding something, and lets nobody begin to.
    workspaces.lock(session, workspace_id)
    if any(session.scalar(select(exists().where(table.workspace_id == workspace_id))) for table in holdings.FOLDERS):
        return False
    for key_id in session.scalars(select(ApiKeyRow.id).where(ApiKeyRow.workspace_id == workspace_id)).all():
        _delete(session, IdempotencyRow, IdempotencyRow.scope.startswith(f"{key_id} ", autoescape=True))
    for table in reversed(Base.metadata.sorted_tables):
        if "workspace_id" in table.c:
            session.execute(delete(table).where(table.c.workspace_id == workspace_id))
    _delete(session, WorkspaceRow, WorkspaceRow.id == workspace_id)
    audit.add(session, DEFAULT_WORKSPACE, action=f"graft workspaces delete {name}", changed=[workspace_id])
    return True


def _delete(session: Session, table: type[Any], *guard: ColumnElement[bool]) -> None:
    session.execute(delete(table).where(*guard), execution_options={"synchronize_session": False})
