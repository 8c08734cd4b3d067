"""How much each workspace asks for, as far as that is limited: requests a second, pictures a day, wrong keys a minute;
and when keys were last used.

Counted in this process's memory. Requests and wrong keys are forgotten with it, and each of several API processes
allows as many; predictions and uses of keys are written down every few seconds.
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime

from app import access, workspaces
from app.access import Caller
from app.db.engine import Database
from app.errors import GraftError, TooManyRequests
from app.workspaces import Workspace

# What may come at once, in seconds of the long-run rate.
BURST_SECONDS = 2.0
WRONG_KEYS_PER_MINUTE = 100
# Callers kept in mind at a time; strangers' addresses are as many as they like.
MOST_REMEMBERED = 10_000


class Throttle:
    """How soon each of many callers may come again: the generic cell rate algorithm, one number a caller.

    Source: ITU-T I.371, annex A. Belongs to one event loop.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._next: dict[str, float] = {}  # when a caller's next one would come if all came evenly

    def take(self, caller: str, *, per_second: float, burst: float) -> float:
        """0 if the caller may; else the seconds until it may. burst: how many may come at once, at least 1."""
        now = self._monotonic()
        due = max(self._next.get(caller, now), now)
        wait = due - now - (max(burst, 1.0) - 1.0) / per_second
        if wait > 1e-9:
            return wait
        if len(self._next) >= MOST_REMEMBERED:
            self._next = {name: at for name, at in self._next.items() if at > now}
        self._next[caller] = due + 1.0 / per_second
        return 0.0


class Traffic:
    """Counts, and refuses what is too much with TooManyRequests. Belongs to one event loop, but `predicting` and
    `note_use`."""

    def __init__(self, database: Database, today: Callable[[], date] = lambda: datetime.now(UTC).date()) -> None:
        self._database = database
        self._today = today
        self._requests = Throttle()
        self._wrong_keys = Throttle()
        self._lock = threading.Lock()
        self._unwritten: Counter[tuple[str, date]] = Counter()
        self._being_written: Counter[tuple[str, date]] = Counter()
        self._written: dict[tuple[str, date], int] = {}
        self._used: set[Caller] = set()

    def take_request(self, workspace: Workspace) -> None:
        per_second = workspace.limits.requests_per_second
        if per_second is None:
            return
        wait = self._requests.take(workspace.id, per_second=per_second, burst=BURST_SECONDS * per_second)
        if wait:
            raise TooManyRequests(
                f"The workspace {workspace.name} may make {per_second:g} requests a second; come back a little later.",
                retry_after_seconds=math.ceil(wait),
            )

    def take_wrong_key(self, address: str) -> None:
        """A key that is right is never refused for others of its address that are wrong."""
        wait = self._wrong_keys.take(address, per_second=WRONG_KEYS_PER_MINUTE / 60, burst=WRONG_KEYS_PER_MINUTE)
        if wait:
            raise TooManyRequests(
                "Too many requests with wrong keys came from this address.", retry_after_seconds=math.ceil(wait)
            )

    @contextmanager
    def predicting(self, workspace: Workspace, count: int) -> Iterator[None]:
        """Counts so many pictures for what is done inside. All of them count, or none where it is refused."""
        counted = (workspace.id, self._today())
        with self._lock:
            workspace.check_predictions(self._count(counted), count)
            self._unwritten[counted] += count
        try:
            yield
        except GraftError:
            with self._lock:
                self._unwritten[counted] -= count
            raise

    def note_use(self, caller: Caller) -> None:
        """Later: a request that only reads waits for no lock of the database, and needs no room on its disk."""
        with self._lock:
            self._used.add(caller)

    def predictions_today(self, workspace: Workspace) -> int:
        with self._lock:
            return self._count((workspace.id, self._today()))

    def write_down(self) -> None:
        """Adds what was counted to the database, and sees what other processes counted. Blocking."""
        self._write_uses()
        self._write_predictions()

    def _write_uses(self) -> None:
        with self._lock:
            used, self._used = self._used, set()
        if not used:
            return
        try:
            with self._database.write() as session:
                for caller in used:
                    access.note_use(session, caller)
        except BaseException:
            with self._lock:
                self._used |= used
            raise

    def _write_predictions(self) -> None:
        with self._lock:
            counts, self._unwritten = self._unwritten, Counter()
            self._being_written.update(counts)
            days = {*counts, *(of for of in self._written if of[1] == self._today())}
        if not days:
            return
        try:
            if counts:
                with self._database.write() as session:
                    written = {of: workspaces.add_predictions(session, *of, count) for of, count in counts.items()}
            else:
                with self._database.read() as session:
                    written = {of: workspaces.predictions_on(session, *of) for of in days}
        except BaseException:
            with self._lock:
                self._unwritten.update(counts)
                self._being_written.subtract(counts)
            raise
        with self._lock:
            self._being_written.subtract(counts)
            self._written = {of: count for of, count in (self._written | written).items() if of[1] == self._today()}

    def _count(self, counted: tuple[str, date]) -> int:
        if counted not in self._written:
            with self._database.read() as session:
                self._written[counted] = workspaces.predictions_on(session, *counted)
        return self._written[counted] + self._being_written[counted] + self._unwritten[counted]
