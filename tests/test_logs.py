"""Log lines: one per event, whole, and nothing in them that was not meant to be."""

import functools
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from app import logs
from app.settings import Settings


class Printed:
    """What was written to standard error."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    @functools.cached_property
    def text(self) -> str:
        return self._capture.readouterr().err

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Iterator[Printed]:
    """Logging is as it was afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield Printed(capsys)
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def configure(log_format: str, log_level: str = "info") -> None:
    logs.configure(Settings(_env_file=None, log_format=log_format, log_level=log_level))  # type: ignore[arg-type]


def test_bound_ids_stand_in_every_line(printed: Printed) -> None:
    configure("json")
    structlog.contextvars.bind_contextvars(request_id="r1")

    structlog.get_logger().info("uploaded", dataset_id="ds_1")
    logging.getLogger("some.library").warning("of a %s", "library")

    ours, theirs = printed.lines
    assert (ours["event"], ours["level"], ours["request_id"], ours["dataset_id"]) == ("uploaded", "info", "r1", "ds_1")
    assert (theirs["event"], theirs["level"], theirs["request_id"]) == ("of a library", "warning", "r1")
    assert ours["timestamp"].endswith("Z")


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_callers_text_cannot_begin_a_line_of_its_own(printed: Printed, log_format: str) -> None:
    configure(log_format)

    structlog.get_logger().info("request", path="/x\n2026 [info] forged\x1b[2J")

    assert len(printed.text.splitlines()) == 1
    assert "\x1b[2J" not in printed.text


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_traceback_has_no_local_variables(printed: Printed, log_format: str) -> None:
    configure(log_format)
    key = "ft_" + "secret"

    try:
        raise ValueError(len(key))
    except ValueError:
        structlog.get_logger().exception("failed")

    assert "ValueError: 9" in printed.text
    assert key not in printed.text


def test_lines_below_the_level_are_left_out(printed: Printed) -> None:
    configure("json", log_level="warning")

    structlog.get_logger().info("left out")
    structlog.get_logger().warning("kept")

    assert [line["event"] for line in printed.lines] == ["kept"]


def test_a_full_disk_under_the_lines_ends_nothing() -> None:
    told_on = "import structlog; from app import logs; from app.settings import Settings; "
    told_on += "logs.configure(Settings(_env_file=None)); structlog.get_logger().info('lost'); print('went on')"

    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [sys.executable, "-c", told_on], stdout=subprocess.PIPE, stderr=full, text=True, check=False
        )

    assert ran.stdout == "went on\n"
