"""Uploads in pieces: what a client of tus is promised, and that they end as POST /v1/datasets would have ended them."""

import base64
import fcntl
import hashlib
import io
import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import api_builders
import builders
import httpx
import numpy as np
import pytest
from api_builders import CLASSES, RunningServer, assert_is_problem
from cutting_proxy import CuttingProxy
from sqlalchemy import update
from test_models_and_operations import create_key
from test_uploads import stored_files
from tusclient.client import TusClient
from tusclient.exceptions import TusCommunicationError, TusUploadFailed

from app.access import Scope
from app.api import upload_endings
from app.api import uploads as upload_routes
from app.api.services import open_services
from app.clock import PatientClock, wall_clock
from app.datasets import uploads
from app.db.tables import UploadRow
from app.egress import Lookups

ARCHIVE = api_builders.archive_of_classes()
BAD_ARCHIVE = builders.zip_of({"cat/1.jpg": builders.jpeg(1), "../dog/1.jpg": builders.jpeg(2)})
TUS = {"Tus-Resumable": "1.0.0"}
PIECE = {**TUS, "Content-Type": "application/offset+octet-stream"}


def encoded(metadata: Mapping[str, str]) -> str:
    return ",".join(f"{key} {base64.b64encode(value.encode()).decode()}" for key, value in metadata.items())


def begin(client: httpx.Client, size: int, **metadata: str) -> str:
    """Returns the upload's path."""
    headers = {**TUS, "Upload-Length": str(size)} | ({"Upload-Metadata": encoded(metadata)} if metadata else {})
    answer = client.post("/v1/uploads", headers=headers)
    assert answer.status_code == 201, answer.text
    assert answer.headers["upload-offset"] == "0"
    return str(answer.headers["location"])


def send(client: httpx.Client, path: str, offset: int, piece: Any, **headers: str) -> httpx.Response:
    return client.patch(path, content=piece, headers={**PIECE, "Upload-Offset": str(offset), **headers})


def offset_of(client: httpx.Client, path: str) -> int:
    answer = client.head(path, headers=TUS)
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    return int(answer.headers["upload-offset"])


def datasets(client: httpx.Client) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = client.get("/v1/datasets", params={"limit": 200}).json()["data"]
    return listed


def assert_is_whole(server: RunningServer, client: httpx.Client, path: str, archive: bytes = ARCHIVE) -> dict[str, Any]:
    """The upload has become one data set of exactly these bytes. Returns that."""
    upload = client.get(path, params={"wait": 30}).json()
    assert (upload["status"], upload["offset"], upload["error"]) == ("finished", len(archive), None)
    dataset: dict[str, Any] = client.get(f"/v1/datasets/{upload['dataset']}").json()
    assert (dataset["size_bytes"], dataset["sha256"]) == (len(archive), hashlib.sha256(archive).hexdigest())
    stored = server.services.storage.path(f"datasets/{dataset['id']}/archive")
    assert stored.read_bytes() == archive
    assert not server.services.storage.exists(f"uploads/{upload['id']}")
    return dataset


def file_of(server: RunningServer, path: str) -> Path:
    return server.services.storage.path(uploads.archive_key(path.rpartition("/")[2]))


def test_stock_client_uploads_in_pieces(server: RunningServer, client: httpx.Client) -> None:
    uploader = TusClient(f"{server.url}/v1/uploads").uploader(
        file_stream=io.BytesIO(ARCHIVE),
        chunk_size=1000,
        upload_checksum=True,
        metadata={"filename": "colours.zip", "val_fraction": "0.25", "seed": "7", "relativePath": "null"},
    )

    uploader.upload()

    path = uploader.url.removeprefix(server.url)
    dataset = assert_is_whole(server, client, path)
    assert uploader.request.response_headers["graft-dataset"] == dataset["id"]
    assert (dataset["name"], dataset["filename"], dataset["val_fraction"], dataset["seed"]) == (
        *("colours", "colours.zip"),
        *(0.25, 7),
    )
    assert stored_files(server) == [server.services.storage.path(f"datasets/{dataset['id']}/archive")]
    assert 'graft_queue_depth{kind="ingest"} 1.0' in client.get("/metrics").text


def test_it_becomes_the_same_data_set_as_by_one_request(server: RunningServer, client: httpx.Client) -> None:
    archive = api_builders.archive_of_classes(per_class=10)
    said = {"name": "mine", "kind": "unlabelled", "val_fraction": "0.3", "seed": "3"}
    at_once = client.post("/v1/datasets", files={"file": ("x.zip", archive)}, data=said).json()
    path = begin(client, len(archive), filename="x.zip", **said)
    assert send(client, path, 0, archive).status_code == 204

    in_pieces = assert_is_whole(server, client, path, archive)

    own = {"id", "created_at"}
    assert {k: v for k, v in in_pieces.items() if k not in own} == {k: v for k, v in at_once.items() if k not in own}


def test_capabilities_are_told_without_a_version(client: httpx.Client) -> None:
    answer = client.options("/v1/uploads")

    assert (answer.status_code, answer.headers["tus-version"]) == (204, "1.0.0")
    assert answer.headers["tus-extension"] == "creation,creation-with-upload,expiration,checksum,termination"
    assert answer.headers["tus-max-size"] == str(10 * 1024**3)
    assert answer.headers["tus-checksum-algorithm"] == "sha1,sha256"


def test_creation_with_all_of_the_archive_makes_the_data_set(server: RunningServer, client: httpx.Client) -> None:
    answer = client.post("/v1/uploads", content=ARCHIVE, headers={**PIECE, "Upload-Length": str(len(ARCHIVE))})

    assert (answer.status_code, answer.headers["upload-offset"]) == (201, str(len(ARCHIVE)))
    dataset = assert_is_whole(server, client, answer.headers["location"])
    assert (answer.headers["graft-dataset"], dataset["name"]) == (dataset["id"], "dataset")


def test_creation_with_a_first_piece_goes_on_after_it(server: RunningServer, client: httpx.Client) -> None:
    answer = client.post("/v1/uploads", content=ARCHIVE[:100], headers={**PIECE, "Upload-Length": str(len(ARCHIVE))})
    path = answer.headers["location"]

    assert (answer.status_code, answer.headers["upload-offset"], offset_of(client, path)) == (201, "100", 100)
    assert send(client, path, 100, ARCHIVE[100:]).status_code == 204
    assert_is_whole(server, client, path)


@pytest.mark.parametrize(
    ("archive", "headers", "status"),
    [(ARCHIVE, {"Upload-Checksum": "sha1 YQ=="}, 460), (BAD_ARCHIVE, {}, 422), (iter([b"x" * 2000]), {}, 413)],
    ids=["checksum", "refused", "too long"],
)
def test_creation_with_a_piece_that_is_refused_leaves_nothing(
    server: RunningServer, client: httpx.Client, archive: Any, headers: dict[str, str], status: int
) -> None:
    length = {"Upload-Length": str(len(archive) if isinstance(archive, bytes) else 1000)}

    answer = client.post("/v1/uploads", content=archive, headers={**PIECE, **length, **headers})

    assert (answer.status_code, "location" in answer.headers) == (status, False)
    assert open_uploads(server) == []
    assert stored_files(server) == []
    assert used_bytes(client) == 0


def test_creation_whose_piece_stops_coming_tells_where_to_go_on(tmp_path: Path) -> None:
    settings = api_builders.settings_for(tmp_path, body_idle_timeout_seconds=0.3)
    with api_builders.running(settings) as server, api_builders.client_of(server) as client:
        with socket.create_connection(server.address, timeout=30) as connection:
            connection.sendall(creation_head() + ARCHIVE[:4000])
            head = connection.recv(10_000).decode().lower()

        assert head.startswith("http/1.1 408 ")
        assert "\r\nupload-offset: 4000\r\n" in head
        path = head.partition("\r\nlocation: ")[2].partition("\r\n")[0]
        assert send(client, path, 4000, ARCHIVE[4000:]).status_code == 204
        assert_is_whole(server, client, path)


def test_creation_with_all_of_it_while_the_quota_is_spent_tells_where_it_waits(tmp_path: Path) -> None:
    settings = api_builders.settings_for(tmp_path, workspace_max_bytes=len(ARCHIVE) + 1000)
    with api_builders.running(settings) as server, api_builders.client_of(server) as client:
        models = []

        def archive() -> Iterator[bytes]:
            yield ARCHIVE[:100]
            models.append(api_builders.register_model(server.services, aliases=()))
            yield ARCHIVE[100:]

        answer = client.post("/v1/uploads", content=archive(), headers={**PIECE, "Upload-Length": str(len(ARCHIVE))})

        assert_is_problem(answer, 429, "quota-of-bytes-spent")
        assert answer.headers["upload-offset"] == str(len(ARCHIVE))
        assert client.get(answer.headers["location"]).json()["status"] == "checking"
        assert client.delete(f"/v1/models/{models[0]}").status_code == 200
        assert_is_whole(server, client, answer.headers["location"])


def test_creation_that_is_cut_before_its_answer_leaves_nothing(server: RunningServer, client: httpx.Client) -> None:
    with socket.create_connection(server.address, timeout=30) as connection:
        connection.sendall(creation_head() + ARCHIVE[:4000])
        api_builders.wait_for(lambda: open_uploads(server))
        assert used_bytes(client) == len(ARCHIVE)

    api_builders.wait_for(lambda: not open_uploads(server))
    api_builders.wait_for(lambda: stored_files(server) == [])
    assert used_bytes(client) == 0


def creation_head() -> bytes:
    head = f"POST /v1/uploads HTTP/1.1\r\nHost: localhost\r\nTus-Resumable: 1.0.0\r\nUpload-Length: {len(ARCHIVE)}\r\n"
    head += f"Content-Type: application/offset+octet-stream\r\nContent-Length: {len(ARCHIVE)}\r\n\r\n"
    return head.encode()


def used_bytes(client: httpx.Client) -> int:
    used: int = client.get("/v1/usage").json()["bytes"]["used"]
    return used


@pytest.mark.parametrize(
    ("headers", "status", "slug"),
    [
        ({"Upload-Length": "5"}, 412, "tus-version"),
        ({"Tus-Resumable": "0.2.2", "Upload-Length": "5"}, 412, "tus-version"),
        (TUS, 422, "invalid-request"),
        ({**TUS, "Upload-Defer-Length": "1"}, 422, "invalid-request"),
        ({**TUS, "Upload-Length": "-1"}, 422, "invalid-request"),
        ({**TUS, "Upload-Length": "9" * 30}, 422, "invalid-request"),
        ({**TUS, "Upload-Length": "005"}, 422, "invalid-request"),
        ({**TUS, "Upload-Length": "0"}, 422, "empty-upload"),
        ({**TUS, "Upload-Length": str(10 * 1024**3 + 1)}, 413, "too-large"),
        ({**TUS, "Upload-Length": "5", "Upload-Metadata": "name ?"}, 422, "invalid-request"),
        ({**TUS, "Upload-Length": "5", "Upload-Metadata": "a YQ==,a YQ=="}, 422, "invalid-request"),
        ({**TUS, "Upload-Length": "5", "Upload-Metadata": encoded({"seed": "x"})}, 422, "invalid-request"),
        ({**TUS, "Upload-Length": "5", "Upload-Metadata": encoded({"kind": "x"})}, 422, "invalid-request"),
        ({**TUS, "Upload-Length": "5", "Upload-Metadata": encoded({"val_fraction": "1"})}, 422, "invalid-request"),
        ({**TUS, "Upload-Length": "5", "Upload-Metadata": encoded({"name": "a\0b"})}, 422, "invalid-request"),
    ],
)
def test_what_cannot_be_begun_is_refused_and_leaves_nothing(
    server: RunningServer, client: httpx.Client, headers: dict[str, str], status: int, slug: str
) -> None:
    answer = client.post("/v1/uploads", headers=headers)

    assert_is_problem(answer, status, slug)
    assert (answer.headers["tus-resumable"], answer.headers["tus-version"]) == ("1.0.0", "1.0.0")
    assert stored_files(server) == []


@pytest.mark.parametrize(
    ("headers", "status", "slug"),
    [
        ({"Tus-Resumable": "1.0.1"}, 412, "tus-version"),
        ({"Content-Type": "application/octet-stream"}, 415, "unsupported-media-type"),
        ({"Upload-Offset": "1"}, 409, "offset-mismatch"),
        ({"Upload-Offset": "x"}, 422, "invalid-request"),
        ({"Upload-Checksum": "md5 YQ=="}, 400, "checksum-algorithm-unknown"),
        ({"Upload-Checksum": "sha1 ?"}, 422, "invalid-request"),
        ({"Upload-Checksum": "sha1 YQ=="}, 460, "checksum-mismatch"),
    ],
)
def test_what_is_no_next_piece_is_refused_and_changes_nothing(
    client: httpx.Client, headers: dict[str, str], status: int, slug: str
) -> None:
    path = begin(client, 10)

    assert_is_problem(send(client, path, 0, b"12345", **headers), status, slug)

    assert offset_of(client, path) == 0
    assert send(client, path, 0, b"12345").status_code == 204
    assert offset_of(client, path) == 5


def test_piece_is_held_against_its_checksum(server: RunningServer, client: httpx.Client) -> None:
    path = begin(client, len(ARCHIVE))
    first, last = ARCHIVE[:3000], ARCHIVE[3000:]
    sha1, sha256 = (
        base64.b64encode(made).decode() for made in (hashlib.sha1(first).digest(), hashlib.sha256(last).digest())
    )

    spoilt = bytes([first[0] ^ 1]) + first[1:]
    problem = assert_is_problem(
        send(client, path, 0, spoilt, **{"Upload-Checksum": f"sha1 {sha1}"}), 460, "checksum-mismatch"
    )
    assert base64.b64encode(hashlib.sha1(spoilt).digest()).decode() in problem["detail"]
    assert offset_of(client, path) == 0
    assert send(client, path, 0, first, **{"Upload-Checksum": f"sha1 {sha1}"}).status_code == 204
    assert send(client, path, len(first), last, **{"Upload-Checksum": f"sha256 {sha256}"}).status_code == 204
    assert_is_whole(server, client, path)


@pytest.mark.parametrize("is_declared", [True, False])
def test_piece_beyond_the_length_is_refused(server: RunningServer, client: httpx.Client, is_declared: bool) -> None:
    path = begin(client, len(ARCHIVE))
    too_much = ARCHIVE[:10], ARCHIVE[10:] + b"x"

    answer = send(client, path, 0, b"".join(too_much) if is_declared else iter(too_much))

    assert_is_problem(answer, 413, "too-large")
    kept = offset_of(client, path)
    assert kept in ((0,) if is_declared else (0, 10))
    assert send(client, path, kept, ARCHIVE[kept:]).status_code == 204
    assert_is_whole(server, client, path)


def test_bad_archive_is_refused_with_its_last_byte_as_it_would_be_at_once(
    server: RunningServer, client: httpx.Client
) -> None:
    at_once = client.post("/v1/datasets", files={"file": ("x.zip", BAD_ARCHIVE)})
    path = begin(client, len(BAD_ARCHIVE))
    assert send(client, path, 0, BAD_ARCHIVE[:50]).status_code == 204

    answers = [send(client, path, 50, BAD_ARCHIVE[50:]), send(client, path, len(BAD_ARCHIVE), b"")]

    slug = at_once.json()["type"].rpartition("/")[2]
    for answer in answers:
        problem = assert_is_problem(answer, at_once.status_code, slug)
        assert problem["detail"] == at_once.json()["detail"]
    upload = client.get(path).json()
    assert (upload["status"], upload["dataset"], upload["error"]["code"]) == ("refused", None, slug)
    looked = client.head(path, headers=TUS)
    assert (looked.status_code, "upload-offset" in looked.headers) == (422, False)
    assert datasets(client) == []
    assert stored_files(server) == []


def test_last_piece_sent_again_is_answered_the_same(server: RunningServer, client: httpx.Client) -> None:
    path = begin(client, len(ARCHIVE))

    answers = [send(client, path, 0, ARCHIVE), send(client, path, len(ARCHIVE), b"")]

    assert {(answer.status_code, answer.headers["graft-dataset"]) for answer in answers} == {
        (204, assert_is_whole(server, client, path)["id"])
    }
    assert_is_problem(send(client, path, 0, ARCHIVE), 409, "offset-mismatch")
    assert len(datasets(client)) == 1


def half_a_piece(server: RunningServer, path: str, piece: bytes, sent: int) -> socket.socket:
    """A PATCH whose body stops in the middle."""
    connection = socket.create_connection(server.address, timeout=30)
    head = f"PATCH {path} HTTP/1.1\r\nHost: localhost\r\nTus-Resumable: 1.0.0\r\nUpload-Offset: 0\r\n"
    head += f"Content-Type: application/offset+octet-stream\r\nContent-Length: {len(piece)}\r\n\r\n"
    connection.sendall(head.encode() + piece[:sent])
    return connection


def test_what_came_of_a_cut_piece_stays(server: RunningServer, client: httpx.Client) -> None:
    archive = builders.zip_of({f"{name}/{i}.jpg": noise(i) for i in range(12) for name in CLASSES})
    path, sent = begin(client, len(archive)), 5 * 2**19
    assert len(archive) > 2 * sent
    connection = half_a_piece(server, path, archive, sent)
    api_builders.wait_for(lambda: offset_of(client, path) >= 2**21)

    connection.close()
    api_builders.wait_for(lambda: not is_held(file_of(server, path)))

    kept = offset_of(client, path)
    # All but what was on its way between the socket and us when it broke.
    assert 2**21 <= kept <= sent
    assert send(client, path, kept, archive[kept:]).status_code == 204
    assert_is_whole(server, client, path, archive)


def noise(seed: int) -> bytes:
    """A picture that takes a quarter of a megabyte."""
    pixels = np.random.default_rng(seed).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    return builders.encoded(pixels)


def test_one_of_two_pieces_at_a_time_is_told_to_wait(server: RunningServer, client: httpx.Client) -> None:
    path = begin(client, len(ARCHIVE))
    with half_a_piece(server, path, ARCHIVE, 4000) as connection:
        api_builders.wait_for(lambda: is_held(file_of(server, path)))

        problem = send(client, path, 0, ARCHIVE)
        assert_is_problem(problem, 423, "locked")
        assert problem.headers["retry-after"] == "1"
        assert_is_problem(client.delete(path, headers=TUS), 423, "locked")

        connection.sendall(ARCHIVE[4000:])
        assert b" 204 " in connection.recv(1000)
    assert_is_whole(server, client, path)


def is_held(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_piece_that_stops_coming_ends_and_stays(tmp_path: Path) -> None:
    settings = api_builders.settings_for(tmp_path, body_idle_timeout_seconds=0.3)
    with api_builders.running(settings) as server, api_builders.client_of(server) as client:
        path = begin(client, len(ARCHIVE))
        with half_a_piece(server, path, ARCHIVE, 4000) as connection:
            assert b" 408 " in connection.recv(1000)
        assert offset_of(client, path) == 4000


@pytest.mark.parametrize("seed", range(5))
def test_stock_client_goes_on_through_cut_connections(server: RunningServer, client: httpx.Client, seed: int) -> None:
    archive = api_builders.archive_of_classes(per_class=60)
    with CuttingProxy(server.address, cuts=25, most_bytes=len(archive) // 5, seed=seed) as proxy:
        path = upload_through_cuts(proxy.url, archive)
        assert proxy.cuts > 5
    assert_is_whole(server, client, path, archive)
    assert len(datasets(client)) == 1


def upload_through_cuts(url: str, archive: bytes) -> str:
    """Begins an upload once, and goes on with it after every failure, never from before an acknowledged byte."""
    address, acknowledged = None, 0
    for _ in range(500):
        try:
            uploader = TusClient(f"{url}/v1/uploads").uploader(
                file_stream=io.BytesIO(archive), url=address, chunk_size=len(archive) // 3
            )
            assert uploader.offset >= acknowledged
            acknowledged = uploader.offset
            if address is None:
                address = uploader.create_url()
                uploader.set_url(address)
            while acknowledged < len(archive):
                uploader.upload_chunk()
                acknowledged = uploader.offset
            return str(address).removeprefix(url)
        except TusCommunicationError:
            continue
        except TusUploadFailed as error:
            assert error.status_code in (None, 409, 423), error
            time.sleep(0.02)
    raise AssertionError("it never got through")


def test_whole_upload_that_nobody_ended_is_ended_by_itself(server: RunningServer, client: httpx.Client) -> None:
    good, bad = begin(client, len(ARCHIVE)), begin(client, len(BAD_ARCHIVE))
    # As a process leaves it that is killed behind its last write.
    file_of(server, good).write_bytes(ARCHIVE)
    file_of(server, bad).write_bytes(BAD_ARCHIVE)

    assert_is_whole(server, client, good)
    assert client.get(bad, params={"wait": 30}).json()["status"] == "refused"
    assert len(datasets(client)) == 1


def test_archive_that_ends_every_process_is_given_up(server: RunningServer, client: httpx.Client) -> None:
    path = begin(client, len(ARCHIVE))
    with server.services.database.write() as session:
        session.execute(update(UploadRow).values(attempts=upload_endings.MAX_ATTEMPTS))

    assert_is_problem(send(client, path, 0, ARCHIVE), 422, "upload-ends-server")

    assert stored_files(server) == []


def test_whole_upload_waits_while_the_quota_is_spent(tmp_path: Path) -> None:
    settings = api_builders.settings_for(tmp_path, workspace_max_bytes=2 * len(ARCHIVE) + 1000)
    with api_builders.running(settings) as server, api_builders.client_of(server) as client:
        waiting, expired = begin(client, len(ARCHIVE)), begin(client, len(ARCHIVE))
        model = api_builders.register_model(server.services, aliases=())  # of a job that was submitted before

        for path in (waiting, expired):
            assert_is_problem(send(client, path, 0, ARCHIVE), 429, "quota-of-bytes-spent")
            assert_is_problem(send(client, path, len(ARCHIVE), b""), 429, "quota-of-bytes-spent")

        assert client.get(waiting).json()["status"] == "checking"
        os.utime(file_of(server, expired), (0, 0))
        api_builders.wait_for(lambda: upload_endings.sweep(server.services) or client.get(expired).status_code == 404)
        assert client.get(expired).status_code == 404
        assert [row.attempts for row in open_uploads(server)] == [0]
        assert client.delete(f"/v1/models/{model}").status_code == 200
        assert_is_whole(server, client, waiting)


def open_uploads(server: RunningServer) -> Sequence[UploadRow]:
    with server.services.database.read() as session:
        return uploads.list_open(session)


def test_upload_is_given_up_and_the_data_set_of_a_finished_one_stays(
    server: RunningServer, client: httpx.Client
) -> None:
    given_up, finished = begin(client, len(ARCHIVE)), begin(client, len(ARCHIVE))
    send(client, given_up, 0, ARCHIVE[:100])
    send(client, finished, 0, ARCHIVE)
    dataset = assert_is_whole(server, client, finished)

    for path in (given_up, finished):
        assert client.delete(path, headers=TUS).status_code == 204
        assert_is_problem(client.delete(path, headers=TUS), 404, "not-found")
        assert client.head(path, headers=TUS).status_code == 404
        assert_is_problem(send(client, path, 0, b"x"), 404, "not-found")
    assert stored_files(server) == [server.services.storage.path(f"datasets/{dataset['id']}/archive")]


def test_what_nobody_goes_on_with_expires(tmp_path: Path) -> None:
    settings = api_builders.settings_for(tmp_path, upload_expiry_hours=1)
    with api_builders.running(settings) as server, api_builders.client_of(server) as client:
        old, held, fresh, ended = (begin(client, len(ARCHIVE)) for _ in range(4))
        send(client, ended, 0, ARCHIVE)
        for path in (old, held):
            os.utime(file_of(server, path), (time.time() - 3601, time.time() - 3601))

        with file_of(server, held).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert upload_endings.sweep(server.services) == 1
        assert [client.get(path).status_code for path in (old, held, fresh, ended)] == [404, 200, 200, 200]

        # A piece that comes begins the time anew.
        assert send(client, held, 0, b"x").status_code == 204
        with server.services.database.write() as session:
            session.execute(
                update(UploadRow).where(UploadRow.status == "finished").values(ended_at=UploadRow.created_at)
            )
        assert upload_endings.sweep(server.services) == 0
        assert client.get(ended).status_code == 200
    hasty = settings.model_copy(update={"upload_expiry_hours": 1e-6})
    with api_builders.RunningServer(hasty) as server, api_builders.client_of(server) as client:
        api_builders.wait_for(lambda: {client.get(path).status_code for path in (held, fresh, ended)} == {404})
        assert [path for path in stored_files(server) if "uploads" in path.parts] == []


def test_upload_that_ends_while_others_expire_stays_to_be_asked_for(tmp_path: Path) -> None:
    settings = api_builders.settings_for(tmp_path)
    with api_builders.running(settings) as server, api_builders.client_of(server) as client:
        old, ending = begin(client, len(ARCHIVE)), begin(client, len(ARCHIVE))
        paths = [file_of(server, path) for path in (old, ending)]
    # Without a server, which would sweep, too, when it starts.
    services = open_services(settings, resolve=Lookups())
    os.utime(paths[0], (0, 0))
    with ThreadPoolExecutor(1) as pool:
        with services.database.write() as session:
            uploads.finish(session, ending.rpartition("/")[2], dataset_id="ds_1")
            # It sees two that are open, holds the first, and waits for us to remove its row.
            sweeping = pool.submit(upload_endings.sweep, services)
            api_builders.wait_for(lambda: is_held(paths[0]))
            paths[1].unlink()
        assert sweeping.result() == 1
    services.close()

    with RunningServer(settings) as server, api_builders.client_of(server) as client:
        assert client.get(old).status_code == 404
        assert (client.get(ending).json()["status"], client.get(ending).json()["dataset"]) == ("finished", "ds_1")
        assert send(client, ending, len(ARCHIVE), b"").headers["graft-dataset"] == "ds_1"


def test_whoever_saw_an_upload_open_right_before_it_ended_is_told_how(
    server: RunningServer, client: httpx.Client
) -> None:
    path = begin(client, len(ARCHIVE))
    with server.services.database.read() as session:
        seen_open = uploads.find(session, path.rpartition("/")[2])
    dataset = send(client, path, 0, ARCHIVE).headers["graft-dataset"]

    shown = upload_routes._shown(server.services, seen_open)

    assert (seen_open.status, shown.status, shown.dataset, shown.offset) == ("open", "finished", dataset, len(ARCHIVE))


@pytest.mark.parametrize("jump", [timedelta(days=30), timedelta(days=-30)])
def test_no_upload_expires_because_the_clock_jumps(
    server: RunningServer, client: httpx.Client, jump: timedelta
) -> None:
    path, ended = begin(client, len(ARCHIVE)), begin(client, len(ARCHIVE))
    send(client, ended, 0, ARCHIVE)
    moments = itertools.chain([wall_clock()], itertools.repeat(wall_clock() + jump))
    jumping = replace(server.services, clock=PatientClock(lambda: next(moments)))

    assert upload_endings.sweep(jumping) == 0

    assert [client.get(each).status_code for each in (path, ended)] == [200, 200]


def test_upload_without_its_file_is_gone(server: RunningServer, client: httpx.Client) -> None:
    path = begin(client, 10)
    file_of(server, path).unlink()

    assert_is_problem(client.get(path), 404, "not-found")
    assert_is_problem(send(client, path, 0, b"x"), 404, "not-found")
    assert upload_endings.sweep(server.services) == 1


def test_client_that_can_only_post_says_the_method_in_a_header(server: RunningServer, client: httpx.Client) -> None:
    path = begin(client, len(ARCHIVE))

    assert_is_problem(client.post(path, headers=TUS), 405, "method-not-allowed")
    patch = {**PIECE, "Upload-Offset": "0", "X-HTTP-Method-Override": "PATCH"}
    assert client.post(path, content=ARCHIVE, headers=patch).status_code == 204
    assert_is_whole(server, client, path)
    assert client.post(path, headers={**TUS, "X-HTTP-Method-Override": "DELETE"}).status_code == 204
    # Elsewhere it means nothing.
    assert client.post("/v1/jobs/x", headers={"X-HTTP-Method-Override": "DELETE"}).status_code == 405


def test_key_is_asked_for_before_a_piece_is_read(server: RunningServer, client: httpx.Client) -> None:
    trainer = create_key(server, Scope.train)
    small = create_key(server, Scope.predict)
    path = client.post("/v1/uploads", headers={**TUS, "Upload-Length": "10", **trainer}).headers["location"]

    for headers, status in (({}, 401), (small, 403)):
        answer = send(client, path, 0, b"12345", **headers)
        assert (answer.status_code, answer.headers["tus-resumable"]) == (status, "1.0.0")
        assert client.head(path, headers={**TUS, **headers}).status_code == status
    with half_a_piece(server, path, b"x" * 10**9, 0) as connection:
        assert b" 401 " in connection.recv(1000)
    assert client.head(path, headers={**TUS, **trainer}).headers["upload-offset"] == "0"


def test_metadata_is_given_back_as_it_came(client: httpx.Client) -> None:
    said = encoded({"filename": "a/b/ü.zip", "is_confidential": "", "name": "mine"})
    path = client.post("/v1/uploads", headers={**TUS, "Upload-Length": "9", "Upload-Metadata": said}).headers[
        "location"
    ]

    answer = client.head(path, headers=TUS)

    assert (answer.headers["upload-metadata"], answer.headers["upload-length"]) == (said, "9")
    upload = client.get(path).json()
    assert (upload["filename"], upload["name"], upload["status"]) == ("ü.zip", "mine", "uploading")
    assert upload["expires_at"].endswith("Z")


def test_many_uploads_at_once_each_become_their_own(server: RunningServer, client: httpx.Client) -> None:
    archives = [builders.zip_of(builders.class_folders(4, first_seed=seed)) for seed in range(0, 80, 10)]
    paths = [begin(client, len(archive)) for archive in archives]

    def upload(path: str, archive: bytes) -> None:
        with api_builders.client_of(server) as own:
            for start in range(0, len(archive), 4000):
                assert send(own, path, start, archive[start : start + 4000]).status_code == 204

    threads = [threading.Thread(target=upload, args=pair) for pair in zip(paths, archives, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    made = {assert_is_whole(server, client, *pair)["id"] for pair in zip(paths, archives, strict=True)}
    assert made == {dataset["id"] for dataset in datasets(client)}
