"""The audit log: who changed what, and when. `app/db/tenancy.py` writes it with each change; here it is read."""

from datetime import datetime

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from app.db.tables import AuditRow


def add(session: Session, workspace_id: str, *, action: str, changed: list[str]) -> None:
    """A line for what a session without a workspace has changed of one."""
    session.add(AuditRow(workspace_id=workspace_id, action=action, changed=changed))


def list_changes(session: Session, *, limit: int, before_seq: int | None = None) -> list[AuditRow]:
    """Newest first. before_seq: of the last one seen."""
    changes = select(AuditRow).order_by(AuditRow.seq.desc()).limit(limit)
    if before_seq is not None:
        changes = changes.where(AuditRow.seq < before_seq)
    return list(session.scalars(changes))


def forget_before(session: Session, moment: datetime) -> None:
    """Of all workspaces, in a session that sees them."""
    session.execute(delete(AuditRow).where(AuditRow.at < moment), execution_options={"synchronize_session": False})
