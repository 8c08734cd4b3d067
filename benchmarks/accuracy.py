r"""Accuracy of each method on real data sets, over several seeds.

    python benchmarks/accuracy.py --data FOLDER_OF_ZIPS --weights FOLDER --results accuracy.jsonl \
        [--recipe classic,modern --compare]

Ingests each zip and trains in this process, through the functions that a worker's job uses. One JSON line is written
per run as it ends; runs that the results file has already are skipped, so it can be stopped and started again. Prints
a markdown table of what the file holds: mean ± standard deviation over seeds; macro-F1 too where the training classes
are of uneven size. --compare adds the paired difference of the recipes over equal seeds, with its standard error.
"""

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from _setup import METHODS, Ingested, classifier, fitted, ingested, markdown, measure, resolved

from app import registry
from app.db.engine import Database
from app.db.migrate import upgrade
from app.db.tables import DEFAULT_WORKSPACE, utc_now
from app.jobs import owner, queue
from app.jobs.request import Recipe
from app.jobs.spec import TrainingSpec
from app.jobs.states import JobKind
from app.settings import Settings
from app.storage import LocalStorage
from app.vision.device import resolve_device
from worker.reporter import Reporter
from worker.run_job import run_training
from worker.training import methods
from worker.wakeup import Wakeup

ALL_METHODS = (*METHODS, "few_shot", "auto")
# Largest training class over smallest, above which accuracy alone misleads.
UNEVEN = 3.0
_FIGURES = {"val_accuracy": "accuracy", "macro_f1": "macro-F1"}


def main() -> None:
    arguments = _arguments()
    device = resolve_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    zips = [path for path in sorted(arguments.data.glob("*.zip")) if not arguments.sets or path.stem in arguments.sets]
    # Seeds outermost: stopped half-way, every set, method and recipe has been run as often.
    runs = [
        {
            "set": path.stem,
            "method": method,
            "recipe": recipe,
            "backbone": arguments.backbone,
            "seed": seed,
            "hyperparameters": json.loads(arguments.hyperparameters),
        }
        for seed, path, method, recipe in itertools.product(arguments.seeds, zips, arguments.methods, arguments.recipe)
    ]
    with tempfile.TemporaryDirectory() as folder:
        storage = LocalStorage(Path(folder))

        def outcome_of(run: dict[str, Any]) -> dict[str, Any]:
            data = ingested(arguments.data / f"{run['set']}.zip", storage)
            return _run(run, data, weights_dir=arguments.weights, device=device)

        lines = measure(runs, outcome_of, arguments.results)
    print(table(lines))
    if arguments.compare:
        print(f"\n{comparison(lines)}")


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row per set, recipe and backbone, a column per method; macro-F1 too where training is uneven."""
    runs: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        overrides = json.dumps(line["hyperparameters"]) if line["hyperparameters"] else ""
        runs[line["set"], line["recipe"], line["backbone"], overrides][line["method"]].append(line)
    shown = [method for method in ALL_METHODS if any(method in by_method for by_method in runs.values())]
    rows = []
    for key, by_method in sorted(runs.items()):
        figures = ["val_accuracy"]
        if any(_is_uneven(run) for found in by_method.values() for run in found):
            figures.append("macro_f1")
        for figure in figures:
            rows.append([*key, _FIGURES[figure], *(_cell(by_method.get(method, []), figure) for method in shown)])
    machines = sorted({f"{line['machine']}, torch {line['torch']}, {line['threads']} threads" for line in lines})
    body = markdown(["set", "recipe", "backbone", "overrides", "figure", *shown], rows)
    return f"{body}\n\nOn validation images, mean ± standard deviation (n runs, median seconds). {'; '.join(machines)}."


def comparison(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: modern minus classic, per set and method, over the seeds that both were run with."""
    pairs: dict[tuple[str, str, str], dict[int, dict[str, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        if not line["hyperparameters"]:  # overridden runs are experiments, and no recipe
            pairs[line["set"], line["backbone"], line["method"]][line["seed"]][line["recipe"]] = line
    rows = []
    for key, by_seed in sorted(pairs.items()):
        both = [found for found in by_seed.values() if {"modern", "classic"} <= found.keys()]
        figures = ["val_accuracy", *(["macro_f1"] if any(_is_uneven(found["modern"]) for found in both) else [])]
        for figure in figures if both else ():
            differences = [found["modern"][figure] - found["classic"][figure] for found in both]
            mean = statistics.mean(differences)
            error = f"± {statistics.stdev(differences) / math.sqrt(len(both)):.3f}" if len(both) > 1 else ""
            rows.append([*key, _FIGURES[figure], f"{mean:+.3f} {error}".strip(), str(len(both))])
    body = markdown(["set", "backbone", "method", "figure", "modern - classic", "seeds"], rows)
    return f"{body}\n\nMean of the differences over equal seeds ± its standard error."


def _cell(runs: Sequence[dict[str, Any]], figure: str) -> str:
    if not runs:
        return ""
    values = [run[figure] for run in runs]
    deviation = statistics.stdev(values) if len(runs) > 1 else 0.0
    seconds = statistics.median(run["seconds"] for run in runs)
    return f"{statistics.mean(values):.3f} ± {deviation:.3f} (n = {len(runs)}, {seconds:.0f} s)"


def _is_uneven(run: dict[str, Any]) -> bool:
    return run.get("train_imbalance", 1.0) > UNEVEN


def _run(run: dict[str, Any], data: Ingested, *, weights_dir: Path, device: torch.device) -> dict[str, Any]:
    asked = {name: run[name] for name in ("method", "backbone", "recipe", "seed", "hyperparameters")}
    spec = resolved(data, **asked, device_type=device.type, weights_dir=weights_dir)
    if spec.candidates:
        return _run_job(spec, data, weights_dir=weights_dir, device=device)
    images = data.images(spec)
    start = time.perf_counter()
    training = methods.prepare(
        spec,
        classifier=classifier(spec, len(data.manifest.classes), weights_dir),
        manifest=data.manifest,
        images=images,
        device=device,
    )
    epochs = fitted(training)
    conclusion = methods.conclude(training, data.manifest)
    return {
        **conclusion.metrics,
        "seconds": time.perf_counter() - start,
        "epochs": len(epochs),
        "images_per_second": statistics.median(epoch.images_per_second for epoch in epochs),
        "train_accuracy": epochs[-1].train_accuracy,
        "chosen_method": spec.method,
        "precision": training.state.precision,
        "spec": spec.hyperparameters.model_dump(mode="json"),
        **_conditions(data, device),
    }


def _run_job(spec: TrainingSpec, data: Ingested, *, weights_dir: Path, device: torch.device) -> dict[str, Any]:
    """A job of method auto, by the worker's own story and on a database of its own. `seconds` end with its last model;
    `probe_seconds` with the first one that is served."""
    data.storage.delete(f"datasets/{data.name}/features")  # a first job finds none
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(data_dir=Path(folder), weights_dir=weights_dir, device=device.type, allow_downloads=False)
        upgrade(settings.resolved_database_url)
        database = Database(settings.resolved_database_url).within(DEFAULT_WORKSPACE)
        with database.write() as session:
            body = spec.model_dump(mode="json")
            queue.submit(session, kind=JobKind.training, dataset_id=data.name, spec=body, method="auto")
        with database.write() as session:
            claim = queue.claim_next(
                session, kind=JobKind.training, worker_id="benchmark", owner=owner.current_process()
            )
        assert claim is not None
        start, began = time.perf_counter(), utc_now()
        reporter = Reporter(database, claim, shutdown=Wakeup())
        run_training(claim, settings=settings, database=database, storage=data.storage, reporter=reporter)
        seconds = time.perf_counter() - start
        with database.read() as session:
            metrics = queue.find(session, claim.job_id).metrics
            probe = registry.find(session, str(registry.find_of_job(session, claim.job_id, role="probe")))
            probe_seconds = (probe.created_at - began).total_seconds()
        database.dispose()
    assert metrics is not None
    return {
        **metrics,
        "seconds": seconds,
        "probe_seconds": probe_seconds,
        "chosen_method": metrics["method"],
        "method": "auto",
        **_conditions(data, device),
    }


def _conditions(data: Ingested, device: torch.device) -> dict[str, Any]:
    """What a figure is read with: the data's unevenness, and the machine."""
    return {
        "train_imbalance": data.facts.imbalance("train"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": str(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


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
    parser.add_argument("--methods", type=_names(ALL_METHODS), default=list(METHODS), help="comma-separated")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--recipe", type=_names(get_args(Recipe)), default=["classic"], help="comma-separated")
    parser.add_argument("--compare", action="store_true", help="also modern minus classic, over equal seeds")
    parser.add_argument("--backbone", default="mobilenet_v3_small")
    parser.add_argument("--hyperparameters", default="{}", help="overrides, as JSON")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; default torch's own choice")
    arguments = parser.parse_args()
    if arguments.weights is None and "GRAFT_WEIGHTS_DIR" in os.environ:
        arguments.weights = Path(os.environ["GRAFT_WEIGHTS_DIR"])
    if arguments.weights is None:
        parser.error("--weights or GRAFT_WEIGHTS_DIR is needed")
    return arguments


if __name__ == "__main__":
    main()
