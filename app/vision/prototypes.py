"""A class as a prototype, and a metric between them: the head of method few_shot, to which classes can be added.

Prototypical networks (Snell et al. 2017) on frozen features: a class is the mean of its images' features, and a picture
belongs to the nearest one. Knows features; the metric is found in worker/training/prototypes.py.
"""

import math
from dataclasses import dataclass

from torch import Tensor

# What a class that no image was seen of gets of what the others have in the mean: it is never the likeliest.
_UNSEEN = math.log(0.01)


@dataclass(frozen=True)
class Prototypes:
    """means: float32 (C, D), zeros for a class without images. metric: float32 (D, D), symmetric, positive definite."""

    means: Tensor
    metric: Tensor

    def rows(self, means: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of a linear layer whose softmax compares distances to these means, or its own: weight (K, D), bias (K,)."""
        means = self.means if means is None else means
        weight = means @ self.metric
        bias = -0.5 * (weight * means).sum(1)
        # The origin is no class, though where features are 0 in the mean it is nearer than any mean of a few images.
        seen = means.any(1)
        if seen.any():
            weight[~seen], bias[~seen] = weight[seen].mean(0), bias[seen].mean() + _UNSEEN
        return weight, bias

    def logits(self, features: Tensor) -> Tensor:
        """features: float32 (N, D). Returns float32 (N, C)."""
        weight, bias = self.rows()
        return features @ weight.T + bias
