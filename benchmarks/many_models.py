r"""Memory and latency of one server with many models on one backbone, against the same server with one of them.

    python benchmarks/many_models.py --data hymenoptera.zip --weights FOLDER [--models 200] [--requests 400]

Feature-extraction models of ten classes on mobilenet_v3_small, each with a head and stored statistics of its own. One
server is asked for one model again and again, another for all of them in turn after each was loaded once. A request at
a time, the two taking turns. Prints the resident memory of each server's process, how much of it are mapped files,
which the system takes back where it needs room, and the median latency.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import torch
from _serving import Server, register, served, warm_up, write_pictures
from _setup import hardware, markdown, spread

from app import registry
from app.db.engine import Database
from app.db.migrate import upgrade
from app.db.tables import DEFAULT_WORKSPACE
from app.settings import Settings
from app.storage import LocalStorage
from app.vision.artifact import Artifact
from app.vision.backbones import BACKBONES
from app.vision.classifier import Classifier
from app.vision.reference import MAX_IMAGES, Reference
from app.vision.weights import WeightStore

CLASSES = [f"class {i}" for i in range(10)]
BACKBONE = "mobilenet_v3_small"
PARTS = 8


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        write_pictures(arguments.data, folder / "pictures")
        ids = _prepare(folder / "data", arguments.weights, arguments.models)
        # The engine is left at torch, so that building another one takes no part in the memory.
        environment = {"GRAFT_SERVING_ENGINE": "torch"}
        one = stack.enter_context(served("one", ["-m", "app.main"], folder, environment))
        many = stack.enter_context(served("many", ["-m", "app.main"], folder, environment))
        for server in (one, many):
            warm_up(server, folder)
        picture = (folder / "pictures" / "0.jpg").read_bytes()
        for model_id in ids:
            _asked(many, model_id, picture, 1)
        latencies: dict[str, list[float]] = {"one": [], "many": []}
        for part in range(PARTS):
            each = arguments.requests // PARTS
            latencies["one"] += _asked(one, ids[0], picture, each)
            for i in range(each):
                latencies["many"] += _asked(many, ids[(part * each + i) % len(ids)], picture, 1)
        rows = []
        for server, count in ((one, 1), (many, len(ids))):
            memory = psutil.Process(server.process.pid).memory_info()
            found = latencies[server.name]
            in_mib = [f"{size / 2**20:.0f}" for size in (memory.rss, memory.shared)]
            rows.append([str(count), *in_mib, spread(np.percentile(found, [25, 50, 75]).tolist(), 1)])
        ratio = statistics.median(latencies["many"]) / statistics.median(latencies["one"])
    print(markdown(["models", "resident, MiB", "of it mapped files", "p50 (p25 to p75), ms"], rows))
    print(f"\np50 of many over one: {ratio:.2f}. {hardware(torch.device('cpu'))}.")


def _prepare(data: Path, weights: Path, count: int) -> list[str]:
    settings = Settings(data_dir=data, weights_dir=weights)
    upgrade(settings.resolved_database_url)
    storage, database = LocalStorage(data), Database(settings.resolved_database_url).within(DEFAULT_WORKSPACE)
    store = WeightStore.from_settings(settings)
    found = store.find(BACKBONE)
    if found is None:
        raise SystemExit(f"no weights of {BACKBONE} in {weights}")
    state_dict = store.load(found)
    random = np.random.default_rng(0)
    ids = []
    for seed in range(count):
        classifier = Classifier.new(BACKBONE, len(CLASSES), seed=seed, state_dict=state_dict).eval()
        reference = Reference.fit(
            random.random((MAX_IMAGES, classifier.head.in_features)),
            np.arange(MAX_IMAGES) % len(CLASSES),
            [(f"img_{j}", f"{j}.jpg") for j in range(MAX_IMAGES)],
            held_out=random.random((20, classifier.head.in_features)),
            probability_of_true=[random.random(20)],
        )
        made = Artifact(classifier, CLASSES, BACKBONES[BACKBONE].preprocessing, reference=reference)
        ids.append(register(made, storage, database))
    with database.write() as session:
        registry.point_alias(session, registry.DEFAULT_ALIAS, ids[0])
    database.dispose()
    return ids


def _asked(server: Server, model_id: str, picture: bytes, count: int) -> list[float]:
    """Milliseconds of each of so many requests, one after the other."""
    found = []
    client = _CLIENTS.setdefault(
        server.port, httpx.Client(base_url=f"http://127.0.0.1:{server.port}", params={"top_k": 5}, timeout=60)
    )
    for _ in range(count):
        start = time.perf_counter()
        client.post("/predict", params={"model": model_id}, content=picture).raise_for_status()
        found.append(1000 * (time.perf_counter() - start))
    return found


_CLIENTS: dict[int, httpx.Client] = {}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One server with many models on one backbone.")
    parser.add_argument("--data", type=Path, required=True, help="zip of JPEGs")
    parser.add_argument("--weights", type=Path, required=True, help="folder of weight files")
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--requests", type=int, default=800)
    return parser.parse_args()


if __name__ == "__main__":
    main()
