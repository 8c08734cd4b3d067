"""What a workspace sees, makes and leaves in the audit log, whatever kind of statement asks."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import delete, exists, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased

from app.db.engine import Database
from app.db.tables import DEFAULT_WORKSPACE, AuditRow, EpochRow, JobRow, ModelRow, WorkspaceRow
from app.db.tenancy import ALL_WORKSPACES, Actor

Look = Callable[[Session], Any]

NEWEST = select(JobRow.id).order_by(JobRow.seq.desc()).limit(1).scalar_subquery()
RUNNING = select(JobRow.id, func.sum(JobRow.seq).over(order_by=JobRow.seq).label("sum")).subquery()
OTHER = aliased(JobRow)


def job(job_id: str) -> JobRow:
    return JobRow(id=job_id, kind="training", status="queued", dataset_id="ds_1", spec={})


@pytest.fixture
def theirs(any_database: Database) -> Database:
    """Of two jobs, as a second workspace sees it; the first workspace has job_1."""
    with any_database.write() as session:
        session.add(WorkspaceRow(id="ws_theirs", name="theirs"))
        session.add(job("job_1"))
    theirs = any_database.within("ws_theirs")
    with theirs.write() as session:
        session.add_all([job("job_2"), job("job_3")])
    return theirs


LOOKS: dict[str, Look] = {
    "rows": lambda session: [row.id for row in session.scalars(select(JobRow).order_by(JobRow.seq))],
    "columns": lambda session: list(session.scalars(select(JobRow.id).order_by(JobRow.seq))),
    "by key": lambda session: [row.id for seq in (1, 2, 3) if (row := session.get(JobRow, seq))],
    "by id": lambda session: [i for i in JOBS if session.scalar(select(JobRow).where(JobRow.id == i))],
    "alias": lambda session: list(session.scalars(select(OTHER.id).order_by(OTHER.seq))),
    "exists": lambda session: [i for i in JOBS if session.scalar(select(exists().where(JobRow.id == i)))],
    "outer of a subquery": lambda session: list(session.scalars(select(RUNNING.c.id).order_by(RUNNING.c.sum))),
    "join": lambda session: list(
        session.scalars(select(JobRow.id).outerjoin(ModelRow, ModelRow.job_id == JobRow.id).order_by(JobRow.seq))
    ),
}
COUNTS: dict[str, Look] = {
    "of a column": lambda session: session.scalar(select(func.count(JobRow.seq))),
    "named in the condition alone": lambda session: session.scalar(
        select(func.count()).where(JobRow.status == "queued")
    ),
    "from": lambda session: session.scalar(select(func.count()).select_from(JobRow)),
    "grouped": lambda session: session.execute(select(func.count(), JobRow.kind).group_by(JobRow.kind)).one()[0],
}
JOBS = ("job_1", "job_2", "job_3")


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_no_query_sees_rows_of_another_workspace(theirs: Database, look: Look) -> None:
    with theirs.within(DEFAULT_WORKSPACE).read() as session:
        assert look(session) == ["job_1"]
    with theirs.read() as session:
        assert look(session) == ["job_2", "job_3"]


@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
def test_no_count_has_rows_of_another_workspace(theirs: Database, count: Look) -> None:
    with theirs.within(DEFAULT_WORKSPACE).read() as session:
        assert count(session) == 1
    with theirs.read() as session:
        assert count(session) == 2


def test_a_count_that_says_so_has_all(theirs: Database) -> None:
    with theirs.read() as session:
        assert session.scalar(select(func.count(JobRow.seq)), execution_options={ALL_WORKSPACES: True}) == 3


@pytest.mark.parametrize(
    "statement",
    [
        update(JobRow).where(JobRow.id == "job_1").values(name="x"),
        update(JobRow).where(JobRow.name.is_(None)).values(name="x"),
        update(JobRow).where(JobRow.id == NEWEST).values(name="x"),
        delete(JobRow).where(JobRow.id == "job_1"),
        delete(JobRow),
    ],
)
def test_no_statement_changes_rows_of_another_workspace(theirs: Database, statement: Any) -> None:
    with theirs.write() as session:
        session.execute(statement, execution_options={"synchronize_session": False})

    with theirs.within(DEFAULT_WORKSPACE).read() as session:
        assert [(row.id, row.name) for row in session.scalars(select(JobRow))] == [("job_1", None)]


def test_a_row_for_another_workspace_is_refused(theirs: Database) -> None:
    stray = job("job_4")
    stray.workspace_id = DEFAULT_WORKSPACE
    with pytest.raises(ValueError, match="another workspace"), theirs.write() as session:
        session.add(stray)


@pytest.mark.parametrize("workspace", [None, "ws_theirs"])
def test_a_row_of_no_workspace_cannot_be_made(theirs: Database, workspace: str | None) -> None:
    database = theirs.within(workspace) if workspace else Database(str(theirs.engine.url))
    with pytest.raises(IntegrityError), database.write() as session:
        if workspace:  # what goes past the session's own rows is not given one
            session.execute(insert(JobRow), [{"id": "job_4", "kind": "training", "dataset_id": "", "spec": {}}])
        else:
            session.add(job("job_4"))
    if not workspace:
        database.dispose()


def changes(database: Database) -> list[tuple[str, str | None, str | None, list[str]]]:
    with database.read() as session:
        rows = session.scalars(select(AuditRow).order_by(AuditRow.seq))
        return [(row.action, row.key_id, row.request_id, row.changed) for row in rows]


def test_what_an_actor_changes_is_in_the_audit_log_of_its_workspace(theirs: Database) -> None:
    acting = theirs.within("ws_theirs", actor=Actor("POST /v1/jobs", "key_1", "request-1"))
    with acting.write() as session:
        session.add(job("job_4"))
    with acting.write() as session:
        session.execute(update(JobRow).where(JobRow.id == "job_2").values(name="x"))
    with acting.write() as session:
        session.delete(session.scalars(select(JobRow).where(JobRow.id == "job_3")).one())
    with acting.write() as session:  # that only looks, and changes what belongs to no workspace of its own
        session.scalars(select(JobRow)).all()
        session.execute(delete(EpochRow).where(EpochRow.job_id == "job_2"))

    who = ("POST /v1/jobs", "key_1", "request-1")
    assert changes(theirs) == [(*who, ["job_4"]), (*who, ["job_2"]), (*who, ["job_3"])]
    assert changes(theirs.within(DEFAULT_WORKSPACE)) == []


def test_a_change_that_is_undone_leaves_no_line(theirs: Database) -> None:
    acting = theirs.within("ws_theirs", actor=Actor("POST /v1/jobs"))
    with pytest.raises(RuntimeError), acting.write() as session:
        session.add(job("job_4"))
        session.flush()
        raise RuntimeError
    assert changes(theirs) == []
