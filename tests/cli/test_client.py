"""The HTTP client against scripted answers."""

from collections.abc import Callable, Iterable
from pathlib import Path

import httpx
import pytest

from app.client import GraftClient, JobEvent, ServerRefused, ServerUnreachable

Answer = Callable[[httpx.Request], httpx.Response]


def client_of(answer: Answer, *, api_key: str | None = None) -> GraftClient:
    return GraftClient("http://graft.test/", api_key=api_key, transport=httpx.MockTransport(answer))


class BrokenStream(httpx.SyncByteStream):
    """A body that ends in the middle."""

    def __init__(self, sent: bytes) -> None:
        self._sent = sent

    def __iter__(self) -> Iterable[bytes]:  # type: ignore[override]
        yield self._sent
        raise httpx.ReadError("cut off")


def events(*texts: str) -> bytes:
    return "".join(f"{text}\n\n" for text in texts).encode()


EPOCH_1 = 'id: 7\nevent: epoch\ndata: {"epoch": 1}'
EPOCH_2 = 'id: 9\nevent: epoch\ndata: {"epoch": 2}'
DONE = "event: done\ndata: {}"
STREAM = {"Content-Type": "text/event-stream"}


def test_an_upload_is_sent_piece_by_piece_with_its_length(tmp_path: Path) -> None:
    archive = tmp_path / "flowers.zip"
    archive.write_bytes(b"x" * (2 * 1024**2 + 5))
    sent: list[int] = []

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url == "http://graft.test/v1/datasets?name=flowers"
        assert request.headers["Content-Length"] == "2097157"
        assert "Transfer-Encoding" not in request.headers
        return httpx.Response(201, json={"id": "ds_1", "received": len(request.read())})

    dataset = client_of(answer).upload_dataset(archive, name="flowers", on_sent=sent.append)

    assert dataset == {"id": "ds_1", "received": 2097157}
    assert sent == [1024**2, 1024**2, 5]


def test_waiting_for_a_data_set_asks_until_it_is_final() -> None:
    statuses = iter(["processing", "processing", "ready"])

    dataset = client_of(lambda request: httpx.Response(200, json={"status": next(statuses)})).wait_for_dataset("ds_1")

    assert dataset == {"status": "ready"}


def test_a_problem_becomes_an_exception_with_its_code_and_detail() -> None:
    problem = {"type": "/problems/not-found", "title": "Not found", "status": 404, "detail": "There is no job job_1."}

    with pytest.raises(ServerRefused, match=r"There is no job job_1\.") as refusal:
        client_of(lambda request: httpx.Response(404, json=problem)).job("job_1")

    assert (refusal.value.status, refusal.value.code) == (404, "not-found")


def test_an_error_page_of_something_else_is_a_refusal_too() -> None:
    with pytest.raises(ServerRefused, match="The server answered 502"):
        client_of(lambda request: httpx.Response(502, text="<html>")).job("job_1")


def test_no_server_is_said_as_such() -> None:
    with pytest.raises(ServerUnreachable, match=r"No Graft server answers at http://127\.0\.0\.1:1 "):
        GraftClient("http://127.0.0.1:1").list("jobs")


def test_the_api_key_is_sent_as_a_bearer_token() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"data": [request.headers["Authorization"]]})

    assert client_of(answer, api_key="ft_1").list("models") == ["Bearer ft_1"]


def test_a_cut_event_stream_goes_on_after_the_last_event_seen() -> None:
    asked_after: list[str | None] = []
    answers = iter(
        [
            httpx.Response(200, headers=STREAM, stream=BrokenStream(events(EPOCH_1) + b'id: 8\nevent: log\ndata: {"m')),
            httpx.Response(200, headers=STREAM, content=events(": still here", EPOCH_2, DONE)),
        ]
    )

    def answer(request: httpx.Request) -> httpx.Response:
        asked_after.append(request.headers.get("Last-Event-ID"))
        return next(answers)

    seen = list(client_of(answer).follow_job("job_1"))

    assert seen == [JobEvent("7", "epoch", {"epoch": 1}), JobEvent("9", "epoch", {"epoch": 2})]
    assert asked_after == [None, "7"]


def test_a_job_that_has_ended_meanwhile_ends_the_following() -> None:
    answers = iter([httpx.Response(200, headers=STREAM, content=events(EPOCH_1)), httpx.Response(204)])

    seen = list(client_of(lambda request: next(answers)).follow_job("job_1"))

    assert [event.id for event in seen] == ["7"]


def test_following_gives_up_when_the_server_stays_away() -> None:
    now = iter([0.0, 1.0, 29.0, 31.0])

    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(ServerUnreachable):
        list(client_of(answer).follow_job("job_1", clock=lambda: next(now)))
    assert list(now) == []


def test_following_an_unknown_job_is_refused_at_once() -> None:
    with pytest.raises(ServerRefused):
        list(client_of(lambda request: httpx.Response(404, json={"title": "Not found"})).follow_job("job_1"))


def test_many_pictures_go_in_requests_of_64_and_come_back_in_order(tmp_path: Path) -> None:
    pictures = [tmp_path / f"{index}.jpg" for index in range(70)]
    for picture in pictures:
        picture.write_bytes(b"jpeg")
    sizes: list[int] = []

    def answer(request: httpx.Request) -> httpx.Response:
        names = [part.split(b'"')[0].decode() for part in request.read().split(b'filename="')[1:]]
        sizes.append(len(names))
        return httpx.Response(200, json={"model": "mdl_1", "predictions": [{"filename": name} for name in names]})

    predicted = client_of(answer).predict(pictures)

    assert sizes == [64, 6]
    assert predicted["model"] == "mdl_1"
    assert [entry["filename"] for entry in predicted["predictions"]] == [picture.name for picture in pictures]
