"""What a job's work tells the queue, and what it hears back. The only training code that touches the database.

Each call says that the work moves, and may end the work by raising: ClaimLost (somebody else has the job), Cancelled
(its user wants it ended) or ShuttingDown (its worker does). A database that does not answer never ends the work: what
can be said again later is left out, the rest is tried until it is stored; on a full disk for a minute, and then it
raises StorageFull.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import structlog
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session

from app.db.engine import Database, is_full
from app.errors import Overloaded, StorageFull
from app.jobs import queue
from app.jobs.queue import Cancelled, Claim, ClaimLost, Signal
from worker.wakeup import Wakeup

__all__ = ["Cancelled", "ClaimLost", "Reporter", "ShuttingDown"]

# Often enough for a progress bar and a prompt cancel; each write is a synced commit of about 10 ms on a laptop's disk.
WRITE_INTERVAL_SECONDS = 1.0
# Events stay in the log, so there are fewer of them.
EVENT_INTERVAL_SECONDS = 2.0
LONGEST_RETRY_SECONDS = 10.0
# Somebody may be making room.
LONGEST_FULL_SECONDS = 60.0

# A database that is locked, or cannot be reached: trying again helps. What our own bug breaks is not among them.
DATABASE_ERRORS = (Overloaded, OperationalError, InterfaceError)

T = TypeVar("T")

log = structlog.get_logger(__name__)


class ShuttingDown(Exception):
    """The worker ends: leave a checkpoint if one is due, and let this pass; the job goes back into the queue."""


class Observer(Protocol):
    """Somebody else who is told what a job does. Neither raises nor waits: the work goes on after each call."""

    def stage(self, stage: str) -> None:
        """The work is at this stage now; told once for each."""

    def epoch(self, epoch: Mapping[str, Any]) -> None:
        """What `Reporter.epoch` was given, once it is stored."""


class Reporter:
    """Speaks for one claim. Used from one thread."""

    def __init__(
        self,
        database: Database,
        claim: Claim,
        *,
        shutdown: Wakeup,
        give_way: Callable[[], object] = lambda: None,
        observers: Sequence[Observer] = (),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """shutdown: set, by a signal handler for example, when the work is to be given back. give_way: waits while
        somebody waits for an answer of a server beside; part of `tick` and `progress`, and for steps without them.
        """
        self._database = database
        self._claim = claim
        self._shutdown = shutdown
        self.give_way = give_way
        self._observers = observers
        self._monotonic = monotonic
        self._signal = Signal(cancel_requested=False, stop_requested=False)
        self._progress: dict[str, Any] = {}
        self._next_write = self._next_event = -float("inf")

    @property
    def stop_requested(self) -> bool:
        """Whether the user wants the job to end now and to register its best epoch; as fresh as the last write."""
        return self._signal.stop_requested

    def tick(self) -> None:
        """Says that work moves, nothing more. Cheap: call it per batch, or per image."""
        self.give_way()
        if self._is_due():
            self._write_if_possible(lambda session: queue.tick(session, self._claim))
        self._raise_if_asked()

    def progress(
        self,
        stage: str,
        *,
        fraction: float | None = None,
        epoch: int | None = None,
        epochs: int | None = None,
        images_per_second: float | None = None,
        eta_seconds: float | None = None,
    ) -> None:
        """Shows how far the job is; cheap, since most calls write nothing. fraction: 0 to 1, of the whole job.

        What is known of epochs and fraction stays until it is said anew; a fraction does not go back, though a pass may
        begin again and a budget prove to have room for more.
        """
        self.give_way()
        if stage != self._progress.get("stage"):
            for observer in self._observers:
                observer.stage(stage)
        lasting = {"epoch": epoch, "epochs": epochs, "fraction": self._furthest(fraction)}
        self._progress = {
            "stage": stage,
            **{name: self._progress.get(name) if value is None else value for name, value in lasting.items()},
            "images_per_second": images_per_second,
            "eta_seconds": eta_seconds,
        }
        if self._is_due():
            progress, is_event = self._progress, self._monotonic() >= self._next_event
            if is_event:
                self._next_event = self._monotonic() + EVENT_INTERVAL_SECONDS
            self._write_if_possible(
                lambda session: queue.record_progress(session, self._claim, progress, event=is_event)
            )
        self._raise_if_asked()

    def epoch(
        self,
        epoch: Mapping[str, Any],
        *,
        metrics: Mapping[str, Any] | None = None,
        progress: Mapping[str, Any] | None = None,
    ) -> None:
        """Adds an epoch to the job's history. epoch: the columns of EpochRow but job_id. metrics: the best so far.

        progress: where the job is with this epoch done, else what was said last.
        """
        if progress is not None:
            self._progress = {**progress, "fraction": self._furthest(progress.get("fraction"))}
        self._write(
            lambda session: queue.record_epoch(
                session,
                self._claim,
                dict(epoch),
                self._progress,
                metrics=None if metrics is None else dict(metrics),
            )
        )
        for observer in self._observers:
            observer.epoch(epoch)
        self._raise_if_asked()

    def log(self, message: str, **details: Any) -> None:
        """Adds a line for people to the job's events."""
        self._write(lambda session: queue.record_log(session, self._claim, message, **details))
        self._raise_if_asked()

    def checkpoint(self, step: int, *, metrics: Mapping[str, Any] | None = None) -> None:
        """Says that the state after `step` (steps only grow) is on disk, synced and renamed. metrics: found up to it.

        Raises ClaimLost alone, so that it can be called on the way out too.
        """
        found = None if metrics is None else dict(metrics)
        self._write(lambda session: queue.record_checkpoint(session, self._claim, step, metrics=found))

    def last_word(self, work: Callable[[Session], T]) -> T:
        """The same for what ends the job; on a full disk it may take the ballast's room."""
        return self._until_stored(lambda: self._database.free(work))

    def transaction(self, work: Callable[[Session], T]) -> T:
        """Runs `work` in a writing transaction, again from its beginning if the database fails, until it is stored.

        For the story's own final transaction, such as register and succeed; ShuttingDown ends the waiting.
        """
        return self._until_stored(lambda: self._written(work))

    def _furthest(self, fraction: float | None) -> float | None:
        known: float | None = self._progress.get("fraction")
        return known if fraction is None else max(fraction, known or 0.0)

    def _is_due(self) -> bool:
        now = self._monotonic()
        if now < self._next_write:
            return False
        self._next_write = now + WRITE_INTERVAL_SECONDS
        return True

    def _raise_if_asked(self) -> None:
        if self._signal.cancel_requested:
            raise Cancelled
        if self._shutdown.is_set:
            raise ShuttingDown

    def _write(self, work: Callable[[Session], Signal]) -> None:
        self._signal = self._until_stored(lambda: self._written(work))

    def _write_if_possible(self, work: Callable[[Session], Signal]) -> None:
        try:
            with self._database.write() as session:
                self._signal = work(session)
        except DATABASE_ERRORS as error:
            log.warning("progress_not_stored", error=type(error).__name__)

    def _written(self, work: Callable[[Session], T]) -> T:
        with self._database.write() as session:
            return work(session)

    def _until_stored(self, store: Callable[[], T]) -> T:
        delay_seconds = 0.5
        full_since: float | None = None
        while True:
            try:
                return store()
            except DATABASE_ERRORS as error:
                log.warning("database_unavailable", error=type(error).__name__, retry_in_seconds=delay_seconds)
                full_since = self._full_since(error, full_since)
            if self._shutdown.wait(delay_seconds):
                raise ShuttingDown
            delay_seconds = min(2 * delay_seconds, LONGEST_RETRY_SECONDS)

    def _full_since(self, error: Exception, earlier: float | None) -> float | None:
        """When the disk was first found full, in a row. Raises StorageFull once that is long ago: a job that holds
        memory, and files that others want the room of, does not wait for ever."""
        if not (isinstance(error, OperationalError) and is_full(error)):
            return None
        now = self._monotonic()
        if earlier is not None and now - earlier >= LONGEST_FULL_SECONDS:
            raise StorageFull(
                "The server's disk was full for so long that the job was given up. Submit it again once there is room: "
                "delete data sets or models, or ask its operator."
            ) from error
        return now if earlier is None else earlier
