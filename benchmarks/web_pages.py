r"""How long the pages take on a server that holds much: first paint in a browser, of 100,000 pictures and 1,000 jobs.

    python benchmarks/web_pages.py [--images 100000] [--jobs 1000] [--visits 5]

Seeds a database and a storage of its own, starts the API on them, and visits each page anew with Chromium: a fresh
memory each time, but for the server's. Prints the browser's own first-contentful-paint (median, smallest to largest),
and the time until everything that the page asks for is there. Needs playwright and a Chromium, as the tests do.
"""

import argparse
import contextlib
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
import torch
from _serving import served
from _setup import hardware, markdown
from playwright.sync_api import Browser, sync_playwright
from sqlalchemy.orm import Session

from app.datasets.manifest import Manifest, Record
from app.datasets.packed import PackedWriter
from app.db.engine import Database
from app.db.migrate import upgrade
from app.db.tables import DatasetRow, EpochRow, JobRow, new_id
from app.storage import LocalStorage

CLASSES = 100
SIDE = 32  # of each picture; a page of thumbnails costs what it holds, not what all have
EPOCHS = 50
START_WITHIN_SECONDS = 90
PAINT = """() => new Promise(resolve => new PerformanceObserver(list => resolve(list.getEntries()[0].startTime))
    .observe({type: 'paint', buffered: true}))"""


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        dataset_id, job_id = _seed(folder / "data", images=arguments.images, jobs=arguments.jobs)
        chromium = shutil.which("chromium") or playwright.chromium.executable_path
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        pages = {
            "the start": "/",
            "data sets": "/datasets",
            "the data set": f"/datasets/{dataset_id}",
            "its pictures": f"/datasets/{dataset_id}/images",
            "jobs": "/jobs",
            "a job": f"/jobs/{job_id}",
            "a new job": f"/jobs/new?dataset={dataset_id}",
            "models": "/models",
        }
        with served("pages", ["-m", "app.main"], folder, {}) as server:
            url = f"http://127.0.0.1:{server.port}"
            _await(url)
            rows = []
            for title, address in pages.items():
                first, *later = [_visit(browser, url + address) for _ in range(arguments.visits + 1)]
                paints, wholes = zip(*later, strict=True)
                rows.append((title, f"{first[0]:.2f}", _told(paints), f"{first[1]:.2f}", _told(wholes)))
        browser.close()
    print(hardware(torch.device("cpu")))
    print(
        f"{arguments.images:,} pictures of {CLASSES} classes, {arguments.jobs:,} jobs; {arguments.visits} visits more"
    )
    header = ("page", "painted, first visit (s)", "later", "all there, first visit (s)", "later")
    print(markdown(header, rows))


def _visit(browser: Browser, address: str) -> tuple[float, float]:
    """Seconds to the first paint, and until the network is quiet (which takes half a second to know, taken off)."""
    page = browser.new_page()
    page.goto(address)
    paint = page.evaluate(PAINT) / 1000
    page.wait_for_load_state("networkidle")
    quiet = page.evaluate(
        "Math.max(...performance.getEntries().map(entry => entry.responseEnd ?? 0), performance.timing.domComplete "
        "- performance.timing.navigationStart)"
    )
    page.close()
    return paint, quiet / 1000


def _await(url: str) -> None:
    deadline = time.monotonic() + START_WITHIN_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        time.sleep(0.2)
    raise SystemExit("The server did not start.")


def _told(seconds: tuple[float, ...]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f}–{max(seconds):.2f})"


def _seed(folder: Path, *, images: int, jobs: int) -> tuple[str, str]:
    """Ids of the large data set, and of one of its jobs."""
    folder.mkdir(parents=True)
    url = f"sqlite:///{folder / 'graft.db'}"
    upgrade(url)
    database, storage = Database(url), LocalStorage(folder)
    dataset_id = new_id("ds")
    records = _pictures(storage, dataset_id, images)
    names = [f"class {label:03}" for label in range(CLASSES)]
    counts = [[0, 0] for _ in names]
    for record in records:
        counts[record.label][record.split == "val"] += 1
    classes = [{"name": n, "train": t, "val": v, "test": 0} for n, (t, v) in zip(names, counts, strict=True)]
    splits = {"train": sum(t for t, _ in counts), "val": sum(v for _, v in counts), "test": 0}
    suspects = {record.path: names[(record.label + 1) % CLASSES] for record in records[:100]}
    warning = {"code": "suspicious_labels", "detail": "100 pictures …", "paths": list(suspects), "suggested": suspects}
    with database.write() as session:
        session.add(
            DatasetRow(
                id=dataset_id, name="large", status="ready", size_bytes=10**9, sha256="0" * 64, options={},
                num_images=images, splits=splits, classes=classes, warnings=[warning],
            )
        )  # fmt: skip
        ids = [_job(session, dataset_id, number) for number in range(jobs)]
    database.dispose()
    return dataset_id, ids[-1]


def _pictures(storage: LocalStorage, dataset_id: str, count: int) -> list[Record]:
    records = [
        Record(
            image_id=f"img_{place:024x}", path=f"class {place % CLASSES:03}/{place:06}.jpg", label=place % CLASSES,
            split="val" if place // CLASSES % 5 == 0 else "train", digest=f"{place:064x}", width=SIDE, height=SIDE,
        )
        for place in range(count)
    ]  # fmt: skip
    random = np.random.default_rng(0)
    with storage.staging() as staged:
        staged.mkdir()
        Manifest([f"class {label:03}" for label in range(CLASSES)], records).write(staged / "manifest.jsonl")
        with PackedWriter(staged / "packed-256") as writer:
            for _ in records:
                writer.append(np.full((SIDE, SIDE, 3), random.integers(0, 256, 3), dtype=np.uint8))
            writer.finish(range(count))
        storage.publish(staged, f"datasets/{dataset_id}")
    return records


def _job(session: Session, dataset_id: str, number: int) -> str:
    job = JobRow(
        id=new_id("job"), kind="training", name=f"run {number}", status="succeeded", dataset_id=dataset_id,
        method="fine_tuning", backbone={"name": "resnet50", "weights": None}, spec={"seed": number},
        metrics={"val_accuracy": 0.9, "val_accuracy_ci95": [0.88, 0.92]},
    )  # fmt: skip
    session.add(job)
    session.flush()
    for epoch in range(1, EPOCHS + 1):
        loss, accuracy = 1 / epoch, 1 - 1 / (epoch + 1)
        session.add(
            EpochRow(
                job_id=job.id, epoch=epoch, train_loss=loss, train_accuracy=accuracy, val_loss=loss,
                val_accuracy=accuracy, learning_rate=0.1 / epoch, seconds=1.0,
            )
        )  # fmt: skip
    return job.id


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--visits", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
