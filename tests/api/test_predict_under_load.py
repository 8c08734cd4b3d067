"""Predictions while clients leave, aliases move, and too much comes at once."""

import base64
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import api_builders
import builders
import httpx
import pytest
from api_builders import RunningServer, assert_is_problem

from app import registry
from app.db.engine import Database
from app.db.tables import DEFAULT_WORKSPACE
from app.serving.engines import TorchEngine

PICTURE = builders.jpeg(1)


@pytest.fixture
def model(server: RunningServer, client: httpx.Client) -> str:
    model = api_builders.register_model(server.services)
    assert client.post("/predict", content=PICTURE).status_code == 200
    return model


@pytest.fixture
def held(model: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """The device takes a picture, sets the first event, and keeps it until the second one is set."""
    taken, released, features = threading.Event(), threading.Event(), TorchEngine.features

    def waiting(network: TorchEngine, pixels: object) -> object:
        taken.set()
        assert released.wait(api_builders.DEADLINE_SECONDS)
        return features(network, pixels)  # type: ignore[arg-type]

    monkeypatch.setattr(TorchEngine, "features", waiting)
    yield taken, released
    released.set()


INFER = json.dumps(
    {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(PICTURE).decode()]}]}
).encode()


@pytest.mark.parametrize(
    ("path", "body"), [("/predict", PICTURE), ("/hf/default", PICTURE), ("/v2/models/default/infer", INFER)]
)
def test_client_that_leaves_takes_its_pictures_along(
    server: RunningServer, client: httpx.Client, held: tuple[threading.Event, threading.Event], path: str, body: bytes
) -> None:
    (taken, released), predictor = held, server.services.predictor
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    connections = []
    for count in (1, 2):
        connections.append(socket.create_connection(server.address))
        connections[-1].sendall(head + body)
        api_builders.wait_for(lambda count=count: taken.is_set() and predictor.pending == count)  # type: ignore[misc]

    for connection in connections:
        connection.close()

    # The device still holds the first one; nobody waits for either any more.
    api_builders.wait_for(lambda: predictor.pending == 0)
    released.set()
    assert client.post("/predict", content=PICTURE).status_code == 200
    batches = client.get("/metrics").text
    assert "graft_prediction_batch_size_count 3.0" in batches  # the fixture's, the held one, the last


def test_what_is_too_much_is_refused_with_the_time_to_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = api_builders.settings_for(tmp_path, max_pending_predictions=2)
    with api_builders.running(settings) as server, api_builders.client_of(server) as client:
        api_builders.register_model(server.services)
        assert client.post("/predict", content=PICTURE).status_code == 200
        released, features = threading.Event(), TorchEngine.features
        monkeypatch.setattr(
            TorchEngine, "features", lambda network, pixels: (released.wait(30), features(network, pixels))[1]
        )
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(httpx.post, f"{server.url}/predict", content=PICTURE, timeout=60) for _ in range(2)]
            api_builders.wait_for(lambda: server.services.predictor.pending == 2)
            refused = client.post("/predict", content=PICTURE)
            assert_is_problem(refused, 503, "overloaded")
            assert refused.headers["retry-after"] == "1"
            released.set()
            assert [answer.result().status_code for answer in waiting] == [200, 200]
        assert client.get("/v1/usage").json()["predictions_today"]["used"] == 3  # not of the one that was refused


def test_no_request_is_lost_while_an_alias_moves(server: RunningServer, client: httpx.Client, model: str) -> None:
    models = [model, api_builders.register_model(server.services, seed=1, aliases=())]
    stop, answers = threading.Event(), []

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as own:
            while not stop.is_set():
                answers.append(own.post("/predict", content=PICTURE))

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        for turn in range(20):
            target = models[turn % 2]
            assert client.put("/v1/aliases/default", json={"model": target}).status_code == 200
            # From here on, every request is answered by the new one.
            assert client.post("/predict", content=PICTURE).json()["model"] == target
        stop.set()
        for each in asking:
            each.result()

    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["model"] for answer in answers} == set(models)


@pytest.mark.parametrize("query", ["", "explain=true", "adapt=entropy"])
def test_request_under_way_ends_on_its_model_though_that_is_deleted(
    server: RunningServer,
    client: httpx.Client,
    model: str,
    held: tuple[threading.Event, threading.Event],
    query: str,
) -> None:
    taken, released = held
    other = api_builders.register_model(server.services, seed=1, aliases=())
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, f"{server.url}/predict?{query}", content=PICTURE, timeout=60)
        assert taken.wait(api_builders.DEADLINE_SECONDS)
        with server.services.database.within(DEFAULT_WORKSPACE).write() as session:
            registry.point_alias(session, "default", other)
        assert client.delete(f"/v1/models/{model}").status_code == 200
        released.set()

        answer = asked.result()

    assert (answer.status_code, answer.json()["model"]) == (200, model)


@pytest.mark.parametrize(("path", "body"), [("/hf/default", PICTURE), ("/v2/models/default/infer", INFER)])
def test_request_whose_body_is_slow_ends_on_its_model_though_that_is_deleted(
    server: RunningServer, client: httpx.Client, model: str, path: str, body: bytes
) -> None:
    predictor = server.services.predictor
    predictor.forget(model)
    other = api_builders.register_model(server.services, seed=1, aliases=())
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    with socket.create_connection(server.address) as connection:
        connection.sendall(head.encode() + body[:100])
        api_builders.wait_for(lambda: predictor.is_loaded(model))
        assert client.put("/v1/aliases/default", json={"model": other}).status_code == 200
        assert client.delete(f"/v1/models/{model}").status_code == 200
        connection.sendall(body[100:])

        answer = b"".join(iter(lambda: connection.recv(65536), b""))

    assert answer.startswith(b"HTTP/1.1 200 "), answer


def test_alias_that_another_process_moved_is_followed_by_the_next_request(
    server: RunningServer, client: httpx.Client, model: str
) -> None:
    other = api_builders.register_model(server.services, seed=1, aliases=())
    elsewhere = Database(str(server.services.database.engine.url))
    for target in (other, model, other):
        with elsewhere.write() as session:
            registry.point_alias(session, registry.DEFAULT_ALIAS, target)
        assert client.post("/predict", content=PICTURE).json()["model"] == target
    elsewhere.dispose()
