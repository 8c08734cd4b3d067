"""The learning rate against torch's own schedulers, and what decays."""

import math

import pytest
import torch
from torch import nn

from worker.training.optim import Schedule, build_optimizer, set_learning_rates


def test_the_step_schedule_equals_torchs_steplr_to_the_last_bit() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.001)
    theirs = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    ours = Schedule("step", epochs=25, steps_per_epoch=8, step_size=7, gamma=0.1)
    for epoch in range(25):
        for step in range(8):
            assert ours.learning_rate(0.001, epoch * 8 + step) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        theirs.step()


def test_the_cosine_falls_from_the_peak_to_nearly_nothing() -> None:
    schedule = Schedule("cosine", epochs=10, steps_per_epoch=10)
    rates = [schedule.learning_rate(0.5, step) for step in range(100)]
    assert rates[0] == 0.5
    assert rates[50] == pytest.approx(0.25)
    assert rates[99] == pytest.approx(0.25 * (1 + math.cos(math.pi * 0.99)))
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("scheduler", ["cosine", "constant", "step"])
def test_the_warmup_rises_linearly_to_the_peak(scheduler: str) -> None:
    schedule = Schedule(
        scheduler,  # type: ignore[arg-type]
        epochs=10,
        steps_per_epoch=4,
        warmup_epochs=1.5,
        step_size=7,
        gamma=0.1,
    )
    assert [schedule.learning_rate(6.0, step) for step in range(7)] == [1, 2, 3, 4, 5, 6, 6]


def _network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


def test_adamw_decays_no_norms_and_no_biases() -> None:
    network = _network()
    optimizer = build_optimizer(
        [(network, 0.1)], optimizer="adamw", momentum=None, weight_decay=0.05, device_type="cpu"
    )
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    assert decayed == {id(network[0].weight), id(network[2].weight)}  # type: ignore[index]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6


def test_sgd_decays_everything_as_the_textbook_does() -> None:
    optimizer = build_optimizer(
        [(_network(), 0.1)], optimizer="sgd", momentum=0.9, weight_decay=0.05, device_type="cpu"
    )
    assert [(group["weight_decay"], group["momentum"], len(group["params"])) for group in optimizer.param_groups] == [
        (0.05, 0.9, 6)
    ]


def test_frozen_parameters_are_left_out_and_each_part_keeps_its_rate() -> None:
    network = _network()
    network[0].requires_grad_(False)  # type: ignore[index]
    optimizer = build_optimizer(
        [(network[2], 0.1), (network[:2], 0.01)],  # type: ignore[index]
        optimizer="adamw",
        momentum=None,
        weight_decay=0.0,
        device_type="cpu",
    )
    set_learning_rates(optimizer, Schedule("constant", 2, 5), 0)
    assert [(group["lr"], len(group["params"])) for group in optimizer.param_groups] == [(0.1, 1), (0.1, 1), (0.01, 2)]
