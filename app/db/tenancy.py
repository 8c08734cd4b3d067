"""Which rows a session sees and makes, and what it leaves in the audit log: for every table with a workspace, at once.

Held here and not at each statement, so that what nobody thought of is closed.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, UpdateBase, event
from sqlalchemy.orm import ORMExecuteState, Session, UOWTransaction, with_loader_criteria

from app.db.tables import AuditRow, OfWorkspace, WorkspaceRow

# The execution option of a statement that shall see everybody's rows, such as one that counts who waits.
ALL_WORKSPACES = "all_workspaces"

# More ids than this of one change say no more; a request changes one thing or two.
MOST_IDS = 20
_ID_PREFIXES = ("ds_", "job_", "mdl_", "batch_", "prd_", "key_", "up_", "wh_")


@dataclass(frozen=True)
class Actor:
    """Who asks for changes, and by what. action: method and path, or a command."""

    action: str
    key_id: str | None = None
    request_id: str | None = None


class TenantSession(Session):
    """Sees and makes rows of one workspace; with workspace_id None it sees all, and makes none that need one.

    actor: whose changes go into the audit log; of a session without one nothing does.
    """

    def __init__(self, engine: Engine, *, workspace_id: str | None, actor: Actor | None) -> None:
        super().__init__(engine, expire_on_commit=False)
        self.workspace_id = workspace_id
        self._actor = actor
        self._changed: dict[str, None] = {}  # ids of what was made, changed or deleted, in order

    def add_to_audit_log(self) -> None:
        """A line of what the transaction has changed so far, if it has changed anything of a workspace."""
        if self._actor is None:
            return
        self.flush()
        if self._changed:
            actor, changed = self._actor, list(self._changed)[:MOST_IDS]
            row = AuditRow(key_id=actor.key_id, action=actor.action, request_id=actor.request_id, changed=changed)
            self.add(row)

    def note_statement(self, state: ORMExecuteState) -> None:
        """What a statement changes is said by its guard, which names an id everywhere that counts."""
        mapper = state.bind_mapper
        is_change = state.is_update or state.is_delete or state.is_insert
        kind = None if mapper is None else mapper.class_
        if self._actor and is_change and kind is not None and issubclass(kind, OfWorkspace):
            assert isinstance(state.statement, UpdateBase)
            values = state.statement.compile().params.values()
            ids = [value for value in values if isinstance(value, str) and value.startswith(_ID_PREFIXES)]
            self._changed |= dict.fromkeys(ids or [kind.__name__])

    def note_rows(self) -> None:
        touched = [*self.new, *(row for row in self.dirty if self.is_modified(row)), *self.deleted]
        for row in touched:
            if isinstance(row, OfWorkspace | WorkspaceRow) and not isinstance(row, AuditRow):
                self._changed[str(getattr(row, "id", None) or getattr(row, "name", ""))] = None


@event.listens_for(TenantSession, "do_orm_execute")
def _see_own_rows_only(state: ORMExecuteState) -> None:
    session = state.session
    assert isinstance(session, TenantSession)
    session.note_statement(state)
    own = session.workspace_id
    if own is not None and not state.is_column_load and not state.execution_options.get(ALL_WORKSPACES):
        state.statement = state.statement.options(
            with_loader_criteria(OfWorkspace, lambda table: table.workspace_id == own, include_aliases=True)
        )


@event.listens_for(TenantSession, "before_flush")
def _make_own_rows_only(session: TenantSession, _context: UOWTransaction, _instances: Any) -> None:
    for row in session.new:
        if isinstance(row, OfWorkspace) and session.workspace_id is not None:
            if row.workspace_id not in (None, session.workspace_id):
                raise ValueError("a row of another workspace")
            row.workspace_id = session.workspace_id
    session.note_rows()
