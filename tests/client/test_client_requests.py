"""What the client sends, what it makes of answers, and what it sends again; against scripted answers."""

import asyncio
import io
import os
import tracemalloc
import zipfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from graft_client import (
    AsyncGraft,
    Conflict,
    FailedPrediction,
    FieldError,
    Forbidden,
    Graft,
    GraftError,
    InvalidRequest,
    NotFound,
    Prediction,
    ServerRefused,
    ServerUnreachable,
    TooManyRequests,
    Unauthenticated,
    Unavailable,
    UnexpectedAnswer,
    WaitTimedOut,
)
from graft_client.uploads import PIECE_BYTES

Answer = Callable[[httpx.Request], httpx.Response]

DATASET = {
    "id": "ds_1",
    "object": "dataset",
    "name": "flowers",
    "kind": "labelled",
    "status": "ready",
    "created_at": "2026-11-01T10:00:00Z",
    "size_bytes": 1,
    "sha256": "0",
    "num_images": 3,
    "num_rejected": 0,
    "splits": {"train": 2, "val": 1, "test": 0},
}
JOB = {
    "id": "job_1",
    "object": "job",
    "status": "running",
    "dataset": "ds_1",
    "spec": {},
    "attempt": 1,
    "cancel_requested": False,
    "stop_requested": False,
    "created_at": "2026-11-01T10:00:00Z",
}


def client_of(answer: Answer, **options: Any) -> Graft:
    return Graft("http://graft.test/", transport=httpx.MockTransport(answer), **options)


def answering(*answers: httpx.Response | httpx.TransportError) -> tuple[Answer, list[httpx.Request]]:
    """One after the other, and the requests that they were given to."""
    left, requests = iter(answers), []

    def answer(request: httpx.Request) -> httpx.Response:
        request.read()
        requests.append(request)
        found = next(left)
        if isinstance(found, Exception):
            raise found
        return found

    return answer, requests


def problem(status: int, slug: str, detail: str, *, retry_after: int | None = None, **more: Any) -> httpx.Response:
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    document = {"type": f"/problems/{slug}", "title": slug, "status": status, "detail": detail, "request_id": "r1"}
    return httpx.Response(status, headers=headers, json=document | more)


# Uploads


def test_an_archive_is_sent_piece_by_piece_with_its_length_and_name(tmp_path: Path) -> None:
    archive = tmp_path / "flowers.zip"
    archive.write_bytes(b"x" * (2 * PIECE_BYTES + 5))
    told: list[tuple[int, int]] = []
    answer, requests = answering(httpx.Response(201, json=DATASET))

    dataset = client_of(answer).datasets.upload(archive, on_progress=lambda *sent: told.append(sent))

    [request] = requests
    assert request.url == "http://graft.test/v1/datasets?name=flowers"
    assert request.headers["Content-Length"] == str(2 * PIECE_BYTES + 5)
    assert "Transfer-Encoding" not in request.headers
    assert request.content == archive.read_bytes()
    whole = 2 * PIECE_BYTES + 5
    assert told == [(0, whole), (PIECE_BYTES, whole), (2 * PIECE_BYTES, whole), (whole, whole)]
    assert (dataset.id, dataset.splits.train, dataset.raw) == ("ds_1", 2, DATASET)


@pytest.mark.parametrize("opened", [lambda path: path.read_bytes(), lambda path: path.open("rb")])
def test_bytes_and_open_files_are_sent_too(tmp_path: Path, opened: Callable[[Path], Any]) -> None:
    archive = tmp_path / "flowers.zip"
    archive.write_bytes(b"an archive")
    answer, requests = answering(httpx.ReadError("lost"), httpx.Response(201, json=DATASET))
    source = opened(archive)

    client_of(answer).datasets.upload(source, name="mine")

    assert [request.content for request in requests] == [b"an archive"] * 2
    if hasattr(source, "close"):
        source.close()


def test_a_folder_is_sent_as_a_zip_without_its_hidden_files(tmp_path: Path) -> None:
    for name in ("cat/1.jpg", "dog/2.jpg", "dog/empty.jpg", ".cache/3.jpg", "dog/.DS_Store"):
        (tmp_path / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pets" / name).write_bytes(b"" if "empty" in name else name.encode())
    answer, requests = answering(httpx.ReadError("lost"), httpx.Response(201, json=DATASET))

    client_of(answer).datasets.upload(tmp_path / "pets")

    first, second = requests
    assert second.url == "http://graft.test/v1/datasets?name=pets"
    assert first.content == second.content  # or the server would take it for another request with the same key
    with zipfile.ZipFile(io.BytesIO(second.content)) as packed:
        assert packed.testzip() is None
        assert packed.namelist() == ["cat/1.jpg", "dog/2.jpg", "dog/empty.jpg"]
        assert packed.read("dog/2.jpg") == b"dog/2.jpg"


def test_names_that_are_not_utf_8_are_sent_as_text(tmp_path: Path) -> None:
    folder = tmp_path / "Gänse"
    folder.mkdir()
    for name in (b"k\xe4tzchen.jpg", b"k\xf6nig.jpg"):
        (folder / os.fsdecode(name)).write_bytes(b"jpeg")
    answer, requests = answering(httpx.Response(201, json=DATASET))

    client_of(answer).datasets.upload(tmp_path)
    predicted = client_of(predicting).predict(sorted(folder.iterdir())).predictions

    with zipfile.ZipFile(io.BytesIO(requests[0].read())) as archive:
        assert archive.namelist() == ["Gänse/kätzchen.jpg", "Gänse/könig.jpg"]
    assert [found.filename for found in predicted] == ["kätzchen.jpg", "könig.jpg"]


def test_an_empty_folder_and_no_file_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    answer, requests = answering()

    with pytest.raises(ValueError, match="holds no files"):
        client_of(answer).datasets.upload(tmp_path)
    with pytest.raises(FileNotFoundError):
        client_of(answer).datasets.upload(tmp_path / "nowhere.zip")
    assert requests == []


@pytest.fixture
def swallowing_server() -> Iterator[tuple[str, list[int]]]:
    """A server that reads uploads and keeps nothing but their lengths; its URL."""
    received: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            size = 0
            while length := int(self.rfile.readline(), 16):
                size += len(self.rfile.read(length))
                self.rfile.readline()
            self.rfile.readline()
            received.append(size)
            body = httpx.Response(201, json=DATASET).content
            self.send_response(201)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        thread = Thread(target=listener.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{listener.server_port}", received
        listener.shutdown()
        thread.join()


@pytest.mark.parametrize("is_awaited", [False, True])
def test_memory_stays_flat_whatever_the_size_of_a_folder(
    tmp_path: Path, swallowing_server: tuple[str, list[int]], is_awaited: bool
) -> None:
    url, received = swallowing_server
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(64 * 1024**2)

    async def upload() -> None:
        async with AsyncGraft(url) as graft:
            await graft.datasets.upload(tmp_path)

    tracemalloc.start()
    if is_awaited:
        asyncio.run(upload())
    else:
        with Graft(url) as graft:
            graft.datasets.upload(tmp_path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert received[0] > 64 * 1024**2
    assert peak_bytes < 16 * 1024**2


# Problems


def test_a_problem_becomes_an_exception_with_all_that_it_says() -> None:
    wrong = [{"pointer": "#/hyperparameters/epochs", "detail": "must be at least 1"}]
    answer, _ = answering(problem(422, "invalid-hyperparameter", "epochs: must be at least 1", errors=wrong))

    with pytest.raises(InvalidRequest, match="epochs: must be at least 1") as refusal:
        client_of(answer).jobs.create("ds_1", hyperparameters={"epochs": 0})

    error = refusal.value
    assert (error.status, error.code, error.request_id) == (422, "invalid-hyperparameter", "r1")
    assert error.errors == [FieldError("#/hyperparameters/epochs", "must be at least 1")]


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, Unauthenticated), (403, Forbidden), (404, NotFound), (409, Conflict), (429, TooManyRequests)],
)
def test_statuses_have_classes_of_their_own(status: int, kind: type[ServerRefused]) -> None:
    answer, requests = answering(problem(status, "a-slug", "No."))

    with pytest.raises(kind):
        client_of(answer).jobs.get("job_1")
    assert len(requests) == 1


def test_an_error_page_of_something_else_is_a_refusal_too() -> None:
    answer, _ = answering(httpx.Response(502, text="<html>", headers={"X-Request-ID": "r2"}))

    with pytest.raises(ServerRefused, match="The server answered 502") as refusal:
        client_of(answer).jobs.get("job_1")
    assert (refusal.value.code, refusal.value.request_id) == ("", "r2")


def test_a_redirect_names_the_address_to_use() -> None:
    answer, requests = answering(httpx.Response(308, headers={"Location": "https://graft.test/v1/jobs/job_1"}))

    with pytest.raises(ServerRefused, match=r"sends its callers to https://graft\.test/v1/jobs/job_1; name that"):
        client_of(answer, api_key="ft_1").jobs.get("job_1")
    assert len(requests) == 1  # a key goes nowhere that nobody named


def test_large_uploads_may_be_read_through_for_longer_than_other_requests_take() -> None:
    answer, requests = answering(httpx.Response(201, json=DATASET), httpx.Response(200, json=DATASET))

    graft = client_of(answer, timeout_seconds=5.0)
    graft.datasets.upload(b"PK")
    graft.datasets.get("ds_1")

    assert [request.extensions["timeout"]["read"] for request in requests] == [1800.0, 5.0]
    assert [request.extensions["timeout"]["connect"] for request in requests] == [10.0, 5.0]


@pytest.mark.parametrize("page", [httpx.Response(200, text="<html>"), httpx.Response(200, json={"hello": "world"})])
def test_an_answer_of_something_that_is_not_graft_is_said_as_such(page: httpx.Response) -> None:
    answer, _ = answering(page)

    with pytest.raises(UnexpectedAnswer):
        client_of(answer).jobs.get("job_1")


def test_members_that_a_newer_or_older_server_has_or_lacks_do_no_harm() -> None:
    older = {name: value for name, value in DATASET.items() if name != "object"} | {"object": "dataset"}
    answer, _ = answering(httpx.Response(200, json=older | {"invented_later": 7, "status": "pondering"}))

    dataset = client_of(answer).datasets.get("ds_1")

    assert (dataset.raw["invented_later"], dataset.status, dataset.tasks, dataset.parent) == (7, "pondering", [], None)


def test_no_server_is_said_as_such() -> None:
    with pytest.raises(ServerUnreachable, match=r"No Graft server answers at http://127\.0\.0\.1:1 "):
        Graft("http://127.0.0.1:1", max_retries=0).jobs.list()


@pytest.mark.parametrize("url", ["http://", "ftp://127.0.0.1", "http://127.0.0.1:port"])
def test_what_is_no_address_is_said_as_such(url: str) -> None:
    with pytest.raises(ServerUnreachable, match="No Graft server answers at"):
        Graft(url).jobs.list()


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:1", "socks5://127.0.0.1:1"])
def test_a_server_on_this_machine_is_asked_by_no_proxy(
    tmp_path: Path, swallowing_server: tuple[str, list[int]], monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    url, received = swallowing_server
    (tmp_path / "1.jpg").write_bytes(b"1")
    monkeypatch.setenv("ALL_PROXY", proxy)

    async def upload() -> None:
        async with AsyncGraft(url) as graft:
            await graft.datasets.upload(tmp_path)

    with Graft(url) as graft:
        graft.datasets.upload(tmp_path)
    asyncio.run(upload())

    assert len(received) == 2


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "socks://127.0.0.1:1", "http://127.0.0.1:port"])
def test_a_proxy_that_cannot_be_used_is_said_as_such(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)

    with pytest.raises(GraftError, match="proxy"):
        Graft("http://graft.test")


def test_address_and_key_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_URL", "graft.test:8000")
    monkeypatch.setenv("GRAFT_API_KEY", "ft_1")
    answer, requests = answering(httpx.Response(200, json={"data": []}), httpx.Response(200, json={"data": []}))

    Graft(transport=httpx.MockTransport(answer)).models.list()
    Graft("https://other.test", api_key="ft_2", transport=httpx.MockTransport(answer)).models.list()

    assert [(str(each.url), each.headers["Authorization"]) for each in requests] == [
        ("http://graft.test:8000/v1/models", "Bearer ft_1"),
        ("https://other.test/v1/models", "Bearer ft_2"),
    ]


@pytest.mark.parametrize("key", ["ft_1\n", " ft_1\r\n"])
def test_a_key_from_a_file_may_end_with_its_line(key: str) -> None:
    answer, requests = answering(httpx.Response(200, json={"data": []}))

    client_of(answer, api_key=key).models.list()

    assert requests[0].headers["Authorization"] == "Bearer ft_1"


def test_an_empty_key_is_none_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_API_KEY", "ft_1")
    answer, requests = answering(httpx.Response(200, json={"data": []}))

    client_of(answer, api_key="").models.list()

    assert "Authorization" not in requests[0].headers


@pytest.mark.parametrize("key", ["ft_\u2026", "ft_1\nft_2", "ft_\x00"])
def test_a_key_that_no_header_can_hold_is_refused_without_being_repeated(key: str) -> None:
    with pytest.raises(GraftError) as refused:
        client_of(answering()[0], api_key=key)

    assert str(refused.value) == "The API key is none: it holds line breaks or other characters that no key has."


def test_ids_cannot_lead_to_other_paths() -> None:
    answer, requests = answering(httpx.Response(200, json=JOB))

    client_of(answer).jobs.get("../models?x=1#y")

    assert requests[0].url.raw_path == b"/v1/jobs/..%2Fmodels%3Fx%3D1%23y"
    with pytest.raises(ValueError, match="empty"):
        client_of(answer).datasets.delete("")


# What is sent again


def test_a_submission_that_was_lost_is_sent_again_under_the_same_key() -> None:
    answer, requests = answering(httpx.ReadError("lost"), httpx.ConnectError("refused"), httpx.Response(201, json=JOB))

    job = client_of(answer).jobs.create("ds_1")

    keys = [request.headers["Idempotency-Key"] for request in requests]
    assert job.id == "job_1"
    assert (len(keys), len(set(keys))) == (3, 1)


@pytest.mark.parametrize("status", [409, 429, 503])
def test_a_refusal_that_says_when_to_come_back_is_followed(status: int) -> None:
    answer, requests = answering(
        problem(status, "busy", "Come back.", retry_after=0), httpx.Response(200, json={"data": []})
    )

    client_of(answer).jobs.list()

    assert len(requests) == 2


@pytest.mark.parametrize(
    "refusal",
    [
        problem(429, "quota-spent", "No more today."),
        problem(503, "model-unavailable", "Damaged."),
        problem(429, "quota-spent", "Tomorrow.", retry_after=86400),
        problem(507, "storage-full", "Full.", retry_after=0),
    ],
)
def test_other_refusals_are_final(refusal: httpx.Response) -> None:
    answer, requests = answering(refusal)

    with pytest.raises(ServerRefused):
        client_of(answer).jobs.list()
    assert len(requests) == 1


CUT_OFF = problem(503, "cut-off", "It may have been done.")


@pytest.mark.parametrize(
    "ask",
    [
        lambda graft: graft.models.personalise("default", [("cat", b"jpeg")]),
        lambda graft: graft.datasets.make_version("ds_1"),
        lambda graft: graft.predict(b"jpeg", store=True),
    ],
)
def test_what_a_stopping_server_may_have_done_is_not_asked_for_again(ask: Callable[[Graft], Any]) -> None:
    answer, requests = answering(CUT_OFF)

    with pytest.raises(Unavailable):
        ask(client_of(answer))
    assert len(requests) == 1


def test_whoever_waits_is_told_each_second_how_far_it_is() -> None:
    answer, requests = answering(
        httpx.Response(200, json=DATASET | {"status": "processing"}),
        httpx.ConnectError("it is being restarted"),
        httpx.Response(200, json=DATASET),
    )
    seen: list[str] = []

    client_of(answer, max_retries=0).datasets.wait("ds_1", on_look=lambda dataset: seen.append(dataset.status))

    assert seen == ["processing", "ready"]
    assert [request.url.query for request in requests] == [b"wait=1.0"] * 3


@pytest.mark.parametrize("status", [502, 503, 504])
def test_waiting_outlives_what_a_proxy_says_of_a_server_that_is_being_restarted(status: int) -> None:
    page = httpx.Response(status, text="<html>Bad Gateway</html>")
    answer, requests = answering(page, page, httpx.Response(200, json=JOB | {"status": "succeeded"}))

    assert client_of(answer).jobs.wait("job_1").status == "succeeded"
    assert len(requests) == 3


def test_waiting_for_what_is_not_there_ends_at_once() -> None:
    answer, requests = answering(problem(404, "not-found", "There is none."))

    with pytest.raises(NotFound):
        client_of(answer).jobs.wait("job_1")
    assert len(requests) == 1


def test_waiting_ends_when_the_time_is_up() -> None:
    answer, requests = answering(httpx.Response(200, json=JOB))

    with pytest.raises(WaitTimedOut, match=r"job_1 is still running after 0 s\.") as ended:
        client_of(answer).jobs.wait("job_1", timeout=0)
    assert ended.value.last_seen.status == "running"
    assert isinstance(ended.value, TimeoutError)
    assert [request.url.query for request in requests] == [b"wait=0.0"]


def test_waiting_for_a_server_that_is_away_ends_when_the_time_is_up() -> None:
    answer, requests = answering(httpx.ConnectError("refused"))

    with pytest.raises(ServerUnreachable):
        client_of(answer, max_retries=0).jobs.wait("job_1", timeout=0)
    assert len(requests) == 1


def test_waiting_ends_when_the_server_stays_away() -> None:
    answer, requests = answering(httpx.ConnectError("refused"), httpx.ConnectError("refused"))

    with pytest.raises(ServerUnreachable):
        client_of(answer, max_retries=0, patience_seconds=0.1).jobs.wait("job_1")
    assert len(requests) == 2


# Event streams


class BrokenStream(httpx.SyncByteStream):
    """A body that ends in the middle."""

    def __init__(self, sent: bytes) -> None:
        self._sent = sent
        self.is_closed = False

    def __iter__(self) -> Iterable[bytes]:  # type: ignore[override]
        yield self._sent
        raise httpx.ReadError("cut off")

    def close(self) -> None:
        self.is_closed = True


def events(*texts: str) -> bytes:
    return "".join(f"{text}\n\n" for text in texts).encode()


EPOCH_1 = 'id: 7\nevent: epoch\ndata: {"epoch": 1}'
EPOCH_2 = 'id: 9\nevent: epoch\ndata: {"epoch": 2}'
DONE = "event: done\ndata: {}"
STREAM = {"Content-Type": "text/event-stream"}


def test_a_cut_event_stream_goes_on_after_the_last_event_seen() -> None:
    answer, requests = answering(
        httpx.Response(200, headers=STREAM, stream=BrokenStream(events(EPOCH_1) + b'id: 8\nevent: log\ndata: {"m')),
        httpx.ConnectError("refused"),
        httpx.Response(200, headers=STREAM, content=events(": still here", EPOCH_2, DONE)),
    )

    seen = list(client_of(answer, max_retries=0).jobs.follow("job_1"))

    assert [(event.id, event.event, event.data) for event in seen] == [
        ("7", "epoch", {"epoch": 1}),
        ("9", "epoch", {"epoch": 2}),
    ]
    assert [request.headers.get("Last-Event-ID") for request in requests] == [None, "7", "7"]


def test_following_outlives_what_a_proxy_says_of_a_server_that_is_being_restarted() -> None:
    answer, _ = answering(
        httpx.Response(200, headers=STREAM, content=events(EPOCH_1)),
        httpx.Response(502, text="<html>Bad Gateway</html>"),
        httpx.Response(200, headers=STREAM, content=events(EPOCH_2, DONE)),
    )

    assert [event.id for event in client_of(answer).jobs.follow("job_1")] == ["7", "9"]


def test_a_job_that_has_ended_meanwhile_ends_the_following() -> None:
    answer, _ = answering(httpx.Response(200, headers=STREAM, content=events(EPOCH_1)), httpx.Response(204))

    assert [event.id for event in client_of(answer).jobs.follow("job_1")] == ["7"]


def test_following_gives_up_when_the_server_stays_away() -> None:
    answer, requests = answering(
        httpx.Response(200, headers=STREAM, content=events(EPOCH_1)),
        httpx.ConnectError("refused"),
        httpx.ConnectError("refused"),
    )

    with pytest.raises(ServerUnreachable):
        list(client_of(answer, max_retries=0, patience_seconds=0.1).jobs.follow("job_1"))
    assert len(requests) == 3


def test_following_an_unknown_job_is_refused_at_once() -> None:
    answer, _ = answering(problem(404, "not-found", "There is no such job."))

    with pytest.raises(NotFound):
        list(client_of(answer).jobs.follow("job_1"))


def test_following_something_that_sends_no_events_is_said_as_such() -> None:
    answer, _ = answering(httpx.Response(200, text="<html>"))

    with pytest.raises(UnexpectedAnswer):
        list(client_of(answer).jobs.follow("job_1"))


def test_whoever_stops_following_leaves_no_connection_open() -> None:
    body = BrokenStream(events(EPOCH_1, EPOCH_2))
    answer, _ = answering(httpx.Response(200, headers=STREAM, stream=body))

    following = client_of(answer).jobs.follow("job_1")
    next(following)
    assert not body.is_closed
    following.close()  # type: ignore[attr-defined]

    assert body.is_closed


def test_whoever_stops_awaiting_events_leaves_no_connection_open() -> None:
    class Endless(httpx.AsyncByteStream):
        is_closed = False

        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield events(EPOCH_1, EPOCH_2)
            await asyncio.sleep(60)

        async def aclose(self) -> None:
            self.is_closed = True

    body = Endless()
    answer, _ = answering(httpx.Response(200, headers=STREAM, stream=body))

    async def follow_a_little() -> None:
        async with AsyncGraft("http://graft.test", transport=httpx.MockTransport(answer)) as graft:
            following = graft.jobs.follow("job_1")
            await anext(following)
            await following.aclose()  # type: ignore[attr-defined]
            assert body.is_closed

    asyncio.run(follow_a_little())


# Pages and pictures


def test_pages_are_asked_for_as_they_are_wanted() -> None:
    answer, requests = answering(
        httpx.Response(200, json={"data": [JOB, JOB], "has_more": True, "first_id": "a", "last_id": "job_2"}),
        httpx.Response(200, json={"data": [JOB], "has_more": False, "first_id": "a", "last_id": "job_3"}),
    )

    found = client_of(answer).jobs.all(status="running")
    next(found), next(found)
    assert len(requests) == 1
    assert len(list(found)) == 1
    assert requests[1].url.query == b"limit=200&status=running&after=job_2"


def predicting(request: httpx.Request) -> httpx.Response:
    """A server that reads every picture but those of the bytes "broken"."""
    parts = request.read().split(b'filename="')[1:]
    names = [part.split(b'"')[0].decode() for part in parts]
    broken = [b"\r\n\r\nbroken\r\n" in part for part in parts]
    if all(broken):
        return problem(422, "unreadable-image", f"{names[0]} cannot be read.")
    entries = [
        {"filename": name, "error": {"detail": f"{name} cannot be read."}}
        if is_broken
        else {"filename": name, "label": "cat", "score": 1.0, "top": []}
        for name, is_broken in zip(names, broken, strict=True)
    ]
    return httpx.Response(200, json={"model": "mdl_1", "predictions": entries})


def test_many_pictures_go_in_requests_of_64_to_one_model_and_come_back_in_order(tmp_path: Path) -> None:
    pictures = [tmp_path / f"{index}.jpg" for index in range(130)]
    for index, picture in enumerate(pictures):
        picture.write_bytes(b"broken" if index in (3, 128, 129) else b"jpeg")
    asked: list[str | None] = []
    told: list[tuple[int, int]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.params.get("model"))
        return predicting(request)

    predicted = client_of(answer).predict(pictures, on_progress=lambda *done: told.append(done))

    assert predicted.model == "mdl_1"
    assert [found.filename for found in predicted.predictions] == [picture.name for picture in pictures]
    failed = [found for found in predicted.predictions if isinstance(found, FailedPrediction)]
    assert [each.error["detail"] for each in failed] == [f"{n}.jpg cannot be read." for n in (3, 128, 129)]
    # The last two could not be read together, so each was asked of alone, for its reason.
    assert asked == [None, "mdl_1", "mdl_1", "mdl_1", "mdl_1"]
    assert told == [(64, 130), (128, 130), (130, 130)]


def test_a_picture_that_is_too_large_costs_the_others_nothing() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return problem(413, "too-large", "It is too large.") if b"huge" in request.read() else predicting(request)

    pictures = [(f"{index}", b"huge" if index == 64 else b"jpeg") for index in range(66)]
    found = client_of(answer).predict(pictures).predictions

    assert [each.filename for each in found] == [name for name, _ in pictures]
    failed = [each for each in found if isinstance(each, FailedPrediction)]
    assert [(each.filename, each.error["detail"]) for each in failed] == [("64", "It is too large.")]


def test_pictures_of_which_none_can_be_read_are_a_refusal() -> None:
    with pytest.raises(InvalidRequest, match="a cannot be read"):
        client_of(predicting).predict([("a", b"broken"), ("b", b"broken")])


def test_pictures_may_be_paths_bytes_open_files_and_named_bytes(tmp_path: Path) -> None:
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"jpeg")
    graft = client_of(predicting)

    with path.open("rb") as file:
        found = graft.predict([path, str(path), b"jpeg", file, ("dog.jpg", b"jpeg")]).predictions

    assert [each.filename for each in found] == ["cat.jpg", "cat.jpg", "picture", "cat.jpg", "dog.jpg"]
    for one in (path, str(path), b"jpeg", ("dog.jpg", b"jpeg")):
        assert isinstance(graft.predict_one(one), Prediction)
        assert len(graft.predict(one).predictions) == 1
    with pytest.raises(ValueError, match="no pictures"):
        graft.predict([])


def test_a_download_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    answer, _ = answering(httpx.Response(200, stream=BrokenStream(b"half")))

    with pytest.raises(ServerUnreachable):
        client_of(answer).batches.download("batch_1", tmp_path / "told.jsonl")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_linked", [False, True])
def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path, is_linked: bool) -> None:
    pipe = target = tmp_path / "pipe"
    os.mkfifo(pipe)
    if is_linked:  # as /dev/stdout is
        target = tmp_path / "stdout"
        target.symlink_to(pipe)
    answer, _ = answering(httpx.Response(200, content=b"told"))

    with ThreadPoolExecutor() as reader:
        read = reader.submit(pipe.read_bytes)
        client_of(answer).batches.download("batch_1", target)

    assert read.result() == b"told"
    assert pipe.is_fifo() and target.is_symlink() == is_linked


def test_a_link_to_a_file_stays_and_leads_to_the_new_one(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "told.csv").write_bytes(b"old")
    (tmp_path / "near.csv").symlink_to(tmp_path / "far" / "told.csv")
    answer, _ = answering(httpx.Response(200, content=b"new"))

    client_of(answer).batches.download("batch_1", tmp_path / "near.csv")

    assert (tmp_path / "near.csv").is_symlink()
    assert [path.read_bytes() for path in (tmp_path / "far").iterdir()] == [b"new"]
