r"""Two tasks at once against one network each: accuracy of both heads, and what a prediction costs.

    python benchmarks/multi_task.py --data FOLDER_OF_ZIPS --weights FOLDER --results multi_task.jsonl \
        [--sets sign_digits,hymenoptera] [--methods feature_extraction,full_fine_tuning] [--seeds 0,1,2] [--threads 1]

The second thing that is told of each picture is by how many quarter turns it was turned, at random and the same for
all runs. Each seed trains the network of both tasks and its two single-task twins on the same pictures; the table has
the differences, paired by seed. A JSON line is written per run, and runs that the file has are not made again.
"""

import argparse
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from _setup import Ingested, fitted, hardware, ingested, markdown, measure, resolved
from numpy.typing import NDArray

from app.datasets.manifest import Manifest, Task
from app.jobs.spec import DatasetFacts, TrainingSpec
from app.settings import Settings
from app.storage import LocalStorage
from app.vision.classifier import Classifier
from app.vision.weights import WeightStore
from worker.training import methods
from worker.training.pixels import Images

BACKBONE = "mobilenet_v3_small"
TURNS = ["0", "90", "180", "270"]
Learns = Literal["class", "turn", "both"]
LEARNS: tuple[Learns, ...] = ("class", "turn", "both")


@dataclass(frozen=True)
class Turned:
    """Pictures, each turned by so many quarters."""

    images: Images
    turns: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> NDArray[np.uint8]:
        return np.ascontiguousarray(np.rot90(self.images[index], int(self.turns[index])))


def main() -> None:
    arguments = _arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    runs = [
        {"set": name, "method": method, "learns": learns, "seed": seed}
        for seed, name, method, learns in itertools.product(arguments.seeds, arguments.sets, arguments.methods, LEARNS)
    ]
    with tempfile.TemporaryDirectory() as folder:
        storage = LocalStorage(Path(folder))

        def outcome_of(run: dict[str, Any]) -> dict[str, Any]:
            return _run(run, ingested(arguments.data / f"{run['set']}.zip", storage), arguments.weights)

        lines = measure(runs, outcome_of, arguments.results)
    print(table(lines))
    print(f"\n{hardware(torch.device('cpu'))}.")


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row per set, method and task."""
    rows = []
    for name, method in dict.fromkeys((line["set"], line["method"]) for line in lines):
        of = {(line["learns"], line["seed"]): line for line in lines if (line["set"], line["method"]) == (name, method)}
        seeds = sorted({seed for _, seed in of if all((learns, seed) in of for learns in LEARNS)})
        if not seeds:
            continue
        for task in ("class", "turn"):
            alone = [of[task, seed]["accuracy"][task] for seed in seeds]
            both = [of["both", seed]["accuracy"][task] for seed in seeds]
            rows.append([name, method, task, _mean(alone), _mean(both), _difference(both, alone), str(len(seeds))])
        twins = statistics.median(
            of["class", seed]["milliseconds"] + of["turn", seed]["milliseconds"] for seed in seeds
        )
        own = statistics.median(of["both", seed]["milliseconds"] for seed in seeds)
        rows.append(
            [name, method, "ms a picture", f"{twins:.1f}", f"{own:.1f}", f"×{own / twins:.2f}", str(len(seeds))]
        )
    return markdown(["set", "method", "", "one network each", "both at once", "difference", "seeds"], rows)


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f}"


def _difference(ours: Sequence[float], theirs: Sequence[float]) -> str:
    paired = [a - b for a, b in zip(ours, theirs, strict=True)]
    error = statistics.stdev(paired) / math.sqrt(len(paired)) if len(paired) > 1 else math.nan
    return f"{statistics.mean(paired):+.3f} ± {error:.3f}"


def _run(run: dict[str, Any], data: Ingested, weights_dir: Path) -> dict[str, Any]:
    turns = np.random.default_rng(0).integers(0, len(TURNS), len(data.manifest.records))
    manifest = _manifest(data.manifest, turns, run["learns"])
    facts = DatasetFacts.from_counts(
        [
            {"name": name, "train": int(train), "val": int(val)}
            for name, train, val in zip(manifest.classes, manifest.counts("train"), manifest.counts("val"), strict=True)
        ]
    )
    part = Ingested(data.name, manifest, facts, data.storage)
    # Mirrored, a quarter turn becomes another one; so no run mirrors.
    spec = resolved(part, method=run["method"], backbone=BACKBONE, seed=run["seed"], weights_dir=weights_dir)
    spec = spec.model_copy(
        update={"hyperparameters": spec.hyperparameters.model_copy(update={"horizontal_flip": False})}
    )
    store = WeightStore.from_settings(Settings(weights_dir=weights_dir, allow_downloads=False))
    found = store.find(BACKBONE)
    assert found is not None, "no weights in this folder"
    training = methods.prepare(
        spec,
        classifier=methods.build_classifier(spec, sum(manifest.class_counts), state_dict=store.load(found)),
        manifest=manifest,
        images=Turned(part.images(spec), turns),
        device=torch.device("cpu"),
    )
    fitted(training)
    metrics = methods.conclude(training, manifest, is_final=False).metrics
    of_tasks = metrics.get("tasks", {run["learns"]: metrics})
    return {
        "accuracy": {task: figures["val_accuracy"] for task, figures in of_tasks.items()},
        "milliseconds": _milliseconds(training.classifier, spec),
    }


def _manifest(whole: Manifest, turns: NDArray[np.int64], learns: Learns) -> Manifest:
    labels = {
        "class": [(record.label,) for record in whole.records],
        "turn": [(int(turn),) for turn in turns],
        "both": [(record.label, int(turn)) for record, turn in zip(whole.records, turns, strict=True)],
    }[learns]
    tasks = [Task("class", whole.classes), Task("turn", TURNS)] if learns == "both" else []
    records = [
        replace(record, label=of[0], labels=of if tasks else ())
        for record, of in zip(whole.records, labels, strict=True)
    ]
    return Manifest(TURNS if learns == "turn" else whole.classes, records, tasks)


def _milliseconds(classifier: Classifier, spec: TrainingSpec) -> float:
    """Of one picture's forward pass: the median of twenty after three."""
    image = torch.zeros(1, 3, spec.preprocessing.crop, spec.preprocessing.crop)
    classifier.eval()
    found = []
    with torch.inference_mode():
        for _ in range(23):
            start = time.perf_counter()
            classifier(image)
            found.append(1000 * (time.perf_counter() - start))
    return statistics.median(found[3:])


def _arguments() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description="Two tasks at once against one network each.")
    parser.add_argument("--data", type=Path, required=True, help="folder of zips")
    parser.add_argument("--weights", type=Path, required=True, help="folder of weight files")
    parser.add_argument("--results", type=Path, required=True, help="file that runs are added to, a JSON line each")
    parser.add_argument("--sets", type=names, default=["hymenoptera", "sign_digits"])
    parser.add_argument("--methods", type=names, default=["feature_extraction", "full_fine_tuning"])
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
