"""What hangs on the end of a run, besides the job itself: the data set of an ingest, and the job's files."""

import contextlib
from functools import partial

import structlog
from sqlalchemy.orm import Session

from app import holdings
from app.datasets import catalog
from app.db.engine import Database
from app.errors import Conflict, NotFound
from app.jobs import queue
from app.jobs.states import JobKind, JobStatus
from app.storage import LocalStorage

log = structlog.get_logger(__name__)


def settle_dataset(session: Session, job_id: str, *, kind: JobKind, status: JobStatus) -> None:
    """Makes the data set of an ingest fail with it; in the transaction that ended the ingest as `status`."""
    if kind is JobKind.ingest and status is JobStatus.failed:
        ingest = queue.find(session, job_id, kind=kind)
        assert ingest.error is not None, "a failed job has an error"
        # A data set that was deleted meanwhile needs no ending.
        with contextlib.suppress(Conflict):
            catalog.mark_failed(session, ingest.dataset_id, ingest.error)


def delete_files_if_over(database: Database, storage: LocalStorage, job_id: str, *, kind: JobKind) -> None:
    """Deletes the job's checkpoints, unless another run may still go on from them.

    A run that lost its claim does not delete what it wrote: the next one may just be reading its checkpoint. What the
    disk does not let go of is left to the sweep: other jobs run beside this one.
    """
    with database.read() as session:
        try:
            is_over = JobStatus(queue.find(session, job_id, kind=kind).status).is_final
        except NotFound:
            is_over = True
    if is_over:
        try:
            storage.delete(f"jobs/{job_id}")
        except OSError as error:
            log.error("job_files_not_deleted", job_id=job_id, error=str(error))


def sweep_files(database: Database, storage: LocalStorage) -> None:
    """Deletes what processes that died have left: staged files, files of ended jobs, files that no row came to speak
    of. What the database does not know stays: it may be another database's, which this one was taken for."""
    storage.sweep()
    storage.sweep_announced(partial(holdings.has_row, database))
    folder = storage.path("jobs")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    with database.read() as session:
        ended = queue.ended_ids(session, names)
    for name in ended:
        storage.delete(f"jobs/{name}")
