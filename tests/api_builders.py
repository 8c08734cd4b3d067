"""A real server in this process, real archives, and a real model that nobody had to train."""

import atexit
import contextlib
import functools
import json
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import builders
import httpx

from app import access, registry
from app.access import Scope
from app.api.server import make_server
from app.api.services import Services
from app.db.engine import Database
from app.db.migrate import upgrade
from app.db.tables import DatasetRow, new_id
from app.db.tenancy import Actor
from app.egress import Resolve
from app.main import create_app
from app.settings import Settings
from app.vision import artifact
from app.vision.artifact import Artifact, Support
from app.vision.classifier import Classifier
from app.vision.preprocessing import Preprocessing
from app.vision.reference import Reference
from app.workspaces import Workspace

CLASSES = ("cat", "dog")
# Small enough for a forward pass of milliseconds.
SMALL = Preprocessing(
    resize=40, crop=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bilinear"
)

# Loopback answers at once; what takes this long hangs.
DEADLINE_SECONDS = 30.0


class RunningServer:
    """The API with its middleware, routes, lifespan and uvicorn, on a free port."""

    def __init__(self, settings: Settings, *, resolve: Resolve | None = None) -> None:
        self.app = create_app(settings, resolve=resolve)
        self._server = make_server(self.app, settings)
        self._thread = threading.Thread(target=self._server.run)

    @property
    def services(self) -> Services:
        """As a request of the first workspace has them."""
        return self.services_of(self.app.state.services.workspace)

    def services_of(self, workspace: Workspace) -> Services:
        services: Services = self.app.state.services
        return services.within(workspace, Actor("a test"))

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._server.servers[0].sockets[0].getsockname()
        return host, port

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.address)

    def __enter__(self) -> "RunningServer":
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the server did not start"
            self._thread.join(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(DEADLINE_SECONDS)
        assert not self._thread.is_alive(), "the server did not stop"


def settings_for(folder: Path, **changes: Any) -> Settings:
    values: dict[str, Any] = {
        "data_dir": folder / "data",
        "port": 0,
        "device": "cpu",
        "min_free_bytes": 0,
        "allow_downloads": False,
        "shutdown_grace_seconds": 5.0,
    }
    return Settings(_env_file=None, **{**values, **changes})


@contextlib.contextmanager
def running(settings: Settings, *, resolve: Resolve | None = None) -> Iterator[RunningServer]:
    """A server on a migrated database."""
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    shutil.copy(_migrated_database(), settings.data_dir / "graft.db")
    with RunningServer(settings, resolve=resolve) as server:
        yield server


@functools.cache
def _migrated_database() -> Path:
    """An empty database by the real migrations, made once: each test gets a copy."""
    path = Path(tempfile.mkdtemp(prefix="graft-tests-")) / "graft.db"
    atexit.register(shutil.rmtree, path.parent)
    upgrade(f"sqlite:///{path}")
    return path


def client_of(server: RunningServer, **options: Any) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=DEADLINE_SECONDS, **options)


def raw_exchange(server: RunningServer, request: bytes) -> bytes:
    """Sends exactly these bytes, and reads until the server closes the connection."""
    with socket.create_connection(server.address, timeout=DEADLINE_SECONDS) as connection:
        connection.sendall(request)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


def assert_is_problem(response: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    problem: dict[str, Any] = response.json()
    assert (response.status_code, problem["type"].rpartition("/")[2]) == (status, slug)
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["status"] == status
    assert problem["request_id"] == response.headers["x-request-id"]
    assert set(problem) >= {"type", "title", "status", "detail", "request_id", "error"}
    return problem


def create_key(server: RunningServer, scope: Scope) -> dict[str, str]:
    """Headers with a fresh key."""
    with server.services.database.write() as session:
        return {"Authorization": f"Bearer {access.create_key(session, scopes=[scope]).token}"}


def archive_of_classes(*, per_class: int = 6) -> bytes:
    return builders.zip_of(builders.class_folders(per_class, classes=CLASSES))


def register_model(
    services: Services,
    *,
    seed: int = 0,
    aliases: tuple[str, ...] = ("default",),
    dataset_id: str = "ds_none",
    evaluation: Mapping[str, Any] | None = None,
    promotion: Mapping[str, Any] | None = None,
    support: Support | None = None,
    method: str = "fine_tuning",
    reference: Reference | None = None,
) -> str:
    """A model with random weights, published and registered as a worker does it. Returns its id."""
    model_id = new_id("mdl")
    with services.storage.staging() as folder:
        saved = artifact.save(
            folder,
            Artifact(
                classifier=Classifier.new("squeezenet1_1", len(CLASSES), seed=seed).eval(),
                classes=list(CLASSES),
                preprocessing=SMALL,
                temperature=1.5,
                support=support,
                reference=reference,
                metadata={"dataset": dataset_id},
            ),
        )
        if evaluation is not None:
            (folder / "evaluation.json").write_text(json.dumps(evaluation))
        services.storage.publish(folder, f"models/{model_id}")
    with services.database.write() as session:
        registry.register(
            session,
            model_id=model_id,
            job_id=new_id("job"),
            dataset_id=dataset_id,
            method=method,
            backbone={"name": "squeezenet1_1", "weights": None},
            classes=CLASSES,
            metrics={"val_accuracy": 0.5},
            size_bytes=saved.size_bytes,
            sha256=saved.sha256,
            promotion=promotion,
        )
        for alias in aliases:
            registry.point_alias(session, alias, model_id)
    return model_id


def ready_dataset(database: Database, *, classes: tuple[str, ...] = CLASSES) -> str:
    """A data set's row as ingest leaves it, without files: enough to submit jobs on."""
    from_counts = [{"name": name, "train": 8, "val": 2, "test": 0} for name in classes]
    return _dataset(database, status="ready", classes=from_counts)


def processing_dataset(database: Database) -> str:
    return _dataset(database, status="processing", classes=[])


def failed_dataset(database: Database) -> str:
    return _dataset(database, status="failed", classes=[])


def _dataset(database: Database, *, status: str, classes: list[dict[str, Any]]) -> str:
    row = DatasetRow(
        id=new_id("ds"),
        name="colours",
        status=status,
        size_bytes=1,
        sha256="0" * 64,
        options={},
        splits={"train": 16, "val": 4, "test": 0},
        classes=classes,
    )
    with database.write() as session:
        session.add(row)
    return row.id


def wait_for(condition: Callable[[], object]) -> None:
    """Returns as soon as the condition holds."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        threading.Event().wait(0.01)
