r"""From pictures to a classifier: seconds and accuracy of the tutorial, fastai and Graft, from equal weights.

    python benchmarks/time_to_result.py --data FOLDER_OF_ZIPS --weights FOLDER [--set hymenoptera] [--repeats 3] \
        [--full] [--fastai-python INTERPRETER] [--fastai-epochs 4] [--recipe modern] [--threads 0] [--json FILE]

- Tutorial: frozen network, 25 epochs of training and validation (see _tutorial.py). Two epochs are measured and their
  seconds taken 12.5 times; accuracy is measured only with --full, which trains all 25 and takes the best epoch's.
- fastai: `vision_learner(...).fine_tune(N)`, in a process of its own and without its imports (see _fastai.py); accuracy
  is the last epoch's. fastai puts its own head on the network. Left out where INTERPRETER cannot import it.
- Graft: a feature_extraction job from reading the weights to calibrated metrics, and its ingest (reading the zip,
  checking and decoding every picture), which is paid once per data set, beside it. Accuracy is the best epoch's.

The three take turns, once per repeat and seed; ratios are taken within a repeat. mobilenet_v3_small, on this device.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import torch
from _setup import classifier, extracted, fitted, hardware, ingested, markdown, resolved, spread
from _tutorial import Tutorial, best_workers
from safetensors.torch import load_file

from app.jobs.recipes import CLASSIC
from app.jobs.request import Recipe
from app.storage import LocalStorage
from app.vision.device import resolve_device
from worker.training import methods

BACKBONE = "mobilenet_v3_small"
EPOCHS = int(CLASSIC["epochs"])
MEASURED_EPOCHS = 2

# seconds, accuracy (None: not measured), and for Graft seconds of the ingest
Outcome = dict[str, Any]


def main() -> None:
    arguments = _arguments()
    device = resolve_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    archive = arguments.data / f"{arguments.set}.zip"
    why_not = _why_no_fastai(arguments.fastai_python)
    if why_not:
        print(f"fastai is left out: {why_not}", file=sys.stderr)
    outcomes: dict[str, list[Outcome]] = {"tutorial": [], "Graft": []} | ({} if why_not else {"fastai": []})
    with tempfile.TemporaryDirectory() as folder:
        pictures = extracted(archive, Path(folder))
        workers = _workers(pictures, device, arguments.weights)
        for repeat in range(arguments.repeats):
            for name, found in outcomes.items():
                if name == "tutorial":
                    outcome = _tutorial(pictures, workers, device, arguments, seed=repeat)
                elif name == "fastai":
                    outcome = _fastai(pictures, arguments, seed=repeat)
                else:
                    storage = LocalStorage(Path(folder) / f"graft{repeat}")
                    outcome = _graft(archive, storage, device, arguments, seed=repeat)
                found.append(outcome)
                print(json.dumps({"loop": name} | outcome), file=sys.stderr, flush=True)
    print(table(outcomes, fastai_epochs=arguments.fastai_epochs, is_full=arguments.full))
    print(
        f"\n{BACKBONE}, {arguments.set}, Graft's recipe {arguments.recipe}, tutorial with {workers} loader processes; "
        f"median (smallest to largest) of {arguments.repeats} repeats. {hardware(device)}."
    )
    if why_not:
        print(f"fastai was left out: {why_not}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"hardware": hardware(device)} | outcomes, indent=2), encoding="utf-8")


def table(outcomes: dict[str, list[Outcome]], *, fastai_epochs: int, is_full: bool) -> str:
    graft = outcomes["Graft"]
    ingest = f"ingest besides: {spread((one['ingest_seconds'] for one in graft), 1)} s"
    notes = {
        "tutorial": f"{EPOCHS} epochs" + ("" if is_full else f", extrapolated from {MEASURED_EPOCHS}"),
        "fastai": f"fine_tune({fastai_epochs})",
        "Graft": f"feature_extraction, {graft[0]['epochs']} epochs; {ingest}",
    }
    rows = []
    for name, found in outcomes.items():
        times = [one["seconds"] / other["seconds"] for one, other in zip(found, graft, strict=True)]
        with_ingest = [
            one["seconds"] / (other["seconds"] + other["ingest_seconds"])
            for one, other in zip(found, graft, strict=True)
        ]
        accuracies = [one["accuracy"] for one in found if one["accuracy"] is not None]
        rows.append(
            [
                name,
                notes[name],
                spread((one["seconds"] for one in found), 1),
                "" if name == "Graft" else f"×{spread(times)}",
                "" if name == "Graft" else f"×{spread(with_ingest)}",
                f"{statistics.mean(accuracies):.3f} ({min(accuracies):.3f}–{max(accuracies):.3f})"
                if accuracies
                else "",
            ]
        )
    header = ["loop", "what", "seconds", "over Graft's job", "over job and ingest", "accuracy, mean (range)"]
    return markdown(header, rows)


def _workers(pictures: Path, device: torch.device, weights: Path) -> int:
    return best_workers(lambda workers: _begin(pictures, workers, device, weights))[0]


def _begin(pictures: Path, workers: int, device: torch.device, weights: Path) -> Tutorial:
    return Tutorial.begin(
        pictures,
        backbone=BACKBONE,
        method="feature_extraction",
        workers=workers,
        device=device,
        state_dict=load_file(weights / f"{BACKBONE}.safetensors"),
    )


def _tutorial(
    pictures: Path, workers: int, device: torch.device, arguments: argparse.Namespace, *, seed: int
) -> Outcome:
    torch.manual_seed(seed)
    epochs = EPOCHS if arguments.full else MEASURED_EPOCHS
    start = time.perf_counter()
    tutorial = _begin(pictures, workers, device, arguments.weights)
    schedule = torch.optim.lr_scheduler.StepLR(tutorial.optimizer, CLASSIC["step_size"], CLASSIC["gamma"])
    before = time.perf_counter() - start
    accuracies = []
    start = time.perf_counter()
    for _ in range(epochs):
        tutorial.train_epoch()
        schedule.step()
        accuracies.append(tutorial.validate())
    seconds = before + (time.perf_counter() - start) * EPOCHS / epochs
    return {"seconds": seconds, "accuracy": max(accuracies) if arguments.full else None}


def _fastai(pictures: Path, arguments: argparse.Namespace, *, seed: int) -> Outcome:
    weights = arguments.weights / f"{BACKBONE}.safetensors"
    program = Path(__file__).parent / "_fastai.py"
    command = [arguments.fastai_python, program, pictures, weights, arguments.fastai_epochs, seed, arguments.threads]
    answer = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout
    outcome: Outcome = json.loads(answer.splitlines()[-1])
    return outcome


def _why_no_fastai(interpreter: str | None) -> str | None:
    """None where fastai can be run."""
    if interpreter is None:
        return "no --fastai-python was given."
    try:
        asked = subprocess.run([interpreter, "-c", "import fastai.vision.all"], capture_output=True, text=True)
    except OSError as error:
        return f"{interpreter}: {error.strerror}"
    return None if asked.returncode == 0 else asked.stderr.strip().splitlines()[-1]


def _graft(
    archive: Path, storage: LocalStorage, device: torch.device, arguments: argparse.Namespace, *, seed: int
) -> Outcome:
    start = time.perf_counter()
    data = ingested(archive, storage)
    spec = resolved(
        data,
        method="feature_extraction",
        backbone=BACKBONE,
        recipe=arguments.recipe,
        seed=seed,
        device_type=device.type,
        weights_dir=arguments.weights,
    )
    images = data.images(spec)
    between = time.perf_counter()
    training = methods.prepare(
        spec,
        classifier=classifier(spec, len(data.manifest.classes), arguments.weights),
        manifest=data.manifest,
        images=images,
        device=device,
    )
    epochs = len(fitted(training))
    conclusion = methods.conclude(training, data.manifest)
    return {
        "seconds": time.perf_counter() - between,
        "ingest_seconds": between - start,
        "accuracy": conclusion.metrics["val_accuracy"],
        "epochs": epochs,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of zips")
    parser.add_argument("--weights", type=Path, required=True, help=f"folder with {BACKBONE}.safetensors")
    parser.add_argument("--set", default="hymenoptera", help="name of a zip with train and val folders")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="train all of the tutorial's epochs")
    parser.add_argument("--fastai-python", help="an interpreter that has fastai")
    parser.add_argument("--fastai-epochs", type=int, default=4)
    parser.add_argument("--recipe", choices=get_args(Recipe), default="modern")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="torch's; 1 where others use the machine, too")
    parser.add_argument("--json", type=Path, help="file for every repeat's figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
