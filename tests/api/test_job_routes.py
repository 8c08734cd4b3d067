"""Submitting, watching and ending jobs over HTTP."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import api_builders
import httpx
import pytest
import queue_builders
from api_builders import RunningServer, assert_is_problem
from sqlalchemy import text

from app import registry
from app.datasets import catalog
from app.datasets.ingest import manifest_key
from app.datasets.manifest import Manifest, Record
from app.db.migrate import upgrade
from app.jobs import queue
from app.jobs.queue import Claim
from app.jobs.states import JobKind

Request = Callable[[httpx.Client], httpx.Response]

EPOCH = {
    "epoch": 1,
    "train_loss": 0.7,
    "train_accuracy": 0.5,
    "val_loss": float("inf"),  # of a run that diverges
    "val_accuracy": 0.5,
    "learning_rate": 0.001,
    "seconds": 1.0,
}


@pytest.fixture
def dataset(server: RunningServer) -> str:
    return api_builders.ready_dataset(server.services.database)


def asked_for(dataset: str, **changes: Any) -> dict[str, Any]:
    """A job that needs no weights."""
    return {"dataset": dataset, "method": "from_scratch", "backbone": "squeezenet1_1", **changes}


def submit(client: httpx.Client, dataset: str, **changes: Any) -> dict[str, Any]:
    response = client.post("/v1/jobs", json=asked_for(dataset, **changes))
    assert response.status_code == 201, response.text
    job: dict[str, Any] = response.json()
    return job


def claim(server: RunningServer) -> Claim:
    found = queue_builders.claim_next(server.services.database)
    assert found is not None
    return found


def finish(server: RunningServer, running: Claim) -> None:
    with server.services.database.write() as session:
        queue.succeed(session, running)


def test_submitted_job_says_everything_that_was_resolved(client: httpx.Client, dataset: str) -> None:
    response = client.post("/v1/jobs", json=asked_for(dataset, name="first", hyperparameters={"epochs": 3}))
    job = response.json()

    assert (response.status_code, response.headers["location"]) == (201, f"/v1/jobs/{job['id']}")
    assert (job["object"], job["status"], job["dataset"], job["method"]) == ("job", "queued", dataset, "from_scratch")
    assert (job["backbone"], job["name"], job["attempt"]) == ({"name": "squeezenet1_1", "weights": None}, "first", 1)
    assert job["spec"]["hyperparameters"]["epochs"] == 3
    for field in ("progress", "metrics", "model", "error", "started_at", "finished_at"):
        assert job[field] is None
    assert job["created_at"].endswith("Z")
    assert client.get(f"/v1/jobs/{job['id']}").json() == job


def test_queue_position_counts_the_jobs_before(server: RunningServer, client: httpx.Client, dataset: str) -> None:
    jobs = [submit(client, dataset) for _ in range(3)]
    assert [job["queue_position"] for job in jobs] == [1, 2, 3]

    claim(server)

    assert [client.get(f"/v1/jobs/{job['id']}").json()["queue_position"] for job in jobs] == [None, 1, 2]


def test_job_on_a_data_set_in_processing_may_be_repeated(server: RunningServer, client: httpx.Client) -> None:
    dataset = api_builders.processing_dataset(server.services.database)

    response = client.post("/v1/jobs", json=asked_for(dataset))

    assert_is_problem(response, 409, "dataset-processing")
    assert response.headers["retry-after"] == "2"
    assert "x-should-retry" not in response.headers


def test_job_on_a_failed_data_set_may_not_be_repeated(server: RunningServer, client: httpx.Client) -> None:
    dataset = api_builders.failed_dataset(server.services.database)

    response = client.post("/v1/jobs", json=asked_for(dataset))

    assert_is_problem(response, 409, "dataset-failed")
    assert response.headers["x-should-retry"] == "false"


def test_dry_run_answers_spec_and_estimate_and_queues_nothing(client: httpx.Client, dataset: str) -> None:
    response = client.post("/v1/jobs?dry_run=true", json=asked_for(dataset, hyperparameters={"epochs": 2}))
    answer = response.json()

    assert response.status_code == 200
    assert answer["spec"]["hyperparameters"]["epochs"] == 2
    assert answer["estimate"] == {key: answer[key] for key in ("seconds", "seconds_range", "peak_memory_bytes")}
    low, high = answer["seconds_range"]
    assert 0 < low <= answer["seconds"] <= high
    assert answer["peak_memory_bytes"] > 0
    assert client.get("/v1/jobs").json()["data"] == []


def test_pages_partition_the_list_newest_first(client: httpx.Client, dataset: str) -> None:
    ids = [submit(client, dataset)["id"] for _ in range(5)][::-1]

    seen, after, pages = [], "", 0
    while True:
        page = client.get("/v1/jobs", params={"limit": 2, "after": after}).json()
        seen += [job["id"] for job in page["data"]]
        assert (page["object"], page["first_id"], page["last_id"]) == ("list", page["data"][0]["id"], seen[-1])
        after, pages = page["last_id"], pages + 1
        if not page["has_more"]:
            break

    assert (seen, pages) == (ids, 3)


def test_empty_list_has_null_ids(client: httpx.Client) -> None:
    page = client.get("/v1/jobs").json()

    assert page == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}


def test_list_is_filtered(server: RunningServer, client: httpx.Client, dataset: str) -> None:
    first, second = submit(client, dataset)["id"], submit(client, dataset)["id"]
    claim(server)

    def found(**filters: str) -> list[str]:
        return [job["id"] for job in client.get("/v1/jobs", params=filters).json()["data"]]

    assert found(status="running") == [first]
    assert found(status="queued", method="from_scratch", dataset=dataset) == [second]
    assert found(method="fine_tuning") == found(dataset="ds_other") == []


def test_page_after_an_unknown_job_is_404(client: httpx.Client) -> None:
    assert_is_problem(client.get("/v1/jobs?after=job_none"), 404, "not-found")


def test_ingest_jobs_are_not_shown(server: RunningServer, client: httpx.Client) -> None:
    client.post("/v1/datasets", content=api_builders.archive_of_classes())

    assert client.get("/v1/jobs").json()["data"] == []


def test_queued_job_is_cancelled_at_once_and_only_once(client: httpx.Client, dataset: str) -> None:
    job = submit(client, dataset)

    cancelled = client.post(f"/v1/jobs/{job['id']}/cancel")

    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    again = client.post(f"/v1/jobs/{job['id']}/cancel")
    assert_is_problem(again, 409, "job-finished")
    assert again.headers["x-should-retry"] == "false"


def test_running_job_is_asked_to_cancel_or_to_stop(server: RunningServer, client: httpx.Client, dataset: str) -> None:
    job = submit(client, dataset)
    claim(server)

    stopped = client.post(f"/v1/jobs/{job['id']}/stop", content=b"{}").json()
    cancelled = client.post(f"/v1/jobs/{job['id']}/cancel").json()

    assert (stopped["status"], stopped["stop_requested"], stopped["cancel_requested"]) == ("running", True, False)
    assert (cancelled["status"], cancelled["cancel_requested"]) == ("running", True)


def test_queued_job_cannot_be_stopped(client: httpx.Client, dataset: str) -> None:
    job = submit(client, dataset)

    assert_is_problem(client.post(f"/v1/jobs/{job['id']}/stop"), 409, "job-not-running")


def test_finished_job_is_deleted_and_no_other(client: httpx.Client, dataset: str) -> None:
    job = submit(client, dataset)
    assert_is_problem(client.delete(f"/v1/jobs/{job['id']}"), 409, "job-not-finished")
    client.post(f"/v1/jobs/{job['id']}/cancel")

    assert client.delete(f"/v1/jobs/{job['id']}").json() == {"id": job["id"], "object": "job", "deleted": True}
    assert_is_problem(client.get(f"/v1/jobs/{job['id']}"), 404, "not-found")


def test_wait_answers_as_soon_as_the_job_ends(server: RunningServer, client: httpx.Client, dataset: str) -> None:
    job = submit(client, dataset)
    running = claim(server)
    threading.Timer(0.2, finish, (server, running)).start()

    answer = client.get(f"/v1/jobs/{job['id']}?wait=60")

    assert answer.json()["status"] == "succeeded"
    assert answer.elapsed.total_seconds() < 10


def test_wait_answers_when_the_time_is_up(client: httpx.Client, dataset: str) -> None:
    job = submit(client, dataset)

    assert client.get(f"/v1/jobs/{job['id']}?wait=0.2").json()["status"] == "queued"


def test_history_lists_epochs_with_null_for_what_is_no_number(
    server: RunningServer, client: httpx.Client, dataset: str
) -> None:
    job = submit(client, dataset)
    running = claim(server)
    with server.services.database.write() as session:
        queue.record_epoch(session, running, EPOCH, {"stage": "train"})

    history = client.get(f"/v1/jobs/{job['id']}/history").json()

    assert history["data"] == [{**EPOCH, "val_loss": None, "method": None, "figures": None}]


def test_deleting_a_data_set_waits_for_its_jobs(client: httpx.Client, dataset: str) -> None:
    job = submit(client, dataset)
    response = client.delete(f"/v1/datasets/{dataset}")
    assert_is_problem(response, 409, "conflict")
    client.post(f"/v1/jobs/{job['id']}/cancel")

    assert client.delete(f"/v1/datasets/{dataset}").json() == {"id": dataset, "object": "dataset", "deleted": True}
    assert_is_problem(client.get(f"/v1/datasets/{dataset}"), 404, "not-found")


@pytest.fixture
def postgres_server(empty_postgres_url: Callable[[], str], tmp_path: Path) -> Iterator[RunningServer]:
    """SQLite's writers come one by one; here they meet."""
    url = empty_postgres_url()
    upgrade(url)
    with RunningServer(api_builders.settings_for(tmp_path, database_url=url)) as server:
        yield server


def sent_together(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, first: Request, module: Any, name: str, second: Request
) -> tuple[int, int]:
    """Both answers, where the second request comes when the first has done `module.name` and not yet committed it."""
    done, later = getattr(module, name), []

    def do_and_wait(*arguments: Any, **more: Any) -> Any:
        result = done(*arguments, **more)
        later.append(pool.submit(second, other))
        api_builders.wait_for(lambda: later[0].done() or waits_for_a_lock(server))
        return result

    with (
        api_builders.client_of(server) as client,
        api_builders.client_of(server) as other,
        ThreadPoolExecutor(1) as pool,
        monkeypatch.context() as patch,
    ):
        patch.setattr(module, name, do_and_wait)
        return first(client).status_code, later[0].result().status_code


def waits_for_a_lock(server: RunningServer) -> bool:
    waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with server.services.database.read() as session:
        return session.scalar(text(waiting)) is not None


def test_no_job_is_queued_on_a_data_set_that_goes_at_the_same_time(
    postgres_server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = postgres_server
    dataset = api_builders.ready_dataset(server.services.database)

    def post(client: httpx.Client) -> httpx.Response:
        return client.post("/v1/jobs", json=asked_for(dataset))

    def delete(client: httpx.Client) -> httpx.Response:
        return client.delete(f"/v1/datasets/{dataset}")

    assert sent_together(server, monkeypatch, post, queue, "submit", delete) == (201, 409)
    with server.services.database.write() as session:
        queue.request_cancel(session, queue.list_jobs(session, limit=1)[0].id)
    assert sent_together(server, monkeypatch, delete, catalog, "delete", post) == (200, 404)


def test_no_batch_is_queued_on_a_model_that_goes_at_the_same_time(
    postgres_server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = postgres_server
    model = api_builders.register_model(server.services, aliases=())

    def put(client: httpx.Client) -> httpx.Response:
        return client.put("/v1/batches", params={"model": model}, content=api_builders.archive_of_classes())

    def delete(client: httpx.Client) -> httpx.Response:
        return client.delete(f"/v1/models/{model}")

    assert sent_together(server, monkeypatch, put, queue, "submit", delete) == (201, 409)
    with server.services.database.write() as session:
        batch = queue.list_jobs(session, limit=1, kind=JobKind.prediction)[0]
        queue.request_cancel(session, batch.id, kind=JobKind.prediction)
    assert sent_together(server, monkeypatch, delete, registry, "delete", put) == (200, 404)


@pytest.fixture
def listed(server: RunningServer, dataset: str) -> str:
    """A data set with its manifest as ingest writes it: per class, eight images to train and two to validate."""
    names = [(name, label, i) for label, name in enumerate(api_builders.CLASSES) for i in range(10)]
    records = [
        Record(f"img_{name}{i}", f"{name}/{i}.jpg", label, "train" if i < 8 else "val", "", 48, 40)
        for name, label, i in names
    ]
    with server.services.storage.staging() as staged:
        Manifest(api_builders.CLASSES, records).write(staged)
        server.services.storage.publish(staged, manifest_key(dataset))
    return dataset


def test_excluded_images_are_in_the_job_and_count_for_nothing(client: httpx.Client, listed: str) -> None:
    paths = [f"cat/{i}.jpg" for i in range(7)]  # leaves 1 cat and 8 dogs to train on, 2 of each to validate with
    asked = asked_for(listed, hyperparameters={"epochs": 1000})

    whole = client.post("/v1/jobs?dry_run=true", json=asked).json()
    less = client.post("/v1/jobs?dry_run=true", json=asked | {"exclude": paths}).json()
    job = submit(client, listed, exclude=paths)

    assert job["spec"]["exclude"] == job["spec"]["requested"]["exclude"] == paths
    classes = (whole["spec"]["hyperparameters"]["class_weights"], less["spec"]["hyperparameters"]["class_weights"])
    assert classes == ("none", "balanced")
    assert less["estimate"]["seconds"] < whole["estimate"]["seconds"]


def test_images_that_the_data_set_does_not_have_cannot_be_excluded(client: httpx.Client, listed: str) -> None:
    paths = ["cat/0.jpg", "cat/99.jpg", "dog/0.jpg", "/cat/1.jpg"]

    problem = assert_is_problem(client.post("/v1/jobs", json=asked_for(listed, exclude=paths)), 422, "invalid-request")

    assert problem["errors"] == [
        {"pointer": f"#/exclude/{place}", "detail": "no such image in the data set"} for place in (1, 3)
    ]
    assert client.get("/v1/jobs").json()["data"] == []


def test_no_more_than_twenty_unknown_images_are_listed(client: httpx.Client, listed: str) -> None:
    paths = [f"{'long' * 20}/{i}.jpg" for i in range(10_000)]

    problem = assert_is_problem(client.post("/v1/jobs", json=asked_for(listed, exclude=paths)), 422, "invalid-request")

    assert [error["pointer"] for error in problem["errors"]] == [f"#/exclude/{place}" for place in range(20)]
    assert "10000 of the 10000 paths" in problem["detail"]


@pytest.mark.parametrize(
    ("excluded", "detail"),
    [
        ([f"dog/{i}.jpg" for i in range(8)], "leaves no training image of dog"),
        ([f"{name}/{i}.jpg" for name in api_builders.CLASSES for i in (8, 9)], "leaves no validation image"),
    ],
)
def test_a_class_and_the_validation_keep_an_image(
    client: httpx.Client, listed: str, excluded: list[str], detail: str
) -> None:
    for path in ("/v1/jobs", "/v1/jobs?dry_run=true"):
        problem = assert_is_problem(client.post(path, json=asked_for(listed, exclude=excluded)), 422, "invalid-request")
        assert problem["errors"] == [{"pointer": "#/exclude", "detail": detail}]


def test_exclude_leaves_self_supervised_enough_pictures_for_a_batch(client: httpx.Client, listed: str) -> None:
    asked = asked_for(listed, method="self_supervised", backbone="graft_small")
    assert client.post("/v1/jobs?dry_run=true", json=asked).status_code == 200

    refused = client.post("/v1/jobs?dry_run=true", json=asked | {"exclude": ["cat/0.jpg"]})

    detail = "leaves 15 training pictures, and self_supervised compares 16 or more with each other"
    problem = assert_is_problem(refused, 422, "invalid-request")
    assert problem["errors"] == [{"pointer": "#/exclude", "detail": detail}]


def test_excluding_from_a_data_set_whose_files_are_gone_is_told(client: httpx.Client, dataset: str) -> None:
    response = client.post("/v1/jobs", json=asked_for(dataset, exclude=["cat/0.jpg"]))

    assert_is_problem(response, 404, "dataset-unreadable")
