"""The client at a real server, over a line that breaks, and at one that is being stopped."""

import asyncio
import random
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import api_builders
import httpx
import pytest
from api_builders import RunningServer
from killed_api import KilledApi
from running import picture, wait_until

from app import registry
from app.db.engine import Database
from app.db.tables import DEFAULT_WORKSPACE
from app.storage import LocalStorage
from graft_client import AsyncGraft, Dataset, Graft, Unavailable, WaitTimedOut

PIECE_BYTES = 4096


@contextmanager
def line_to(server: RunningServer, *, breaks: list[tuple[str, int]]) -> Iterator[str]:
    """A TCP line to the server; its URL. breaks: for each connection after so many bytes of its request or answer."""
    left = iter(breaks)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections: list[threading.Thread] = []

        def accept() -> None:
            while True:
                try:
                    near, _ = listener.accept()
                except OSError:
                    return
                far = socket.create_connection(server.address)
                connections.append(threading.Thread(target=connect, args=(near, far, *next(left, ("", 0)))))
                connections[-1].start()

        accepting = threading.Thread(target=accept)
        accepting.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join()
    for connection in connections:
        connection.join()


def connect(near: socket.socket, far: socket.socket, end: str, most: int) -> None:
    with near, far:
        back = threading.Thread(target=carry, args=(far, near, most if end == "answer" else None))
        back.start()
        carry(near, far, most if end == "request" else None)
        back.join()


def carry(here: socket.socket, there: socket.socket, most: int | None) -> None:
    """Carries bytes one way until the end, or breaks the line after so many of them."""
    carried = 0
    try:
        while piece := here.recv(PIECE_BYTES):
            if most is not None and carried + len(piece) > most:
                break
            there.sendall(piece)
            carried += len(piece)
    except OSError:
        pass
    for end in (here, there):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    folder = tmp_path / "flowers"
    for label, name in enumerate(api_builders.CLASSES):
        (folder / name).mkdir(parents=True)
        for index in range(40):
            (folder / name / f"{index}.png").write_bytes(picture(label, side=200, chance=random.Random(index)))
    return folder


def upload_blocking(url: str, source: Path) -> Dataset:
    with Graft(url) as graft:
        return graft.datasets.upload(source)


def upload_awaited(url: str, source: Path) -> Dataset:
    async def upload() -> Dataset:
        async with AsyncGraft(url) as graft:
            return await graft.datasets.upload(source)

    return asyncio.run(upload())


@pytest.mark.parametrize("upload", [upload_blocking, upload_awaited])
@pytest.mark.parametrize("breaks", [[("request", 30_000)], [("answer", 0)], [("request", 0), ("answer", 50)]])
def test_an_upload_over_a_line_that_breaks_makes_one_data_set(
    server: RunningServer,
    client: httpx.Client,
    flowers: Path,
    upload: Callable[[str, Path], Dataset],
    breaks: list[tuple[str, int]],
) -> None:
    with line_to(server, breaks=breaks) as url:
        dataset = upload(url, flowers)

    assert [each["id"] for each in client.get("/v1/datasets").json()["data"]] == [dataset.id]
    assert dataset.name == "flowers"


def test_a_submission_whose_answer_is_lost_makes_one_job(server: RunningServer, client: httpx.Client) -> None:
    dataset_id = api_builders.ready_dataset(server.services.database)
    with line_to(server, breaks=[("answer", 0)]) as url, Graft(url) as graft:
        job = graft.jobs.create(dataset_id, backbone="graft_small")

    assert [each["id"] for each in client.get("/v1/jobs").json()["data"]] == [job.id]


@pytest.mark.slow
def test_a_client_of_little_patience_waits_for_as_long_as_it_asks_the_server_to(server: RunningServer) -> None:
    dataset_id = api_builders.ready_dataset(server.services.database)
    with Graft(server.url, timeout_seconds=2.0, patience_seconds=0.0) as graft:
        job = graft.jobs.create(dataset_id, backbone="graft_small")

        with pytest.raises(WaitTimedOut):
            graft.jobs.wait(job.id, timeout=3.0)
        assert graft.jobs.get(job.id, wait=3.0).status == "queued"


@pytest.mark.slow
def test_what_a_server_goes_on_with_while_it_is_stopped_is_not_done_twice(tmp_path: Path) -> None:
    api = KilledApi(tmp_path, shutdown_grace_seconds="6")
    database = Database(api.database_url).within(DEFAULT_WORKSPACE)
    services = SimpleNamespace(database=database, storage=LocalStorage(api.data))
    before, _ = (api_builders.register_model(services, seed=seed) for seed in range(2))

    def loads(count: int) -> Callable[[], bool]:
        loaded = f'graft_model_loads_total{{outcome="loaded"}} {count}.0'
        return lambda: loaded in httpx.get(f"{api.url}/metrics").text

    with ExitStack() as stack:
        stack.callback(api.kill)
        api.start()
        graft = stack.enter_context(Graft(api.url, max_retries=20))
        pool = stack.enter_context(ThreadPoolExecutor())
        wait_until(loads(1), within_seconds=30, otherwise="the default model was not loaded")
        with database.write() as session:
            session.connection()  # takes the lock, for which the request has to wait once its model is loaded
            asked = pool.submit(graft.aliases.roll_back, "default")
            wait_until(loads(2), within_seconds=30, otherwise="the request did not arrive")
            api.ask_to_stop()
            wait_until(lambda: '"status": 503' in api.log.read_text(), within_seconds=30, otherwise="it was waited for")
        assert api.exit_code(within_seconds=30) == 0
        api.start()

        with pytest.raises(Unavailable, match="may have been done all the same") as refused:
            asked.result()
        assert (refused.value.code, refused.value.retry_after_seconds) == ("cut-off", None)
    with database.read() as session:
        assert registry.default_model_id(session) == before
    database.dispose()
