"""Databases for the tests that must hold on each of them."""

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from app.db.engine import Database
from app.db.migrate import upgrade


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Makes a fresh, migrated database and returns its URL, as often as it is called."""
    server = request.getfixturevalue("postgres_url") if request.param == "postgresql" else ""
    made: list[str] = []

    def make() -> str:
        name = f"graft_test_{secrets.token_hex(8)}"
        if request.param == "sqlite":
            url = f"sqlite:///{tmp_path / name}.db"
        else:
            _on_server(server, f"CREATE DATABASE {name}")
            made.append(name)
            url = make_url(server).set(database=name).render_as_string(hide_password=False)
        upgrade(url)
        return url

    yield make
    for name in made:
        _on_server(server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def any_database(new_database_url: Callable[[], str]) -> Iterator[Database]:
    database = Database(new_database_url())
    yield database
    database.dispose()


def _on_server(url: str, statement: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()
