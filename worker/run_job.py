"""The story of one training job, from its claim to a registered model.

Open the data, get the weights, build, go on from a checkpoint if there is one, fit, evaluate, publish, register. A job
that ends early on request registers its best epoch; one that is to be given back leaves a checkpoint first.
"""

import json
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any, get_args

import torch
from sqlalchemy.orm import Session

from app import registry
from app.datasets.ingest import IngestLimits, ensure_packed, manifest_key
from app.datasets.manifest import Manifest
from app.db.engine import Database
from app.db.tables import new_id
from app.errors import JobFailed
from app.jobs import queue
from app.jobs.queue import Claim
from app.jobs.spec import TrainingSpec
from app.settings import Settings
from app.storage import LocalStorage
from app.vision import artifact
from app.vision.artifact import Artifact
from app.vision.classifier import Classifier
from app.vision.device import resolve_device
from app.vision.weights import WeightStore
from worker import promotion
from worker.promotion import Candidate, Decision
from worker.reporter import Reporter, ShuttingDown
from worker.training import loop, methods
from worker.training.checkpoint import Checkpoint, Checkpoints
from worker.training.compare import Predictions
from worker.training.loop import EpochResult, Hooks, LoopState, Precision, StepProgress
from worker.training.methods import Conclusion, Training

_DOWNLOAD_EVENT_SECONDS = 2.0


def run_training(
    claim: Claim, *, settings: Settings, database: Database, storage: LocalStorage, reporter: Reporter
) -> None:
    """Raises GraftError for what can be explained to the job's user, and whatever the reporter raises."""
    spec = TrainingSpec.model_validate(claim.spec)
    reporter.progress("prepare", fraction=0.0, epoch=0, epochs=spec.hyperparameters.epochs)
    manifest = _read_manifest(storage, claim.dataset_id)
    images = ensure_packed(
        storage,
        claim.dataset_id,
        spec.preprocessing.side,
        limits=IngestLimits.from_settings(settings),
        tick=lambda _share: reporter.tick(),
    )
    classifier = _build(spec, len(manifest.classes), settings=settings, storage=storage, reporter=reporter)
    checkpoints = Checkpoints(storage, job_id=claim.job_id, fence=claim.fence)
    found = checkpoints.newest(on_damaged=reporter.log)
    device = resolve_device(settings.device)
    training = methods.prepare(
        spec,
        classifier=classifier,
        manifest=manifest,
        images=images,
        device=device,
        precision=found.numbers["precision"] if found else _remembered_precision(spec, device, storage),
    )
    _remember_precision(training.state.precision, spec, device, storage)
    _announce(training, spec, found, reporter)
    _fit(training, checkpoints, reporter)
    reporter.progress("evaluate", fraction=1.0, eta_seconds=0.0)
    conclusion = methods.conclude(training, manifest, on_batch=reporter.tick)
    _publish(
        training, conclusion, spec, claim, settings=settings, database=database, storage=storage, reporter=reporter
    )
    checkpoints.drop_all()


def _read_manifest(storage: LocalStorage, dataset_id: str) -> Manifest:
    try:
        return Manifest.read(storage.path(manifest_key(dataset_id)))
    except (OSError, ValueError) as error:
        raise JobFailed(
            "The data set's files are missing or damaged; delete it, upload it again and submit the job again.",
            code="dataset_unreadable",
        ) from error


def _build(
    spec: TrainingSpec, class_count: int, *, settings: Settings, storage: LocalStorage, reporter: Reporter
) -> Classifier:
    """The network before training; weights that are not on this machine are downloaded, which is told as events."""
    if spec.backbone.model is not None:
        earlier = artifact.load(storage.path(f"models/{spec.backbone.model}")).classifier
        return methods.build_classifier(spec, class_count, earlier=earlier)
    if spec.method == "from_scratch":
        return methods.build_classifier(spec, class_count)
    store = WeightStore.from_settings(settings)
    found = store.obtain(spec.backbone.name, _download_events(spec.backbone.name, reporter))
    if found.weights.name != spec.backbone.weights:
        reporter.log(
            f"Training starts from the weights {found.weights.name}; {spec.backbone.weights} was there at submission."
        )
    return methods.build_classifier(spec, class_count, state_dict=store.load(found))


def _precision_key(spec: TrainingSpec, device: torch.device) -> str:
    values = spec.hyperparameters
    trained = f"{spec.method}-{values.unfreeze}-{values.feature_layer}"
    return (
        f"precisions/{device.type}/{spec.recipe}/{spec.backbone.name}-{trained}-{values.image_size}-{values.batch_size}"
    )


def _remembered_precision(spec: TrainingSpec, device: torch.device, storage: LocalStorage) -> Precision | None:
    """What was measured for the first job of this kind: a second measurement might fall out otherwise by chance, and
    the same spec would give another model."""
    path = storage.path(_precision_key(spec, device))
    text = path.read_text("utf-8") if path.exists() else ""
    return next((precision for precision in get_args(Precision) if precision == text), None)


def _remember_precision(precision: Precision, spec: TrainingSpec, device: torch.device, storage: LocalStorage) -> None:
    key = _precision_key(spec, device)
    if not storage.exists(key):
        with storage.staging() as staged:
            staged.write_text(precision, "utf-8")
            storage.publish(staged, key)


def _download_events(backbone: str, reporter: Reporter) -> Callable[[int, int | None], None]:
    next_event = 0.0

    def on_progress(done_bytes: int, total_bytes: int | None) -> None:
        nonlocal next_event
        reporter.progress("download")
        if time.monotonic() >= next_event or done_bytes == total_bytes:
            next_event = time.monotonic() + _DOWNLOAD_EVENT_SECONDS
            reporter.log(f"Downloading the weights of {backbone}.", bytes=done_bytes, total_bytes=total_bytes)

    return on_progress


def _announce(training: Training, spec: TrainingSpec, found: Checkpoint | None, reporter: Reporter) -> None:
    """Restores the checkpoint, and tells what is about to be done."""
    state = training.state
    if found is not None:
        state.restore(found.tensors, found.numbers)
        reporter.log(
            f"Going on from epoch {state.epoch}, step {state.step}.",
            epoch=state.epoch,
            step=state.step,
            total_steps=state.total_steps,
        )
        return
    for reason in spec.reasons:
        reporter.log(reason)
    reporter.log(
        f"Training {spec.backbone.name} ({spec.method}) on {len(training.plan.train)} images, validating on "
        f"{len(training.plan.val)}; {state.device.type}, {state.precision}.",
        device=str(state.device),
        precision=state.precision,
    )


def _fit(training: Training, checkpoints: Checkpoints, reporter: Reporter) -> None:
    """Runs the loop to its end; asked to give the job back, leaves a checkpoint of the very step."""

    def on_progress(progress: StepProgress) -> bool:
        reporter.progress(
            "train",
            epoch=progress.epoch,
            epochs=progress.epochs,
            fraction=progress.fraction,
            images_per_second=progress.images_per_second,
            eta_seconds=progress.eta_seconds,
        )
        return reporter.stop_requested

    def save(state: LoopState) -> None:
        checkpoints.save(state.tensors(), state.numbers())
        reporter.checkpoint(state.total_steps)

    hooks = Hooks(on_progress=on_progress, save=save, log=lambda message, details: reporter.log(message, **details))
    reporter.progress("train")
    with closing(loop.fit(training.state, training.plan, hooks)) as epochs:
        while True:
            try:
                result = next(epochs, None)
            except ShuttingDown:
                # Raised within the loop, whose state is whole again once it has been left.
                save(training.state)
                raise
            if result is None:
                return
            _record(result, training.plan.epochs, reporter)


def _record(result: EpochResult, epochs: int, reporter: Reporter) -> None:
    reporter.epoch(
        {
            "epoch": result.epoch,
            "train_loss": result.train_loss,
            "train_accuracy": result.train_accuracy,
            "val_loss": result.val_loss,
            "val_accuracy": result.val_accuracy,
            "learning_rate": result.learning_rate,
            "seconds": result.seconds,
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
            "fraction": result.epoch / epochs,
            "images_per_second": result.images_per_second,
            "eta_seconds": (epochs - result.epoch) * result.seconds,
        },
    )


def _publish(
    training: Training,
    conclusion: Conclusion,
    spec: TrainingSpec,
    claim: Claim,
    *,
    settings: Settings,
    database: Database,
    storage: LocalStorage,
    reporter: Reporter,
) -> None:
    """Files first, whole and synced; then the model, the alias and the job's success in one transaction.

    The comparison with the default, which may run it, comes before the transaction; should the default be another by
    then, the new model is compared with that one.
    """
    model_id = new_id("mdl")
    key = f"models/{model_id}"
    classifier = training.classifier.to("cpu")
    result = Artifact(
        classifier=classifier,
        classes=training.class_names,
        preprocessing=training.preprocessing,
        temperature=conclusion.temperature,
        metadata={
            "model": model_id,
            "job": claim.job_id,
            "dataset": claim.dataset_id,
            "spec": spec.model_dump(mode="json"),
            "metrics": conclusion.metrics,
            "torch": torch.__version__,
        },
    )
    candidate = Candidate(
        dataset_id=claim.dataset_id,
        start=spec.backbone.model,
        classes=training.class_names,
        predictions=Predictions.from_record(conclusion.evaluation["predictions"]),
    )

    def decide() -> Decision:
        return promotion.decide(
            candidate,
            policy=spec.promote,
            database=database,
            storage=storage,
            device=training.state.device,
            limits=IngestLimits.from_settings(settings),
            tick=reporter.tick,
        )

    # Before the files, since a default that is run takes longer than an announcement is meant to last.
    decision = decide()
    with storage.staging() as folder:
        saved = artifact.save(folder, result)
        (folder / "evaluation.json").write_text(json.dumps(conclusion.evaluation, ensure_ascii=False), "utf-8")
        storage.announce(key)
        storage.publish(folder, key)

    def register(session: Session, decision: Decision) -> bool:
        """False, with nothing written, if the default is no longer the one that was decided beside."""
        if registry.lock_default(session) != decision.incumbent:
            return False
        registry.register(
            session,
            model_id=model_id,
            job_id=claim.job_id,
            dataset_id=claim.dataset_id,
            method=spec.method,
            backbone=_backbone_record(spec),
            classes=training.class_names,
            metrics=conclusion.metrics,
            size_bytes=saved.size_bytes,
            sha256=saved.sha256,
            promotion=decision.as_record(),
        )
        if decision.promoted:
            registry.point_alias(session, registry.DEFAULT_ALIAS, model_id)
        queue.record_log(session, claim, decision.reason, promoted=decision.promoted)
        queue.succeed(session, claim, model_id=model_id, metrics=conclusion.metrics)
        return True

    try:
        while not reporter.transaction(partial(register, decision=decision)):
            decision = decide()
    finally:
        # Asked of the database and not concluded from an exception: a commit may succeed and its answer get lost.
        with database.read() as session:
            is_registered = registry.exists(session, model_id)
        storage.settle(key, is_wanted=is_registered)


def _backbone_record(spec: TrainingSpec) -> dict[str, Any]:
    """The backbone as jobs and models show it; `model` only where an earlier model was the start."""
    return spec.backbone.model_dump(exclude_none=True) | {"weights": spec.backbone.weights}
