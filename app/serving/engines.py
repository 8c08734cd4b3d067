"""Ways to run a backbone: torch itself, and what is faster.

An engine takes canonical pixels and gives what a head sees of them. Torch is there at once. On cuda its own kernels are
recorded and launched as one. On CPUs other programs run a file that engine_builder.py makes and holds against torch.
Knows networks and numbers; not models' heads, not requests, not which engine is best.
"""

import importlib
import importlib.metadata
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import onnxruntime
import psutil
import structlog
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as onnxruntime_errors
from torch import Tensor

from app.errors import Overloaded
from app.vision.backbones import Backbone
from app.vision.device import usable_cores
from app.vision.folding import folded
from app.vision.preprocessing import Preprocessing, normalise
from app.vision.recording import record

log = structlog.get_logger(__name__)

# Pictures of one pass among others: with more, what a layer makes no longer fits into a core's cache.
SMALL_BATCH = 8
# Sizes of batches that are recorded on cuda.
_GRAPH_SIZES = (1, 2, 4, 8, 16, 32)
_UNREADABLE = (
    onnxruntime_errors.Fail,
    onnxruntime_errors.InvalidArgument,
    onnxruntime_errors.InvalidGraph,
    onnxruntime_errors.InvalidProtobuf,
    onnxruntime_errors.NoSuchFile,
    onnxruntime_errors.NotImplemented,
    RuntimeError,  # OpenVINO's
)

# What runs an exported network on a CPU.
EngineName = Literal["onnxruntime", "openvino", "openvino-bf16"]


class Engine(Protocol):
    """name: as it is shown. passes_at_once: how many run best beside each other; more than one, of small batches.

    size_bytes: of weights, or what holds them, beside the backbone's own.
    features: one pass. uint8 (N, 3, S, S), N > 0, on the CPU → float32 (N, D) on the CPU.
    """

    name: str
    passes_at_once: int
    size_bytes: int

    def features(self, pixels: Tensor) -> Tensor: ...


class TorchEngine:
    """The network itself, in full precision, on its device; on cuda convolutions are TF32, as torch has them."""

    name = "torch"
    passes_at_once = 1

    def __init__(self, backbone: Backbone, preprocessing: Preprocessing, device: torch.device) -> None:
        backbone.to(device).eval()
        if device.type != "mps":
            backbone.to(memory_format=torch.channels_last)
        self._backbone = folded(backbone)
        shared = {tensor.data_ptr() for tensor in backbone.state_dict().values()}
        own = [tensor for tensor in self._backbone.state_dict().values() if tensor.data_ptr() not in shared]
        self.size_bytes = sum(tensor.nbytes for tensor in own)
        self._preprocessing, self._device = preprocessing, device

    def features(self, pixels: Tensor) -> Tensor:
        """pixels: also float32 and normalised. Raises Overloaded if there is no memory even for one picture."""
        try:
            return self._forward(pixels)
        except torch.OutOfMemoryError:
            pass  # retried outside of this block, whose traceback would hold the tensors
        if len(pixels) == 1:
            raise Overloaded("The device is out of memory; try again soon.", retry_after_seconds=5)
        half = len(pixels) // 2
        return torch.cat([self.features(pixels[:half]), self.features(pixels[half:])])

    def _forward(self, pixels: Tensor) -> Tensor:
        return self.on_device(pixels.to(self._device)).cpu()

    def on_device(self, pixels: Tensor) -> Tensor:
        """The same with pixels and features on the network's device, and not waited for."""
        # no_grad and not inference_mode: what comes out may be computed with later.
        with torch.no_grad():
            if pixels.dtype == torch.uint8:
                pixels = normalise(pixels, self._preprocessing, torch.float32)
            found: Tensor = self._backbone(pixels).float()
            return found


class GraphEngine:
    """Torch's own kernels on cuda, recorded as a CUDA graph for each size of batch and launched as one.

    Starting the hundreds of kernels of a small network one by one takes several times as long as they run. A batch is
    filled up to the next size that is recorded. Safe to call from many threads.
    """

    name = "cuda-graphs"
    passes_at_once = 1

    def __init__(self, plain: TorchEngine, *, side: int, device: torch.device) -> None:
        """Records passes of pixels (N, 3, side, side). Raises CannotRecord, and OutOfMemoryError."""
        self._plain, self._alone = plain, threading.Lock()
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        before = torch.cuda.memory_reserved(device)
        # The largest first: the others find their memory in its own, since no two run at once.
        for size in sorted(_GRAPH_SIZES, reverse=True):
            pixels = torch.zeros(size, side, side, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
            plain.on_device(pixels)  # picks kernels, which cannot be done while recording
            pool = next((recorded.pool() for recorded, _, _ in self._graphs.values()), None)
            graph, features = record(partial(plain.on_device, pixels), device=device, pool=pool)
            self._graphs[size] = graph, pixels, features
        self.size_bytes = max(0, torch.cuda.memory_reserved(device) - before)

    def features(self, pixels: Tensor) -> Tensor:
        size = next((size for size in _GRAPH_SIZES if size >= len(pixels)), None)
        if size is None:
            return self._plain.features(pixels)
        graph, held, features = self._graphs[size]
        with self._alone:
            held[: len(pixels)].copy_(pixels)
            graph.replay()
            return features[: len(pixels)].cpu()


@dataclass(frozen=True)
class Threads:
    """How many threads a pass takes: of a picture that is alone, and of a batch.

    With one thread, passes run beside each other, one per core. Threads that share a pass of a small network wait for
    each other at each of its layers: two of them passed a batch of mobilenet_v3_small in 1.2 ms a picture, and two
    passes beside each other in 0.85; so it is measured which is better.
    """

    alone: int
    batches: int


class OnnxEngine:
    """The network in ONNX Runtime, on the CPU. Safe to call from many threads."""

    name = "onnxruntime"

    def __init__(self, path: Path, threads: Threads) -> None:
        sessions = {count: _session(path, count) for count in {threads.alone, threads.batches}}
        self._alone, self._batches = sessions[threads.alone], sessions[threads.batches]
        self.size_bytes = len(sessions) * path.stat().st_size
        self.passes_at_once = usable_cores() if threads.batches == 1 else 1
        side = self._alone.get_inputs()[0].shape[-1]
        for count in (1, 2):  # the first pass allocates: nobody's request should wait for that
            self.features(torch.zeros(count, 3, side, side, dtype=torch.uint8))

    def features(self, pixels: Tensor) -> Tensor:
        session = self._alone if len(pixels) == 1 else self._batches
        (found,) = session.run(None, {"pixels": pixels.numpy()})
        return torch.from_numpy(found)


class OpenVinoEngine:
    """The network in OpenVINO, on the CPU. Safe to call from many threads.

    bf16: in half precision, which processors with instructions for it are several times as fast in. Batches are of
    SMALL_BATCH at most, since it makes itself ready, and keeps memory, for each size.
    """

    def __init__(self, path: Path, threads: Threads, *, bf16: bool) -> None:
        self.name: str = "openvino-bf16" if bf16 else "openvino"
        before = _resident_bytes()
        compiled = {count: _Compiled(path, count, bf16=bf16) for count in {threads.alone, threads.batches}}
        self._alone, self._batches = compiled[threads.alone], compiled[threads.batches]
        self._alone.make_ready(1)
        for size in range(2, SMALL_BATCH + 1):
            self._batches.make_ready(size)
        self.size_bytes = max(_resident_bytes() - before, path.stat().st_size)
        self.passes_at_once = usable_cores() if threads.batches == 1 else 1

    def features(self, pixels: Tensor) -> Tensor:
        if len(pixels) == 1:
            return self._alone.passed(pixels)
        return torch.cat([self._batches.passed(part) for part in torch.split(pixels, SMALL_BATCH)])


class _Compiled:
    """threads: of one pass; with one, as many passes as there are cores may run beside each other."""

    def __init__(self, path: Path, threads: int, *, bf16: bool) -> None:
        self._streams = usable_cores() if threads == 1 else 1
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
            "INFERENCE_NUM_THREADS": usable_cores() if threads == 1 else threads,
            "NUM_STREAMS": self._streams,
            "ENABLE_CPU_PINNING": False,  # the cores are shared with what decodes
        }
        self._compiled = _openvino_core().compile_model(path, "CPU", options)
        self._free: deque[Any] = deque()  # requests; each holds what one pass needs

    def passed(self, pixels: Tensor) -> Tensor:
        try:
            request = self._free.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        request.infer({0: pixels.numpy()}, share_inputs=True)
        found = torch.from_numpy(request.get_output_tensor().data.copy())
        self._free.append(request)
        return found

    def make_ready(self, size: int) -> None:
        """For batches of this size, which takes 20 to 90 ms for a small network, in each of its streams."""
        side = self._compiled.input(0).partial_shape[-1].get_length()
        pixels = torch.zeros(size, 3, side, side, dtype=torch.uint8)
        with ThreadPoolExecutor(self._streams) as pool:
            list(pool.map(self.passed, [pixels] * self._streams))


def open_engine(name: EngineName, path: Path, threads: Threads) -> Engine:
    """An engine that has made its first passes. path: of the exported network.

    Raises ValueError for what cannot be read, or run here.
    """
    try:
        if name == "onnxruntime":
            return OnnxEngine(path, threads)
        return OpenVinoEngine(path, threads, bf16=name == "openvino-bf16")
    except (ImportError, *_UNREADABLE) as error:
        raise ValueError(f"the built engine cannot be read: {error}") from error


def names_here() -> list[EngineName]:
    """The engines that this machine can run, the plainest first."""
    return [name for name in get_args(EngineName) if is_here(name)]


@cache
def is_here(name: EngineName) -> bool:
    """Whether this machine can run an engine. OpenVINO is made for few kinds of machine, and may be broken."""
    if name == "onnxruntime":
        return True
    if openvino_version() is None:
        return False
    try:
        able = _openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except (ImportError, OSError, RuntimeError) as error:
        log.warning("openvino cannot be used", error=str(error)[:500])
        return False
    return name == "openvino" or "BF16" in able


@cache
def openvino_version() -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        return None


def _openvino_core() -> Any:
    """One for the process, and never freed: where the processor has AMX, it gives the thread that first uses it a stack
    for signal handlers, and unmaps that stack when it is freed. Freed by another thread, it would leave the first one
    to die of its next signal.
    """
    with _opening_core:
        return _opened_core()


_opening_core = threading.Lock()


@cache
def _opened_core() -> Any:
    """OpenVINO is imported where it is used: it takes 27 MiB and a third of a second."""
    # A module that reports to its maker how OpenVINO's converters are used. They are not, and it does without.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module("openvino").Core()


def _resident_bytes() -> int:
    found: int = psutil.Process().memory_info().rss
    return found


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that spin while they wait take the cores from those that decode.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def in_parts(engine: Engine, pixels: Tensor, pool: ThreadPoolExecutor) -> Tensor:
    """`features` of pictures that are all there, as many passes at once as the engine likes. pool: of so many threads.

    Raises what the engine raises.
    """
    if engine.passes_at_once == 1:
        return engine.features(pixels)
    size = min(SMALL_BATCH, -(-len(pixels) // engine.passes_at_once))
    return torch.cat(list(pool.map(engine.features, torch.split(pixels, size))))
