"""What the database says, remembered until it changes: so that a prediction costs no query.

SQLite tells in microseconds whether any process has committed anything since. Elsewhere every request asks anew; so a
key that was revoked or an alias that moved is followed by the very next request in both cases.
"""

import asyncio
import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool

from app.db.engine import Database

T = TypeVar("T")
# Some answers depend on the clock too, such as whether a key has expired.
MAX_AGE_SECONDS = 1.0
# Entries kept between two changes; a stranger who tries many names makes no table grow.
MOST_REMEMBERED = 10_000


class Remembered:
    """Belongs to one event loop; close with `close()`."""

    def __init__(self, database: Database) -> None:
        self._changes = database.changes()
        self._version: int | None = None
        self._began = 0.0
        self._found: dict[Hashable, Any] = {}
        self._asking: dict[Hashable, asyncio.Task[Any]] = {}

    async def get(self, key: Hashable, ask: Callable[..., T], *arguments: Any) -> T:
        """ask(*arguments), which reads the database in a thread; or what it said for this key before, if nothing has
        changed since. Asked once, however many want to know at once. Raises what it raises, which is not remembered."""
        version = self._changes.version() if self._changes else None
        if version is None:
            return await run_in_threadpool(ask, *arguments)
        now = time.monotonic()
        if version != self._version or now - self._began > MAX_AGE_SECONDS:
            self._version, self._began = version, now
            self._found.clear()
            self._asking.clear()  # what was asked before the change is for those who asked then
        if key in self._found:
            remembered: T = self._found[key]
            return remembered
        asking = self._asking.get(key)
        if asking is None:
            asking = self._asking[key] = asyncio.create_task(run_in_threadpool(ask, *arguments))
            asking.add_done_callback(partial(self._told, key))
        # Shielded, since one client that leaves must not take the answer from the others.
        found: T = await asyncio.shield(asking)
        return found

    def _told(self, key: Hashable, asking: "asyncio.Task[Any]") -> None:
        has_failed = asking.cancelled() or asking.exception() is not None
        # Asked after the version was read: a change that came between shows at the next look.
        if self._asking.get(key) is asking:
            del self._asking[key]
            if not has_failed and len(self._found) < MOST_REMEMBERED:
                self._found[key] = asking.result()

    def close(self) -> None:
        if self._changes:
            self._changes.close()
