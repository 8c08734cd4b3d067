"""What the server prints, for tests that look at it."""

import io
import sys

import pytest
import structlog


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
