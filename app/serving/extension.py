"""A few-shot model with one class more: a prototype from a few images, no training, and the model measured anew.

Knows artifacts and features; not pictures, not where models lie.
"""

import copy
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from app.vision import evaluate
from app.vision.artifact import Artifact, Support
from app.vision.evaluate import Evaluation
from app.vision.prototypes import Prototypes


@dataclass(frozen=True)
class Derived:
    """A model that was made from another one. artifact: to be saved; its classifier is a copy.

    metrics, evaluation: as a job's model has them, JSON.
    """

    artifact: Artifact
    metrics: dict[str, Any]
    evaluation: dict[str, Any]


def extend(parent: Artifact, support: Support, name: str, features: Tensor) -> Derived:
    """The model with the class `name` behind its own, whose rows stay as they are.

    features: float32 (N, D), N > 0, what the model's head sees of the new class's images.
    """
    classifier = copy.deepcopy(parent.classifier)
    old, count = classifier.head, len(features)
    weight, bias = Prototypes(features.mean(0, keepdim=True), support.metric).rows()
    with torch.no_grad():
        classifier.head = nn.Linear(old.in_features, old.out_features + 1)
        classifier.head.weight.copy_(torch.cat([old.weight, weight]))
        classifier.head.bias.copy_(torch.cat([old.bias, bias]))
    longer = Support(
        metric=support.metric,
        features=torch.cat([support.features, features]),
        labels=torch.cat([support.labels, torch.full((count,), old.out_features)]),
        is_shot=torch.cat([support.is_shot, torch.ones(count, dtype=torch.bool)]),
        images=[*support.images, *[None] * count],
    )
    artifact = replace(parent, classifier=classifier.eval(), classes=[*parent.classes, name], support=longer)
    found, metrics, evaluation = _measured(artifact, longer)
    artifact.reference = parent.reference and parent.reference.extended(
        features.numpy(),
        np.full((count, 1), old.out_features),
        probability_of_true=[found.probability_of_true],
    )
    return Derived(artifact, metrics, evaluation)


def _measured(artifact: Artifact, support: Support) -> tuple[Evaluation, dict[str, Any], dict[str, Any]]:
    """By the images that the first model was validated on, and by each shot with a prototype of the others."""
    logits, can_be_asked = _logits(artifact, support)
    asked = torch.nonzero(can_be_asked).flatten()
    found = evaluate.evaluate(
        logits[asked], support.labels[asked].numpy(), artifact.classes, temperature=artifact.temperature
    )
    metrics = found.metrics("val") | {
        "temperature": artifact.temperature,
        "left_out_one_by_one": int((support.is_shot & can_be_asked).sum()),
    }
    return found, metrics, evaluate.as_record(found, [support.images[i] for i in asked.tolist()])


def _logits(artifact: Artifact, support: Support) -> tuple[Tensor, Tensor]:
    """float32 (N, C), and bool (N,): a class's only shot leaves no prototype to ask it by."""
    head = artifact.classifier.head
    with torch.no_grad():
        logits: Tensor = head(support.features)
        can_be_asked = torch.ones(len(logits), dtype=torch.bool)
        shots = torch.nonzero(support.is_shot).flatten().tolist()
        sizes = Counter(int(support.labels[i]) for i in shots)
        for i in shots:
            label = int(support.labels[i])
            if sizes[label] == 1:
                can_be_asked[i] = False
                continue
            others = support.is_shot & (support.labels == label)
            others[i] = False
            alone = Prototypes(support.features[others].mean(0, keepdim=True), support.metric)
            logits[i, label] = alone.logits(support.features[i : i + 1])[0, 0]
    return logits, can_be_asked
