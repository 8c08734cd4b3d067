"""SIGTERM comes while the API is at work: what can be answered in time is answered, the rest is told, and it ends."""

import json
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import api_builders
import builders
import httpx
import pytest
import queue_builders
from killed_api import KilledApi, killed_api
from running import wait_until

from app.db.engine import Database
from app.db.tables import DEFAULT_WORKSPACE
from app.precedence import Precedence
from app.storage import LocalStorage

SOON_SECONDS = 30.0
PICTURE = builders.jpeg()
TUS = {"Tus-Resumable": "1.0.0"}


class HalfSent:
    """A request of which the headers and half of the body have been sent."""

    def __init__(self, api: KilledApi, request_line: str, body: bytes, headers: Mapping[str, str] = {}) -> None:
        self._rest = body[len(body) // 2 :]
        self._connection = socket.create_connection(api.address, timeout=2 * SOON_SECONDS)
        lines = [request_line, "Host: localhost", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._connection.sendall("\r\n".join([*lines, "", ""]).encode() + body[: len(body) // 2])

    def send_rest(self) -> None:
        self._connection.sendall(self._rest)

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers with small names, body; read until the server closes the connection."""
        received = b""
        with self._connection:
            while chunk := self._connection.recv(65536):
                received += chunk
        head, _, body = received.partition(b"\r\n\r\n")
        status, *headers = head.decode().split("\r\n")
        names = dict(line.split(": ", 1) for line in headers)
        assert int(names["content-length"]) == len(body), received
        return int(status.split()[1]), {name.lower(): value for name, value in names.items()}, body

    def assert_told_to_send_it_again(self) -> None:
        status, headers, body = self.answer()
        assert (status, headers["content-type"]) == (503, "application/problem+json"), body
        assert int(headers["retry-after"]) > 0
        assert json.loads(body)["status"] == 503


@pytest.fixture
def api(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KilledApi]:
    """With a default model, and so many seconds to end as the test says. Its log tells of no failure at the end."""
    with killed_api(tmp_path, shutdown_grace_seconds=str(request.param)) as api:
        database = database_of(api)
        api_builders.register_model(SimpleNamespace(database=database, storage=LocalStorage(api.data)))
        database.dispose()
        wait_until(
            lambda: httpx.get(f"{api.url}/readyz").status_code == 200 and predict(api, {}).status_code == 200,
            within_seconds=SOON_SECONDS,
            otherwise="the model was not loaded",
        )
        yield api
    log = api.log.read_text()
    assert '"status": 500' not in log
    assert "Traceback" not in log


def database_of(api: KilledApi) -> Database:
    return Database(api.database_url).within(DEFAULT_WORKSPACE)


def queued_job(api: KilledApi) -> str:
    """There is no worker, so it stays queued."""
    database = database_of(api)
    job_id = queue_builders.submit(database, dataset_id=api_builders.ready_dataset(database))
    database.dispose()
    return job_id


def predict(api: KilledApi, query: dict[str, str], *, count: int = 1) -> httpx.Response:
    files = [("file", (f"{index}.jpg", PICTURE)) for index in range(count)]
    return httpx.post(f"{api.url}/predict", params=query, files=files, timeout=2 * SOON_SECONDS)


@pytest.mark.parametrize("api", [60], indirect=True)
def test_what_is_in_flight_is_answered_and_nobody_new_is_let_in(api: KilledApi) -> None:
    job_id = queued_job(api)
    archive = builders.zip_of(builders.class_folders(4))
    slow = {"adapt": "entropy", "adapt_parameters": "all", "adapt_steps": "50"}
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor())
        http = stack.enter_context(httpx.Client(base_url=api.url, timeout=2 * SOON_SECONDS))
        poll = pool.submit(http.get, f"/v1/jobs/{job_id}", params={"wait": 60})
        stream = stack.enter_context(
            http.stream("GET", f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"})
        )
        lines = stream.iter_lines()
        first = next(lines)
        uploading = HalfSent(api, "PUT /v1/datasets HTTP/1.1", archive)
        sending = HalfSent(api, "POST /predict HTTP/1.1", PICTURE)
        wait_until(
            lambda: any((api.data / "staging").iterdir()), within_seconds=SOON_SECONDS, otherwise="no byte arrived"
        )
        computing = pool.submit(predict, api, slow, count=3)
        precedence = Precedence(api.data / "serving-busy")
        wait_until(precedence.give_way, within_seconds=SOON_SECONDS, otherwise="the pictures did not arrive")
        assert not computing.done()

        api.ask_to_stop()
        waited, events = poll.result(), list(lines)

        assert (waited.status_code, waited.json()["status"]) == (200, "queued")
        assert first.startswith(("retry:", "id:"))
        assert "event: done" not in events, "the client is to come again, and go on behind its last event"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{api.url}/healthz")
        assert not computing.done(), "it was answered before the signal had done anything; ask for more"
        sending.send_rest()
        uploading.send_rest()
        status, _, body = sending.answer()
        assert status == 200, body
        status, _, body = uploading.answer()
        # Reading an archive through takes as long as it takes; nothing of it is kept, and it may be sent again.
        assert (status, json.loads(body)["detail"]) == (503, "The server is shutting down; send the request again.")
        predicted = computing.result()
        assert predicted.status_code == 200, predicted.text
        assert len(predicted.json()["predictions"]) == 3
    assert api.exit_code(within_seconds=SOON_SECONDS) == 0
    assert list((api.data / "staging").iterdir()) == []


@pytest.mark.parametrize("api", [6], indirect=True)
def test_what_does_not_come_in_time_is_told_to_be_sent_again(api: KilledApi) -> None:
    archive = builders.zip_of(builders.class_folders(4))
    made = httpx.post(f"{api.url}/v1/uploads", headers={**TUS, "Upload-Length": str(len(archive))})
    path, upload_id = made.headers["location"], made.json()["id"]
    piece = {**TUS, "Upload-Offset": "0", "Content-Type": "application/offset+octet-stream"}
    sending = [
        HalfSent(api, "PUT /v1/datasets HTTP/1.1", archive, {"Idempotency-Key": "k1"}),
        HalfSent(api, "POST /predict HTTP/1.1", PICTURE),
        HalfSent(api, "POST /v1/jobs HTTP/1.1", b'{"dataset": "ds_1", "method": "auto"}'),
        HalfSent(api, f"PATCH {path} HTTP/1.1", archive, piece),
    ]
    wait_until(
        lambda: (
            any((api.data / "staging").iterdir()) and httpx.patch(f"{api.url}{path}", headers=piece).status_code == 423
        ),
        within_seconds=SOON_SECONDS,
        otherwise="the uploads did not begin",
    )

    asked_at = time.monotonic()
    api.ask_to_stop()
    for request in sending:
        request.assert_told_to_send_it_again()
    assert api.exit_code(within_seconds=SOON_SECONDS) == 0
    assert list((api.data / "staging").iterdir()) == []
    assert time.monotonic() - asked_at < 6

    api.start()
    answer = httpx.get(f"{api.url}{path}").json()
    assert (answer["status"], answer["offset"]) == ("uploading", len(archive) // 2), upload_id
    again = httpx.put(f"{api.url}/v1/datasets", content=archive, headers={"Idempotency-Key": "k1"})
    assert again.status_code == 201, again.text
