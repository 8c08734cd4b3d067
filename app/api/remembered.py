"""What the database says, remembered until it changes: so that a prediction costs no query.

SQLite tells in microseconds whether any process has committed anything since. Elsewhere every request asks anew; so a
key that was revoked or an alias that moved is followed by the very next request in both cases.
"""

import time
from collections.abc import Callable, Hashable
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

    async def get(self, key: Hashable, ask: Callable[..., T], *arguments: Any) -> T:
        """ask(*arguments), which reads the database in a thread; or what it said for this key before, if nothing has
        changed since. Raises what it raises, which is not remembered."""
        if self._changes is None:
            return await run_in_threadpool(ask, *arguments)
        version, now = self._changes.version(), time.monotonic()
        if version != self._version or now - self._began > MAX_AGE_SECONDS:
            self._version, self._began = version, now
            self._found.clear()
        if key in self._found:
            remembered: T = self._found[key]
            return remembered
        found = await run_in_threadpool(ask, *arguments)
        # Read after the version: a change that came between shows at the next look.
        if version is not None and version == self._version and len(self._found) < MOST_REMEMBERED:
            self._found[key] = found
        return found

    def close(self) -> None:
        if self._changes:
            self._changes.close()
