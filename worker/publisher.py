"""From a trained network to a registered model: files first, then the promotion gate, then one transaction."""

import json
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from sqlalchemy.orm import Session

from app import holdings, registry
from app.db.engine import Database
from app.db.tables import new_id
from app.jobs import queue
from app.jobs.queue import Claim
from app.jobs.spec import TrainingSpec
from app.settings import Settings
from app.storage import LocalStorage
from app.vision import artifact
from app.vision.artifact import Artifact, Saved
from app.vision.reference import Reference
from worker import promotion
from worker.promotion import Candidate, Decision
from worker.reporter import Reporter
from worker.training.compare import Predictions
from worker.training.methods import Conclusion, Training

Role = Literal["probe", "final"]


@dataclass(frozen=True)
class Publisher:
    """Registers the models of one claim: at most one of each role. The final one ends the job."""

    claim: Claim
    settings: Settings
    database: Database
    storage: LocalStorage
    reporter: Reporter

    def find(self, role: Role) -> str | None:
        """The id of the job's model of this role, where an earlier attempt or this one registered it."""
        with self.database.read() as session:
            return registry.find_of_job(session, self.claim.job_id, role=role)

    def publish(
        self,
        training: Training,
        conclusion: Conclusion,
        spec: TrainingSpec,
        *,
        role: Role,
        reference: Reference | None,
        job_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Files first, whole and synced; then the model, the alias and the job's success in one transaction.

        The comparison with the default, which may run it, comes before the transaction; should the default be another
        by then, the new model is compared with that one. reference: what its answers are held against; none for a
        backbone. job_metrics: shown with the job, beside the model's.
        """
        claim, database, storage, reporter = self.claim, self.database, self.storage, self.reporter
        outputs = [task.output for task in conclusion.tasks]
        classes = list(outputs[0].classes) if outputs else []
        model_id = new_id("mdl")
        key = f"models/{model_id}"
        result = Artifact(
            classifier=training.classifier.to("cpu"),
            classes=classes,
            preprocessing=training.preprocessing,
            temperature=outputs[0].temperature if outputs else 1.0,
            tasks=outputs if len(outputs) > 1 else [],
            support=training.support,
            reference=reference,
            metadata={
                "model": model_id,
                "job": claim.job_id,
                "dataset": claim.dataset_id,
                "spec": spec.model_dump(mode="json"),
                "metrics": conclusion.metrics,
                "torch": torch.__version__,
            },
        )
        probe = self.find("probe") if role == "final" else None
        # Before the files, which are worth nothing without it: the default may have to be run.
        decision = self._decide(conclusion, spec, training, probe=probe)

        def save() -> Saved:
            with storage.staging() as folder:
                saved = artifact.save(folder, result)
                (folder / "evaluation.json").write_text(json.dumps(conclusion.evaluation, ensure_ascii=False), "utf-8")
                storage.publish(folder, key)
                return saved

        def register(session: Session, saved: Saved, decision: Decision) -> bool:
            """False, with nothing written, if the default is no longer the one that was decided beside."""
            if registry.find_of_job(session, claim.job_id, role=role) == model_id:
                return True  # that it was registered was not heard of, when the database went away
            if registry.lock_default(session) != decision.incumbent:
                return False
            registry.register(
                session,
                model_id=model_id,
                job_id=claim.job_id,
                dataset_id=claim.dataset_id,
                method=spec.method,
                backbone=_backbone_record(spec),
                classes=classes,
                tasks=[{"name": each.name, "classes": list(each.classes)} for each in outputs if each.name],
                metrics=conclusion.metrics,
                size_bytes=saved.size_bytes,
                sha256=saved.sha256,
                role=role,
                promotion=decision.as_record(),
            )
            if decision.promoted:
                # A roll-back leads past this job's own probe, to what was served before the job.
                is_interim = probe is not None and decision.incumbent == probe
                registry.point_alias(session, registry.DEFAULT_ALIAS, model_id, replaces_interim=is_interim)
            queue.record_log(session, claim, decision.reason, promoted=decision.promoted, model=model_id)
            if role == "final":
                queue.succeed(
                    session,
                    claim,
                    model_id=model_id,
                    metrics=conclusion.metrics | (job_metrics or {}),
                    method=spec.method,
                )
            return True

        def save_and_register() -> None:
            nonlocal decision
            with storage.announced(key, is_wanted=partial(holdings.has_row, database)):
                saved = save()
                while not reporter.transaction(partial(register, saved=saved, decision=decision)):
                    decision = self._decide(conclusion, spec, training, probe=probe)

        reporter.stored(save_and_register)

    def _decide(self, conclusion: Conclusion, spec: TrainingSpec, training: Training, *, probe: str | None) -> Decision:
        if not conclusion.tasks:
            with self.database.read() as session:
                incumbent = registry.default_model_id(session)
            return Decision(False, "It is a backbone, to be started from: it has no classes to predict.", incumbent)
        candidate = Candidate(
            dataset_id=self.claim.dataset_id,
            start=spec.backbone.model,
            knows={task.output.name: frozenset(task.output.classes) for task in conclusion.tasks},
            predictions=Predictions.of_evaluation(conclusion.evaluation),
        )
        return self.reporter.stored(
            lambda: promotion.decide(
                candidate,
                policy=spec.promote,
                database=self.database,
                storage=self.storage,
                device=training.state.device,
                tick=self.reporter.tick,
                interim=probe,
            )
        )


def _backbone_record(spec: TrainingSpec) -> dict[str, Any]:
    """The backbone as jobs and models show it; `model` only where an earlier model was the start."""
    return spec.backbone.model_dump(exclude_none=True) | {"weights": spec.backbone.weights}
