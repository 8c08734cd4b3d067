"""Databases as earlier revisions made them are brought to the tables of today, also by an upgrade that is killed."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from old_databases import MADE_BY_MIGRATIONS, path_of, restore
from sqlalchemy import inspect, select, text
from sqlalchemy.orm import Session
from test_migrations import REVISIONS, table_sql

from app.db.engine import Database
from app.db.migrate import check_is_current, upgrade
from app.db.tables import Base

Rows = dict[str, list[dict[str, Any]]]
PROGRAM = Path(__file__).with_name("upgrade_killed_everywhere.py")


def rows_of(database: Database) -> Rows:
    """All there are, by table, as SQLite keeps them."""

    def rows(session: Session, table: str) -> list[dict[str, Any]]:
        return [dict(row) for row in session.execute(select(text(f"* FROM {table} ORDER BY rowid"))).mappings()]

    with database.read() as session:
        names = inspect(session.connection()).get_table_names()
        return {table: rows(session, table) for table in names if table != "alembic_version"}


def restricted(rows: Rows, to: Rows) -> Rows:
    """Without tables and columns that came later."""
    return {
        table: [{column: row[column] for column in to[table][0]} for row in found]
        for table, found in rows.items()
        if table in to
    }


def assert_is_whole(database: Database, old_rows: Rows, tables: Mapping[str, list[str]]) -> None:
    """At today's tables, with the rows that were there, which today's code reads."""
    check_is_current(database)
    assert table_sql(database) == tables
    assert restricted(rows_of(database), old_rows) == old_rows
    with database.read() as session:
        for mapper in Base.registry.mappers:
            found = session.scalars(select(mapper.class_)).all()
            assert (
                len(found) == len(old_rows.get(mapper.local_table.name, [])) or mapper.local_table.name == "workspaces"
            )


def test_every_revision_is_kept_as_it_was() -> None:
    missing = [revision for revision in REVISIONS if not path_of(revision).exists()]
    assert missing == [], "run tests/db/old_databases.py"


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_database_of_that_time_becomes_what_a_new_one_is_with_its_rows(
    database: Database, tmp_path: Path, revision: str
) -> None:
    path = tmp_path / "old.db"
    restore(revision, path)
    old = Database(f"sqlite:///{path}")
    before = rows_of(old)
    assert all(len(rows) == 2 for table, rows in before.items() if table not in MADE_BY_MIGRATIONS)

    upgrade(str(old.engine.url))

    assert_is_whole(old, before, table_sql(database))
    old.dispose()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_upgrade_that_is_killed_at_any_statement_can_be_run_again(database: Database, tmp_path: Path) -> None:
    restore(REVISIONS[0], tmp_path / "old.db")
    old = Database(f"sqlite:///{tmp_path / 'old.db'}")
    before, old_tables = rows_of(old), table_sql(old)
    old.dispose()
    copies = tmp_path / "copies"
    copies.mkdir()

    ran = subprocess.run(
        [sys.executable, str(PROGRAM), tmp_path / "old.db", copies], capture_output=True, text=True, check=False
    )

    assert ran.returncode == 0, ran.stderr
    killed_at = ran.stdout.splitlines()
    assert len(killed_at) > 100
    assert killed_at[-2:] == ["COMMIT", "done"]
    for at, path in zip(killed_at, sorted(copies.glob("*.db")), strict=True):
        copy = Database(f"sqlite:///{path}")
        # All of it or nothing, before anything is run again.
        is_upgraded = at == "done"
        assert table_sql(copy) == (table_sql(database) if is_upgraded else old_tables), at
        assert restricted(rows_of(copy), before) == before, at

        upgrade(str(copy.engine.url))

        assert_is_whole(copy, before, table_sql(database))
        copy.dispose()
