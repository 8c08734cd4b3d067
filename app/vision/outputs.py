"""What the numbers that a head gives mean: class names, and how sure a logit is. Knows tensors and names; not networks.

Of a model with several tasks the outputs lie one after the other, each with its own softmax and temperature.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Output:
    """One task's classes, in the order of their logits. name: "" of the only task. temperature: divides its logits."""

    name: str
    classes: Sequence[str]
    temperature: float


def probabilities(logits: Tensor, outputs: Sequence[Output]) -> Tensor:
    """Calibrated class probabilities: float32 (N, C) from logits (N, C); of each task they sum to 1."""
    parts = zip(of_outputs(logits.float(), outputs), outputs, strict=True)
    return torch.cat([part.div(output.temperature).softmax(1) for part, output in parts], dim=1)


def of_outputs(values: Tensor, outputs: Sequence[Output]) -> tuple[Tensor, ...]:
    """Columns of each output, from (N, C)."""
    return torch.split(values, [len(output.classes) for output in outputs], dim=1)
