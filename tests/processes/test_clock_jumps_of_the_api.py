"""The API's wall clock jumps by an hour and by days while it works: nothing that it holds or has answered is lost."""

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
import pytest
from other_clock import LIBRARIES, Clock
from running import START_WITHIN_SECONDS, environment_for, pictures_zip, wait_until

from app.db.migrate import upgrade
from app.db.tables import utc_now
from app.supervisor import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LIBRARIES, reason="needs libfaketime (apt-get install libfaketime)"),
]

JUMPS = {"+2d": timedelta(days=2), "-2d": timedelta(days=-2), "+3700": timedelta(seconds=3700)}
SOON_SECONDS = 30.0
TUS = {"Tus-Resumable": "1.0.0"}
PIECE = {**TUS, "Content-Type": "application/offset+octet-stream"}

# What the API and the worker sweep when they start, whenever it is told to.
SWEEPS = """
import sys
from app.db.engine import Database
from app.settings import Settings
from app.storage import LocalStorage
from worker.endings import sweep_files

settings = Settings()
storage = LocalStorage(settings.storage_root)
for _ in sys.stdin:
    storage.sweep()
    sweep_files(Database(settings.resolved_database_url), storage)
    print("swept", flush=True)
"""


@dataclass(frozen=True)
class Api:
    """A process of its own, with a clock of its own. Every request is asked with a key, but the one under test."""

    http: httpx.Client
    clock: Clock
    data: Path
    brief_key: str  # of a day
    sweeper: "subprocess.Popen[str]"

    def sweep(self) -> None:
        """As other processes that start now do, beside this one."""
        assert self.sweeper.stdin is not None
        assert self.sweeper.stdout is not None
        self.sweeper.stdin.write("now\n")
        self.sweeper.stdin.flush()
        assert self.sweeper.stdout.readline() == "swept\n"

    def now(self) -> datetime:
        return parsedate_to_datetime(self.http.get("/healthz").headers["date"])

    def jump(self, offset: str) -> None:
        self.clock.set(offset)
        wait_until(  # it dates its answers anew each second
            lambda: abs(self.now() - utc_now() - JUMPS[offset]) < timedelta(minutes=1),
            within_seconds=SOON_SECONDS,
            otherwise="its clock has not jumped",
        )


@pytest.fixture(scope="module")
def running_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("jumping")
    data, clock, port = folder / "data", Clock(folder / "clock"), free_port("127.0.0.1")
    data.mkdir()
    upgrade(f"sqlite:///{data / 'graft.db'}")
    keys = [create_key(data, "--scope", "admin"), create_key(data, "--scope", "train", "--expires-days", "1")]
    environment = environment_for(data, port=str(port), device="cpu") | dict(clock.environment)
    with (folder / "api.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.main"], cwd=folder, env=environment, stdout=log, stderr=log
        )
    sweeper = subprocess.Popen(
        [sys.executable, "-c", SWEEPS], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    http = httpx.Client(
        base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {keys[0]}"}, timeout=SOON_SECONDS
    )
    try:
        wait_until(lambda: is_up(http), within_seconds=START_WITHIN_SECONDS, otherwise="the API did not start")
        yield Api(http, clock, data, keys[1], sweeper)
    finally:
        http.close()
        sweeper.communicate()  # ends with its input
        process.kill()
        process.wait()


@pytest.fixture
def api(running_api: Api) -> Iterator[Api]:
    """With the machine's clock, until a test sets another. It has said 500 to nobody at the end."""
    running_api.clock.set("+0")
    yield running_api
    assert '"status": 500' not in (running_api.data.parent / "api.log").read_text()


def create_key(data: Path, *options: str) -> str:
    command = [sys.executable, "-m", "app.cli", "keys", "create", *options]
    return subprocess.run(command, env=environment_for(data), capture_output=True, text=True, check=True).stdout.strip()


def is_up(http: httpx.Client) -> bool:
    try:
        return http.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False


@dataclass
class OnItsWay:
    """An upload of which half has come; the rest comes when it is told to go on."""

    answer: Future[httpx.Response]
    go_on: threading.Event


@contextmanager
def half_sent(api: Api, archive: bytes, key: str) -> Iterator[OnItsWay]:
    go_on = threading.Event()

    def body() -> Iterator[bytes]:
        yield archive[: len(archive) // 2]
        go_on.wait(SOON_SECONDS)
        yield archive[len(archive) // 2 :]

    with ThreadPoolExecutor() as pool:
        answer = pool.submit(put, api, body(), key)
        try:
            staging = api.data / "staging"
            wait_until(lambda: any(staging.iterdir()), within_seconds=SOON_SECONDS, otherwise="nothing has come")
            yield OnItsWay(answer, go_on)
        finally:
            go_on.set()


def put(api: Api, content: bytes | Iterator[bytes], key: str) -> httpx.Response:
    return api.http.put("/v1/datasets", content=content, headers={"Idempotency-Key": key})


@pytest.mark.parametrize("jump", JUMPS)
def test_what_is_on_its_way_arrives_and_what_was_answered_is_answered_again(api: Api, jump: str) -> None:
    archives = [pictures_zip(per_class=4, seed=seed) for seed in (0, 1, 2)]
    before = put(api, archives[0], f"before{jump}")
    path = api.http.post("/v1/uploads", headers={**TUS, "Upload-Length": str(len(archives[2]))}).headers["location"]
    api.http.patch(path, content=archives[2][:1000], headers={**PIECE, "Upload-Offset": "0"})
    with half_sent(api, archives[1], f"during{jump}") as sending:
        api.jump(jump)
        api.sweep()
        assert put(api, archives[1], f"during{jump}").status_code == 409, "it is being worked on"
    last = api.http.patch(path, content=archives[2][1000:], headers={**PIECE, "Upload-Offset": "1000"})
    during = sending.answer.result()
    api.clock.set("+0")

    assert (before.status_code, during.status_code, last.status_code) == (201, 201, 204)
    for answer, archive, key in ((before, archives[0], f"before{jump}"), (during, archives[1], f"during{jump}")):
        for offset in (jump, "+0"):
            api.clock.set(offset)
            again = put(api, archive, key)
            assert (again.json(), again.headers["idempotent-replayed"]) == (answer.json(), "true")
    made = [before.json()["id"], during.json()["id"], last.headers["graft-dataset"]]
    assert len(set(made)) == 3
    for dataset, archive in zip(made, archives, strict=True):
        assert api.http.get(f"/v1/datasets/{dataset}").status_code == 200
        assert (api.data / "datasets" / dataset / "archive").read_bytes() == archive


@pytest.mark.parametrize("jump", JUMPS)
def test_files_whose_row_is_still_to_come_are_not_swept(api: Api, jump: str) -> None:
    """A database that is locked holds the API between the two."""
    archive = pictures_zip(per_class=4, seed=3)
    published, announced = api.data / "datasets", api.data / "announced"
    known = set(published.glob("*"))
    other = sqlite3.connect(api.data / "graft.db", isolation_level=None, timeout=SOON_SECONDS)
    with closing(other) as database, half_sent(api, archive, f"locked{jump}") as sending:
        database.execute("BEGIN IMMEDIATE")
        sending.go_on.set()
        wait_until(
            lambda: any((path / "archive").exists() for path in set(published.glob("*")) - known),
            within_seconds=SOON_SECONDS,
            otherwise="nothing is published",
        )
        assert len(list(announced.iterdir())) == 1
        api.jump(jump)
        api.sweep()
        database.execute("ROLLBACK")

        answer = sending.answer.result()
    assert answer.status_code == 201, answer.text
    assert (published / answer.json()["id"] / "archive").read_bytes() == archive
    assert list(announced.iterdir()) == []


def test_key_of_a_day_is_good_as_long_as_the_clock_says_so(api: Api) -> None:
    headers = {"Authorization": f"Bearer {api.brief_key}"}

    def status() -> int:
        return api.http.get("/v1/jobs", headers=headers).status_code

    for offset, expected in (("+0", 200), ("+2d", 401), ("-2d", 200), ("+3700", 200), ("+2d", 401), ("+0", 200)):
        api.clock.set(offset)
        # What was found is remembered for a second.
        wait_until(lambda: status() == expected, within_seconds=SOON_SECONDS, otherwise=f"{offset}: {status()}")  # noqa: B023
