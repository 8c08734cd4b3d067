"""Pictures that take too much, to every door that decodes: refused with what is wrong, while others are answered."""

import base64
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import api_builders
import builders
import httpx
import psutil
import pytest
from api_builders import RunningServer, assert_is_problem, wait_for
from PIL import Image

from app.settings import MEBIBYTE

# Decoded by a process, too.
GOOD = builders.encoded(builders.picture(1))
SLOW = builders.slow_jpeg()
# 144 MB decoded, and far less than the limits of sides and pixels.
VAST = builders.encoded(Image.new("RGBA", (6000, 6000), (255, 0, 0, 128)))

TOO_SLOW = "takes more than 0.5 s to decode"
TOO_LARGE = "takes more memory to decode than this server gives a picture"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    settings = api_builders.settings_for(
        tmp_path_factory.mktemp("server"),
        decode_memory_bytes=128 * MEBIBYTE,
        decode_cpu_seconds=0.5,
        decode_processes=2,
    )
    with api_builders.running(settings) as server:
        api_builders.register_model(server.services)
        yield server


def predicted(client: httpx.Client, picture: bytes) -> httpx.Response:
    return client.post("/predict", content=picture)


def inferred(client: httpx.Client, picture: bytes) -> httpx.Response:
    text = base64.b64encode(picture).decode()
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1, 1], "data": [text]}
    return client.post("/v2/models/default/infer", json={"inputs": [tensor]})


def classified(client: httpx.Client, picture: bytes) -> httpx.Response:
    return client.post("/hf/default", content=picture)


def explained(client: httpx.Client, picture: bytes) -> httpx.Response:
    return client.post("/predict?explain=true", content=picture)


@pytest.mark.parametrize("ask", [predicted, inferred, classified, explained])
@pytest.mark.parametrize(("picture", "reason"), [(SLOW, TOO_SLOW), (VAST, TOO_LARGE)], ids=["slow", "vast"])
def test_others_are_answered_while_a_hostile_picture_is_refused(
    server: RunningServer, ask: Callable[[httpx.Client, bytes], httpx.Response], picture: bytes, reason: str
) -> None:
    with api_builders.client_of(server) as one, api_builders.client_of(server) as other, ThreadPoolExecutor(1) as pool:
        hostile = pool.submit(ask, one, picture)
        statuses = [predicted(other, GOOD).status_code]
        while not hostile.done():
            statuses.append(predicted(other, GOOD).status_code)

        problem = assert_is_problem(hostile.result(), 422, "unreadable-image")
        assert reason in problem["detail"]
        assert set(statuses) == {200}
        assert ask(other, GOOD).status_code == 200


def test_in_one_request_only_the_hostile_picture_is_refused(server: RunningServer) -> None:
    files = [("file", (name, content)) for name, content in (("a", GOOD), ("slow", SLOW), ("vast", VAST), ("b", GOOD))]
    with api_builders.client_of(server) as client:
        answer = client.post("/predict", files=files)

    first, slow, vast, last = answer.json()["predictions"]
    assert answer.status_code == 200
    assert first["top"] == last["top"]
    assert TOO_SLOW in slow["error"]["detail"]
    assert TOO_LARGE in vast["error"]["detail"]


@pytest.mark.slow
def test_decoders_that_are_killed_at_work_cost_no_request(server: RunningServer) -> None:
    """As a machine without memory kills them."""
    pictures = [builders.encoded(builders.picture(seed, size=(900, 700))) for seed in range(4)]
    pauses = random.Random(3)

    with api_builders.client_of(server) as client, ThreadPoolExecutor(len(pictures)) as pool:

        def answers() -> list[Any]:
            return [pool.submit(predicted, client, picture) for picture in pictures]

        expected = [scores_in(answer.result()) for answer in answers()]
        for _ in range(12):
            asked = answers()
            threading.Event().wait(pauses.uniform(0, 0.05))
            for child in decoders()[:1]:
                child.kill()
            found = [answer.result() for answer in asked]
            assert [answer.status_code for answer in found] == [200] * len(pictures)
            for answer, wanted in zip(found, expected, strict=True):
                # The last digits depend on what was in the batch beside it.
                assert scores_in(answer) == pytest.approx(wanted, abs=1e-5)


def scores_in(answer: httpx.Response) -> dict[str, float]:
    [prediction] = answer.json()["predictions"]
    return {row["label"]: row["score"] for row in prediction["top"]}


def decoders() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and "app.vision.decoder" in child.cmdline()
    ]


@pytest.mark.slow
def test_processes_end_with_the_server(tmp_path_factory: pytest.TempPathFactory) -> None:
    before = set(psutil.Process().children())
    settings = api_builders.settings_for(tmp_path_factory.mktemp("server"), decode_processes=1)
    with api_builders.running(settings) as server, api_builders.client_of(server) as client:
        api_builders.register_model(server.services)
        assert predicted(client, GOOD).status_code == 200
        (decoder,) = set(psutil.Process().children()) - before
    wait_for(lambda: not decoder.is_running() or decoder.status() == psutil.STATUS_ZOMBIE)
