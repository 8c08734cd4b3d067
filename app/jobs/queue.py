"""The queue: every move of a job from one status to the next, and every write of the worker that owns it.

The only writer of `jobs.status`. Each move is one UPDATE guarded by status and fence, whose row count decides whether
it happened; its event is written in the same transaction. Functions take a Session inside `Database.write()`, those
that only look one inside `Database.read()`. Knows rows; not processes, files, or what a job does.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Self

from sqlalchemy import ColumnElement, Select, and_, case, func, insert, or_, select, update
from sqlalchemy import delete as sql_delete
from sqlalchemy import exists as exists_row
from sqlalchemy.engine import Row
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app import telemetry, webhooks
from app.db.tables import EpochRow, JobRow, TurnRow, new_id, utc_now
from app.db.tenancy import ALL_WORKSPACES
from app.errors import Conflict, InvalidRequest, JobFailed, NotFound
from app.jobs import events
from app.jobs.states import FOLLOWERS, JobKind, JobStatus
from app.telemetry import TraceContext

FINAL = tuple(status for status in JobStatus if status.is_final)


class ClaimLost(Exception):
    """The claim is not ours any more: somebody else took the job over, or it has ended. Write nothing further."""


class Cancelled(Exception):
    """The job's owner has been asked to cancel it; nothing of its outcome may be stored."""


@dataclass(frozen=True)
class Claim:
    """One run of one job. (job_id, fence) names it: no other run of the job has, had or will have this fence.

    dataset_id: "" of a prediction, which is of no data set.
    """

    job_id: str
    fence: int
    workspace_id: str
    kind: JobKind
    dataset_id: str
    spec: dict[str, Any]
    attempt: int  # 1 on the first run, one more after each crash
    trace_context: TraceContext | None = None  # what spans of this run are part of

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        return cls(**{**fields, "kind": JobKind(fields["kind"])})


@dataclass(frozen=True)
class Signal:
    """What the owner of a running job is asked for."""

    cancel_requested: bool
    stop_requested: bool


@dataclass(frozen=True)
class Beat:
    """The answer to a heartbeat. ticks: grows as long as the job's work moves."""

    lost: bool
    cancel_requested: bool = False
    stop_requested: bool = False
    ticks: int = 0


@dataclass(frozen=True)
class Lease:
    """A running job as an observer sees it."""

    job_id: str
    kind: JobKind
    fence: int
    beat: int
    owner: dict[str, Any] | None
    cancel_requested: bool


# What callers do


def submit(
    session: Session,
    *,
    kind: JobKind,
    dataset_id: str,
    spec: dict[str, Any],
    name: str | None = None,
    method: str | None = None,
    backbone: dict[str, Any] | None = None,
    model_id: str | None = None,
    job_id: str | None = None,
) -> JobRow:
    """model_id: of a prediction, the model it asks. job_id: where its files were published before, if they were."""
    job = JobRow(
        id=job_id or new_id("job"),
        kind=JobKind(kind),
        dataset_id=dataset_id,
        model_id=model_id,
        spec=spec,
        name=name,
        method=method,
        backbone=backbone,
        status=JobStatus.queued,
        attempt=1,
        trace_context=telemetry.carrier(),
    )
    session.add(job)
    session.flush()
    _append_status(session, claim_of(job), JobStatus.queued, attempt=1)
    return job


def find(session: Session, job_id: str, *, kind: JobKind = JobKind.training) -> JobRow:
    """Raises NotFound for an id that is unknown, or is one of another kind."""
    job = session.scalar(_jobs(kind).where(JobRow.id == job_id))
    if job is None:
        raise NotFound(f"There is no {_NOUNS[kind]} with this id; GET {_COLLECTIONS[kind]} lists them.")
    return job


def list_jobs(
    session: Session,
    *,
    limit: int,
    after: str | None = None,
    status: JobStatus | None = None,
    dataset: str | None = None,
    method: str | None = None,
    metadata: Mapping[str, str] | None = None,
    kind: JobKind = JobKind.training,
) -> list[JobRow]:
    """Up to `limit` jobs, newest first, that come after the job `after`. Raises InvalidRequest if that is unknown.

    metadata: what a job's own has among others; names without quotation marks and backslashes.
    """
    jobs = _jobs(kind).order_by(JobRow.seq.desc()).limit(limit)
    if status is not None:
        jobs = jobs.where(JobRow.status == status)
    if dataset is not None:
        jobs = jobs.where(JobRow.dataset_id == dataset)
    if method is not None:
        jobs = jobs.where(JobRow.method == method)
    for name, value in (metadata or {}).items():
        jobs = jobs.where(JobRow.spec["requested"]["metadata"][name].as_string() == value)
    if after is not None:
        seq = session.scalar(select(JobRow.seq).where(JobRow.id == after))
        if seq is None:
            raise InvalidRequest(f"There is no {_NOUNS[kind]} with the id given as `after`; start from the first page.")
        jobs = jobs.where(JobRow.seq < seq)
    return list(session.scalars(jobs))


def history(session: Session, job_id: str) -> list[EpochRow]:
    """The job's epochs, first one first."""
    return list(session.scalars(select(EpochRow).where(EpochRow.job_id == job_id).order_by(EpochRow.epoch)))


def queue_position(session: Session, job: JobRow) -> int | None:
    """1 for the job that is taken next, of all workspaces, if nothing more is submitted; None unless queued."""
    return queue_positions(session, [job]).get(job.id)


def queue_positions(session: Session, jobs: Collection[JobRow]) -> dict[str, int]:
    """The same of those of several jobs of one kind that are queued, by id."""
    queued = [job for job in jobs if job.status == JobStatus.queued]
    if not queued:
        return {}
    of_kind = (JobRow.kind == queued[0].kind, JobRow.status == JobStatus.queued)
    lines = (
        select(JobRow.workspace_id, func.count(), _TURN, func.min(JobRow.seq))
        .outerjoin(TurnRow, _OWN_TURN)
        .where(*of_kind)
        .group_by(JobRow.workspace_id, _TURN)
    )
    waiting = {
        workspace_id: (count, (turn, first))
        for workspace_id, count, turn, first in session.execute(lines, execution_options={ALL_WORKSPACES: True})
    }
    positions = {}
    for job in queued:
        older = select(func.count()).where(*of_kind, JobRow.workspace_id == job.workspace_id, JobRow.seq < job.seq)
        # The round of turns in which its own workspace comes to it; the others come before theirs, or after.
        rounds = 1 + (session.scalar(older) or 0)
        _, own_turn = waiting[job.workspace_id]
        others = [of_one for workspace_id, of_one in waiting.items() if workspace_id != job.workspace_id]
        positions[job.id] = rounds + sum(
            min(count, rounds if turn < own_turn else rounds - 1) for count, turn in others
        )
    return positions


def count_by_status(session: Session, *, kind: JobKind = JobKind.training) -> dict[JobStatus, int]:
    """How many jobs are in each status, those with none included."""
    rows = session.execute(select(JobRow.status, func.count()).where(JobRow.kind == kind).group_by(JobRow.status))
    counts = {JobStatus(status): count for status, count in rows}
    return {status: counts.get(status, 0) for status in JobStatus}


def needs_dataset(session: Session, dataset_id: str) -> bool:
    """Whether a training job that has not ended refers to the data set."""
    return bool(
        session.scalar(
            select(
                exists_row().where(
                    JobRow.dataset_id == dataset_id,
                    JobRow.kind == JobKind.training,
                    JobRow.status.not_in(FINAL),
                )
            )
        )
    )


def needs_model(session: Session, model_id: str) -> bool:
    """Whether a prediction that has not ended asks the model, or a training starts from it."""
    asks = and_(JobRow.kind == JobKind.prediction, JobRow.model_id == model_id)
    starts = JobRow.backbone["model"].as_string() == model_id
    return bool(session.scalar(select(exists_row().where(or_(asks, starts), JobRow.status.not_in(FINAL)))))


def ended_ids(session: Session, ids: Sequence[str]) -> set[str]:
    """Those of the ids that are of jobs, of any kind, that have ended."""
    ended: set[str] = set()
    for start in range(0, len(ids), 1000):  # a statement takes only so many
        among = JobRow.id.in_(ids[start : start + 1000])
        ended.update(session.scalars(select(JobRow.id).where(among, JobRow.status.in_(FINAL))))
    return ended


def unfinished_ids(session: Session) -> set[str]:
    """Ids of all jobs, of every kind, that have not ended."""
    return set(session.scalars(select(JobRow.id).where(JobRow.status.not_in(FINAL))))


def request_cancel(session: Session, job_id: str, *, kind: JobKind = JobKind.training) -> JobRow:
    """Cancels a queued job now, and asks the owner of a running one to. Asking twice is the same as once.

    Raises Conflict if the job has ended.
    """
    job = _lock(session, JobRow.id == job_id, JobRow.kind == kind) or find(session, job_id, kind=kind)
    if job.status == JobStatus.queued:
        _move(session, JobRow.id == job_id, start=JobStatus.queued, to=JobStatus.cancelled)
        _append_status(session, claim_of(job), JobStatus.cancelled)
    elif job.status == JobStatus.running:
        _write(session, JobRow.id == job_id, JobRow.status == JobStatus.running, cancel_requested=True)
    else:
        noun = _NOUNS[kind]
        raise Conflict(
            f"The {noun} has already ended as {job.status}; it cannot be cancelled.", code=f"{noun}-finished"
        )
    return find(session, job_id, kind=kind)


def ask_to_cancel(session: Session, lease: "Lease") -> bool:
    """Asks the owner of a running job, of whichever kind, to cancel it. Returns whether it still runs."""
    is_running = (JobRow.id == lease.job_id, JobRow.fence == lease.fence, JobRow.status == JobStatus.running)
    return _write(session, *is_running, cancel_requested=True) is not None


def request_stop(session: Session, job_id: str) -> JobRow:
    """Asks the owner of a running job to end now with its best epoch. Raises Conflict unless running."""
    if not _write(
        session,
        JobRow.id == job_id,
        JobRow.kind == JobKind.training,
        JobRow.status == JobStatus.running,
        stop_requested=True,
    ):
        job = find(session, job_id)
        raise Conflict(f"Only a running job can be stopped; this one is {job.status}.", code="job-not-running")
    return find(session, job_id)


def ingest_progress(session: Session, dataset_ids: Collection[str]) -> dict[str, dict[str, Any]]:
    """How far data sets are that are being checked; without those of which nothing was said yet."""
    rows = session.execute(
        select(JobRow.dataset_id, JobRow.progress).where(
            JobRow.dataset_id.in_(dataset_ids), JobRow.kind == JobKind.ingest, JobRow.status.not_in(FINAL)
        )
    )
    return {dataset_id: progress for dataset_id, progress in rows if progress}


def cancel_ingest(session: Session, dataset_id: str) -> None:
    """Ends the data set's ingest, if it has not ended: for use when the data set is deleted."""
    ingests = select(JobRow.id).where(
        JobRow.dataset_id == dataset_id, JobRow.kind == JobKind.ingest, JobRow.status.not_in(FINAL)
    )
    for job_id in session.scalars(ingests.with_for_update()).all():
        request_cancel(session, job_id, kind=JobKind.ingest)


def ended_before(
    session: Session, moment: datetime, *, kind: JobKind, statuses: Collection[JobStatus] = FINAL
) -> list[str]:
    """Ids of jobs that ended so long ago, as one of these statuses."""
    ended = select(JobRow.id).where(JobRow.finished_at < moment, JobRow.kind == kind, JobRow.status.in_(statuses))
    return list(session.scalars(ended))


def delete(session: Session, job_id: str, *, kind: JobKind = JobKind.training) -> None:
    """Removes a job that has ended, with its history and events; its model stays. Raises Conflict otherwise."""
    removed = session.execute(
        sql_delete(JobRow)
        .where(JobRow.id == job_id, JobRow.kind == kind, JobRow.status.in_(FINAL))
        .returning(JobRow.id),
        execution_options={"synchronize_session": False},
    ).first()
    if removed is None:
        job, noun = find(session, job_id, kind=kind), _NOUNS[kind]
        raise Conflict(
            f"The {noun} is {job.status}; cancel it, or wait for its end, before deleting it.",
            code=f"{noun}-not-finished",
        )


# What the owner of a claim does


def queued_kinds(session: Session) -> set[JobKind]:
    """Kinds with something to claim. Only reads, so that an idle worker never takes the write lock."""
    return {
        JobKind(kind)
        for kind in session.scalars(select(JobRow.kind).where(JobRow.status == JobStatus.queued).distinct())
    }


def claim_next(session: Session, *, kind: JobKind, worker_id: str, owner: dict[str, Any]) -> Claim | None:
    """Takes a queued job of a kind; None if there is none. owner: from owner.current_process().

    Of the workspace that was given a worker longest ago, or never; of its jobs the oldest.
    """
    next_one = (
        select(JobRow.seq)
        .outerjoin(TurnRow, _OWN_TURN)
        .where(JobRow.kind == kind, JobRow.status == JobStatus.queued)
        .order_by(_TURN, JobRow.seq)
        .limit(1)
        # Several workers at once take different jobs instead of waiting.
        .with_for_update(skip_locked=True, of=JobRow)
        .scalar_subquery()
    )
    job = _move(
        session,
        JobRow.seq == next_one,
        start=JobStatus.queued,
        to=JobStatus.running,
        fence=JobRow.fence + 1,
        beat=0,
        worker_id=worker_id,
        owner=owner,
        durable_step_at_claim=JobRow.durable_step,
        started_at=func.coalesce(JobRow.started_at, utc_now()),
    )
    if job is None:
        return None
    claim = claim_of(job)
    _append_status(session, claim, JobStatus.running, attempt=claim.attempt)
    _take_turn(session, claim)
    return claim


def beat(session: Session, claim: Claim) -> Beat:
    """Renews the lease. Never raises ClaimLost: the answer says so."""
    job = _write(session, *_owned(claim), beat=JobRow.beat + 1)
    if job is None:
        return Beat(lost=True)
    return Beat(lost=False, cancel_requested=job.cancel_requested, stop_requested=job.stop_requested, ticks=job.ticks)


def has_ended(session: Session, claim: Claim) -> bool:
    """Whether the job ended for good in this very run."""
    return bool(
        session.scalar(
            select(exists_row().where(JobRow.id == claim.job_id, JobRow.fence == claim.fence, JobRow.status.in_(FINAL)))
        )
    )


def tick(session: Session, claim: Claim) -> Signal:
    """Tells the watchdog that work moves. Raises ClaimLost."""
    return _signal(_write_owned(session, claim))


def record_progress(session: Session, claim: Claim, progress: dict[str, Any], *, event: bool) -> Signal:
    """event: whether it also becomes an event, for streams. Raises ClaimLost."""
    job = _write_owned(session, claim, progress=progress)
    if event:
        events.append(session, claim.job_id, claim.fence, "progress", progress)
    return _signal(job)


def record_epoch(
    session: Session,
    claim: Claim,
    epoch: dict[str, Any],
    progress: dict[str, Any],
    *,
    metrics: dict[str, Any] | None = None,
) -> Signal:
    """Adds an epoch to the history. Raises ClaimLost.

    epoch: the columns of EpochRow, but job_id. It replaces what an earlier attempt recorded from this epoch on.
    metrics: the best so far, shown with the job while it runs.
    """
    values: dict[str, Any] = {"progress": progress}
    if metrics is not None:
        values["metrics"] = metrics
    job = _write_owned(session, claim, **values)
    session.execute(
        sql_delete(EpochRow).where(EpochRow.job_id == claim.job_id, EpochRow.epoch >= epoch["epoch"]),
        execution_options={"synchronize_session": False},
    )
    session.add(EpochRow(job_id=claim.job_id, **epoch))
    events.append(session, claim.job_id, claim.fence, "epoch", epoch)
    return _signal(job)


def record_checkpoint(session: Session, claim: Claim, step: int, *, metrics: dict[str, Any] | None = None) -> Signal:
    """Says that a checkpoint after `step` is on disk, synced: that is what counts as progress. Raises ClaimLost.

    metrics: what was found up to it, shown with the job while it runs.
    """
    values: dict[str, Any] = {"durable_step": case((JobRow.durable_step < step, step), else_=JobRow.durable_step)}
    if metrics is not None:
        values["metrics"] = metrics
    return _signal(_write_owned(session, claim, **values))


def record_log(session: Session, claim: Claim, message: str, **details: Any) -> Signal:
    """Adds a line for people to the job's events. Raises ClaimLost."""
    job = _write_owned(session, claim)
    events.append(session, claim.job_id, claim.fence, "log", {"message": message, **details})
    return _signal(job)


# How a claim ends


def succeed(
    session: Session,
    claim: Claim,
    *,
    model_id: str | None = None,
    metrics: dict[str, Any] | None = None,
    method: str | None = None,
) -> None:
    """Ends the job, in the transaction that stores what it made. model_id: the model that it made, if it did. method:
    what it chose, where it was to choose.

    Raises ClaimLost or Cancelled: the transaction must then be rolled back, and what was made with it.
    """
    job = _lock_owned(session, claim)
    if job.cancel_requested:
        raise Cancelled
    progress = {**(job.progress or {}), "stage": "done", "fraction": 1.0, "eta_seconds": 0.0}
    values: dict[str, Any] = {"progress": progress}
    if model_id is not None:
        values["model_id"] = model_id
    if metrics is not None:
        values["metrics"] = metrics
    if method is not None:
        values["method"] = method
    _leave(session, claim, JobStatus.succeeded, JobRow.cancel_requested.is_(False), **values)
    if model_id is not None:
        events.append(session, claim.job_id, claim.fence, "model", {"model": model_id, "metrics": metrics})
    _append_status(session, claim, JobStatus.succeeded, model=model_id)


def fail(session: Session, claim: Claim, error: dict[str, Any]) -> JobStatus:
    """Ends the job as failed; as cancelled if that was asked for. Raises ClaimLost. error: GraftError.as_record()."""
    if _lock_owned(session, claim).cancel_requested:
        return finish_cancelled(session, claim)
    return _fail(session, claim, error)


def finish_cancelled(session: Session, claim: Claim) -> JobStatus:
    """Ends a job whose cancelling was asked for. Raises ClaimLost."""
    _leave(session, claim, JobStatus.cancelled, JobRow.cancel_requested.is_(True))
    _append_status(session, claim, JobStatus.cancelled)
    return JobStatus.cancelled


def give_back(session: Session, claim: Claim) -> JobStatus:
    """Puts the job back into the queue because its worker shuts down; this counts as no attempt. Raises ClaimLost."""
    job = _lock_owned(session, claim)
    if job.cancel_requested:
        return finish_cancelled(session, claim)
    return _requeue(session, claim, attempt=job.attempt, crashes=job.crashes, reason="The worker was shut down.")


def crashed(session: Session, claim: Claim, reason: str, *, max_crashes: int) -> JobStatus:
    """Settles a run whose process has died: queued again, cancelled if that was asked for, or failed.

    It fails after `max_crashes` in a row without a new checkpoint: a job that is often killed but gets further each
    time is healthy. Raises ClaimLost if the run has already ended. reason: a sentence, shown to the job's user.
    """
    job = _lock_owned(session, claim)
    if job.cancel_requested:
        return finish_cancelled(session, claim)
    crashes = 0 if job.durable_step > job.durable_step_at_claim else job.crashes + 1
    if crashes >= max_crashes:
        error = JobFailed(
            f"The job's process died {crashes} times in a row without getting any further. The last time: {reason}",
            code="crash_loop",
        )
        return _fail(session, claim, error.as_record(), crashes=crashes)
    return _requeue(session, claim, attempt=job.attempt + 1, crashes=crashes, reason=reason)


def reclaim(session: Session, job_id: str, fence: int, beat: int, *, max_crashes: int) -> JobStatus | None:
    """Settles a run whose owner is gone, if it has not beaten since `beat`; None if it has, or has ended."""
    job = _lock(
        session, JobRow.id == job_id, JobRow.fence == fence, JobRow.beat == beat, JobRow.status == JobStatus.running
    )
    if job is None:
        return None
    return crashed(session, claim_of(job), "Its worker ended or was cut off.", max_crashes=max_crashes)


# How lost owners are found


def running_leases(session: Session) -> list[Lease]:
    rows = session.execute(
        select(JobRow.id, JobRow.kind, JobRow.fence, JobRow.beat, JobRow.owner, JobRow.cancel_requested).where(
            JobRow.status == JobStatus.running
        )
    )
    return [Lease(id, JobKind(kind), *rest) for id, kind, *rest in rows]


@dataclass
class _Sighting:
    fence: int
    beat: int
    silent_seconds: float = 0.0


class LeaseObserver:
    """Finds leases that were not renewed, by this observer's own clock: no two clocks are ever compared.

    Silence counts only while the observer itself looks: a gap between two looks is worth a quarter of a lease at most.
    So an observer that was frozen, with its machine perhaps, gives owners time to beat before it judges them.
    """

    def __init__(self, *, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self._sightings: dict[str, _Sighting] = {}
        self._last_look: float | None = None

    def expired(self, leases: Iterable[Lease], *, now: float) -> list[Lease]:
        """Those of all running `leases` whose (fence, beat) has not changed for one lease. now: monotonic seconds."""
        gap = 0.0 if self._last_look is None else min(now - self._last_look, self._lease_seconds / 4)
        self._last_look = now
        seen: dict[str, _Sighting] = {}
        expired = []
        for lease in leases:
            sighting = self._sightings.get(lease.job_id)
            if sighting is None or (sighting.fence, sighting.beat) != (lease.fence, lease.beat):
                sighting = _Sighting(lease.fence, lease.beat)
            else:
                sighting.silent_seconds += gap
            seen[lease.job_id] = sighting
            if sighting.silent_seconds >= self._lease_seconds:
                expired.append(lease)
        self._sightings = seen
        return expired


# What callers know a kind of job as: an ingest only as its data set.
_NOUNS = {JobKind.training: "job", JobKind.ingest: "job", JobKind.prediction: "batch"}
_COLLECTIONS = {JobKind.training: "/v1/jobs", JobKind.ingest: "/v1/datasets", JobKind.prediction: "/v1/batches"}


# What webhooks are told of a kind of job: of an ingest, only what becomes of its data set.
_TOLD: dict[JobKind, dict[JobStatus, webhooks.Event]] = {
    JobKind.training: {
        JobStatus.running: "job.started",
        JobStatus.succeeded: "job.succeeded",
        JobStatus.failed: "job.failed",
        JobStatus.cancelled: "job.cancelled",
    },
    JobKind.prediction: {
        JobStatus.running: "batch.started",
        JobStatus.succeeded: "batch.succeeded",
        JobStatus.failed: "batch.failed",
        JobStatus.cancelled: "batch.cancelled",
    },
}


# Whose turn it is

_OWN_TURN = (TurnRow.workspace_id == JobRow.workspace_id) & (TurnRow.kind == JobRow.kind)
_TURN = func.coalesce(TurnRow.number, 0)


def _take_turn(session: Session, claim: Claim) -> None:
    """Puts the workspace behind all others. Two that claim at once may be given one number: then age decides."""
    newest = select(func.max(TurnRow.number)).where(TurnRow.kind == claim.kind).scalar_subquery()
    number = func.coalesce(newest, 0) + 1
    if _set_turn(session, claim, number):
        return
    try:
        with session.begin_nested():
            session.execute(insert(TurnRow).values(workspace_id=claim.workspace_id, kind=claim.kind, number=number))
    except IntegrityError:  # another worker has just made the row
        _set_turn(session, claim, number)


def _give_turn_back(session: Session, claim: Claim) -> None:
    """The workspace is first again: its job goes on before anybody else's begins."""
    _set_turn(session, claim, 0)


def _set_turn(session: Session, claim: Claim, number: ColumnElement[int] | int) -> bool:
    own = (TurnRow.workspace_id == claim.workspace_id, TurnRow.kind == claim.kind)
    changed = update(TurnRow).where(*own).values(number=number).returning(TurnRow.kind)
    return session.scalar(changed, execution_options={"synchronize_session": False}) is not None


# The guarded update, and what stands around it


def _jobs(kind: JobKind) -> Select[JobRow]:
    # Rows are read afresh: guarded updates go past the session's own copies.
    return select(JobRow).where(JobRow.kind == kind).execution_options(populate_existing=True)


def claim_of(job: JobRow | Row[Any]) -> Claim:
    return Claim(
        job_id=job.id,
        fence=job.fence,
        workspace_id=job.workspace_id,
        kind=JobKind(job.kind),
        dataset_id=job.dataset_id,
        spec=job.spec,
        attempt=job.attempt,
        trace_context=job.trace_context,
    )


def _owned(claim: Claim) -> tuple[ColumnElement[bool], ...]:
    return JobRow.id == claim.job_id, JobRow.fence == claim.fence, JobRow.status == JobStatus.running


def _write(session: Session, *guard: ColumnElement[bool], **values: Any) -> Row[Any] | None:
    """Updates the one job that the guard allows, and returns it; None if the guard allows none."""
    return session.execute(
        update(JobRow)
        .where(*guard)
        .values(**values)
        .returning(
            JobRow.id,
            JobRow.fence,
            JobRow.workspace_id,
            JobRow.kind,
            JobRow.dataset_id,
            JobRow.spec,
            JobRow.attempt,
            JobRow.trace_context,
            JobRow.ticks,
            JobRow.cancel_requested,
            JobRow.stop_requested,
        ),
        execution_options={"synchronize_session": False},
    ).first()


def _move(
    session: Session, *guard: ColumnElement[bool], start: JobStatus, to: JobStatus, **values: Any
) -> Row[Any] | None:
    """The only place where a status changes."""
    assert to in FOLLOWERS[start], (start, to)
    if to.is_final:
        values["finished_at"] = utc_now()
    return _write(session, *guard, JobRow.status == start, status=to, **values)


def _write_owned(session: Session, claim: Claim, **values: Any) -> Row[Any]:
    job = _write(session, *_owned(claim), ticks=JobRow.ticks + 1, **values)
    if job is None:
        raise ClaimLost
    return job


def _lock(session: Session, *guard: ColumnElement[bool]) -> JobRow | None:
    """The job as it is and, for this transaction, stays. (SQLite needs no row lock: its writers come one by one.)"""
    return session.scalar(select(JobRow).where(*guard).with_for_update().execution_options(populate_existing=True))


def _lock_owned(session: Session, claim: Claim) -> JobRow:
    job = _lock(session, *_owned(claim))
    if job is None:
        raise ClaimLost
    return job


def _signal(job: Row[Any]) -> Signal:
    return Signal(cancel_requested=job.cancel_requested, stop_requested=job.stop_requested)


def _leave(session: Session, claim: Claim, to: JobStatus, *guard: ColumnElement[bool], **values: Any) -> None:
    """Moves the claim's job on from running; nobody owns it then."""
    values |= {"worker_id": None, "owner": None}
    if not _move(session, *_owned(claim), *guard, start=JobStatus.running, to=to, **values):
        raise ClaimLost


def _fail(session: Session, claim: Claim, error: dict[str, Any], **values: Any) -> JobStatus:
    _leave(session, claim, JobStatus.failed, error=error, **values)
    _append_status(session, claim, JobStatus.failed, error=error)
    return JobStatus.failed


def _requeue(session: Session, claim: Claim, *, attempt: int, crashes: int, reason: str) -> JobStatus:
    _leave(session, claim, JobStatus.queued, attempt=attempt, crashes=crashes)
    _give_turn_back(session, claim)
    _append_status(session, claim, JobStatus.queued, attempt=attempt, reason=reason)
    return JobStatus.queued


def _append_status(session: Session, claim: Claim, status: JobStatus, **details: Any) -> None:
    """claim: of the job, whether anybody works on it or not."""
    happened = {"status": status, **details}
    events.append(session, claim.job_id, claim.fence, "status", happened, is_final=status.is_final)
    told = _TOLD.get(claim.kind, {}).get(status)
    if told is not None:
        happened = {"id": claim.job_id, "object": _NOUNS[claim.kind], **happened}
        webhooks.emit(session, told, happened, workspace_id=claim.workspace_id)
