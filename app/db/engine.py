"""The database: one engine, and the two kinds of transaction that everything else uses.

The only file that knows which database it is. SQLite runs in WAL mode with every writing transaction begun as
IMMEDIATE: a deferred one that reads before it writes fails with "database is locked" as soon as another writer comes
between, whatever the busy timeout.
"""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import structlog
from sqlalchemy import Connection, Engine, ExceptionContext, create_engine, event, func, make_url, select, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from app.db.ballast import Ballast
from app.db.sqlite import sqlite3
from app.db.tenancy import Actor, TenantSession
from app.errors import Overloaded
from app.storage import make_folder

# Waiting writers get this long. Shorter than a worker's lease (45 s), so that a lock never costs a lease.
BUSY_TIMEOUT_SECONDS = 30
# Each who waits for SQLite's lock has one of the 15 connections and of the 40 threads that answer requests. The others
# are for who only reads: so no more wait at a time, and who finds no place in a moment is told to come again.
WAITING_WRITERS = 8
WRITERS_PATIENCE_SECONDS = 1.0
# A PostgreSQL that has gone without a word, its machine for example, is given up after half a minute instead of hours.
# What the URL says goes before. Source: postgresql.org/docs/current/libpq-connect.html.
POSTGRES_PATIENCE = {
    "connect_timeout": 10,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
# A process that is frozen within a transaction (its machine, a debugger) holds locks that everybody may wait for. It is
# broken off before those who wait give up; both before a lease ends. None of our transactions waits for anything else.
IDLE_IN_TRANSACTION_SECONDS = 25
LOCK_TIMEOUT_SECONDS = 30
# Its word for a transaction that may change nothing. Source: postgresql.org/docs/current/errcodes-appendix.html.
_READ_ONLY = "25006"
# Any number that is nobody else's: of two that make the same table at once, one fails.
_MIGRATION_LOCK = int.from_bytes(b"graft")

T = TypeVar("T")

log = structlog.get_logger(__name__)


class Database:
    """One engine with `write()` and `read()` transactions. Close with `dispose()`.

    As it is made it sees everything, and cannot make what belongs to a workspace; that is for `within`.
    """

    def __init__(self, url: str, *, ballast_bytes: int = 0) -> None:
        """ballast_bytes: that `keep_ballast` puts beside an SQLite database, and deleting on a full disk takes."""
        self._is_sqlite = make_url(url).get_backend_name() == "sqlite"
        path = make_url(url).database
        is_file = self._is_sqlite and path and path != ":memory:"
        self._ballast = Ballast(Path(f"{path}-ballast"), ballast_bytes) if is_file else None
        self.engine = _sqlite_engine(url) if self._is_sqlite else _postgres_engine(url)
        self._writers = threading.BoundedSemaphore(WAITING_WRITERS)
        self.workspace_id: str | None = None
        self._actor: Actor | None = None

    def within(self, workspace_id: str | None, *, actor: Actor | None = None) -> Self:
        """The same database as one workspace sees it: rows of others are not there, and what is made belongs to it.

        actor: who asks; what they change is then in the audit log. None for workspace_id: as it is made.
        """
        view = copy.copy(self)
        view.workspace_id, view._actor = workspace_id, actor
        return view

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that may change things: committed on leaving, rolled back on any exception.

        Raises Overloaded if the database stays locked for longer than the busy timeout, if many wait for that already,
        or if it cannot be reached; in the latter case the change may have been made, if it was at its very end.
        """
        with (
            self._place_among_writers(),
            self._session("BEGIN IMMEDIATE") as session,
            _unavailable_means_overloaded(),
            session.begin(),
        ):
            yield session
            session.add_to_audit_log()

    def free(self, work: Callable[[Session], T]) -> T:
        """Runs `work`, which makes room or has little to say, in a writing transaction. On a full disk once more, in
        the room of the ballast. Raises what `write` does."""
        try:
            with self.write() as session:
                return work(session)
        except OperationalError as error:
            if not is_full(error) or self._ballast is None or not self._ballast.release():
                raise
            log.warning("ballast_released")
        with self.write() as session:
            return work(session)

    def keep_ballast(self) -> bool:
        """Makes the ballast where it is not there. Returns whether it is there, or none is wanted."""
        return self._ballast is None or self._ballast.keep()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that only reads, from one consistent state, and never waits for writers.

        Raises Overloaded if the database cannot be reached.
        """
        with self._session("BEGIN") as session, _unavailable_means_overloaded(), session.begin():
            if not self._is_sqlite:
                session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            yield session
            session.expunge_all()  # so that rows stay readable after the rollback, which would expire them
            session.rollback()

    @contextmanager
    def migration(self) -> Iterator[Connection]:
        """One transaction that may change the tables themselves: all of it happens, or nothing. One at a time.

        SQLite alters a table by rebuilding it, and dropping the old one would delete every row that refers to it. So
        foreign keys are not enforced here but checked at the end; IntegrityError says which table breaks one. Raises
        Overloaded as `write` does.
        """
        with _unavailable_means_overloaded(), self.engine.connect() as connection:
            if not self._is_sqlite:
                with connection.begin():
                    connection.execute(select(func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
                    yield connection
                return
            # Within a transaction this pragma does nothing, so it goes to the driver before SQLAlchemy begins one.
            driver_connection = cast(Any, connection.connection.driver_connection)
            driver_connection.execute("PRAGMA foreign_keys=OFF")
            try:
                with connection.begin():
                    yield connection
                    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
                    if broken is not None:
                        raise sqlite3.IntegrityError(f"a foreign key of table {broken[0]} refers to nothing")
            finally:
                driver_connection.execute("PRAGMA foreign_keys=ON")

    def changes(self) -> "Changes | None":
        """Tells whether anything was committed; None for a database that cannot say so without being asked for rows."""
        path = self.engine.url.database
        return Changes(path) if self._is_sqlite and path and path != ":memory:" else None

    def check(self) -> None:
        """Raises Overloaded if the database does not answer."""
        with self.read() as session:
            session.execute(text("SELECT 1"))

    def dispose(self) -> None:
        self.engine.dispose()

    @contextmanager
    def _place_among_writers(self) -> Iterator[None]:
        if not self._is_sqlite:
            yield
        elif self._writers.acquire(timeout=WRITERS_PATIENCE_SECONDS):
            try:
                yield
            finally:
                self._writers.release()
        else:
            raise _busy()

    @contextmanager
    def _session(self, begin: str) -> Iterator[TenantSession]:
        engine = self.engine.execution_options(sqlite_begin=begin) if self._is_sqlite else self.engine
        with TenantSession(engine, workspace_id=self.workspace_id, actor=self._actor) as session:
            yield session


class Changes:
    """A number that is another one after every commit of any other connection, in any process: a few microseconds.

    Source: sqlite.org/pragma.html, data_version. Belongs to one thread.
    """

    def __init__(self, path: str) -> None:
        # What is locked for a moment is asked again, as everything else is; a look takes no lock in WAL mode.
        self._connection = sqlite3.connect(path, timeout=1.0, isolation_level=None)

    def version(self) -> int | None:
        """None where that cannot be told just now."""
        try:
            row = self._connection.execute("PRAGMA data_version").fetchone()
        except sqlite3.OperationalError:
            return None
        return int(row[0])

    def close(self) -> None:
        self._connection.close()


def is_full(error: Exception) -> bool:
    """Whether what went wrong is that the database's disk has no room. Nothing was changed then.

    error: SQLAlchemy's OperationalError, or a driver's own.
    """
    said = str(getattr(error, "orig", error))
    return "disk is full" in said or "No space left on device" in said  # SQLite's words, and PostgreSQL's


def _sqlite_engine(url: str) -> Engine:
    path = make_url(url).database
    if path and path != ":memory:":
        make_folder(Path(path).parent)
    patience = {"timeout": BUSY_TIMEOUT_SECONDS}
    engine = create_engine(url, module=sqlite3, connect_args=patience, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        # The driver's own deferred BEGIN is switched off; ours is emitted below.
        connection.isolation_level = None
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",  # what was answered with 201 survives a power cut
            "foreign_keys=ON",
            "trusted_schema=OFF",
            f"busy_timeout={BUSY_TIMEOUT_SECONDS * 1000}",
            f"journal_size_limit={64 * 1024**2}",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("sqlite_begin", "BEGIN IMMEDIATE"))

    return engine


def _postgres_engine(url: str) -> Engine:
    said = make_url(url).query
    patience: dict[str, Any] = {name: value for name, value in POSTGRES_PATIENCE.items() if name not in said}
    ours = {"idle_in_transaction_session_timeout": IDLE_IN_TRANSACTION_SECONDS, "lock_timeout": LOCK_TIMEOUT_SECONDS}
    options = " ".join(f"-c {name}={seconds * 1000}" for name, seconds in ours.items())
    # Of two that say the same the last one counts.
    patience["options"] = f"{options} {said.get('options', '')}".rstrip()
    # Connections that a restart of PostgreSQL has ended are noticed before they are used. What statements were given is
    # secret now and then, and errors are logged.
    engine = create_engine(url, pool_pre_ping=True, connect_args=patience, hide_parameters=True)

    @event.listens_for(engine, "handle_error")
    def leave_a_stand_by(context: ExceptionContext) -> None:
        # Whoever is there once the connections are made anew may take changes again, as after a failover.
        if getattr(context.original_exception, "sqlstate", None) == _READ_ONLY:
            context.is_disconnect = True

    return engine


@contextmanager
def _unavailable_means_overloaded() -> Iterator[None]:
    try:
        yield
    except PoolTimeout as error:
        raise Overloaded("Too many requests wait for the database; try again.", retry_after_seconds=5) from error
    except DBAPIError as error:
        if _is_locked(error):
            raise _busy() from error
        if _is_away(error):
            raise Overloaded("The database does not answer; try again.", retry_after_seconds=5) from error
        raise


def _busy() -> Overloaded:
    return Overloaded("The database is busy; try again.", retry_after_seconds=5)


def _is_locked(error: DBAPIError) -> bool:
    if getattr(error.orig, "sqlstate", None) == "55P03":  # PostgreSQL's lock_timeout
        return True
    return isinstance(error.orig, sqlite3.OperationalError) and "locked" in str(error.orig)


def _is_away(error: DBAPIError) -> bool:
    """Whether PostgreSQL cannot be reached, starts, ends, has no place for one more, takes no changes, or broke this
    transaction off."""
    if error.connection_invalidated:
        return True
    of_sqlite = isinstance(error.orig, sqlite3.Error)
    return isinstance(error, OperationalError) and not of_sqlite and not is_full(error)
