r"""Peak memory of a training of each method, against what a dry run says.

    python benchmarks/peak_memory.py --data FOLDER_OF_ZIPS [--set hymenoptera] [--backbone mobilenet_v3_small] \
        [--epochs 2] [--recipe modern] [--repeats 1] [--device cpu]

Each training runs in a process of its own (see _job.py), with random weights. Its growth is its peak minus that of a
process that only imports; the dry run's figure is of the whole process, so the same is taken off it before they are
compared. Mapped is what of the memory are files, pictures above all, which the system takes back when it needs room.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import get_args

from _job import measured
from _setup import METHODS, hardware, ingested, markdown, resolved, spread

from app.jobs import estimate
from app.jobs.request import Recipe
from app.storage import LocalStorage
from app.vision.device import resolve_device

MEBIBYTE = 1024**2


def main() -> None:
    arguments = _arguments()
    device = resolve_device(arguments.device)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = ingested(arguments.data / f"{arguments.set}.zip", LocalStorage(Path(folder)))
        imports = measured(None, data, device=arguments.device)
        for method in arguments.methods:
            spec = resolved(
                data,
                method=method,
                backbone=arguments.backbone,
                recipe=arguments.recipe,
                device_type=device.type,
                hyperparameters={} if method == "few_shot" else {"epochs": arguments.epochs},
            )
            predicted = estimate.estimate(
                spec, dataset=data.facts, speed=estimate.measure(device), device_type=device.type
            ).peak_memory_bytes
            costs = [measured(spec, data, device=arguments.device) for _ in range(arguments.repeats)]
            growths = [cost.peak_bytes - imports.peak_bytes for cost in costs]
            room = predicted - imports.peak_bytes
            mapped = statistics.median(cost.mapped_bytes - imports.mapped_bytes for cost in costs)
            rows.append(
                [
                    method,
                    spread((cost.peak_bytes / MEBIBYTE for cost in costs), 0),
                    spread((growth / MEBIBYTE for growth in growths), 0),
                    f"{mapped / MEBIBYTE:.0f}",
                    f"{predicted / MEBIBYTE:.0f}",
                    spread(cost.peak_bytes / predicted for cost in costs),
                    spread(growth / room for growth in growths) if room > 0 else "dry run is below imports",
                ]
            )
    header = ["method", "peak, MiB", "growth, MiB", "of it mapped, MiB", "dry run, MiB", "peak / dry run"]
    print(markdown([*header, "growth / dry run's growth"], rows))
    print(
        f"\n{arguments.backbone}, {arguments.set}, {arguments.recipe}, {arguments.repeats} runs each; imports alone "
        f"{imports.peak_bytes / MEBIBYTE:.0f} MiB. {hardware(device)}."
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of zips")
    parser.add_argument("--set", default="hymenoptera")
    parser.add_argument("--backbone", default="mobilenet_v3_small")
    methods = [*METHODS, "few_shot", "self_supervised", "auto"]
    parser.add_argument("--methods", type=lambda text: text.split(","), default=methods)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--recipe", choices=get_args(Recipe), default="modern")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    main()
