"""The command in a terminal, at a real API; the test is the worker, so it decides what happens when."""

import contextlib
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import api_builders
import httpx
import pytest
from api_builders import RunningServer
from killed_api import killed_api
from running import environment_for, picture
from terminal_session import CONTROL, TerminalSession

from app.datasets import catalog
from app.datasets.report import IngestReport
from app.db.engine import Database
from app.db.tables import DEFAULT_WORKSPACE
from app.jobs import queue
from app.jobs.queue import Claim
from app.jobs.states import JobKind
from app.storage import LocalStorage

ABOUT_TERMINALS = ("CI", "COLUMNS", "FORCE_COLOR", "LINES", "NO_COLOR")
Start = Callable[..., TerminalSession]


@pytest.fixture
def environment(tmp_path: Path, graft_server: RunningServer) -> dict[str, str]:
    # What the tests themselves run in is none of the command's business.
    inherited = {name: value for name, value in environment_for(tmp_path).items() if name not in ABOUT_TERMINALS}
    return inherited | {"GRAFT_URL": graft_server.url, "TERM": "xterm-256color"}


@pytest.fixture
def graft_server(tmp_path: Path) -> Iterator[RunningServer]:
    with api_builders.running(api_builders.settings_for(tmp_path)) as server:
        yield server


@pytest.fixture
def start(tmp_path: Path, environment: dict[str, str]) -> Iterator[Start]:
    """Starts `graft` with these arguments in a terminal; what goes on at the end is killed."""
    with contextlib.ExitStack() as sessions:

        def begin(*arguments: str, **more: str) -> TerminalSession:
            session = TerminalSession(*arguments, environment=environment | more, folder=tmp_path)
            sessions.callback(session.close)
            return session

        yield begin


class Worker:
    """What a worker would write, as the test wants it."""

    def __init__(self, server: RunningServer) -> None:
        self._database = server.services.database

    def claim(self, kind: JobKind) -> Claim:
        found: list[Claim] = []

        def is_there() -> bool:
            with self._database.write() as session:
                claim = queue.claim_next(session, kind=kind, worker_id="w1", owner={})
            found.extend([claim] if claim else [])
            return bool(found)

        api_builders.wait_for(is_there)
        return found[0]

    def progress(self, claim: Claim, stage: str, fraction: float, **more: Any) -> None:
        with self._database.write() as session:
            queue.record_progress(session, claim, {"stage": stage, "fraction": fraction, **more}, event=True)

    def finish_ingest(self, claim: Claim) -> None:
        counts = [{"name": name, "train": 8, "val": 2, "test": 0} for name in api_builders.CLASSES]
        splits = {"train": 16, "val": 4, "test": 0}
        report = IngestReport(num_images=20, num_rejected=0, splits=splits, classes=counts, rejected=[])
        with self._database.write() as session:
            queue.succeed(session, claim)
            catalog.mark_ready(session, claim.dataset_id, report)

    def epoch(self, claim: Claim, number: int, val_accuracy: float) -> None:
        epoch = {"epoch": number, "train_loss": 0.5, "train_accuracy": 0.9, "val_loss": 0.4, "learning_rate": 0.1}
        progress = {"stage": "train", "epoch": number, "epochs": 4, "fraction": number / 4}
        with self._database.write() as session:
            queue.record_epoch(
                session, claim, {**epoch, "val_accuracy": val_accuracy, "seconds": 1.0}, progress, metrics=None
            )
            queue.record_progress(session, claim, progress, event=True)

    def succeed(self, claim: Claim, model_id: str) -> None:
        with self._database.write() as session:
            queue.succeed(session, claim, model_id=model_id)


@pytest.fixture
def worker(graft_server: RunningServer) -> Worker:
    return Worker(graft_server)


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    folder = tmp_path / "flowers"
    for label, name in enumerate(api_builders.CLASSES):
        (folder / name).mkdir(parents=True)
        for index in range(10):
            (folder / name / f"{index}.png").write_bytes(picture(label, chance=random.Random(index)))
    return folder


def submit(server: RunningServer) -> str:
    dataset = api_builders.ready_dataset(server.services.database)
    body = {"dataset": dataset, "backbone": "graft_small"}
    job_id: str = httpx.post(f"{server.url}/v1/jobs", json=body).json()["id"]
    return job_id


def test_train_shows_upload_check_and_epochs_and_ends_with_the_figures(
    graft_server: RunningServer, worker: Worker, start: Start, flowers: Path
) -> None:
    session = start("train", str(flowers), "--backbone", "graft_small")
    ingest = worker.claim(JobKind.ingest)
    worker.progress(ingest, "ingest", 0.25)
    session.wait_for("25%")
    worker.finish_ingest(ingest)
    session.wait_for("20 pictures of 2 classes, 16 to train on, 4 to validate with.")
    training = worker.claim(JobKind.training)
    worker.epoch(training, 1, 0.75)
    session.wait_for("accuracy 75.0%")
    assert "(accuracy)" not in session.text  # one point is no curve
    worker.epoch(training, 2, 0.95)
    worker.epoch(training, 3, 0.85)
    session.wait_for("accuracy 85.0% (best 95.0%)")
    session.wait_for("(accuracy)")
    model_id = api_builders.register_model(graft_server.services)
    worker.succeed(training, model_id)

    assert session.end() == 0
    assert session.is_coloured
    assert session.text.index("upload") < session.text.index("check") < session.text.index("train")
    figures = session.text[session.text.rindex(f"Model {model_id}") :]
    assert "validation accuracy 50.0%" in figures
    assert f"curl -F file=@picture.jpg {graft_server.url}/predict" in figures


def test_ctrl_c_ends_the_watching_and_not_the_job(graft_server: RunningServer, start: Start) -> None:
    job_id = submit(graft_server)
    session = start("jobs", "watch")  # the newest one
    session.wait_for("queued")
    session.press_ctrl_c()

    assert session.end() == 130
    assert f"The job goes on. `graft jobs watch {job_id}` follows it" in session.text
    assert "Traceback" not in session.text
    assert httpx.get(f"{graft_server.url}/v1/jobs/{job_id}").json()["status"] == "queued"


def test_ctrl_c_while_pictures_are_checked_says_how_to_go_on(
    graft_server: RunningServer, worker: Worker, start: Start, flowers: Path
) -> None:
    session = start("train", str(flowers))
    ingest = worker.claim(JobKind.ingest)
    session.wait_for("check")
    session.press_ctrl_c()

    assert session.end() == 130
    assert f"`graft train {ingest.dataset_id}` trains on the data set." in session.text


@pytest.mark.parametrize(
    ("variables", "is_coloured", "moves"),
    [({}, True, True), ({"NO_COLOR": "1"}, False, True), ({"TERM": "dumb"}, False, False)],
)
def test_terminals_without_colours_or_movement_get_none(
    graft_server: RunningServer,
    worker: Worker,
    start: Start,
    variables: dict[str, str],
    is_coloured: bool,
    moves: bool,
) -> None:
    job_id = submit(graft_server)
    session = start("jobs", "watch", job_id, **variables)
    training = worker.claim(JobKind.training)
    worker.epoch(training, 1, 0.75)
    worker.epoch(training, 2, 0.85)
    session.wait_for("accuracy 85.0%")
    worker.succeed(training, api_builders.register_model(graft_server.services))

    assert session.end() == 0
    assert session.is_coloured == is_coloured
    assert (CONTROL.search(session.raw) is not None) == moves
    assert ("epoch   2" in session.text) == (not moves)


def test_a_long_name_leaves_its_label_and_score_in_the_line(
    graft_server: RunningServer, start: Start, tmp_path: Path
) -> None:
    api_builders.register_model(graft_server.services)
    path = tmp_path / ("a" * 150) / "1.png"
    path.parent.mkdir()
    path.write_bytes(picture(0, chance=random.Random(0)))
    answer = httpx.post(f"{graft_server.url}/predict", content=path.read_bytes()).json()["predictions"][0]

    session = start("predict", str(path))

    assert session.end() == 0
    assert session.text.splitlines()[1].split()[:3] == [str(path), answer["label"], f"{answer['score']:.1%}"]


def test_into_a_pipe_go_lines_without_bars_and_colours(
    graft_server: RunningServer, worker: Worker, environment: dict[str, str], tmp_path: Path
) -> None:
    job_id = submit(graft_server)
    piped = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "jobs", "watch", job_id],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    training = worker.claim(JobKind.training)
    worker.epoch(training, 1, 0.75)
    worker.epoch(training, 2, 0.85)
    model_id = api_builders.register_model(graft_server.services)
    worker.succeed(training, model_id)
    output, errors = piped.communicate(timeout=60)

    assert piped.returncode == 0
    assert errors.splitlines() == [
        f"Job {job_id}",
        "epoch   1   train loss 0.5000 accuracy 90.0%   validation loss 0.4000 accuracy 75.0%",
        "epoch   2   train loss 0.5000 accuracy 90.0%   validation loss 0.4000 accuracy 85.0%",
    ]
    assert output.splitlines()[0] == f"Model {model_id}: fine_tuning on squeezenet1_1"
    assert not CONTROL.search(output + errors)


@pytest.mark.slow
def test_waiting_for_a_batch_and_for_a_check_outlives_a_restart_of_the_server(
    environment: dict[str, str], flowers: Path, tmp_path: Path
) -> None:
    (tmp_path / "api").mkdir()
    with killed_api(tmp_path / "api") as api, ExitStack() as commands:
        database = Database(api.database_url).within(DEFAULT_WORKSPACE)
        api_builders.register_model(SimpleNamespace(database=database, storage=LocalStorage(api.data)))

        def started(*arguments: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "app.cli", *arguments, "--url", api.url]
            piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            running = commands.enter_context(subprocess.Popen(command, env=environment, cwd=tmp_path, **piped))
            commands.callback(running.kill)
            return running

        batch, train = started("batches", "run", str(flowers)), started("train", str(flowers), "--detach")
        first = batch.stderr.readline()
        batch_id = first.removeprefix("Batch ").rstrip()
        worker = Worker(SimpleNamespace(services=SimpleNamespace(database=database)))
        ingest = worker.claim(JobKind.ingest)
        api.kill()
        with pytest.raises(subprocess.TimeoutExpired):
            batch.wait(timeout=4)  # longer than a request is sent again by itself
        api.start()
        worker.finish_ingest(ingest)
        ended = httpx.post(f"{api.url}/v1/batches/{batch_id}/cancel")

        assert ended.status_code == 200, first
        assert batch.communicate(timeout=60) == ("", f"Batch {batch_id} is cancelled.\n")
        output, errors = train.communicate(timeout=60)
        assert (train.returncode, output[:4]) == (0, "job_"), errors
        database.dispose()


def test_a_reader_that_has_seen_enough_is_no_error(environment: dict[str, str], tmp_path: Path) -> None:
    # A pipe, as people type it.
    command = ["bash", "-c", f"{sys.executable} -m app.cli settings | head -n 1; exit ${{PIPESTATUS[0]}}"]
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert (ran.stdout.split()[0], ran.stderr) == ("setting", "")


# Completion


def completed(environment: dict[str, str], *words: str) -> list[str]:
    """What bash offers behind these words, the last of which is being typed."""
    asked = {
        "_GRAFT_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["graft", *words]),
        "COMP_CWORD": str(len(words)),
    }
    command = [sys.executable, "-m", "app.cli"]
    ran = subprocess.run(command, env=environment | asked, capture_output=True, text=True, check=False)
    assert ran.stderr == ""
    return ran.stdout.split()


@pytest.mark.slow
def test_the_shell_completes_what_the_server_knows(graft_server: RunningServer, environment: dict[str, str]) -> None:
    job_id = submit(graft_server)
    model_id = api_builders.register_model(graft_server.services)

    assert completed(environment, "jobs", "cancel", "job") == [job_id]
    assert completed(environment, "models", "card", "") == ["default", model_id]
    assert completed(environment, "predict", "x.jpg", "--model", "def") == ["default"]
    assert "graft_small" in completed(environment, "train", "x", "--backbone", "graft")
    assert completed(environment, "train", "x", "--method", "few") == ["few_shot"]
    assert completed(environment, "train", "x", "-H", "label") == ["label_smoothing="]


def test_without_a_server_the_shell_offers_nothing_and_no_error(environment: dict[str, str]) -> None:
    away = environment | {"GRAFT_URL": "http://127.0.0.1:1"}

    assert completed(away, "jobs", "cancel", "job") == []
