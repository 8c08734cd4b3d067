"""In which precision a network trains: chosen for its device, by measuring where it is not known."""

import copy
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

Precision = Literal["fp32", "bf16"]

# bf16 must be this much faster to be chosen: less is within the noise of a few steps, and fp32 is exact.
BF16_MIN_GAIN = 1.2
_PROBE_STEPS = 3


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """What a forward pass in this precision runs within."""
    # Not autocast's own `enabled`: being off costs it a tenth of the step of a head.
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def choose_precision(
    network: nn.Module, normalise: Callable[[Tensor], Tensor], *, image_size: int, batch_size: int, seed: int
) -> Precision:
    """fp32 or bf16, whichever trains this network faster on its device, by a few steps on noise; the network is kept.

    On cuda bf16 always: every card with bf16 has units for it. On CPUs it pays for dense convolutions and not for
    depthwise ones, so it is measured; elsewhere fp32.
    """
    device = next(network.parameters()).device
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if device.type != "cpu" or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "fp32"
    twin = copy.deepcopy(network)
    random = np.random.default_rng(seed)
    pixels = torch.from_numpy(random.integers(0, 256, (min(batch_size, 16), image_size, image_size, 3), np.uint8))
    images = normalise(pixels.permute(0, 3, 1, 2))
    seconds = {precision: _probe(twin, images, precision) for precision in ("fp32", "bf16")}
    return "bf16" if seconds["fp32"] > BF16_MIN_GAIN * seconds["bf16"] else "fp32"


def _probe(network: nn.Module, images: Tensor, precision: str) -> float:
    """Seconds of the fastest of a few training steps, after one to warm up."""
    best = math.inf
    for step in range(_PROBE_STEPS + 1):
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = network(images).float().logsumexp(1).sum()
        loss.backward()
        network.zero_grad(set_to_none=True)
        if step > 0:
            best = min(best, time.perf_counter() - start)
    return best
