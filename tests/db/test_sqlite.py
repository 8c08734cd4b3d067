"""Which SQLite is used, and whether it has the fix that several processes on one file need."""

import importlib.util
import sqlite3 as of_python
from pathlib import Path

import pytest

from app.db.engine import Database
from app.db.sqlite import sqlite3, wal_is_safe


@pytest.mark.parametrize(
    ("version", "is_safe"),
    [
        ((3, 40, 1), False),
        ((3, 44, 5), False),
        ((3, 44, 6), True),
        ((3, 45, 9), False),
        ((3, 50, 6), False),
        ((3, 50, 7), True),
        ((3, 51, 2), False),
        ((3, 51, 3), True),
        ((3, 53, 4), True),
        ((4, 0, 0), True),
    ],
)
def test_versions_with_the_fix_are_told_from_those_without(version: tuple[int, int, int], is_safe: bool) -> None:
    assert wal_is_safe(version) == is_safe


def test_the_newest_there_is_runs_the_database(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'graft.db'}")
    with database.read() as session:
        found = session.connection().exec_driver_sql("SELECT sqlite_version()").scalar()
    database.dispose()
    assert found == sqlite3.sqlite_version
    assert sqlite3.sqlite_version_info >= of_python.sqlite_version_info


@pytest.mark.skipif(importlib.util.find_spec("pysqlite3") is None, reason="pysqlite3 has no files for this platform")
def test_the_package_has_the_fix() -> None:
    assert wal_is_safe()
