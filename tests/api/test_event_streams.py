"""A job's event log, as a list and as a stream, with the same ids in both."""

import threading
from typing import Any

import api_builders
import httpx
import pytest
import queue_builders
from api_builders import RunningServer, assert_is_problem
from httpx_sse import ServerSentEvent, connect_sse
from test_job_routes import asked_for

from app.api import event_stream
from app.db.tables import DEFAULT_WORKSPACE
from app.jobs import queue
from app.jobs.queue import Claim


@pytest.fixture
def job(server: RunningServer, client: httpx.Client) -> str:
    """A running job with three events: queued, running, and a line of its log."""
    dataset = api_builders.ready_dataset(server.services.database)
    job_id: str = client.post("/v1/jobs", json=asked_for(dataset)).json()["id"]
    log(server, claim(server), "first line")
    return job_id


def claim(server: RunningServer) -> Claim:
    found = queue_builders.claim_next(server.services.database)
    assert found is not None
    return found


def current(job_id: str) -> Claim:
    return Claim(job_id, 1, DEFAULT_WORKSPACE, queue.JobKind.training, "", {}, 1)


def log(server: RunningServer, running: Claim, message: str) -> None:
    with server.services.database.write() as session:
        queue.record_log(session, running, message)


def finish(server: RunningServer, job_id: str) -> None:
    with server.services.database.write() as session:
        queue.succeed(session, current(job_id))


def events_of(client: httpx.Client, job_id: str, **query: Any) -> dict[str, Any]:
    listing: dict[str, Any] = client.get(f"/v1/jobs/{job_id}/events", params=query).json()
    return listing


def streamed(client: httpx.Client, job_id: str, **options: Any) -> list[ServerSentEvent]:
    with connect_sse(client, "GET", f"/v1/jobs/{job_id}/events", **options) as source:
        return list(source.iter_sse())


def test_events_are_listed_oldest_first(client: httpx.Client, job: str) -> None:
    listing = events_of(client, job)

    assert [event["event"] for event in listing["data"]] == ["status", "status", "log"]
    assert [event["data"].get("status") for event in listing["data"]] == ["queued", "running", None]
    assert listing["data"][2]["data"] == {"message": "first line"}
    assert (listing["first_id"], listing["last_id"]) == (listing["data"][0]["id"], listing["data"][2]["id"])
    assert all(event["object"] == "event" and event["created_at"].endswith("Z") for event in listing["data"])


def test_events_are_paged(client: httpx.Client, job: str) -> None:
    first = events_of(client, job, limit=2)
    rest = events_of(client, job, limit=2, after=first["last_id"])

    assert (first["has_more"], rest["has_more"], len(first["data"]), len(rest["data"])) == (True, False, 2, 1)


def test_stream_of_a_finished_job_has_the_whole_log_with_the_same_ids(
    server: RunningServer, client: httpx.Client, job: str
) -> None:
    finish(server, job)
    listed = events_of(client, job)["data"]

    *received, done = streamed(client, job)

    assert [(event.id, event.event, event.json()) for event in received] == [
        (event["id"], event["event"], event["data"]) for event in listed
    ]
    assert (done.event, done.json()) == ("done", {"status": "succeeded"})


def test_stream_goes_on_with_what_happens_until_the_end(server: RunningServer, client: httpx.Client, job: str) -> None:
    messages = []
    with connect_sse(client, "GET", f"/v1/jobs/{job}/events") as source:
        for event in source.iter_sse():
            messages.append(event.json().get("message") or event.json().get("status"))
            if messages[-1] == "first line":
                log(server, current(job), "second line")
            if messages[-1] == "second line":
                finish(server, job)

    assert messages == ["queued", "running", "first line", "second line", "succeeded", "succeeded"]


@pytest.mark.parametrize("how", ["header", "query"])
def test_stream_goes_on_after_the_last_id(server: RunningServer, client: httpx.Client, job: str, how: str) -> None:
    finish(server, job)
    seen = events_of(client, job)["data"][1]["id"]
    options = {"headers": {"Last-Event-ID": seen}} if how == "header" else {"params": {"after": seen}}

    received = streamed(client, job, **options)

    assert [event.event for event in received] == ["log", "status", "done"]


def test_where_the_client_really_is_goes_before_where_it_began(
    server: RunningServer, client: httpx.Client, job: str
) -> None:
    finish(server, job)
    first, *_, last = (event["id"] for event in events_of(client, job)["data"])

    response = client.get(
        f"/v1/jobs/{job}/events?after={first}", headers={"Accept": "text/event-stream", "Last-Event-ID": last}
    )

    assert (response.status_code, response.content) == (204, b"")


def test_stream_is_not_to_be_stored_or_held_back(server: RunningServer, client: httpx.Client, job: str) -> None:
    finish(server, job)

    response = client.get(f"/v1/jobs/{job}/events", headers={"Accept": "text/event-stream"})

    assert response.headers["content-type"].startswith("text/event-stream")
    assert (response.headers["cache-control"], response.headers["x-accel-buffering"]) == ("no-store", "no")
    assert response.text.startswith("retry: 3000\nid: ")
    assert response.text.count("retry:") == 1


def test_silent_stream_is_kept_alive_by_comments(
    monkeypatch: pytest.MonkeyPatch, client: httpx.Client, job: str
) -> None:
    monkeypatch.setattr(event_stream, "PING_INTERVAL_SECONDS", 0.1)

    with client.stream("GET", f"/v1/jobs/{job}/events", headers={"Accept": "text/event-stream"}) as response:
        assert next(line for line in response.iter_lines() if line.startswith(":")) == ": ping"


def test_server_stops_while_a_stream_is_open(server: RunningServer, client: httpx.Client, job: str) -> None:
    with client.stream("GET", f"/v1/jobs/{job}/events", headers={"Accept": "text/event-stream"}) as response:
        lines = response.iter_lines()
        next(lines)
        stopping = threading.Thread(target=server.stop)
        stopping.start()

        assert "event: done" not in list(lines)
        stopping.join()


def test_stream_of_a_job_that_is_deleted_ends_whole(server: RunningServer, client: httpx.Client, job: str) -> None:
    def delete() -> None:  # at once, so that no look comes between
        with server.services.database.write() as session:
            queue.succeed(session, current(job))
            queue.delete(session, job)

    with connect_sse(client, "GET", f"/v1/jobs/{job}/events") as source:
        stream = source.iter_sse()
        assert [next(stream).event for _ in range(3)] == ["status", "status", "log"]
        delete()
        assert list(stream) == []


@pytest.mark.parametrize("position", ["x", "-1", "1e3", "9" * 19])
def test_what_is_no_event_id_is_refused(client: httpx.Client, job: str, position: str) -> None:
    assert_is_problem(client.get(f"/v1/jobs/{job}/events?after={position}"), 422, "invalid-request")


def test_events_of_an_unknown_job_are_404(client: httpx.Client) -> None:
    response = client.get("/v1/jobs/job_none/events", headers={"Accept": "text/event-stream"})

    assert_is_problem(response, 404, "not-found")
