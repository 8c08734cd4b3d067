"""The story of one ingest: the data set's row, the work in `app/datasets/ingest.py`, a closer look, the row again."""

from dataclasses import replace
from functools import partial

from sqlalchemy.orm import Session

from app import holdings, workspaces
from app.datasets import catalog
from app.datasets.ingest import IngestLimits, IngestOptions, archive_key, ingest
from app.datasets.report import IngestReport, merged
from app.db.engine import Database
from app.jobs import queue
from app.jobs.queue import Claim
from app.settings import Settings
from app.storage import LocalStorage
from app.vision.decoding import Decoders
from app.workspaces import Limits
from worker.closer_look import look_closer
from worker.reporter import Reporter

# For progress: without a GPU, the network takes most of the time.
_INGEST_SHARE = 0.3


def run_ingest(
    claim: Claim, *, settings: Settings, database: Database, storage: LocalStorage, reporter: Reporter
) -> None:
    """Leaves the data set ready, or failed with its report, and ends the job in the same transaction.

    Raises what the reporter does, and GraftError for an archive that cannot be used at all.
    """
    with database.read() as session:
        dataset = catalog.find(session, claim.dataset_id)
    # What is published after the data set was deleted belongs to nobody; also where this process is killed.
    with storage.announced(f"datasets/{dataset.id}", is_wanted=partial(holdings.has_row, database)):
        with Decoders.from_settings(settings) as decoders:
            report = ingest(
                storage.path(archive_key(dataset.id)),
                storage=storage,
                dataset_id=dataset.id,
                options=IngestOptions(
                    val_fraction=dataset.options["val_fraction"], seed=dataset.options["seed"], kind=dataset.kind
                ),
                limits=IngestLimits.from_settings(settings),
                tick=lambda fraction: reporter.progress("ingest", fraction=_INGEST_SHARE * fraction),
                decoders=decoders,
                state_size=lambda packed_bytes: reporter.transaction(
                    lambda session: _state_size(session, claim, settings, packed_bytes)
                ),
            )
        report = replace(report, warnings=merged(dataset.warnings, report.warnings))
        if report.error is None:
            seen = look_closer(
                report, claim, settings=settings, storage=storage, reporter=reporter, start=_INGEST_SHARE
            )
            report = replace(report, warnings=merged(report.warnings, seen))
        reporter.transaction(lambda session: _settle(session, claim, report))


def _state_size(session: Session, claim: Claim, settings: Settings, packed_bytes: int) -> None:
    """Raises TooManyRequests where that is more than the workspace may keep."""
    workspace = workspaces.load(session, claim.workspace_id, Limits.from_settings(settings))
    workspace.check_room(session, packed_bytes)
    catalog.state_size(session, claim.dataset_id, packed_bytes)


def _settle(session: Session, claim: Claim, report: IngestReport) -> None:
    if report.error is None:
        queue.succeed(session, claim)
        catalog.mark_ready(session, claim.dataset_id, report)
    else:
        error = report.error.as_record()
        queue.fail(session, claim, error)
        catalog.mark_failed(session, claim.dataset_id, error, report=report)
