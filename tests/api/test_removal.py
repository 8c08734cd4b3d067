"""A workspace goes with all it has: nothing of it in any table or file, nothing missing from anybody else."""

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import api_builders
import builders
import httpx
import pytest
import queue_builders
from api_builders import RunningServer, assert_is_problem
from running import wait_until
from sqlalchemy import select
from test_workspaces import client_with, everything, key_for, services_within

from app import removal
from app.db.engine import Database
from app.db.tables import Base, PredictionRow, WorkspaceRow
from app.errors import Conflict, InvalidRequest, NotFound
from app.jobs import batches, queue
from app.storage import LocalStorage

CLAIMER = Path(__file__).resolve().parents[1] / "jobs" / "claimer.py"
PATIENCE_SECONDS = 30.0
# Argument: database URL, folder of the storage.
REMOVE = """
import sys
from pathlib import Path
from app import removal
from app.db.engine import Database
from app.storage import LocalStorage
removal.remove(Database(sys.argv[1]), LocalStorage(Path(sys.argv[2])), "lab", cancels_jobs=True)
"""


@pytest.fixture
def server(any_server: RunningServer) -> RunningServer:
    return any_server


@pytest.fixture
def own(server: RunningServer) -> Iterator[httpx.Client]:
    """Of the first workspace."""
    with client_with(server, key_for(server, "default")) as client:
        yield client


@pytest.fixture
def lab(server: RunningServer, own: httpx.Client) -> Iterator[httpx.Client]:
    """Of a second workspace, made after the first one's key."""
    with client_with(server, key_for(server, "lab")) as client:
        yield client


def remove(server: RunningServer, *, cancels_jobs: bool = True, wait_seconds: float = PATIENCE_SECONDS) -> None:
    services = server.app.state.services
    removal.remove(services.database, services.storage, "lab", cancels_jobs=cancels_jobs, wait_seconds=wait_seconds)


def furnish(server: RunningServer, client: httpx.Client, workspace: str) -> None:
    """One of everything, and the files that come in time."""
    ids = everything(server, client, workspace=workspace)
    headers = {"Idempotency-Key": f"key-of-{workspace}"}
    client.post("/v1/datasets", content=api_builders.archive_of_classes(), headers=headers)
    client.post(f"/v1/webhooks/{ids['webhook_id']}/test")
    services = services_within(server, workspace)
    services.traffic.write_down()
    claim = queue_builders.claim_next(services.database)
    assert claim is not None
    with services.database.write() as session:
        queue.record_epoch(session, claim, queue_builders.epoch(1), {"fraction": 0.5})
        queue.fail(session, claim, queue_builders.ERROR)
    for key in (
        f"datasets/{ids['dataset_id']}/features/of-frozen-stages/0",
        f"exports/{ids['model']}/onnx-1/model.onnx",
        f"jobs/{ids['job_id']}/1/0/checkpoint",
        batches.archive_key(ids["batch_id"]),
        f"{batches.results_key(ids['batch_id'], 1)}/results.csv",
    ):
        builders.written(services.storage.path(key), workspace.encode())


def rows(database: Database) -> dict[str, list[Mapping[str, Any]]]:
    """Every row of every table."""
    with database.read() as session:
        return {
            table.name: [dict(row) for row in session.connection().execute(select(table)).mappings()]
            for table in Base.metadata.sorted_tables
        }


def ids_of(database: Database, workspace: str) -> set[str]:
    """Of the workspace, and of whatever a row of it has, names or is part of."""
    with database.read() as session:
        ids = {session.scalars(select(WorkspaceRow.id).where(WorkspaceRow.name == workspace)).one()}
    size = 0
    while size < len(ids):
        size = len(ids)
        for row in (row for table in rows(database).values() for row in table):
            keys = {row.get(name) for name in ("workspace_id", "job_id", "webhook_id")}
            if keys & ids:
                ids |= set(re.findall(r"\b[a-z]+_[0-9a-f]{30}\b", repr(row)))
    return ids


def files(storage: LocalStorage) -> dict[str, bytes]:
    """Every file but the database's, and the one that changes with each prediction."""
    paths = [path for path in storage.root.rglob("*") if path.is_file() and path.parent != storage.root]
    return {path.relative_to(storage.root).as_posix(): path.read_bytes() for path in paths}


def test_nothing_of_it_is_left_and_others_keep_everything(
    server: RunningServer, own: httpx.Client, lab: httpx.Client
) -> None:
    services = server.services
    for client, workspace in ((own, "default"), (lab, "lab")):
        furnish(server, client, workspace)
    lost, kept = ids_of(services.database, "lab"), ids_of(services.database, "default")
    assert not lost & kept
    named = {table for table, all_rows in rows(services.database).items() if any(names(row, lost) for row in all_rows)}
    assert named == {table.name for table in Base.metadata.sorted_tables}
    files_before = files(services.storage)
    before = {
        table: [row for row in all_rows if not names(row, lost)] for table, all_rows in rows(services.database).items()
    }
    answer = own.post("/predict", content=builders.jpeg()).json()

    remove(server)

    left = rows(services.database)
    *changes, last = left["audit_log"]
    assert (last["workspace_id"], last["action"]) == ("ws_default", "graft workspaces delete lab")
    assert not any(names(row, lost) for row in changes)
    left["audit_log"] = changes
    for table in left:
        if table not in ("api_keys", "usage", "webhook_deliveries"):  # which tell when they were last used
            assert left[table] == before[table], table
        assert len(left[table]) == len(before[table]), table
    files_left = files(services.storage)
    assert not any(id in name or id.encode() in content for id in lost for name, content in files_left.items())
    assert files_left == {name: content for name, content in files_before.items() if not any(id in name for id in lost)}
    assert any(name.startswith("models/") for name in files_left)

    assert_is_problem(lab.get("/v1/models"), 401, "unauthenticated")
    assert own.post("/predict", content=builders.jpeg()).json() == answer
    assert own.get("/v1/audit").json()["data"][0]["action"] == "graft workspaces delete lab"
    with pytest.raises(NotFound):
        remove(server)


def names(row: Mapping[str, Any], ids: set[str]) -> bool:
    return any(id in repr(row) for id in ids)


def test_it_is_refused_with_nothing_changed_while_jobs_wait_or_run(server: RunningServer, lab: httpx.Client) -> None:
    everything(server, lab, workspace="lab")
    before = rows(server.services.database)

    with pytest.raises(Conflict, match="2 jobs of lab wait or run"):
        remove(server, cancels_jobs=False)

    left = rows(server.services.database)
    assert {table: left[table] for table in left if table != "webhook_deliveries"} == {
        table: before[table] for table in before if table != "webhook_deliveries"
    }
    assert lab.get("/v1/models").status_code == 200


def test_a_running_job_is_ended_by_its_worker_before_anything_of_it_goes(
    server: RunningServer, lab: httpx.Client
) -> None:
    database = services_within(server, "lab").database
    claim = queue_builders.claimed(database)
    checkpoint = builders.written(server.services.storage.path(f"jobs/{claim.job_id}/1/0/checkpoint"), b"x")

    with pytest.raises(Conflict, match=r"1 jobs still run.*Start a worker"):
        remove(server, wait_seconds=0)
    assert checkpoint.exists()
    assert_is_problem(lab.get("/v1/models"), 401, "unauthenticated")

    with ThreadPoolExecutor(1) as pool:
        removing = pool.submit(remove, server)
        with database.write() as session:
            assert queue.beat(session, claim).cancel_requested
        assert not removing.done() and checkpoint.exists()
        with database.write() as session:
            queue.finish_cancelled(session, claim)
        removing.result(PATIENCE_SECONDS)
    assert not checkpoint.exists()


def test_a_job_whose_worker_died_holds_nothing_up(server: RunningServer, lab: httpx.Client) -> None:
    database = services_within(server, "lab").database
    queue_builders.submit(database)
    url = database.engine.url.render_as_string(hide_password=False)
    died = subprocess.run([sys.executable, CLAIMER, url], input="go\n", capture_output=True, text=True, check=True)
    assert "/1" in died.stdout

    remove(server)

    assert rows(server.services.database)["jobs"] == []


def test_a_removal_that_was_killed_is_seen_by_nobody_and_can_be_run_again(
    server: RunningServer, own: httpx.Client, lab: httpx.Client
) -> None:
    furnish(server, own, "default")
    furnish(server, lab, "lab")
    lost = ids_of(server.services.database, "lab")
    database, storage = services_within(server, "lab").database, server.services.storage
    with database.write() as session:
        kept = session.scalars(select(PredictionRow)).one()
        columns = {c.key: getattr(kept, c.key) for c in PredictionRow.__table__.columns if c.key not in ("seq", "id")}
        more = [PredictionRow(**columns, id=f"prd_{number:030x}") for number in range(150)]
        session.add_all(more)
    for row in more:
        builders.written(storage.path(f"predictions/{row.id}"), b"x")
    url = database.engine.url.render_as_string(hide_password=False)

    with subprocess.Popen([sys.executable, "-c", REMOVE, url, str(storage.root)]) as process:
        wait_until(
            lambda: len(list(storage.path("predictions").iterdir())) <= 75,
            within_seconds=PATIENCE_SECONDS,
            otherwise="nothing was removed",
        )
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert_is_problem(lab.get("/v1/models"), 401, "unauthenticated")
    assert own.post("/predict", content=builders.jpeg()).status_code == 200
    with server.services.database.read() as session:
        assert session.scalar(select(WorkspaceRow.id).where(WorkspaceRow.name == "lab")) in lost

    subprocess.run([sys.executable, "-c", REMOVE, url, str(storage.root)], check=True)

    assert not any(names(row, lost) for table, all_rows in rows(database).items() for row in all_rows[:-1])
    storage.sweep(older_than_seconds=-1)  # what the kill left half deleted, as the server does after a day
    assert not any(id in name for id in lost for name in files(storage))


def test_an_upload_that_was_let_in_before_ends_as_one_that_comes_now(server: RunningServer, lab: httpx.Client) -> None:
    removed, archive = threading.Event(), api_builders.archive_of_classes()

    def body() -> Iterator[bytes]:
        yield archive[:1000]
        assert removed.wait(PATIENCE_SECONDS)
        yield archive[1000:]

    with ThreadPoolExecutor(1) as pool:
        uploading = pool.submit(lab.post, "/v1/datasets", content=body())
        staged = server.services.storage.root / "staging"
        wait_until(lambda: list(staged.iterdir()), within_seconds=PATIENCE_SECONDS, otherwise="nothing came")
        remove(server)
        removed.set()
        assert_is_problem(uploading.result(PATIENCE_SECONDS), 401, "unauthenticated")
    assert files(server.services.storage) == {}


def test_what_it_had_predicted_keeps_nobodys_count_from_being_written(
    server: RunningServer, own: httpx.Client, lab: httpx.Client
) -> None:
    for client, workspace in ((own, "default"), (lab, "lab")):
        api_builders.register_model(services_within(server, workspace))
        assert client.post("/predict", content=builders.jpeg()).status_code == 200
    remove(server)

    server.services.traffic.write_down()

    assert [row["predictions"] for row in rows(server.services.database)["usage"]] == [1]


def test_the_first_workspace_stays(server: RunningServer) -> None:
    with pytest.raises(InvalidRequest, match="it stays"):
        removal.remove(server.services.database, server.services.storage, "default", cancels_jobs=True)


def test_the_servers_only_keys_stay_until_there_is_another(server: RunningServer) -> None:
    with client_with(server, key_for(server, "lab")) as client, api_builders.client_of(server) as stranger:
        with pytest.raises(Conflict, match="open to everybody"):
            remove(server)
        assert client.get("/v1/models").status_code == 200

        key_for(server, "default")
        remove(server)
        assert_is_problem(stranger.get("/v1/models"), 401, "unauthenticated")
