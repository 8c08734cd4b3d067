"""The story of one training job, from its claim to a registered model.

Open the data, get the weights, build, go on from a checkpoint if there is one, fit, evaluate, publish, register. A job
that ends early on request registers its best epoch; one that is to be given back leaves a checkpoint first.
"""

import json
import time
from collections.abc import Callable
from contextlib import closing
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
from worker.reporter import Reporter, ShuttingDown
from worker.training import loop, methods
from worker.training.checkpoint import Checkpoint, Checkpoints
from worker.training.features import FeatureCache
from worker.training.loop import EpochResult, Hooks, LoopState, Precision, StepProgress
from worker.training.methods import Conclusion, Surroundings, Training

_DOWNLOAD_EVENT_SECONDS = 2.0


def run_training(
    claim: Claim, *, settings: Settings, database: Database, storage: LocalStorage, reporter: Reporter
) -> None:
    """Raises GraftError for what can be explained to the job's user, and whatever the reporter raises."""
    spec = TrainingSpec.model_validate(claim.spec)
    reporter.progress("prepare", fraction=0.0, epoch=0, epochs=spec.hyperparameters.epochs)
    workbench = Workbench.open(spec, claim, settings=settings, storage=storage, reporter=reporter)
    publisher = Publisher(claim, database=database, storage=storage, reporter=reporter)
    if spec.candidates:
        _run_auto(spec, workbench, publisher)
    else:
        checkpoints = workbench.checkpoints()
        training = workbench.prepare(spec, checkpoints.newest(on_damaged=reporter.log), Share())
        workbench.fit(training, checkpoints, Share())
        reporter.progress("evaluate", fraction=1.0, eta_seconds=0.0)
        conclusion = methods.conclude(training, workbench.manifest, on_batch=reporter.tick)
        publisher.publish(training, conclusion, spec, role="final")
    workbench.checkpoints().drop_all()


def _run_auto(spec: TrainingSpec, workbench: Workbench, publisher: Publisher) -> None:
    def serve_probe(entry: Entry) -> None:
        if not publisher.is_published("probe"):
            publisher.publish(entry.training, entry.conclusion, entry.spec, role="probe")

    outcome = compete(spec, workbench, serve_probe=serve_probe)
    won, reporter = outcome.winner, workbench.reporter
    reporter.progress("evaluate", fraction=1.0, eta_seconds=0.0)
    # The test images, if there are any, are looked at now, when nothing is left to choose.
    won.training.classifier.to(workbench.device)
    conclusion = methods.conclude(won.training, workbench.manifest, on_batch=reporter.tick)
    reporter.log(outcome.reason, candidates=outcome.table)
    story = {"method": won.spec.method, "reason": outcome.reason, "candidates": outcome.table}
    publisher.publish(won.training, conclusion, won.spec, role="final", job_metrics=story)


def _publish(
    training: Training,
    conclusion: Conclusion,
    spec: TrainingSpec,
    claim: Claim,
    *,
    database: Database,
    storage: LocalStorage,
    reporter: Reporter,
) -> None:
    """Files first, whole and synced; then the model, the alias and the job's success in one transaction."""
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
    with storage.staging() as folder:
        saved = artifact.save(folder, result)
        (folder / "evaluation.json").write_text(json.dumps(conclusion.evaluation, ensure_ascii=False), "utf-8")
        storage.announce(key)
        storage.publish(folder, key)

    def register(session: Session) -> None:
        promotion = registry.should_promote(
            session,
            candidate_metrics=conclusion.metrics,
            candidate_classes=training.class_names,
            policy=spec.promote,
        )
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
        )
        if promotion.is_due:
            registry.point_alias(session, registry.DEFAULT_ALIAS, model_id)
        queue.record_log(session, claim, promotion.reason, promoted=promotion.is_due)
        queue.succeed(session, claim, model_id=model_id, metrics=conclusion.metrics)

    try:
        reporter.transaction(register)
    finally:
        # Asked of the database and not concluded from an exception: a commit may succeed and its answer get lost.
        with database.read() as session:
            is_registered = registry.exists(session, model_id)
        storage.settle(key, is_wanted=is_registered)


def _backbone_record(spec: TrainingSpec) -> dict[str, Any]:
    """The backbone as jobs and models show it; `model` only where an earlier model was the start."""
    return spec.backbone.model_dump(exclude_none=True) | {"weights": spec.backbone.weights}
