"""The migrations make exactly the tables that the code expects, whole or not at all."""

import re
import sqlite3
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from app.db.engine import Database
from app.db.migrate import check_is_current, upgrade
from app.db.tables import Base
from app.errors import DatabaseMismatch


def table_sql(database: Database) -> dict[str, list[str]]:
    """Each table's and index's definition as SQLite keeps it, by lines in alphabetical order."""
    with database.read() as session:
        rows = session.execute(text("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
        return {
            # A table that a migration rebuilt has its name in quotes; an added column follows on the last one's line.
            name: sorted(re.split(r",?\s*\n\s*|, ", sql.replace(f'TABLE "{name}"', f"TABLE {name}")))
            for name, sql in rows.all()
            if not name.startswith("sqlite_") and name != "alembic_version"
        }


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
                "INSERT INTO models (id, job_id, dataset_id, method, backbone, classes, metrics, size_bytes, sha256,"
                " created_at) VALUES ('mdl_1', 'job_1', 'ds_1', 'm', '{}', '[]', '{}', 1, 'x', '2026-01-01')"
            )
        )
        session.execute(
            text("INSERT INTO aliases (name, model_id, updated_at) VALUES ('default', 'mdl_1', '2026-01-01')")
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
            text("INSERT INTO aliases (name, model_id, updated_at) VALUES ('default', 'mdl_missing', '2026-01-01')")
        )

    with database.read() as session:
        assert session.scalar(text("SELECT count(*) FROM aliases")) == 0
