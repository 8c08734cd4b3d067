"""What several of these programs need: a zip ingested, a request resolved, a job run, the machine described.

Knows the public seams of app and worker; not what is measured.
"""

import json
import os
import platform
import statistics
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torchvision.models
from torch import Tensor, nn

from app.datasets.ingest import IngestLimits, IngestOptions, ensure_packed, ingest, manifest_key
from app.datasets.manifest import Manifest
from app.datasets.packed import PackedPixels
from app.datasets.report import IngestReport
from app.jobs.request import parse_request
from app.jobs.spec import DatasetFacts, TrainingSpec, resolve
from app.settings import Settings
from app.storage import LocalStorage
from app.vision import backbones
from app.vision.classifier import Classifier
from app.vision.weights import WeightStore
from worker.training import loop, methods
from worker.training.methods import Training
from worker.training.state import EpochResult

# Those that docs/benchmarks.md compares: of labelled pictures, with the textbook's recipe too.
METHODS = ("feature_extraction", "fine_tuning", "full_fine_tuning", "from_scratch")


@dataclass(frozen=True)
class Ingested:
    """A data set as a job finds it, stored under the zip's name."""

    name: str
    manifest: Manifest
    facts: DatasetFacts
    storage: LocalStorage

    def images(self, spec: TrainingSpec) -> PackedPixels:
        return ensure_packed(self.storage, self.name, spec.preprocessing.side, tick=lambda _share: None)


def ingested(archive: Path, storage: LocalStorage) -> Ingested:
    """The data set of this zip, ingested once per storage."""
    settings = Settings()
    if not storage.exists(manifest_key(archive.stem)):
        report: IngestReport = ingest(
            archive,
            storage=storage,
            dataset_id=archive.stem,
            options=IngestOptions(val_fraction=settings.val_fraction, seed=0),
            limits=IngestLimits.from_settings(settings),
            tick=lambda _share: None,
        )
        if report.error is not None:
            raise report.error
    return opened(archive.stem, storage)


def opened(name: str, storage: LocalStorage) -> Ingested:
    """A data set that was ingested before, maybe by another process."""
    manifest = Manifest.read(storage.path(manifest_key(name)))
    counts = zip(manifest.classes, manifest.counts("train"), manifest.counts("val"), strict=True)
    facts = DatasetFacts.from_counts([{"name": name, "train": int(t), "val": int(v)} for name, t, v in counts])
    return Ingested(name, manifest, facts, storage)


def resolved(
    data: Ingested,
    *,
    method: str,
    backbone: str,
    recipe: str = "modern",
    seed: int = 0,
    hyperparameters: dict[str, Any] | None = None,
    device_type: str = "cpu",
    weights_dir: Path | None = None,
) -> TrainingSpec:
    """The spec of a job. weights_dir: None pretends that the backbone's first weights are at hand: see `classifier`."""
    request = parse_request(
        {
            "dataset": "ds_benchmark",
            "method": method,
            "backbone": backbone,
            "recipe": recipe,
            "seed": seed,
            "hyperparameters": hyperparameters or {},
        }
    )
    network = backbones.find(backbone)
    found = WeightStore.from_settings(Settings(weights_dir=weights_dir)).find(network.name) if weights_dir else None
    weights = found.weights if found else network.weights[-1]
    return resolve(request, dataset=data.facts, weights={network.name: weights.name}, device_type=device_type)


def classifier(spec: TrainingSpec, class_count: int, weights_dir: Path | None) -> Classifier:
    """The network before training. weights_dir: None for random weights, which take as long as pretrained ones.

    Raises SystemExit where the folder has no weights of this backbone.
    """
    if spec.method == "from_scratch":
        return methods.build_classifier(spec, class_count)
    if weights_dir is None:
        state = {name: tensor.clone() for name, tensor in _random_weights(spec.backbone.name).items()}
        return methods.build_classifier(spec, class_count, state_dict=state)
    store = WeightStore.from_settings(Settings(weights_dir=weights_dir))
    found = store.find(spec.backbone.name)
    if found is None:
        raise SystemExit(f"no weights of {spec.backbone.name} in {weights_dir}")
    return methods.build_classifier(spec, class_count, state_dict=store.load(found))


@lru_cache(maxsize=1)  # drawing them takes longer than reading pretrained ones from a file
def _random_weights(backbone: str) -> dict[str, Tensor]:
    architecture = backbones.find(backbone).architecture
    network: nn.Module = torchvision.models.get_model(architecture, weights=None)
    return network.state_dict()


def fitted(training: Training) -> list[EpochResult]:
    """The training run to its end; a head that was solved for has its one epoch already."""
    return [training.solved] if training.solved else list(loop.fit(training.state, training.plan))


def extracted(archive: Path, folder: Path) -> Path:
    """The zip's files in folder/<its name>, for loops that read an ImageFolder."""
    target = folder / archive.stem
    with zipfile.ZipFile(archive) as opened_archive:
        opened_archive.extractall(target)
    return target


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was asked, so that a clock read next is right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def hardware(device: torch.device) -> str:
    """One line: what the figures were measured on."""
    card = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return (
        f"{_processor()}, {os.cpu_count()} cores{card}, torch {torch.__version__} with {torch.get_num_threads()} "
        f"threads, device {device}, Python {platform.python_version()}"
    )


def measure(
    runs: Iterable[dict[str, Any]], outcome_of: Callable[[dict[str, Any]], dict[str, Any]], results: Path
) -> list[dict[str, Any]]:
    """Measures those of the runs that the file of results has not yet, each written down at once: a JSON line.

    runs: what is to be measured, by name; outcome_of: what comes of one. Returns all that the file has then.
    """
    lines = [json.loads(line) for line in results.read_text("utf-8").splitlines()] if results.exists() else []
    for run in runs:
        if any(all(line[name] == value for name, value in run.items()) for line in lines):
            continue
        lines.append(run | outcome_of(run))
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
    return lines


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Median, and in brackets smallest and largest."""
    found = sorted(values)
    shown = (f"{value:.{digits}f}" for value in (statistics.median(found), found[0], found[-1]))
    return "{} ({}–{})".format(*shown)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
