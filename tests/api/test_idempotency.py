"""Requests that are sent twice do their work once."""

import json
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import api_builders
import httpx
import pytest
from api_builders import RunningServer, assert_is_problem
from test_job_routes import asked_for
from test_locked_database import locked_by_another

from app.api import jobs as job_routes
from app.db import engine
from app.db.tables import IdempotencyRow, utc_now
from app.jobs import owner

ARCHIVE = api_builders.archive_of_classes()
OTHER_ARCHIVE = api_builders.archive_of_classes(per_class=7)


@pytest.fixture
def dataset(server: RunningServer) -> str:
    return api_builders.ready_dataset(server.services.database)


def submit(client: httpx.Client, dataset: str, key: str, **changes: Any) -> httpx.Response:
    return client.post("/v1/jobs", json=asked_for(dataset, **changes), headers={"Idempotency-Key": key})


def upload(client: httpx.Client, key: str, archive: Any = ARCHIVE, **query: str) -> httpx.Response:
    return client.post("/v1/datasets", params=query, content=archive, headers={"Idempotency-Key": key})


def claim_key(server: RunningServer, key: str, claimed_by: dict[str, Any], *, seconds_ago: float = 0) -> None:
    claimed_at = utc_now() - timedelta(seconds=seconds_ago)
    with server.services.database.write() as session:
        session.add(IdempotencyRow(scope="None POST /v1/jobs", key=key, owner=claimed_by, created_at=claimed_at))


def say_of_another_machine(server: RunningServer) -> None:
    """That a process which cannot be looked for has made the claims, two minutes ago."""
    with server.services.database.write() as session:
        for row in session.query(IdempotencyRow):
            row.owner = row.owner | {"host": "another"}
            row.created_at -= timedelta(minutes=2)


def claims(server: RunningServer) -> list[IdempotencyRow]:
    """Keys that were claimed and are not answered."""
    with server.services.database.read() as session:
        return session.query(IdempotencyRow).filter(IdempotencyRow.resource_id.is_(None)).all()


def test_same_request_gets_the_same_job(client: httpx.Client, dataset: str) -> None:
    first, second = submit(client, dataset, "k1"), submit(client, dataset, '"k1"')

    assert (first.status_code, first.json()) == (second.status_code, second.json())
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    assert second.headers["location"] == first.headers["location"]
    assert len(client.get("/v1/jobs").json()["data"]) == 1


def test_defaults_written_out_are_the_same_request(client: httpx.Client, dataset: str) -> None:
    submit(client, dataset, "k1")

    assert submit(client, dataset, "k1", seed=0).headers["idempotent-replayed"] == "true"


def test_other_request_under_the_key_is_refused(client: httpx.Client, dataset: str) -> None:
    submit(client, dataset, "k1")

    assert_is_problem(submit(client, dataset, "k1", seed=1), 422, "idempotency-key-reused")


def test_answer_is_the_first_one_even_after_the_job_has_gone_on(client: httpx.Client, dataset: str) -> None:
    first = submit(client, dataset, "k1").json()
    client.post(f"/v1/jobs/{first['id']}/cancel")

    assert submit(client, dataset, "k1").json() == first


def test_fifty_at_once_make_one_job(server: RunningServer, dataset: str) -> None:
    def send(_: int) -> httpx.Response:
        with api_builders.client_of(server) as client:
            return submit(client, dataset, "k1")

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(send, range(50)))

    with api_builders.client_of(server) as client:
        (job,) = client.get("/v1/jobs").json()["data"]
    assert {answer.json()["id"] for answer in answers if answer.status_code == 201} == {job["id"]}
    assert {answer.status_code for answer in answers} <= {201, 409}
    assert {answer.headers["retry-after"] for answer in answers if answer.status_code == 409} <= {"1"}


def test_request_that_failed_leaves_its_key_free(server: RunningServer, client: httpx.Client, dataset: str) -> None:
    assert submit(client, "ds_none", "k1").status_code == 404

    assert submit(client, dataset, "k1").status_code == 201


def test_key_of_a_living_process_answers_409_with_retry_after(
    server: RunningServer, client: httpx.Client, dataset: str
) -> None:
    with subprocess.Popen(["sleep", "60"]) as another:
        claim_key(server, "k1", owner.owner_of(another.pid))

        response = submit(client, dataset, "k1")
        another.kill()

    assert_is_problem(response, 409, "request-in-progress")
    assert response.headers["retry-after"] == "1"


def test_key_of_a_request_that_is_still_at_work_here_answers_409(server: RunningServer, client: httpx.Client) -> None:
    def archive() -> Iterator[bytes]:
        yield ARCHIVE[:100]
        api_builders.wait_for(lambda: claims(server))
        answers.append(upload(client, "k1"))
        yield ARCHIVE[100:]

    answers: list[httpx.Response] = []
    with api_builders.client_of(server) as slow:
        first = upload(slow, "k1", archive())

    assert_is_problem(answers[0], 409, "request-in-progress")
    assert first.status_code == 201
    assert upload(client, "k1").json() == first.json()


@pytest.mark.parametrize("route", ["/v1/datasets", "/v1/jobs"])
def test_key_is_free_again_after_the_database_was_away_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_SECONDS", 1)
    settings = api_builders.settings_for(tmp_path)
    with (
        api_builders.running(settings) as server,
        api_builders.client_of(server) as client,
        ExitStack() as away,
    ):
        dataset = api_builders.ready_dataset(server.services.database)
        resolve = job_routes.resolve

        def lock() -> None:
            api_builders.wait_for(lambda: claims(server))
            away.enter_context(locked_by_another(settings.data_dir / "graft.db"))

        def archive() -> Iterator[bytes]:
            yield ARCHIVE[:100]
            lock()
            yield ARCHIVE[100:]

        def resolve_and_lock(*arguments: Any) -> Any:
            lock()
            return resolve(*arguments)

        send = partial(upload, client, "k1") if route == "/v1/datasets" else partial(submit, client, dataset, "k1")
        with monkeypatch.context() as patch:
            patch.setattr(job_routes, "resolve", resolve_and_lock)
            failed = upload(client, "k1", archive()) if route == "/v1/datasets" else send()
        assert_is_problem(failed, 503, "overloaded")
        assert len(claims(server)) == 1  # which could not be released either
        away.close()

        again = send()
        assert again.status_code == 201, again.text
        assert send().json() == again.json()


def test_key_of_a_dead_process_is_taken_over(server: RunningServer, client: httpx.Client, dataset: str) -> None:
    claim_key(server, "k1", owner.current_process() | {"started": -1})

    assert submit(client, dataset, "k1").status_code == 201
    assert submit(client, dataset, "k1").headers["idempotent-replayed"] == "true"


@pytest.mark.parametrize("changed", ["host", "boot_id", "pid_namespace"])
def test_key_of_a_process_from_before_a_restart_is_taken_over_after_a_minute(
    server: RunningServer, client: httpx.Client, dataset: str, changed: str
) -> None:
    before = owner.current_process() | {changed: "another"}
    claim_key(server, "k1", before, seconds_ago=20)
    claim_key(server, "k2", before, seconds_ago=61)

    assert_is_problem(submit(client, dataset, "k1"), 409, "request-in-progress")
    assert submit(client, dataset, "k2").status_code == 201
    assert submit(client, dataset, "k2").headers["idempotent-replayed"] == "true"


def two_at_work(
    server: RunningServer, client: httpx.Client, *, begins: bytes, ends: bytes
) -> tuple[httpx.Response, httpx.Response]:
    """Answers to a request under the key k1 whose body is cut in two, and to a good one that took over from it in
    between and ends after it."""
    second: list[Future[httpx.Response]] = []
    has_taken_over, has_ended = threading.Event(), threading.Event()

    def first() -> Iterator[bytes]:
        yield begins
        api_builders.wait_for(lambda: claims(server))
        say_of_another_machine(server)
        second.append(pool.submit(upload, client, "k1", other()))
        has_taken_over.wait(api_builders.DEADLINE_SECONDS)
        yield ends

    def other() -> Iterator[bytes]:
        yield ARCHIVE[:100]
        api_builders.wait_for(lambda: claims(server)[0].owner["host"] != "another")
        has_taken_over.set()
        has_ended.wait(api_builders.DEADLINE_SECONDS)
        yield ARCHIVE[100:]

    with api_builders.client_of(server) as slow, ThreadPoolExecutor(1) as pool:
        answer = upload(slow, "k1", first())
        has_ended.set()
        return answer, second[0].result()


def test_of_two_at_work_the_first_to_end_has_the_key_and_the_other_is_told_the_same(any_server: RunningServer) -> None:
    with api_builders.client_of(any_server) as client:
        made, refused = two_at_work(any_server, client, begins=ARCHIVE[:100], ends=ARCHIVE[100:])

        assert made.status_code == 201
        assert_is_problem(refused, 409, "request-in-progress")
        assert refused.headers["retry-after"] == "1"
        assert upload(client, "k1").json() == made.json()
        assert len(client.get("/v1/datasets").json()["data"]) == 1


def test_request_that_was_taken_over_and_fails_leaves_the_key_to_the_other(any_server: RunningServer) -> None:
    with api_builders.client_of(any_server) as client:
        failed, made = two_at_work(any_server, client, begins=b"no archive", ends=b"")

        assert failed.status_code == 422
        assert made.status_code == 201
        assert upload(client, "k1").json() == made.json()


def test_key_is_forgotten_after_a_day(server: RunningServer, client: httpx.Client, dataset: str) -> None:
    first = submit(client, dataset, "k1").json()
    with server.services.database.write() as session:
        (row,) = session.query(IdempotencyRow)
        row.created_at = utc_now() - timedelta(hours=24, seconds=1)

    assert submit(client, dataset, "k1").json()["id"] != first["id"]


@pytest.mark.parametrize("key", ["", '""', "a b", "x" * 256])
def test_what_is_no_key_is_refused(client: httpx.Client, dataset: str, key: str) -> None:
    assert_is_problem(submit(client, dataset, key), 422, "invalid-request")


def test_key_of_a_dry_run_is_not_used_up(client: httpx.Client, dataset: str) -> None:
    content = json.dumps(asked_for(dataset))
    client.post("/v1/jobs?dry_run=true", content=content, headers={"Idempotency-Key": "k1"})

    assert submit(client, dataset, "k1", seed=1).status_code == 201


def test_same_archive_and_fields_get_the_same_data_set(server: RunningServer, client: httpx.Client) -> None:
    first = upload(client, "k1", name="x")
    second = upload(client, "k1", name="x")

    assert (first.status_code, first.json()) == (second.status_code, second.json()) == (201, first.json())
    assert second.headers["idempotent-replayed"] == "true"
    assert len(client.get("/v1/datasets").json()["data"]) == 1
    assert len(list(server.services.storage.path("datasets").iterdir())) == 1


def test_form_and_boundary_do_not_matter_to_the_fingerprint(client: httpx.Client) -> None:
    first, second = (
        client.post("/v1/datasets", files={"file": ("a.zip", ARCHIVE)}, headers={"Idempotency-Key": "k1"})
        for _ in range(2)
    )

    assert second.json() == first.json()


@pytest.mark.parametrize(("archive", "query"), [(OTHER_ARCHIVE, {}), (ARCHIVE, {"seed": "3"})])
def test_other_upload_under_the_key_is_refused_and_leaves_nothing(
    server: RunningServer, client: httpx.Client, archive: bytes, query: dict[str, str]
) -> None:
    upload(client, "k1")

    assert_is_problem(upload(client, "k1", archive, **query), 422, "idempotency-key-reused")
    assert len(list(server.services.storage.path("datasets").iterdir())) == 1


def test_refused_upload_leaves_its_key_free(client: httpx.Client) -> None:
    assert upload(client, "k1", b"no archive").status_code == 422

    assert upload(client, "k1").status_code == 201


def test_never_to_stop_early_is_another_request_than_the_recipes_patience(client: httpx.Client, dataset: str) -> None:
    submit(client, dataset, "k1")
    never = {"early_stopping_patience": None}

    assert_is_problem(submit(client, dataset, "k1", hyperparameters=never), 422, "idempotency-key-reused")
    assert submit(client, dataset, "k2", hyperparameters=never).status_code == 201
    assert submit(client, dataset, "k2", hyperparameters=never).headers["idempotent-replayed"] == "true"
