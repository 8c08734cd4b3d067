"""CUDA graphs: work on a GPU that is recorded once, and from then on launched as one.

A pass of a small network is hundreds of kernels of a few microseconds each, and starting them one by one from Python
takes several times as long as they run: a training step of mobilenet_v3_small on 32 pictures took 22 ms on an H100, and
recorded 3.5. Knows tensors; not networks.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")

# Why recording failed in this process. After that torch's allocator believes for good that it is under way, so nothing
# is recorded any more, while what runs kernel by kernel is as before.
_failures: list[str] = []


class CannotRecord(RuntimeError):
    """The work waits for the device, has an operation that cannot be recorded, or there is no memory for it."""


def may_record(device: torch.device) -> bool:
    """Whether `record` can do anything here."""
    return device.type == "cuda" and not _failures


def record(
    function: Callable[[], Made], *, device: torch.device, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Made]:
    """What replays the function's kernels on the same memory, and what it returned: tensors that are then written to.

    The function must have run before, so that kernels are loaded; it is not run here. It does the same work each time,
    never waits for the device, and what it reads stays in its place in memory. Other threads may go on meanwhile. pool:
    another graph's memory, shared by graphs that never run at the same time.
    Raises CannotRecord; from then on nothing is recorded in this process.
    """
    if not may_record(device):
        raise CannotRecord(_failures[0] if _failures else f"{device.type} has no graphs")
    with torch.cuda.device(device):
        before, numbers = torch.cuda.current_stream(), torch.cuda.get_rng_state()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=_side_stream(device), capture_error_mode="thread_local"):
                outputs = function()
            return graph, outputs
        except RuntimeError as error:
            cause = error.__context__ or error  # what broke it; raised is that it is broken
            _failures.append(str(cause).strip().partition("\n")[0] or type(cause).__name__)
        # Outside of the except block, whose traceback would hold the attempt's tensors. Torch leaves a broken
        # recording's stream the current one, and its generator would refuse to give numbers for good.
        torch.cuda.set_stream(before)
        generators: Any = torch.cuda.default_generators
        generators[torch.cuda.current_device()].graphsafe_set_state(torch.Generator(device))
        torch.cuda.set_rng_state(numbers)
    raise CannotRecord(_failures[0])


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
