"""Method self_supervised: a backbone from pictures without labels, and whether it is learning or collapsing.

VICReg (Bardes, Ponce and LeCun 2022): two random views of a picture are to have the same features, while over the batch
every feature is to vary and no two of them alike. It needs no second network, no predictor and no large batch. Chosen
by measurement: on two sets it was the one of three that did not lose what the weights at the start knew
(decision 11). The checks are the spread of the features, and where there are labels the accuracy of the nearest
neighbours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from app.datasets.manifest import Manifest
from app.jobs.request import FEWEST_TOGETHER, MAX_CHECKED
from app.jobs.spec import TrainingSpec
from app.vision.backbones import Backbone
from app.vision.classifier import Classifier
from worker.training.loop import Plan
from worker.training.methods import (
    Conclusion,
    SplitPixels,
    Surroundings,
    Training,
    normaliser,
    place,
    schedule_for,
)
from worker.training.optim import build_optimizer
from worker.training.pixels import (
    CPU,
    VIEW,
    Batch,
    Images,
    Kept,
    PixelSource,
    Split,
    ordered_batches,
    random_stream,
)
from worker.training.precision import Precision, choose_precision
from worker.training.state import LoopState, Measured
from worker.training.tasks import Tasks, of_task

EXPANDED_WIDTH = 512
# The paper's 25, 25 and 1, over 25.
COVARIANCE_WEIGHT = 0.04
NEIGHBOURS, NEIGHBOUR_TEMPERATURE = 20, 0.07  # Wu et al. 2018
# Below this share of an even spread, features have collapsed to a few directions.
COLLAPSED_STD = 0.1


class VICReg(nn.Module):
    """A backbone with the expander that it is trained with, and that is then left behind."""

    def __init__(self, backbone: Backbone, *, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.expander = nn.Sequential(
                nn.Linear(backbone.feature_width, EXPANDED_WIDTH),
                nn.BatchNorm1d(EXPANDED_WIDTH),
                nn.ReLU(inplace=True),
                nn.Linear(EXPANDED_WIDTH, EXPANDED_WIDTH),
            )

    def train(self, mode: bool = True) -> Self:
        """The backbone's batch-norms keep the statistics that it began with.

        Those of small random crops are others than those of whole pictures, and what the start knew is lost to them
        (decision 11).
        """
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, views: Tensor) -> Tensor:
        """views: float32 (N, 2, 3, S, S), N > 1. Returns losses, (N,), whose mean is the batch's."""
        images = torch.cat([views[:, 0], views[:, 1]]).contiguous(memory_format=torch.channels_last)
        first, second = self.expander(self.backbone(images)).float().chunk(2)
        apart = (first - second).square().mean(1)
        # Of the batch as a whole, so the same for all of its pictures.
        narrow = (_narrowness(first) + _narrowness(second)) / 2
        alike = _covariance(first) + _covariance(second)
        losses: Tensor = apart + narrow + COVARIANCE_WEIGHT * alike
        return losses


def _narrowness(expanded: Tensor) -> Tensor:
    """How far each number's standard deviation over the batch stays below 1."""
    return functional.relu(1 - (expanded.var(0) + 1e-4).sqrt()).mean()


def _covariance(expanded: Tensor) -> Tensor:
    """Sum of the squared covariances of different numbers, over how many numbers there are."""
    centred = expanded - expanded.mean(0)
    covariance = centred.T @ centred / (len(centred) - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / expanded.shape[1]


@dataclass(frozen=True)
class TwoViews:
    """Batches of two random views of each picture: uint8 (N, 2, 3, S, S)."""

    pixels: PixelSource
    is_light = False

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.pixels.labels

    def __len__(self) -> int:
        return len(self.pixels)

    def training_batch(
        self, positions: NDArray[np.int64], *, seed: int, epoch: int, step: int, device: torch.device = CPU
    ) -> Batch:
        first = self.pixels.training_batch(positions, seed=seed, epoch=epoch, step=step, device=device)
        # A stream of its own, so that the two differ: seeds of other views begin where no epoch's do.
        other = int(random_stream(seed, VIEW, epoch, step).integers(2**31, 2**32))
        second = self.pixels.training_batch(positions, seed=other, epoch=epoch, step=step, device=device)
        return Batch(torch.stack([first.inputs, second.inputs], dim=1), first.labels)

    def batch(self, positions: NDArray[np.int64], *, device: torch.device = CPU) -> Batch:
        return self.pixels.batch(positions, device=device)

    def keeping(self, kept: Kept) -> "TwoViews":
        return TwoViews(self.pixels.keeping(kept))


def prepare(
    spec: TrainingSpec,
    *,
    classifier: Classifier,
    manifest: Manifest,
    images: Images,
    device: torch.device,
    precision: Precision | None = None,
    surroundings: Surroundings | None = None,
) -> Training:
    """As methods.prepare. classifier: without classes; its backbone is what is trained."""
    del surroundings  # nothing is frozen
    values = spec.hyperparameters
    place(classifier, device)
    pixels = SplitPixels(spec, manifest, images)
    train, val = pixels.source("train"), pixels.source("val")
    classifier.train()
    if precision is None:
        precision = choose_precision(
            classifier.backbone,
            normaliser(spec.preprocessing),
            image_size=spec.preprocessing.crop,
            batch_size=values.batch_size,
            seed=spec.seed,
        )
    network = VICReg(classifier.backbone, seed=spec.seed).to(device)
    optimizer = build_optimizer(
        [
            (network.expander, values.learning_rate),
            (network.backbone, values.backbone_learning_rate or values.learning_rate),
        ],
        optimizer="sgd" if values.optimizer == "sgd" else "adamw",
        momentum=values.momentum,
        weight_decay=values.weight_decay,
        device_type=device.type,
    )
    state = LoopState.begin(network, optimizer, precision=precision, ema=0.0)
    checks = _Checks(state, train, val, normaliser(spec.preprocessing), spec.seed)
    plan = Plan(
        train=TwoViews(train),
        val=val,
        tasks=Tasks.of(manifest),
        epochs=values.epochs,
        batch_size=values.batch_size,
        seed=spec.seed,
        schedule=schedule_for(values, images=len(train), fewest=FEWEST_TOGETHER),
        normalise=normaliser(spec.preprocessing),
        budget_seconds=spec.budget_seconds,
        fewest=FEWEST_TOGETHER,
        measure=checks.measure,
    )
    return Training(classifier, plan, state, train, val, None, spec.preprocessing)


def conclude(training: Training, *, on_batch: Callable[[], None] = lambda: None) -> Conclusion:
    """Loads the last epoch's weights, and says what they are worth."""
    training.state.load_best()
    assert training.plan.measure is not None and training.state.best is not None
    found = training.plan.measure(on_batch)
    metrics: dict[str, Any] = {
        **training.state.outcome,
        "val_loss": found.loss,
        **found.figures,
        "warning": _COLLAPSE if found.figures["feature_std"] < COLLAPSED_STD else None,
    }
    return Conclusion(metrics=metrics, evaluation={})


_COLLAPSE = (
    "The features have collapsed: all pictures look alike to this backbone. Train it with a smaller learning_rate or "
    "on more varied pictures."
)


@dataclass(frozen=True)
class _Checks:
    """What is looked at after each epoch: a fixed part of the pictures, validation's where there are enough."""

    state: LoopState
    train: PixelSource
    val: PixelSource
    normalise: Callable[[Tensor], Tensor]
    seed: int

    def measure(self, on_batch: Callable[[], None]) -> Measured:
        network = self.state.network
        assert isinstance(network, VICReg)
        network.eval()
        trained_on, held_out = _part(self.train), _part(self.val)
        train = self._features(trained_on, on_batch)
        val = self._features(held_out, on_batch) if len(held_out) else train
        # The loss and the spread are of pictures together, and a few say nothing of either.
        is_enough = len(held_out) >= FEWEST_TOGETHER
        figures = {"feature_std": feature_std(val if is_enough else train)}
        # By the first of several tasks, where all are labelled.
        known, truth = of_task(trained_on.labels, 0), of_task(held_out.labels, 0)
        if len(truth) and (known >= 0).all() and (truth >= 0).all():
            figures["knn_accuracy"] = knn_accuracy(train, known, val, truth, int(known.max()) + 1)
        return Measured(self._loss(held_out if is_enough else trained_on, on_batch), None, figures)

    def _features(self, source: PixelSource, on_batch: Callable[[], None]) -> Tensor:
        network = self.state.network
        assert isinstance(network, VICReg)
        found = []
        with torch.inference_mode():
            for batch in ordered_batches(source, batch_size=_BATCH, device=self.state.device):
                inputs = self.normalise(batch.inputs.to(self.state.device, non_blocking=True))
                found.append(network.backbone(inputs).float().cpu())
                on_batch()
        return torch.cat(found)

    def _loss(self, source: PixelSource, on_batch: Callable[[], None]) -> float:
        """Of two views of each picture, the same ones every time."""
        views, total = TwoViews(source), 0.0
        # In even parts: one of a single picture would have no variance.
        parts = np.array_split(np.arange(len(source)), math.ceil(len(source) / _BATCH))
        with torch.inference_mode():
            for step, positions in enumerate(parts):
                batch = views.training_batch(positions, seed=self.seed, epoch=0, step=step, device=self.state.device)
                total += float(self.state.network(self.normalise(batch.inputs)).sum())
                on_batch()
        return total / len(source)


_BATCH = 32


def _part(source: PixelSource) -> PixelSource:
    """The first pictures of a fixed shuffle, as many as are looked at."""
    if len(source) <= MAX_CHECKED:
        return source
    chosen = np.sort(np.random.default_rng(0).permutation(len(source))[:MAX_CHECKED])
    split = source.split
    return PixelSource(Split(split.images, split.indices[chosen], split.labels[chosen]), source.augment, source.prepare)


def feature_std(features: Tensor) -> float:
    """Mean standard deviation of normalised features over pictures, times the root of their width: float32 (N, D).

    1 where the pictures spread evenly over the sphere, 0 where all are the same (Chen and He 2021, figure 2).
    """
    if len(features) < 2:
        return 0.0
    return float(functional.normalize(features, dim=1).std(0).mean() * features.shape[1] ** 0.5)


def knn_accuracy(
    features: Tensor, labels: NDArray[np.int64], new: Tensor, truth: NDArray[np.int64], class_count: int
) -> float:
    """Of the nearest training pictures' votes, weighted by similarity. features: (N, D); new: (M, D)."""
    similar = functional.normalize(new, dim=1) @ functional.normalize(features, dim=1).T
    nearest, who = similar.topk(min(NEIGHBOURS, len(features)), dim=1)
    votes = torch.zeros(len(new), class_count)
    votes.scatter_add_(1, torch.from_numpy(labels)[who], (nearest / NEIGHBOUR_TEMPERATURE).exp())
    return float((votes.argmax(1) == torch.from_numpy(truth)).double().mean())
