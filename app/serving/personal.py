"""A model of one's own from a handful of pictures: a copy of the head learns them, and keeps what it answered before.

Training pictures are rehearsed beside the new ones, by the model's own answers (learning without forgetting, Li and
Hoiem 2017), so that what the new ones say is learnt and little else moves. Measured as a job's model is, on the same
validation pictures, and on the new ones by parts left out. Knows artifacts and features; not pictures, not HTTP.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from app.serving.adaptation import Head, tuned_head
from app.serving.extension import Derived
from app.vision import evaluate
from app.vision.artifact import Artifact
from app.vision.outputs import Output, of_outputs

# Of the loss, the new pictures' part; training pictures have the rest. With more the new ones are learnt by heart, at
# the cost of what was known: docs/adaptation.md.
NEW_SHARE = 0.1
# Training pictures that are rehearsed; more cost time as their square, and keep no more.
MOST_REHEARSED = 400
# Parts of the new pictures that are left out in turn; each picture is a part where there are fewer.
PARTS = 5
_STEPS, _LEARNING_RATE = 100, 10.0
# In place of a label that a picture has not got.
NO_LABEL = -1


@dataclass(frozen=True)
class Labelled:
    """features: float32 (N, D), what the head sees. labels: int64 (N, T), of each task. images: id and path of each,
    where they have."""

    features: Tensor
    labels: NDArray[np.int64]
    images: Sequence[tuple[str, str] | None] = ()

    def of(self, task: int) -> "_OfTask":
        given = np.flatnonzero(self.labels[:, task] != NO_LABEL).tolist()
        return _OfTask(self.features[given], self.labels[given, task], [self.images[i] for i in given if self.images])


@dataclass(frozen=True)
class _OfTask:
    """Those that have a label of one task: labels int64 (N,)."""

    features: Tensor
    labels: NDArray[np.int64]
    images: Sequence[tuple[str, str] | None]


@dataclass(frozen=True)
class _Learnt:
    """One task of the new model. found: None where validation has no label of it; is_right: of one's own pictures, by
    when they were asked; empty where the task has learnt nothing."""

    head: Head
    output: Output
    found: evaluate.Evaluation | None
    record: dict[str, Any]
    is_right: dict[str, Tensor]

    @property
    def metrics(self) -> dict[str, Any]:
        return {} if self.found is None else self.found.metrics("val") | {"temperature": self.output.temperature}


def personalise(parent: Artifact, mine: Labelled, validation: Labelled) -> Derived:
    """A copy of a model that knows one's own pictures too. What they have no label of it answers as before, to the bit.

    mine: one or more, of the model's classes; validation: what the model was validated on, one or more.
    """
    rehearsed = _rehearsed(parent, parent.classifier.head.in_features)
    weights = of_outputs(parent.classifier.head.weight.detach().T, parent.outputs)
    biases = of_outputs(parent.classifier.head.bias.detach().unsqueeze(0), parent.outputs)
    tasks = [
        _task(Head(weight, bias[0]), output, mine.of(place), validation.of(place), rehearsed)
        for place, (weight, bias, output) in enumerate(zip(weights, biases, parent.outputs, strict=True))
    ]
    classifier = copy.deepcopy(parent.classifier)
    with torch.no_grad():
        classifier.head.load_state_dict(
            {
                "weight": torch.cat([task.head.weight for task in tasks], dim=1).T,
                "bias": torch.cat([task.head.bias for task in tasks]),
            }
        )
    made = replace(
        parent,
        classifier=classifier.eval(),
        temperature=tasks[0].output.temperature,
        tasks=[task.output for task in tasks] if parent.tasks else (),
    )
    made.reference = parent.reference and parent.reference.extended(
        mine.features.numpy(),
        mine.labels,
        probability_of_true=[
            task.found.probability_of_true if task.found and task.is_right else None for task in tasks
        ],
    )
    metrics, record = _figures(tasks, images=len(mine.labels))
    return Derived(made, metrics, record)


def _figures(tasks: Sequence[_Learnt], *, images: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics and evaluation as a job's model has them: of several tasks the first one's, and those of all."""
    learnt = {task.output.name: task.is_right for task in tasks if task.is_right}
    metrics, record = tasks[0].metrics, dict(tasks[0].record)
    personal = _on_mine(list(learnt.values()), images)
    if len(tasks) > 1:
        metrics["tasks"] = {task.output.name: task.metrics for task in tasks}
        record["tasks"] = {task.output.name: task.record for task in tasks}
        personal["tasks"] = {name: _on_mine([is_right], len(is_right["now"])) for name, is_right in learnt.items()}
    return metrics | {"personal": personal}, record


def _task(head: Head, output: Output, mine: _OfTask, validation: _OfTask, rehearsed: Tensor) -> _Learnt:
    tuned = _learnt(head, mine, rehearsed, output) if len(mine.labels) else head
    found, record = None, {}
    if len(validation.labels):
        logits = tuned.logits(validation.features)
        if tuned is not head:
            output = replace(output, temperature=evaluate.fit_temperature(logits, validation.labels))
        found = evaluate.evaluate(logits, validation.labels, list(output.classes), temperature=output.temperature)
        record = evaluate.as_record(found, validation.images)
    is_right = {} if tuned is head else _is_right(head, tuned, mine, rehearsed, output)
    return _Learnt(tuned, output, found, record, is_right)


def _learnt(head: Head, mine: _OfTask, rehearsed: Tensor, output: Output) -> Head:
    """rehearsed: float32 (R, D), R >= 0."""
    wanted = functional.one_hot(torch.from_numpy(mine.labels), len(output.classes)).float()
    share = NEW_SHARE if len(rehearsed) else 1.0
    weights = [torch.full((len(mine.labels),), share / len(mine.labels))]
    if len(rehearsed):
        weights.append(torch.full((len(rehearsed),), (1 - share) / len(rehearsed)))
    examples = torch.cat([mine.features, rehearsed])
    targets = torch.cat([wanted, head.logits(rehearsed).softmax(1)])
    return tuned_head(head, examples, targets, torch.cat(weights), [output], steps=_STEPS, learning_rate=_LEARNING_RATE)


def _rehearsed(parent: Artifact, width: int) -> Tensor:
    """Training pictures as the head sees them: some, evenly over all that are stored; none of models without."""
    reference = parent.reference
    if reference is None or reference.lengths is None:
        return torch.zeros(0, width)
    count = len(reference.codes)
    places = np.linspace(0, count - 1, min(count, MOST_REHEARSED)).round().astype(np.int64)
    return torch.from_numpy(reference.raw(places.tolist()))


def _is_right(head: Head, tuned: Head, mine: _OfTask, rehearsed: Tensor, output: Output) -> dict[str, Tensor]:
    """Whether one's own pictures are: before, now, and left_out, each by a copy that has not seen it. bool (N,)."""
    truth, count = torch.from_numpy(mine.labels), len(mine.labels)
    found = {
        "before": head.logits(mine.features).argmax(1) == truth,
        "now": tuned.logits(mine.features).argmax(1) == truth,
    }
    if count > 1:
        logits = torch.empty(count, len(output.classes))
        parts = np.arange(count) % min(PARTS, count)
        for part in range(parts.max() + 1):
            others, these = np.flatnonzero(parts != part), np.flatnonzero(parts == part)
            without = _learnt(head, _OfTask(mine.features[others], mine.labels[others], ()), rehearsed, output)
            logits[these] = without.logits(mine.features[these])
        found["left_out"] = logits.argmax(1) == truth
    return found


def _on_mine(tasks: Sequence[Mapping[str, Tensor]], images: int) -> dict[str, Any]:
    """How many of one's own pictures are right; of several tasks, how many of their labels."""

    def accuracy(when: str) -> float | None:
        asked = [is_right[when] for is_right in tasks if when in is_right]
        return float(torch.cat(asked).float().mean()) if asked else None

    return {
        "images": images,
        "accuracy_before": accuracy("before"),
        "accuracy": accuracy("now"),
        "accuracy_left_out": accuracy("left_out"),
    }
