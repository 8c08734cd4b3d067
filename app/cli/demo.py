"""`graft demo`: the whole way from real pictures to served predictions, over HTTP as any caller would go it."""

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from app.cli.server import load_settings
from app.cli.terminal import Failure, errors, percent, print_line, print_table
from app.cli.train import describe_dataset, describe_model, upload
from app.cli.watching import model_of, watch
from app.supervisor import free_port, is_port_free, stop_signals
from graft_client import Dataset, Graft, JobOptions, Model, Prediction

START_WITHIN_SECONDS = 120.0  # importing torch from a cold disk takes most of it
LOG_LINES_SHOWN = 20

# By name, so that the demo needs no network and is the same everywhere; it takes half a minute or so on two cores.
TRAINING: JobOptions = {
    "method": "full_fine_tuning",
    "backbone": "graft_small",
    "hyperparameters": {"epochs": 8, "image_size": 64, "augmentation": "none"},
}


def add_to(cli: typer.Typer) -> None:
    cli.command()(demo)


def demo(
    exit_when_done: Annotated[bool, typer.Option("--exit", help="End when done, instead of serving on.")] = False,
    port: Annotated[int | None, typer.Option(help="Port to serve on; 8000 or a free one if left out.")] = None,
) -> None:
    """Upload real pictures, train on them, predict new ones, and leave it all serving until Ctrl-C."""
    # SIGTERM and a closed terminal, too, have to stop the server on their way out.
    for number in stop_signals():
        signal.signal(number, signal.default_int_handler)
    with _fresh_folder(load_settings().data_dir.resolve() / "demo") as folder:
        _run(folder, port=port, exit_when_done=exit_when_done)


def _run(folder: Path, *, port: int | None, exit_when_done: bool) -> None:
    started = time.monotonic()
    _make_pictures(folder)
    with _server(folder, port) as (server, url), Graft(url, api_key="") as graft:
        dataset = _upload(graft, folder / "digits.zip")
        model = _train(graft, dataset)
        _predict(graft, model, sorted((folder / "held_out").iterdir()))
        print_line(f"\nFrom nothing to predictions in {time.monotonic() - started:.0f} s.")
        if exit_when_done:
            return
        try:
            # Inside, because the line invites to press it at once.
            print_line(f"Graft goes on serving at {url} and describes itself at {url}/docs. Ctrl-C ends it.")
            server.wait()
        except KeyboardInterrupt:
            return
        raise Failure(f"The server ended by itself; its log is {folder / 'graft.log'}.")


@contextmanager
def _fresh_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that no other demo uses."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "demo.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure("Another demo is running here; end it with Ctrl-C first.") from None
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        yield folder


def _make_pictures(folder: Path) -> None:
    made = subprocess.run([sys.executable, "-m", "app.demo", str(folder)], capture_output=True, text=True, check=False)
    if "No module named 'sklearn'" in made.stderr:
        raise Failure("The demo's pictures come with scikit-learn: pip install 'graft[demo]'.")
    if made.returncode != 0:
        raise Failure(f"The demo's pictures could not be made:\n{made.stderr}")


@contextmanager
def _server(folder: Path, port: int | None) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`graft up` on the folder, from when it serves; its process and its address."""
    settings = load_settings(port=port)
    if port is None and not is_port_free("127.0.0.1", settings.port):
        port = free_port("127.0.0.1")
    port = port or settings.port or free_port("127.0.0.1")
    environment = {**os.environ, "GRAFT_DATA_DIR": str(folder), "GRAFT_DATABASE_URL": "", "GRAFT_STORAGE_URL": ""}
    command = [sys.executable, "-m", "app.cli", "up", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "graft.log").open("wb") as log:
        server = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours to pass on, once
        )
    url = f"http://127.0.0.1:{port}"
    try:
        with errors.status("Starting the API and a worker …"):
            _wait_until_serving(server, url, log=folder / "graft.log")
        print_line(f"graft up --port {port}\n  serves at {url}, data in {folder}")
        yield server, url
    finally:
        server.terminate()
        server.wait()


def _wait_until_serving(server: subprocess.Popen[bytes], url: str, *, log: Path) -> None:
    deadline = time.monotonic() + START_WITHIN_SECONDS
    with Graft(url, api_key="") as graft:
        while not graft.is_alive():
            if server.poll() is not None or time.monotonic() > deadline:
                last_lines = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])
                raise Failure(f"The server did not start. The end of its log:\n{last_lines}")
            time.sleep(0.2)


def _upload(graft: Graft, archive: Path) -> Dataset:
    print_line(f'\ncurl -T {shlex.quote(str(archive))} "{graft.url}/v1/datasets?name=digits"')
    dataset = upload(graft, archive, name="digits")
    describe_dataset(dataset)
    return dataset


def _train(graft: Graft, dataset: Dataset) -> Model:
    print_line(f"\ncurl {graft.url}/v1/jobs -d '{json.dumps({'dataset': dataset.id, **TRAINING})}'")
    model = model_of(graft, watch(graft, graft.jobs.create(dataset.id, **TRAINING).id))
    describe_model(graft, model)
    return model


def _predict(graft: Graft, model: Model, pictures: list[Path]) -> None:
    """Predicts pictures that were kept from training, whose true class is the first part of their file's name."""
    answer = graft.predict(pictures, model=model.id, top_k=2)
    found = [prediction for prediction in answer.predictions if isinstance(prediction, Prediction)]
    truth = [path.name.split("_")[0] for path in pictures]
    shown = {name: index for index, name in reversed(list(enumerate(truth)))}  # the first picture of each class
    field = shlex.quote(f"file=@{pictures[shown['seven']]}")
    print_line(f"\ncurl -F {field} {graft.url}/predict")
    rows = [[pictures[index].name, found[index].label, percent(found[index].score)] for index in sorted(shown.values())]
    print_table(["picture", "label", "score"], rows, empty="")
    right = sum(prediction.label == name for prediction, name in zip(found, truth, strict=True))
    print_line(f"{right} of {len(truth)} pictures kept from training are right ({percent(right / len(truth))}).")
