"""What is PostgreSQL's own: how it says that it cannot be used just now."""

from collections.abc import Callable

import pytest
from sqlalchemy import text

from app.db.engine import Database
from app.db.migrate import upgrade
from app.db.tables import DEFAULT_WORKSPACE, JobRow
from app.errors import Overloaded
from app.jobs import queue
from app.jobs.states import JobKind


def test_one_that_takes_no_changes_is_away_until_it_does(empty_postgres_url: Callable[[], str]) -> None:
    """As a stand-by after a failover, or one whose disk is nearly full where that is somebody else's care."""
    url = empty_postgres_url()
    upgrade(url)
    operator, database = Database(url), Database(url).within(DEFAULT_WORKSPACE)

    def set_read_only(value: str) -> None:
        with operator.migration() as connection:
            connection.execute(text("SET TRANSACTION READ WRITE"))
            name = connection.scalar(text("SELECT current_database()"))
            connection.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only = {value}"))

    def submit() -> str:
        with database.write() as session:
            return queue.submit(session, kind=JobKind.training, dataset_id="ds_1", spec={}).id

    set_read_only("on")
    for _ in range(2):
        with pytest.raises(Overloaded, match="The database does not answer"):
            submit()
        with database.read() as session:
            assert session.query(JobRow).count() == 0

    set_read_only("off")
    with pytest.raises(Overloaded):  # over a connection from before
        submit()
    job_id = submit()

    with database.read() as session:
        assert queue.find(session, job_id).status == "queued"
    operator.dispose()
    database.dispose()
