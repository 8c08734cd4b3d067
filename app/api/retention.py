"""What is kept for a time only: the events of ended jobs, ended batches with their files, failed jobs if so wished.

Every API process sweeps, in transactions of a few rows each, so that nobody waits for it; what one has taken the next
does not find. Predictions, uploads, webhook deliveries and the audit log have sweeps of their own, where they are made.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.api.services import Services
from app.errors import GraftError, NotFound
from app.jobs import batches, events, queue
from app.jobs.states import JobKind, JobStatus

SWEEP_INTERVAL_SECONDS = 3600.0
# Of one transaction. A job has some hundred events, so it takes the write lock for some ten milliseconds.
JOBS_AT_A_TIME = 20

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Swept:
    """How many jobs and batches were taken something of, or taken themselves."""

    logs: int
    batches: int
    failed_jobs: int


async def sweep_ended(services: Services) -> None:
    """At the start and every hour. Never returns."""
    while True:
        try:
            swept = await asyncio.to_thread(sweep, services)
            if any(vars(swept).values()):
                log.info("ended jobs swept", **vars(swept))
        except (OSError, SQLAlchemyError, GraftError) as error:
            log.error("ended jobs cannot be swept", error=type(error).__name__)
        await asyncio.sleep(SWEEP_INTERVAL_SECONDS)


def sweep(services: Services) -> Swept:
    """Of all workspaces."""
    settings, clock = services.settings, services.clock
    of_failed = settings.failed_job_days
    return Swept(
        batches=_delete_batches(services, clock.before(timedelta(days=settings.batch_days))),
        failed_jobs=0 if of_failed is None else _delete_failed(services, clock.before(timedelta(days=of_failed))),
        logs=_forget_logs(services, clock.before(timedelta(days=settings.job_events_days))),
    )


def _forget_logs(services: Services, moment: datetime) -> int:
    with services.database.read() as session:
        jobs = events.jobs_with_log(session, ended_before=moment)
    for few in _few_at_a_time(jobs):
        with services.database.write() as session:
            events.forget(session, few)
    return len(jobs)


def _delete_batches(services: Services, moment: datetime) -> int:
    with services.database.read() as session:
        ended = queue.ended_before(session, moment, kind=JobKind.prediction)
    for batch_id in ended:
        # Announced, so that files whose row is gone are swept should this process die before it came to them.
        is_there = partial(_is_there, services, batch_id)
        with services.storage.announced(batches.folder_key(batch_id), is_wanted=is_there):
            _delete_row(services, batch_id, kind=JobKind.prediction)
        services.storage.delete(f"jobs/{batch_id}")
    return len(ended)


def _delete_failed(services: Services, moment: datetime) -> int:
    unsuccessful = (JobStatus.failed, JobStatus.cancelled)
    with services.database.read() as session:
        ended = queue.ended_before(session, moment, kind=JobKind.training, statuses=unsuccessful)
    for job_id in ended:
        _delete_row(services, job_id, kind=JobKind.training)
        services.storage.delete(f"jobs/{job_id}")
    return len(ended)


def _delete_row(services: Services, job_id: str, *, kind: JobKind) -> None:
    """Unless somebody else was first."""
    with contextlib.suppress(NotFound), services.database.write() as session:
        queue.delete(session, job_id, kind=kind)


def _is_there(services: Services, job_id: str) -> bool:
    with services.database.read() as session:
        return queue.exists(session, job_id)


def _few_at_a_time(job_ids: Sequence[str]) -> list[Sequence[str]]:
    return [job_ids[start : start + JOBS_AT_A_TIME] for start in range(0, len(job_ids), JOBS_AT_A_TIME)]
