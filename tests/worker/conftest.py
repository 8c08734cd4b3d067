"""A workshop for each test, closed at its end."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from workshop import Workshop

from app.db.engine import Database


@pytest.fixture
def workshop(tmp_path: Path, database: Database) -> Iterator[Workshop]:
    workshop = Workshop(tmp_path, database)
    yield workshop
    workshop.close()
