"""Data sets in the database: every statement about them, each to be run inside `Database.write()` or `.read()`.

Bytes are elsewhere: whoever deletes a row removes `datasets/<id>` from the storage after the commit.
"""

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Select, select, update
from sqlalchemy import delete as sql_delete
from sqlalchemy.orm import Session

from app import webhooks
from app.datasets.layout import Kind
from app.datasets.report import IngestReport, shortened
from app.db.tables import DatasetRow, new_id
from app.errors import Conflict, InvalidRequest, NotFound


def create(
    session: Session,
    *,
    name: str,
    size_bytes: int,
    sha256: str,
    options: dict[str, Any],
    kind: Kind = "labelled",
    dataset_id: str | None = None,
    parent_id: str | None = None,
    warnings: Sequence[dict[str, Any]] = (),
) -> DatasetRow:
    """A new data set in status processing. dataset_id: where its archive was published before, if it was.

    parent_id: the data set that it is a version of. warnings: known before it is ingested.
    """
    row = DatasetRow(
        id=dataset_id or new_id("ds"),
        name=name,
        status="processing",
        size_bytes=size_bytes,
        sha256=sha256,
        kind=kind,
        options=options,
        parent_id=parent_id,
        warnings=list(warnings),
        splits={"train": 0, "val": 0, "test": 0},
    )
    session.add(row)
    session.flush()
    return row


def find(session: Session, dataset_id: str) -> DatasetRow:
    """Raises NotFound."""
    return _found(session.scalar(_row(dataset_id)))


def hold(session: Session, dataset_id: str) -> DatasetRow:
    """The same, and nobody deletes it until the transaction ends. (SQLite's writers come one by one anyway.)"""
    return _found(session.scalar(_row(dataset_id).with_for_update(read=True, key_share=True)))


def exists(session: Session, dataset_id: str) -> bool:
    return session.scalar(select(DatasetRow.seq).where(DatasetRow.id == dataset_id)) is not None


def names(session: Session, dataset_ids: Collection[str]) -> dict[str, str]:
    """By id, of those that are still there."""
    rows = session.execute(select(DatasetRow.id, DatasetRow.name).where(DatasetRow.id.in_(dataset_ids)))
    return {row.id: row.name for row in rows}


def list_datasets(
    session: Session, *, limit: int, after: str | None = None, status: str | None = None
) -> Sequence[DatasetRow]:
    """At most `limit` data sets, newest first. Ask for one more than the page to know whether there are more.

    after: id of the last one seen. Raises InvalidRequest if there is no such data set any more.
    """
    query = select(DatasetRow).order_by(DatasetRow.seq.desc()).limit(limit)
    if status is not None:
        query = query.where(DatasetRow.status == status)
    if after is not None:
        seq = session.scalar(select(DatasetRow.seq).where(DatasetRow.id == after))
        if seq is None:
            raise InvalidRequest("`after` names no data set that exists; list again from the start.")
        query = query.where(DatasetRow.seq < seq)
    return session.scalars(query).all()


def state_size(session: Session, dataset_id: str, packed_bytes: int) -> None:
    """Writes down how large the pixel store will be. A data set that is not being processed any more stays as it is."""
    is_processing = (DatasetRow.id == dataset_id) & (DatasetRow.status == "processing")
    session.execute(update(DatasetRow).where(is_processing).values(packed_bytes=packed_bytes))


def mark_ready(session: Session, dataset_id: str, report: IngestReport) -> None:
    """processing → ready. Raises Conflict if it is not processing any more, or deleted."""
    assert report.error is None
    told = {"num_images": report.num_images, "num_rejected": report.num_rejected}
    _finish(session, dataset_id, status="ready", error=None, report=report, event="dataset.ready", told=told)


def mark_failed(
    session: Session, dataset_id: str, error: dict[str, Any], *, report: IngestReport | None = None
) -> None:
    """processing → failed, keeping what was found out. Raises Conflict as `mark_ready` does."""
    told = {"error": error}
    _finish(session, dataset_id, status="failed", error=error, report=report, event="dataset.failed", told=told)


def delete(session: Session, dataset_id: str) -> None:
    """Removes the row, once nobody holds it: which jobs there are on it is certain only then. Raises NotFound."""
    if not _changed(session.execute(sql_delete(DatasetRow).where(DatasetRow.id == dataset_id))):
        raise _no_dataset()


def _finish(
    session: Session,
    dataset_id: str,
    *,
    status: str,
    error: dict[str, Any] | None,
    report: IngestReport | None,
    event: webhooks.Event,
    told: dict[str, Any],
) -> None:
    # A data set that failed has no pixel store, however large it was to be.
    packed_bytes = None if report is None else report.packed_bytes
    values: dict[str, Any] = {"status": status, "error": error, "packed_bytes": packed_bytes}
    if report is not None:
        values |= {
            "num_images": report.num_images,
            "num_rejected": report.num_rejected,
            "splits": report.splits,
            "classes": report.classes,
            "tasks": report.tasks,
            "rejected": report.rejected,
            "warnings": [shortened(each) for each in report.warnings],
        }
    is_processing = (DatasetRow.id == dataset_id) & (DatasetRow.status == "processing")
    finished = update(DatasetRow).where(is_processing).values(**values).returning(DatasetRow.workspace_id)
    workspace_id = session.scalar(finished, execution_options={"synchronize_session": False})
    if workspace_id is None:
        raise Conflict("The data set is not being processed any more.")
    told = {"id": dataset_id, "object": "dataset", "status": status, **told}
    webhooks.emit(session, event, told, workspace_id=workspace_id)


def _row(dataset_id: str) -> Select[DatasetRow]:
    return select(DatasetRow).where(DatasetRow.id == dataset_id)


def _found(row: DatasetRow | None) -> DatasetRow:
    if row is None:
        raise _no_dataset()
    return row


def _no_dataset() -> NotFound:
    return NotFound("There is no such data set; GET /v1/datasets lists those there are.")


def _changed(result: Any) -> bool:
    return bool(result.rowcount)
