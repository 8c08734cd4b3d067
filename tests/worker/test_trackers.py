"""Jobs as runs of real trackers: an MLflow server in a process of its own, and files that TensorBoard reads."""

import importlib.metadata
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import queue_builders
from running import graft_up, pictures_zip, wait_until
from structlog.testing import capture_logs
from training_jobs import DATASET, Job, write_dataset

from app.db.engine import Database
from app.jobs import queue
from app.jobs.queue import Claim
from app.settings import Settings
from app.storage import LocalStorage
from app.supervisor import free_port
from worker import trackers
from worker.reporter import Reporter
from worker.run_job import run_training
from worker.trackers import Trackers
from worker.wakeup import Wakeup

EPOCHS = 3
# Of a server of MLflow, which is half a gigabyte; and that it starts, on a machine that may be busy.
INSTALL_WITHIN_SECONDS, START_WITHIN_SECONDS = 240.0, 120.0
REPOSITORY = Path(__file__).resolve().parents[2]
FIGURES = {"train_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate", "seconds"}


@pytest.fixture(scope="module")
def mlflow_command() -> list[str]:
    """An MLflow that has its server, in an environment of its own: ten times as large as the client, and therefore none
    of the packages of development. GRAFT_TEST_MLFLOW, or of the client's version, which stays in build/."""
    given = os.environ.get("GRAFT_TEST_MLFLOW", "")
    if given:
        return [given]
    wanted = f"mlflow=={importlib.metadata.version('mlflow-skinny')}"
    folder = REPOSITORY / "build" / wanted
    python, is_installed = folder / "bin" / "python", folder / ".installed"
    if not is_installed.exists():
        install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-compile", "--retries", "1"]
        try:
            # Without the pip that Debian splits off; ours installs into it.
            subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
            subprocess.run([*install, wanted], check=True, capture_output=True, timeout=INSTALL_WITHIN_SECONDS)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"needs a server of MLflow in GRAFT_TEST_MLFLOW; {wanted} cannot be installed: {error}")
        is_installed.touch()
    return [str(python), "-m", "mlflow"]


@pytest.fixture(scope="module")
def mlflow_url(mlflow_command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port("127.0.0.1")
    arguments = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder)]
    # What it imports it compiles once, and not again at its next start.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [*mlflow_command, "server", *arguments, *store],
            stdout=log,
            stderr=log,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        assert server.poll() is None, (folder / "log").read_text()
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(is_up, within_seconds=START_WITHIN_SECONDS, otherwise="MLflow did not start")
        ask_for_the_first_time(url)
        yield url
    finally:
        os.killpg(server.pid, 9)  # it takes half a minute to end in order, and nobody wants anything of it any more
        server.wait()


def ask_for_the_first_time(url: str) -> None:
    """Of each kind, since for its first answers it imports and compiles for seconds, which no job waits for."""
    asked = ask_mlflow(url, "POST", "experiments/create", json={"name": "first"}).raise_for_status().json()
    run = {"experiment_id": asked["experiment_id"], "start_time": 0}
    run_id = ask_mlflow(url, "POST", "runs/create", json=run).raise_for_status().json()["run"]["info"]["run_id"]
    metric = {"key": "loss", "value": 1.0, "timestamp": 0, "step": 0}
    ask_mlflow(url, "POST", "runs/log-batch", json={"run_id": run_id, "metrics": [metric]}).raise_for_status()
    ended = {"run_id": run_id, "status": "FINISHED", "end_time": 0}
    ask_mlflow(url, "POST", "runs/update", json=ended).raise_for_status()


@pytest.fixture
def job(database: Database, storage: LocalStorage, tmp_path: Path) -> Job:
    write_dataset(storage)
    settings = Settings(data_dir=tmp_path / "storage", device="cpu", allow_downloads=False)
    return Job(database, storage, settings, method="from_scratch", hyperparameters={"epochs": EPOCHS})


def claimed(database: Database) -> Claim:
    claim = queue_builders.claim_next(database)
    assert claim is not None
    return claim


def run(claim: Claim, settings: Settings, database: Database, storage: LocalStorage) -> None:
    """As a child runs it."""
    with Trackers(claim, settings, database) as told:
        reporter = Reporter(database, claim, shutdown=Wakeup(), observers=[told])
        run_training(claim, settings=settings, database=database, storage=storage, reporter=reporter)


def epoch(number: int, **changes: Any) -> dict[str, Any]:
    figures = dict.fromkeys(FIGURES, 0.5)
    return {"epoch": number, **figures, "method": None, "figures": None, **changes}


def ask_mlflow(url: str, method: str, path: str, **options: Any) -> httpx.Response:
    """With patience: for its first answer it imports half the world."""
    return httpx.request(method, f"{url}/api/2.0/mlflow/{path}", timeout=90, **options)


def runs_of(url: str, job_id: str) -> list[Any]:
    experiment = ask_mlflow(url, "GET", "experiments/get-by-name", params={"experiment_name": "graft"})
    if experiment.status_code == 404:
        return []
    wanted = {
        "experiment_ids": [experiment.json()["experiment"]["experiment_id"]],
        "filter": f"tags.`graft.job` = '{job_id}'",
    }
    return list(ask_mlflow(url, "POST", "runs/search", json=wanted).raise_for_status().json().get("runs", []))


def mlflow_history(url: str, run_id: str, metric: str) -> list[tuple[int, float]]:
    wanted = {"run_id": run_id, "metric_key": metric}
    found = ask_mlflow(url, "GET", "metrics/get-history", params=wanted).raise_for_status().json()
    return [(int(each["step"]), each["value"]) for each in found.get("metrics", [])]


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.slow
@pytest.mark.timeout(INSTALL_WITHIN_SECONDS + 300)
def test_a_job_of_real_processes_is_a_run_of_both_trackers(mlflow_url: str, tmp_path: Path) -> None:
    hyperparameters = {"epochs": EPOCHS, "image_size": 32, "batch_size": 8}
    settings = {"mlflow_tracking_uri": mlflow_url, "tensorboard_dir": str(tmp_path / "boards")}
    with graft_up(tmp_path, **settings) as graft, httpx.Client(base_url=graft.url, timeout=90) as http:
        dataset = http.put("/v1/datasets?name=colours&wait=60", content=pictures_zip(per_class=6)).json()
        request = {"dataset": dataset["id"], "method": "from_scratch", "backbone": "squeezenet1_1"}
        submitted = http.post(
            "/v1/jobs?wait=60", json={**request, "recipe": "classic", "hyperparameters": hyperparameters}
        ).json()
        assert submitted["status"] == "succeeded", submitted
        history = http.get(f"/v1/jobs/{submitted['id']}/history").json()["data"]
        [found] = wait_for_end(mlflow_url, submitted["id"])
        assert graft.stop() == 0

    params = {each["key"]: each["value"] for each in found["data"]["params"]}
    tags = {each["key"]: each["value"] for each in found["data"]["tags"]}
    metrics = {each["key"]: each["value"] for each in found["data"]["metrics"]}
    assert found["info"]["status"] == "FINISHED"
    assert (params["method"], params["epochs"], params["backbone"]) == ("from_scratch", "3", "squeezenet1_1")
    assert (tags["graft.model"], tags["graft.dataset"]) == (submitted["model"], dataset["id"])
    assert metrics["final_val_accuracy"] == submitted["metrics"]["val_accuracy"]
    expected = [(each["epoch"], each["val_loss"]) for each in history]
    assert mlflow_history(mlflow_url, found["info"]["run_id"], "val_loss") == expected
    scalars = tensorboard_scalars(tmp_path / "boards" / submitted["id"])
    assert [step for step, _ in scalars["loss/val"]] == [1, 2, 3]
    assert [value for _, value in scalars["loss/val"]] == pytest.approx([value for _, value in expected], rel=1e-6)
    assert scalars["final/val_accuracy"][0][1] == pytest.approx(submitted["metrics"]["val_accuracy"])
    assert "tracker_incomplete" not in (tmp_path / "graft.log").read_text()


def wait_for_end(url: str, job_id: str) -> list[Any]:
    """The job is in the database before its run is."""
    wait_until(
        lambda: [each["info"]["status"] for each in runs_of(url, job_id)] not in ([], ["RUNNING"]),
        within_seconds=60,
        otherwise="the run goes on",
    )
    return runs_of(url, job_id)


@pytest.mark.slow
@pytest.mark.timeout(INSTALL_WITHIN_SECONDS + 300)
def test_an_attempt_after_a_crash_goes_on_with_the_run(
    mlflow_url: str, job: Job, database: Database, storage: LocalStorage, tmp_path: Path
) -> None:
    settings = Settings(
        data_dir=tmp_path / "storage", mlflow_tracking_uri=mlflow_url, tensorboard_dir=tmp_path / "boards"
    )
    first = claimed(database)
    with Trackers(first, settings, database) as told:
        told.epoch(epoch(1, val_loss=1.0))
        told.epoch(epoch(2, val_loss=2.0))
        queue_builders.crash(database, first)
    assert runs_of(mlflow_url, job.id)[0]["info"]["status"] == "RUNNING"

    second = claimed(database)
    with Trackers(second, settings, database) as told:
        told.epoch(epoch(2, val_loss=0.25))
        with database.write() as session:
            queue.succeed(session, second, metrics={"val_accuracy": 0.75})

    [found] = runs_of(mlflow_url, job.id)
    assert found["info"]["status"] == "FINISHED"
    assert mlflow_history(mlflow_url, found["info"]["run_id"], "val_loss") == [(1, 1.0), (2, 2.0), (2, 0.25)]
    # TensorBoard is told that the second epoch is said anew.
    assert tensorboard_scalars(tmp_path / "boards" / job.id)["loss/val"] == [(1, 1.0), (2, 0.25)]


@pytest.mark.slow
@pytest.mark.timeout(INSTALL_WITHIN_SECONDS + 300)
def test_a_run_whose_process_was_killed_for_good_is_ended_by_the_next_job(
    mlflow_url: str, job: Job, database: Database, storage: LocalStorage, tmp_path: Path
) -> None:
    settings = Settings(data_dir=tmp_path / "storage", mlflow_tracking_uri=mlflow_url)
    claim = claimed(database)
    with Trackers(claim, settings, database) as told:
        told.epoch(epoch(1))
    queue_builders.request_cancel(database, job.id)
    queue_builders.crash(database, claim)
    assert runs_of(mlflow_url, job.id)[0]["info"]["status"] == "RUNNING"

    queue_builders.submit(database, **{**job.spec.model_dump(mode="json"), "dataset_id": DATASET})
    with Trackers(claimed(database), settings, database):
        pass

    assert runs_of(mlflow_url, job.id)[0]["info"]["status"] == "KILLED"


def test_a_tracker_that_is_not_there_is_told_once_and_the_job_succeeds(
    job: Job, database: Database, storage: LocalStorage, tmp_path: Path
) -> None:
    uri = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    settings = Settings(data_dir=tmp_path / "storage", device="cpu", mlflow_tracking_uri=uri)
    with capture_logs() as logs:
        run(claimed(database), settings, database, storage)

    assert job.row.status == "succeeded"
    told = [entry for entry in logs if "tracker" in entry]
    assert [entry["event"] for entry in told] == ["tracker_failed", "tracker_incomplete"]


def test_a_tracker_that_never_answers_keeps_no_job_waiting(
    job: Job, database: Database, storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "LAST_WORD_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        settings = Settings(data_dir=tmp_path / "storage", device="cpu", mlflow_tracking_uri=uri)
        claim = claimed(database)
        with capture_logs() as logs:
            told = Trackers(claim, settings, database)
            reporter = Reporter(database, claim, shutdown=Wakeup(), observers=[told])
            run_training(claim, settings=settings, database=database, storage=storage, reporter=reporter)
            assert job.row.status == "succeeded"  # before anybody waited for the tracker
            told.__exit__(None, None, None)

    assert [entry["event"] for entry in logs if "tracker" in entry][-1] == "tracker_incomplete"


def test_what_could_not_be_told_is_told_later(
    job: Job, database: Database, storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that cannot be written to, until somebody sees to it."""
    monkeypatch.setattr(trackers, "RETRY_SECONDS", 0.05)
    blocked = tmp_path / "boards"
    blocked.write_text("a file where a folder is to be")
    settings = Settings(data_dir=tmp_path / "storage", tensorboard_dir=blocked)
    claim = claimed(database)
    with capture_logs() as logs, Trackers(claim, settings, database) as told:
        told.epoch(epoch(1))
        wait_until(lambda: logs, within_seconds=60, otherwise="nobody noticed")
        told.epoch(epoch(2))
        blocked.unlink()
        told.epoch(epoch(3))

    assert [entry["event"] for entry in logs] == ["tracker_failed"]
    assert [step for step, _ in tensorboard_scalars(blocked / job.id)["loss/train"]] == [1, 2, 3]


def test_an_extra_that_is_not_installed_is_named(job: Job, database: Database, tmp_path: Path) -> None:
    """In a process that finds no package of that name."""
    script = """
import sys
sys.modules["mlflow"] = None
from worker.trackers import MlflowRun
try:
    MlflowRun("http://127.0.0.1:1", None, None)
except ModuleNotFoundError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert "pip install 'graft[mlflow]'" in ran.stdout
