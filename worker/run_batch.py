"""The story of one batch: an archive's pictures, through a model, into two files that appear whole.

Pictures are read and decoded in threads while one more runs the network. Every few seconds what is done is put on disk,
and a run that is killed is followed by one that goes on from there.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from app.datasets import layout
from app.datasets.ingest import IngestLimits
from app.datasets.threads import each_file
from app.db.engine import Database
from app.errors import ImageRefused, NotFound
from app.jobs import batches, queue
from app.jobs.batches import BatchSpec
from app.jobs.queue import Claim
from app.jobs.states import JobStatus
from app.serving.offline import OfflineModel
from app.serving.scores import Scores
from app.settings import Settings
from app.storage import LocalStorage
from app.vision.decoding import Decoders
from app.vision.device import resolve_device
from worker.batch_results import Parts, Row, write_results
from worker.reporter import Reporter, ShuttingDown

# What a killed run loses at most; putting a part on disk takes about 20 ms.
PART_SECONDS = 2.0
# Files of one turn, so that an archive of nothing but unreadable ones is not held in memory.
_MOST_FILES_PER_PICTURE = 4


def run_batch(
    claim: Claim, *, settings: Settings, database: Database, storage: LocalStorage, reporter: Reporter
) -> None:
    """Leaves the results published, and ends the job in the transaction after.

    Raises GraftError for what can be explained to the batch's owner, and whatever the reporter raises.
    """
    reporter.progress("prepare", fraction=0.0)
    spec = BatchSpec.model_validate(claim.spec)
    with database.read() as session:
        model_id = queue.find(session, claim.job_id, kind=claim.kind).model_id
    assert model_id is not None, "a batch names its model"
    limits = IngestLimits.from_settings(settings)
    decoders = Decoders.from_settings(settings)
    model = OfflineModel.open(
        storage,
        model_id,
        device=resolve_device(settings.device),
        decoders=decoders,
        policy=settings.serving_engine,
    )
    parts = Parts(storage, job_id=claim.job_id, fence=claim.fence)
    if parts.rows:
        reporter.log(f"Going on from file {parts.rows} of {spec.files}.", files=parts.rows)
    pace = _Pace(reporter, files=spec.files, done=parts.rows)
    predicted = _predicted(
        storage.path(batches.archive_key(claim.job_id)),
        model,
        top_k=spec.top_k,
        start=parts.rows,
        limits=limits,
        tick=lambda _share: pace.tick(),
    )
    with closing(predicted), decoders:
        _write_all(predicted, parts, pace, reporter)
    reporter.progress("write", fraction=1.0, eta_seconds=0.0)
    _publish(claim, parts, model.tasks, database=database, storage=storage, reporter=reporter)


def _write_all(predicted: Generator[list[Row], None, None], parts: Parts, pace: "_Pace", reporter: Reporter) -> None:
    """Puts all rows on disk. A run that is asked to end puts there what it has."""
    waiting: list[Row] = []
    written_at = time.monotonic()

    def write() -> None:
        nonlocal written_at
        if waiting:
            parts.add(waiting)
            waiting.clear()
            reporter.checkpoint(parts.rows, metrics=_counts(parts))
        written_at = time.monotonic()

    try:
        for rows in predicted:
            waiting += rows
            pace.done += len(rows)
            if time.monotonic() >= written_at + PART_SECONDS:
                write()
    except ShuttingDown:
        write()
        raise
    write()


def _counts(parts: Parts) -> dict[str, int]:
    return {"num_images": parts.rows - parts.rejected, "num_rejected": parts.rejected}


def _publish(
    claim: Claim,
    parts: Parts,
    tasks: Sequence[str],
    *,
    database: Database,
    storage: LocalStorage,
    reporter: Reporter,
) -> None:
    """Files first, whole and synced, then the job's success; those of a job that did not succeed by us go."""
    for fence in range(1, claim.fence):  # of runs that died between the two
        storage.delete(batches.results_key(claim.job_id, fence))
    key = batches.results_key(claim.job_id, claim.fence)
    storage.check_room(2 * sum(part.path.stat().st_size for part in parts.parts))
    with storage.staging() as staged:
        write_results(staged, parts.parts, tasks=tasks)
        storage.publish(staged, key)
    try:
        reporter.transaction(lambda session: queue.succeed(session, claim, metrics=_counts(parts)))
    finally:
        if not _has_succeeded(claim, database):
            storage.delete(key)


def _has_succeeded(claim: Claim, database: Database) -> bool:
    with database.read() as session:
        try:
            job = queue.find(session, claim.job_id, kind=claim.kind)
        except NotFound:
            return False
    return job.status == JobStatus.succeeded and job.fence == claim.fence


class _Pace:
    """How far the batch is and how fast, for its progress. done: files with a row."""

    def __init__(self, reporter: Reporter, *, files: int, done: int) -> None:
        self.done = done
        self._reporter, self._files, self._first = reporter, files, done
        self._began = time.monotonic()

    def tick(self) -> None:
        here = self.done - self._first
        speed = here / max(time.monotonic() - self._began, 1e-6)
        self._reporter.progress(
            "predict",
            fraction=self.done / self._files,
            images_per_second=round(speed, 1) if here else None,
            eta_seconds=round((self._files - self.done) / speed, 1) if here else None,
        )


# From files to rows


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A file of the archive as the network sees it, or why it cannot."""

    path: str
    pixels: Tensor | ImageRefused


def _predicted(
    archive: Path,
    model: OfflineModel,
    *,
    top_k: int,
    start: int,
    limits: IngestLimits,
    tick: Callable[[float], None],
) -> Generator[list[Row], None, None]:
    """Rows of the archive's files behind the first `start`, some at a time, in the order of the archive."""

    def prepare(path: str, encoded: bytes) -> _Prepared:
        try:
            return _Prepared(path, model.prepare(encoded))
        except ImageRefused as refusal:
            return _Prepared(path, refusal)

    files = each_file(archive, prepare, is_wanted=layout.is_data, limits=limits.archive, tick=tick, start=start)
    running: Future[list[Row]] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="forward") as pool, closing(files):
        for batch in _batches(files, size=model.batch_size):
            following = pool.submit(_rows, model, batch, top_k)
            if running is not None:
                yield running.result()
            running = following
        if running is not None:
            yield running.result()


def _batches(files: Iterator[_Prepared], *, size: int) -> Iterator[list[_Prepared]]:
    """As many files as have `size` readable pictures among them."""
    batch: list[_Prepared] = []
    readable = 0
    for file in files:
        batch.append(file)
        readable += isinstance(file.pixels, Tensor)
        if readable == size or len(batch) == _MOST_FILES_PER_PICTURE * size:
            yield batch
            batch, readable = [], 0
    if batch:
        yield batch


def _rows(model: OfflineModel, batch: Sequence[_Prepared], top_k: int) -> list[Row]:
    scores = iter(model.scores([file.pixels for file in batch if isinstance(file.pixels, Tensor)]))
    return [
        _refused(file.path, file.pixels)
        if isinstance(file.pixels, ImageRefused)
        else _told(file.path, model, next(scores), top_k)
        for file in batch
    ]


def _told(path: str, model: OfflineModel, scores: Scores, top_k: int) -> Row:
    """As in an answer of /predict, with the path in place of a file name."""
    tasks = {name: of_task.told(top_k) for name, of_task in scores.tasks.items()}
    found = model.insight(scores)
    strange = {"in_distribution": found.in_distribution, "ood_score": found.ood_score} if found else {}
    return {"path": path, **scores.told(top_k)} | ({"tasks": tasks} if tasks else {}) | strange


def _refused(path: str, refusal: ImageRefused) -> Row:
    return {"path": path, "error": ImageRefused(f"The picture cannot be read: {refusal.detail}.").as_record()}
