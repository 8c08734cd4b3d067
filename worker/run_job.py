"""The story of one training job, from its claim to a registered model.

Open the data, get the weights, build, go on from a checkpoint if there is one, fit, evaluate, publish, register. A job
that ends early on request registers its best epoch; one that is to be given back leaves a checkpoint first.
"""

from app.db.engine import Database
from app.jobs.queue import Claim
from app.jobs.spec import TrainingSpec
from app.settings import Settings
from app.storage import LocalStorage
from worker import lineage
from worker.publisher import Publisher
from worker.reporter import Reporter
from worker.run_auto import Entry, compete
from worker.training import methods, self_supervised
from worker.workbench import Share, Workbench


def run_training(
    claim: Claim, *, settings: Settings, database: Database, storage: LocalStorage, reporter: Reporter
) -> None:
    """Raises GraftError for what can be explained to the job's user, and whatever the reporter raises."""
    spec = TrainingSpec.model_validate(claim.spec)
    reporter.progress("prepare", fraction=0.0, epoch=0, epochs=spec.hyperparameters.epochs)
    seen = lineage.trained_on(start=spec.backbone.model, database=database, storage=storage)
    workbench = Workbench.open(
        spec, claim, settings=settings, storage=storage, reporter=reporter, seen_before=seen.digests
    )
    publisher = Publisher(claim, settings, database, storage, reporter)
    if spec.candidates:
        _run_auto(spec, workbench, publisher)
    else:
        _run_one(spec, workbench, publisher)
    workbench.checkpoints().drop_all()


def _run_one(spec: TrainingSpec, workbench: Workbench, publisher: Publisher) -> None:
    checkpoints = workbench.checkpoints()
    training = workbench.prepare(spec, checkpoints.newest(on_damaged=workbench.reporter.log), Share())
    workbench.fit(training, checkpoints, Share())
    workbench.reporter.progress("evaluate", fraction=1.0, eta_seconds=0.0)
    if spec.method == "self_supervised":
        conclusion = self_supervised.conclude(training, on_batch=workbench.reporter.tick)
    else:
        conclusion = methods.conclude(training, workbench.manifest, on_batch=workbench.reporter.tick)
    reference = workbench.reference(training, conclusion)
    publisher.publish(training, conclusion, spec, role="final", reference=reference)


def _run_auto(spec: TrainingSpec, workbench: Workbench, publisher: Publisher) -> None:
    def serve_probe(entry: Entry) -> None:
        if publisher.find("probe") is None:
            reference = workbench.reference(entry.training, entry.conclusion)
            publisher.publish(entry.training, entry.conclusion, entry.spec, role="probe", reference=reference)

    outcome = compete(spec, workbench, serve_probe=serve_probe)
    won, reporter = outcome.winner, workbench.reporter
    reporter.progress("evaluate", fraction=1.0, eta_seconds=0.0)
    # The test images, if there are any, are looked at now, when nothing is left to choose.
    won.training.classifier.to(workbench.device)
    conclusion = methods.conclude(won.training, workbench.manifest, on_batch=reporter.tick)
    reporter.log(outcome.reason, candidates=outcome.table)
    chosen = {"method": won.spec.method, "reason": outcome.reason, "candidates": outcome.table}
    reference = workbench.reference(won.training, conclusion)
    publisher.publish(won.training, conclusion, won.spec, role="final", reference=reference, job_metrics=chosen)
