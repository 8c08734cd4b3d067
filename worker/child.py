"""Runs one job in a process of its own, so that whatever the job does, its worker lives on.

Started ahead of need, with everything imported; says so with one byte on --ready-fd, then waits for one line of JSON on
standard input: {"settings", "claim"}. Standard input stays open as long as the worker lives; at its end this process
ends too, at once. SIGTERM gives the job back.
"""

import argparse
import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, Protocol, TextIO, cast

import structlog
from opentelemetry.trace import Span, StatusCode
from sqlalchemy.orm import Session

from app import logs, telemetry
from app.allocator import keep_freed_memory
from app.db.engine import Database
from app.errors import GraftError, JobFailed, NotFound, StorageFull
from app.jobs import queue
from app.jobs.queue import Cancelled, Claim, ClaimLost
from app.jobs.states import JobKind, JobStatus
from app.precedence import Precedence
from app.settings import Settings
from app.storage import LocalStorage, is_disk_full
from worker import endings
from worker.reporter import DATABASE_ERRORS, Patience, Reporter, ShuttingDown
from worker.spans import StageSpans
from worker.trackers import Trackers
from worker.wakeup import Wakeup

log = structlog.get_logger(__name__)

# Imported by name, because they take the memory and the seconds of torch, which the worker itself does without.
STORIES = {
    JobKind.training: "worker.run_job:run_training",
    JobKind.ingest: "worker.run_ingest:run_ingest",
    JobKind.prediction: "worker.run_batch:run_batch",
}

# Nobody waits for a batch as for an answer or a model: on a CPU that all want, it gets about a quarter of a training's
# share, and all of an idle one.
NICENESS = {JobKind.prediction: 6}

# The database could not be reached for the job's last word; what sysexits.h calls a temporary failure.
EXIT_DATABASE_UNAVAILABLE = 75


class Story(Protocol):
    """The work of one kind of job, from claim to success. What it raises, `run` turns into the job's end."""

    def __call__(
        self, claim: Claim, *, settings: Settings, database: Database, storage: LocalStorage, reporter: Reporter
    ) -> None: ...


def main(load_story: Callable[[JobKind], Story]) -> int:
    """Waits for an order on standard input, runs it and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m worker.child", description="Runs one job; started by the worker.")
    parser.add_argument("--kind", type=JobKind, required=True)
    parser.add_argument("--ready-fd", type=int, required=True)
    arguments = parser.parse_args()
    os.nice(NICENESS.get(arguments.kind, 0))
    keep_freed_memory()
    story = load_story(arguments.kind)
    gc.freeze()  # what is there by now stays: looking through half a million objects would take a job 0.2 s

    os.write(arguments.ready_fd, b"r")  # stays open: the worker sees this process end by the end of the pipe
    line = sys.stdin.readline()
    if not line:
        return 0
    shutdown = Wakeup()

    def give_back(_number: int, _frame: FrameType | None) -> None:
        shutdown.set()

    signal.signal(signal.SIGTERM, give_back)
    threading.Thread(target=_end_with_worker, args=(sys.stdin,), daemon=True).start()

    order = json.loads(line)
    settings = Settings(**order["settings"])
    claim = Claim.from_dict(order["claim"])
    logs.configure(settings)
    structlog.contextvars.bind_contextvars(job_id=claim.job_id, dataset_id=claim.dataset_id, fence=claim.fence)
    database = Database(settings.resolved_database_url, ballast_bytes=settings.ballast_bytes)
    database = database.within(claim.workspace_id)
    storage = LocalStorage(settings.storage_root, min_free_bytes=settings.min_free_bytes)
    telemetry.start(settings, service="graft-worker")
    with (
        telemetry.continued(f"run {claim.kind}", claim.trace_context, graft_job=claim.job_id) as span,
        StageSpans() as stages,
        Trackers(claim, settings, database) as trackers,
    ):
        reporter = Reporter(
            database,
            claim,
            shutdown=shutdown,
            give_way=Precedence.of(settings).give_way,
            observers=[stages, trackers],
            patience=Patience.of(settings),
        )
        code = run(story, claim, settings=settings, database=database, storage=storage, reporter=reporter)
        _note_outcome(span, claim, database)
    telemetry.stop()
    return code


def order_line(claim: Claim, settings: Settings) -> bytes:
    """What the worker writes to a child's standard input."""
    return json.dumps({"settings": settings.model_dump(mode="json"), "claim": claim.to_dict()}).encode() + b"\n"


def run(
    story: Story,
    claim: Claim,
    *,
    settings: Settings,
    database: Database,
    storage: LocalStorage,
    reporter: Reporter,
) -> int:
    """Runs the story, and ends the claim as its exceptions say. Returns the exit status."""
    log.info("job_started", kind=claim.kind, attempt=claim.attempt)
    try:
        try:
            story(claim, settings=settings, database=database, storage=storage, reporter=reporter)
        except Cancelled:
            reporter.last_word(lambda session: queue.finish_cancelled(session, claim))
        except ShuttingDown:
            with database.write() as session:
                queue.give_back(session, claim)
        except (ClaimLost, *DATABASE_ERRORS):
            raise
        except Exception as error:  # the one door around a job: whatever it raises is its outcome
            record = _as_record(error)
            log.error("job_failed", code=record["code"], exc_info=None if isinstance(error, GraftError) else error)
            reporter.last_word(lambda session: _fail(session, claim, record))
    except ClaimLost:
        log.warning("claim_lost")
    except (ShuttingDown, StorageFull, *DATABASE_ERRORS) as error:
        log.error("database_unavailable", error=type(error).__name__)
        return EXIT_DATABASE_UNAVAILABLE
    log.info("job_left")
    return 0


def _note_outcome(span: Span, claim: Claim, database: Database) -> None:
    if not span.is_recording():
        return
    with contextlib.suppress(NotFound, *DATABASE_ERRORS), database.read() as session:
        job = queue.find(session, claim.job_id, kind=claim.kind)
        span.set_attribute("graft.status", job.status)
        if job.error is not None:
            span.set_status(StatusCode.ERROR, job.error["code"])


def _fail(session: Session, claim: Claim, record: dict[str, Any]) -> JobStatus:
    status = queue.fail(session, claim, record)
    endings.settle_dataset(session, claim.job_id, kind=claim.kind, status=status)
    return status


def _as_record(error: Exception) -> dict[str, Any]:
    """What the job's user gets to read: no path, no text of a library; those are in the log."""
    if isinstance(error, GraftError):
        return error.as_record()
    if is_disk_full(error):
        return StorageFull(
            "The server's disk became full while the job ran, and nothing of it was kept. Delete data sets or models, "
            "or ask the operator to make room, and submit it again."
        ).as_record()
    if _is_out_of_memory(error):
        return JobFailed(
            "The job ran out of memory. Use a smaller batch_size, a smaller image_size or a smaller backbone.",
            code="out_of_memory",
            title="Out of memory",
        ).as_record()
    if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):  # torch's batch-norm
        return JobFailed(
            "One picture at a time is too few for this network at this image_size: it normalises by what the pictures "
            "of a batch have in common. Use a batch_size of 2 or more, or a larger image_size.",
            code="batch_too_small",
            title="The batches are too small",
        ).as_record()
    return JobFailed(
        f"The job stopped on an unexpected {type(error).__name__}; the worker's log says more under this job's id.",
        code="internal_error",
        title="Internal error",
    ).as_record()


def _is_out_of_memory(error: Exception) -> bool:
    # By name, so that the worker, which imports this module, does without torch; on the CPU torch's allocator raises a
    # plain RuntimeError.
    return (
        isinstance(error, MemoryError)
        or any(base.__name__ == "OutOfMemoryError" for base in type(error).__mro__)
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _end_with_worker(standard_input: TextIO) -> NoReturn:
    """Waits for the worker's end and ends this process, and those that it started, without a further write."""
    standard_input.read()
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _import_story(kind: JobKind) -> Story:
    module, _, function = STORIES[kind].partition(":")
    return cast(Story, getattr(importlib.import_module(module), function))


if __name__ == "__main__":
    sys.exit(main(_import_story))
