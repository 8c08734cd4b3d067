r"""How fast each method trains, against the loop that courses teach and against the arithmetic alone.

    python benchmarks/training_throughput.py --data FOLDER_OF_ZIPS [--models resnet18,mobilenet_v3_small] \
        [--methods full_fine_tuning,fine_tuning,feature_extraction,from_scratch] [--rounds 5] [--epochs 25] \
        [--recipe modern] [--device cpu] [--threads 1] [--workers 0,1,2,4,8] [--json throughput.json]

A round measures the tutorial, Graft and the limit one after the other, so that other work on the machine hits all
three alike; ratios are taken within a round, and their median is shown with the smallest and largest. Random weights.

- Tutorial: see _tutorial.py; it gets its best number of loader processes of --workers, measured first, and its own
  process, since the others run with the memory settings that the worker gives its children.
- Graft: `methods.prepare` and `loop.fit`, nothing replaced. full_fine_tuning and from_scratch: an epoch of training.
  fine_tuning and feature_extraction compute frozen stages as they see fit, so there a whole job counts, preparation and
  validation included, against the tutorial's epoch (training and validation) times --epochs: of --epochs epochs, or of
  a head that is solved for, as the recipe has it.
- Limit: the same network on batches that are in memory already; precision, memory format, optimiser, batches and, on
  cuda, recorded passes are Graft's. An epoch of Graft's stands against an epoch of steps, for fine_tuning from what the
  frozen stages gave; a job with a head that is solved for, against one pass through the network, and nothing for the
  head.

Waiting is the share of Graft's time in which training stood still for its next batch. CPU time, of all threads and
loader processes, says on a busy machine what the clock cannot; with --threads 1, for idle threads spin.
"""

import argparse
import gc
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_args

import torch
from _setup import (
    METHODS,
    Ingested,
    classifier,
    extracted,
    fitted,
    hardware,
    ingested,
    markdown,
    resolved,
    spread,
    synchronise,
)
from _tutorial import BATCH_SIZE, Tutorial, best_workers
from torch import Tensor
from torch.nn import functional

from app.allocator import keep_freed_memory
from app.jobs.request import Recipe
from app.jobs.spec import TrainingSpec
from app.storage import LocalStorage
from app.vision.device import pass_batch_size, resolve_device
from app.vision.preprocessing import normalise
from worker.training import loop, methods
from worker.training.features import ActivationSource
from worker.training.graphs import RECORD_AFTER, RecordedPasses
from worker.training.methods import Training
from worker.training.pixels import Batch, PixelSource, Source, Split, TrainingBatches, ordered_batches

# These may do their frozen stages once and for all, so only whole jobs compare.
WHOLE_JOB = ("feature_extraction", "fine_tuning")


@dataclass
class Measured:
    """Seconds per round: of an epoch of training, or of a whole job. images: how many are trained on in that time."""

    model: str
    method: str
    images: int
    epochs: int
    workers: int
    precision: str = ""
    tutorial: list[float] = field(default_factory=list)
    graft: list[float] = field(default_factory=list)
    graft_part: list[float] = field(default_factory=list)  # what stands against the limit
    limit: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    tutorial_cpu: list[float] = field(default_factory=list)
    graft_cpu: list[float] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        return self.__dict__ | {
            "times_tutorial": [t / g for t, g in zip(self.tutorial, self.graft, strict=True)],
            "times_tutorial_cpu": [t / g for t, g in zip(self.tutorial_cpu, self.graft_cpu, strict=True)],
            "share_of_limit": [c / g for c, g in zip(self.limit, self.graft_part, strict=True)],
            "waiting_share": [w / g for w, g in zip(self.waited, self.graft, strict=True)],
        }


def main() -> None:
    keep_freed_memory()  # this, and the next, as the worker's children do
    gc.freeze()
    arguments = _arguments()
    device = resolve_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(hardware(device), file=sys.stderr, flush=True)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        archive = arguments.data / f"{arguments.set}.zip"
        data = ingested(archive, LocalStorage(Path(folder) / "graft"))
        pictures = extracted(archive, Path(folder))
        for model in arguments.models:
            for method in arguments.methods:
                found.append(_measure(data, pictures, model=model, method=method, device=device, arguments=arguments))
                print(json.dumps(found[-1].record()), file=sys.stderr, flush=True)
    print(table(found))
    how = f"{arguments.set}, batch {BATCH_SIZE}, {arguments.recipe}"
    print(f"\n{how}; median (smallest to largest) of {arguments.rounds} rounds. {hardware(device)}.")
    if arguments.json:
        results = {"hardware": hardware(device), "results": [each.record() for each in found]}
        arguments.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


def table(found: list[Measured]) -> str:
    header = ["model", "method", "measured", "tutorial, images/s", "Graft, images/s", "Graft / tutorial"]
    header += ["by CPU time", "Graft / limit", "waiting", "precision", "loader processes"]
    rows = []
    for each in found:
        record = each.record()
        rows.append(
            [
                each.model,
                each.method,
                "job" if each.method in WHOLE_JOB else "epoch of training",
                f"{each.images / statistics.median(each.tutorial):.0f}",
                f"{each.images / statistics.median(each.graft):.0f}",
                f"×{spread(record['times_tutorial'])}",
                f"×{spread(record['times_tutorial_cpu'])}",
                spread(record["share_of_limit"]),
                spread(record["waiting_share"]),
                each.precision,
                str(each.workers),
            ]
        )
    return markdown(header, rows)


def _measure(
    data: Ingested, pictures: Path, *, model: str, method: str, device: torch.device, arguments: argparse.Namespace
) -> Measured:
    is_job = method in WHOLE_JOB
    spec = resolved(
        data,
        method=method,
        backbone=model,
        recipe=arguments.recipe,
        device_type=device.type,
        # Solved heads have neither.
        hyperparameters={}
        if method == "feature_extraction" and arguments.recipe == "modern"
        else {"epochs": arguments.epochs, "batch_size": BATCH_SIZE},
    )
    is_solved = spec.hyperparameters.is_solved
    tutorial = _TutorialProcess(pictures, arguments.workers, backbone=model, method=method, device=device)
    epochs = arguments.epochs if is_job else 1
    measured = Measured(model, method, images=data.facts.train * epochs, epochs=epochs, workers=tutorial.workers)
    # More epochs than any round asks for.
    training = _prepared(spec if is_solved else _endless(spec), data, device)
    job, epoch = _whole_job(spec, data, device), _epochs(training)
    limit = _Limit(spec, data, device, training.state.precision)
    graft = job if is_job else epoch
    graft_part, bound = (job, limit.forward) if is_solved else (epoch, limit.epoch)
    for action in {graft, graft_part, bound}:
        for _ in range(RECORD_AFTER + 2 if device.type == "cuda" and action is not job else 1):
            action()  # wakes threads and caches, and records what a GPU is given
    for _ in range(arguments.rounds):
        gc.collect()
        seconds, cpu_seconds = tutorial.epoch(with_validation=is_job)
        measured.tutorial.append(seconds * epochs)
        measured.tutorial_cpu.append(cpu_seconds * epochs)
        before = _cpu_seconds()
        with _waiting() as waited:
            measured.graft.append(graft())
        measured.graft_cpu.append(_cpu_seconds() - before)
        measured.waited.append(waited[0])
        measured.limit.append(bound())
        measured.graft_part.append(measured.graft[-1] if graft_part is graft else graft_part())
    tutorial.end()
    measured.precision = training.state.precision
    return measured


class _TutorialProcess:
    """The tutorial in a process with the memory settings that a user has."""

    def __init__(self, pictures: Path, counts: list[int], *, backbone: str, method: str, device: torch.device) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        options = {"backbone": backbone, "method": method, "device": device}
        self._process = context.Process(
            target=_run_tutorial, args=(theirs, pictures, torch.get_num_threads(), counts), kwargs=options
        )
        self._process.start()
        self.workers: int = self._ours.recv()

    def epoch(self, *, with_validation: bool) -> tuple[float, float]:
        """Seconds by the clock, and of CPU time."""
        self._ours.send(with_validation)
        seconds, cpu_seconds = self._ours.recv()
        return seconds, cpu_seconds

    def end(self) -> None:
        self._ours.send(None)
        self._process.join()


def _run_tutorial(
    theirs: Connection,
    pictures: Path,
    threads: int,
    counts: list[int],
    *,
    backbone: str,
    method: str,
    device: torch.device,
) -> None:
    torch.set_num_threads(threads)

    def begin(workers: int) -> Tutorial:
        return Tutorial.begin(pictures, backbone=backbone, method=method, workers=workers, device=device)

    workers, _ = best_workers(begin, counts=counts)
    tutorial = begin(workers)
    theirs.send(workers)
    while (with_validation := theirs.recv()) is not None:
        start, before = time.perf_counter(), _cpu_seconds()
        tutorial.train_epoch()
        if with_validation:
            tutorial.validate()
        theirs.send((time.perf_counter() - start, _cpu_seconds() - before))


def _endless(spec: TrainingSpec) -> TrainingSpec:
    return spec.model_copy(update={"hyperparameters": spec.hyperparameters.model_copy(update={"epochs": 10**6})})


def _prepared(spec: TrainingSpec, data: Ingested, device: torch.device, precision: Any = None) -> Training:
    return methods.prepare(
        spec,
        classifier=classifier(spec, len(data.manifest.classes), None),
        manifest=data.manifest,
        images=data.images(spec),
        device=device,
        precision=precision,
    )


def _epochs(training: Training) -> Callable[[], float]:
    """Each call trains one epoch more. Two validation images only: the tutorial's epoch is without them, too."""
    val = training.plan.val
    if isinstance(val, ActivationSource):
        few: Source = replace(val, labels=val.labels[:2], rows=val.rows[:2])
    else:
        split = training.val.split
        few = replace(training.val, split=Split(split.images, split.indices[:2], split.labels[:2]))
    running = loop.fit(training.state, replace(training.plan, val=few, early_stopping_patience=None))

    def epoch() -> float:
        start = time.perf_counter()
        next(running)  # reads the loss at its end, so it has waited for the device
        return time.perf_counter() - start

    return epoch


def _whole_job(spec: TrainingSpec, data: Ingested, device: torch.device) -> Callable[[], float]:
    def job() -> float:
        start = time.perf_counter()
        training = _prepared(spec, data, device)
        fitted(replace(training, plan=replace(training.plan, early_stopping_patience=None)))
        synchronise(device)
        return time.perf_counter() - start

    return job


class _Limit:
    """The arithmetic of a training and nothing else: every tensor is on the device before the clock runs."""

    def __init__(self, spec: TrainingSpec, data: Ingested, device: torch.device, precision: Any) -> None:
        self.training = _prepared(spec, data, device, precision)
        self._device = device
        self._passes = RecordedPasses(self._pass, self.training.state.network)
        manifest, val = data.manifest, self.training.val
        indices = manifest.indices("train")
        train = replace(val, split=Split(val.split.images, indices, manifest.labels[indices]))
        self._normalise = partial(normalise, preprocessing=spec.preprocessing)
        self._train = self._batches(train, self.training.plan.batch_size)
        self._all = [each for part in (train, val) for each in self._batches(part, pass_batch_size(device.type))]
        self._activations = [(self._frozen(images), labels) for images, labels in self._train]

    def epoch(self) -> float:
        """Seconds of the steps of an epoch, from what the frozen stages gave."""
        self.training.classifier.train()
        start = time.perf_counter()
        for activations, labels in self._activations:
            self._step(activations, labels)
        synchronise(self._device)
        return time.perf_counter() - start

    def forward(self) -> float:
        """Seconds of a pass of all images through the network, training and validation."""
        self.training.classifier.eval()
        start = time.perf_counter()
        with torch.inference_mode(), self._autocast():
            for images, _ in self._all:
                self.training.classifier(images)
        synchronise(self._device)
        return time.perf_counter() - start

    def _frozen(self, images: Tensor) -> Tensor:
        with self._autocast():
            return self.training.classifier.frozen_prefix(images)

    def _step(self, activations: Tensor, labels: Tensor) -> None:
        self._passes(activations, labels)
        self.training.state.optimizer.step()

    def _pass(self, activations: Tensor, labels: Tensor) -> tuple[Tensor]:
        with self._autocast():
            logits = self.training.classifier.trainable_suffix(activations)
        loss = functional.cross_entropy(logits.float(), labels)
        loss.backward()
        return (loss.detach(),)

    def _autocast(self) -> torch.autocast:
        is_bf16 = self.training.state.precision == "bf16"
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=is_bf16)

    def _batches(self, source: PixelSource, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        batches = ordered_batches(source, batch_size=batch_size)
        return [(self._normalise(batch.inputs.to(self._device)), batch.labels.to(self._device)) for batch in batches]


@contextmanager
def _waiting() -> Iterator[list[float]]:
    """Counts the seconds that the loop waits for its batches: the one place where it looks inside."""
    seconds = [0.0]
    rest_of = TrainingBatches.rest_of

    def counted(feed: TrainingBatches, epoch: int, first_step: int) -> Iterator[Batch]:
        batches = rest_of(feed, epoch, first_step)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            seconds[0] += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    TrainingBatches.rest_of = counted
    try:
        yield seconds
    finally:
        TrainingBatches.rest_of = rest_of


def _cpu_seconds() -> float:
    """Of this process with all its threads, and of loader processes that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _arguments() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of zips")
    parser.add_argument("--set", default="hymenoptera", help="name of a zip with train and val folders")
    parser.add_argument("--models", type=names, default=["resnet18", "mobilenet_v3_small"])
    parser.add_argument("--methods", type=names, default=list(METHODS))
    parser.add_argument("--workers", type=lambda text: [int(n) for n in text.split(",")], default=[0, 1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=25, help="of the whole jobs")
    parser.add_argument("--recipe", choices=get_args(Recipe), default="modern")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="torch's; 1 where others use the machine, too")
    parser.add_argument("--json", type=Path, help="file for every round's seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
