"""Brings a database to the tables of this version of Graft, and tells whether it is there.

The migrations themselves are in `migrations/versions`. All that are missing run in one transaction, so one that is cut
off leaves the database as it was and can be run again.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

import migrations
from app.db.engine import Database
from app.errors import DatabaseMismatch

CONNECTION_ATTRIBUTE = "connection"


def upgrade(url: str) -> None:
    """Runs the migrations that the database lacks, if any. Raises DatabaseMismatch if it is newer than this code."""
    database = Database(url)
    try:
        with database.migration() as connection:
            _refuse_newer(_revision(connection))
            config = _config()
            config.attributes[CONNECTION_ATTRIBUTE] = connection
            command.upgrade(config, "head")
    finally:
        database.dispose()


def check_is_current(database: Database) -> None:
    """Raises DatabaseMismatch, saying what to do, unless the tables are exactly those of this version."""
    with database.read() as session:
        revision = _revision(session.connection())
    _refuse_newer(revision)
    if revision != _scripts().get_current_head():
        raise DatabaseMismatch("The database is not at this version of Graft; run `graft migrate`.")


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _refuse_newer(revision: str | None) -> None:
    known = {script.revision for script in _scripts().walk_revisions()}
    if revision is not None and revision not in known:
        raise DatabaseMismatch(
            f"The database is at revision {revision}, which this version of Graft does not know: a newer one made it. "
            "Install that version, or restore a backup from before."
        )


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _config() -> Config:
    config = Config()
    # Interpolation would take a percent sign in a path for its own.
    config.set_main_option("script_location", str(Path(migrations.__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config
