"""What the server prints, for tests that look at it, and a server on either kind of database."""

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import api_builders
import pytest
import structlog
from api_builders import RunningServer


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """All that is printed from now on, log lines included, which keep to the stream that was there at import.

    It is never closed: the server's thread writes a line after its last answer, and writing to pytest's own captured
    streams while they change has ended the whole process.
    """
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(stream))
    return stream


@pytest.fixture
def any_server(new_database_url: Callable[[], str], tmp_path: Path) -> Iterator[RunningServer]:
    """One that may have webhooks, on SQLite and on PostgreSQL."""
    settings = api_builders.settings_for(tmp_path, webhooks=True, database_url=new_database_url())
    with RunningServer(settings) as server:
        yield server
