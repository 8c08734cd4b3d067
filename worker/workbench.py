"""Where a training is set up and run: the data, the device, the network before training, the loop with its reports.

Used by both stories, of one method (run_job.py) and of several that compete (run_auto.py).
"""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import get_args

import torch

from app.datasets.ingest import ensure_packed, manifest_key
from app.datasets.manifest import Manifest
from app.errors import JobFailed
from app.jobs.queue import Claim
from app.jobs.spec import TrainingSpec
from app.settings import Settings
from app.storage import LocalStorage
from app.vision import artifact
from app.vision.classifier import Classifier
from app.vision.device import resolve_device
from app.vision.reference import Reference
from app.vision.weights import WeightStore
from worker.reporter import Reporter, ShuttingDown
from worker.training import loop, methods, self_supervised
from worker.training.checkpoint import Checkpoint, Checkpoints
from worker.training.features import FeatureCache
from worker.training.loop import Hooks, StepProgress
from worker.training.methods import Conclusion, Surroundings, Training
from worker.training.pixels import Images
from worker.training.precision import Precision
from worker.training.reference import fit_reference
from worker.training.state import EpochResult, LoopState

_DOWNLOAD_EVENT_SECONDS = 2.0
# How a training's progress is shared out: passes through frozen stages are all that a head which is solved for takes.
_SOLVED_PASSES, _OTHER_PASSES = 0.9, 0.1


@dataclass(frozen=True)
class Share:
    """The part of a job that a training is, so that progress and history go on where the one before ended.

    start, size: shares of the job's work, 0 to 1. epochs, steps: done before this training.
    """

    start: float = 0.0
    size: float = 1.0
    epochs: int = 0
    steps: int = 0
    method: str | None = None  # shown with the epochs where several methods compete

    def fraction(self, own: float) -> float:
        return self.start + self.size * own

    def part(self, start: float, end: float) -> "Share":
        """A part of it, from and to shares of its own work."""
        return replace(self, start=self.fraction(start), size=self.size * (end - start))


@dataclass(frozen=True)
class Workbench:
    claim: Claim
    settings: Settings
    storage: LocalStorage
    reporter: Reporter
    manifest: Manifest
    images: Images
    device: torch.device
    seen_before: frozenset[str]

    @classmethod
    def open(
        cls,
        spec: TrainingSpec,
        claim: Claim,
        *,
        settings: Settings,
        storage: LocalStorage,
        reporter: Reporter,
        seen_before: frozenset[str],
    ) -> "Workbench":
        """seen_before: digests of the pictures that the model to begin with was trained on, and those before it.

        Raises JobFailed for a data set whose files are gone or damaged, and what packing and the reporter raise.
        """
        try:
            manifest = Manifest.read(storage.path(manifest_key(claim.dataset_id)))
        except (OSError, ValueError) as error:
            raise JobFailed(
                "The data set's files are missing or damaged; delete it, upload it again and submit the job again.",
                code="dataset_unreadable",
            ) from error
        images = reporter.stored(
            lambda: ensure_packed(
                storage,
                claim.dataset_id,
                spec.preprocessing.side,
                tick=lambda _share: reporter.tick(),
            )
        )
        device = resolve_device(settings.device)
        return cls(claim, settings, storage, reporter, manifest, images, device, seen_before)

    def checkpoints(self, method: str | None = None) -> Checkpoints:
        """Of the job, or of one of the methods that compete in it."""
        job = self.claim.job_id
        return Checkpoints(self.storage, job_id=f"{job}/{method}" if method else job, fence=self.claim.fence)

    def prepare(self, spec: TrainingSpec, found: Checkpoint | None, share: Share) -> Training:
        """A training at its start, or where the checkpoint left it; tells which."""
        passes = share.part(0.0, _passes(spec))

        def on_features(done: int, of: int) -> None:
            self.reporter.progress("features", fraction=passes.fraction(done / of))

        prepare = self_supervised.prepare if spec.method == "self_supervised" else methods.prepare
        training = prepare(
            spec,
            classifier=self._build(spec),
            manifest=self.manifest,
            images=self.images,
            device=self.device,
            precision=found.numbers["precision"] if found else self._remembered_precision(spec),
            surroundings=Surroundings(
                cache=FeatureCache(self.storage, self.claim.dataset_id, self.settings.feature_cache_bytes),
                on_features=on_features,
                tick=self.reporter.tick,
                log=self.reporter.log,
            ),
        )
        training.seen_before = self.seen_before
        if training.solved is None:
            self._remember_precision(training.state.precision, spec)
        if found is not None:
            training.state.restore(found.tensors, found.numbers)
        self._announce(training, spec, is_resumed=found is not None)
        return training

    def fit(
        self,
        training: Training,
        checkpoints: Checkpoints,
        share: Share,
        *,
        is_enough: Callable[[], bool] = lambda: False,
    ) -> None:
        """Runs the loop to its end, or until is_enough says so after an epoch; then the state is finished.

        Asked to give the job back, leaves a checkpoint of the very step.
        """
        reporter = self.reporter
        share = share.part(_SOLVED_PASSES if training.solved else _OTHER_PASSES, 1.0)

        def on_progress(progress: StepProgress) -> bool:
            reporter.progress(
                "train",
                epoch=progress.epoch,
                epochs=progress.epochs,
                fraction=share.fraction(progress.fraction),
                images_per_second=progress.images_per_second,
                eta_seconds=progress.eta_seconds,
            )
            return reporter.stop_requested

        def save(state: LoopState) -> None:
            # A job that is to end early with its best epoch needs no checkpoint to go on from.
            if reporter.stored_unless_stopped(lambda: checkpoints.save(state.tensors(), state.numbers())):
                reporter.checkpoint(share.steps + state.total_steps)

        if training.solved is not None:
            self._record(training.solved, training.epochs, share)
            return
        hooks = Hooks(
            on_step=reporter.give_way,
            on_progress=on_progress,
            save=save,
            log=lambda message, details: reporter.log(message, **details),
        )
        reporter.progress("train")
        with closing(loop.fit(training.state, training.plan, hooks)) as epochs:
            while True:
                try:
                    result = next(epochs, None)
                    if result is None:
                        return
                    self._record(result, training.epochs, share)
                except ShuttingDown:
                    # Raised within the loop, whose state is whole again once it has been left, or beside it.
                    save(training.state)
                    raise
                if is_enough():
                    training.state.is_finished = True
                    save(training.state)
                    return

    def reference(self, training: Training, conclusion: Conclusion) -> Reference | None:
        """What the model's answers are held against; None for a backbone, which gives none."""
        return fit_reference(training, conclusion, self.manifest, on_batch=self.reporter.tick)

    def _build(self, spec: TrainingSpec) -> Classifier:
        """The network before training; weights not on this machine are downloaded, which is told as events."""
        # Labels, where there are some, are only to check a self-supervised backbone by.
        classes = 0 if spec.method == "self_supervised" else sum(self.manifest.class_counts)
        reporter = self.reporter
        if spec.backbone.model is not None:
            earlier = artifact.load(self.storage.path(f"models/{spec.backbone.model}")).classifier
            return methods.build_classifier(spec, classes, earlier=earlier)
        if spec.method == "from_scratch":
            return methods.build_classifier(spec, classes)
        store = WeightStore.from_settings(self.settings)
        found = store.obtain(spec.backbone.name, _download_events(spec.backbone.name, reporter))
        if found.weights.name != spec.backbone.weights:
            reporter.log(
                f"Training starts from the weights {found.weights.name}; {spec.backbone.weights} was there at "
                "submission."
            )
        return methods.build_classifier(spec, classes, state_dict=store.load(found))

    def _precision_key(self, spec: TrainingSpec) -> str:
        values = spec.hyperparameters
        trained = f"{spec.method}-{values.unfreeze}-{values.feature_layer}"
        return (
            f"precisions/{self.device.type}/{spec.recipe}/"
            f"{spec.backbone.name}-{trained}-{values.image_size}-{values.batch_size}"
        )

    def _remembered_precision(self, spec: TrainingSpec) -> Precision | None:
        """What was measured for the first job of this kind: a second measurement might fall out otherwise by chance,
        and the same spec would give another model."""
        path = self.storage.path(self._precision_key(spec))
        text = path.read_text("utf-8") if path.exists() else ""
        return next((precision for precision in get_args(Precision) if precision == text), None)

    def _remember_precision(self, precision: Precision, spec: TrainingSpec) -> None:
        key = self._precision_key(spec)
        if not self.storage.exists(key):
            self.reporter.stored(lambda: self._publish_text(precision, key))

    def _publish_text(self, text: str, key: str) -> None:
        with self.storage.staging() as staged:
            staged.write_text(text, "utf-8")
            self.storage.publish(staged, key)

    def _announce(self, training: Training, spec: TrainingSpec, *, is_resumed: bool) -> None:
        state = training.state
        if is_resumed:
            self.reporter.log(
                f"Going on from epoch {state.epoch}, step {state.step}.",
                epoch=state.epoch,
                step=state.step,
                total_steps=state.total_steps,
            )
            return
        for reason in spec.reasons:
            self.reporter.log(reason)
        self.reporter.log(
            f"Training {spec.backbone.name} ({spec.method}) on {len(training.plan.train)} images, validating on "
            f"{len(training.plan.val)}; {state.device.type}, {state.precision}.",
            device=str(state.device),
            precision=state.precision,
        )

    def _record(self, result: EpochResult, epochs: int, share: Share) -> None:
        self.reporter.epoch(
            {
                "epoch": share.epochs + result.epoch,
                "train_loss": result.train_loss,
                "train_accuracy": result.train_accuracy,
                "val_loss": result.val_loss,
                "val_accuracy": result.val_accuracy,
                "learning_rate": result.learning_rate,
                "seconds": result.seconds,
                "method": share.method,
                "figures": result.figures or None,
            },
            metrics={
                "val_accuracy": result.best_val_accuracy,
                "val_loss": result.best_val_loss,
                "best_epoch": result.best_epoch,
            },
            progress={
                "stage": "train",
                "epoch": result.epoch,
                "epochs": epochs,
                "fraction": share.fraction(result.epoch / epochs),
                "images_per_second": result.images_per_second,
                "eta_seconds": (epochs - result.epoch) * result.seconds,
            },
        )


def _passes(spec: TrainingSpec) -> float:
    return _SOLVED_PASSES if spec.hyperparameters.is_solved else _OTHER_PASSES


def _download_events(backbone: str, reporter: Reporter) -> Callable[[int, int | None], None]:
    next_event = 0.0

    def on_progress(done_bytes: int, total_bytes: int | None) -> None:
        nonlocal next_event
        reporter.progress("download")
        if time.monotonic() >= next_event or done_bytes == total_bytes:
            next_event = time.monotonic() + _DOWNLOAD_EVENT_SECONDS
            reporter.log(f"Downloading the weights of {backbone}.", bytes=done_bytes, total_bytes=total_bytes)

    return on_progress
