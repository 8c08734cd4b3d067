"""The API as a process that a test kills or stops again and again, on one port and folder."""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import httpx
from running import START_WITHIN_SECONDS, wait_until

import app.main
from app.db.migrate import upgrade

# Importing torch takes seconds: it is done once, in a process that all of them are forked from.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["app.main", "killed_api"])


def serve(environment: dict[str, str], log: Path) -> None:
    """Graft's API, in this process."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    for name in [name for name in os.environ if name.startswith("GRAFT_")]:
        del os.environ[name]
    os.environ.update(environment)
    os.chdir(log.parent)
    sys.exit(app.main.main())


class KilledApi:
    """Whatever process it is just now."""

    def __init__(self, folder: Path, **settings: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.address = ("127.0.0.1", port)
        self.url = f"http://127.0.0.1:{port}"
        self.data = folder / "data"
        self.log = folder / "api.log"
        self.database_url = settings.get("database_url", f"sqlite:///{self.data / 'graft.db'}")
        own = {"device": "cpu", "min_free_bytes": "0", "allow_downloads": "false", "port": str(port), **settings}
        self._environment = {f"GRAFT_{name.upper()}": value for name, value in own.items()}
        self._environment |= {"GRAFT_DATA_DIR": str(self.data), "OMP_NUM_THREADS": "1"}
        self.data.mkdir()
        upgrade(self.database_url)
        self._process: BaseProcess | None = None

    def start(self) -> None:
        self._process = _FORKS.Process(target=serve, args=(self._environment, self.log), daemon=True)
        self._process.start()
        wait_until(self._is_up, within_seconds=START_WITHIN_SECONDS, otherwise="the API did not start")

    def ask_to_stop(self) -> None:
        assert self._process is not None
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGTERM)

    def exit_code(self, *, within_seconds: float) -> int | None:
        """None where it has not ended by then."""
        assert self._process is not None
        self._process.join(within_seconds)
        return self._process.exitcode

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.join()
        self._process.close()

    def _is_up(self) -> bool:
        assert self._process is not None
        assert self._process.is_alive(), self.log.read_text()[-2000:]
        try:
            return httpx.get(f"{self.url}/healthz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def killed_api(folder: Path, **settings: str) -> Iterator[KilledApi]:
    """A running one."""
    api = KilledApi(folder, **settings)
    api.start()
    try:
        yield api
    finally:
        api.kill()
