"""Weights are found in order, downloaded whole or not at all, and never used unchecked."""

import hashlib
import io
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision.models
from torch import Tensor

from app.errors import WeightsUnavailable
from app.settings import Settings
from app.vision import backbones
from app.vision.backbones import BACKBONES, WeightsSpec
from app.vision.weights import Found, WeightStore

NAME = "squeezenet1_1"
Handle = Callable[[BaseHTTPRequestHandler], None]


class WeightServer:
    """A real HTTP server on loopback that answers each request as `handle` says, and remembers them."""

    def __init__(self) -> None:
        self.handle: Handle = lambda request: request.send_error(404)
        self.requests: list[str] = []
        self.closing = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.requests.append(f"{self.command} {self.path}")
                owner.handle(self)

            do_HEAD = do_GET

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/models"

    def serve(self, content: bytes, *, sent: int | None = None) -> None:
        """Every file has this content. sent: bytes after which the connection is cut."""

        def handle(request: BaseHTTPRequestHandler) -> None:
            request.send_response(200)
            request.send_header("Content-Length", str(len(content)))
            request.end_headers()
            if request.command == "GET":
                request.wfile.write(content[:sent])

        self.handle = handle

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WeightServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = WeightServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def published() -> bytes:
    """A file as torchvision publishes them."""
    torch.manual_seed(4)
    buffer = io.BytesIO()
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), buffer)
    return buffer.getvalue()


def named_after(content: bytes) -> WeightsSpec:
    """NAME's weights, with a file name whose digest fits this content."""
    digest = hashlib.sha256(content).hexdigest()
    return replace(BACKBONES[NAME].weights[0], file=f"{NAME}-{digest[:8]}.pth")


def closed_port_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


class Folders:
    def __init__(self, root: Path) -> None:
        self.weights, self.cache, self.downloads = (root / name for name in ("weights", "cache", "downloads"))
        for folder in (self.weights, self.cache, self.downloads):
            folder.mkdir()

    def store(self, url: str = "http://127.0.0.1:9", *, allow_downloads: bool = True) -> WeightStore:
        return WeightStore(
            weights_dir=self.weights,
            cache_dir=self.cache,
            download_dir=self.downloads,
            base_url=url,
            allow_downloads=allow_downloads,
        )


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


def offline(folders: Folders) -> WeightStore:
    return folders.store(allow_downloads=False)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_places_are_searched_in_order(folders: Folders) -> None:
    v2, v1 = BACKBONES["resnet50"].weights
    places = [
        (folders.weights / "resnet50.safetensors", v1),
        (folders.weights / v2.file, v2),
        (folders.weights / v1.file, v1),
        (folders.cache / v2.file, v2),
        (folders.cache / v1.file, v1),
        (folders.downloads / v2.file, v2),
    ]
    for path, _ in places:
        path.touch()
    store = offline(folders)

    for path, weights in places:
        assert store.find("resnet50") == Found(weights, path)
        assert store.expected("resnet50") == weights
        path.unlink()

    assert store.find("resnet50") is None
    assert store.expected("resnet50") == v2


def test_settings_say_where_to_look(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / f"{NAME}.safetensors").touch()
    (tmp_path / "data" / "weights").mkdir(parents=True)
    (tmp_path / "data" / "weights" / BACKBONES["vgg16"].weights[0].file).touch()
    settings = Settings(weights_dir=tmp_path / "own", data_dir=tmp_path / "data", allow_downloads=False)

    store = WeightStore.from_settings(settings)

    assert store.availability(NAME) == "local"
    assert store.availability("vgg16") == "local"


def test_a_safetensors_state_dict_is_read(folders: Folders) -> None:
    state_dict = torchvision.models.squeezenet1_1(weights=None).state_dict()
    safetensors.torch.save_file(state_dict, folders.weights / f"{NAME}.safetensors")
    store = offline(folders)

    loaded = store.load(store.obtain(NAME))

    assert same(loaded, state_dict)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_make_a_network_of_single_precision(folders: Folders, dtype: torch.dtype) -> None:
    state_dict = torchvision.models.squeezenet1_1(weights=None).state_dict()
    stored = {name: tensor.to(dtype) for name, tensor in state_dict.items()}
    safetensors.torch.save_file(stored, folders.weights / f"{NAME}.safetensors")
    store = offline(folders)

    backbone = backbones.build(NAME, store.load(store.obtain(NAME)))

    assert backbone(torch.zeros(1, 3, 64, 64)).dtype == torch.float32


@pytest.mark.parametrize("file", [f"{NAME}.safetensors", BACKBONES[NAME].weights[0].file])
def test_a_damaged_local_file_is_named_and_not_used(folders: Folders, file: str) -> None:
    (folders.weights / file).write_bytes(b"\x80\x04 certainly not weights" * 10)
    store = offline(folders)

    with pytest.raises(WeightsUnavailable, match=file) as refusal:
        store.load(store.obtain(NAME))

    assert str(folders.weights) not in refusal.value.detail


def test_densenets_old_names_are_translated(folders: Folders) -> None:
    state_dict = torchvision.models.densenet121(weights=None).state_dict()
    old_names = {}
    for key, tensor in state_dict.items():
        for part in ("norm", "conv"):
            for number in ("1", "2"):
                key = key.replace(f".{part}{number}.", f".{part}.{number}.") if "denselayer" in key else key
        old_names[key] = tensor
    buffer = io.BytesIO()
    torch.save(old_names, buffer)
    content = buffer.getvalue()
    path = folders.cache / f"densenet121-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    path.write_bytes(content)

    loaded = offline(folders).load(Found(BACKBONES["densenet121"].weights[0], path))

    assert old_names.keys() != state_dict.keys()
    assert same(loaded, state_dict)


def test_a_download_is_checked_kept_and_tells_its_progress(
    server: WeightServer, folders: Folders, published: bytes
) -> None:
    server.serve(published)
    weights = named_after(published)
    progress: list[tuple[int, int | None]] = []
    store = folders.store(server.url)

    path = store.fetch(weights, lambda done, total: progress.append((done, total)))

    assert server.requests == [f"GET /models/{weights.file}"]
    assert [p.name for p in folders.downloads.iterdir()] == [weights.file]
    assert path.read_bytes() == published
    assert progress[-1] == (len(published), len(published))
    assert len(progress) == -(-len(published) // 1024**2)
    backbones.build(NAME, store.load(Found(weights, path)))


def test_a_file_with_another_digest_is_refused(server: WeightServer, folders: Folders, published: bytes) -> None:
    server.serve(published[:-1] + b"\xff")

    with pytest.raises(WeightsUnavailable, match="digest is wrong"):
        folders.store(server.url).fetch(named_after(published))

    assert list(folders.downloads.iterdir()) == []


def test_a_cut_connection_leaves_nothing(server: WeightServer, folders: Folders, published: bytes) -> None:
    server.serve(published, sent=len(published) // 2)

    with pytest.raises(WeightsUnavailable, match="connection was cut"):
        folders.store(server.url).fetch(named_after(published))

    assert list(folders.downloads.iterdir()) == []


def test_a_missing_file_is_told_with_the_servers_answer(server: WeightServer, folders: Folders) -> None:
    with pytest.raises(WeightsUnavailable, match="answered 404"):
        folders.store(server.url).obtain(NAME)

    assert list(folders.downloads.iterdir()) == []


def test_without_a_network_the_remedy_is_told(folders: Folders) -> None:
    with pytest.raises(WeightsUnavailable, match=r"cannot be reached.*GRAFT_WEIGHTS_DIR"):
        folders.store(closed_port_url()).obtain(NAME)

    assert list(folders.downloads.iterdir()) == []


def test_with_downloads_switched_off_no_request_is_made(server: WeightServer, folders: Folders) -> None:
    store = folders.store(server.url, allow_downloads=False)

    with pytest.raises(WeightsUnavailable, match="GRAFT_ALLOW_DOWNLOADS"):
        store.obtain(NAME)

    assert store.availability(NAME) is None
    assert store.availabilities() == dict.fromkeys(BACKBONES) | {"graft_small": "bundled"}
    assert server.requests == []


def test_a_cancelled_download_leaves_nothing(server: WeightServer, folders: Folders, published: bytes) -> None:
    class Cancelled(Exception):
        pass

    def cancel(done: int, total: int | None) -> None:
        raise Cancelled

    server.serve(published)

    with pytest.raises(Cancelled):
        folders.store(server.url).fetch(named_after(published), cancel)

    assert list(folders.downloads.iterdir()) == []


def test_availability_asks_for_the_file_once_a_minute(server: WeightServer, folders: Folders) -> None:
    server.serve(b"")
    store = folders.store(server.url)

    answers = [store.availability(NAME) for _ in range(3)]

    assert answers == ["download"] * 3
    assert server.requests == [f"HEAD /models/{BACKBONES[NAME].weights[0].file}"]


def test_the_whole_list_asks_the_server_once(server: WeightServer, folders: Folders) -> None:
    server.serve(b"")
    (folders.weights / f"{NAME}.safetensors").touch()

    available = folders.store(server.url).availabilities()

    assert len(server.requests) == 1
    assert available == dict.fromkeys(BACKBONES, "download") | {NAME: "local", "graft_small": "bundled"}


def test_a_file_that_the_mirror_lacks_is_not_available(server: WeightServer, folders: Folders) -> None:
    assert folders.store(server.url).availability(NAME) is None


def test_without_a_network_nothing_is_available_but_what_is_here(folders: Folders) -> None:
    (folders.weights / f"{NAME}.safetensors").touch()
    store = folders.store(closed_port_url())

    assert store.availability("resnet50") is None
    assert store.availabilities() == dict.fromkeys(BACKBONES) | {NAME: "local", "graft_small": "bundled"}


def test_a_server_that_does_not_answer_in_time_has_nothing(server: WeightServer, folders: Folders) -> None:
    server.handle = lambda request: server.closing.wait()

    assert folders.store(server.url).availability(NAME) is None
