"""Another process holds SQLite's write lock for long: who reads is answered, who writes is told to come again."""

import io
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import api_builders
import builders
import httpx
import pytest
from api_builders import assert_is_problem, create_key
from test_job_routes import asked_for

from app import access
from app.access import Scope
from app.db import engine

ARCHIVE = builders.zip_of(builders.class_folders(4))

HOLDS_THE_LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def locked_by_another(database: Path) -> Iterator[None]:
    command = [sys.executable, "-c", HOLDS_THE_LOCK, str(database)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    try:
        yield
    finally:
        process.communicate()  # it ends with its input


def test_locked_database_is_told_with_503_and_everything_goes_on_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: io.StringIO
) -> None:
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_SECONDS", 1)
    settings = api_builders.settings_for(tmp_path)
    with api_builders.running(settings) as server:
        services = server.services
        model = api_builders.register_model(services)
        dataset = api_builders.ready_dataset(services.database)
        headers = create_key(server, Scope.admin)
        with api_builders.client_of(server, headers=headers) as client:
            reads = ["/v1/jobs", "/v1/datasets", f"/v1/models/{model}", "/v1/usage", "/metrics", "/"]
            job = {"json": asked_for(dataset)}
            writes = [
                ("POST", "/v1/jobs", job),
                ("POST", "/v1/jobs", {**job, "headers": {**headers, "Idempotency-Key": "k1"}}),
                ("PUT", "/v1/datasets", {"content": ARCHIVE}),
                ("POST", "/v1/uploads", {"headers": {**headers, "Tus-Resumable": "1.0.0", "Upload-Length": "9"}}),
                ("PUT", "/v1/aliases/best", {"json": {"model": model}}),
                ("POST", "/predict", {"params": {"store": "true"}, "content": builders.jpeg()}),
                ("DELETE", f"/v1/datasets/{dataset}", {}),
                ("DELETE", "/v1/aliases/default", {}),
            ]
            with locked_by_another(settings.data_dir / "graft.db"):
                # The first request of a key is one whose time is to be noted.
                for path in reads:
                    assert client.get(path).status_code == 200, path
                assert client.post("/predict", content=builders.jpeg()).status_code == 200
                with ThreadPoolExecutor() as pool:
                    answers = list(pool.map(lambda write: client.request(write[0], write[1], **write[2]), writes))
                for (method, path, _), answer in zip(writes, answers, strict=True):
                    assert answer.status_code == 503, (method, path, answer.text)
                    assert_is_problem(answer, 503, "overloaded")
                    assert int(answer.headers["retry-after"]) > 0
                assert client.get("/readyz").status_code == 200

            assert client.get("/v1/jobs").json()["data"] == []
            assert list((settings.data_dir / "datasets").glob("*/archive")) == []
            for (method, path, options), status in zip(writes[:6], (201, 201, 201, 201, 200, 200), strict=True):
                assert client.request(method, path, **options).status_code == status, (method, path)
            services.traffic.write_down()
            with services.database.read() as session:
                assert access.list_keys(session)[0].last_used_at is not None
    assert '"status": 500' not in printed.getvalue()
    assert "Traceback" not in printed.getvalue()


def test_who_reads_or_predicts_is_answered_soon_while_many_wait_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_SECONDS", 15)
    settings = api_builders.settings_for(tmp_path)
    with api_builders.running(settings) as server, ThreadPoolExecutor(45) as pool:
        api_builders.register_model(server.services)
        job = asked_for(api_builders.ready_dataset(server.services.database))

        def submit() -> int:
            return httpx.post(server.url + "/v1/jobs", json=job, timeout=60).status_code

        with locked_by_another(settings.data_dir / "graft.db"), api_builders.client_of(server) as client:
            assert client.post("/predict", content=builders.jpeg()).status_code == 200  # loaded
            writers = [pool.submit(submit) for _ in range(45)]
            seconds = []
            while sum(writer.done() for writer in writers) < 45 - engine.WAITING_WRITERS:
                for method, path, content in (("GET", "/v1/jobs", None), ("POST", "/predict", builders.jpeg())):
                    answer = client.request(method, path, content=content)
                    assert answer.status_code == 200
                    seconds.append(answer.elapsed.total_seconds())
            assert max(seconds) < 5.0
        assert {writer.result() for writer in writers} == {201, 503}


@pytest.mark.slow
def test_pictures_count_against_the_days_quota_while_they_are_written_down(tmp_path: Path) -> None:
    settings = api_builders.settings_for(tmp_path, workspace_max_predictions_per_day=1)
    with api_builders.running(settings) as server, api_builders.client_of(server) as client:
        api_builders.register_model(server.services)
        assert client.post("/predict", content=builders.jpeg()).status_code == 200
        with locked_by_another(settings.data_dir / "graft.db"), ThreadPoolExecutor(1) as pool:
            writing = pool.submit(server.services.traffic.write_down)
            for _ in range(20):
                assert client.get("/v1/usage").json()["predictions_today"]["used"] == 1
                assert_is_problem(client.post("/predict", content=builders.jpeg()), 429, "quota-of-predictions-spent")
            assert not writing.done()
