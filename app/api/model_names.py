"""Which model a name means, for prediction: asked of the database once for each change of it, not for each request.

SQLite tells in microseconds whether any process has committed anything since. Elsewhere every request asks anew, so
that an alias that moved is followed by the very next one in both cases.
"""

from starlette.concurrency import run_in_threadpool

from app import registry
from app.api.evaluation import check_predicts
from app.db.engine import Database

# Names that are remembered between two changes; a stranger who tries others makes no table grow.
MOST_REMEMBERED = 10_000


class ModelNames:
    """Belongs to one event loop; close with `close()`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._changes = database.changes()
        self._seen: int | None = None
        self._ids: dict[str, str] = {}

    async def resolve(self, name: str) -> str:
        """The id of the model with this id or alias. Raises NotFound, and Conflict for a backbone without classes."""
        version = self._changes.version() if self._changes else None
        if version is None or version != self._seen:
            self._ids.clear()
            self._seen = version
        known = self._ids.get(name)
        if known is not None:
            return known
        found = await run_in_threadpool(self._find, name)
        # What was read may be older than a change that came meanwhile; then the version differs at the next look.
        if version is not None and version == self._seen and len(self._ids) < MOST_REMEMBERED:
            self._ids[name] = found
        return found

    def close(self) -> None:
        if self._changes:
            self._changes.close()

    def _find(self, name: str) -> str:
        with self._database.read() as session:
            row = registry.find(session, name)
        check_predicts(row)
        return row.id
