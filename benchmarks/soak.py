r"""Many minutes of predictions near capacity, while the default moves between two models and a job trains.

    python benchmarks/soak.py --data hymenoptera.zip --weights FOLDER [--minutes 10] [--share 0.8]

A real server and worker. What callers can get beside the job is measured first, with 32 of them that ask again as soon
as they are answered; then pictures come at random moments, at --share of that, whatever the answers take. Every two
seconds `default` is pointed at the other model, of another backbone. Prints for each minute what was asked, what
failed, how long answers took, and what the server's process has resident.
"""

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from _serving import LONG_JOB, Server, prepare, served, warm_up, write_pictures
from _setup import hardware, markdown

FIRST, SECOND = "mobilenet_v3_small", "squeezenet1_1"
CALLERS, CAPACITY_SECONDS, MOVE_SECONDS = 32, 10.0, 2.0


@dataclass
class Minute:
    latencies: list[float] = field(default_factory=list)  # milliseconds, of answers
    failures: list[str] = field(default_factory=list)
    moves: int = 0
    resident: float = 0.0  # MiB, at its end


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        write_pictures(arguments.data, folder / "pictures")
        second = prepare(folder / "data", SECOND, arguments.weights, arguments.data)
        first = prepare(folder / "data", FIRST, arguments.weights, arguments.data)
        environment = {"GRAFT_WEIGHTS_DIR": str(arguments.weights)}
        server = stack.enter_context(served("graft", ["-m", "app.main"], folder, environment))
        stack.enter_context(served("worker", ["-m", "worker.main"], folder, environment))
        warm_up(server, folder)
        warm_up(replace(server, path=f"/predict?model={second}"), folder, engines=2)
        with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=90) as client:
            with arguments.data.open("rb") as archive:
                dataset = client.put("/v1/datasets", params={"wait": 60}, content=archive).json()["id"]
            job = client.post("/v1/jobs", json=LONG_JOB | {"dataset": dataset}).json()["id"]
            while not client.get(f"/v1/jobs/{job}/history").json()["data"]:
                time.sleep(0.5)
            found = asyncio.run(_soaked(server, folder, [first, second], arguments))
            status = client.get(f"/v1/jobs/{job}").json()["status"]
            client.post(f"/v1/jobs/{job}/cancel")
            client.get(f"/v1/jobs/{job}", params={"wait": 60})
    print(_table(found))
    asked = sum(len(each.latencies) + len(each.failures) for each in found)
    failures = [failure for each in found for failure in each.failures]
    print(f"\n{asked} asked, {len(failures)} failed, {sum(each.moves for each in found)} moves; the job: {status}.")
    print(hardware(torch.device("cpu")))
    if failures:
        sys.exit("\n".join(sorted(set(failures))[:5]))


async def _soaked(server: Server, folder: Path, models: list[str], arguments: argparse.Namespace) -> list[Minute]:
    pictures = [path.read_bytes() for path in sorted((folder / "pictures").iterdir())]
    chance = random.Random(0)
    minutes: list[Minute] = []
    process = psutil.Process(server.process.pid)
    limits = httpx.Limits(max_connections=500, max_keepalive_connections=500)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=60, limits=limits) as client:

        async def ask(into: Minute) -> None:
            start = time.perf_counter()
            try:
                answer = await client.post("/predict", content=chance.choice(pictures))
            except httpx.HTTPError as error:
                into.failures.append(repr(error))
                return
            if answer.status_code == 200:
                into.latencies.append(1000 * (time.perf_counter() - start))
            else:
                into.failures.append(answer.text[:300])

        async def move(into: Minute, model: str) -> None:
            (await client.put("/v1/aliases/default", json={"model": model})).raise_for_status()
            into.moves += 1

        rates = []
        for model in models:
            await move(Minute(), model)
            rates.append(await _capacity(ask))
        rate = arguments.share * min(rates)
        print(f"capacity beside the job: {rates} a second; asking at {rate:.1f}", file=sys.stderr, flush=True)
        next_ask = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(arguments.minutes):
                minute = Minute()
                minutes.append(minute)
                end, next_move = time.monotonic() + 60, time.monotonic() + MOVE_SECONDS
                while (now := time.monotonic()) < end:
                    if now >= next_move:
                        next_move += MOVE_SECONDS
                        group.create_task(move(minute, models[minute.moves % 2]))
                    group.create_task(ask(minute))
                    # By the clock, since a sleep is always a little longer than it is asked to be.
                    next_ask += chance.expovariate(rate)
                    await asyncio.sleep(max(0.0, next_ask - time.monotonic()))
                minute.resident = process.memory_info().rss / 2**20
                print(_table(minutes[-1:], first=number + 1), file=sys.stderr, flush=True)
    return minutes


async def _capacity(ask: Any) -> float:
    """Answers a second to callers that ask again as soon as they are answered."""
    found = Minute()

    async def caller() -> None:
        end = time.monotonic() + CAPACITY_SECONDS
        while time.monotonic() < end:
            await ask(found)

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return len(found.latencies) / CAPACITY_SECONDS


def _table(minutes: list[Minute], *, first: int = 1) -> str:
    rows = []
    for number, each in enumerate(minutes, first):
        ordered = sorted(each.latencies)
        at_99 = ordered[int(0.99 * len(ordered))]
        asked = len(ordered) + len(each.failures)
        rows.append(
            [
                str(number),
                str(asked),
                str(len(each.failures)),
                str(each.moves),
                f"{statistics.median(ordered):.1f}",
                f"{at_99:.0f}",
                f"{ordered[-1]:.0f}",
                f"{each.resident:.0f}",
            ]
        )
    header = ["minute", "asked", "failed", "moves", "p50, ms", "p99, ms", "slowest, ms", "resident, MiB"]
    return markdown(header, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Predictions near capacity for many minutes.")
    parser.add_argument("--data", type=Path, required=True, help="zip of a data set of JPEGs")
    parser.add_argument("--weights", type=Path, required=True, help="folder of weight files")
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--share", type=float, default=0.8, help="of what callers can get beside the job")
    return parser.parse_args()


if __name__ == "__main__":
    main()
