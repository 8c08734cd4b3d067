"""One structured line per event, on standard error: JSON for machines, aligned text for people.

`request_id` and `job_id` are bound once, with `structlog.contextvars`, and stand in every line below. Log what
happened and to which id; never keys, headers, query strings or file contents.
"""

import contextlib
import logging
import sys
import threading
from collections.abc import MutableMapping
from typing import Any

import structlog

from app.settings import Settings


def configure(settings: Settings) -> None:
    """Sets up logging for this process, our own lines and those of libraries alike."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _escape_control_characters,
    ]
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    rendering: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(ensure_ascii=False)]
        if as_json
        else [
            # The default formatter prints local variables, and with them keys and pictures.
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    # Our request line replaces uvicorn's, and its banners say nothing that ours do not.
    logging.getLogger("uvicorn.access").disabled = True
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    lines = _Lines()
    # Past the standard library: its record, and the copy of it that is formatted, are most of what a line costs.
    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
        logger_factory=lambda *_names: lines,
        cache_logger_on_first_use=False,
    )


class _Lines:
    """Writes to standard error, whole lines; where that cannot be written to, what was to be told goes on untold."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def msg(self, line: str) -> None:
        # A full disk, or a reader that has left; and a stream that is closed.
        with self._lock, contextlib.suppress(OSError, ValueError):
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    debug = info = warning = error = critical = msg


def _escape_control_characters(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A caller's text must not be able to end a line and begin a forged one."""
    for name, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[name] = "".join(
                character if character.isprintable() else repr(character)[1:-1] for character in value
            )
    return event
