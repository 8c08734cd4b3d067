"""Faster engines than torch, each held against it on pictures before it may answer: CPUs have several.

The network is exported and the engines are tried in a process of their own, since that takes seconds of a core; what
was found is kept beside the file. Knows networks, engines and numbers; not requests, not where models lie.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

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
    is_here,
    names_here,
    open_engine,
    openvino_version,
)
from app.settings import ServingEngine
from app.vision import artifact
from app.vision.backbones import Backbone
from app.vision.device import usable_cores
from app.vision.outputs import Output, of_outputs, probabilities
from app.vision.preprocessing import Preprocessing, normalise

_FORMAT_VERSION = 5  # of what a build leaves
# The largest difference of any class's score that an engine may make; measured ones are below 1e-5.
SCORE_TOLERANCE = 1e-3
# In half precision, with two digits less in every feature: as much as an exported file may differ by.
HALF_SCORE_TOLERANCE = 0.02
# With fewer pictures that a model was validated on, nothing is known of its classes' borders.
FEWEST_FOR_HALF = 16
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
    def is_right(self) -> bool:
        tolerance = HALF_SCORE_TOLERANCE if self.is_half else SCORE_TOLERANCE
        return self.same_top and self.max_score_difference <= tolerance


@dataclass(frozen=True)
class Report:
    """images: compared on. half_keeps: of models that half precision was tried with, by id, whether it says what torch
    says: features that are a little off are right for one head on them and not for another."""

    images: int
    trials: tuple[Trial, ...]
    half_keeps: dict[str, bool]

    @property
    def exact(self) -> Trial | None:
        """The fastest in single precision that says what torch says, where one is worth it."""
        worthy = [trial for trial in self.trials if not trial.is_half and trial.is_right and trial.speedup >= MIN_GAIN]
        by_speed = sorted(worthy, key=lambda trial: -trial.speedup)
        return next((trial for trial in by_speed if is_here(trial.engine)), None)

    @property
    def half(self) -> Trial | None:
        """Half precision, where it is faster still; for models that it keeps."""
        least = MIN_GAIN * (self.exact.speedup if self.exact else 1.0)
        faster = (trial for trial in self.trials if trial.is_half and trial.speedup >= least)
        return next((trial for trial in faster if is_here(trial.engine)), None)


@dataclass(frozen=True)
class Built:
    """What a build left: engines that are worth it, as `Report` has them; half only where a model keeps it."""

    exact: Engine | None
    half: Engine | None
    report: Report


@dataclass(frozen=True)
class _Order:
    """Of the program. are_own: whether the pictures are ones that the model was validated on. is_plain: whether ONNX
    Runtime alone is tried. earlier: a folder, or nothing."""

    model: str
    target: str
    are_own: bool
    is_plain: bool
    earlier: str | None


class Builder:
    """Builds engines, one at a time, in a process of its own at a low priority."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopped = False

    def build(
        self, model_folder: Path, target: Path, *, pixels: Tensor, are_own: bool, earlier: Path | None = None
    ) -> None:
        """Exports the backbone of the model in `model_folder`, tries the engines on it, and leaves both in `target`.

        pixels: uint8 (N, 3, S, S), N > 0. are_own: whether the model was validated on them; on others half precision
        shows nothing. earlier: what a build for another model on the same backbone left, whose models are remembered.
        Raises OSError or subprocess.SubprocessError if that fails, or is stopped.
        """
        np.save(target / "pixels.npy", pixels.numpy())
        before = None if earlier is None else str(earlier)
        order = _Order(str(model_folder), str(target), are_own=are_own, is_plain=False, earlier=before)
        try:
            self._run(order)
        except subprocess.CalledProcessError as error:
            if self._is_stopped or error.returncode > 0:
                raise
            # Killed by a signal: another engine may have wanted what this processor has not.
            self._run(replace(order, is_plain=True))
        (target / "pixels.npy").unlink()

    def _run(self, order: _Order) -> None:
        command = [sys.executable, "-m", "app.serving.engine_builder", json.dumps(asdict(order))]
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

    def stop(self) -> None:
        """Ends the build under way, and any later one: nobody waits for an engine at shutdown."""
        self._is_stopped = True
        if self._process is not None:
            self._process.kill()


def key_of(network_key: str) -> str:
    """Where in the storage an engine lies: another version of what runs it is measured anew."""
    return f"engines/{network_key}-{onnxruntime.__version__}-{openvino_version() or 'none'}-{_FORMAT_VERSION}"


def open_built(folder: Path, policy: ServingEngine = "auto") -> Built:
    """Raises ValueError, OSError for what cannot be read."""
    report = _read(folder)

    def opened(trial: Trial | None) -> Engine | None:
        return None if trial is None else open_engine(trial.engine, folder / _ENGINE_FILE, trial.threads)

    is_kept = policy == "auto" and any(report.half_keeps.values())
    return Built(opened(report.exact), opened(report.half) if is_kept else None, report)


def _read(folder: Path) -> Report:
    try:
        return TypeAdapter(Report).validate_python(json.loads((folder / _REPORT_FILE).read_bytes()))
    except ValidationError as error:
        raise ValueError("the built engine cannot be read") from error


class _WithPixels(nn.Module):
    """The backbone and what comes before it."""

    def __init__(self, backbone: Backbone, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.backbone, self._preprocessing = backbone, preprocessing

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.backbone(normalise(pixels, self._preprocessing, torch.float32))
        return features


def _build_here(order: _Order) -> Report:
    model, file = artifact.load(Path(order.model)), Path(order.target) / _ENGINE_FILE
    backbone, preprocessing = model.classifier.backbone, model.preprocessing
    pixels = torch.from_numpy(np.load(Path(order.target) / "pixels.npy"))
    plain = TorchEngine(backbone, preprocessing, torch.device("cpu"))

    def scores(engine: Engine) -> Tensor:
        with torch.no_grad():
            features = torch.cat([engine.features(part) for part in torch.split(pixels, 16)])
            return probabilities(model.classifier.head(features), model.outputs)

    # Before the export, whose tracing would leave tensors without values where normalise keeps its constants.
    expected = scores(plain)
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
    program.save(file)
    opened: dict[EngineName, dict[int, Engine]] = {}
    found: dict[EngineName, Tensor] = {}
    names: list[EngineName] = ["onnxruntime"] if order.is_plain else names_here()
    for name in names:
        try:
            by_count = {count: open_engine(name, file, Threads(count, count)) for count in _thread_counts()}
            opened[name], found[name] = by_count, scores(by_count[1])
        except (ValueError, RuntimeError) as error:  # the others go on
            print(f"{name}: {error}", file=sys.stderr)  # noqa: T201 (a program)
    timed = _timed(plain, opened, pixels[torch.arange(_MEASURED_BATCH) % len(pixels)])
    trials = tuple(
        Trial(
            engine=name,
            max_score_difference=float((expected - found[name]).abs().max()) if expected.numel() else 0.0,
            same_top=_same_top(expected, found[name], model.outputs),
            speedup=speedup,
            threads=threads,
        )
        for name, (threads, speedup) in timed.items()
    )
    half_keeps = _read(Path(order.earlier)).half_keeps if order.earlier else {}
    is_enough = order.are_own and len(pixels) >= FEWEST_FOR_HALF and expected.numel() > 0
    half_keeps |= {Path(order.model).name: is_enough and any(trial.is_half and trial.is_right for trial in trials)}
    return Report(images=len(pixels), trials=trials, half_keeps=half_keeps)


def _same_top(expected: Tensor, found: Tensor, outputs: Sequence[Output]) -> bool:
    """Whether every task's most probable class is the same for each picture."""
    pairs = zip(of_outputs(expected, outputs), of_outputs(found, outputs), strict=True)
    return all(torch.equal(ours.argmax(1), theirs.argmax(1)) for ours, theirs in pairs)


def _thread_counts() -> set[int]:
    """Of a pass: one thread, or all."""
    return {1, torch.get_num_threads()}


def _timed(
    plain: Engine, opened: Mapping[EngineName, Mapping[int, Engine]], batch: Tensor
) -> dict[EngineName, tuple[Threads, float]]:
    """The best threads of each engine, and its speedup. batch: uint8 (N, 3, S, S)."""
    ways = {(name, count): engine for name, by_count in opened.items() for count, engine in by_count.items()}
    with ThreadPoolExecutor(usable_cores()) as pool:

        def least_seconds(pixels: Tensor) -> tuple[float, dict[tuple[EngineName, int], float]]:
            actions = [partial(in_parts, engine, pixels, pool) for engine in (plain, *ways.values())]
            of_torch, *others = _least_seconds(actions)
            return of_torch, dict(zip(ways, others, strict=True))

        (_, alone), (of_torch, batches) = least_seconds(batch[:1]), least_seconds(batch)

    def best(name: EngineName, seconds: Mapping[tuple[EngineName, int], float]) -> int:
        every = max(_thread_counts())
        return 1 if seconds[name, 1] <= MIN_GAIN * seconds[name, every] else every

    threads = {name: Threads(alone=best(name, alone), batches=best(name, batches)) for name in opened}
    return {name: (each, of_torch / batches[name, each.batches]) for name, each in threads.items()}


def _least_seconds(actions: Sequence[Callable[[], object]]) -> list[float]:
    """Of several runs of each, in turns: what else the machine does then meets all of them.

    Each has a run before, which does not count: the one after another's finds no cache of its own, and threads of the
    other that still spin. That cost passes beside each other most, and so the wrong number of threads was chosen.
    """
    rounds = []
    for _ in range(_MEASURED_RUNS):
        seconds = []
        for action in actions:
            action()
            start = time.perf_counter()
            action()
            seconds.append(time.perf_counter() - start)
        rounds.append(seconds)
    return [min(each) for each in zip(*rounds, strict=True)]


if __name__ == "__main__":
    os.nice(5)
    order = _Order(**json.loads(sys.argv[1]))
    made = _build_here(order)
    # Last: where it is, the engine is whole.
    (Path(order.target) / _REPORT_FILE).write_text(json.dumps(asdict(made)), "utf-8")
