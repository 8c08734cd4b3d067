"""Which status a job has, which may follow which, and who moves it. `queue.py` makes the moves."""

from enum import StrEnum


class JobStatus(StrEnum):
    """A job's status. `cancel_requested` and `stop_requested` are columns beside it: one row decides each race."""

    queued = "queued"  # waits for a worker; moved on by queue.claim_next, or queue.request_cancel
    running = "running"  # owned by the worker that holds the current fence; moved on by that worker or a reclaim
    succeeded = "succeeded"  # final: its model is registered, its data set ready, or its results are published
    failed = "failed"  # final: `error` says why
    cancelled = "cancelled"  # final: on request; no model is its result, though one of method auto may leave its probe

    @property
    def is_final(self) -> bool:
        return not FOLLOWERS[self]

    @property
    def is_cancellable(self) -> bool:
        return JobStatus.cancelled in FOLLOWERS[self]


FOLLOWERS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.queued: frozenset({JobStatus.running, JobStatus.cancelled}),
    JobStatus.running: frozenset({JobStatus.queued, JobStatus.succeeded, JobStatus.failed, JobStatus.cancelled}),
    JobStatus.succeeded: frozenset(),
    JobStatus.failed: frozenset(),
    JobStatus.cancelled: frozenset(),
}


class JobKind(StrEnum):
    """What a job does. One queue, one lease and one crash rule serve all kinds."""

    training = "training"  # a data set → a model; the jobs of /v1/jobs
    ingest = "ingest"  # an upload → a data set
    prediction = "prediction"  # an archive of pictures → what a model says of them; the batches of /v1/batches
