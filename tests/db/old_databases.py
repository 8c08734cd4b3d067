"""Databases of earlier revisions, as SQL in `tests/db/old/`: each was made by the migrations of its time.

`PYTHONPATH=. python tests/db/old_databases.py` makes those that are missing, by the migrations as they are now: run it
once with each new migration, and commit what it makes. One that is there is never made again, so that a migration that
is changed after people have run it is noticed.
"""

import sqlite3 as of_python
import tempfile
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

from sqlalchemy import Column, MetaData, Table, create_engine, insert
from test_migrations import REVISIONS, migrate_to, row_for

from app.db.sqlite import sqlite3

FOLDER = Path(__file__).with_name("old")
# Of which every database has the first one.
MADE_BY_MIGRATIONS = ("alembic_version", "workspaces")


def path_of(revision: str) -> Path:
    return FOLDER / f"{revision}.sql"


def restore(revision: str, path: Path) -> None:
    """Makes the SQLite file of that revision."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(path_of(revision).read_text(encoding="utf-8"))


def make_missing() -> None:
    for revision in REVISIONS:
        if not path_of(revision).exists():
            with tempfile.TemporaryDirectory() as folder:
                path_of(revision).write_text(_dump(revision, Path(folder) / "graft.db"), encoding="utf-8")


def _dump(revision: str, path: Path) -> str:
    """One statement a line."""
    migrate_to(f"sqlite:///{path}", revision)
    engine = create_engine(f"sqlite:///{path}")
    tables = MetaData()
    tables.reflect(engine)
    with engine.begin() as connection:
        for table in tables.sorted_tables:
            if table.name not in MADE_BY_MIGRATIONS:
                connection.execute(insert(table), [row_for(table), _another_row_for(table)])
    engine.dispose()
    with closing(of_python.connect(path)) as connection:  # the package's has no iterdump
        return "".join(" ".join(statement.split()) + "\n" for statement in connection.iterdump())


def _another_row_for(table: Table) -> dict[str, Any]:
    """With nothing where that may be, and with texts that have to be quoted."""
    others: dict[Any, Any] = {"x_1": "x_2", "text": 'it\'s; "one", é', date(2026, 1, 2): date(2026, 1, 3)}

    def other(column: Column[Any], value: Any) -> Any:
        if column.nullable:
            return None
        if (table.name, column.name) == ("turns", "kind"):
            return "prediction"
        return others.get(value, value) if isinstance(value, str | date) else value

    return {name: other(table.columns[name], value) for name, value in row_for(table).items()}


if __name__ == "__main__":
    make_missing()
