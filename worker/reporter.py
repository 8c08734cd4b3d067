"""What a job's work tells the queue, and what it hears back. The only training code that touches the database.

Each call says that the work moves, and may end the work by raising: ClaimLost (somebody else has the job), Cancelled
(its user wants it ended) or ShuttingDown (its worker does). A database that does not answer never ends the work: what
can be said again later is left out, the rest is tried until it is stored. Rows and files that find no room on the disk
wait for it: told, alive, and for so long that an operator can make some; then they raise StorageFull.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, Self, TypeVar

import structlog
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session

from app.db.engine import Database, is_full
from app.db.tables import rfc3339, utc_now
from app.errors import Overloaded, StorageFull
from app.jobs import queue
from app.jobs.queue import Cancelled, Claim, ClaimLost, Signal
from app.settings import Settings
from app.storage import is_disk_full
from worker.wakeup import Wakeup

__all__ = ["Cancelled", "ClaimLost", "Reporter", "ShuttingDown"]

# Often enough for a progress bar and a prompt cancel; each write is a synced commit of about 10 ms on a laptop's disk.
WRITE_INTERVAL_SECONDS = 1.0
# Events stay in the log, so there are fewer of them.
EVENT_INTERVAL_SECONDS = 2.0
LONGEST_RETRY_SECONDS = 10.0
# A job's last word, where even the ballast's room is taken: a job that is over does not hold its memory for an hour.
LAST_WORD_FULL_SECONDS = 60.0

# Of progress, while the work itself stands.
WAITING_STAGE = "waiting_for_room"

# A database that is locked, or cannot be reached: trying again helps. What our own bug breaks is not among them.
DATABASE_ERRORS = (Overloaded, OperationalError, InterfaceError)

T = TypeVar("T")

log = structlog.get_logger(__name__)


class ShuttingDown(Exception):
    """The worker ends: leave a checkpoint if one is due, and let this pass; the job goes back into the queue."""


class _NotWanted(Exception):
    """While it waited for room, what was to be stored has become worth nothing."""


@dataclass(frozen=True)
class Patience:
    """On a full disk: how often files are tried again, and how long a wait may be, in seconds."""

    retry_seconds: float = 60.0
    longest_seconds: float = 3600.0

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(settings.full_disk_retry_seconds, settings.full_disk_patience_seconds)


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
        patience: Patience | None = None,
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
        self._patience = patience or Patience()
        self._monotonic = monotonic
        self._signal = Signal(cancel_requested=False, stop_requested=False)
        self._progress: dict[str, Any] = {}
        self._next_write = self._next_event = -float("inf")
        self._is_ending = False

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

    def stored(self, store: Callable[[], T]) -> T:
        """Runs `store`, which writes files, again from its beginning until the disk has room for them."""
        return self._until_stored(store)

    def stored_unless_stopped(self, store: Callable[[], object]) -> bool:
        """The same for what is worth nothing once the user wants the job to end early. Returns whether it is stored."""
        try:
            self._until_stored(store, is_wanted=lambda: not self.stop_requested)
        except _NotWanted:
            return False
        return True

    def transaction(self, work: Callable[[Session], T]) -> T:
        """Runs `work` in a writing transaction, again from its beginning if the database fails, until it is stored.

        For the story's own final transaction, such as register and succeed. What ends the work ends the waiting too.
        """
        return self._until_stored(lambda: self._written(work))

    def last_word(self, work: Callable[[Session], T]) -> T:
        """The same for what ends the job: on a full disk it may take the ballast's room, and does not wait for long."""
        self._is_ending = True
        return self._until_stored(lambda: self._database.free(work))

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
        if self._signal.cancel_requested and not self._is_ending:
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

    def _until_stored(self, store: Callable[[], T], *, is_wanted: Callable[[], bool] = lambda: True) -> T:
        """Raises _NotWanted where is_wanted says so during a wait for room."""
        pause_seconds = 0.5
        full_until: float | None = None
        while True:
            try:
                stored = store()
            except Exception as error:  # all pass on, but what is known to pass by itself
                is_in_database = isinstance(error, DATABASE_ERRORS)
                if isinstance(error, StorageFull) or not (is_in_database or is_disk_full(error)):
                    raise
                full_until = self._full_until(error, full_until)
            else:
                if full_until is not None:
                    self._tell("There is room on the server's disk again: the job goes on.")
                return stored
            # Outside of the block above, which holds on to all that the failed attempt had made.
            seconds = pause_seconds if is_in_database else self._patience.retry_seconds
            pause_seconds = min(2 * pause_seconds, LONGEST_RETRY_SECONDS)
            log.warning("not_stored", is_disk_full=full_until is not None, retry_in_seconds=seconds)
            if full_until is not None:
                self._wait_for_room(min(self._monotonic() + seconds, full_until), is_wanted)
            elif self._shutdown.wait(seconds):
                raise ShuttingDown

    def _full_until(self, error: Exception, known: float | None) -> float | None:
        """Until when room is waited for, if the disk is full or was when this was last tried; tells it the first time.

        Raises StorageFull once that is over: a job that holds memory, and files that others want the room of, does not
        wait for ever.
        """
        is_in_database = isinstance(error, DATABASE_ERRORS)
        if is_in_database and not (isinstance(error, OperationalError) and is_full(error)):
            return known
        longest_seconds = LAST_WORD_FULL_SECONDS if self._is_ending else self._patience.longest_seconds
        now = self._monotonic()
        if known is None:
            if not (self._is_ending or self._shutdown.is_set):
                self._tell_of_wait(longest_seconds)
            return now + longest_seconds
        if now >= known:
            raise StorageFull(
                f"The server's disk stayed full for {_minutes(longest_seconds)}: the job was given up, nothing of it "
                "is kept. Delete data sets or models, or ask the operator to make room, and submit it again."
            ) from error
        return known

    def _tell_of_wait(self, longest_seconds: float) -> None:
        until = utc_now() + timedelta(seconds=longest_seconds)
        self._tell(
            f"The server's disk is full: the job waits for room until {until:%Y-%m-%d %H:%M} UTC, and goes on by "
            "itself once there is some. Delete data sets or models, or ask the operator to make room.",
            stage=WAITING_STAGE,
            reason="disk_full",
            until=rfc3339(until),
        )

    def _tell(self, message: str, *, stage: str | None = None, **details: Any) -> None:
        """A line for people, and the stage that the job shows with it; in the room of the ballast if need be."""
        progress = dict(self._progress)
        if stage is not None:
            progress |= {"stage": stage, "images_per_second": None, "eta_seconds": None}

        def told(session: Session) -> Signal:
            if self._progress:
                queue.record_progress(session, self._claim, progress, event=True)
            return queue.record_log(session, self._claim, message, **details)

        try:
            self._signal = self._database.free(told)
        except (ClaimLost, *DATABASE_ERRORS) as error:  # what was stored at last may have ended the job
            log.warning("not_told", message=message, error=type(error).__name__)

    def _wait_for_room(self, until: float, is_wanted: Callable[[], bool]) -> None:
        """As alive as at work: it ticks, and ends at once where the work is to end."""
        while (left_seconds := until - self._monotonic()) > 0:
            if self._shutdown.wait(min(left_seconds, WRITE_INTERVAL_SECONDS)):
                raise ShuttingDown
            self.tick()
            if not is_wanted():
                raise _NotWanted


def _minutes(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return "a minute" if minutes == 1 else f"{minutes} minutes"
