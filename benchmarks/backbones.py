r"""What a start is worth: the bundled backbone against random weights, training from nothing, and ImageNet's weights.

    python benchmarks/backbones.py --data FOLDER_OF_ZIPS --weights FOLDER --results backbones.jsonl \
        [--shots 5,10,20,all] [--seeds 0,1,2,3,4] [--sets hymenoptera,…] [--what probe,tuned,scratch,…] [--threads 1]

Each run takes so many training images of each class, another choice for each seed, and is measured on all validation
images. probe: the head alone, solved for (feature_extraction). tuned: full_fine_tuning. scratch: from_scratch, in twice
the epochs of tuned; and in the seconds that the probe, or tuning, takes with graft_small, measured just before it,
features included. Random is an untrained network's features. The probe after self_supervised reads a network that first
saw all training images of the set, not their labels, for two minutes at 96 pixels; two_trees has too few for that. A
JSON line is written per run, and runs that the file has are not made again.
"""

import argparse
import copy
import itertools
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _setup import Ingested, classifier, fitted, hardware, ingested, markdown, measure, resolved

from app.datasets.manifest import Manifest
from app.jobs.spec import DatasetFacts
from app.settings import Settings
from app.storage import LocalStorage
from app.vision.backbones import BACKBONES
from app.vision.classifier import Classifier
from app.vision.weights import WeightStore
from worker.training import methods, self_supervised
from worker.training.features import FeatureCache
from worker.training.methods import Surroundings

# Training from nothing is "scratch", so that nothing is tuned from random weights.
# Behind a network's name, where the head reads that alone; else it reads what it would in a job.
LAST_LAYER = ", last layer"
PRETRAINED = "probe after self_supervised"
STARTS = {
    "probe": (
        "random",
        "graft_small",
        "mobilenet_v3_small",
        f"random{LAST_LAYER}",
        f"graft_small{LAST_LAYER}",
    ),
    PRETRAINED: ("graft_small", "mobilenet_v3_small"),
    "tuned": ("graft_small", "mobilenet_v3_small"),
    "scratch": ("random",),
    "scratch in the probe's time": ("random",),
    "scratch in tuning's time": ("random",),
}
METHODS = {
    "probe": "feature_extraction",
    PRETRAINED: "feature_extraction",
    "tuned": "full_fine_tuning",
    "scratch": "from_scratch",
}
PRETRAINING_SECONDS, PRETRAINING_SIDE = 120.0, 96
# Training from nothing in the time of another method.
BUDGETS = {"scratch in the probe's time": "probe", "scratch in tuning's time": "tuned"}


def main() -> None:
    arguments = _arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    runs = [
        {"set": name, "shots": shots, "what": what, "start": start, "seed": seed}
        for seed, name, shots, what in itertools.product(
            arguments.seeds, arguments.sets, arguments.shots, arguments.what
        )
        for start in STARTS[what]
        if (what, name) != (PRETRAINED, "two_trees")
    ]
    with tempfile.TemporaryDirectory() as folder:
        storage = LocalStorage(Path(folder))

        @cache
        def pretrained(name: str, start: str, seed: int) -> Classifier:
            return _pretrained(ingested(arguments.data / f"{name}.zip", storage), start, seed, arguments.weights)

        def outcome_of(run: dict[str, Any]) -> dict[str, Any]:
            earlier = pretrained(run["set"], run["start"], run["seed"]) if run["what"] == PRETRAINED else None
            return _run(run, ingested(arguments.data / f"{run['set']}.zip", storage), arguments.weights, earlier)

        lines = measure(runs, outcome_of, arguments.results)
    print(table(lines))
    print(f"\nValidation accuracy, mean ± standard deviation (n). {hardware(torch.device('cpu'))}.")


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row per set and number of images, a column per way; at the end the means over sets."""
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        column = line["what"] if line["what"].startswith("scratch") else f"{line['what']}, {line['start']}"
        found[line["set"], str(line["shots"])][column].append(line["val_accuracy"])
        found["mean over sets", str(line["shots"])][column].append(line["val_accuracy"])
    columns = sorted({column for by_column in found.values() for column in by_column})
    rows = [
        [*key, *(_cell(by_column.get(column, []), is_mean=key[0] == "mean over sets") for column in columns)]
        for key, by_column in found.items()
    ]
    return markdown(["set", "images a class", *columns], rows)


def _cell(values: list[float], *, is_mean: bool) -> str:
    if not values:
        return "-"
    spread = "" if is_mean or len(values) == 1 else f" ± {statistics.stdev(values):.3f}"
    return f"{statistics.mean(values):.3f}{spread} ({len(values)})"


def _pretrained(data: Ingested, start: str, seed: int, weights_dir: Path) -> Classifier:
    """The start's network after self_supervised on all training images."""
    sizes = {"image_size": PRETRAINING_SIDE}
    spec = resolved(
        data, method="self_supervised", backbone=start, seed=seed, hyperparameters=sizes, weights_dir=weights_dir
    )
    spec = spec.model_copy(update={"budget_seconds": PRETRAINING_SECONDS})
    training = self_supervised.prepare(
        spec,
        classifier=classifier(spec, 0, weights_dir),
        manifest=data.manifest,
        images=data.images(spec),
        device=torch.device("cpu"),
    )
    fitted(training)
    self_supervised.conclude(training)
    return training.classifier


def _run(run: dict[str, Any], data: Ingested, weights_dir: Path, earlier: Classifier | None) -> dict[str, Any]:
    part = _part(data, run["shots"], run["seed"])
    if earlier is not None:
        return _trained(run, part, weights_dir, earlier=copy.deepcopy(earlier))
    if run["what"] not in BUDGETS:
        return _trained(run, part, weights_dir, keeps_features=True)
    _trained(run | {"what": "probe", "start": "graft_small"}, part, weights_dir)  # what a first run loads and warms up
    model = _trained(run | {"what": BUDGETS[run["what"]], "start": "graft_small"}, part, weights_dir)
    return _trained(run | {"what": "scratch"}, part, weights_dir, budget_seconds=model["seconds"])


def _trained(
    run: dict[str, Any],
    part: Ingested,
    weights_dir: Path,
    *,
    keeps_features: bool = False,
    budget_seconds: float | None = None,
    earlier: Classifier | None = None,
) -> dict[str, Any]:
    start, reads_last = run["start"].removesuffix(LAST_LAYER), run["start"].endswith(LAST_LAYER)
    backbone = "graft_small" if start == "random" else start
    spec = resolved(
        part,
        method=METHODS[run["what"]],
        backbone=backbone,
        seed=run["seed"],
        hyperparameters={"feature_layer": BACKBONES[backbone].stage_names[-1]} if reads_last else None,
        weights_dir=weights_dir,
    )
    if run["what"] == "scratch":
        tuned = resolved(part, method="full_fine_tuning", backbone=backbone, seed=run["seed"], weights_dir=weights_dir)
        values = spec.hyperparameters.model_copy(update={"epochs": 2 * tuned.hyperparameters.epochs})
        spec = spec.model_copy(update={"hyperparameters": values, "budget_seconds": budget_seconds})
    store = WeightStore.from_settings(Settings(weights_dir=weights_dir, allow_downloads=False))
    found = store.find(backbone)
    assert found is not None, backbone
    state_dict = None if start == "random" else store.load(found)
    started_at = time.perf_counter()
    training = methods.prepare(
        spec,
        classifier=methods.build_classifier(spec, len(part.manifest.classes), state_dict=state_dict, earlier=earlier),
        manifest=part.manifest,
        images=part.images(spec),
        device=torch.device("cpu"),
        # Features of all images are kept, whichever of them are trained on.
        surroundings=Surroundings(FeatureCache(part.storage, part.name, max_bytes=10**10) if keeps_features else None),
    )
    fitted(training)
    conclusion = methods.conclude(training, part.manifest, is_final=False)
    return {
        "val_accuracy": conclusion.metrics["val_accuracy"],
        "macro_f1": conclusion.metrics["macro_f1"],
        "seconds": round(time.perf_counter() - started_at, 1),
    }


def _part(data: Ingested, shots: str, seed: int) -> Ingested:
    """The data set with so many training images of each class; the others belong to no split that is used."""
    if shots == "all":
        return data
    random = np.random.default_rng(seed)
    train = data.manifest.indices("train")
    labels = data.manifest.labels[train]
    kept: set[int] = set()
    for label in range(len(data.manifest.classes)):
        kept |= set(random.permutation(train[labels == label])[: int(shots)].tolist())
    records = [
        replace(record, split="test") if record.split == "train" and i not in kept else record
        for i, record in enumerate(data.manifest.records)
    ]
    manifest = Manifest(data.manifest.classes, records)
    counts = zip(manifest.classes, manifest.counts("train"), manifest.counts("val"), strict=True)
    facts = DatasetFacts.from_counts([{"name": name, "train": int(t), "val": int(v)} for name, t, v in counts])
    return Ingested(data.name, manifest, facts, data.storage)


def _arguments() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description="What a start is worth.")
    parser.add_argument("--data", type=Path, required=True, help="folder of zips")
    parser.add_argument("--weights", type=Path, required=True, help="folder of weight files")
    parser.add_argument("--results", type=Path, required=True, help="file that runs are added to, a JSON line each")
    sets = ["hymenoptera", "sign_digits", "surface_defects", "tiny_longtail", "two_trees"]
    parser.add_argument("--sets", type=names, default=sets)
    parser.add_argument("--shots", type=names, default=["5", "10", "20", "all"])
    parser.add_argument("--what", type=names, default=list(STARTS))
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
