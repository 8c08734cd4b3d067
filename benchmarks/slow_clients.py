r"""Hundreds of clients that send a byte now and then, beside people who predict: what these notice of it.

    python benchmarks/slow_clients.py --data hymenoptera.zip --weights FOLDER [--clients 500] [--per-second 20]

A third of the slow clients never end their headers, a third never end a picture's body, a third open a connection and
say nothing. In turns without and with them, predictions at random moments; then until the server has closed every slow
connection. Prints percentiles, and fails if a prediction failed or a slow connection is still open after two minutes.
"""

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx
import torch
from _serving import prepare, served, warm_up, write_pictures
from _setup import hardware, markdown

HEAD = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\n"
FIRST_WORDS = (HEAD, HEAD + b"Content-Type: image/jpeg\r\nContent-Length: 100000\r\n\r\n\xff\xd8\xff", b"")
NEXT_WORDS = (b"X-More: 1\r\n", b"\x00", b"")
PAUSE_SECONDS, LONGEST_SECONDS = 2.0, 120.0


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        write_pictures(arguments.data, folder / "pictures")
        prepare(folder / "data", "mobilenet_v3_small", arguments.weights, arguments.data)
        server = stack.enter_context(served("graft", ["-m", "app.main"], folder))
        warm_up(server, folder)
        pictures = [path.read_bytes() for path in (folder / "pictures").iterdir()]
        found = asyncio.run(_measured(server.port, pictures, arguments))
    print(markdown(["slow clients", "predictions", "failed", "p50, ms", "p99, ms"], found.rows))
    print(f"\nAll slow connections were closed after {found.closed_after:.0f} s. {hardware(torch.device('cpu'))}.")
    if found.failed or found.left:
        sys.exit(f"{found.failed} predictions failed, {found.left} slow connections were never closed")


class _Found:
    def __init__(self) -> None:
        self.rows: list[list[str]] = []
        self.failed = self.left = 0
        self.closed_after = 0.0

    def add(self, clients: int, latencies: list[float], failed: int) -> None:
        ordered = sorted(latencies)
        middle, last = statistics.median(ordered), ordered[int(0.99 * len(ordered))]
        self.rows.append([str(clients), str(len(ordered)), str(failed), f"{middle:.1f}", f"{last:.1f}"])
        self.failed += failed


async def _measured(port: int, pictures: list[bytes], arguments: argparse.Namespace) -> _Found:
    found = _Found()
    found.add(0, *await _predictions(port, pictures, arguments))
    start = time.monotonic()
    slow = [asyncio.create_task(_slow(port, kind=i % 3)) for i in range(arguments.clients)]
    await asyncio.sleep(1)
    found.add(arguments.clients, *await _predictions(port, pictures, arguments))
    closed, left = await asyncio.wait(slow, timeout=max(0.0, LONGEST_SECONDS - (time.monotonic() - start)))
    for task in closed:
        task.result()
    found.left, found.closed_after = len(left), time.monotonic() - start
    for task in left:
        task.cancel()
    return found


async def _slow(port: int, *, kind: int) -> None:
    """Until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(ConnectionError):
        writer.write(FIRST_WORDS[kind])
        while True:
            with contextlib.suppress(TimeoutError):
                while await asyncio.wait_for(reader.read(1000), PAUSE_SECONDS):
                    pass
                break
            writer.write(NEXT_WORDS[kind])
            await writer.drain()
    writer.close()


async def _predictions(port: int, pictures: list[bytes], arguments: argparse.Namespace) -> tuple[list[float], int]:
    """Milliseconds of each, and how many failed."""
    chance, latencies, failed = random.Random(0), [], 0
    async with (
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
        asyncio.TaskGroup() as all_,
    ):

        async def ask() -> None:
            nonlocal failed
            start = time.perf_counter()
            try:
                (await client.post("/predict", content=chance.choice(pictures))).raise_for_status()
                latencies.append(1000 * (time.perf_counter() - start))
            except httpx.HTTPError:
                failed += 1

        end = time.monotonic() + arguments.seconds
        while time.monotonic() < end:
            all_.create_task(ask())
            await asyncio.sleep(chance.expovariate(arguments.per_second))
    return latencies, failed


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Slow clients beside predictions.")
    parser.add_argument("--data", type=Path, required=True, help="zip of JPEGs")
    parser.add_argument("--weights", type=Path, required=True, help="folder of weight files")
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--per-second", type=float, default=20)
    parser.add_argument("--seconds", type=float, default=40)
    return parser.parse_args()


if __name__ == "__main__":
    main()
