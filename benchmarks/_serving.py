"""Servers under test, as processes of their own on loopback, and pictures and models for them.

Knows how a server is started and asked; not what is measured.
"""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from _setup import Ingested, fitted, ingested, resolved
from _setup import classifier as network

from app import registry
from app.db.engine import Database
from app.db.migrate import upgrade
from app.db.tables import DEFAULT_WORKSPACE, new_id
from app.settings import Settings
from app.storage import LocalStorage
from app.vision import artifact
from app.vision.artifact import Artifact
from app.vision.weights import WeightStore
from worker.training import methods
from worker.training.reference import fit_reference

PICTURES = 64
HERE = Path(__file__).parent
_WARM_UP_SECONDS = 90.0
# Trains for as long as anybody measures, and changes nothing that is served.
LONG_JOB: dict[str, Any] = {
    "method": "full_fine_tuning",
    "recipe": "classic",
    "promote": "never",
    "backbone": "mobilenet_v3_small",
    "hyperparameters": {"epochs": 500},
}

LUA = """
local bodies = {}
for i = 1, %d do
  local file = io.open(string.format("%s/%%d.jpg", i - 1), "rb")
  bodies[i] = "%s" .. file:read("*all") .. "%s"
  file:close()
end
local at = 0
request = function()
  at = at %% #bodies + 1
  return wrk.format("POST", "%s", {["Content-Type"] = "%s"}, bodies[at])
end
done = function(summary, latency, requests)
  io.write(string.format("RESULT %%f %%d %%d %%f %%f %%f\\n", summary.duration / 1e6, summary.requests,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status +
    summary.errors.timeout,
    latency:percentile(50) / 1000, latency:percentile(99) / 1000, latency.max / 1000))
end
"""


_FORM = (
    "multipart/form-data; boundary=edge",
    r"--edge\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.jpg\"\r\nContent-Type: image/jpeg\r\n\r\n",
    r"\r\n--edge--\r\n",
)


@dataclass(frozen=True)
class Measured:
    """per_second: requests; p50, p99: milliseconds; cpu: milliseconds of the server's processes per request."""

    per_second: float
    p50: float
    p99: float
    cpu: float
    errors: int


@dataclass(frozen=True)
class Server:
    """takes_forms: whether a picture has to come in a form, and not as the body."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    path: str = "/predict"
    takes_forms: bool = False

    def cpu_seconds(self) -> float:
        found = psutil.Process(self.process.pid)
        times = [each.cpu_times() for each in (found, *found.children(recursive=True))]
        return sum(each.user + each.system for each in times)


def write_pictures(archive: Path, folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(archive) as opened:
        names = [name for name in opened.namelist() if name.endswith(".jpg")]
        for i, name in enumerate(names[:: max(1, len(names) // PICTURES)][:PICTURES]):
            (folder / f"{i}.jpg").write_bytes(opened.read(name))


def prepare(data: Path, backbone: str, weights: Path, archive: Path) -> str:
    """The default becomes a model with the backbone's weights, or random ones, made and registered as a worker does it.

    archive: a data set that its head is solved for, that its answers are held against, and that engines are compared
    on. Returns its id.
    """
    settings = Settings(data_dir=data, weights_dir=weights)
    upgrade(settings.resolved_database_url)
    storage, database = LocalStorage(data), Database(settings.resolved_database_url).within(DEFAULT_WORKSPACE)
    has_weights = WeightStore.from_settings(settings).find(backbone) is not None
    made = _solved(backbone, ingested(archive, storage), weights if has_weights else None)
    model_id = register(made, storage, database)
    with database.write() as session:
        registry.point_alias(session, registry.DEFAULT_ALIAS, model_id)
    database.dispose()
    return model_id


def _solved(backbone: str, data: Ingested, weights: Path | None) -> Artifact:
    spec = resolved(data, method="feature_extraction", backbone=backbone, weights_dir=weights)
    training = methods.prepare(
        spec,
        classifier=network(spec, len(data.manifest.classes), weights),
        manifest=data.manifest,
        images=data.images(spec),
        device=torch.device("cpu"),
    )
    fitted(training)
    conclusion = methods.conclude(training, data.manifest, is_final=False)
    task = conclusion.tasks[0]
    return Artifact(
        training.classifier.eval(),
        list(task.output.classes),
        training.preprocessing,
        temperature=task.output.temperature,
        reference=fit_reference(training, conclusion, data.manifest),
        metadata={"dataset": data.name},
    )


def register(made: Artifact, storage: LocalStorage, database: Database) -> str:
    """Stores and registers a model as a worker does it, of a job and a data set that never were. Returns its id."""
    model_id = new_id("mdl")
    with storage.staging() as staged:
        saved = artifact.save(staged, made)
        storage.publish(staged, f"models/{model_id}")
    with database.write() as session:
        registry.register(
            session,
            model_id=model_id,
            job_id=new_id("job"),
            dataset_id="ds_none",
            method="feature_extraction",
            backbone={"name": made.classifier.backbone.name, "weights": None},
            classes=made.classes,
            metrics={},
            size_bytes=saved.size_bytes,
            sha256=saved.sha256,
        )
    return model_id


@contextlib.contextmanager
def served(
    name: str,
    command: list[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    *,
    interpreter: str = sys.executable,
    takes_forms: bool = False,
) -> Iterator[Server]:
    port = free_port()
    whole = os.environ | {
        "GRAFT_DATA_DIR": str(folder / "data"),
        "GRAFT_PORT": str(port),
        "GRAFT_LOG_LEVEL": "warning",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.Popen([interpreter, *command], env=whole | dict(environment or {}), stdout=subprocess.DEVNULL)
    try:
        yield Server(name, port, process, takes_forms=takes_forms)
    finally:
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        # Some frameworks leave processes of theirs behind.
        for each in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


def warm_up(server: Server, folder: Path, *, engines: int = 1) -> None:
    """Until it answers, and until Graft has chosen so many engines, of the model that is asked and those before it."""
    picture = (folder / "pictures" / "0.jpg").read_bytes()
    deadline = time.monotonic() + _WARM_UP_SECONDS
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if _asked(client, server, picture).status_code == 200:
                    break
            if time.monotonic() > deadline:
                raise SystemExit(f"{server.name} does not answer")
            time.sleep(0.2)
        for _ in range(120):
            _asked(client, server, picture)
        while server.name == "graft" and len(_reports(folder)) < engines and time.monotonic() < deadline:
            time.sleep(0.5)
        time.sleep(2)


def _asked(client: httpx.Client, server: Server, picture: bytes) -> httpx.Response:
    if server.takes_forms:
        return client.post(server.path, files={"file": ("a.jpg", picture, "image/jpeg")})
    return client.post(server.path, content=picture)


def engine(folder: Path) -> str:
    reports = _reports(folder)
    return reports[0].read_text() if reports else ""


def _reports(folder: Path) -> list[Path]:
    return list((folder / "data" / "engines").glob("*/engine.json"))


def loaded(server: Server, folder: Path, *, concurrency: int, seconds: float) -> Measured:
    script = folder / "load.lua"
    kind, before_picture, behind_picture = _FORM if server.takes_forms else ("image/jpeg", "", "")
    script.write_text(LUA % (PICTURES, folder / "pictures", before_picture, behind_picture, server.path, kind))
    before = server.cpu_seconds()
    command = ["wrk", "-t1", f"-c{concurrency}", f"-d{round(seconds)}s", "--timeout", "30s", "-s", str(script)]
    ran = subprocess.run([*command, f"http://127.0.0.1:{server.port}"], capture_output=True, text=True, check=True)
    result = re.search(r"RESULT (\S+) (\S+) (\S+) (\S+) (\S+) (\S+)", ran.stdout)
    assert result is not None, ran.stdout
    duration, requests, errors, p50, p99 = (float(value) for value in result.groups()[:5])
    cpu = 1000 * (server.cpu_seconds() - before) / max(requests, 1)
    return Measured(requests / duration, p50, p99, cpu, int(errors))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
