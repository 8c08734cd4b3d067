"""What is kept for a time only: the events of ended jobs, ended batches with their files, failed jobs if so wished.

Every API process sweeps, in transactions of a few rows each, so that nobody waits for it; what one has taken the next
does not find. Predictions, uploads, webhook deliveries and the audit log have sweeps of their own, where they are made.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeVar

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app import holdings
from app.api.services import Services
from app.errors import GraftError, NotFound
from app.jobs import batches, events, queue
from app.jobs.states import JobKind, JobStatus

SWEEP_INTERVAL_SECONDS = 3600.0
# By then a clock that was wrong when the machine started has been set.
FIRST_SWEEP_SECONDS = 300.0
# Of one transaction. A job has some hundred events, so it takes the write lock for some ten milliseconds.
JOBS_AT_A_TIME = 20

log = structlog.get_logger(__name__)

Item = TypeVar("Item")


@dataclass(frozen=True)
class Swept:
    """How many jobs and batches were taken something of, or taken themselves."""

    logs: int
    batches: int
    failed_jobs: int


async def sweep_ended(services: Services) -> None:
    """Soon after the start and every hour. Never returns."""
    await asyncio.sleep(FIRST_SWEEP_SECONDS)
    while True:
        try:
            swept = await asyncio.to_thread(sweep, services)
            if any(vars(swept).values()):
                log.info("ended jobs swept", **vars(swept))
        except (OSError, SQLAlchemyError, GraftError) as error:
            log.error("ended jobs cannot be swept", error=type(error).__name__)
        await asyncio.sleep(SWEEP_INTERVAL_SECONDS)


def sweep(services: Services) -> Swept:
    """Of all workspaces. Ends early where the server stops."""
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
    few_at_a_time = [jobs[start : start + JOBS_AT_A_TIME] for start in range(0, len(jobs), JOBS_AT_A_TIME)]
    return sum(len(few) for few in _done(services, few_at_a_time, _forget))


def _forget(services: Services, job_ids: Sequence[str]) -> None:
    services.database.free(lambda session: events.forget(session, job_ids))


def _delete_batches(services: Services, moment: datetime) -> int:
    with services.database.read() as session:
        ended = queue.ended_before(session, moment, kind=JobKind.prediction)
    return len(_done(services, ended, _delete_batch))


def _delete_batch(services: Services, batch_id: str) -> None:
    _delete(services, batch_id, batches.folder_key(batch_id), kind=JobKind.prediction)


def _delete_failed(services: Services, moment: datetime) -> int:
    unsuccessful = (JobStatus.failed, JobStatus.cancelled)
    with services.database.read() as session:
        ended = queue.ended_before(session, moment, kind=JobKind.training, statuses=unsuccessful)
    return len(_done(services, ended, _delete_job))


def _delete_job(services: Services, job_id: str) -> None:
    _delete(services, job_id, kind=JobKind.training)


def _done(services: Services, items: Sequence[Item], act: Callable[[Services, Item], None]) -> list[Item]:
    """Those that were acted on. One that cannot be does not keep the others."""
    done = []
    for item in items:
        if services.stopping.is_set():
            break
        try:
            act(services, item)
            done.append(item)
        except (OSError, SQLAlchemyError) as error:
            log.error("ended job cannot be swept", what=item, error=type(error).__name__)
    return done


def _delete(services: Services, job_id: str, *folders: str, kind: JobKind) -> None:
    with contextlib.suppress(NotFound):  # somebody else was first
        holdings.delete(
            services.database,
            services.storage,
            *folders,
            f"jobs/{job_id}",
            rows=lambda session: queue.delete(session, job_id, kind=kind),
        )
