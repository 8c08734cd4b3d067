"""What is acknowledged is there after a power cut at that very moment: seen in the system calls of real processes."""

import hashlib
import random
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import api_builders
import httpx
import power_cut
import psutil
import pytest
from power_cut import Disk, replay, strace
from running import STOP_WITHIN_SECONDS, environment_for, graft_up, picture, pictures_zip

from app.db.migrate import upgrade

pytestmark = pytest.mark.skipif(power_cut.STRACE is None, reason="needs strace (apt-get install strace)")

TUS = {"Tus-Resumable": "1.0.0"}
PIECE = {**TUS, "Content-Type": "application/offset+octet-stream"}
# What a cut may take although something was answered, since no answer speaks of it.
MAY_BE_LOST = re.compile(
    r"""graft\.db-shm            # SQLite's index of its log, made anew from that
    | graft\.db-ballast.*        # bytes that say nothing
    | staging(/.*)?              # what is not published
    | datasets/[^/]+/features.*  # made anew from the pictures
    | serving-busy               # a sign from the API to jobs beside it
    """,
    re.VERBOSE,
)
Rows = list[tuple[Any, ...]]


class Left:
    """What a cut has left of the data folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rows(self, statement: str, *values: object) -> Rows:
        with closing(sqlite3.connect(self.folder / "graft.db")) as database:
            return database.execute(statement, values).fetchall()

    def sha256(self, key: str) -> str | None:
        path = self.folder / key
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None

    def check_is_sound(self) -> None:
        """The database is whole, and no row of it speaks of a file that is not."""
        assert self.rows("PRAGMA integrity_check") == [("ok",)]
        for dataset, sha256 in self.rows("SELECT id, sha256 FROM datasets"):
            assert self.sha256(f"datasets/{dataset}/archive") == sha256
        for (dataset,) in self.rows("SELECT id FROM datasets WHERE status = 'ready'"):
            assert self.sha256(f"datasets/{dataset}/manifest.jsonl") is not None
        for model, sha256 in self.rows("SELECT id, sha256 FROM models"):
            assert self.sha256(f"models/{model}/weights.safetensors") == sha256
        for (upload,) in self.rows("SELECT id FROM uploads WHERE status = 'open'"):
            assert self.sha256(f"uploads/{upload}/archive") is not None


Promise = Callable[[Left], bool]


class Caller:
    """Asks the API, and notes what each answer has promised."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=90)
        self.promises: dict[str, Promise] = {}  # by the request's id

    def close(self) -> None:
        self.http.close()

    def ask(self, method: str, path: str, promise: Callable[[httpx.Response], Promise], **request: Any) -> Any:
        request_id = f"request-{len(self.promises)}"
        headers = {"X-Request-ID": request_id, **request.pop("headers", {})}
        answer = self.http.request(method, path, headers=headers, **request)
        assert answer.is_success, answer.text
        self.promises[request_id] = promise(answer)
        return answer


def has_row(table: str, **values: object) -> Promise:
    where = " AND ".join(f"{name} = ?" for name in values)
    return lambda left: bool(left.rows(f"SELECT 1 FROM {table} WHERE {where}", *values.values()))  # noqa: S608


def has_first_bytes(key: str, expected: bytes) -> Promise:
    def look(left: Left) -> bool:
        path = left.folder / key
        return path.is_file() and path.read_bytes()[: len(expected)] == expected

    return look


def use_everything(caller: Caller) -> str:
    """Returns a picture's label."""
    caller.ask(
        "PUT", "/v1/datasets", lambda answer: has_row("datasets", id=answer.json()["id"]), content=pictures_zip(seed=1)
    )
    archive = pictures_zip(seed=2)
    begun = caller.ask(
        "POST",
        "/v1/uploads",
        lambda answer: has_row("uploads", id=answer.json()["id"]),
        headers={**TUS, "Upload-Length": str(len(archive))},
    )
    path, half = begun.headers["location"], len(archive) // 2
    caller.ask(
        "PATCH",
        path,
        lambda _: has_first_bytes(f"uploads/{begun.json()['id']}/archive", archive[:half]),
        headers={**PIECE, "Upload-Offset": "0"},
        content=archive[:half],
    )
    whole = caller.ask(
        "PATCH",
        path,
        lambda answer: has_first_bytes(f"datasets/{answer.headers['graft-dataset']}/archive", archive),
        headers={**PIECE, "Upload-Offset": str(half)},
        content=archive[half:],
    )
    dataset = whole.headers["graft-dataset"]
    caller.ask("GET", f"/v1/datasets/{dataset}?wait=60", lambda _: has_row("datasets", id=dataset, status="ready"))
    job = caller.ask(
        "POST",
        "/v1/jobs",
        lambda answer: has_row("jobs", id=answer.json()["id"]),
        json={"dataset": dataset, "method": "few_shot", "promote": "always"},
    ).json()["id"]
    model = caller.ask(
        "GET",
        f"/v1/jobs/{job}?wait=60",
        lambda answer: has_row("jobs", id=job, status="succeeded", model_id=answer.json()["model"]),
    ).json()["model"]
    label = caller.http.post("/predict", content=picture(0, chance=random.Random(1))).json()["predictions"][0]["label"]
    caller.ask(
        "PUT", "/v1/aliases/chosen", lambda _: has_row("aliases", name="chosen", model_id=model), json={"model": model}
    )
    return str(label)


@pytest.mark.slow
def test_everything_that_was_answered_outlasts_a_power_cut_as_it_is_answered(tmp_path: Path) -> None:
    data, trace = tmp_path / "data", tmp_path / "trace"
    data.mkdir()
    upgrade(f"sqlite:///{data / 'graft.db'}")
    disk = Disk(data)
    with graft_up(tmp_path, under=strace(trace)) as graft:
        with closing(Caller(graft.url)) as caller:
            label = use_everything(caller)
        [up] = psutil.Process(graft.process.pid).children()
        up.terminate()
        graft.process.wait(STOP_WITHIN_SECONDS)

    kept: list[str] = []

    def look(sent: bytes) -> None:
        said = re.match(rb"HTTP/1\.1 2.*?\r\nx-request-id: (request-\d+)\r\n", sent, re.DOTALL)
        if said is None:
            return
        request_id = said[1].decode()
        left = Left(tmp_path / request_id)
        disk.leave(left.folder, as_now=data)
        left.check_is_sound()
        assert caller.promises[request_id](left), request_id
        kept.append(request_id)
        if len(kept) == len(caller.promises):  # when nothing else was going on
            assert {path for path in disk.unsynced() if not MAY_BE_LOST.fullmatch(path)} == set()

    replay(trace, disk, look)

    assert kept == list(caller.promises)
    settings = api_builders.settings_for(tmp_path, data_dir=tmp_path / kept[-1])
    with api_builders.RunningServer(settings) as server, api_builders.client_of(server) as http:
        again = http.post("/predict?model=chosen", content=picture(0, chance=random.Random(1)))
        assert again.json()["predictions"][0]["label"] == label
        assert [dataset["status"] for dataset in http.get("/v1/datasets").json()["data"]] == ["ready", "ready"]


def test_key_outlasts_a_power_cut_as_it_is_shown(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    upgrade(f"sqlite:///{data / 'graft.db'}")
    command = [sys.executable, "-m", "app.cli", "keys", "create", "--scope", "admin"]

    shown = look_at_each_line(command, data, lambda left: left.rows("SELECT id FROM api_keys"))

    [(line, rows)] = [(line, rows) for line, rows in shown if line.startswith("ft_")]
    [(key_id,)] = rows
    assert key_id.removeprefix("key_") in line


def test_folders_of_a_first_start_outlast_a_power_cut(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    program = f"""
from pathlib import Path
from app.db.engine import Database
from app.storage import LocalStorage
LocalStorage(Path({str(data)!r}) / "new" / "storage")
with Database({f"sqlite:///{data}/other/graft.db"!r}).write() as session:
    session.connection().exec_driver_sql("CREATE TABLE kept (number)")
print("stored", flush=True)
"""

    [(_, found)] = look_at_each_line(
        [sys.executable, "-c", program],
        data,
        lambda left: {path.relative_to(left.folder).as_posix() for path in left.folder.glob("*/*")},
    )

    assert {"new/storage", "other/graft.db", "other/graft.db-wal"} <= found


# The test of the test: what is not synced is found to be lost.

DURABLE = """
with open(f"{root}/part", "wb") as file:
    file.write(b"bytes")
    file.flush()
    os.fsync(file.fileno())
os.rename(f"{root}/part", f"{root}/whole")
folder = os.open(root, os.O_RDONLY)
os.fsync(folder)
print("stored", flush=True)
"""


@pytest.mark.parametrize(
    ("left_out", "found"),
    [
        ("", {"whole": b"bytes"}),
        ("    os.fsync(file.fileno())\n", {"whole": b""}),
        ("os.fsync(folder)\n", {}),
        ("    file.flush()\n", {"whole": b""}),
    ],
    ids=["nothing", "the sync of the file", "the sync of the folder", "the writing before the sync"],
)
def test_what_a_program_forgets_to_sync_is_lost(tmp_path: Path, left_out: str, found: dict[str, bytes]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    program = f"import os\nroot = {str(data)!r}\n" + DURABLE.replace(left_out, "", 1 if left_out else 0)

    [(_, files)] = look_at_each_line(
        [sys.executable, "-c", program],
        data,
        lambda left: {path.name: path.read_bytes() for path in left.folder.iterdir()},
    )

    assert files == found


@pytest.mark.parametrize(("synchronous", "rows"), [("FULL", [(1,)]), ("NORMAL", [])])
def test_commit_that_is_not_synced_is_lost(tmp_path: Path, synchronous: str, rows: Rows) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with closing(sqlite3.connect(data / "graft.db")) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE kept (number)")
    program = f"""
import sqlite3
database = sqlite3.connect({str(data / "graft.db")!r}, isolation_level=None)
database.execute("PRAGMA synchronous={synchronous}")
database.execute("INSERT INTO kept VALUES (1)")
print("stored", flush=True)
"""  # noqa: S608

    [(_, found)] = look_at_each_line(
        [sys.executable, "-c", program], data, lambda left: left.rows("SELECT number FROM kept")
    )

    assert found == rows


def look_at_each_line(command: list[str], data: Path, look: Callable[[Left], Any]) -> list[tuple[str, Any]]:
    """Each line that the command prints, with what is seen of what a cut at that moment leaves of `data`."""
    disk, trace = Disk(data), data.parent / "trace"
    subprocess.run(
        [*strace(trace), *command],
        cwd=data.parent,
        env=environment_for(data),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    seen: list[tuple[str, Any]] = []

    def note(sent: bytes) -> None:
        left = Left(data.parent / f"left-{len(seen)}")
        disk.leave(left.folder, as_now=data)
        seen.append((sent.decode(), look(left)))

    replay(trace, disk, note)
    return [(line, found) for line, found in seen if line.strip()]
