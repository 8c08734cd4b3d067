"""An ingest ends its data set and its job in one step, whatever happens to either meanwhile."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
from builders import class_folders, encoded, jpeg, slow_jpeg, written, zip_of
from PIL import Image
from queue_builders import claim_next, find, submit

from app import holdings
from app.datasets import catalog
from app.datasets.ingest import PACKED_SIDE, archive_key, manifest_key, packed_key
from app.db.engine import Database
from app.db.tables import DEFAULT_WORKSPACE, DatasetRow
from app.errors import ArchiveRefused, Conflict
from app.jobs import queue
from app.jobs.queue import Cancelled, Claim, ClaimLost
from app.jobs.states import JobKind
from app.settings import MEBIBYTE, Settings
from app.storage import LocalStorage
from worker.reporter import Reporter
from worker.run_ingest import run_ingest
from worker.wakeup import Wakeup

Run = Callable[[Claim], None]


@pytest.fixture
def run(database: Database, storage: LocalStorage) -> Run:
    def ingest(claim: Claim) -> None:
        run_ingest(
            claim,
            settings=Settings(_env_file=None),
            database=database,
            storage=storage,
            reporter=Reporter(database, claim, shutdown=Wakeup()),
        )

    return ingest


def uploaded(database: Database, storage: LocalStorage, files: Mapping[str, bytes]) -> Claim:
    """A data set of these files, and the claim on its ingest."""
    with database.write() as session:
        row = catalog.create(session, name="x", size_bytes=1, sha256="00", options={"val_fraction": 0.25, "seed": 0})
    written(storage.path(archive_key(row.id)), zip_of(files))
    submit(database, kind=JobKind.ingest, dataset_id=row.id)
    claim = claim_next(database, kind=JobKind.ingest)
    assert claim is not None
    return claim


def dataset(database: Database, claim: Claim) -> DatasetRow:
    with database.read() as session:
        return catalog.find(session, claim.dataset_id)


def job_status(database: Database, claim: Claim) -> str:
    return find(database, claim.job_id, kind=JobKind.ingest).status


def test_good_archive_makes_data_set_and_job_end_well(database: Database, storage: LocalStorage, run: Run) -> None:
    claim = uploaded(database, storage, class_folders(8) | {"cat/cut.jpg": jpeg(8)[:-50]})
    run(claim)
    row = dataset(database, claim)
    assert (row.status, row.splits, job_status(database, claim)) == (
        "ready",
        {"train": 12, "val": 4, "test": 0},
        "succeeded",
    )
    assert storage.exists(f"datasets/{row.id}/manifest.jsonl")
    folder = storage.path(f"datasets/{row.id}/packed-256")
    assert row.packed_bytes == sum(path.stat().st_size for path in folder.iterdir())


def test_picture_that_takes_too_much_is_listed_and_the_rest_goes_on(database: Database, storage: LocalStorage) -> None:
    vast = encoded(Image.new("RGBA", (6000, 6000), (255, 0, 0, 128)))
    claim = uploaded(database, storage, class_folders(8) | {"cat/slow.jpg": slow_jpeg(), "dog/vast.png": vast})
    run_ingest(
        claim,
        settings=Settings(_env_file=None, decode_cpu_seconds=0.5, decode_memory_bytes=128 * MEBIBYTE),
        database=database,
        storage=storage,
        reporter=Reporter(database, claim, shutdown=Wakeup()),
    )
    row = dataset(database, claim)
    assert (row.status, row.num_images, job_status(database, claim)) == ("ready", 16, "succeeded")
    assert row.rejected == [
        {"path": "cat/slow.jpg", "reason": "takes more than 0.5 s to decode"},
        {"path": "dog/vast.png", "reason": "takes more memory to decode than this server gives a picture"},
    ]


def test_class_without_readable_pictures_fails_both_and_keeps_the_report(
    database: Database, storage: LocalStorage, run: Run
) -> None:
    claim = uploaded(database, storage, class_folders(4) | {f"emu/{i}.jpg": jpeg(i)[:-50] for i in range(3)})
    run(claim)
    row = dataset(database, claim)
    assert (row.status, row.num_images, row.num_rejected, job_status(database, claim)) == ("failed", 8, 3, "failed")
    assert (row.packed_bytes, storage.exists(packed_key(row.id, PACKED_SIDE))) == (None, False)
    assert row.error is not None
    assert row.error["code"] == find(database, claim.job_id, kind=JobKind.ingest).error["code"] == "too-few-images"  # type: ignore[index]


def test_archive_that_cannot_be_used_at_all_raises_for_the_child_to_settle(
    database: Database, storage: LocalStorage, run: Run
) -> None:
    claim = uploaded(database, storage, {"cat/1.jpg": jpeg(1)})
    with pytest.raises(ArchiveRefused):
        run(claim)
    assert job_status(database, claim) == "running"


def test_data_set_deleted_meanwhile_leaves_no_files(database: Database, storage: LocalStorage) -> None:
    """Deleted at the first report of progress, so that the ingest publishes files of a data set that is gone."""
    claim = uploaded(database, storage, class_folders(4))
    deleted: list[str] = []

    def clock() -> float:
        if not deleted:
            deleted.append(claim.dataset_id)
            with database.write() as session:
                catalog.delete(session, claim.dataset_id)
        return 0.0

    reporter = Reporter(database, claim, shutdown=Wakeup(), monotonic=clock)
    with pytest.raises(Conflict):
        run_ingest(claim, settings=Settings(_env_file=None), database=database, storage=storage, reporter=reporter)
    assert deleted == [claim.dataset_id]
    assert not storage.exists(f"datasets/{claim.dataset_id}")


@pytest.mark.slow
def test_data_set_deleted_before_its_ingest_was_killed_leaves_no_files(
    database: Database, storage: LocalStorage
) -> None:
    claim = uploaded(database, storage, class_folders(4))
    url = database.engine.url.render_as_string(hide_password=False)
    killed = multiprocessing.get_context("spawn").Process(
        target=ingest_until_deleted_and_killed, args=(claim, url, storage.root)
    )
    killed.start()
    killed.join(timeout=60)
    assert killed.exitcode == -signal.SIGKILL
    assert storage.exists(f"datasets/{claim.dataset_id}/manifest.jsonl")

    storage.sweep_announced(partial(holdings.has_row, database), older_than_seconds=-1)
    assert not storage.exists(f"datasets/{claim.dataset_id}")
    assert storage.announced_keys() == set()


def test_killed_ingest_of_a_data_set_that_is_still_there_leaves_it_its_files(
    database: Database, storage: LocalStorage, run: Run
) -> None:
    claim = uploaded(database, storage, class_folders(4))
    with pytest.raises(ZeroDivisionError), storage.announced(f"datasets/{claim.dataset_id}", is_wanted=lambda _: 1 / 0):
        run(claim)  # no word of the database at the end, as of a process that is killed
    storage.sweep_announced(partial(holdings.has_row, database), older_than_seconds=-1)
    assert storage.exists(archive_key(claim.dataset_id))
    assert storage.announced_keys() == set()


def ingest_until_deleted_and_killed(claim: Claim, url: str, root: Path) -> None:
    """As the API deletes a data set, and the worker then kills its child for not heeding the cancel."""
    database = Database(url).within(DEFAULT_WORKSPACE)

    class Storage(LocalStorage):
        def publish(self, staged: Path, key: str) -> None:
            super().publish(staged, key)
            if key == manifest_key(claim.dataset_id):
                with database.write() as session:
                    catalog.delete(session, claim.dataset_id)
                os.kill(os.getpid(), signal.SIGKILL)

    reporter = Reporter(database, claim, shutdown=Wakeup())
    run_ingest(claim, settings=Settings(_env_file=None), database=database, storage=Storage(root), reporter=reporter)


def test_cancelled_ingest_ends_at_the_next_tick(database: Database, storage: LocalStorage, run: Run) -> None:
    claim = uploaded(database, storage, class_folders(4))
    with database.write() as session:
        queue.cancel_ingest(session, claim.dataset_id)
    with pytest.raises(Cancelled):
        run(claim)
    assert not storage.exists(f"datasets/{claim.dataset_id}/manifest.jsonl")


def test_ingest_taken_over_by_another_worker_writes_nothing(
    database: Database, storage: LocalStorage, run: Run
) -> None:
    claim = uploaded(database, storage, class_folders(4))
    with database.write() as session:
        queue.crashed(session, claim, "It was paused.", max_crashes=3)
    second = claim_next(database, kind=JobKind.ingest)
    assert second is not None
    with pytest.raises(ClaimLost):
        run(claim)
    assert dataset(database, claim).status == "processing"
    run(second)
    assert (dataset(database, claim).status, job_status(database, claim)) == ("ready", "succeeded")
