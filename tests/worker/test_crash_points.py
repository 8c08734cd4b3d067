"""Real jobs whose process or worker dies at a named point, or is frozen there: each ends as if nothing had happened.

What tests/worker/test_chaos.py leaves to chance, and does with stand-ins for jobs.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from builders import class_folders, written, zip_of
from crash_points import INGEST_POINTS, TRAINING_POINTS
from queue_builders import claim_next, event_log, history, statuses, submit
from sqlalchemy import select
from training_jobs import CLASSES, Job
from workshop import Workshop, is_running, is_stopped, wait_until

from app.check import check
from app.datasets import catalog
from app.datasets.ingest import archive_key
from app.db.engine import Database
from app.db.tables import ModelRow
from app.jobs import queue
from app.jobs.states import JobKind, JobStatus
from app.storage import ANNOUNCEMENT_MAX_AGE_SECONDS, file_sha256
from worker import endings
from worker.reporter import Reporter
from worker.run_ingest import run_ingest
from worker.wakeup import Wakeup

PROGRAM = Path(__file__).with_name("crash_points.py")
# Each with a recipe in which the last epoch is by far the best one, whatever processor it runs on: the model is then
# what all steps together have made.
RECIPES = {"feature_extraction": "modern", "full_fine_tuning": "classic"}
LEARNING_RATES = {"feature_extraction": 0.003, "full_fine_tuning": 0.01}
VALUES = {"epochs": 2, "batch_size": 6, "image_size": 32}
BY_THE_DATABASE = ("claimed", "artifact published", "registering", "registered", "getting ready", "ready")
KILLED_ONCE = ["queued", "running", "queued", "running", "succeeded"]
UNDISTURBED = ["queued", "running", "succeeded"]
# For a child that starts, and a job of six steps, on a machine that is busy.
SECONDS_FOR_A_RUN = 120.0
LEASE_SECONDS = 8.0


class Site:
    """A workshop whose jobs have traps."""

    def __init__(self, folder: Path, database: Database) -> None:
        self.workshop = Workshop(folder / "data", database)
        self.database, self.storage = database, self.workshop.storage
        self._traps = folder / "traps"
        self._traps.mkdir()
        self._changes = {"device": "cpu", "allow_downloads": False, "decode_processes": 0, "log_level": "error"}
        self._settings = self.workshop.settings(**self._changes)

    def start_worker(self, **changes: Any) -> None:
        self.workshop.start_worker(
            program=PROGRAM,
            child_command=(sys.executable, str(PROGRAM), str(self._traps)),
            # These networks are tiny: threads would wait for each other most of the time.
            environment={"OMP_NUM_THREADS": "1"},
            **self._changes,
            lease_seconds=LEASE_SECONDS,
            stall_timeout_seconds=600.0,
            **changes,
        )

    def upload(self) -> tuple[str, str]:
        """The ids of a new data set, always of the same pictures, and of its queued ingest."""
        archive = zip_of(class_folders(12, classes=CLASSES))
        with self.database.write() as session:
            options = {"val_fraction": 0.5, "seed": 0}
            row = catalog.create(session, name="x", size_bytes=len(archive), sha256="", options=options)
            row.sha256 = file_sha256(written(self.storage.path(archive_key(row.id)), archive))
        return row.id, submit(self.database, kind=JobKind.ingest, dataset_id=row.id)

    def ready_dataset(self) -> str:
        """The id of a new one, ingested here, while there is no worker."""
        dataset, _ = self.upload()
        claim = claim_next(self.database, kind=JobKind.ingest)
        assert claim is not None
        reporter = Reporter(self.database, claim, shutdown=Wakeup())
        run_ingest(claim, settings=self._settings, database=self.database, storage=self.storage, reporter=reporter)
        return dataset

    def job(self, method: str, dataset: str, trap: str = "") -> Job:
        """A queued job, always of the same spec. dataset: of its own, where it finds no features of another job."""
        if trap:
            self.set_trap(dataset, trap)
        return Job(
            self.database,
            self.storage,
            self._settings,
            dataset=dataset,
            method=method,
            recipe=RECIPES[method],
            backbone="graft_small",
            weights={"graft_small": "FORMULA_V2"},
            promote="always",
            hyperparameters={**VALUES, "learning_rate": LEARNING_RATES[method]},
        )

    def set_trap(self, dataset: str, trap: str) -> None:
        """trap: point/victim."""
        self._traps.joinpath(dataset).write_text(trap)

    def sprung(self, dataset: str) -> int:
        """The pid of the child that was in the trap; 0 as long as none was."""
        path = self._traps / f"{dataset}.sprung"
        return int(path.read_text()) if path.exists() else 0

    def work_off(self, *, jobs: int) -> None:
        """Until all jobs have ended; a worker that is killed is started again. Then ends the workers."""
        workers = self.workshop.workers

        def are_all_over() -> bool:
            time.sleep(0.2)  # jobs need the processor more than this does
            for worker in [worker for worker in workers if worker.poll() is not None]:
                workers.remove(worker)
                self.start_worker()
            with self.database.read() as session:
                return not queue.unfinished_ids(session)

        wait_until(are_all_over, within_seconds=2 * SECONDS_FOR_A_RUN * jobs)
        self.workshop.close()

    def what_came_of(self, job: Job) -> dict[str, Any]:
        with self.database.read() as session:
            models = list(session.scalars(select(ModelRow).where(ModelRow.job_id == job.id)))
        return {
            "statuses": statuses(self.database, job.id),
            "epochs": [epoch.epoch for epoch in history(self.database, job.id)],
            "best epoch": (job.row.metrics or {}).get("best_epoch"),
            "models": [model.id for model in models] == [job.row.model_id],
            "weights": [file_sha256(self.storage.path(f"models/{model.id}/weights.safetensors")) for model in models],
        }

    def files_of(self, dataset: str) -> dict[str, str]:
        """Each with its digest."""
        folder = f"datasets/{dataset}"
        return {key.removeprefix(folder): file_sha256(self.storage.path(key)) for key in self.storage.files(folder)}

    def sweep(self) -> None:
        """As a worker does, when what the dead have announced is old enough."""
        for announcement in self.storage.path("announced").iterdir():
            made = announcement.stat().st_mtime - 2 * ANNOUNCEMENT_MAX_AGE_SECONDS
            os.utime(announcement, (made, made))
        endings.sweep_files(self.database, self.storage)

    def names(self, key: str) -> list[str]:
        path = self.storage.path(key)
        return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []

    def check_is_tidy(self) -> None:
        """Nothing is missing, corrupt or stray, and nothing is left of how it came about."""
        assert list(check(self.database, self.storage, pause_seconds=0.0)) == []
        assert {key: self.names(key) for key in ("staging", "announced", "jobs")} == {
            "staging": [],
            "announced": [],
            "jobs": [],
        }


@pytest.fixture
def site(tmp_path: Path, any_database: Database) -> Iterator[Site]:
    site = Site(tmp_path, any_database)
    yield site
    site.workshop.close()


def traps(points: Sequence[str], kinds: Sequence[str], site: Site) -> list[tuple[str, str]]:
    """(kind, point/victim): each kind of job at each point, on PostgreSQL at those where the database decides.

    Who dies where the database is SQLite lives where it is PostgreSQL.
    """
    is_sqlite = site.database.engine.dialect.name == "sqlite"
    return [
        (kind, f"{point}/{('child', 'worker')[(i + j + is_sqlite) % 2]}")
        for i, kind in enumerate(kinds)
        for j, point in enumerate(points)
        if (is_sqlite or point in BY_THE_DATABASE)
        and (kind, point) != ("full_fine_tuning", "features staged")  # nothing of it is frozen
    ]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_training_killed_at_any_point_ends_once_with_the_weights_of_an_undisturbed_run(site: Site) -> None:
    undisturbed = {method: site.job(method, site.ready_dataset()) for method in RECIPES}
    jobs = {
        (method, trap): site.job(method, site.ready_dataset(), trap)
        for method, trap in traps(TRAINING_POINTS, list(RECIPES), site)
    }
    everything = [*undisturbed.values(), *jobs.values()]
    site.start_worker()
    site.work_off(jobs=len(everything))

    assert [name for name, job in jobs.items() if not site.sprung(job.spec.dataset)] == []
    twins = {method: site.what_came_of(job) for method, job in undisturbed.items()}
    for twin in twins.values():
        assert (twin["statuses"], twin["best epoch"], len(twin["weights"])) == (UNDISTURBED, VALUES["epochs"], 1)
    assert {name: site.what_came_of(job) for name, job in jobs.items()} == {
        (method, trap): {**twins[method], "statuses": UNDISTURBED if "registered" in trap else KILLED_ONCE}
        for method, trap in jobs
    }
    # What the dead had announced waits for the sweep, and with it the models that got no row.
    announced = [trap for _, trap in jobs if trap.startswith(("artifact", "regist"))]
    rowless = [trap for trap in announced if trap.startswith(("artifact published", "registering"))]
    # So do the files of a job whose worker died right behind its end, unless another worker has come since.
    ended_last = {job.id for (_, trap), job in jobs.items() if trap == "registered/worker"}
    assert set(site.names("jobs")) <= ended_last
    assert len(site.names("announced")) == len(announced)
    assert len(site.names("models")) == len(everything) + len(rowless)
    site.sweep()
    assert site.names("models") == sorted(str(job.row.model_id) for job in everything)
    site.check_is_tidy()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ingest_killed_at_any_point_ends_once_with_the_files_of_an_undisturbed_one(site: Site) -> None:
    undisturbed = site.upload()
    uploads = {name: site.upload() for name in traps(INGEST_POINTS, ["ingest"], site)}
    for (_, trap), (dataset, _) in uploads.items():
        site.set_trap(dataset, trap)
    site.start_worker()
    site.work_off(jobs=1 + len(uploads))

    def what_came_of(dataset: str, job: str) -> dict[str, Any]:
        with site.database.read() as session:
            row = catalog.find(session, dataset)
        told = {name: getattr(row, name) for name in ("status", "num_images", "splits", "classes", "packed_bytes")}
        return {**told, "files": site.files_of(dataset), "statuses": statuses(site.database, job)}

    assert [name for name, (dataset, _) in uploads.items() if not site.sprung(dataset)] == []
    twin = what_came_of(*undisturbed)
    assert (twin["status"], twin["splits"]) == ("ready", {"train": 18, "val": 18, "test": 0})
    differing = {}
    for name, uploaded in uploads.items():
        expected = {**twin, "statuses": UNDISTURBED if name[1].startswith("ready/") else KILLED_ONCE}
        differing[name] = [(came, expected[k]) for k, came in what_came_of(*uploaded).items() if came != expected[k]]
    assert {name: told for name, told in differing.items() if told} == {}
    site.sweep()
    site.check_is_tidy()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_run_frozen_past_its_lease_writes_nothing_once_it_goes_on(site: Site) -> None:
    points = ["mid-epoch", "checkpoint published", "artifact published"]
    if site.database.engine.dialect.name != "sqlite":
        points = points[-1:]
    first, *datasets = [site.ready_dataset() for _ in ("", *points)]
    for _ in range(2):
        site.start_worker(heartbeat_interval_seconds=0.5)
    undisturbed = site.job("full_fine_tuning", first)
    wait_until(lambda: JobStatus(undisturbed.row.status).is_final, within_seconds=SECONDS_FOR_A_RUN)
    twin = site.what_came_of(undisturbed)
    jobs = []
    for point, dataset in zip(points, datasets, strict=True):
        jobs.append(site.job("full_fine_tuning", dataset, f"{point}/frozen"))
        freeze_and_thaw(site, jobs[-1])
    site.work_off(jobs=len(jobs))

    assert twin["statuses"] == UNDISTURBED
    for job in jobs:
        assert site.what_came_of(job) == {**twin, "statuses": KILLED_ONCE}
        assert [event.fence for event in event_log(site.database, job.id)][-1] == 2
    # Nobody died, so there is nothing to sweep.
    assert site.names("models") == sorted(str(job.row.model_id) for job in (undisturbed, *jobs))
    site.check_is_tidy()


def freeze_and_thaw(site: Site, job: Job) -> None:
    child = wait_until(lambda: site.sprung(job.spec.dataset), within_seconds=SECONDS_FOR_A_RUN)
    wait_until(lambda: is_stopped(child))
    worker = psutil.Process(child).ppid()
    # A worker that is frozen in the middle of a commit keeps all others from theirs: then it is tried again.
    while job.row.fence == 1:
        os.kill(worker, signal.SIGSTOP)
        deadline = time.monotonic() + 3 * LEASE_SECONDS
        while job.row.fence == 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        if job.row.fence == 1:
            os.kill(worker, signal.SIGCONT)
            time.sleep(0.05)
    # The child first: that it writes nothing is not to be its worker's doing, who would kill it.
    os.kill(child, signal.SIGCONT)
    wait_until(lambda: not is_running(child), within_seconds=SECONDS_FOR_A_RUN)
    os.kill(worker, signal.SIGCONT)
    wait_until(lambda: JobStatus(job.row.status).is_final, within_seconds=SECONDS_FOR_A_RUN)
