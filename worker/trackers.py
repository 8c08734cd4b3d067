"""Training jobs as runs of MLflow and TensorBoard, where the settings name them: what was asked, each epoch, the end.

Each tracker has a thread of its own, so that one which is slow, or not there, keeps no job waiting: that is logged
once, what could not be told is told with what comes next, and what is left at the job's end is lost after a few
seconds. The job itself, its history and its metrics are in the database as ever.
"""

import contextlib
import importlib
import os
import queue as threads
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import structlog

from app.db.engine import Database
from app.db.tables import JobRow
from app.errors import NotFound
from app.jobs import queue
from app.jobs.queue import Claim
from app.jobs.states import JobKind, JobStatus
from app.settings import Settings
from worker.reporter import DATABASE_ERRORS

# What a tracker has to take the last epochs and the end; the worker's next job waits for it. A short job has ended
# before MLflow's client is imported: that takes two seconds, and on a busy machine many.
LAST_WORD_SECONDS = 20.0
# Between two tries of one that failed.
RETRY_SECONDS = 2.0

# For MLflow's client. Its own limits are minutes: what it gives up, we try again. It would tell its makers of its use.
MLFLOW_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
MLFLOW_EXPERIMENT = "graft"
MLFLOW_METRICS_AT_ONCE = 1000  # the most that its API takes
MLFLOW_ENDINGS = {
    JobStatus.succeeded: "FINISHED",
    JobStatus.failed: "FAILED",
    JobStatus.cancelled: "KILLED",
}

FIGURES = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate", "seconds")

Epoch = Mapping[str, Any]

log = structlog.get_logger(__name__)


class Sink(Protocol):
    """One tracker's run of one job. Used from one thread; may raise anything."""

    def epochs(self, epochs: Sequence[Epoch]) -> None: ...

    def end(self, job: JobRow) -> None:
        """job: as it was left; queued again, it is gone on with by another process."""


class Trackers:
    """An Observer that tells every tracker that is configured, from `with` to the end of its block."""

    def __init__(self, claim: Claim, settings: Settings, database: Database) -> None:
        self._claim = claim
        self._database = database
        self._tellers: list[_Teller] = []
        if claim.kind is JobKind.training:
            if settings.mlflow_tracking_uri:
                uri = settings.mlflow_tracking_uri
                self._tellers.append(_Teller("mlflow", lambda: MlflowRun(uri, claim, self._find)))
            if settings.tensorboard_dir is not None:
                folder = settings.tensorboard_dir / claim.job_id
                self._tellers.append(_Teller("tensorboard", lambda: TensorBoardRun(folder, claim)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        job = self._find(self._claim.job_id) if self._tellers else None
        for teller in self._tellers:
            teller.end(job)
        deadline = time.monotonic() + LAST_WORD_SECONDS
        for teller in self._tellers:
            teller.wait(deadline - time.monotonic())

    def stage(self, stage: str) -> None:
        """Of no interest to them."""

    def epoch(self, epoch: Epoch) -> None:
        for teller in self._tellers:
            teller.epoch(epoch)

    def _find(self, job_id: str) -> JobRow | None:
        with contextlib.suppress(NotFound, *DATABASE_ERRORS), self._database.read() as session:
            return queue.find(session, job_id)
        return None


class _Teller:
    """Tells one tracker, in a thread of its own, in order and until it has heard."""

    def __init__(self, name: str, open_sink: Callable[[], Sink]) -> None:
        self._name = name
        self._open_sink = open_sink
        self._sink: Sink | None = None
        self._said: threads.SimpleQueue[Epoch | None] = threads.SimpleQueue()
        self._job: JobRow | None = None
        self._has_failed = False
        self._has_told_all = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def epoch(self, epoch: Epoch) -> None:
        self._said.put(dict(epoch))

    def end(self, job: JobRow | None) -> None:
        """job: None if nobody can tell any more how it ended."""
        self._job = job
        self._said.put(None)

    def wait(self, seconds: float) -> None:
        self._thread.join(max(0.0, seconds))
        if not self._has_told_all:
            log.warning("tracker_incomplete", tracker=self._name)

    def _work(self) -> None:
        untold: list[Epoch] = []
        is_over = False
        while not is_over:
            is_over, is_last_try = self._listen(untold), False
            while not self._try(untold, is_over=is_over):
                if is_last_try:
                    return
                is_last_try = is_over
                is_over = self._listen(untold, within_seconds=RETRY_SECONDS) or is_over
            untold.clear()
        self._has_told_all = True

    def _listen(self, untold: list[Epoch], *, within_seconds: float | None = None) -> bool:
        """Adds what is said next, and what has been said by then. Returns whether that was all."""
        with contextlib.suppress(threads.Empty):
            said = self._said.get(timeout=within_seconds)
            while said is not None:
                untold.append(said)
                said = self._said.get_nowait()
            return True
        return False

    def _try(self, epochs: Sequence[Epoch], *, is_over: bool) -> bool:
        try:
            self._sink = self._sink or self._open_sink()
            if epochs:
                self._sink.epochs(epochs)
            if is_over and self._job is not None:
                self._sink.end(self._job)
        except Exception as error:  # noqa: BLE001 (somebody else's program: whatever it raises is no matter of the job's)
            if not self._has_failed:
                log.warning("tracker_failed", tracker=self._name, error=type(error).__name__, reason=_first_line(error))
            self._has_failed = True
            return False
        return True


class MlflowRun:
    """A run in the experiment `graft`, or in the one that MLFLOW_EXPERIMENT_NAME says; found again by its job's id."""

    def __init__(self, tracking_uri: str, claim: Claim, find_job: Callable[[str], JobRow | None]) -> None:
        for name, value in MLFLOW_DEFAULTS.items():
            os.environ.setdefault(name, value)
        tracking, self._entities = _imported("mlflow.tracking", "mlflow.entities", extra="mlflow")
        self._client = tracking.MlflowClient(tracking_uri=tracking_uri)
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", MLFLOW_EXPERIMENT))
        self._run_id = self._find_or_make(experiment, claim)
        self._end_forgotten(experiment, find_job)

    def epochs(self, epochs: Sequence[Epoch]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._entities.Metric(name, value, now, epoch["epoch"])
            for epoch in epochs
            for name, value in _figures(epoch).items()
        ]
        for start in range(0, len(metrics), MLFLOW_METRICS_AT_ONCE):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + MLFLOW_METRICS_AT_ONCE])

    def end(self, job: JobRow) -> None:
        self._end(self._run_id, job)

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))

    def _find_or_make(self, experiment: str, claim: Claim) -> str:
        found = self._client.search_runs([experiment], f"tags.`graft.job` = '{claim.job_id}'", max_results=1)
        if found:
            self._client.update_run(found[0].info.run_id, status="RUNNING")
            return str(found[0].info.run_id)
        tags = {"graft.job": claim.job_id, "graft.dataset": claim.dataset_id}
        run = self._client.create_run(experiment, tags=tags, run_name=claim.job_id)
        params = [self._entities.Param(name, str(value)) for name, value in _parameters(claim).items()]
        self._client.log_batch(run.info.run_id, params=params)
        return str(run.info.run_id)

    def _end_forgotten(self, experiment: str, find_job: Callable[[str], JobRow | None]) -> None:
        """Ends runs that look as if they went on, whose process was killed and whose job has ended since."""
        for run in self._client.search_runs([experiment], "attributes.status = 'RUNNING'", max_results=100):
            job = find_job(run.data.tags.get("graft.job", ""))
            if job is not None:
                self._end(run.info.run_id, job)

    def _end(self, run_id: str, job: JobRow) -> None:
        status = JobStatus(job.status)
        if not status.is_final:
            return
        now = int(time.time() * 1000)
        last = [self._entities.Metric(f"final_{name}", value, now, 0) for name, value in _metrics(job).items()]
        tags = [self._entities.RunTag("graft.model", job.model_id)] if job.model_id else []
        self._client.log_batch(run_id, metrics=last, tags=tags)
        self._client.set_terminated(run_id, MLFLOW_ENDINGS[status])


class TensorBoardRun:
    """A folder of event files; an attempt after a crash takes the place of what the one before said from there on."""

    def __init__(self, folder: Path, claim: Claim) -> None:
        (self._tensorboard,) = _imported("torch.utils.tensorboard", extra="tensorboard")
        self._folder = folder
        self._claim = claim
        self._writer: Any = None

    def epochs(self, epochs: Sequence[Epoch]) -> None:
        if self._writer is None:
            self._writer = self._tensorboard.SummaryWriter(str(self._folder), purge_step=epochs[0]["epoch"])
        for epoch in epochs:
            for name, value in _figures(epoch).items():
                side, _, figure = name.partition("_")
                # As `loss/train` and `loss/val`, it shows them beside each other.
                tag = f"{figure}/{side}" if side in ("train", "val") else name
                self._writer.add_scalar(tag, value, epoch["epoch"])
        self._writer.flush()

    def end(self, job: JobRow) -> None:
        if self._writer is None:
            return
        if job.status == JobStatus.succeeded:
            metrics = {f"final/{name}": value for name, value in _metrics(job).items()}
            self._writer.add_hparams(_parameters(self._claim), metrics, run_name=".")
        self._writer.close()


def _imported(*names: str, extra: str) -> list[Any]:
    try:
        return [importlib.import_module(name) for name in names]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.msg}: pip install 'graft[{extra}]'") from error


def _parameters(claim: Claim) -> dict[str, str | int | float | bool]:
    """What was asked for and resolved, flat; lists and what was left out are not shown."""
    # As it is stored: the class TrainingSpec comes with torch, which the worker, who imports this module, does without.
    spec = claim.spec
    values = {
        **{name: spec[name] for name in ("method", "recipe", "seed", "dataset")},
        "backbone": spec["backbone"]["model"] or spec["backbone"]["name"],
        "weights": spec["backbone"]["weights"],
        **spec["hyperparameters"],
    }
    return {name: value for name, value in values.items() if isinstance(value, str | int | float)}


def _figures(epoch: Epoch) -> dict[str, float]:
    said = {name: epoch[name] for name in FIGURES} | (epoch.get("figures") or {})
    return {name: float(value) for name, value in said.items() if _is_number(value)}


def _metrics(job: JobRow) -> dict[str, float]:
    return {name: float(value) for name, value in (job.metrics or {}).items() if _is_number(value)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
