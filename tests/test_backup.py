"""A backup that is made while everything goes on, put back into an empty place, answers as the first server did."""

import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import api_builders
import builders
import httpx
import pytest
import queue_builders
from api_builders import RunningServer
from running import environment_for, graft_up, picture, pictures_zip, wait_until
from sqlalchemy import select, text
from test_pretraining_journey import train, upload

from app import backup, holdings, registry
from app.backup import BackupDamaged
from app.datasets import uploads
from app.db.engine import Database
from app.db.tables import DEFAULT_WORKSPACE, Base, JobRow
from app.errors import Conflict, DatabaseMismatch, GraftError, StorageFull
from app.jobs import queue
from app.jobs.states import JobKind
from app.storage import LocalStorage
from worker.training.checkpoint import Checkpoints

PATIENCE_SECONDS = 120.0


@pytest.fixture
def model(server: RunningServer, client: httpx.Client) -> str:
    """Trained, and asked once for a prediction that is kept."""
    dataset = upload(server, client, builders.class_folders(8), val_fraction="0.25")
    job = train(server, client, dataset=dataset["id"], method="few_shot", promote="always")
    assert client.post("/predict?store=true", content=builders.jpeg(1)).status_code == 200
    server.services.traffic.write_down()  # which would come some seconds later, perhaps between a backup and a look
    return str(job["model"])


def all_rows(database: Database) -> dict[str, list[Any]]:
    with database.read() as session:
        rows = session.connection()
        return {table.name: sorted(map(repr, rows.execute(select(table)))) for table in Base.metadata.sorted_tables}


def url_in(folder: Path) -> str:
    return f"sqlite:///{folder / 'graft.db'}"


@pytest.mark.slow
def test_rows_and_files_are_as_they_were_in_another_kind_of_database_and_back(
    server: RunningServer, client: httpx.Client, model: str, empty_postgres_url: Callable[[], str], tmp_path: Path
) -> None:
    services = server.services
    made = backup.back_up(services.database, services.storage, tmp_path / "first")
    moved = LocalStorage(tmp_path / "moved")
    postgres_url = empty_postgres_url()
    backup.restore(tmp_path / "first", postgres_url, moved)
    postgres = Database(postgres_url).within(DEFAULT_WORKSPACE)
    assert all_rows(postgres) == all_rows(services.database)
    with postgres.write() as session:  # numbered after those that were brought
        queue.submit(session, kind=JobKind.training, dataset_id="ds_1", spec={})
        numbers = list(session.scalars(select(JobRow.seq).order_by(JobRow.seq)))
    assert numbers == sorted(set(numbers))

    backup.back_up(postgres, moved, tmp_path / "second")
    postgres.dispose()
    back = LocalStorage(tmp_path / "back")
    again = backup.restore(tmp_path / "second", url_in(tmp_path / "back"), back)

    assert made.missing == again.missing == []
    assert made.rows["models"] == made.rows["datasets"] == made.rows["predictions"] == 1
    assert {name: digest for name, digest in again.files.items() if name != "graft.db"} == {
        name: digest for name, digest in made.files.items() if name != "graft.db"
    }
    dataset = client.get("/v1/datasets").json()["data"][0]["id"]
    prediction = client.get("/v1/predictions").json()["data"][0]["id"]
    for key in (f"models/{model}", f"datasets/{dataset}", f"predictions/{prediction}"):
        names = [name for name in services.storage.files(key) if "/features/" not in name]
        assert back.files(key) == names
        assert all(back.path(name).read_bytes() == services.storage.path(name).read_bytes() for name in names)
    assert list(back.path("announced").iterdir()) == []


def test_unfinished_uploads_are_left_out(database: Database, storage: LocalStorage, tmp_path: Path) -> None:
    with database.write() as session:
        for upload_id in ("up_1", "up_2"):
            uploads.create(session, upload_id, size_bytes=1, filename=None, options={}, client_metadata="")
        uploads.finish(session, "up_2", dataset_id="ds_1")
    partial = storage.path(uploads.archive_key("up_1"))
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x")

    backup.back_up(database, storage, tmp_path / "backup")
    restored = LocalStorage(tmp_path / "restored")
    backup.restore(tmp_path / "backup", url_in(tmp_path / "restored"), restored)

    again = Database(url_in(tmp_path / "restored"))
    assert [holdings.has_row(again, f"uploads/{upload_id}") for upload_id in ("up_1", "up_2")] == [False, True]
    again.dispose()
    assert not restored.exists("uploads")


def test_what_is_deleted_meanwhile_is_in_neither_rows_nor_files(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = server.services
    models = [api_builders.register_model(services, seed=seed, aliases=()) for seed in range(3)]
    files = services.storage.files

    def deleting(key: str) -> list[str]:
        found = files(key)
        if key == f"models/{models[1]}" and services.storage.exists(f"models/{models[0]}"):
            for gone in (models[0], models[1]):
                with services.database.write() as session:
                    registry.delete(session, gone)
                services.storage.delete(f"models/{gone}")
        return found

    monkeypatch.setattr(services.storage, "files", deleting)
    made = backup.back_up(services.database, services.storage, tmp_path / "backup")

    assert (made.rows["models"], made.missing) == (1, [])
    assert {path.name for path in (tmp_path / "backup" / "files" / "models").iterdir()} == {models[2]}
    monkeypatch.undo()
    services.storage.delete(f"models/{models[2]}")  # its row stays: this one is lost, and is told
    lost = backup.back_up(services.database, services.storage, tmp_path / "lossy")
    assert (lost.rows["models"], lost.missing) == (1, [f"models/{models[2]}"])


def test_what_ran_is_queued_again_and_a_cancel_that_was_asked_for_is_done(
    server: RunningServer, tmp_path: Path
) -> None:
    services = server.services
    with services.database.write() as session:
        jobs = [queue.submit(session, kind=JobKind.training, dataset_id="ds_1", spec={}).id for _ in range(3)]
        for _ in range(2):
            queue.claim_next(session, kind=JobKind.training, worker_id="w", owner={"pid": 1})
        queue.request_cancel(session, jobs[1])
    services.storage.path(f"jobs/{jobs[0]}/1").mkdir(parents=True)
    services.storage.path(f"jobs/{jobs[0]}/1/checkpoint").write_text("as far as it got")

    backup.back_up(services.database, services.storage, tmp_path / "backup")
    storage = LocalStorage(tmp_path / "restored")
    backup.restore(tmp_path / "backup", url_in(tmp_path / "restored"), storage)

    database = Database(url_in(tmp_path / "restored"))
    with database.read() as session:
        assert [queue.find(session, job).status for job in jobs] == ["queued", "cancelled", "queued"]
        assert (queue.find(session, jobs[0]).attempt, queue.find(session, jobs[0]).crashes) == (1, 0)
    database.dispose()
    assert storage.path(f"jobs/{jobs[0]}/1/checkpoint").read_text() == "as far as it got"


class TrainingJob:
    """One that runs, and goes on by an epoch and its checkpoint whenever it is told to."""

    def __init__(self, database: Database, storage: LocalStorage) -> None:
        self._database = database
        self.claim, self.epochs = queue_builders.claimed(database), 0
        self._checkpoints = Checkpoints(storage, job_id=self.claim.job_id, fence=self.claim.fence)

    def go_on(self) -> None:
        self.epochs += 1
        with self._database.write() as session:
            queue.record_epoch(session, self.claim, queue_builders.epoch(self.epochs), {})
        self._checkpoints.save({}, {"epoch": self.epochs})


@pytest.mark.parametrize("checkpoints", [1, 2])
def test_job_that_trains_meanwhile_goes_on_from_a_checkpoint_whose_epochs_are_all_told(
    database: Database, storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: int
) -> None:
    """checkpoints: more that it has once its files were listed; with two, what was listed is there no longer."""
    job = TrainingJob(database, storage)
    job.go_on()
    files = storage.files

    def training(key: str) -> list[str]:
        found = files(key)
        if job.epochs == 1 and key.startswith("jobs/"):
            for _ in range(checkpoints):
                job.go_on()
            found = found if checkpoints > 1 else files(key)
        return found

    monkeypatch.setattr(storage, "files", training)
    backup.back_up(database, storage, tmp_path / "backup")
    restored = LocalStorage(tmp_path / "restored")
    backup.restore(tmp_path / "backup", url_in(tmp_path / "restored"), restored)

    again = Database(url_in(tmp_path / "restored"))
    with again.read() as session:
        told = [epoch.epoch for epoch in queue.history(session, job.claim.job_id)]
    again.dispose()
    found = Checkpoints(restored, job_id=job.claim.job_id, fence=job.claim.fence).newest()
    assert found is not None
    assert (found.numbers["epoch"], told) == (1 + checkpoints, [*range(1, 2 + checkpoints)])


def fill_rows(database: Database, *, mebibytes: int) -> None:
    for _ in range(mebibytes):
        queue_builders.submit(database, text="x" * 2**20)


# Of a disk of 16 MiB: too much with SQLite's log, or at all.
@pytest.mark.parametrize("mebibytes", [9, 20])
def test_backup_whose_rows_find_no_room_says_so_and_leaves_nothing(
    database: Database, storage: LocalStorage, small_disk: Path, mebibytes: int
) -> None:
    fill_rows(database, mebibytes=mebibytes)

    with pytest.raises(StorageFull, match="The backup could not be written: No space left on device"):
        backup.back_up(database, storage, small_disk / "backup")

    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("full", ["storage", "database"])
def test_restore_whose_rows_find_no_room_says_so_and_leaves_nothing(
    database: Database, storage: LocalStorage, small_disk: Path, tmp_path: Path, full: str
) -> None:
    fill_rows(database, mebibytes=20)
    backup.back_up(database, storage, tmp_path / "backup")
    places = {"storage": tmp_path / "new", "database": tmp_path / "new"} | {full: small_disk}
    restored = LocalStorage(places["storage"])

    with pytest.raises(StorageFull, match="Nothing was restored: No space left on device"):
        backup.restore(tmp_path / "backup", url_in(places["database"]), restored)

    assert list(restored.path("staging").iterdir()) == list(restored.path("announced").iterdir()) == []


def flip_a_byte(folder: Path) -> None:
    file = next((folder / "files" / "models").rglob("weights.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lose_a_file(folder: Path) -> None:
    next((folder / "files" / "models").rglob("weights.safetensors")).unlink()


def lead_out(folder: Path) -> None:
    contents = json.loads((folder / "backup.json").read_text())
    contents["files"]["../elsewhere"] = "0"
    (folder / "backup.json").write_text(json.dumps(contents))
    folder.with_name("elsewhere").write_text("")


def come_from_the_future(folder: Path) -> None:
    contents = json.loads((folder / "backup.json").read_text())
    (folder / "backup.json").write_text(json.dumps({**contents, "format_version": 2}))


def have_newer_tables(folder: Path) -> None:
    database = Database(f"sqlite:///{folder / 'graft.db'}")
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = 'ffff'"))
    database.dispose()
    contents = json.loads((folder / "backup.json").read_text())
    contents["files"]["graft.db"] = backup.file_sha256(folder / "graft.db")
    (folder / "backup.json").write_text(json.dumps(contents))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (flip_a_byte, BackupDamaged, "weights.safetensors is not what was written"),
        (lose_a_file, BackupDamaged, "weights.safetensors is missing"),
        (lead_out, BackupDamaged, "elsewhere is missing"),
        (lambda folder: (folder / "backup.json").unlink(), BackupDamaged, "no backup of Graft"),
        (come_from_the_future, BackupDamaged, "newer version"),
        (have_newer_tables, DatabaseMismatch, "revision ffff"),
    ],
)
def test_damaged_backup_is_refused_and_nothing_is_changed(
    server: RunningServer, tmp_path: Path, damage: Any, error: type[GraftError], message: str
) -> None:
    api_builders.register_model(server.services)
    backup.back_up(server.services.database, server.services.storage, tmp_path / "backup")
    damage(tmp_path / "backup")

    with pytest.raises(error, match=message):
        backup.restore(tmp_path / "backup", url_in(tmp_path / "new"), LocalStorage(tmp_path / "new"))

    assert not (tmp_path / "new" / "models").exists()
    assert not (tmp_path / "new" / "graft.db").exists()


def test_nothing_is_written_over(server: RunningServer, tmp_path: Path) -> None:
    api_builders.register_model(server.services)
    services = server.services
    backup.back_up(services.database, services.storage, tmp_path / "backup")
    before = all_rows(services.database)

    with pytest.raises(Conflict, match="is there already"):
        backup.back_up(services.database, services.storage, tmp_path / "backup")
    with pytest.raises(Conflict, match="has data in it"):
        backup.restore(tmp_path / "backup", str(services.database.engine.url), services.storage)

    assert all_rows(services.database) == before


COMMAND = [sys.executable, "-m", "app.cli"]


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A command on the data folder in this one."""
    return subprocess.Popen([*COMMAND, *arguments], cwd=folder, env=environment_for(folder / "data"))


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same, to its end."""
    environment = environment_for(folder / "data")
    return subprocess.run(
        [*COMMAND, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_killed_backup_leaves_none_and_a_killed_restore_can_be_done_again(
    server: RunningServer, tmp_path: Path
) -> None:
    model = api_builders.register_model(server.services)
    with server.services.storage.path(f"models/{model}/large").open("wb") as large:
        large.truncate(4 * 1024**3)  # takes seconds to read, and no room

    making = start(tmp_path, "backup", "made")
    wait_until(
        lambda: list(tmp_path.glob(".made.*/files/models/*")), within_seconds=PATIENCE_SECONDS, otherwise="no copy"
    )
    making.send_signal(signal.SIGKILL)
    making.wait()
    assert not (tmp_path / "made").exists()
    for left in tmp_path.glob(".made.*"):
        shutil.rmtree(left)

    server.services.storage.path(f"models/{model}/large").unlink()
    assert run(tmp_path, "backup", "made").returncode == 0
    new = tmp_path / "new"
    new.mkdir()
    restoring = start(new, "restore", str(tmp_path / "made"))
    wait_until(lambda: list((new / "data").glob("announced/*")), within_seconds=PATIENCE_SECONDS, otherwise="no file")
    restoring.send_signal(signal.SIGKILL)
    restoring.wait()
    again = run(new, "restore", str(tmp_path / "made"))
    database = Database(url_in(new / "data"))
    is_there = holdings.has_row(database, f"models/{model}")
    database.dispose()

    # Killed between its last two steps, the first one may have brought everything.
    assert is_there
    assert again.returncode == 0 or "has data in it" in again.stderr


@pytest.mark.slow
def test_backup_of_a_busy_server_answers_as_the_server_does(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    pictures = [picture(label, chance=random.Random(label)) for label in (0, 1)]
    with graft_up(first) as running, httpx.Client(base_url=running.url, timeout=90) as http:
        dataset = http.put("/v1/datasets", params={"wait": 60}, content=pictures_zip()).json()
        request = {"dataset": dataset["id"], "method": "few_shot", "promote": "always"}
        job = http.post("/v1/jobs", params={"wait": 60}, json=request).json()
        assert job["status"] == "succeeded", job
        answers = [http.post("/predict", content=each).json()["predictions"] for each in pictures]
        long = {"epochs": 1000, "image_size": 32, "batch_size": 4}
        request = {"dataset": dataset["id"], "method": "from_scratch", "backbone": "squeezenet1_1"}
        training = http.post("/v1/jobs", json={**request, "hyperparameters": long}).json()["id"]
        wait_until(
            lambda: http.get(f"/v1/jobs/{training}/history").json()["data"],
            within_seconds=PATIENCE_SECONDS,
            otherwise="the job did not train",
        )
        said = backup_while_uploads_come_and_go(http, first)

    assert "1 models" in said
    restored = run(second, "restore", str(first / "backup"))
    assert restored.returncode == 0, restored.stderr
    with graft_up(second) as running, httpx.Client(base_url=running.url, timeout=90) as http:
        assert [http.post("/predict", content=each).json()["predictions"] for each in pictures] == answers
        assert http.get(f"/v1/jobs/{job['id']}").json()["model"] == job["model"]
        epochs = len(http.get(f"/v1/jobs/{training}/history").json()["data"])
        wait_until(
            lambda: len(http.get(f"/v1/jobs/{training}/history").json()["data"]) > epochs,
            within_seconds=PATIENCE_SECONDS,
            otherwise="the job does not go on",
        )
        for kept in http.get("/v1/datasets", params={"limit": 200}).json()["data"]:
            ready = http.get(f"/v1/datasets/{kept['id']}", params={"wait": 60}).json()
            assert ready["status"] == "ready", ready


def backup_while_uploads_come_and_go(http: httpx.Client, folder: Path) -> str:
    """What the command says. More uploads are made while it runs, and every second one is deleted again."""
    stop = threading.Event()

    def upload_and_delete() -> None:
        turn = 0
        while not stop.is_set():
            made = http.put("/v1/datasets", params={"wait": 60}, content=pictures_zip(seed=turn, per_class=4))
            assert made.status_code == 201, made.text
            if turn % 2:
                assert http.delete(f"/v1/datasets/{made.json()['id']}").status_code == 200
            turn += 1

    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(upload_and_delete)
        time.sleep(1.0)
        made = run(folder, "backup", "backup")
        stop.set()
        busy.result()
    assert (made.returncode, made.stderr) == (0, "")
    return made.stdout
