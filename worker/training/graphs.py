"""Training's forward and backward passes as CUDA graphs. Knows networks as what has parameters; not data."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from app.vision.recording import CannotRecord, may_record, record

# Steps of a shape that are taken kernel by kernel before it is recorded. Recording costs about as much as they do, so
# that a job too short to gain loses no more than twice that; and the first ones load and pick kernels.
RECORD_AFTER = 3
# Shapes that are recorded: whole batches, and the smaller one that an epoch may end with. Each keeps memory.
_MOST_SHAPES = 4

# Steps that may be under way or waiting on the GPU. One behind the one that runs keeps it busy; recorded steps could be
# started seconds ahead, and predictions that training gives way to would wait for them.
_MOST_AHEAD = 2

Function = Callable[..., tuple[Tensor, ...]]
_Shape = tuple[tuple[torch.dtype, tuple[int, ...], tuple[int, ...]], ...]


class Lead:
    """How far training is ahead of the GPU. Of no effect on other devices."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ends: deque[torch.cuda.Event] = deque()

    def after_step(self) -> None:
        """Waits, without keeping a core busy, until few enough steps are left to do."""
        if self._device.type != "cuda":
            return
        end = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        end.record(torch.cuda.current_stream(self._device))
        self._ends.append(end)
        if len(self._ends) > _MOST_AHEAD:
            self._ends.popleft().synchronize()


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    gradients: list[Tensor | None]

    def replay(self, inputs: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given, non_blocking=True)
        self.graph.replay()
        for parameter, gradient in zip(parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.outputs


@dataclass
class RecordedPasses:
    """A function that leaves the gradients of a network behind, run as a CUDA graph where that is possible.

    function: tensors on the device -> tensors that need no gradient; as `record` asks of it. refused: told why it
    cannot be recorded; then it is run kernel by kernel.
    """

    function: Function
    network: nn.Module
    refused: Callable[[str], None] = lambda _why: None
    _recordings: dict[_Shape, _Recording] = field(default_factory=dict)
    _seen: dict[_Shape, int] = field(default_factory=dict)
    _place: tuple[int, ...] = ()
    _is_given_up: bool = False

    def __post_init__(self) -> None:
        self._parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The function's outputs; and in the parameters the gradients of this call alone.

        What is returned is overwritten by a later call. Raises what the function raises.
        """
        if self._is_given_up or not may_record(inputs[0].device):
            self.forget()
            return self.plainly(*inputs)
        shape = tuple((tensor.dtype, tuple(tensor.shape), tensor.stride()) for tensor in inputs)
        if shape not in self._recordings:
            seen = self._seen[shape] = self._seen.get(shape, 0) + 1
            if seen <= RECORD_AFTER or len(self._recordings) == _MOST_SHAPES or not self._record(shape, inputs):
                return self.plainly(*inputs)
        return self._recordings[shape].replay(inputs, self._parameters)

    def plainly(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The same, kernel by kernel."""
        self._clear_gradients()
        return self.function(*inputs)

    def forget(self) -> None:
        """Gives the recordings' memory back."""
        self._recordings.clear()
        self._seen.clear()

    def give_up(self) -> bool:
        """For want of memory: forgets what was recorded, and records nothing more. Returns whether anything was."""
        had_any, self._is_given_up = bool(self._recordings), True
        self.forget()
        return had_any

    def follow(self) -> None:
        """Forgets what was recorded if the network is elsewhere in memory by now: it has been to another device."""
        place = tuple(tensor.data_ptr() for tensor in chain(self.network.parameters(), self.network.buffers()))
        if place != self._place:
            self.forget()
            self._place = place

    def _record(self, shape: _Shape, inputs: Sequence[Tensor]) -> bool:
        """Returns whether that worked."""
        held = tuple(tensor.clone() for tensor in inputs)
        self._clear_gradients()  # so that the backward pass writes gradients, and adds to none
        pool = next((recording.graph.pool() for recording in self._recordings.values()), None)
        try:
            graph, outputs = record(partial(self.function, *held), device=held[0].device, pool=pool)
        except CannotRecord as error:
            self.forget()
            self.refused(str(error))
            return False
        gradients = [parameter.grad for parameter in self._parameters]
        self._recordings[shape] = _Recording(graph, held, outputs, gradients)
        return True

    def _clear_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
