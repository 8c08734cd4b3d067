"""How long a job will take and how much memory it will need, before it runs.

An estimate from first principles, replaced by experience where there is some. A stage's time is its arithmetic over the
device's measured speed plus its activations over the measured memory bandwidth; a job of the same kind that was run
before gives its images per second instead. Right within a factor of 1.5 or little more where nothing was run before
(docs/benchmarks.md): other work on the machine, and how well a network's convolutions suit the device, are not known
here.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import torch
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from app.db.tables import DatasetRow, EpochRow, JobRow
from app.jobs.request import FEWEST_TOGETHER, FROZEN_METHODS, MAX_CHECKED
from app.jobs.spec import DatasetFacts, TrainingSpec
from app.jobs.states import JobKind, JobStatus
from app.vision import backbones
from app.vision.backbones import ALL_LAYERS, BACKBONES
from app.vision.device import pass_batch_size
from app.vision.folding import folded

FLOAT_BYTES = 4
# A process with torch imported, a job's story and a data loader; on cuda its context besides, on the card. Imports
# alone were measured to take 692 MiB with a CUDA build of torch.
PROCESS_BYTES = 700 * 1024**2
CUDA_CONTEXT_BYTES = 600 * 1024**2
# Building, opening data, calibrating, saving, waking up: measured for small networks on two cores.
FIXED_SECONDS = 0.4
# Solving for a head, and what it takes to choose how strongly it is regularised; per training image and class.
PROBE_SECONDS = 0.0001
# The metric of prototypes is fitted once and for each of five folds, in double precision; per operation on two CPU
# cores (1,000 images of 1,024 features: 2.7 s). Of matrices as large as the metric, and of parts of 4,096 images, so
# many are in memory at a time.
PROTOTYPE_FITS, PROTOTYPE_SECONDS = 6, 7e-11
DOUBLE_BYTES, PROTOTYPE_MATRICES, PROTOTYPE_PARTS, PART_IMAGES = 8, 5, 3, 4096
# A step of the head alone on kept features, per image.
HEAD_SECONDS = 0.00002
# Of the epochs that early stopping may cut short, how many are trained as a rule; and of auto's methods after the
# first, how much of each, since some end with their heat.
EXPECTED_SHARE = 0.75
EXPECTED_HEAT = 0.6
# Decoding is done; a random crop and resize of packed pixels, per image, on one core.
AUGMENT_SECONDS = 0.0005
# Fitted to the ten jobs of benchmarks/estimates.py on two CPU cores (channels-last, fp32 or what was faster). A
# backward pass is twice the forward one's arithmetic; how often the activations' bytes are moved tells the rest, and
# that is what depthwise networks spend their time on.
FORWARD_ARITHMETIC, FORWARD_PASSES = 1.15, 6.0
TRAINING_ARITHMETIC, TRAINING_PASSES = 2.7, 22.0
# Where a job of the kind has not chosen a precision yet, steps are tried on so many images of each, on CPUs.
PRECISION_IMAGES = 64
# How much memory the activations take in practice, with what the convolutions and the memory allocator add; fitted to
# the ten jobs of benchmarks/estimates.py.
PASS_MEMORY, TRAINING_MEMORY = 1.7, 2.2
# Of each picture in a step.
VIEWS: Mapping[str, int] = defaultdict(lambda: 1, self_supervised=2)
PAST_JOBS = 100
# The fastest counts: the first few wake threads and caches, and others may be disturbed.
_MEASUREMENTS = 12


@dataclass(frozen=True)
class Estimate:
    """seconds: as a rule. seconds_range: where all that may end a job early does so at once, and where nothing does."""

    seconds: float
    seconds_range: tuple[float, float]
    peak_memory_bytes: int


@dataclass(frozen=True)
class Kind:
    """What the time of a picture in an epoch depends on. is_cached: whether it is trained on as stored activations."""

    backbone: str
    method: str
    image_size: int
    unfreeze: int | None
    feature_layer: str | None
    is_cached: bool
    is_solved: bool

    @classmethod
    def of(cls, spec: TrainingSpec) -> Self:
        values = spec.hyperparameters
        return cls(
            spec.backbone.name,
            spec.method,
            values.image_size,
            values.unfreeze,
            values.feature_layer,
            _is_cached(spec),
            values.is_solved,
        )


@dataclass(frozen=True)
class PastSpeed:
    """How fast an earlier job trained: images of its epochs, by all of their time, validation too."""

    kind: Kind
    images_per_second: float


@dataclass(frozen=True)
class DeviceSpeed:
    """What a device did in a measurement of some milliseconds."""

    flops_per_second: float
    bytes_per_second: float


@dataclass(frozen=True)
class StageCost:
    """One stage on one image: floating-point operations, and bytes of activations that training keeps.

    pass_bytes: activations of a pass for inference, whose batch-norms are folded. width: features that a head behind
    it sees.
    """

    flops: float
    activation_bytes: float
    pass_bytes: float
    output_bytes: float
    width: int


def estimate(
    spec: TrainingSpec, *, dataset: DatasetFacts, speed: DeviceSpeed, device_type: str, past: Sequence[PastSpeed] = ()
) -> Estimate:
    """past: newest first; the first that matches is believed."""
    courses = [
        _course(one, dataset=dataset, speed=speed, device_type=device_type, past=past)
        for one in spec.candidates or [spec]
    ]
    # auto's first method always runs to its end; whether others are tried at all, its mistakes decide.
    shares = [1.0] + [EXPECTED_HEAT] * len(courses[1:])
    usual = [(share * each.once, share * each.usual) for share, each in zip(shares, courses, strict=True)]
    low, seconds, high = (
        _within_budget(spec, methods)
        for methods in ([(courses[0].once, courses[0].fewest)], usual, [(each.once, each.most) for each in courses])
    )
    return Estimate(seconds, (low, high), max(each.peak_memory_bytes for each in courses))


def _within_budget(spec: TrainingSpec, methods: Sequence[tuple[float, float]]) -> float:
    """Seconds of methods one after the other. methods: of each, seconds outside of epochs, and of them.

    A budget bounds the epochs alone; under auto it is shared out, the rest of a method's time is paid from its share,
    and what comes after it is spent is not begun.
    """
    budget = math.inf if spec.budget_seconds is None else spec.budget_seconds
    if not spec.candidates:
        ((once, epochs),) = methods
        return once + min(epochs, budget)
    spent = 0.0
    for begun, (once, epochs) in enumerate(methods):
        if spent < budget:
            share = (budget - spent) / (len(methods) - begun)
            spent += once + min(epochs, max(0.0, share - once))
    return spent


@dataclass(frozen=True)
class _Course:
    """What one method takes. once: seconds outside of epochs; fewest, usual, most: seconds of its epochs."""

    once: float
    fewest: float
    usual: float
    most: float
    peak_memory_bytes: int


def _course(
    spec: TrainingSpec, *, dataset: DatasetFacts, speed: DeviceSpeed, device_type: str, past: Sequence[PastSpeed]
) -> _Course:
    values = spec.hyperparameters
    costs = stage_costs(spec.backbone.name, values.image_size)
    if values.feature_layer not in (None, ALL_LAYERS):
        # What lies behind the layer does not run.
        costs = costs[: BACKBONES[spec.backbone.name].stage_names.index(values.feature_layer) + 1]
    trainable = _trainable_stages(spec, len(costs))
    frozen, trained = costs[: len(costs) - trainable], costs[len(costs) - trainable :]
    # A pass that is made once has its batch-norms folded; epochs, with their validation, run the network as it is.
    frozen_once, once_through = (
        sum(_forward_seconds(c, c.pass_bytes, speed) for c in part) for part in (frozen, costs)
    )
    frozen_forward, forward = (
        sum(_forward_seconds(c, c.activation_bytes, speed) for c in part) for part in (frozen, costs)
    )
    training = VIEWS[spec.method] * max(sum(_training_seconds(cost, speed) for cost in trained), HEAD_SECONDS)
    images = dataset.train + dataset.val

    is_cached = _is_cached(spec)
    looking = _check_seconds(dataset, forward) if spec.method == "self_supervised" else forward * dataset.val
    is_seen = spec.method in FROZEN_METHODS and values.head_start != "random"
    # The conclusion, where what the head sees is not there from its start.
    once = looking if spec.method == "self_supervised" else once_through * dataset.val * (not is_seen)
    if values.head_start != "random":
        once += once_through * images
    if values.head_start == "probe":
        once += PROBE_SECONDS * dataset.train * len(dataset.classes)
    if values.head_start == "prototypes":
        once += _prototype_seconds(dataset.train, costs[-1].width)
    if is_cached:
        once += frozen_once * ((values.augmented_views or 0) * dataset.train + (images if trained else 0))
        train_image, looking = training, (forward - frozen_forward) * dataset.val
    else:
        train_image = max(frozen_forward + training, VIEWS[spec.method] * AUGMENT_SECONDS)
    kind = Kind.of(spec)
    known = next((p for p in past if p.kind == kind and p.images_per_second > 0), None)
    if known is None and spec.recipe == "modern" and trained and device_type == "cpu":
        once += PRECISION_IMAGES * (frozen_forward + training)
    epoch_seconds = dataset.train * train_image + looking
    if known is not None and not values.is_solved:
        factor = dataset.train / known.images_per_second / epoch_seconds
        epoch_seconds *= factor
        # Where nothing is kept, what was learned of the device's speed holds for the single passes too.
        once = once if is_cached else once * factor
    epochs = 0.0 if values.is_solved else float(values.epochs)
    patience = values.early_stopping_patience
    # Training goes on for `patience` epochs even if the first is the last that gains.
    fewest = epochs if patience is None else min(epochs, patience)
    return _Course(
        once=FIXED_SECONDS + once,
        fewest=fewest * epoch_seconds,
        usual=max(fewest, EXPECTED_SHARE * epochs) * epoch_seconds,
        most=epochs * epoch_seconds,
        peak_memory_bytes=_peak_bytes(
            spec, dataset=dataset, frozen=frozen, trained=trained, is_cached=is_cached, device_type=device_type
        ),
    )


def past_speeds(session: Session) -> list[PastSpeed]:
    """Of the latest jobs that succeeded here, newest first, as far as their data sets are there.

    By their epochs: the speed that a job shows is of the moment, and by its end mostly none.
    """
    epoch_seconds = select(func.avg(EpochRow.seconds)).where(EpochRow.job_id == JobRow.id).scalar_subquery()
    rows = session.execute(
        select(JobRow.spec, DatasetRow.splits, epoch_seconds)
        .join(DatasetRow, DatasetRow.id == JobRow.dataset_id)
        .where(JobRow.kind == JobKind.training, JobRow.status == JobStatus.succeeded)
        .order_by(JobRow.seq.desc())
        .limit(PAST_JOBS)
    )
    return [
        PastSpeed(Kind.of(TrainingSpec.model_validate(spec)), splits["train"] / seconds)
        for spec, splits, seconds in rows
        if seconds
    ]


@lru_cache(maxsize=8)
def measure(device: torch.device) -> DeviceSpeed:
    """The device's speed, measured once per process in about a tenth of a second."""
    images = torch.randn(8, 64, 56, 56, device=device).to(memory_format=torch.channels_last)
    weights = torch.randn(64, 64, 3, 3, device=device).to(memory_format=torch.channels_last)
    flops = 2 * 8 * 64 * 64 * 9 * 56 * 56
    # More than caches hold: with 32 MiB each the figure was one of two by chance, 29 or 57 GB/s on the same machine.
    values = torch.randn(16 * 1024**2, device=device)
    result = torch.empty_like(values)  # else the time would be the operating system's, for fresh pages
    with torch.inference_mode():
        convolution = _best_seconds(lambda: functional.conv2d(images, weights, padding=1), device)
        copy = _best_seconds(lambda: torch.clamp_min(values, 0.0, out=result), device)
    return DeviceSpeed(flops / convolution, 2 * FLOAT_BYTES * values.numel() / copy)


@lru_cache(maxsize=256)
def stage_costs(backbone_name: str, image_size: int) -> tuple[StageCost, ...]:
    """Each stage's cost for one image, counted on a network without memory of its own."""
    backbone = backbones.rewrap(backbone_name, backbones.hollow(backbone_name)).to("meta").eval()
    activations = torch.empty(1, 3, image_size, image_size, device="meta")
    costs = []
    with torch.no_grad():
        for stage, for_inference in zip(backbone.stages, folded(backbone).stages, strict=True):
            in_pass, _ = _run(for_inference, activations)
            with FlopCounterMode(display=False) as counter:
                kept, activations = _run(stage, activations)
            output = float(activations.numel() * FLOAT_BYTES)
            width = backbone.pool(activations).shape[1]
            costs.append(StageCost(float(counter.get_total_flops()), kept, in_pass, output, width))
    return tuple(costs)


def _run(stage: nn.Module, inputs: Tensor) -> tuple[float, Tensor]:
    """The bytes that a stage's layers put into memory, and its output; layers that work in place, or that are where a
    folded one was, add nothing."""
    outputs: list[int] = []
    with ExitStack() as hooks:
        for layer in stage.modules():
            works = not getattr(layer, "inplace", False) and not isinstance(layer, nn.Identity)
            if works and not any(layer.children()):
                handle = layer.register_forward_hook(lambda _layer, _inputs, output: outputs.append(output.numel()))
                hooks.callback(handle.remove)
        found = stage(inputs)
    return float(sum(outputs) * FLOAT_BYTES), found


def _forward_seconds(cost: StageCost, moved_bytes: float, speed: DeviceSpeed) -> float:
    arithmetic = FORWARD_ARITHMETIC * cost.flops / speed.flops_per_second
    return arithmetic + FORWARD_PASSES * moved_bytes / speed.bytes_per_second


def _training_seconds(cost: StageCost, speed: DeviceSpeed) -> float:
    arithmetic = TRAINING_ARITHMETIC * cost.flops / speed.flops_per_second
    return arithmetic + TRAINING_PASSES * cost.activation_bytes / speed.bytes_per_second


def _check_seconds(dataset: DatasetFacts, forward: float) -> float:
    """What self_supervised looks at after an epoch: features of both splits, and the loss of two views of one."""
    train, val = min(dataset.train, MAX_CHECKED), min(dataset.val, MAX_CHECKED)
    views = VIEWS["self_supervised"] * (val if val >= FEWEST_TOGETHER else train)
    return forward * (train + val) + max(forward, AUGMENT_SECONDS) * views


def _prototype_seconds(images: int, width: int) -> float:
    """Of worker/training/prototypes.py: adding up the scatter, and solving for images or features, the fewer ones."""
    return PROTOTYPE_FITS * PROTOTYPE_SECONDS * 2 * width * (images * width + 2 * min(images, width) ** 2)


def _prototype_bytes(images: int, width: int) -> float:
    """The features, those of all folds but one, and what is computed with in double precision."""
    doubles = PROTOTYPE_MATRICES * width**2 + PROTOTYPE_PARTS * min(images, PART_IMAGES) * width
    return 2 * FLOAT_BYTES * images * width + DOUBLE_BYTES * doubles


def _peak_bytes(
    spec: TrainingSpec,
    *,
    dataset: DatasetFacts,
    frozen: Sequence[StageCost],
    trained: Sequence[StageCost],
    is_cached: bool,
    device_type: str,
) -> int:
    values = spec.hyperparameters
    parameters = BACKBONES[spec.backbone.name].parameters
    # Stages are of unequal size; the later ones, which are trained, hold most parameters.
    share = 1.0 if not frozen else min(1.0, len(trained) / max(1, len(frozen) + len(trained)) * 3)
    states = 2 if values.optimizer == "adamw" else 1
    # Gradient, optimiser's state, best epoch's copy, moving average, and a copy while a checkpoint is written.
    per_trained = 1 + states + 1 + (values.ema > 0) + (1 + states)
    weights = parameters * FLOAT_BYTES * (1 + share * per_trained)
    images = dataset.train + dataset.val
    size = 3 * values.image_size**2 * FLOAT_BYTES
    # A pass keeps one stage's activations at a time; training keeps those of all trained stages. The larger counts.
    largest = max(
        [c.pass_bytes if is_cached else c.activation_bytes for c in frozen] + [c.activation_bytes for c in trained]
    )
    looking = min(pass_batch_size(device_type), images) * (largest + size)
    kept = sum(c.activation_bytes for c in trained)
    if frozen and not is_cached:
        kept += max(c.activation_bytes for c in frozen)
    training = VIEWS[spec.method] * min(values.batch_size, dataset.train) * (kept + size)
    activations = max(PASS_MEMORY * looking, TRAINING_MEMORY * training)
    # Of a whole backbone's output only the means over space are kept.
    stored = 0.0
    if is_cached and trained:
        stored = frozen[-1].output_bytes * ((values.augmented_views or 0) * dataset.train + images)
    if values.head_start == "prototypes":
        stored += _prototype_bytes(images, frozen[-1].width)
    context = CUDA_CONTEXT_BYTES if device_type == "cuda" else 0
    return math.ceil(PROCESS_BYTES + context + weights + activations + stored)


def _trainable_stages(spec: TrainingSpec, stages: int) -> int:
    if spec.method in FROZEN_METHODS:
        return 0
    return min(spec.hyperparameters.unfreeze or 1, stages) if spec.method == "fine_tuning" else stages


def _is_cached(spec: TrainingSpec) -> bool:
    """Whether what the frozen stages make of pictures is stored, and trained on."""
    values, backbone = spec.hyperparameters, BACKBONES[spec.backbone.name]
    stages = len(backbone.stage_names)
    trainable = _trainable_stages(spec, stages)
    if trainable == stages or (values.augmentation != "none" and values.augmented_views is None):
        return False
    # Boxes are cut from pictures, where activations have no rows and columns.
    return values.cutmix == 0 or (trainable > 0 and backbone.layout == "NCHW")


def _best_seconds(work: Callable[[], Tensor], device: torch.device) -> float:
    best = math.inf
    for _ in range(_MEASUREMENTS):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
