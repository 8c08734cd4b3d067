"""What is learnt of each image: one thing, or several at once (multi-task learning; Caruana 1997).

Several tasks share the backbone, and the head's outputs lie one task after the other: each has its own softmax over its
own classes. A label that is missing asks for nothing. Knows tensors of logits and labels; not networks.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from app.datasets.manifest import UNLABELLED, Manifest


@dataclass(frozen=True)
class Tasks:
    """class_counts: of each task. names: of each where there are several.

    Labels are int64, (N,) of one task and (N, T) of several, UNLABELLED where an image has none; targets are labels, or
    their mixtures as probabilities, float32 (N, C), C being all tasks' classes together.
    """

    class_counts: tuple[int, ...]
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        return cls(manifest.class_counts, tuple(task.name for task in manifest.tasks))

    @property
    def outputs(self) -> int:
        return sum(self.class_counts)

    @property
    def spans(self) -> list[slice]:
        """Each task's place among the outputs."""
        ends = torch.tensor(self.class_counts).cumsum(0).tolist()
        return [slice(end - count, end) for end, count in zip(ends, self.class_counts, strict=True)]

    def one_hot(self, labels: Tensor) -> Tensor:
        """int64 (N, C); zeros for what is missing."""
        if labels.ndim == 1:
            return functional.one_hot(labels, self.outputs)
        parts = [
            functional.one_hot(of_task.clamp(min=0), count) * (of_task != UNLABELLED).unsqueeze(1)
            for of_task, count in zip(labels.unbind(1), self.class_counts, strict=True)
        ]
        return torch.cat(parts, dim=1)

    def losses(
        self, logits: Tensor, targets: Tensor, *, weights: Tensor | None = None, label_smoothing: float = 0.0
    ) -> Tensor:
        """Cross-entropy of each image, summed over its tasks: float32 (N,). weights: float32 (C,), of each class."""
        if len(self.class_counts) == 1:
            return functional.cross_entropy(logits, targets, weights, reduction="none", label_smoothing=label_smoothing)
        total = logits.new_zeros(len(logits))
        for task, span in enumerate(self.spans):
            of_task = targets[:, task] if not targets.is_floating_point() else targets[:, span]
            total = total + _task_losses(
                logits[:, span], of_task, None if weights is None else weights[span], label_smoothing
            )
        return total

    def scale(self, targets: Tensor, weights: Tensor | None) -> Tensor | int:
        """What a batch's sum of losses is divided by: its images, or their weight as CrossEntropyLoss counts it.

        Of several tasks always its images, so that each task's share of the head learns as it would alone.
        """
        if weights is None or len(self.class_counts) > 1:
            return len(targets)
        return weights[targets].sum() if targets.ndim == 1 else (targets @ weights).sum()

    def mean_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Over images, without weights or smoothing."""
        return functional.cross_entropy(logits, labels) if labels.ndim == 1 else self.losses(logits, labels).mean()

    def right(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of each image, the share of its labels that the logits agree with: (N,)."""
        if labels.ndim == 1:
            return logits.argmax(1) == labels
        predicted = torch.stack([logits[:, span].argmax(1) for span in self.spans], dim=1)
        given = labels != UNLABELLED
        return ((predicted == labels) & given).sum(1) / given.sum(1)

    def accuracy(self, logits: Tensor, labels: Tensor) -> float:
        """The mean over images of what of each is right."""
        return self.right(logits, labels).double().mean().item()

    def accuracies(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """By name, of each of several tasks: over the images that have a label of it, where any has."""
        found = {}
        for task, name in enumerate(self.names):
            given = labels[:, task] != UNLABELLED
            if given.any():
                predicted = logits[given][:, self.spans[task]].argmax(1)
                found[name] = (predicted == labels[given, task]).double().mean().item()
        return found


def of_task(labels: NDArray[np.int64], task: int) -> NDArray[np.int64]:
    """One task's labels, (N,), of those that a split has."""
    return labels if labels.ndim == 1 else labels[:, task]


def _task_losses(logits: Tensor, targets: Tensor, weights: Tensor | None, label_smoothing: float) -> Tensor:
    if not targets.is_floating_point():
        return functional.cross_entropy(
            logits, targets, weights, reduction="none", label_smoothing=label_smoothing, ignore_index=UNLABELLED
        )
    # A mixture of an image with a label and one without has less than all of the probability, and counts as much less.
    given = targets.sum(1)
    whole = targets / given.clamp(min=1e-6).unsqueeze(1)
    losses = functional.cross_entropy(logits, whole, weights, reduction="none", label_smoothing=label_smoothing)
    return losses * given
