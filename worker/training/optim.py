"""Parameter groups, optimiser, and the learning rate as a pure function of the step."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Schedule:
    """What the learning rate is at each step. warmup_epochs may be a fraction; step_size and gamma are for `step`."""

    scheduler: Literal["step", "cosine", "constant"]
    epochs: int
    steps_per_epoch: int
    warmup_epochs: float = 0.0
    step_size: int | None = None
    gamma: float | None = None

    def shortened(self, epochs: int) -> "Schedule":
        """The same course in other epochs."""
        share = epochs / self.epochs
        step_size = None if self.step_size is None else max(1, round(share * self.step_size))
        return replace(self, epochs=epochs, warmup_epochs=share * self.warmup_epochs, step_size=step_size)

    def learning_rate(self, peak: float, step: int) -> float:
        """The rate for optimiser step `step`, counted from 0 over the whole job."""
        warmup_steps = round(self.warmup_epochs * self.steps_per_epoch)
        if step < warmup_steps:
            return peak * (step + 1) / warmup_steps
        if self.scheduler == "cosine":
            total = self.epochs * self.steps_per_epoch
            progress = (step - warmup_steps) / max(1, total - warmup_steps)
            return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        if self.scheduler == "step":
            assert self.step_size is not None and self.gamma is not None
            rate = peak
            # Multiplied again and again, not by a power, so that it equals torch's StepLR to the last bit.
            for _ in range(step // self.steps_per_epoch // self.step_size):
                rate *= self.gamma
            return rate
        return peak


def build_optimizer(
    parts: Iterable[tuple[nn.Module, float]],
    *,
    optimizer: Literal["sgd", "adamw"],
    momentum: float | None,
    weight_decay: float,
    device_type: str,
) -> Optimizer:
    """parts: modules that share no parameter, each with its peak learning rate. Frozen parameters are left out.

    Under adamw, norms and biases do not decay; under sgd all do, as the textbook's does. Each group keeps its peak as
    `peak_learning_rate`, which set_learning_rates reads.
    """
    groups = []
    for module, rate in parts:
        plain, undecayed = _trainable(module)
        if optimizer == "sgd":
            plain, undecayed = plain + undecayed, []
        for parameters, decay in ((plain, weight_decay), (undecayed, 0.0)):
            if parameters:
                groups.append({"params": parameters, "lr": rate, "peak_learning_rate": rate, "weight_decay": decay})
    # One kernel for all parameters. On a GPU launching one per tensor would be most of a short step; on one CPU core
    # adamw's step was measured to take 5 ms instead of 30 for mobilenet_v3_small, and 21 instead of 97 for resnet18.
    fused = True if device_type in ("cpu", "cuda") else None
    if optimizer == "sgd":
        return SGD(groups, momentum=momentum or 0.0, fused=fused)
    return AdamW(groups, fused=fused)


def set_learning_rates(optimizer: Optimizer, schedule: Schedule, step: int, *, divisor: float = 1.0) -> None:
    """divisor: of all rates, throughout."""
    for group in optimizer.param_groups:
        group["lr"] = schedule.learning_rate(group["peak_learning_rate"] / divisor, step)


def _trainable(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(parameters that may decay, norms and biases), in module order."""
    plain: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.requires_grad:
                is_undecayed = isinstance(child, _NORMS) or name.endswith("bias") or parameter.ndim < 2
                (undecayed if is_undecayed else plain).append(parameter)
    return plain, undecayed


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by flat names: "0.momentum_buffer" is the first parameter's."""
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value
        for index, entry in state.items()
        for name, value in entry.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what optimizer_tensors gave. The optimiser must have been built alike."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            # In the parameter's own memory layout: fused kernels walk both by the same strides.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        elif name != "step" or optimizer.param_groups[0].get("fused"):
            value = value.to(parameter.device)
        optimizer.state[parameter][name] = value
