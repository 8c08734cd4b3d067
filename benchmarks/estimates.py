r"""Claim: a dry run's seconds and peak memory are within a factor of 1.5 of what the job then takes.

    python benchmarks/estimates.py --data FOLDER_OF_ZIPS [--only 0,3] [--device cpu] [--json estimates.json]

Ten jobs, one after the other, each in a process of its own (see _job.py) with random weights, which take as long as
pretrained ones. The dry run is that of a server which never ran a job of the kind; it measures the device just before
the first job, as a server does at the first request. Both sides use as many threads as torch chooses. Exits with 1 if
the claim does not hold.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from _job import measured
from _setup import hardware, ingested, markdown, resolved, spread

from app.jobs import estimate
from app.storage import LocalStorage
from app.vision.device import resolve_device

MEBIBYTE = 1024**2
LIMIT = 1.5


class Case(NamedTuple):
    set: str
    method: str
    backbone: str
    epochs: int
    recipe: str = "modern"


# Methods x networks x sizes of data sets; epochs so that each takes seconds to half a minute on two cores.
CASES = (
    Case("two_trees", "feature_extraction", "mobilenet_v3_small", 20),
    Case("two_trees", "full_fine_tuning", "mobilenet_v2", 5),
    Case("two_trees", "from_scratch", "resnet18", 5, "classic"),
    Case("hymenoptera", "feature_extraction", "mobilenet_v3_small", 15),
    Case("hymenoptera", "feature_extraction", "resnet18", 3, "classic"),
    Case("hymenoptera", "fine_tuning", "mobilenet_v3_small", 6),
    Case("hymenoptera", "full_fine_tuning", "mobilenet_v3_small", 4, "classic"),
    Case("hymenoptera", "fine_tuning", "squeezenet1_1", 2),
    Case("surface_defects", "feature_extraction", "mobilenet_v2", 1),
    Case("tiny_longtail", "full_fine_tuning", "mobilenet_v3_small", 1),
)


def main() -> None:
    arguments = _arguments()
    device = resolve_device(arguments.device)
    speed = estimate.measure(device)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        storage = LocalStorage(Path(folder))
        for case in (CASES[index] for index in arguments.only):
            data = ingested(arguments.data / f"{case.set}.zip", storage)
            spec = resolved(
                data,
                method=case.method,
                backbone=case.backbone,
                recipe=case.recipe,
                device_type=device.type,
                hyperparameters={"epochs": case.epochs},
            )
            predicted = estimate.estimate(spec, dataset=data.facts, speed=speed, device_type=device.type)
            data.images(spec)  # an ingest has packed them
            cost = measured(spec, data, device=arguments.device)
            record = case._asdict() | {
                "predicted_seconds": predicted.seconds,
                "seconds": cost.seconds,
                "predicted_bytes": predicted.peak_memory_bytes,
                "bytes": cost.peak_bytes,
            }
            records.append(record)
            print(json.dumps(record), file=sys.stderr, flush=True)
    print(table(records))
    seconds, memory = (_ratios(records, name) for name in ("seconds", "bytes"))
    holds = all(1 / LIMIT <= ratio <= LIMIT for ratio in (*seconds, *memory))
    print(f"\ndry run / truth: seconds {spread(seconds)}, memory {spread(memory)}; {hardware(device)}")
    print(f"{len(records)} jobs, all within {LIMIT}: {'yes' if holds else 'no'}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"hardware": hardware(device), "jobs": records}, indent=2))
    sys.exit(0 if holds else 1)


def table(records: list[dict[str, Any]]) -> str:
    header = ["job", "seconds", "dry run", "ratio", "peak, MiB", "dry run", "ratio"]
    rows = []
    ratios = zip(records, _ratios(records, "seconds"), _ratios(records, "bytes"), strict=True)
    for record, seconds, memory in ratios:
        rows.append(
            [
                "{set}, {method}, {backbone}, {epochs} epochs, {recipe}".format(**record),
                f"{record['seconds']:.1f}",
                f"{record['predicted_seconds']:.1f}",
                _marked(seconds),
                f"{record['bytes'] / MEBIBYTE:.0f}",
                f"{record['predicted_bytes'] / MEBIBYTE:.0f}",
                _marked(memory),
            ]
        )
    return markdown(header, rows)


def _ratios(records: list[dict[str, Any]], name: str) -> list[float]:
    return [record[f"predicted_{name}"] / record[name] for record in records]


def _marked(ratio: float) -> str:
    return f"{ratio:.2f}" if 1 / LIMIT <= ratio <= LIMIT else f"**{ratio:.2f}**"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of zips")
    parser.add_argument(
        "--only",
        type=lambda text: [int(index) for index in text.split(",")],
        default=list(range(len(CASES))),
        help="places in CASES, from 0",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
