r"""What predictions wait where a job trains on the same machine, and what the job loses to them.

    python benchmarks/contention.py --data hymenoptera.zip --weights FOLDER [--rate 10] [--seconds 20] [--rounds 3]

A real server and worker, the worker's job full_fine_tuning. Pictures are asked for at random moments, so many a second
whatever the answers take, as independent callers do: without a job, and beside one. Prints latencies, and the job's
images a second with and without callers; medians (smallest to largest) over rounds.
"""

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
from _serving import LONG_JOB, Server, prepare, served, warm_up, write_pictures
from _setup import hardware, markdown, spread


def main() -> None:
    arguments = _arguments()
    found: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        write_pictures(arguments.data, folder / "pictures")
        prepare(folder / "data", "mobilenet_v3_small", arguments.weights, arguments.data)
        environment = {"GRAFT_WEIGHTS_DIR": str(arguments.weights)}
        server = stack.enter_context(served("graft", ["-m", "app.main"], folder, environment))
        stack.enter_context(served("worker", ["-m", "worker.main"], folder, environment))
        warm_up(server, folder)
        with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=90) as client:
            with arguments.data.open("rb") as archive:
                dataset = client.put("/v1/datasets", params={"wait": 60}, content=archive).json()
            for _ in range(arguments.rounds):
                _round(client, server, folder, dataset["id"], arguments, found)
                print({name: values[-1] for name, values in found.items()}, file=sys.stderr, flush=True)
    rows = [[name, spread(values, 1)] for name, values in found.items()]
    print(markdown(["figure", "median (smallest to largest)"], rows))
    print(f"\n{arguments.rate:g} a second, {arguments.seconds:g} s each. {hardware(torch.device('cpu'))}.")


def _round(
    client: httpx.Client,
    server: Server,
    folder: Path,
    dataset: str,
    arguments: argparse.Namespace,
    found: dict[str, list[float]],
) -> None:
    def ask(what: str) -> None:
        latencies = sorted(asyncio.run(_asked(server, folder, arguments.rate, arguments.seconds)))
        found[f"{what}: p50, ms"].append(statistics.median(latencies))
        found[f"{what}: p99, ms"].append(latencies[int(0.99 * len(latencies))])

    ask("no job")
    job = client.post("/v1/jobs", json=LONG_JOB | {"dataset": dataset}).json()["id"]
    _wait_for_epochs(client, job, 1)
    with _speed_of(client, job, found["job, nobody asks: images a second"]):
        time.sleep(arguments.seconds)
    with _speed_of(client, job, found["job, asked beside: images a second"]):
        ask("beside a job")
    client.post(f"/v1/jobs/{job}/cancel")
    client.get(f"/v1/jobs/{job}", params={"wait": 60})


async def _asked(server: Server, folder: Path, rate: float, seconds: float) -> list[float]:
    """Milliseconds of each answer; a failed one ends the program."""
    pictures = [path.read_bytes() for path in sorted((folder / "pictures").iterdir())]
    chance = random.Random(0)
    latencies: list[float] = []

    async def one(client: httpx.AsyncClient, picture: bytes) -> None:
        start = time.perf_counter()
        answer = await client.post("/predict", content=picture)
        answer.raise_for_status()
        latencies.append(1000 * (time.perf_counter() - start))

    limits = httpx.Limits(max_connections=200, max_keepalive_connections=200)
    async with (
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=60, limits=limits) as client,
        asyncio.TaskGroup() as group,
    ):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            group.create_task(one(client, chance.choice(pictures)))
            await asyncio.sleep(chance.expovariate(rate))
    return latencies


def _epochs(client: httpx.Client, job: str) -> list[dict[str, Any]]:
    epochs: list[dict[str, Any]] = client.get(f"/v1/jobs/{job}/history").json()["data"]
    return epochs


def _wait_for_epochs(client: httpx.Client, job: str, count: int) -> None:
    while len(_epochs(client, job)) < count:
        time.sleep(0.1)


@contextlib.contextmanager
def _speed_of(client: httpx.Client, job: str, into: list[float]) -> Iterator[None]:
    """Adds the mean of the images a second that the job tells of meanwhile."""
    told: list[float] = []
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(1):
            speed = client.get(f"/v1/jobs/{job}").json()["progress"]["images_per_second"]
            if speed is not None:  # none during validation
                told.append(speed)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    into.append(statistics.mean(told))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What predictions wait beside a training job.")
    parser.add_argument("--data", type=Path, required=True, help="zip of a data set of JPEGs")
    parser.add_argument("--weights", type=Path, required=True, help="folder of weight files")
    parser.add_argument("--rate", type=float, default=10, help="pictures a second")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
