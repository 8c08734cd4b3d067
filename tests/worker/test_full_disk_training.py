"""A disk that fills while a job works: the job says so, nothing half written stays, and the worker goes on."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import disks
import numpy as np
import pytest
import torch
from builders import class_folders, written, zip_of
from disks import fill, leave
from queue_builders import claim_next, event_log, find, submit
from safetensors import SafetensorError
from training_jobs import DATASET, Job, write_dataset
from workshop import Workshop, is_running, wait_until

from app.datasets.ingest import IngestLimits, IngestOptions, archive_key, ingest
from app.db.engine import Database
from app.db.migrate import upgrade
from app.db.tables import DEFAULT_WORKSPACE
from app.errors import StorageFull
from app.settings import MEBIBYTE, Settings
from app.storage import LocalStorage, is_disk_full
from app.vision import artifact
from app.vision.artifact import Artifact
from app.vision.backbones import BACKBONES
from app.vision.classifier import Classifier
from worker.reporter import Patience, Reporter
from worker.training.checkpoint import Checkpoints
from worker.training.features import FeatureCache
from worker.wakeup import Wakeup

CHILD = (sys.executable, "-m", "worker.child")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Room for a few checkpoints of the smallest network."""
    with disks.mounted(tmp_path / "disk", mebibytes=64) as folder:
        yield folder


@pytest.fixture
def workshop(disk: Path) -> Iterator[Workshop]:
    """Database and files on that disk."""
    url = f"sqlite:///{disk / 'graft.db'}"
    upgrade(url)
    database = Database(url).within(DEFAULT_WORKSPACE)
    workshop = Workshop(disk, database)
    yield workshop
    workshop.close()
    database.dispose()


@pytest.mark.slow
def test_job_whose_disk_stays_full_says_so_and_fails_and_the_next_one_succeeds(workshop: Workshop, disk: Path) -> None:
    write_dataset(workshop.storage)
    settings = workshop.settings(device="cpu", allow_downloads=False, min_free_bytes=0)
    long = Job(
        workshop.database,
        workshop.storage,
        settings,
        method="from_scratch",
        backbone="squeezenet1_1",
        hyperparameters={"epochs": 1000},
    )
    Database(settings.resolved_database_url, ballast_bytes=MEBIBYTE).keep_ballast()
    worker = workshop.start_worker(
        child_command=CHILD, device="cpu", allow_downloads=False, min_free_bytes=0, ballast_bytes=MEBIBYTE,
        stall_timeout_seconds=200.0, lease_seconds=100.0, full_disk_retry_seconds=1.0, full_disk_patience_seconds=5.0,
    )  # fmt: skip
    checkpoints = workshop.storage.path(f"jobs/{long.id}")
    wait_until(lambda: list(checkpoints.glob("*/*")), within_seconds=100)

    fill(disk)
    wait_until(lambda: workshop.status(long.id) != "running", within_seconds=150)

    row = find(workshop.database, long.id)
    assert (row.status, row.error and row.error["code"]) == ("failed", "storage-full")
    assert row.error["status"] == 507
    assert row.error["detail"].startswith("The server's disk stayed full for a minute")
    assert str(disk) not in json.dumps(row.error)
    told = [event.data for event in event_log(workshop.database, long.id) if event.event == "log"]
    assert [line["message"].split(":")[0] for line in told if line.get("reason") == "disk_full"] == [
        "The server's disk is full"
    ]
    wait_until(lambda: not checkpoints.exists() and not list(workshop.storage.path("staging").iterdir()))

    (disk / "filler").unlink()
    short = Job(
        workshop.database,
        workshop.storage,
        settings,
        method="from_scratch",
        backbone="squeezenet1_1",
        hyperparameters={"epochs": 1},
    )
    wait_until(lambda: workshop.status(short.id) in ("succeeded", "failed"), within_seconds=150)
    assert workshop.status(short.id) == "succeeded"
    assert is_running(worker.pid)


@pytest.mark.slow
def test_job_keeps_its_lease_on_a_full_disk(workshop: Workshop, disk: Path) -> None:
    Database(workshop.settings().resolved_database_url, ballast_bytes=MEBIBYTE).keep_ballast()
    workshop.start_worker(ballast_bytes=MEBIBYTE)
    job = workshop.submit("work_until_released")
    workshop.wait_for_pid(job)
    fill(disk)
    beats = find(workshop.database, job).beat

    wait_until(lambda: find(workshop.database, job).beat > beats + 30)
    assert find(workshop.database, job).attempt == 1


def test_checkpoint_that_finds_no_room_leaves_the_one_before(disk: Path) -> None:
    storage = LocalStorage(disk)
    checkpoints = Checkpoints(storage, job_id="job_1", fence=1)
    tensors = {"weights": torch.arange(1_000_000, dtype=torch.float32)}
    checkpoints.save(tensors, {"step": 1})
    for free_bytes in (0, 1_000_000, 4_000_100):
        filler = leave(disk, free_bytes)
        with pytest.raises((OSError, SafetensorError)) as full:
            checkpoints.save(tensors, {"step": 2})
        assert is_disk_full(full.value)
        filler.unlink()
    assert list(storage.path("staging").iterdir()) == []
    found = Checkpoints(storage, job_id="job_1", fence=2).newest(on_damaged=pytest.fail)
    assert found is not None
    assert (found.numbers, torch.equal(found.tensors["weights"], tensors["weights"])) == ({"step": 1}, True)


def test_artifact_that_finds_no_room_leaves_nothing(disk: Path) -> None:
    storage = LocalStorage(disk)
    classifier = Classifier.new("squeezenet1_1", 2, seed=0).eval()
    made = Artifact(classifier, ["a", "b"], BACKBONES["squeezenet1_1"].preprocessing)
    leave(disk, 500_000)
    with pytest.raises((OSError, SafetensorError)) as full, storage.staging() as staged:
        artifact.save(staged, made)
        storage.publish(staged, "models/mdl_1")
    assert is_disk_full(full.value)
    assert list(storage.path("staging").iterdir()) == []
    assert not storage.exists("models/mdl_1")


def test_features_that_find_no_room_are_done_without(disk: Path) -> None:
    """A mapped hole on a full disk would end the process by a signal at the first write."""
    storage = LocalStorage(disk)
    cache = FeatureCache(storage, DATASET, 2**40)
    shape = (1, 1000, 1000)
    leave(disk, 1_000_000)
    # There is room when it is looked for, and then others take it.
    storage.check_room = lambda incoming_bytes=0: None  # type: ignore[method-assign]
    with pytest.raises(StorageFull), cache.writing("k", shape, np.float32, channels_last=False) as values:
        values[:] = 1.0
    assert list(storage.path("staging").iterdir()) == []
    assert cache.find("k") is None


def test_pixel_store_that_finds_no_room_leaves_nothing(disk: Path) -> None:
    storage = LocalStorage(disk)
    # There is room when it is looked for, and then others take it.
    storage.check_room = lambda incoming_bytes=0: None  # type: ignore[method-assign]
    written(storage.path(archive_key(DATASET)), zip_of(class_folders(40)))

    def tick(share: float) -> None:
        if share > 0.6 and not (disk / "filler").exists():
            fill(disk)

    with pytest.raises(OSError) as full:
        ingest(
            storage.path(archive_key(DATASET)),
            storage=storage,
            dataset_id=DATASET,
            options=IngestOptions(val_fraction=0.25, seed=0),
            limits=IngestLimits.from_settings(Settings(_env_file=None)),
            tick=tick,
        )
    assert is_disk_full(full.value)
    assert list(storage.path("staging").iterdir()) == []
    assert storage.files(f"datasets/{DATASET}") == [archive_key(DATASET)]


def test_job_gives_up_on_a_database_that_stays_full(workshop: Workshop, disk: Path) -> None:
    """Without ballast: it does not hold its memory and files for ever."""
    submit(workshop.database)
    claim = claim_next(workshop.database)
    assert claim is not None
    speaker = Reporter(workshop.database, claim, shutdown=Wakeup(), patience=Patience(longest_seconds=0.2))
    fill(disk)
    with pytest.raises(StorageFull):
        for i in range(10_000):
            speaker.log(f"line {i}")
    (disk / "filler").unlink()
    speaker.log("there is room again")
