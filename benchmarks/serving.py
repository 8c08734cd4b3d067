r"""What /predict costs beside the bare work: throughput, latency and CPU time, against the limit and other servers.

    python benchmarks/serving.py --data hymenoptera.zip --weights FOLDER [--backbone mobilenet_v3_small]
        [--concurrency 1,8,32,128] [--seconds 5] [--rounds 3]

Real servers in processes of their own on loopback, loaded by wrk (Debian package wrk), a JPEG a request, top 5 out; the
servers take turns in each round. The bare limit is this machine doing nothing else: decode and preprocess in one thread
per core, forward in batches of eight on the engine that Graft chose. The naive server is what tutorials show: a `def`
route of FastAPI, PIL, torchvision's transforms, eager torch. Prints medians (smallest to largest) over rounds, and the
CPU time of each server's processes per request.
"""

import argparse
import contextlib
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import torch
from _setup import hardware, markdown, spread

from app import registry
from app.db.engine import Database
from app.db.migrate import upgrade
from app.db.tables import new_id
from app.settings import Settings
from app.storage import LocalStorage
from app.vision import artifact
from app.vision.artifact import Artifact
from app.vision.backbones import BACKBONES
from app.vision.classifier import Classifier
from app.vision.weights import WeightStore

PICTURES = 64
CLASSES = [f"class {i}" for i in range(10)]
HERE = Path(__file__).parent
_WARM_UP_SECONDS = 90.0

LUA = """
local bodies = {}
for i = 1, %d do
  local file = io.open(string.format("%s/%%d.jpg", i - 1), "rb")
  bodies[i] = file:read("*all")
  file:close()
end
local at = 0
request = function()
  at = at %% #bodies + 1
  return wrk.format("POST", "%s", {["Content-Type"] = "image/jpeg"}, bodies[at])
end
done = function(summary, latency, requests)
  io.write(string.format("RESULT %%f %%d %%d %%f %%f %%f\\n", summary.duration / 1e6, summary.requests,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status +
    summary.errors.timeout,
    latency:percentile(50) / 1000, latency:percentile(99) / 1000, latency.max / 1000))
end
"""


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
    name: str
    port: int
    process: subprocess.Popen[bytes]
    path: str = "/predict"

    def cpu_seconds(self) -> float:
        found = psutil.Process(self.process.pid)
        times = [each.cpu_times() for each in (found, *found.children(recursive=True))]
        return sum(each.user + each.system for each in times)


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        _write_pictures(arguments.data, folder / "pictures")
        _prepare(folder / "data", arguments.backbone, arguments.weights)
        servers = [
            stack.enter_context(_served("graft", ["-m", "app.main"], folder)),
            stack.enter_context(_served("naive", [str(HERE / "_naive_server.py")], folder)),
        ]
        for server in servers:
            _warm_up(server, folder)
        print(f"engine: {_engine(folder)}", file=sys.stderr)
        found: dict[tuple[str, int], list[Measured]] = defaultdict(list)
        bare: list[dict[str, float]] = []
        for _ in range(arguments.rounds):
            bare.append(_bare(folder, arguments.seconds))
            for concurrency in arguments.concurrency:
                for server in servers:
                    found[server.name, concurrency].append(
                        _loaded(server, folder, concurrency=concurrency, seconds=arguments.seconds)
                    )
                    print(server.name, concurrency, found[server.name, concurrency][-1], file=sys.stderr, flush=True)
    print(_table(found, bare))
    print(f"\n{arguments.backbone}, {PICTURES} photographs. {hardware(torch.device('cpu'))}.")


def _table(found: dict[tuple[str, int], list[Measured]], bare: list[dict[str, float]]) -> str:
    limit = statistics.median(each["per_second"] for each in bare)
    rows = [
        [
            "bare limit",
            "",
            spread((each["per_second"] for each in bare), 0),
            "1.00",
            spread((each["alone_ms"] for each in bare), 1),
            "",
            spread((each["cpu_ms"] for each in bare), 2),
            "",
        ]
    ]
    for (name, concurrency), rounds in found.items():
        rows.append(
            [
                name,
                str(concurrency),
                spread((each.per_second for each in rounds), 0),
                f"{statistics.median(each.per_second for each in rounds) / limit:.2f}",
                spread((each.p50 for each in rounds), 1),
                spread((each.p99 for each in rounds), 1),
                spread((each.cpu for each in rounds), 2),
                str(sum(each.errors for each in rounds)),
            ]
        )
    header = ["server", "at once", "a second", "of the limit", "p50, ms", "p99, ms", "CPU ms a request", "errors"]
    return markdown(header, rows)


def _write_pictures(archive: Path, folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(archive) as opened:
        names = [name for name in opened.namelist() if name.endswith(".jpg")]
        for i, name in enumerate(names[:: max(1, len(names) // PICTURES)][:PICTURES]):
            (folder / f"{i}.jpg").write_bytes(opened.read(name))


def _prepare(data: Path, backbone: str, weights: Path) -> None:
    """A model with the backbone's weights and a head of chance, registered as a worker does it."""
    settings = Settings(data_dir=data, weights_dir=weights)
    upgrade(settings.resolved_database_url)
    storage, database = LocalStorage(data), Database(settings.resolved_database_url)
    store = WeightStore.from_settings(settings)
    found = store.find(backbone)
    state_dict = None if found is None else store.load(found)
    classifier = Classifier.new(backbone, len(CLASSES), seed=0, state_dict=state_dict).eval()
    model_id = new_id("mdl")
    with storage.staging() as staged:
        saved = artifact.save(staged, Artifact(classifier, CLASSES, BACKBONES[backbone].preprocessing))
        storage.publish(staged, f"models/{model_id}")
    with database.write() as session:
        registry.register(
            session,
            model_id=model_id,
            job_id="job_none",
            dataset_id="ds_none",
            method="feature_extraction",
            backbone={"name": backbone, "weights": None},
            classes=CLASSES,
            metrics={},
            size_bytes=saved.size_bytes,
            sha256=saved.sha256,
        )
        registry.point_alias(session, registry.DEFAULT_ALIAS, model_id)
    database.dispose()


@contextlib.contextmanager
def _served(name: str, command: list[str], folder: Path) -> Iterator[Server]:
    port = _free_port()
    environment = os.environ | {
        "GRAFT_DATA_DIR": str(folder / "data"),
        "GRAFT_PORT": str(port),
        "GRAFT_LOG_LEVEL": "warning",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.DEVNULL)
    try:
        yield Server(name, port, process)
    finally:
        process.terminate()
        process.wait(60)


def _warm_up(server: Server, folder: Path) -> None:
    """Until it answers, and until Graft has chosen its engine."""
    picture = (folder / "pictures" / "0.jpg").read_bytes()
    deadline = time.monotonic() + _WARM_UP_SECONDS
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if client.post(server.path, content=picture).status_code == 200:
                    break
            if time.monotonic() > deadline:
                raise SystemExit(f"{server.name} does not answer")
            time.sleep(0.2)
        for _ in range(120):
            client.post(server.path, content=picture)
        while server.name == "graft" and not _engine(folder) and time.monotonic() < deadline:
            time.sleep(0.5)
        time.sleep(2)


def _engine(folder: Path) -> str:
    reports = list((folder / "data" / "engines").glob("*/engine.json"))
    return reports[0].read_text() if reports else ""


def _loaded(server: Server, folder: Path, *, concurrency: int, seconds: float) -> Measured:
    script = folder / "load.lua"
    script.write_text(LUA % (PICTURES, folder / "pictures", server.path))
    before = server.cpu_seconds()
    command = ["wrk", "-t1", f"-c{concurrency}", f"-d{round(seconds)}s", "--timeout", "30s", "-s", str(script)]
    ran = subprocess.run([*command, f"http://127.0.0.1:{server.port}"], capture_output=True, text=True, check=True)
    result = re.search(r"RESULT (\S+) (\S+) (\S+) (\S+) (\S+) (\S+)", ran.stdout)
    assert result is not None, ran.stdout
    duration, requests, errors, p50, p99 = (float(value) for value in result.groups()[:5])
    cpu = 1000 * (server.cpu_seconds() - before) / max(requests, 1)
    return Measured(requests / duration, p50, p99, cpu, int(errors))


def _bare(folder: Path, seconds: float) -> dict[str, float]:
    command = [sys.executable, str(HERE / "_bare_serving.py"), str(folder), str(seconds)]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(zip(("per_second", "cpu_ms", "alone_ms"), map(float, ran.stdout.split()), strict=True))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What /predict costs beside the bare work.")
    parser.add_argument("--data", type=Path, required=True, help="zip of JPEGs")
    parser.add_argument("--weights", type=Path, required=True, help="folder of weight files")
    parser.add_argument("--backbone", default="mobilenet_v3_small")
    parser.add_argument("--concurrency", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32, 128])
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
