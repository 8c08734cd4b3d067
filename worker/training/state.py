"""What a training changes and yields: its state, which can be saved and put back at any step, and each epoch's result.

Knows networks, optimisers and numbers; not batches, not the loop.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from worker.training.optim import load_optimizer_tensors, optimizer_tensors
from worker.training.precision import Precision

# Steps after which the moving average of the weights is moved. At each it took 5 % of resnet18's last stage, since it
# goes over all that is trained; one step in four tells as much. torchvision's reference training takes one in 32.
AVERAGED_STEPS = 4


@dataclass(frozen=True)
class Measured:
    """What validation found. accuracy: None where nothing is told apart; figures: further ones, by name."""

    loss: float
    accuracy: float | None
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EpochResult:
    """One epoch; losses and accuracies are means over images. learning_rate: the head's, at the epoch's last step."""

    epoch: int
    train_loss: float
    train_accuracy: float | None
    val_loss: float
    val_accuracy: float | None
    learning_rate: float
    seconds: float
    images_per_second: float
    is_best: bool
    best_epoch: int
    best_val_accuracy: float | None
    best_val_loss: float
    step: int  # optimiser steps done since the run began
    figures: dict[str, float] = field(default_factory=dict)  # further ones of the validation


@dataclass
class Best:
    """The best validation epoch so far, and a copy on the device of the weights that it had."""

    epoch: int
    val_accuracy: float | None
    val_loss: float
    weights: dict[str, Tensor]

    def is_beaten_by(self, val_accuracy: float | None, val_loss: float) -> bool:
        """By accuracy; among equals, by loss. Without accuracies, by whatever comes later."""
        if val_accuracy is None or self.val_accuracy is None:
            return True
        return (val_accuracy, -val_loss) > (self.val_accuracy, -self.val_loss)


@dataclass
class LoopState:
    """All that changes while training. epoch and step: done epochs, and done steps of the one after them."""

    network: nn.Module
    optimizer: Optimizer
    precision: Precision
    sums: Tensor  # (3,) on the device: loss times images, correct, images of the running epoch
    ema: dict[str, Tensor] | None = None
    ema_decay: float = 0.0
    epoch: int = 0
    step: int = 0
    total_steps: int = 0
    averaged_steps: int = 0  # of these, those that the average of the weights has been moved by
    micro_batches: int = 1
    epochs_without_gain: int = 0
    reached_accuracy: float = -1.0  # the last gain that chance does not explain; below all before the first epoch
    epoch_seconds: float = 0.0  # training time of the running epoch, over all attempts
    elapsed_seconds: float = 0.0  # of all done epochs, and of validating the start
    is_finished: bool = False
    val_accuracies: list[float] = field(default_factory=list)  # one per done epoch
    setbacks: int = 0  # how often it has diverged and gone back
    best: Best | None = None
    _start: dict[str, Tensor] = field(default_factory=dict)  # what training changes, on the CPU, before the first step
    _live: dict[str, Tensor] = field(default_factory=dict)
    _trained: nn.Parameter | None = None  # any one
    epochs: int | None = None  # fewer than planned, where budget_seconds has no room for all

    @classmethod
    def begin(cls, network: nn.Module, optimizer: Optimizer, *, precision: Precision, ema: float) -> "LoopState":
        """The state before the first step. The network has been frozen as it shall be, and stays on its device.

        ema: decay per step of the moving average of the weights; 0 for none.
        """
        network.train()
        device = next(network.parameters()).device
        weights = network.state_dict()
        live = {name: weights[name] for name in changing_tensors(network)}
        return cls(
            network=network,
            optimizer=optimizer,
            precision=precision,
            sums=torch.zeros(3, dtype=_sum_dtype(device), device=device),
            ema={name: tensor.clone() for name, tensor in live.items()} if ema > 0 else None,
            ema_decay=ema,
            _start=_on_cpu(live),
            _live=live,
            _trained=next(parameter for parameter in network.parameters() if parameter.requires_grad),
        )

    @property
    def device(self) -> torch.device:
        return self.sums.device

    @property
    def live(self) -> dict[str, Tensor]:
        """What training changes, by name, in the network's own memory.

        Kept, since collecting it anew takes 5 % of a step of fine_tuning; and collected anew where it is another's
        memory by now: a network that has been to another device and back has a new one.
        """
        assert self._trained is not None
        memory = self._trained.data_ptr()
        if all(tensor.data_ptr() != memory for tensor in self._live.values()):
            weights = self.network.state_dict()
            self._live = {name: weights[name] for name in self._live}
        return self._live

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the state, by name, on the CPU and contiguous."""
        named = {f"network.{name}": tensor for name, tensor in self.live.items()}
        named |= {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(self.optimizer).items()}
        named |= {f"ema.{name}": tensor for name, tensor in (self.ema or {}).items()}
        named |= {f"best.{name}": tensor for name, tensor in (self.best.weights if self.best else {}).items()}
        named["sums"] = self.sums
        return _on_cpu(named)

    def numbers(self) -> dict[str, Any]:
        """All numbers of the state, for JSON."""
        best = self.best
        return {
            "precision": self.precision,
            "epoch": self.epoch,
            "step": self.step,
            "total_steps": self.total_steps,
            "averaged_steps": self.averaged_steps,
            "micro_batches": self.micro_batches,
            "epochs_without_gain": self.epochs_without_gain,
            "reached_accuracy": self.reached_accuracy,
            "epoch_seconds": self.epoch_seconds,
            "elapsed_seconds": self.elapsed_seconds,
            "is_finished": self.is_finished,
            "epochs": self.epochs,
            "val_accuracies": list(self.val_accuracies),
            "setbacks": self.setbacks,
            "best": best and {"epoch": best.epoch, "val_accuracy": best.val_accuracy, "val_loss": best.val_loss},
        }

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Puts back what tensors() and numbers() gave, into a state that was begun alike."""
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "optimizer": {}, "ema": {}, "best": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            if name:
                parts[part][name] = tensor
        copy_into(self.live, parts["network"])
        load_optimizer_tensors(self.optimizer, parts["optimizer"])
        if self.ema is not None:
            copy_into(self.ema, parts["ema"])
        self.sums.copy_(tensors["sums"])
        plain = {name: value for name, value in numbers.items() if name != "best"}
        # Checkpoints of earlier versions do not say it.
        plain.setdefault("averaged_steps", plain["total_steps"] - plain["step"] % AVERAGED_STEPS)
        for name, value in plain.items():
            setattr(self, name, value)
        self.best = Best(**numbers["best"], weights=parts["best"]) if numbers["best"] else None

    def average(self) -> None:
        """Moves the average of the weights by the steps since it was moved, by what they have come to in the end."""
        steps = range(self.averaged_steps, self.total_steps)
        if self.ema is not None and steps:
            move_average(self.ema, self.live, decay=self.ema_decay, steps=steps)
        self.averaged_steps = self.total_steps

    @property
    def rate_divisor(self) -> float:
        """Of all learning rates: ten for each setback."""
        return 10.0**self.setbacks

    def go_back(self) -> int:
        """Begins the running epoch again, at a tenth of the rates: the first time with the best epoch's weights, then,
        as those may be what led here, with the start's. Returns which epoch's, 0 for the start.

        Both are at hand in every run of a job, and the same whenever it was noticed that training diverged: so what
        comes of it depends on no clock. The optimiser begins anew: it remembers gradients that are no numbers.
        """
        best = self.best if self.setbacks == 0 else None
        copy_into(self.live, best.weights if best else self._start)
        self.optimizer.state.clear()
        if self.ema is not None:
            copy_into(self.ema, self.live)
        self.sums.zero_()
        self.total_steps -= self.step
        self.averaged_steps = self.total_steps
        self.step = 0
        self.setbacks += 1
        return best.epoch if best else 0

    def keep_if_best(self, epoch: int, *, val_accuracy: float | None, val_loss: float) -> bool:
        """Keeps the network's weights as the best epoch's, if it beats the one before."""
        if self.best is not None and not self.best.is_beaten_by(val_accuracy, val_loss):
            return False
        kept = {name: tensor.clone() for name, tensor in self.live.items()}
        self.best = Best(epoch, val_accuracy, val_loss, kept)
        return True

    def finish_in_one(
        self, train: Measured, val: Measured, *, learning_rate: float, seconds: float, images: int
    ) -> EpochResult:
        """Ends a run whose weights are final without any step, as one epoch."""
        assert val.accuracy is not None
        self.keep_if_best(1, val_accuracy=val.accuracy, val_loss=val.loss)
        self.val_accuracies.append(val.accuracy)
        self.epoch, self.is_finished, self.elapsed_seconds = 1, True, seconds
        return EpochResult(
            epoch=1,
            train_loss=train.loss,
            train_accuracy=train.accuracy,
            val_loss=val.loss,
            val_accuracy=val.accuracy,
            learning_rate=learning_rate,
            seconds=seconds,
            images_per_second=images / max(seconds, 1e-9),
            is_best=True,
            best_epoch=1,
            best_val_accuracy=val.accuracy,
            best_val_loss=val.loss,
            step=0,
            figures=val.figures,
        )

    @property
    def outcome(self) -> dict[str, int]:
        """What is told of a run among its model's metrics."""
        assert self.best is not None
        return {"best_epoch": self.best.epoch} | ({"setbacks": self.setbacks} if self.setbacks else {})

    def load_best(self) -> None:
        """Makes the network what it was at its best validation epoch."""
        assert self.best is not None
        copy_into(self.live, self.best.weights)


def changing_tensors(network: nn.Module) -> tuple[str, ...]:
    """Names in the state dict that training changes: trainable parameters, and buffers of modules in training mode.

    The network is in training mode, with its frozen parts in eval mode: their batch-norm statistics do not move.
    """
    names = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    for prefix, module in network.named_modules():
        if module.training:
            names |= {f"{prefix}.{name}".lstrip(".") for name, _ in module.named_buffers(recurse=False)}
    return tuple(name for name in network.state_dict() if name in names)


@torch.no_grad()
def copy_into(live: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Over the live tensors of the same names, in their own memory."""
    torch._foreach_copy_([live[name] for name in tensors], list(tensors.values()))


@torch.no_grad()
def move_average(average: Mapping[str, Tensor], live: Mapping[str, Tensor], *, decay: float, steps: range) -> None:
    """Moves the average of weights to what they are after these steps; what is no floating point number is taken as it
    is."""
    # A young average follows faster, else it would hold on to the random start for 1 / (1 - decay) steps.
    kept = math.prod(min(decay, (1 + step) / (10 + step)) for step in steps)
    floating = [name for name, tensor in average.items() if tensor.is_floating_point()]
    # One kernel where there is one for lists: on a GPU launching one for each tensor would be part of a short step.
    torch._foreach_lerp_([average[name] for name in floating], [live[name] for name in floating], 1 - kept)
    if others := average.keys() - set(floating):
        torch._foreach_copy_([average[name] for name in others], [live[name] for name in others])


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
