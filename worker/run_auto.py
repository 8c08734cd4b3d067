"""The story of method auto: an instant probe that is served at once, then a heat for each method, then the best.

Each method's training has checkpoints of its own, and what was decided follows from what they hold: a job that is
killed anywhere goes on where it was.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from app.jobs.spec import TrainingSpec
from app.vision.classifier import Classifier
from app.vision.evaluate import Evaluation, wilson_interval
from worker.training import competition, methods
from worker.training.checkpoint import Checkpoints
from worker.training.competition import Contender, Dropped
from worker.training.methods import Conclusion, Training
from worker.workbench import Share, Workbench

_LATENCY_RUNS = 7
# How the job's progress is shared out between the probe and those that follow it.
_PROBE_SHARE = 0.1


@dataclass(frozen=True)
class Entry:
    """A method that was trained, and what came of it. training is as its best epoch left it."""

    spec: TrainingSpec
    training: Training
    conclusion: Conclusion
    contender: Contender


@dataclass(frozen=True)
class Outcome:
    """The winner, and the table and sentence that say why."""

    winner: Entry
    table: list[dict[str, Any]]
    reason: str


def compete(spec: TrainingSpec, workbench: Workbench, *, serve_probe: Callable[[Entry], None]) -> Outcome:
    """serve_probe: called with the first method's entry as soon as it is there. Raises what training raises."""
    reporter = workbench.reporter
    for reason in spec.reasons:
        reporter.log(reason)
    entries: list[Entry] = []
    dropped: list[Dropped] = []
    spent_seconds, epochs, steps = 0.0, 0, 0
    for place, candidate in enumerate(spec.candidates):
        share = _share(place, len(spec.candidates), epochs=epochs, steps=steps, method=candidate.method)
        leader = _leader(entries)
        left_seconds = None if spec.budget_seconds is None else spec.budget_seconds - spent_seconds
        if refusal := _refusal(leader, left_seconds, is_stopped=reporter.stop_requested):
            dropped.append(Dropped(candidate.method, refusal))
            reporter.log(f"{candidate.method} is left out: {refusal}.")
            continue
        # Time is shared out evenly; what a method leaves of its part goes to those after it.
        part_seconds = None if left_seconds is None else left_seconds / (len(spec.candidates) - place)
        checkpoints = workbench.checkpoints(candidate.method)
        entry, training = _enter(candidate, workbench, checkpoints, share, leader=leader, left_seconds=part_seconds)
        if entry is not None and leader is None:
            serve_probe(entry)
        spent_seconds += checkpoints.seconds
        epochs += training.state.epoch
        steps += training.state.total_steps
        if entry is None:
            best = max(training.state.val_accuracies, default=None)
            dropped.append(Dropped(candidate.method, "behind in its heat", best, seconds=checkpoints.seconds))
            reporter.log(f"{candidate.method} ends after its heat: it is behind {leader.method if leader else ''}.")
            continue
        entries.append(entry)
    contenders = [entry.contender for entry in entries]
    won = competition.winner(contenders)
    return Outcome(
        winner=next(entry for entry in entries if entry.contender is won),
        table=competition.table(contenders, dropped),
        reason=competition.reason(contenders, dropped),
    )


def _enter(
    candidate: TrainingSpec,
    workbench: Workbench,
    checkpoints: Checkpoints,
    share: Share,
    *,
    leader: Contender | None,
    left_seconds: float | None,
) -> tuple[Entry | None, Training]:
    """Trains one method, as far as it may go. Returns no entry for one that its heat ended."""
    found = checkpoints.newest(on_damaged=workbench.reporter.log)
    training = workbench.prepare(candidate, found, share)
    if left_seconds is not None:
        # Preparing took some of it already; the loop's own time goes on from where a checkpoint left it.
        left = max(left_seconds - checkpoints.seconds, 1e-3)
        trained = training.state.elapsed_seconds + training.state.epoch_seconds
        training.plan = replace(training.plan, budget_seconds=trained + left)

    def is_behind() -> bool:
        trained = training.state.val_accuracies
        return leader is not None and competition.is_behind(trained, leader, epochs=training.epochs)

    if not training.state.is_finished or training.solved is not None:
        workbench.fit(training, checkpoints, share, is_enough=is_behind)
    if is_behind():
        return None, training
    conclusion = methods.conclude(
        training, workbench.manifest, is_final=False, on_batch=lambda: workbench.reporter.progress("evaluate")
    )
    contender = _contender(candidate, training, conclusion, seconds=checkpoints.seconds)
    return Entry(candidate, training, conclusion, contender), training


def _contender(spec: TrainingSpec, training: Training, conclusion: Conclusion, *, seconds: float) -> Contender:
    # Of several tasks, all labels together.
    correct = np.concatenate([_correct(task.val) for task in conclusion.tasks if task.val is not None])
    metrics, classifier = conclusion.metrics, training.classifier
    return Contender(
        method=spec.method,
        correct=correct,
        accuracy_ci95=wilson_interval(int(correct.sum()), len(correct)),
        val_loss=metrics["val_loss"],
        macro_f1=metrics["macro_f1"],
        val_accuracies=tuple(training.state.val_accuracies),
        seconds=seconds,
        latency_seconds=_latency(classifier, spec.preprocessing.crop, training.state.device),
        size_bytes=sum(tensor.nbytes for tensor in classifier.state_dict().values()),
    )


def _correct(val: Evaluation) -> NDArray[np.bool_]:
    correct = np.ones(len(val.predicted), dtype=np.bool_)
    correct[[mistake.position for mistake in val.mistakes]] = False
    return correct


def _latency(classifier: Classifier, image_size: int, device: torch.device) -> float:
    """Seconds of one image's forward pass in full precision: the median of a few, after one to warm up."""
    image = torch.zeros(1, 3, image_size, image_size, device=device)
    classifier.eval()
    seconds = []
    with torch.inference_mode():
        for _ in range(_LATENCY_RUNS + 1):
            start = time.perf_counter()
            classifier(image).cpu()  # waits for the device
            seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[_LATENCY_RUNS // 2]


def _leader(entries: list[Entry]) -> Contender | None:
    return competition.winner([entry.contender for entry in entries]) if entries else None


def _refusal(leader: Contender | None, left_seconds: float | None, *, is_stopped: bool) -> str | None:
    """Why the next method is not even tried; the first one always is."""
    if leader is None:
        return None
    if is_stopped:
        return "the job was asked to stop"
    if left_seconds is not None and left_seconds <= 0:
        return "budget_seconds is spent"
    return competition.no_room(leader)


def _share(place: int, count: int, *, epochs: int, steps: int, method: str) -> Share:
    """Later methods train more, so each gets twice the share of the one before it."""
    if place == 0:
        return Share(0.0, _PROBE_SHARE, epochs, steps, method)
    weights = [math.pow(2, i) for i in range(count - 1)]
    size = (1 - _PROBE_SHARE) / sum(weights)
    return Share(_PROBE_SHARE + size * sum(weights[: place - 1]), size * weights[place - 1], epochs, steps, method)
