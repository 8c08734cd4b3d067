"""Archives that come in pieces, in the database: every statement about them, inside `Database.write()` or `.read()`.

open → finished, with a data set, or → refused, with the reason. The bytes lie under `archive_key` until then; of an
ended one, whoever ended it removes them after the commit.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import delete as sql_delete
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.db.tables import UploadRow, utc_now
from app.errors import Conflict, NotFound


def folder_key(upload_id: str) -> str:
    return f"uploads/{upload_id}"


def archive_key(upload_id: str) -> str:
    return f"{folder_key(upload_id)}/archive"


def create(
    session: Session,
    upload_id: str,
    *,
    size_bytes: int,
    filename: str | None,
    options: Mapping[str, Any],
    client_metadata: str,
) -> UploadRow:
    row = UploadRow(
        id=upload_id,
        status="open",
        size_bytes=size_bytes,
        filename=filename,
        options=dict(options),
        client_metadata=client_metadata,
        attempts=0,
    )
    session.add(row)
    session.flush()
    return row


def find(session: Session, upload_id: str) -> UploadRow:
    """Raises NotFound."""
    row = session.scalar(select(UploadRow).where(UploadRow.id == upload_id))
    if row is None:
        raise NotFound("There is no such upload; it has expired, or was ended. Begin a new one: POST /v1/uploads.")
    return row


def list_open(session: Session) -> Sequence[UploadRow]:
    """Oldest first."""
    return session.scalars(select(UploadRow).where(UploadRow.status == "open").order_by(UploadRow.seq)).all()


def list_ended(session: Session) -> Sequence[UploadRow]:
    return session.scalars(select(UploadRow).where(UploadRow.status != "open").order_by(UploadRow.seq)).all()


def count_attempt(session: Session, upload_id: str, by: int = 1) -> int:
    """Returns how often it was begun to look the archive through. Raises Conflict unless open."""
    attempts: int | None = session.scalar(
        update(UploadRow)
        .where(UploadRow.id == upload_id, UploadRow.status == "open")
        .values(attempts=UploadRow.attempts + by)
        .returning(UploadRow.attempts),
        execution_options={"synchronize_session": False},
    )
    if attempts is None:
        raise _has_ended()
    return attempts


def finish(session: Session, upload_id: str, *, dataset_id: str) -> None:
    """open → finished, in the transaction that makes the data set: there is never a second. Raises Conflict."""
    _end(session, upload_id, status="finished", dataset_id=dataset_id)


def refuse(session: Session, upload_id: str, error: Mapping[str, Any]) -> None:
    """open → refused. error: GraftError.as_record(). Raises Conflict."""
    _end(session, upload_id, status="refused", error=dict(error))


def delete(session: Session, upload_id: str) -> None:
    """Raises NotFound."""
    removed = session.scalar(sql_delete(UploadRow).where(UploadRow.id == upload_id).returning(UploadRow.seq))
    if removed is None:
        raise NotFound("There is no such upload.")


def expire(session: Session, upload_id: str) -> bool:
    """Removes an open upload. Returns whether there was one: it may have ended since the caller saw it."""
    removed = session.scalar(
        sql_delete(UploadRow).where(UploadRow.id == upload_id, UploadRow.status == "open").returning(UploadRow.seq)
    )
    return removed is not None


def forget_ended(session: Session, *, before: datetime) -> None:
    session.execute(sql_delete(UploadRow).where(UploadRow.status != "open", UploadRow.ended_at < before))


def _end(session: Session, upload_id: str, **values: Any) -> None:
    ended = session.scalar(
        update(UploadRow)
        .where(UploadRow.id == upload_id, UploadRow.status == "open")
        .values(ended_at=utc_now(), **values)
        .returning(UploadRow.id),
        execution_options={"synchronize_session": False},
    )
    if ended is None:
        raise _has_ended()


def _has_ended() -> Conflict:
    return Conflict("The upload has ended.", code="upload-ended")
