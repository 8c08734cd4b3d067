"""The migrations make exactly the tables that the code expects, whole or not at all."""

import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Date,
    DateTime,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    insert,
    select,
    text,
)

from app.db import migrate
from app.db.engine import Database
from app.db.migrate import check_is_current, upgrade
from app.db.sqlite import sqlite3
from app.db.tables import Base
from app.errors import DatabaseMismatch

UPGRADE_AT_A_LINE = """
import sys
from app.db.migrate import upgrade
print("ready", flush=True)
sys.stdin.readline()
upgrade(sys.argv[1])
"""


def table_sql(database: Database) -> dict[str, list[str]]:
    """Each table's and index's definition as SQLite keeps it, by parts in alphabetical order."""
    with database.read() as session:
        rows = session.execute(text("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
        return {
            name: _parts(name, sql)
            for name, sql in rows.all()
            if not name.startswith("sqlite_") and name != "alembic_version"
        }


def _parts(name: str, sql: str) -> list[str]:
    # A table that a migration rebuilt has its name in quotes; lines are broken otherwise in what was added later.
    sql = " ".join(sql.replace(f'TABLE "{name}"', f"TABLE {name}").split())
    head, _, body = sql.partition("(")
    return [head.strip(), *sorted(part.strip() for part in re.split(", |\\)$", body))]


def test_migrations_and_tables_agree_to_the_letter(database: Database, tmp_path: Path) -> None:
    modelled = Database(f"sqlite:///{tmp_path / 'modelled.db'}")
    Base.metadata.create_all(modelled.engine)

    assert table_sql(database) == table_sql(modelled)
    modelled.dispose()


def test_alembic_sees_nothing_left_to_migrate(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []


def test_upgrading_twice_is_upgrading_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / '100% new.db'}"
    upgrade(url)
    upgrade(url)
    database = Database(url)
    check_is_current(database)
    database.dispose()


def test_programs_that_start_together_on_a_new_database_all_find_its_tables(
    empty_database_url: Callable[[], str],
) -> None:
    url = empty_database_url()
    upgrading = [sys.executable, "-c", UPGRADE_AT_A_LINE, url]
    pipe = subprocess.PIPE
    programs = [subprocess.Popen(upgrading, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(4)]
    for program in programs:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"

    for program in programs:
        assert program.stdin is not None
        program.stdin.write("\n")
        program.stdin.flush()
    said = [program.communicate()[1] for program in programs]

    assert [program.returncode for program in programs] == [0, 0, 0, 0], said
    database = Database(url)
    check_is_current(database)
    database.dispose()


def test_empty_database_is_refused_with_the_remedy(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'empty.db'}")
    with pytest.raises(DatabaseMismatch, match="graft migrate"):
        check_is_current(database)
    database.dispose()


def test_database_of_a_newer_version_is_refused_and_left_alone(database: Database) -> None:
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))

    with pytest.raises(DatabaseMismatch, match=r"9999.*newer"):
        check_is_current(database)
    with pytest.raises(DatabaseMismatch, match=r"9999.*newer"):
        upgrade(str(database.engine.url))
    with database.read() as session:
        assert session.scalar(text("SELECT version_num FROM alembic_version")) == "9999"


def test_migration_that_fails_midway_leaves_nothing_and_can_be_run_again(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'half.db'}"
    in_the_way = sqlite3.connect(tmp_path / "half.db")
    in_the_way.execute("CREATE TABLE aliases (name TEXT)")  # the last table that 0001 makes
    with pytest.raises(Exception, match="table aliases already exists"):
        upgrade(url)
    assert in_the_way.execute("SELECT name FROM sqlite_master").fetchall() == [("aliases",)]

    in_the_way.execute("DROP TABLE aliases")
    in_the_way.close()
    upgrade(url)

    database = Database(url)
    check_is_current(database)
    database.dispose()


def test_rebuilding_a_table_keeps_the_rows_that_refer_to_it(database: Database) -> None:
    with database.write() as session:
        session.execute(
            text(
                "INSERT INTO models (workspace_id, id, job_id, dataset_id, method, backbone, classes, metrics,"
                " size_bytes, sha256, created_at)"
                " VALUES ('ws_default', 'mdl_1', 'job_1', 'ds_1', 'm', '{}', '[]', '{}', 1, 'x', '2026-01-01')"
            )
        )
        session.execute(
            text(
                "INSERT INTO aliases (workspace_id, name, model_id, updated_at)"
                " VALUES ('ws_default', 'default', 'mdl_1', '2026-01-01')"
            )
        )

    with database.migration() as connection:
        connection.execute(text("CREATE TABLE copy AS SELECT * FROM models"))
        connection.execute(text("DELETE FROM models"))
        connection.execute(text("INSERT INTO models SELECT * FROM copy"))

    with database.read() as session:
        assert session.execute(text("SELECT name, model_id FROM aliases")).all() == [("default", "mdl_1")]
        assert session.scalar(text("PRAGMA foreign_keys")) == 1


def test_migration_that_breaks_a_reference_is_undone(database: Database) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="table aliases"), database.migration() as connection:
        connection.execute(
            text(
                "INSERT INTO aliases (workspace_id, name, model_id, updated_at)"
                " VALUES ('ws_default', 'default', 'mdl_missing', '2026-01-01')"
            )
        )

    with database.read() as session:
        assert session.scalar(text("SELECT count(*) FROM aliases")) == 0


REVISIONS = sorted(script.revision for script in migrate._scripts().walk_revisions())

# What a row of an earlier version holds; of other columns, what fits their type.
VALUES: dict[str, Any] = {
    "id": "x_1",
    "job_id": "x_1",
    "model_id": "x_1",
    "webhook_id": "x_1",
    "status": {
        "datasets": "ready",
        "jobs": "succeeded",
        "uploads": "finished",
        "webhook_deliveries": "delivered",
    },
    "kind": {"datasets": "labelled", "jobs": "training", "turns": "training"},
    "role": "final",
    "workspace_id": "ws_default",
}
OF_TYPE: dict[type, Any] = {
    Boolean: True,
    Date: date(2026, 1, 2),
    DateTime: datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    Float: 0.25,
    Integer: 1,
    JSON: {"a": [1]},
    String: "text",
}


def row_for(table: Table) -> dict[str, Any]:
    def value(column: Column[Any]) -> Any:
        own = VALUES.get(column.name)
        if own is not None:
            return own[table.name] if isinstance(own, dict) else own
        return next(value for kind, value in OF_TYPE.items() if isinstance(column.type, kind))

    return {column.name: value(column) for column in table.columns if column is not table.autoincrement_column}


def migrate_to(url: str, revision: str) -> None:
    database = Database(url)
    with database.migration() as connection:
        config = migrate._config()
        config.attributes[migrate.CONNECTION_ATTRIBUTE] = connection
        command.upgrade(config, revision)
    database.dispose()


def rows_of(url: str) -> dict[str, dict[str, Any]]:
    """The only row of each table."""
    engine = create_engine(url)
    tables = MetaData()
    tables.reflect(engine)
    with engine.connect() as connection:
        found = {
            name: dict(connection.execute(select(table)).mappings().one())
            for name, table in tables.tables.items()
            if name != "alembic_version" and connection.execute(select(table)).first()
        }
    engine.dispose()
    return found


@pytest.mark.parametrize("revision", REVISIONS[:-1])
def test_rows_of_every_earlier_version_are_there_after_updating(
    empty_database_url: Callable[[], str], revision: str
) -> None:
    url = empty_database_url()
    migrate_to(url, revision)
    engine = create_engine(url)
    tables = MetaData()
    tables.reflect(engine)
    with engine.begin() as connection:
        for table in tables.sorted_tables:
            if table.name not in ("alembic_version", "workspaces"):  # of which every database has the first one
                connection.execute(insert(table), row_for(table))
    engine.dispose()
    before = rows_of(url)
    assert len(before) >= 8

    upgrade(url)

    after = rows_of(url)
    assert {name: {column: after[name][column] for column in row} for name, row in before.items()} == before
    database = Database(url)
    check_is_current(database)
    with database.read() as session:
        for mapper in Base.registry.mappers:
            if mapper.local_table.name in before:
                assert session.scalars(select(mapper.class_)).one()
    database.dispose()
