"""The worker: takes jobs from the queue, one of each kind at a time, and has a child process run each.

One thread looks after everything, so heartbeats stop when it hangs and another worker takes over. Its children are
started ahead of need, or for batches when there is one; it keeps their leases alive, watches that their work moves,
ends them when they must end, and settles what a dead one leaves behind. It also frees jobs whose own worker is gone.
"""

import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

import structlog
from opentelemetry.trace import Span, SpanKind, StatusCode
from sqlalchemy.orm import Session

from app import logs, telemetry
from app.db.engine import Database
from app.db.migrate import check_is_current
from app.db.sqlite import wal_is_safe
from app.errors import GraftError
from app.jobs import owner, queue
from app.jobs.queue import Claim, ClaimLost, Lease, LeaseObserver
from app.jobs.states import JobKind, JobStatus
from app.settings import Settings
from app.storage import LocalStorage, keep_private
from worker import endings
from worker.child import EXIT_DATABASE_UNAVAILABLE, order_line
from worker.reporter import DATABASE_ERRORS
from worker.wakeup import Wakeup

CHILD_COMMAND = (sys.executable, "-m", "worker.child")

# Kinds whose child waits for work with everything imported. A batch takes longer than that child takes to start, and a
# waiting child takes some hundred MB of memory.
STARTED_AHEAD = frozenset({JobKind.training, JobKind.ingest})

# How often leases are looked at: what a cancel, or the death of another worker on this host, waits at most.
OBSERVE_INTERVAL_SECONDS = 1.0
# What dead processes have left is swept at the start, and this often.
SWEEP_INTERVAL_SECONDS = 3600.0
# A child that dies again and again before it has done anything is started ever more rarely.
LONGEST_RESTART_PAUSE_SECONDS = 30.0
LONGEST_DATABASE_PAUSE_SECONDS = 10.0
# What a child whose job has ended has for what is not the job: more than worker/trackers.py and app/telemetry.py take.
LAST_WORDS_SECONDS = 30.0
# While shutting down nothing else wakes the loop in time for the deadline.
SHUTDOWN_POLL_SECONDS = 0.05

log = structlog.get_logger(__name__)


def run_worker(settings: Settings, *, child_command: Sequence[str] = CHILD_COMMAND, stop: Wakeup | None = None) -> None:
    """Works until SIGTERM or SIGINT, or until `stop` is set where that is given: no signal is then handled.

    Raises DatabaseMismatch if the database was not migrated to this version.
    """
    logs.configure(settings)
    telemetry.start(settings, service="graft-worker")
    if stop is None:
        stop = Wakeup()
        _set_on_signals(stop)
    database = Database(settings.resolved_database_url, ballast_bytes=settings.ballast_bytes)
    try:
        check_is_current(database)
        if not wal_is_safe():
            log.warning("sqlite_has_wal_reset_bug", remedy="Use SQLite 3.51.3 or later, or PostgreSQL.")
        storage = LocalStorage(settings.storage_root, min_free_bytes=settings.min_free_bytes)
        Worker(settings, database=database, storage=storage, child_command=child_command).run(stop)
    finally:
        database.dispose()
        telemetry.stop()


class Worker:
    """Slots, one per kind of job, and an eye on everybody's leases."""

    def __init__(
        self, settings: Settings, *, database: Database, storage: LocalStorage, child_command: Sequence[str]
    ) -> None:
        self._settings = settings
        self._database = database
        self._storage = storage
        self._slots = [
            Slot(kind, settings, database=database, storage=storage, child_command=child_command) for kind in JobKind
        ]
        self._observer = LeaseObserver(lease_seconds=settings.lease_seconds)
        self._observe_at = 0.0
        self._sweep_at = 0.0

    def run(self, stop: Wakeup) -> None:
        """Works until `stop` is set, then gives back what runs; returns when every child has ended."""
        log.info("worker_started", pid=os.getpid())
        try:
            self._work(stop)
        finally:
            # A bug of ours may end the loop early; no child must outlive it.
            for slot in self._slots:
                slot.abandon()
        log.info("worker_stopped")

    def _work(self, stop: Wakeup) -> None:
        pause_seconds = self._settings.poll_interval_seconds
        stopped_at: float | None = None
        while True:
            now = time.monotonic()
            if stop.is_set and stopped_at is None:
                stopped_at = now
                for slot in self._slots:
                    slot.shut_down(now)
            try:
                self._turn(now)
                pause_seconds = self._settings.poll_interval_seconds
            except DATABASE_ERRORS as error:
                log.warning("database_unavailable", error=type(error).__name__, retry_in_seconds=pause_seconds)
                pause_seconds = min(2 * pause_seconds, LONGEST_DATABASE_PAUSE_SECONDS)
                if stopped_at is not None and now > stopped_at + self._settings.shutdown_grace_seconds:
                    return  # the jobs stay as they are, and are reclaimed when the database is back
            if stopped_at is not None and not any(slot.has_child for slot in self._slots):
                return
            descriptors = [descriptor for slot in self._slots for descriptor in slot.descriptors()]
            if stopped_at is None:
                stop.wait(pause_seconds, descriptors=descriptors)
            else:
                select.select(descriptors, [], [], SHUTDOWN_POLL_SECONDS)

    def _turn(self, now: float) -> None:
        for slot in self._slots:
            slot.look_after(now)
        if now >= self._observe_at:
            self._observe(now)
            self._observe_at = now + OBSERVE_INTERVAL_SECONDS
        if now >= self._sweep_at:
            self._sweep()
            self._sweep_at = now + SWEEP_INTERVAL_SECONDS
        waiting = [slot for slot in self._slots if slot.can_claim or slot.can_start]
        if waiting:
            with self._database.read() as session:
                kinds = queue.queued_kinds(session)
            for slot in waiting:
                if slot.kind not in kinds:
                    continue
                if slot.can_claim:
                    slot.claim_next(now)
                else:
                    slot.start(now)

    def _sweep(self) -> None:
        try:
            endings.sweep_files(self._database, self._storage)
        except OSError as error:
            log.error("leftovers_not_swept", error=str(error))

    def _observe(self, now: float) -> None:
        """Sees which of our jobs are to be cancelled, and frees the jobs of workers that are gone."""
        with self._database.read() as session:
            leases = queue.running_leases(session)
        ours = {slot.claimed: slot for slot in self._slots}
        for lease in leases:
            slot = ours.get((lease.job_id, lease.fence))
            if slot is not None and lease.cancel_requested:
                slot.notice_cancel(now)
        expired = self._observer.expired(leases, now=now)
        for lease in leases:
            if (lease.job_id, lease.fence) not in ours and (lease in expired or owner.is_gone(lease.owner)):
                self._reclaim(lease)

    def _reclaim(self, lease: Lease) -> None:
        with self._database.write() as session:
            status = queue.reclaim(
                session,
                lease.job_id,
                lease.fence,
                lease.beat,
                max_crashes=self._settings.max_crashes_without_progress,
            )
            if status is not None:
                endings.settle_dataset(session, lease.job_id, kind=lease.kind, status=status)
        if status is not None:
            log.warning("job_reclaimed", job_id=lease.job_id, fence=lease.fence, status=status)
            endings.delete_files_if_over(self._database, self._storage, lease.job_id, kind=lease.kind)


class Slot:
    """Room for one job of one kind: a child process, and while it works, the claim that it works on."""

    def __init__(
        self,
        kind: JobKind,
        settings: Settings,
        *,
        database: Database,
        storage: LocalStorage,
        child_command: Sequence[str],
    ) -> None:
        self.kind = kind
        self._settings = settings
        self._database = database
        self._storage = storage
        self._child_command = child_command
        self._owner = owner.current_process()
        self._worker_id = f"{self._owner['host']}-{os.getpid()}-{secrets.token_hex(4)}"
        self._child: Child | None = None
        self._failures = 0  # in a row, of children
        self._start_at = 0.0
        self._shutdown_deadline: float | None = None
        self._watch: Watch | None = None

    @property
    def has_child(self) -> bool:
        return self._child is not None

    @property
    def can_start(self) -> bool:
        return self._shutdown_deadline is None and self._child is None

    @property
    def can_claim(self) -> bool:
        return (
            self._shutdown_deadline is None
            and self._watch is None
            and self._child is not None
            and self._child.is_ready
            and self._child.exit_code is None
        )

    @property
    def claimed(self) -> tuple[str, int] | None:
        return None if self._watch is None else (self._watch.claim.job_id, self._watch.claim.fence)

    def descriptors(self) -> list[int]:
        """What can be read when the child has something new: it is ready, or it has ended."""
        return [] if self._child is None or self._child.descriptor is None else [self._child.descriptor]

    def look_after(self, now: float) -> None:
        if self._child is None:
            if self.can_start and self.kind in STARTED_AHEAD:
                self.start(now)
        elif self._child.exit_code is not None:
            self._settle(now, self._child)
        elif self._shutdown_deadline is not None and now >= self._shutdown_deadline:
            self._child.kill()
        elif self._watch is not None:
            self._look_after_work(now, self._child, self._watch)

    def start(self, now: float) -> None:
        """Starts a child, unless the one before died so lately that it is to wait."""
        if now < self._start_at:
            return
        try:
            self._child = Child(self._child_command, self.kind)
        except OSError as error:  # no memory for one more process, or too many of them: others run on meanwhile
            log.error("child_not_started", kind=self.kind, error=str(error))
            self._schedule_next(now, is_failure=True)

    def claim_next(self, now: float) -> None:
        with self._database.write() as session:
            claim = queue.claim_next(session, kind=self.kind, worker_id=self._worker_id, owner=self._owner)
        if claim is not None and self._child is not None:
            self._watch = Watch(claim, now)
            log.info("job_claimed", attempt=claim.attempt, **self._watch.names)
            self._child.hand_over(replace(claim, trace_context=telemetry.carrier(self._watch.span)), self._settings)

    def notice_cancel(self, now: float) -> None:
        if self._watch is not None and self._watch.cancel_noticed_at is None:
            self._watch.cancel_noticed_at = now

    def shut_down(self, now: float) -> None:
        """Has the child end in good order: what it does is given back. Kills it when the grace is over."""
        self._shutdown_deadline = now + self._settings.shutdown_grace_seconds
        if self._child is not None:
            self._child.terminate()

    def abandon(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.close()
        if self._watch is not None:
            self._watch.span.end()

    def _look_after_work(self, now: float, child: "Child", watch: "Watch") -> None:
        if now >= watch.beat_at:
            # On a full disk in the ballast's room: a job that waits for room keeps its lease.
            beat, is_over = self._database.free(partial(_beat, claim=watch.claim))
            if beat.lost and child.exit_code is None:
                # Whose job has ended tells trackers and collectors so; whose job is another's has nothing left to say.
                if not is_over or watch.has_been_over(now, for_seconds=LAST_WORDS_SECONDS):
                    child.kill()
                return
            watch.see(beat, now, interval_seconds=self._settings.heartbeat_interval_seconds)
            if beat.cancel_requested:
                self.notice_cancel(now)
        if watch.still_seconds >= self._settings.stall_timeout_seconds:
            watch.killed_because = f"It was stopped after {watch.still_seconds:.0f} s without a step."
            child.kill()
        cancel_grace_seconds = self._settings.cancel_grace_seconds
        if watch.cancel_noticed_at is not None and now >= watch.cancel_noticed_at + cancel_grace_seconds:
            child.kill()

    def _settle(self, now: float, child: "Child") -> None:
        """Ends the claim of a child that has ended, if the child has not, and makes room for the next child."""
        had_outcome = True
        if self._watch is not None:
            claim = self._watch.claim
            reason = self._watch.killed_because or _exit_sentence(child.exit_code)
            had_outcome = not self._settle_claim(claim, reason, names=self._watch.names)
            if not had_outcome:
                self._watch.span.set_status(StatusCode.ERROR, reason)
            self._watch.span.end()
            endings.delete_files_if_over(self._database, self._storage, claim.job_id, kind=self.kind)
        elif self._shutdown_deadline is None:
            log.error("child_died_unused", kind=self.kind, reason=_exit_sentence(child.exit_code))
            had_outcome = False
        self._schedule_next(now, is_failure=not had_outcome)
        child.close()
        self._child = self._watch = None

    def _schedule_next(self, now: float, *, is_failure: bool) -> None:
        self._failures = self._failures + 1 if is_failure else 0
        # The first time at once: then 1 s, 2 s, 4 s.
        pause_seconds = 2 ** (self._failures - 2) if self._failures >= 2 else 0
        self._start_at = now + min(pause_seconds, LONGEST_RESTART_PAUSE_SECONDS)

    def _settle_claim(self, claim: Claim, reason: str, *, names: Mapping[str, Any]) -> bool:
        """Whether there was anything to settle: a child that worked to its end has ended its claim itself."""
        try:
            status = self._database.free(lambda session: self._end_claim(session, claim, reason))
        except ClaimLost:
            return False
        log.warning("job_settled", status=status, reason=reason, **names)
        return True

    def _end_claim(self, session: Session, claim: Claim, reason: str) -> JobStatus:
        if self._shutdown_deadline is not None:
            status = queue.give_back(session, claim)
        else:
            limit = self._settings.max_crashes_without_progress
            status = queue.crashed(session, claim, reason, max_crashes=limit)
        endings.settle_dataset(session, claim.job_id, kind=claim.kind, status=status)
        return status


class Watch:
    """What a slot knows of the work its child does."""

    def __init__(self, claim: Claim, now: float) -> None:
        self.claim = claim
        # From here until the child has ended: it shows runs whose own spans died with their process.
        self.span: Span = telemetry.start_span(
            f"job {claim.kind}",
            claim.trace_context,
            kind=SpanKind.CONSUMER,
            graft_job=claim.job_id,
            graft_dataset=claim.dataset_id or None,
            graft_fence=claim.fence,
            graft_attempt=claim.attempt,
        )
        self.beat_at = now  # when the next heartbeat is due
        self.still_seconds = 0.0  # without a tick, as far as we looked
        self.cancel_noticed_at: float | None = None
        self.killed_because: str | None = None
        self._ticks = 0
        self._seen_at = now
        self._over_since: float | None = None

    def has_been_over(self, now: float, *, for_seconds: float) -> bool:
        """Whether the job ended so long ago, as far as we have seen."""
        self._over_since = now if self._over_since is None else self._over_since
        return now >= self._over_since + for_seconds

    @property
    def names(self) -> dict[str, Any]:
        """Of the run, for log lines."""
        trace_id = telemetry.trace_id(telemetry.carrier(self.span))
        named = {"job_id": self.claim.job_id, "fence": self.claim.fence}
        return named if trace_id is None else {**named, "trace_id": trace_id}

    def see(self, beat: queue.Beat, now: float, *, interval_seconds: float) -> None:
        if beat.ticks != self._ticks:
            self.still_seconds = 0.0
        else:
            # While the database did not answer, the child could not tick either: that time does not count.
            self.still_seconds += min(now - self._seen_at, 2 * interval_seconds)
        self._ticks, self._seen_at = beat.ticks, now
        self.beat_at = now + interval_seconds


class Child:
    """A child process, in a process group of its own, which ends with everything it has started."""

    def __init__(self, command: Sequence[str], kind: JobKind) -> None:
        self._pipe, child_end = os.pipe()
        self.descriptor: int | None = self._pipe  # None once the child has closed its end
        self.is_ready = False
        try:
            self._process = subprocess.Popen(
                [*command, "--kind", kind, "--ready-fd", str(child_end)],
                stdin=subprocess.PIPE,
                pass_fds=(child_end,),
                start_new_session=True,
            )
        except OSError:
            os.close(self._pipe)
            raise
        finally:
            os.close(child_end)

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for the signal that ended it."""
        self._read_pipe()
        return self._process.poll()

    def hand_over(self, claim: Claim, settings: Settings) -> None:
        assert self._process.stdin is not None
        # A child that has just died is found at the next look.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(order_line(claim, settings))
            self._process.stdin.flush()

    def terminate(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        # Not yet waited for, so its pid cannot be another's.
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Frees what the ended child held. Waits for its end."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        os.close(self._pipe)

    def _read_pipe(self) -> None:
        while self.descriptor is not None and select.select([self.descriptor], [], [], 0)[0]:
            if os.read(self.descriptor, 1):
                self.is_ready = True
            else:
                self.descriptor = None


def _beat(session: Session, claim: Claim) -> tuple[queue.Beat, bool]:
    """And whether the job ended in this very run, where the claim is not held any more."""
    beat = queue.beat(session, claim)
    return beat, beat.lost and queue.has_ended(session, claim)


def _exit_sentence(exit_code: int | None) -> str:
    """How a process ended, for people."""
    if exit_code is None or exit_code == 0:
        return "Its process ended without saying how the job went."
    if exit_code == EXIT_DATABASE_UNAVAILABLE:
        return "Its process could not reach the database."
    if exit_code > 0:
        return f"Its process ended with exit code {exit_code}."
    name = signal.Signals(-exit_code).name
    if exit_code == -signal.SIGKILL:
        return f"Its process was killed ({name}), probably because the machine ran out of memory."
    return f"Its process was ended by signal {name}."


def _set_on_signals(stop: Wakeup) -> None:
    def ask_to_stop(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask_to_stop)


def main() -> str | int:
    keep_private()
    try:
        run_worker(Settings())
    except GraftError as error:
        return error.detail
    return 0


if __name__ == "__main__":
    sys.exit(main())
