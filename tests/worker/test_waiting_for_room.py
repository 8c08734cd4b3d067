"""A training job that finds its disk full waits: it says so, lives, can be ended, and goes on as if nothing had been.

On a file system of its own, the database elsewhere.
"""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import disks
import pytest
import torch
from queue_builders import event_log, find, history, request_cancel
from safetensors.torch import load_file
from training_jobs import Job, same_weights, write_dataset
from workshop import Workshop, wait_until

from app.db.engine import Database
from app.errors import StorageFull
from app.jobs import queue
from app.storage import LocalStorage
from worker.reporter import Cancelled, ShuttingDown
from worker.training.checkpoint import Checkpoints

CHILD = (sys.executable, "-m", "worker.child")
# Too little for a checkpoint of the network below, enough for all else.
LITTLE_ROOM_BYTES = 1_000_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """With the data set."""
    with disks.mounted(tmp_path / "disk", mebibytes=96) as folder:
        write_dataset(LocalStorage(folder))
        yield folder


@pytest.fixture
def workshop(disk: Path, database: Database) -> Iterator[Workshop]:
    workshop = Workshop(disk, database)
    yield workshop
    workshop.close()


def submitted(workshop: Workshop, *, epochs: int = 2, **changes: Any) -> Job:
    """changes: of the settings that it is run with in this process."""
    return Job(
        workshop.database,
        workshop.storage,
        workshop.settings(device="cpu", allow_downloads=False, min_free_bytes=0, **changes),
        method="from_scratch",
        backbone="squeezenet1_1",
        hyperparameters={"epochs": epochs},
    )


def waits(workshop: Workshop, job: Job) -> bool:
    return (find(workshop.database, job.id).progress or {}).get("stage") == "waiting_for_room"


def told_of_full_disks(workshop: Workshop, job: Job) -> list[dict[str, Any]]:
    return [event.data for event in event_log(workshop.database, job.id) if event.data.get("reason") == "disk_full"]


@contextmanager
def meanwhile(act: Callable[[], object]) -> Iterator[None]:
    """Does that in another thread; what it raises is raised at the end."""
    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(act)
        yield
        acting.result()


@contextmanager
def once_it_waits(workshop: Workshop, job: Job, act: Callable[[], object]) -> Iterator[None]:
    def wait_and_act() -> None:
        wait_until(lambda: waits(workshop, job), within_seconds=100)
        act()

    with meanwhile(wait_and_act):
        yield


def weights_of(workshop: Workshop, job: Job) -> dict[str, torch.Tensor]:
    model_id = find(workshop.database, job.id).model_id
    return load_file(workshop.storage.path(f"models/{model_id}/weights.safetensors"))


@pytest.mark.slow
def test_job_waits_alive_until_there_is_room_and_ends_with_the_weights_of_an_undisturbed_one(
    workshop: Workshop, disk: Path
) -> None:
    worker = workshop.start_worker(
        child_command=CHILD, device="cpu", allow_downloads=False, min_free_bytes=0, lease_seconds=100.0,
        stall_timeout_seconds=100.0, full_disk_retry_seconds=0.5,
    )  # fmt: skip
    undisturbed = submitted(workshop)
    wait_until(lambda: workshop.status(undisturbed.id) in ("succeeded", "failed"), within_seconds=150)

    filler = disks.leave(disk, LITTLE_ROOM_BYTES)
    waiting = submitted(workshop)
    wait_until(lambda: waits(workshop, waiting), within_seconds=150)
    seen = find(workshop.database, waiting.id)

    def is_alive() -> bool:
        row = find(workshop.database, waiting.id)
        return row.beat > seen.beat + 10 and row.ticks > seen.ticks + 3

    wait_until(is_alive)
    assert workshop.status(waiting.id) == "running"
    filler.unlink()
    wait_until(lambda: workshop.status(waiting.id) in ("succeeded", "failed"), within_seconds=150)

    row = find(workshop.database, waiting.id)
    assert (row.status, row.attempt, row.crashes) == ("succeeded", 1, 0)
    assert same_weights(weights_of(workshop, waiting), weights_of(workshop, undisturbed))
    (told,) = told_of_full_disks(workshop, waiting)
    assert told["message"].startswith("The server's disk is full: the job waits for room until ")
    assert "There is room on the server's disk again: the job goes on." in waiting.messages

    disks.leave(disk, LITTLE_ROOM_BYTES)
    given_back = submitted(workshop)
    wait_until(lambda: waits(workshop, given_back), within_seconds=150)
    worker.terminate()
    assert worker.wait(timeout=20) == 0
    row = find(workshop.database, given_back.id)
    assert (row.status, row.attempt, row.crashes) == ("queued", 1, 0)


def test_waiting_job_is_cancelled_at_once_and_leaves_nothing_half_written(workshop: Workshop, disk: Path) -> None:
    job = submitted(workshop, full_disk_retry_seconds=3000.0)
    disks.leave(disk, LITTLE_ROOM_BYTES)
    with (
        once_it_waits(workshop, job, lambda: request_cancel(workshop.database, job.id)),
        pytest.raises(Cancelled),
    ):
        job.run()
    assert list(workshop.storage.path("staging").iterdir()) == []
    assert not workshop.storage.exists("models")


def test_waiting_job_is_given_back_at_once_with_the_checkpoint_before(workshop: Workshop, disk: Path) -> None:
    job = submitted(workshop, epochs=1000, full_disk_retry_seconds=3000.0)

    def fill_then_shut_down() -> None:
        checkpoints = workshop.storage.path(f"jobs/{job.id}")
        wait_until(lambda: list(checkpoints.glob("*/*/digests.json")), within_seconds=100)
        disks.leave(disk, LITTLE_ROOM_BYTES)
        wait_until(lambda: waits(workshop, job), within_seconds=100)
        job.shutdown.set()

    with meanwhile(fill_then_shut_down), pytest.raises(ShuttingDown):
        job.run()
    found = Checkpoints(workshop.storage, job_id=job.id, fence=2).newest(on_damaged=pytest.fail)
    assert found is not None
    assert found.numbers["total_steps"] == job.row.durable_step > 0
    assert list(workshop.storage.path("staging").iterdir()) == []


def test_waiting_job_that_is_stopped_needs_no_checkpoint_and_room_for_its_model_alone(
    workshop: Workshop, disk: Path
) -> None:
    job = submitted(workshop, epochs=1000, full_disk_retry_seconds=0.1)
    filler = disks.leave(disk, LITTLE_ROOM_BYTES)

    def stop_then_make_room() -> None:
        with workshop.database.write() as session:
            queue.request_stop(session, job.id)
        wait_until(lambda: len(told_of_full_disks(workshop, job)) == 2, within_seconds=100)
        filler.unlink()

    with once_it_waits(workshop, job, stop_then_make_room):
        job.run()
    assert job.row.status == "succeeded"
    assert job.row.durable_step == 0
    assert [epoch.epoch for epoch in history(workshop.database, job.id)] == [1]


def test_job_that_waits_in_vain_fails_with_what_to_do(workshop: Workshop, disk: Path) -> None:
    job = submitted(workshop, full_disk_retry_seconds=0.1, full_disk_patience_seconds=0.5)
    disks.leave(disk, LITTLE_ROOM_BYTES)
    with pytest.raises(StorageFull, match="make room, and submit it again"):
        job.run()
    assert len(told_of_full_disks(workshop, job)) == 1
