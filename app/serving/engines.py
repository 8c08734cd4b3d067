"""Ways to run a backbone: torch itself, and what is faster and gives the same answers.

An engine takes canonical pixels and gives what a head sees of them. Torch is there at once. On cuda its own kernels are
recorded and launched as one. On CPUs ONNX Runtime is built in a process of its own, since exporting takes seconds of a
core, compared with torch on pictures, and only then taken. Knows networks and numbers; not models' heads, not requests.
"""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as onnxruntime_errors
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from app.errors import Overloaded
from app.vision import artifact
from app.vision.backbones import Backbone
from app.vision.device import usable_cores
from app.vision.folding import folded
from app.vision.preprocessing import Preprocessing, normalise
from app.vision.recording import record

FORMAT_VERSION = 2  # of what a build leaves
# Largest difference of any class's score that another engine may make; measured ones are below 1e-5.
SCORE_TOLERANCE = 1e-3
# Another engine must be this much faster: less is within the noise, and torch is the plain path.
MIN_GAIN = 1.1
_MEASURED_BATCH, _MEASURED_RUNS = 8, 9
# Pictures of one pass among others: with more, what a layer makes no longer fits into a core's cache.
SMALL_BATCH = 8
# Sizes of batches that are recorded on cuda.
_GRAPH_SIZES = (1, 2, 4, 8, 16, 32)
_BUILD_TIMEOUT_SECONDS = 600.0
_UNREADABLE = (
    onnxruntime_errors.Fail,
    onnxruntime_errors.InvalidArgument,
    onnxruntime_errors.InvalidGraph,
    onnxruntime_errors.InvalidProtobuf,
    onnxruntime_errors.NoSuchFile,
    onnxruntime_errors.NotImplemented,
)
_ENGINE_FILE, _REPORT_FILE = "engine.onnx", "engine.json"


class Engine(Protocol):
    """name: as it is shown. passes_at_once: how many run best beside each other; more than one, of small batches.

    features: one pass. uint8 (N, 3, S, S), N > 0, on the CPU → float32 (N, D) on the CPU.
    """

    name: str
    passes_at_once: int

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
        # The largest first: the others find their memory in its own, since no two run at once.
        for size in sorted(_GRAPH_SIZES, reverse=True):
            pixels = torch.zeros(size, side, side, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
            plain.on_device(pixels)  # picks kernels, which cannot be done while recording
            pool = next((recorded.pool() for recorded, _, _ in self._graphs.values()), None)
            graph, features = record(partial(plain.on_device, pixels), device=device, pool=pool)
            self._graphs[size] = graph, pixels, features

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
    """How many threads a pass of ONNX Runtime takes: of a picture that is alone, and of a batch.

    With one thread, passes run beside each other, one per core. Threads that share a pass of a small network wait for
    each other at each of its layers: two of them passed a batch of mobilenet_v3_small in 1.2 ms a picture, and two
    passes beside each other in 0.85; so it is measured which is better.
    """

    alone: int
    batches: int


class OnnxEngine:
    """The same network in ONNX Runtime, on the CPU. Safe to call from many threads."""

    name = "onnxruntime"

    def __init__(self, path: Path, threads: Threads) -> None:
        sessions = {count: open_session(path, count) for count in {threads.alone, threads.batches}}
        self._alone, self._batches = sessions[threads.alone], sessions[threads.batches]
        self.passes_at_once = usable_cores() if threads.batches == 1 else 1

    def features(self, pixels: Tensor) -> Tensor:
        return passed(self._alone if len(pixels) == 1 else self._batches, pixels)


def in_parts(engine: Engine, pixels: Tensor, pool: ThreadPoolExecutor) -> Tensor:
    """`features` of pictures that are all there, as many passes at once as the engine likes. pool: of so many threads.

    Raises what the engine raises.
    """
    if engine.passes_at_once == 1:
        return engine.features(pixels)
    size = min(SMALL_BATCH, -(-len(pixels) // engine.passes_at_once))
    return torch.cat(list(pool.map(engine.features, torch.split(pixels, size))))


def open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that spin while they wait take the cores from those that decode.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def passed(session: onnxruntime.InferenceSession, pixels: Tensor) -> Tensor:
    (found,) = session.run(None, {"pixels": pixels.numpy()})
    return torch.from_numpy(found)


@dataclass(frozen=True)
class Report:
    """How another engine compares with torch. images: compared on; speedup: of batches, torch's time over its own.

    threads: those that were found best for it.
    """

    images: int
    max_score_difference: float
    same_top: bool
    speedup: float
    threads: Threads

    @property
    def is_worth_it(self) -> bool:
        return self.same_top and self.max_score_difference <= SCORE_TOLERANCE and self.speedup >= MIN_GAIN


class Builder:
    """Builds engines, one at a time, in a process of its own at a low priority."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopped = False

    def build(self, model_folder: Path, target: Path, *, pixels: Tensor) -> None:
        """Exports the backbone of the model in `model_folder`, compares it with torch, and leaves both in `target`.

        pixels: uint8 (N, 3, S, S), N > 0, what the model was validated on, or anything.
        Raises OSError or subprocess.SubprocessError if that fails, or is stopped.
        """
        np.save(target / "pixels.npy", pixels.numpy())
        command = [sys.executable, "-m", "app.serving.engines", str(model_folder), str(target)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            self._process = process
            if self._is_stopped:
                process.kill()
            try:
                _, said = process.communicate(timeout=_BUILD_TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        if process.returncode != 0:
            raise subprocess.CalledProcessError(process.returncode, command, stderr=said)
        (target / "pixels.npy").unlink()

    def stop(self) -> None:
        """Ends the build under way, and any later one: nobody waits for an engine at shutdown."""
        self._is_stopped = True
        if self._process is not None:
            self._process.kill()


def open_built(folder: Path) -> tuple[OnnxEngine | None, Report]:
    """What a build left in a folder: an engine, or none where it is not worth it. Raises ValueError, OSError for what
    cannot be read."""
    try:
        report = TypeAdapter(Report).validate_python(json.loads((folder / _REPORT_FILE).read_bytes()))
        return (OnnxEngine(folder / _ENGINE_FILE, report.threads) if report.is_worth_it else None), report
    except (ValidationError, *_UNREADABLE) as error:
        raise ValueError("the built engine cannot be read") from error


class _WithPixels(nn.Module):
    """The backbone and what comes before it."""

    def __init__(self, backbone: Backbone, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.backbone, self._preprocessing = backbone, preprocessing

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.backbone(normalise(pixels, self._preprocessing, torch.float32))
        return features


def _build_here(model_folder: Path, target: Path) -> Report:
    model = artifact.load(model_folder)
    backbone, preprocessing = model.classifier.backbone, model.preprocessing
    pixels = torch.from_numpy(np.load(target / "pixels.npy"))
    example = pixels[:1].expand(2, -1, -1, -1).contiguous()
    ours = TorchEngine(backbone, preprocessing, torch.device("cpu"))

    def scores(engine: Engine) -> Tensor:
        with torch.no_grad():
            logits = [model.classifier.head(engine.features(part)) for part in torch.split(pixels, 16)]
            return torch.cat(logits).div(model.temperature).softmax(1)

    # Before the export, whose tracing would leave tensors without values where normalise keeps its constants.
    plain = scores(ours)
    program = torch.onnx.export(
        _WithPixels(backbone, preprocessing).eval(),
        (example,),
        input_names=["pixels"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("pictures")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.save(target / _ENGINE_FILE)
    part = pixels[torch.arange(_MEASURED_BATCH) % len(pixels)]
    threads = _best_threads(target / _ENGINE_FILE, part)
    theirs = OnnxEngine(target / _ENGINE_FILE, threads)
    fast = scores(theirs)
    with ThreadPoolExecutor(theirs.passes_at_once) as pool:
        seconds = _seconds(lambda: in_parts(theirs, part, pool))
    return Report(
        images=len(pixels),
        max_score_difference=float((plain - fast).abs().max()) if plain.numel() else 0.0,
        same_top=bool((plain.argmax(1) == fast.argmax(1)).all()) if plain.numel() else True,
        speedup=_seconds(lambda: ours.features(part)) / seconds,
        threads=threads,
    )


def _best_threads(path: Path, batch: Tensor) -> Threads:
    """One thread, or all: for a picture alone, and for batches. batch: uint8 (N, 3, S, S)."""
    every = torch.get_num_threads()
    one, all_together = (OnnxEngine(path, Threads(count, count)) for count in (1, every))
    with ThreadPoolExecutor(one.passes_at_once) as pool:

        def better(pixels: Tensor) -> int:
            by_one, by_all = (_seconds(lambda: in_parts(engine, pixels, pool)) for engine in (one, all_together))  # noqa: B023
            return 1 if by_one <= MIN_GAIN * by_all else every

        return Threads(alone=better(batch[:1]), batches=better(batch))


def _seconds(action: Callable[[], Any]) -> float:
    """Median of several, after one to warm up."""
    action()
    found = []
    for _ in range(_MEASURED_RUNS):
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


if __name__ == "__main__":
    os.nice(5)
    folder = Path(sys.argv[2])
    found = _build_here(Path(sys.argv[1]), folder)
    # Last: where it is, the engine is whole.
    (folder / _REPORT_FILE).write_text(json.dumps(asdict(found)), "utf-8")
