"""CUDA graphs: work on a GPU that is recorded once, and from then on launched as one.

A pass of a small network is hundreds of kernels of a few microseconds each, and starting them one by one from Python
takes several times as long as they run: a training step of mobilenet_v3_small on 32 pictures took 22 ms on an H100, and
recorded 3.5. Knows tensors; not networks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Why recording failed in this process. After that torch's allocator and random numbers are not to be trusted with
# another recording, while what runs kernel by kernel is as before.
_failures: list[str] = []


class CannotRecord(RuntimeError):
    """The work waits for the device, has an operation that cannot be recorded, or there is no memory for it."""


def may_record(device: torch.device) -> bool:
    """Whether `record` can do anything here."""
    return device.type == "cuda" and not _failures


def record(
    function: Callable[[], tuple[Tensor, ...]], *, device: torch.device, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """What replays the function's kernels on the same memory, and the tensors that it then writes to.

    The function must have run before, so that kernels are loaded; it is not run here. It does the same work each time,
    never waits for the device, and what it reads stays in its place in memory. Other threads may go on meanwhile. pool:
    another graph's memory, shared by graphs that never run at the same time.
    Raises CannotRecord; from then on nothing is recorded in this process.
    """
    if not may_record(device):
        raise CannotRecord(_failures[0] if _failures else f"{device.type} has no graphs")
    numbers = torch.cuda.get_rng_state(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = function()
        return graph, outputs
    except RuntimeError as error:
        _failures.append(str(error).strip().splitlines()[0])
    # Outside of the except block, whose traceback would hold the attempt's tensors. The generator that was being
    # recorded would refuse to give numbers for good.
    generators: Any = torch.cuda.default_generators
    generators[device.index or 0].graphsafe_set_state(torch.Generator(device))
    torch.cuda.set_rng_state(numbers, device)
    raise CannotRecord(_failures[0])
