"""Submitting, watching and ending jobs over HTTP."""

import threading
from typing import Any

import api_builders
import httpx
import pytest
import queue_builders
from api_builders import RunningServer
from test_problems import assert_is_problem

from app.jobs import queue
from app.jobs.queue import Claim

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
    assert answer["estimate"] == {key: answer[key] for key in ("seconds", "peak_memory_bytes")}
    assert min(answer["estimate"].values()) > 0
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

    assert history["data"] == [{**EPOCH, "val_loss": None}]


def test_deleting_a_data_set_waits_for_its_jobs(client: httpx.Client, dataset: str) -> None:
    job = submit(client, dataset)
    response = client.delete(f"/v1/datasets/{dataset}")
    assert_is_problem(response, 409, "conflict")
    client.post(f"/v1/jobs/{job['id']}/cancel")

    assert client.delete(f"/v1/datasets/{dataset}").json() == {"id": dataset, "object": "dataset", "deleted": True}
    assert_is_problem(client.get(f"/v1/datasets/{dataset}"), 404, "not-found")
