r"""What a person waits for, on a real server and worker: the first model, the best one, and a whole archive's answers.

    python benchmarks/first_answers.py --data hymenoptera.zip [--weights FOLDER] [--repeats 5]

Each repeat has a data folder, a server and a worker of its own. The archive is uploaded; once the data set is ready, a
job of `method: auto` is submitted, and /predict is asked again and again until it answers: that is the first model,
with the queue, the job's start and the registration in it. When the job has ended, the same archive goes to
/v1/batches. Prints medians (smallest to largest); the batch beside the ingest, which reads, checks and decodes the same
pictures.
"""

import argparse
import contextlib
import tempfile
import time
import zipfile
from collections import defaultdict
from pathlib import Path

import httpx
import torch
from _serving import served
from _setup import hardware, markdown, spread

from app.db.migrate import upgrade
from app.settings import Settings

LOOK_SECONDS = 0.02


def main() -> None:
    arguments = _arguments()
    with zipfile.ZipFile(arguments.data) as opened:
        picture = opened.read(next(name for name in opened.namelist() if name.lower().endswith((".jpg", ".png"))))
    found: dict[str, list[float]] = defaultdict(list)
    pictures = 0
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
            folder = Path(name)
            upgrade(Settings(data_dir=folder / "data").resolved_database_url)
            environment = {"GRAFT_WEIGHTS_DIR": str(arguments.weights or ""), "GRAFT_ALLOW_DOWNLOADS": "false"}
            server = stack.enter_context(served("graft", ["-m", "app.main"], folder, environment))
            stack.enter_context(served("worker", ["-m", "worker.main"], folder, environment))
            with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=120) as client:
                _wait_until_up(client)
                pictures = _measure(client, arguments.data, picture, found)
        print({name: round(values[-1], 2) for name, values in found.items()}, flush=True)
    found["pictures a second of the batch"] = [pictures / seconds for seconds in found["archive to all its answers"]]
    found["pictures a second of the ingest"] = [pictures / seconds for seconds in found["upload to ready"]]
    rows = [[name, spread(values, 1 if "second" in name else 2)] for name, values in found.items()]
    print(markdown(["from … to …, seconds", "median (smallest to largest)"], rows))
    print(
        f"\n{arguments.data.stem}, {pictures} pictures, {arguments.repeats} repeats. {hardware(torch.device('cpu'))}."
    )


def _wait_until_up(client: httpx.Client) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if client.get("/readyz").status_code == 200:
                time.sleep(15)  # until the worker and its waiting children have started, too
                return
        time.sleep(0.2)
    raise SystemExit("the server did not start")


def _measure(client: httpx.Client, archive: Path, picture: bytes, found: dict[str, list[float]]) -> int:
    """Adds what one repeat took, in seconds; returns how many pictures the archive has."""
    encoded = archive.read_bytes()
    start = time.perf_counter()
    dataset = client.put("/v1/datasets", params={"wait": 60}, content=encoded).raise_for_status().json()
    while dataset["status"] == "processing":
        dataset = client.get(f"/v1/datasets/{dataset['id']}", params={"wait": 60}).json()
    found["upload to ready"].append(time.perf_counter() - start)
    start = time.perf_counter()
    job = client.post("/v1/jobs", json={"dataset": dataset["id"], "budget_seconds": 120}).raise_for_status().json()
    while client.post("/predict", content=picture).status_code != 200:
        time.sleep(LOOK_SECONDS)
    found["ready to the first answer"].append(time.perf_counter() - start)
    while job["status"] in ("queued", "running"):
        job = client.get(f"/v1/jobs/{job['id']}", params={"wait": 60}).json()
    if job["status"] != "succeeded":
        raise SystemExit(f"the job did not succeed: {job}")
    found["ready to the best model"].append(time.perf_counter() - start)
    start = time.perf_counter()
    batch = client.put("/v1/batches", params={"wait": 60}, content=encoded).raise_for_status().json()
    while batch["status"] in ("queued", "running"):
        batch = client.get(f"/v1/batches/{batch['id']}", params={"wait": 60}).json()
    if batch["status"] != "succeeded":
        raise SystemExit(f"the batch did not succeed: {batch}")
    found["archive to all its answers"].append(time.perf_counter() - start)
    return int(dataset["num_images"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a person waits for, on a real server and worker.")
    parser.add_argument("--data", type=Path, required=True, help="zip of pictures")
    parser.add_argument("--weights", type=Path, help="folder of weight files")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
