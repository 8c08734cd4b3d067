"""Databases for the tests that must hold on each of them."""

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from app.db.engine import Database
from app.db.migrate import upgrade

POSTGRES_URL = os.environ.get("GRAFT_TEST_POSTGRES_URL", "")


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param(
            "postgresql",
            marks=pytest.mark.skipif(
                not POSTGRES_URL,
                reason="needs PostgreSQL: set GRAFT_TEST_POSTGRES_URL to a database whose user may create others",
            ),
        ),
    ]
)
def new_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Makes a fresh, migrated database and returns its URL, as often as it is called."""
    made: list[str] = []

    def make() -> str:
        name = f"graft_test_{secrets.token_hex(8)}"
        if request.param == "sqlite":
            url = f"sqlite:///{tmp_path / name}.db"
        else:
            _on_server(f"CREATE DATABASE {name}")
            made.append(name)
            url = make_url(POSTGRES_URL).set(database=name).render_as_string(hide_password=False)
        upgrade(url)
        return url

    yield make
    for name in made:
        _on_server(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def any_database(new_database_url: Callable[[], str]) -> Iterator[Database]:
    database = Database(new_database_url())
    yield database
    database.dispose()


def _on_server(statement: str) -> None:
    engine = create_engine(POSTGRES_URL, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()
