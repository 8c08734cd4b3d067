"""Accuracy of each method on real data sets, over several seeds.

    python benchmarks/accuracy.py --data FOLDER_OF_ZIPS --weights FOLDER --results accuracy.jsonl [--recipe classic]

Ingests each zip and trains in this process, through the functions that a worker's job uses. One JSON line is written
per run as it ends; runs that the results file has already are skipped, so it can be stopped and started again. Prints
a markdown table of what the file holds: mean ± standard deviation over seeds.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from app.datasets.ingest import IngestLimits, IngestOptions, ensure_packed, ingest, manifest_key
from app.datasets.manifest import Manifest
from app.datasets.report import IngestReport
from app.jobs.spec import DatasetFacts, Method, Recipe, TrainingSpec, parse_request, resolve
from app.settings import Settings
from app.storage import LocalStorage
from app.vision.device import resolve_device
from app.vision.weights import WeightStore
from worker.training import loop, methods

METHODS: tuple[Method, ...] = get_args(Method)


def main() -> None:
    arguments = _arguments()
    settings = Settings(weights_dir=arguments.weights, device=arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    done = {_key(line) for line in _read(arguments.results)}
    zips = [path for path in sorted(arguments.data.glob("*.zip")) if not arguments.sets or path.stem in arguments.sets]
    with tempfile.TemporaryDirectory() as folder:
        storage = LocalStorage(Path(folder))
        # Seeds outermost: stopped half-way, every set and method has been run as often.
        for seed, path, method in itertools.product(arguments.seeds, zips, arguments.methods):
            run = {
                "set": path.stem,
                "method": method,
                "recipe": arguments.recipe,
                "backbone": arguments.backbone,
                "seed": seed,
                "hyperparameters": json.loads(arguments.hyperparameters),
            }
            if _key(run) in done:
                continue
            outcome = _run(run, path, settings=settings, storage=storage)
            with arguments.results.open("a", encoding="utf-8") as results:
                results.write(json.dumps(run | outcome) + "\n")
            print(
                f"{path.stem} {method} seed {seed}: {outcome['val_accuracy']:.4f} in {outcome['seconds']:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    print(table(_read(arguments.results)))


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row per set, recipe and backbone, a column per method."""
    runs: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        overrides = json.dumps(line["hyperparameters"]) if line["hyperparameters"] else ""
        runs[line["set"], line["recipe"], line["backbone"], overrides][line["method"]].append(line)
    shown = [method for method in METHODS if any(method in by_method for by_method in runs.values())]
    rows = [
        ["set", "recipe", "backbone", "overrides", *shown],
        ["---"] * (4 + len(shown)),
        *([*key, *(_cell(by_method.get(method, [])) for method in shown)] for key, by_method in sorted(runs.items())),
    ]
    machines = sorted({f"{line['machine']}, torch {line['torch']}, {line['threads']} threads" for line in lines})
    body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{body}\n\nValidation accuracy, mean ± standard deviation (n runs, median seconds). {'; '.join(machines)}."


def _cell(runs: Sequence[dict[str, Any]]) -> str:
    if not runs:
        return ""
    accuracies = [run["val_accuracy"] for run in runs]
    spread = statistics.stdev(accuracies) if len(runs) > 1 else 0.0
    seconds = statistics.median(run["seconds"] for run in runs)
    return f"{statistics.mean(accuracies):.3f} ± {spread:.3f} (n = {len(runs)}, {seconds:.0f} s)"


def _run(run: dict[str, Any], path: Path, *, settings: Settings, storage: LocalStorage) -> dict[str, Any]:
    manifest, facts = _ingested(path, settings=settings, storage=storage)
    store = WeightStore.from_settings(settings)
    found = store.find(run["backbone"])
    spec = _spec(run, facts, weights={run["backbone"]: found.weights.name} if found else {})
    images = ensure_packed(
        storage,
        path.stem,
        spec.preprocessing.side,
        limits=IngestLimits.from_settings(settings),
        tick=lambda _share: None,
    )
    start = time.perf_counter()
    state_dict = store.load(found) if found and spec.method != "from_scratch" else None
    classifier = methods.build_classifier(spec, len(manifest.classes), state_dict=state_dict)
    training = methods.prepare(
        spec, classifier=classifier, manifest=manifest, images=images, device=resolve_device(settings.device)
    )
    epochs = list(loop.fit(training.state, training.plan))
    conclusion = methods.conclude(training, manifest)
    return {
        **conclusion.metrics,
        "seconds": time.perf_counter() - start,
        "epochs": len(epochs),
        "images_per_second": statistics.median(epoch.images_per_second for epoch in epochs),
        "train_accuracy": epochs[-1].train_accuracy,
        "precision": training.state.precision,
        "spec": spec.hyperparameters.model_dump(mode="json"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": str(training.state.device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _spec(run: dict[str, Any], facts: DatasetFacts, *, weights: dict[str, str]) -> TrainingSpec:
    request = parse_request(
        {
            "dataset": "ds_benchmark",
            "method": run["method"],
            "backbone": run["backbone"],
            "recipe": run["recipe"],
            "seed": run["seed"],
            "hyperparameters": run["hyperparameters"],
        }
    )
    return resolve(request, dataset=facts, weights=weights, device_type="cpu")


def _ingested(path: Path, *, settings: Settings, storage: LocalStorage) -> tuple[Manifest, DatasetFacts]:
    """The data set of this zip, ingested once per process under the zip's name."""
    if not storage.exists(manifest_key(path.stem)):
        report: IngestReport = ingest(
            path,
            storage=storage,
            dataset_id=path.stem,
            options=IngestOptions(val_fraction=settings.val_fraction, seed=0),
            limits=IngestLimits.from_settings(settings),
            tick=lambda _share: None,
        )
        if report.error is not None:
            raise report.error
    manifest = Manifest.read(storage.path(manifest_key(path.stem)))
    counts = zip(manifest.classes, manifest.counts("train"), manifest.counts("val"), strict=True)
    facts = DatasetFacts.from_counts([{"name": name, "train": int(t), "val": int(v)} for name, t, v in counts])
    return manifest, facts


def _key(run: dict[str, Any]) -> str:
    names = ("set", "method", "recipe", "backbone", "seed", "hyperparameters")
    return json.dumps([run[name] for name in names], sort_keys=True)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _names(known: Iterable[str]) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}")
        return names

    return parse


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Accuracy of each method on real data sets, over several seeds.")
    parser.add_argument("--data", type=Path, required=True, help="folder of zips")
    parser.add_argument("--weights", type=Path, help="folder of weight files; default GRAFT_WEIGHTS_DIR")
    parser.add_argument("--results", type=Path, required=True, help="file that runs are added to, a JSON line each")
    parser.add_argument("--sets", type=lambda text: text.split(","), help="names of zips without .zip; default all")
    parser.add_argument("--methods", type=_names(METHODS), default=list(METHODS), help="comma-separated")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--recipe", choices=get_args(Recipe), default="classic")
    parser.add_argument("--backbone", default="mobilenet_v3_small")
    parser.add_argument("--hyperparameters", default="{}", help="overrides, as JSON")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; default torch's own choice")
    arguments = parser.parse_args()
    if arguments.weights is None and "GRAFT_WEIGHTS_DIR" in os.environ:
        arguments.weights = Path(os.environ["GRAFT_WEIGHTS_DIR"])
    return arguments


if __name__ == "__main__":
    main()
