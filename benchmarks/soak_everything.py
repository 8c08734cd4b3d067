r"""An hour with everything on, on a real server and worker, and what they hold at the end of each minute.

    python benchmarks/soak_everything.py --data two_trees.zip [--weights FOLDER] [--minutes 60] [--per-second 10]

Two workspaces with keys. In each, round after round: an archive comes in pieces with a cut connection between them,
becomes a data set, trains (by another method each round) while its events are followed, and its model is asked with
every option, corrected, personalised, exported, run over a batch; then all of it is deleted. Beside that, predictions
at random moments, pictures that are none, uploads that break off, people who look at the pages, `default` that moves
every two seconds, webhooks, traces, and TensorBoard.

Prints each minute's answers, and memory, files and threads of the server's process and the worker's, whose children
come and go; fails if a request failed or if one of the numbers grew: the last fifth of the minutes against the fifth
after the first two.
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from _serving import Server, served
from _setup import hardware, markdown

from graft_client import AsyncGraft, GraftError
from graft_client.requests import JobOptions

WORKSPACES = ("default", "studio")
PAGES = ("/", "/datasets", "/jobs", "/models", "/try")
MOVE_SECONDS, PAGE_SECONDS, FAULT_SECONDS = 2.0, 5.0, 7.0
METHODS: tuple[JobOptions, ...] = (
    {"method": "feature_extraction"},
    {"method": "few_shot"},
    {"method": "auto", "budget_seconds": 20},
    {"method": "fine_tuning", "hyperparameters": {"epochs": 2}},
    {"method": "full_fine_tuning", "hyperparameters": {"epochs": 2}},
)
# What may be more at the end, as a factor and in numbers: allocators settle, and a round may be at any of its steps.
ALLOWED_GROWTH = {"memory": (1.1, 0), "files": (1.0, 8), "threads": (1.0, 8)}


@dataclass(frozen=True)
class Held:
    """By a process itself. memory: MiB, what is shared counted once (PSS). in_all: with the memory of all below it."""

    memory: float = 0.0
    files: int = 0
    threads: int = 0
    in_all: float = 0.0


@dataclass
class Minute:
    latencies: list[float] = field(default_factory=list)  # milliseconds, of predictions at random moments
    failures: list[str] = field(default_factory=list)
    rounds: int = 0
    server: Held = Held()
    worker: Held = Held()
    stored: float = 0.0  # MiB in the data folder


@dataclass(frozen=True)
class Soak:
    """What the tasks share. minutes: the last one is now."""

    url: str
    keys: dict[str, str]
    archive: bytes
    pictures: list[tuple[str, bytes]]
    minutes: list[Minute]

    @property
    def now(self) -> Minute:
        return self.minutes[-1]

    def client(self, workspace: str) -> AsyncGraft:
        return AsyncGraft(self.url, api_key=self.keys[workspace], timeout_seconds=120)

    def http(self, workspace: str) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.keys[workspace]}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=120)


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        sink = stack.enter_context(_sink())
        environment = {
            "GRAFT_WEIGHTS_DIR": str(arguments.weights or ""),
            "GRAFT_ALLOW_DOWNLOADS": "false",
            "GRAFT_WEBHOOKS": "true",
            "GRAFT_WEBHOOK_NETWORKS": '["127.0.0.0/8"]',
            "GRAFT_OTLP_ENDPOINT": sink,
            "GRAFT_TENSORBOARD_DIR": str(folder / "tensorboard"),
            "GRAFT_WORKSPACE_MAX_BYTES": str(10**10),
            "GRAFT_WORKSPACE_REQUESTS_PER_SECOND": "500",
        }
        keys = _keys(folder, environment)
        server = stack.enter_context(served("graft", ["-m", "app.main"], folder, environment))
        worker = stack.enter_context(served("worker", ["-m", "worker.main"], folder, environment))
        soak = Soak(
            url=f"http://127.0.0.1:{server.port}",
            keys=keys,
            archive=arguments.data.read_bytes(),
            pictures=_pictures(arguments.data),
            minutes=[Minute()],
        )
        asyncio.run(_soaked(soak, sink, server, worker, folder, arguments))
        minutes = soak.minutes[:-1]
    print(_table(minutes))
    failures = [failure for each in minutes for failure in each.failures]
    asked = sum(len(each.latencies) for each in minutes)
    print(f"\n{asked} predictions, {sum(each.rounds for each in minutes)} rounds, {len(failures)} failures.")
    print(hardware(torch.device("cpu")))
    if grown := _grown(minutes):
        sys.exit("\n".join([*grown, *sorted(set(failures))[:10]]))
    if failures:
        sys.exit("\n".join(sorted(set(failures))[:10]))


def _keys(folder: Path, environment: dict[str, str]) -> dict[str, str]:
    """A key that may do everything, of each workspace."""
    whole = os.environ | environment | {"GRAFT_DATA_DIR": str(folder / "data")}
    graft = [sys.executable, "-m", "app.cli"]
    subprocess.run([*graft, "workspaces", "create", WORKSPACES[1]], env=whole, check=True, capture_output=True)
    made = {}
    for workspace in WORKSPACES:
        command = [*graft, "keys", "create", "--scope", "admin", "--workspace", workspace]
        made[workspace] = subprocess.run(command, env=whole, check=True, capture_output=True, text=True).stdout.strip()
    return made


def _pictures(archive: Path) -> list[tuple[str, bytes]]:
    """Some of an archive's pictures, each with its class."""
    with zipfile.ZipFile(archive) as opened:
        names = [name for name in opened.namelist() if name.lower().endswith((".jpg", ".jpeg", ".png"))]
        return [(name.split("/")[-2], opened.read(name)) for name in names[:: max(1, len(names) // 32)]]


async def _soaked(
    soak: Soak, sink: str, server: Server, worker: Server, folder: Path, arguments: argparse.Namespace
) -> None:
    await _ready(soak)
    models = [await _prepared(soak, workspace, sink) for workspace in WORKSPACES]
    tasks: list[Any] = [_minutes(soak, server, worker, folder, arguments.minutes)]
    for workspace, pair in zip(WORKSPACES, models, strict=True):
        chance = random.Random(workspace)
        tasks += [
            _rounds(soak, workspace),
            _predictions(soak, workspace, chance, arguments.per_second / len(WORKSPACES)),
            _moves(soak, workspace, pair),
            _visits(soak, workspace),
            _faults(soak, workspace),
        ]
    running = [asyncio.create_task(each) for each in tasks]
    done, others = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    for each in others:
        each.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    for each in done:
        each.result()


async def _ready(soak: Soak) -> None:
    deadline = time.monotonic() + 60
    async with soak.http("default") as http:
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if (await http.get("/readyz")).status_code == 200:
                    return
            await asyncio.sleep(0.2)
    sys.exit("The server did not start.")


async def _prepared(soak: Soak, workspace: str, sink: str) -> list[str]:
    """A webhook in the workspace, and two models to move between."""
    async with soak.client(workspace) as graft:
        dataset = await graft.datasets.upload(soak.archive, name="kept", wait=60)
        models = []
        for seed in range(2):
            job = await graft.jobs.create(dataset.id, method="feature_extraction", seed=seed, promote="always", wait=60)
            job = await graft.jobs.wait(job.id)
            assert job.model is not None, job.raw
            models.append(job.model)
        await graft.webhooks.create(f"{sink}/hook")
        return models


async def _minutes(soak: Soak, server: Server, worker: Server, folder: Path, count: int) -> None:
    for number in range(1, count + 1):
        await asyncio.sleep(60)
        minute = soak.now
        minute.server = await asyncio.to_thread(_held, server)
        minute.worker = await asyncio.to_thread(_held, worker)
        minute.stored = sum(path.stat().st_size for path in _files(folder / "data")) / 2**20
        soak.minutes.append(Minute())
        print(_table([minute], first=number), *minute.failures[:5], sep="\n", file=sys.stderr, flush=True)


async def _rounds(soak: Soak, workspace: str) -> None:
    for number in itertools.count():
        try:
            async with soak.client(workspace) as graft, soak.http(workspace) as http:
                await _round(soak, graft, http, number)
            soak.now.rounds += 1
        except (GraftError, httpx.HTTPError, AssertionError) as error:
            soak.now.failures.append(f"round {number} of {workspace}: {error!r}")
            await asyncio.sleep(1)


async def _round(soak: Soak, graft: AsyncGraft, http: httpx.AsyncClient, number: int) -> None:
    dataset = await graft.datasets.wait(await _in_pieces(soak, http))
    assert dataset.status == "ready", dataset.raw
    job = await graft.jobs.create(dataset.id, seed=number, promote="if_better", **METHODS[number % len(METHODS)])
    async for _ in graft.jobs.follow(job.id):
        pass
    job = await graft.jobs.get(job.id)
    assert job.model is not None, job.raw
    made = [job.model]
    label, picture = soak.pictures[number % len(soak.pictures)]
    answer = await graft.predict(
        picture, model=job.model, store=True, explain=True, coverage=0.9, neighbors=3, adapt="neighbors"
    )
    [predicted] = answer.raw["predictions"]
    await graft.predictions.give_feedback(predicted["id"], label)
    with contextlib.suppress(AssertionError):
        made.append((await graft.models.personalise(job.model, soak.pictures[:6])).id)
    with tempfile.TemporaryDirectory() as target:
        await graft.models.export(job.model, Path(target) / "model.onnx", format="onnx")
        batch = await graft.batches.submit(soak.archive, model=job.model)
        batch = await graft.batches.wait(batch.id)
        assert batch.status == "succeeded", batch.raw
        await graft.batches.download(batch.id, Path(target) / "results.csv", format="csv")
    await graft.batches.delete(batch.id)
    await graft.predictions.delete(predicted["id"])
    for model in reversed(made):
        aliases = [alias.name for alias in (await graft.aliases.list()).data if alias.model == model]
        if not aliases:
            await graft.models.delete(model)
    await graft.jobs.delete(job.id)
    await graft.datasets.delete(dataset.id)


async def _in_pieces(soak: Soak, http: httpx.AsyncClient) -> str:
    """Sends the archive by tus; the connection breaks in the middle. Returns the data set's id."""
    tus = {"Tus-Resumable": "1.0.0"}
    made = await http.post("/v1/uploads", headers=tus | {"Upload-Length": str(len(soak.archive))})
    made.raise_for_status()
    where = made.headers["Location"]
    patch = tus | {"Content-Type": "application/offset+octet-stream"}

    async def broken() -> AsyncIterator[bytes]:
        yield soak.archive[: len(soak.archive) // 2]
        raise ConnectionAbortedError

    rest = {"Content-Length": str(len(soak.archive))}
    with contextlib.suppress(ConnectionAbortedError):
        await http.patch(where, headers=patch | {"Upload-Offset": "0"} | rest, content=broken())
    while True:
        # The server may not have noticed yet, and hold the upload, or still take bytes that were on their way.
        offset = int((await http.head(where, headers=tus)).raise_for_status().headers["Upload-Offset"])
        last = await http.patch(where, headers=patch | {"Upload-Offset": str(offset)}, content=soak.archive[offset:])
        if last.status_code not in (409, 423):
            last.raise_for_status()
            break
        await asyncio.sleep(0.5)
    upload = (await http.get(where)).raise_for_status().json()
    return str(upload["dataset"])


async def _predictions(soak: Soak, workspace: str, chance: random.Random, per_second: float) -> None:
    async with soak.http(workspace) as http, asyncio.TaskGroup() as group:

        async def ask() -> None:
            start = time.perf_counter()
            minute = soak.now
            try:
                answer = await http.post("/predict", content=chance.choice(soak.pictures)[1])
                answer.raise_for_status()
            except httpx.HTTPError as error:
                minute.failures.append(f"predict: {error!r}")
            else:
                minute.latencies.append(1000 * (time.perf_counter() - start))

        while True:
            group.create_task(ask())
            await asyncio.sleep(chance.expovariate(per_second))


async def _moves(soak: Soak, workspace: str, models: list[str]) -> None:
    async with soak.http(workspace) as http:
        for model in itertools.cycle(models):
            await _expect(soak, 200, http.put("/v1/aliases/default", json={"model": model}))
            await asyncio.sleep(MOVE_SECONDS)


async def _visits(soak: Soak, workspace: str) -> None:
    async with soak.http(workspace) as http:
        for path in itertools.cycle(PAGES):
            await _expect(soak, 200, http.get(path))
            await asyncio.sleep(PAGE_SECONDS)


async def _faults(soak: Soak, workspace: str) -> None:
    """What is no picture, a picture that is cut off, an upload that breaks off, and an address of nothing."""
    async with soak.http(workspace) as http:
        while True:
            await _expect(soak, 422, http.post("/predict", content=b"no picture at all"))
            await _expect(soak, 422, http.post("/predict", content=soak.pictures[0][1][:2000]))
            await _expect(soak, 404, http.get("/v1/jobs/job_00000000000000000000000000000000"))

            async def broken() -> AsyncIterator[bytes]:
                yield soak.archive[:300_000]
                raise ConnectionAbortedError

            with contextlib.suppress(ConnectionAbortedError, httpx.HTTPError):
                await http.put("/v1/datasets", content=broken(), headers={"Content-Length": str(len(soak.archive))})
            await asyncio.sleep(FAULT_SECONDS)


async def _expect(soak: Soak, status: int, asking: Any) -> None:
    try:
        answer = await asking
    except httpx.HTTPError as error:
        soak.now.failures.append(repr(error))
        return
    if answer.status_code != status:
        soak.now.failures.append(f"{answer.request.method} {answer.url.path}: {answer.status_code} {answer.text[:200]}")


@contextlib.contextmanager
def _sink() -> Iterator[str]:
    """Takes webhooks and traces, and forgets them."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            """Not into the table."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def _held(server: Server) -> Held:
    process = psutil.Process(server.process.pid)
    memory, in_all = process.memory_full_info().pss / 2**20, 0.0
    for each in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            in_all += each.memory_full_info().pss / 2**20
    return Held(memory, process.num_fds(), process.num_threads(), memory + in_all)


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                yield path


def _grown(minutes: list[Minute]) -> list[str]:
    """Sentences about what is more at the end than soon after the start."""
    fifth = max(1, len(minutes) // 5)
    early, late = minutes[2 : 2 + fifth], minutes[-fifth:]
    found = []
    for name in ("server", "worker"):
        for what, (factor, more) in ALLOWED_GROWTH.items():
            before, after = (
                statistics.median(getattr(getattr(each, name), what) for each in part) for part in (early, late)
            )
            print(f"{name}, {what}: {before:.0f} early, {after:.0f} at the end")
            if after > factor * before + more:
                found.append(f"{what} of the {name} grew from {before:.0f} to {after:.0f}")
    return found


def _table(minutes: list[Minute], *, first: int = 1) -> str:
    rows = []
    for number, each in enumerate(minutes, first):
        ordered = sorted(each.latencies) or [float("nan")]
        held = [
            f"{part.memory:.0f} ({part.in_all:.0f}) / {part.files} / {part.threads}"
            for part in (each.server, each.worker)
        ]
        rows.append(
            [
                str(number),
                str(len(each.latencies)),
                str(each.rounds),
                str(len(each.failures)),
                f"{statistics.median(ordered):.0f}",
                f"{ordered[int(0.99 * len(ordered))]:.0f}",
                *held,
                f"{each.stored:.0f}",
            ]
        )
    columns = ["minute", "predictions", "rounds", "failed", "p50, ms", "p99, ms"]
    held_columns = [f"{name}: MiB (in all) / files / threads" for name in ("server", "worker")]
    return markdown([*columns, *held_columns, "stored, MiB"], rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Everything on, for an hour.")
    parser.add_argument("--data", type=Path, required=True, help="zip of a small data set")
    parser.add_argument("--weights", type=Path, default=None, help="folder of weight files; the bundled one without")
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--per-second", type=float, default=10.0, help="predictions at random moments")
    return parser.parse_args()


if __name__ == "__main__":
    main()
