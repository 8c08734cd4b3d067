r"""Few-shot: accuracy from 1, 5 and 10 images a class, and the time from a request to a model that serves.

    python benchmarks/few_shot.py --data FOLDER_OF_ZIPS --weights FOLDER [--episodes 100] [--sets hymenoptera,…]

An episode takes so many random training images of each class and is measured on all validation images; features are
computed once. The mean over episodes has a 95 % interval, of what the choice of images changes. Time: a real server and
worker on a data set of --timed images that is ready, the median of five jobs from POST to the answer of ?wait.
"""

import argparse
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from _setup import hardware, ingested, markdown, resolved, spread

from app.settings import Settings
from app.storage import LocalStorage
from app.supervisor import free_port
from app.vision.device import resolve_device
from app.vision.weights import WeightStore
from graft_client import Graft
from worker.training import methods
from worker.training.features import plain_features
from worker.training.prototypes import fit_prototypes

BACKBONES = ("mobilenet_v3_small", "graft_small")
TIMED_JOBS = 5
# Between two jobs, so that each finds a worker that waits, as a caller on a quiet server does.
PAUSE_SECONDS = 8.0


def main() -> None:
    arguments = _arguments()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        storage = LocalStorage(Path(folder))
        for name in arguments.sets:
            data = ingested(arguments.data / f"{name}.zip", storage)
            for backbone in BACKBONES:
                features = _features(data, backbone, arguments.weights)
                cells = [_episodes(features, data.manifest, shots, arguments.episodes) for shots in arguments.shots]
                rows.append([name, backbone, *cells])
                print(rows[-1], file=sys.stderr, flush=True)
    print(markdown(["set", "backbone", *(f"{shots} a class" for shots in arguments.shots)], rows))
    print(f"\nValidation accuracy, mean over {arguments.episodes} episodes ± 95 % interval.")
    seconds = _timed(arguments.data / f"{arguments.sets[0]}.zip", arguments.timed)
    print(f"\nFrom POST /v1/jobs to a prediction, {arguments.timed} images: {spread(seconds)} s, {TIMED_JOBS} jobs.")
    print(f"{hardware(torch.device('cpu'))}.")


def _features(data, backbone, weights_dir):  # type: ignore[no-untyped-def]
    spec = resolved(data, method="few_shot", backbone=backbone, weights_dir=weights_dir)
    store = WeightStore.from_settings(Settings(weights_dir=weights_dir, allow_downloads=False))
    classifier = methods.build_classifier(spec, len(data.manifest.classes), state_dict=store.load(store.find(backbone)))
    device = resolve_device("cpu")
    methods.place(classifier, device)
    classifier.freeze(0)
    found = plain_features(
        classifier,
        data.manifest,
        data.images(spec),
        preprocessing=spec.preprocessing,
        device=device,
        precision="fp32",
        cache=None,
    )
    return found.rows(0, np.arange(len(data.manifest.records)))


def _episodes(features, manifest, shots, episodes):  # type: ignore[no-untyped-def]
    train, val, labels = manifest.indices("train"), manifest.indices("val"), manifest.labels
    accuracies = []
    for episode in range(episodes):
        random = np.random.default_rng(episode)
        chosen = np.concatenate(
            [random.permutation(train[labels[train] == label])[:shots] for label in range(len(manifest.classes))]
        )
        prototypes = fit_prototypes(features[chosen], labels[chosen], len(manifest.classes), seed=episode)
        predicted = prototypes.logits(features[val]).argmax(1).numpy()
        accuracies.append(float((predicted == labels[val]).mean()))
    half = 1.96 * statistics.stdev(accuracies) / math.sqrt(episodes)
    return f"{statistics.mean(accuracies):.3f} ± {half:.3f}"


def _timed(archive: Path, count: int) -> list[float]:
    """Seconds of each job."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port("127.0.0.1")
        environment = {**os.environ, "GRAFT_DATA_DIR": folder, "GRAFT_ALLOW_DOWNLOADS": "false"}
        server = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "up", "--port", str(port)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with Graft(f"http://127.0.0.1:{port}") as graft:
                while not graft.is_alive():
                    time.sleep(0.2)
                small = Path(folder) / "small.zip"
                small.write_bytes(_first(archive, count))
                dataset = graft.datasets.upload(small)
                graft.datasets.wait(dataset.id)
                seconds = []
                for seed in range(TIMED_JOBS):
                    time.sleep(PAUSE_SECONDS)
                    start = time.perf_counter()
                    job = graft.jobs.create(dataset.id, method="few_shot", seed=seed)
                    while not graft.jobs.get(job.id).is_final:
                        time.sleep(0.02)
                    graft.predict([_picture(archive, folder)], model="default")
                    seconds.append(time.perf_counter() - start)
                return seconds
        finally:
            server.send_signal(signal.SIGINT)
            server.wait()


def _first(archive: Path, count: int) -> bytes:
    """The first pictures of each class of an archive with train folders, `count` in all."""
    made = BytesIO()
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(made, "w") as target:
        names = [name for name in source.namelist() if name.startswith("train/") and not name.endswith("/")]
        classes = sorted({name.split("/")[1] for name in names})
        for label in classes:
            for name in [name for name in names if name.split("/")[1] == label][: count // len(classes)]:
                target.writestr(name.removeprefix("train/"), source.read(name))
    return made.getvalue()


def _picture(archive: Path, folder: str) -> Path:
    path = Path(folder) / "new.jpg"
    if not path.exists():
        with zipfile.ZipFile(archive) as source:
            name = next(n for n in source.namelist() if n.startswith("val/") and n.lower().endswith("jpg"))
            path.write_bytes(source.read(name))
    return path


def _arguments() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description="Few-shot: accuracy, and time to a model that serves.")
    parser.add_argument("--data", type=Path, required=True, help="folder of zips")
    parser.add_argument("--weights", type=Path, required=True, help="folder of weight files")
    parser.add_argument(
        "--sets", type=names, default=["hymenoptera", "sign_digits", "surface_defects", "tiny_longtail"]
    )
    parser.add_argument("--shots", type=lambda text: [int(n) for n in text.split(",")], default=[1, 5, 10])
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--timed", type=int, default=50, help="images of the timed data set")
    return parser.parse_args()


if __name__ == "__main__":
    main()
