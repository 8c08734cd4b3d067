"""A class as a prototype, and a metric between them: the head of method few_shot, to which classes can be added.

Prototypical networks (Snell et al. 2017) on frozen features: a class is the mean of its images' features, and a picture
belongs to the nearest one. Knows features; the metric is found in worker/training/prototypes.py.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Prototypes:
    """means: float32 (C, D), zeros for a class without images. metric: float32 (D, D), symmetric, positive definite."""

    means: Tensor
    metric: Tensor

    def rows(self, means: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of a linear layer whose softmax compares distances to these means, or its own: weight (K, D), bias (K,)."""
        means = self.means if means is None else means
        weight = means @ self.metric
        return weight, -0.5 * (weight * means).sum(1)

    def logits(self, features: Tensor) -> Tensor:
        """features: float32 (N, D). Returns float32 (N, C)."""
        weight, bias = self.rows()
        return features @ weight.T + bias
