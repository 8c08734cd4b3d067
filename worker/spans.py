"""What a job does, as spans of its trace: its stages, and the epochs in them."""

import contextlib
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from opentelemetry import trace

from app import telemetry


class StageSpans:
    """An Observer that has a span for each stage until the next, and one for each epoch; the last ends with it."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()

    def stage(self, stage: str) -> None:
        self._open.close()
        self._open.enter_context(trace.use_span(telemetry.start_span(stage), end_on_exit=True))

    def epoch(self, epoch: Mapping[str, Any]) -> None:
        figures = {name: value for name, value in epoch.items() if isinstance(value, str | int | float)}
        ended_at = time.time_ns()
        span = telemetry.start_span(f"epoch {epoch['epoch']}", start_time=ended_at - int(float(epoch["seconds"]) * 1e9))
        for name, value in figures.items():
            span.set_attribute(f"graft.{name}", value)
        span.end(ended_at)
