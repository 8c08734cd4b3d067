"""What arrives on a connection before it is a request: slow, endless, ambiguous and broken heads, and what follows."""

import io
import json
import re
import socket
import time
from pathlib import Path

import api_builders
import httpx
import pytest
from api_builders import RunningServer

GOOD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
CLOSING = GOOD + b"Connection: close\r\n\r\n"


def problem_in(answer: bytes) -> str:
    kind: str = json.loads(answer.partition(b"\r\n\r\n")[2])["type"]
    return kind


def test_headers_that_trickle_are_ended_with_408(tmp_path: Path) -> None:
    settings = api_builders.settings_for(tmp_path, header_timeout_seconds=0.2)
    with api_builders.running(settings) as server:
        answer = api_builders.raw_exchange(server, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow:")

    assert answer.startswith(b"HTTP/1.1 408 ")


def test_what_is_no_http_is_answered_with_a_problem(server: RunningServer) -> None:
    answer = api_builders.raw_exchange(server, b"\x16\x03\x01 hello\r\n\r\n")

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert problem_in(answer) == "/problems/bad-request"


@pytest.mark.parametrize("endless", [b"X-Long: " + b"x" * 200_000, b"X-Many: x\r\n" * 20_000])
def test_headers_without_an_end_are_refused(server: RunningServer, endless: bytes) -> None:
    answer = api_builders.raw_exchange(server, GOOD + endless)

    assert answer.startswith(b"HTTP/1.1 431 ")
    assert problem_in(answer) == "/problems/headers-too-large"


@pytest.mark.parametrize(("path", "kind"), [("/v2/models/x/infer", str), ("/hf/x", str), ("/v1/jobs?limit=1", dict)])
def test_what_was_refused_is_in_the_log_and_told_as_its_path_has_it(
    server: RunningServer, printed: io.StringIO, path: str, kind: type
) -> None:
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nX-Long: ".encode()
    answer, _, body = api_builders.raw_exchange(server, head + b"x" * 200_000).partition(b"\r\n\r\n")

    problem = json.loads(body)
    assert type(problem["error"]) is kind
    assert (b"X-Error-Message: " in answer) == (kind is str)
    (line,) = [line for line in printed.getvalue().splitlines() if problem["request_id"] in line]
    assert f"path={path.partition('?')[0]}" in line
    assert "status=431" in line


def test_what_is_no_http_behind_a_request_is_not_taken_for_that_ones_path(
    server: RunningServer, printed: io.StringIO
) -> None:
    with socket.create_connection(server.address, timeout=api_builders.DEADLINE_SECONDS) as connection:
        connection.sendall(GOOD + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"\x16\x03 hello\r\n\r\n")
        assert b"HTTP/1.1 400 " in b"".join(iter(lambda: connection.recv(65536), b""))

    (line,) = [line for line in printed.getvalue().splitlines() if "status=400" in line]
    assert "path=/ " in f"{line} "


@pytest.mark.parametrize(
    "head",
    [
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: y\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost : x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Folded: a\r\n b\r\n\r\n",
        "GET /h\u00e9 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(),
    ],
    ids=["no host", "two hosts", "two lengths", "length and chunks", "negative", "space", "folded", "not ascii"],
)
def test_what_two_servers_could_read_differently_is_refused(server: RunningServer, head: bytes) -> None:
    answer = api_builders.raw_exchange(server, head)

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert problem_in(answer) == "/problems/bad-request"


def test_an_old_client_needs_no_host(server: RunningServer) -> None:
    assert api_builders.raw_exchange(server, b"GET /healthz HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def test_requests_sent_in_one_go_are_answered_in_order(server: RunningServer) -> None:
    answer = api_builders.raw_exchange(
        server, GOOD + b"\r\n" + b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n" + CLOSING
    )

    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"404", b"200"]


def test_a_request_is_answered_though_something_broken_follows(server: RunningServer) -> None:
    answer = api_builders.raw_exchange(server, GOOD + b"\r\n" + b"\x16\x03\x01 hello\r\n\r\n")

    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1 ") == 1


def test_a_head_that_trickles_behind_a_request_does_not_cut_its_answer_off(tmp_path: Path) -> None:
    settings = api_builders.settings_for(tmp_path, header_timeout_seconds=0.2)
    with api_builders.running(settings) as server, api_builders.client_of(server) as client:
        job = client.post("/v1/datasets", content=api_builders.archive_of_classes()).json()
        slow = f"GET /v1/datasets/{job['id']}?wait=1 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        answer = api_builders.raw_exchange(server, slow + b"GET /healthz HT")

    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("behind", [b"", b"x" * 200_000])
def test_a_body_that_breaks_is_answered_once(server: RunningServer, behind: bytes) -> None:
    head = b"PUT /v1/datasets HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"

    answer = api_builders.raw_exchange(server, head + b"4\r\nPK..\r\nno number\r\n" + behind)

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1


CHUNKS = b"PUT /v1/datasets HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nPK\r\n0\r\n"


def test_what_stands_behind_a_body_is_no_header(server: RunningServer) -> None:
    trailers = b"X-Request-ID: from-behind\r\nContent-Encoding: gzip\r\n\r\n"

    answer = api_builders.raw_exchange(server, CHUNKS + trailers + CLOSING)

    refused, _, answered = answer.partition(b"HTTP/1.1 200 ")
    assert problem_in(refused) == "/problems/not-an-archive"
    assert b"from-behind" not in refused
    assert answered


@pytest.mark.parametrize("endless", [b"X-Long: " + b"x" * 1_000_000, b"X-Many: x\r\n" * 100_000])
def test_trailers_without_an_end_are_refused(server: RunningServer, endless: bytes) -> None:
    answer = api_builders.raw_exchange(server, CHUNKS + endless)

    assert answer.startswith(b"HTTP/1.1 431 ")
    assert problem_in(answer) == "/problems/headers-too-large"


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ\r\n"


@pytest.mark.parametrize(
    "offer", [OFFER, OFFER + b"Connection: close\r\n", b"Connection: Upgrade\r\nUpgrade: websocket\r\n"]
)
def test_an_offered_upgrade_is_not_taken_and_the_request_is_answered(server: RunningServer, offer: bytes) -> None:
    answer = api_builders.raw_exchange(server, GOOD + offer + b"\r\n" + CLOSING)

    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1 ") == (1 if b"close" in offer else 2)


@pytest.mark.parametrize("pause_seconds", [0, 0.1], ids=["in one piece", "in two"])
@pytest.mark.parametrize("is_chunked", [False, True], ids=["of a length", "in chunks"])
def test_a_request_that_offers_an_upgrade_keeps_its_body(
    server: RunningServer, is_chunked: bool, pause_seconds: float
) -> None:
    within = b"GET /within HTTP/1.1\r\nHost: localhost\r\n\r\n"
    framing = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: %d" % len(within)
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(within), within) if is_chunked else within
    with socket.create_connection(server.address, timeout=api_builders.DEADLINE_SECONDS) as connection:
        connection.sendall(b"PUT /v1/datasets HTTP/1.1\r\nHost: localhost\r\n" + OFFER + framing + b"\r\n\r\n")
        time.sleep(pause_seconds)
        connection.sendall(body + CLOSING)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))

    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"422", b"200"]
    assert b"not-an-archive" in answer


def test_head_is_the_answer_without_its_body(client: httpx.Client) -> None:
    whole, head = client.get("/v1/models"), client.head("/v1/models")

    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == whole.headers["content-length"]
    assert client.head("/v1/models/mdl_none").status_code == 404
