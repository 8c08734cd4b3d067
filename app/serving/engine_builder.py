"""Faster engines than torch, each held against it on pictures before it may answer: CPUs have several.

The network is exported and the engines are tried in a process of their own, since that takes seconds of a core; what
was found is kept beside the file. Knows networks, engines and numbers; not requests, not where models lie.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from app.serving.engines import (
    Engine,
    EngineName,
    Threads,
    TorchEngine,
    in_parts,
    names_here,
    open_engine,
    openvino_version,
)
from app.settings import ServingEngine
from app.vision import artifact
from app.vision.backbones import Backbone
from app.vision.preprocessing import Preprocessing, normalise

_FORMAT_VERSION = 3  # of what a build leaves
# The largest difference of any class's score that an engine may make; measured ones are below 1e-5.
SCORE_TOLERANCE = 1e-3
# In half precision, with two digits less in every feature: as much as an exported file may differ by.
HALF_SCORE_TOLERANCE = 0.02
# An engine must be this much faster than one that is nearer to torch: less is within the noise.
MIN_GAIN = 1.1
_MEASURED_BATCH, _MEASURED_RUNS = 8, 7
_BUILD_TIMEOUT_SECONDS = 600.0
_ENGINE_FILE, _REPORT_FILE = "engine.onnx", "engine.json"


@dataclass(frozen=True)
class Trial:
    """How an engine compares with torch. speedup: of batches, torch's time over its own.

    threads: those that were found best for it.
    """

    engine: EngineName
    max_score_difference: float
    same_top: bool
    speedup: float
    threads: Threads

    @property
    def is_half(self) -> bool:
        return self.engine == "openvino-bf16"

    @property
    def is_worth_it(self) -> bool:
        tolerance = HALF_SCORE_TOLERANCE if self.is_half else SCORE_TOLERANCE
        return self.same_top and self.max_score_difference <= tolerance and self.speedup >= MIN_GAIN


@dataclass(frozen=True)
class Report:
    """images: compared on."""

    images: int
    trials: tuple[Trial, ...]

    def chosen(self, policy: ServingEngine = "auto") -> Trial | None:
        """The fastest engine that says what torch says; half precision only where it is clearly faster still."""
        names = names_here()
        worthy = [
            trial
            for trial in self.trials
            if trial.is_worth_it and trial.engine in names and (policy == "auto" or not trial.is_half)
        ]
        return max(worthy, key=lambda trial: trial.speedup / (MIN_GAIN if trial.is_half else 1.0), default=None)


class Builder:
    """Builds engines, one at a time, in a process of its own at a low priority."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopped = False

    def build(self, model_folder: Path, target: Path, *, pixels: Tensor) -> None:
        """Exports the backbone of the model in `model_folder`, tries the engines on it, and leaves both in `target`.

        pixels: uint8 (N, 3, S, S), N > 0, what the model was validated on, or anything.
        Raises OSError or subprocess.SubprocessError if that fails, or is stopped.
        """
        np.save(target / "pixels.npy", pixels.numpy())
        command = [sys.executable, "-m", "app.serving.engine_builder", str(model_folder), str(target)]
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


def key_of(network_key: str) -> str:
    """Where in the storage an engine lies: another version of what runs it is measured anew."""
    return f"engines/{network_key}-{onnxruntime.__version__}-{openvino_version() or 'none'}-{_FORMAT_VERSION}"


def open_built(folder: Path, policy: ServingEngine = "auto") -> tuple[Engine | None, Report]:
    """What a build left in a folder: an engine, or none where none is worth it. Raises ValueError, OSError for what
    cannot be read."""
    try:
        report = TypeAdapter(Report).validate_python(json.loads((folder / _REPORT_FILE).read_bytes()))
    except ValidationError as error:
        raise ValueError("the built engine cannot be read") from error
    chosen = report.chosen(policy)
    return (open_engine(chosen.engine, folder / _ENGINE_FILE, chosen.threads) if chosen else None), report


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
    ours = TorchEngine(backbone, preprocessing, torch.device("cpu"))

    def scores(engine: Engine) -> Tensor:
        with torch.no_grad():
            logits = [model.classifier.head(engine.features(part)) for part in torch.split(pixels, 16)]
            return torch.cat(logits).div(model.temperature).softmax(1)

    part = pixels[torch.arange(_MEASURED_BATCH) % len(pixels)]
    # Before the export, whose tracing would leave tensors without values where normalise keeps its constants.
    plain, seconds = scores(ours), _seconds(lambda: ours.features(part))
    program = torch.onnx.export(
        _WithPixels(backbone, preprocessing).eval(),
        (pixels[:1].expand(2, -1, -1, -1).contiguous(),),
        input_names=["pixels"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("pictures")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.save(target / _ENGINE_FILE)
    trials = []
    for name in names_here():
        threads, theirs = _best_threads(name, target / _ENGINE_FILE, part)
        fast = scores(open_engine(name, target / _ENGINE_FILE, threads))
        trials.append(
            Trial(
                engine=name,
                max_score_difference=float((plain - fast).abs().max()) if plain.numel() else 0.0,
                same_top=bool((plain.argmax(1) == fast.argmax(1)).all()) if plain.numel() else True,
                speedup=seconds / theirs,
                threads=threads,
            )
        )
    return Report(images=len(pixels), trials=tuple(trials))


def _best_threads(name: EngineName, path: Path, batch: Tensor) -> tuple[Threads, float]:
    """One thread, or all: for a picture alone, and for batches; and the seconds of the batch, uint8 (N, 3, S, S)."""
    every = torch.get_num_threads()
    one, all_together = (open_engine(name, path, Threads(count, count)) for count in (1, every))
    with ThreadPoolExecutor(one.passes_at_once) as pool:

        def better(pixels: Tensor) -> tuple[int, float]:
            by_one, by_all = (_seconds(lambda: in_parts(engine, pixels, pool)) for engine in (one, all_together))  # noqa: B023
            return (1, by_one) if by_one <= MIN_GAIN * by_all else (every, by_all)

        batches, seconds = better(batch)
        return Threads(alone=better(batch[:1])[0], batches=batches), seconds


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
