"""A model of one's own from a handful of pictures: a copy of the head learns them, and keeps what it answered before.

Training pictures are rehearsed beside the new ones, by the model's own answers (learning without forgetting, Li and
Hoiem 2017), so that what the new ones say is learnt and little else moves. Measured as a job's model is, on the same
validation pictures, and on the new ones by parts left out. Knows artifacts and features; not pictures, not HTTP.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from app.serving.adaptation import Head, tuned_head
from app.serving.extension import Derived
from app.vision import evaluate
from app.vision.artifact import Artifact
from app.vision.outputs import Output

# Of the loss, the new pictures' part; training pictures have the rest. With more the new ones are learnt by heart, at
# the cost of what was known: docs/adaptation.md.
NEW_SHARE = 0.1
# Training pictures that are rehearsed; more cost time as their square, and keep no more.
MOST_REHEARSED = 400
# Parts of the new pictures that are left out in turn; each picture is a part where there are fewer.
PARTS = 5
_STEPS, _LEARNING_RATE = 100, 10.0


@dataclass(frozen=True)
class Labelled:
    """features: float32 (N, D), what the head sees. labels: int64 (N,). images: id and path of each where they have."""

    features: Tensor
    labels: NDArray[np.int64]
    images: Sequence[tuple[str, str] | None] = ()


def personalise(parent: Artifact, mine: Labelled, validation: Labelled) -> Derived:
    """A copy of a model of one task that knows one's own pictures too.

    mine: one or more, of the model's classes; validation: what the model was validated on, one or more.
    """
    classifier = copy.deepcopy(parent.classifier)
    head = Head(parent.classifier.head.weight.detach().T, parent.classifier.head.bias.detach())
    rehearsed = _rehearsed(parent, head.weight.shape[0])
    outputs = parent.outputs
    tuned = _learnt(head, mine, rehearsed, outputs)
    with torch.no_grad():
        classifier.head.load_state_dict({"weight": tuned.weight.T, "bias": tuned.bias})
    logits = tuned.logits(validation.features)
    temperature = evaluate.fit_temperature(logits, validation.labels)
    found = evaluate.evaluate(logits, validation.labels, parent.classes, temperature=temperature)
    metrics = found.metrics("val") | {
        "temperature": temperature,
        "personal": _on_mine(head, tuned, mine, rehearsed, outputs),
    }
    made = replace(parent, classifier=classifier.eval(), temperature=temperature)
    made.reference = parent.reference and parent.reference.extended(
        mine.features.numpy(),
        mine.labels.reshape(-1, 1),
        probability_of_true=[found.probability_of_true],
    )
    return Derived(made, metrics, evaluate.as_record(found, validation.images))


def _learnt(head: Head, mine: Labelled, rehearsed: Tensor, outputs: Sequence[Output]) -> Head:
    """rehearsed: float32 (R, D), R >= 0."""
    classes = head.weight.shape[1]
    wanted = functional.one_hot(torch.from_numpy(mine.labels), classes).float()
    share = NEW_SHARE if len(rehearsed) else 1.0
    weights = [torch.full((len(mine.labels),), share / len(mine.labels))]
    if len(rehearsed):
        weights.append(torch.full((len(rehearsed),), (1 - share) / len(rehearsed)))
    examples = torch.cat([mine.features, rehearsed])
    targets = torch.cat([wanted, head.logits(rehearsed).softmax(1)])
    return tuned_head(head, examples, targets, torch.cat(weights), outputs, steps=_STEPS, learning_rate=_LEARNING_RATE)


def _rehearsed(parent: Artifact, width: int) -> Tensor:
    """Training pictures as the head sees them: some, evenly over all that are stored; none of models without."""
    reference = parent.reference
    if reference is None or reference.lengths is None:
        return torch.zeros(0, width)
    count = len(reference.codes)
    places = np.linspace(0, count - 1, min(count, MOST_REHEARSED)).round().astype(np.int64)
    return torch.from_numpy(reference.raw(places.tolist()))


def _on_mine(
    head: Head, tuned: Head, mine: Labelled, rehearsed: Tensor, outputs: Sequence[Output]
) -> dict[str, int | float | None]:
    """How many of one's own pictures are right: before, now, and each by a copy that has not seen it."""
    truth, count = torch.from_numpy(mine.labels), len(mine.labels)

    def accuracy(logits: Tensor) -> float:
        return float((logits.argmax(1) == truth).float().mean())

    left_out = None
    if count > 1:
        logits = torch.empty(count, head.weight.shape[1])
        parts = np.arange(count) % min(PARTS, count)
        for part in range(parts.max() + 1):
            others, these = np.flatnonzero(parts != part), np.flatnonzero(parts == part)
            without = _learnt(head, Labelled(mine.features[others], mine.labels[others]), rehearsed, outputs)
            logits[these] = without.logits(mine.features[these])
        left_out = accuracy(logits)
    return {
        "images": count,
        "accuracy_before": accuracy(head.logits(mine.features)),
        "accuracy": accuracy(tuned.logits(mine.features)),
        "accuracy_left_out": left_out,
    }
