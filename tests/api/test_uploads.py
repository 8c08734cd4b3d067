"""Uploading a data set: every form a client may send it in, and nothing left of what was refused."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import api_builders
import builders
import httpx
import pytest
from api_builders import RunningServer, assert_is_problem

from app.db.engine import Database
from app.jobs import queue
from app.jobs.states import JobKind

ARCHIVE = api_builders.archive_of_classes()


def stored_files(server: RunningServer) -> list[Path]:
    """All files of the storage but those that a server has from its start: the database's, and what jobs look at."""
    root, own = server.services.settings.storage_root, ("graft.db", "serving-busy")
    return [path for path in root.rglob("*") if path.is_file() and not path.name.startswith(own)]


def assert_is_stored(server: RunningServer, response: httpx.Response, *, name: str) -> dict[str, Any]:
    dataset: dict[str, Any] = response.json()
    assert response.status_code == 201, response.text
    assert response.headers["location"] == f"/v1/datasets/{dataset['id']}"
    assert (dataset["object"], dataset["name"], dataset["status"]) == ("dataset", name, "processing")
    assert dataset["size_bytes"] == len(ARCHIVE)
    assert dataset["created_at"].endswith("Z")
    assert server.services.storage.path(f"datasets/{dataset['id']}/archive").read_bytes() == ARCHIVE
    return dataset


def test_form_upload_is_stored_and_queued(server: RunningServer, client: httpx.Client) -> None:
    response = client.post(
        "/v1/datasets",
        files={"file": ("colours.zip", ARCHIVE)},
        data={"name": "my colours", "val_fraction": "0.25", "seed": "7"},
    )

    dataset = assert_is_stored(server, response, name="my colours")
    assert (dataset["val_fraction"], dataset["seed"], dataset["packed_bytes"]) == (0.25, 7, None)
    assert set(dataset) >= {
        *("id", "object", "name", "status", "created_at", "size_bytes", "sha256", "num_images", "num_rejected"),
        *("splits", "classes", "rejected", "warnings", "error"),
    }
    assert 'graft_queue_depth{kind="ingest"} 1.0' in client.get("/metrics").text


def test_how_far_the_checking_is_can_be_seen(server: RunningServer, client: httpx.Client) -> None:
    dataset = client.put("/v1/datasets", content=ARCHIVE).json()
    assert dataset["progress"] is None
    with server.services.database.write() as session:
        claim = queue.claim_next(session, kind=JobKind.ingest, worker_id="w1", owner={})
        assert claim is not None
        queue.record_progress(session, claim, {"stage": "ingest", "fraction": 0.25, "epoch": None}, event=False)

    for seen in (client.get(f"/v1/datasets/{dataset['id']}").json(), client.get("/v1/datasets").json()["data"][0]):
        assert seen["progress"] == {"stage": "ingest", "fraction": 0.25}


@pytest.mark.parametrize(
    ("filename", "name"),
    [("colours.zip", "colours"), ("a/b/colours.TAR.GZ", "colours"), ("..\\x.tgz", "x"), (".zip", "dataset")],
)
def test_form_upload_is_called_as_its_file(
    server: RunningServer, client: httpx.Client, filename: str, name: str
) -> None:
    response = client.post("/v1/datasets", files={"file": (filename, ARCHIVE)})

    assert_is_stored(server, response, name=name)


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("content_type", [None, "application/zip", "application/x-www-form-urlencoded", "text/plain"])
def test_raw_upload_is_stored_whatever_its_content_type_says(
    server: RunningServer, client: httpx.Client, method: str, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}

    response = client.request(method, "/v1/datasets?name=raw", content=ARCHIVE, headers=headers)

    assert_is_stored(server, response, name="raw")


def test_upload_without_a_length_is_stored(server: RunningServer, client: httpx.Client) -> None:
    response = client.put("/v1/datasets", content=iter([ARCHIVE[:1000], ARCHIVE[1000:]]))

    assert_is_stored(server, response, name="dataset")


@pytest.mark.parametrize(
    ("content", "slug"),
    [
        (b"this is not an archive", None),
        (builders.zip_of({"only/1.jpg": builders.jpeg(1), "only/2.jpg": builders.jpeg(2)}), None),
        (builders.zip_of({"../cat/1.jpg": b"x"}), None),
        (b"", "empty-upload"),
    ],
)
def test_refused_upload_leaves_nothing(
    server: RunningServer, client: httpx.Client, content: bytes, slug: str | None
) -> None:
    response = client.post("/v1/datasets", content=content)

    problem = assert_is_problem(response, 422, slug or response.json()["type"].rpartition("/")[2])
    assert problem["detail"]
    assert stored_files(server) == []
    assert client.get("/v1/datasets").json()["data"] == []


@pytest.mark.parametrize(
    ("query", "pointer"),
    [("val_fraction=0", "#/val_fraction"), ("val_fraction=nan", "#/val_fraction"), ("seed=-1", "#/seed"),
     ("name=", "#/name"), ("name=" + "x" * 201, "#/name"), ("name=a%0Ab", "#/name")],
)  # fmt: skip
def test_bad_option_in_the_query_is_pointed_at(client: httpx.Client, query: str, pointer: str) -> None:
    problem = assert_is_problem(client.post(f"/v1/datasets?{query}", content=ARCHIVE), 422, "invalid-request")

    assert [error["pointer"] for error in problem["errors"]] == [pointer]


def test_bad_option_in_the_form_is_pointed_at(server: RunningServer, client: httpx.Client) -> None:
    response = client.post("/v1/datasets", files={"file": ARCHIVE}, data={"val_fraction": "2", "seed": "x"})

    problem = assert_is_problem(response, 422, "invalid-request")
    assert [error["pointer"] for error in problem["errors"]] == ["#/val_fraction", "#/seed"]
    assert stored_files(server) == []


def test_declared_length_beyond_the_limit_is_refused_before_the_body(tmp_path: Path) -> None:
    settings = api_builders.settings_for(tmp_path, max_upload_bytes=1000)
    with api_builders.running(settings) as server:
        head = b"PUT /v1/datasets HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n"
        head += b"Expect: 100-continue\r\n\r\n"
        answer = api_builders.raw_exchange(server, head)

    assert answer.startswith(b"HTTP/1.1 413 ")  # and no "100 Continue" before it
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["type"] == "/problems/too-large"


def test_body_beyond_the_limit_is_refused_on_the_way(tmp_path: Path) -> None:
    settings = api_builders.settings_for(tmp_path, max_upload_bytes=1000)
    with api_builders.running(settings) as server, api_builders.client_of(server) as client:
        response = client.put("/v1/datasets", content=iter([b"x" * 900, b"x" * 900]))

        assert_is_problem(response, 413, "too-large")
        assert stored_files(server) == []


def test_upload_with_expect_is_told_to_continue(server: RunningServer) -> None:
    head = (
        b"PUT /v1/datasets HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % len(ARCHIVE)
    )
    answer = api_builders.raw_exchange(server, head + ARCHIVE)

    assert answer.startswith(b"HTTP/1.1 100 ")
    assert b"HTTP/1.1 201 " in answer


def test_upload_that_is_broken_off_leaves_nothing(server: RunningServer, client: httpx.Client) -> None:
    with socket.create_connection(server.address) as connection:
        connection.sendall(
            b"PUT /v1/datasets HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000000\r\n\r\n" + bytes(1_500_000)
        )
        api_builders.wait_for(lambda: stored_files(server))

    api_builders.wait_for(lambda: not stored_files(server))
    assert client.get("/v1/datasets").json()["data"] == []


def test_upload_that_stalls_is_ended_with_408(tmp_path: Path) -> None:
    settings = api_builders.settings_for(tmp_path, body_idle_timeout_seconds=0.2)
    with api_builders.running(settings) as server:
        answer = api_builders.raw_exchange(
            server, b"PUT /v1/datasets HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\nPK"
        )

        assert answer.startswith(b"HTTP/1.1 408 ")
        assert stored_files(server) == []


def test_full_disk_refuses_uploads(tmp_path: Path) -> None:
    settings = api_builders.settings_for(tmp_path, min_free_bytes=2**62)
    with api_builders.running(settings) as server, api_builders.client_of(server) as client:
        assert_is_problem(client.post("/v1/datasets", content=ARCHIVE), 507, "storage-full")
        assert "too full" in client.get("/readyz").json()["detail"]


def test_images_of_a_data_set_whose_files_are_gone_are_404(server: RunningServer, client: httpx.Client) -> None:
    dataset = api_builders.ready_dataset(server.services.database)

    assert_is_problem(client.get(f"/v1/datasets/{dataset}/images?class=&split="), 404, "dataset-unreadable")
    assert_is_problem(client.get(f"/v1/datasets/{dataset}/images/img_1/thumbnail"), 404, "dataset-unreadable")


@pytest.mark.parametrize("prepare", [api_builders.processing_dataset, api_builders.failed_dataset])
def test_images_of_a_data_set_that_is_not_ready_are_409(
    server: RunningServer, client: httpx.Client, prepare: Callable[[Database], str]
) -> None:
    dataset = prepare(server.services.database)

    response = client.get(f"/v1/datasets/{dataset}/images")

    assert response.status_code == 409
    assert ("retry-after" in response.headers) == (prepare is api_builders.processing_dataset)
