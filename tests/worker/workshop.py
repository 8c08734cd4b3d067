"""Real worker processes on a real database and storage."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from queue_builders import find, submit

from app.db.engine import Database
from app.jobs.states import JobKind
from app.settings import Settings
from app.storage import LocalStorage

WORKER = Path(__file__).with_name("worker_process.py")
PATIENCE_SECONDS = 30.0

# All that takes seconds in earnest takes tenths of one here.
FAST = {
    "poll_interval_seconds": 0.02,
    "heartbeat_interval_seconds": 0.1,
    "lease_seconds": 2.0,
    "stall_timeout_seconds": 20.0,
    "cancel_grace_seconds": 0.2,
    "shutdown_grace_seconds": 10.0,
    "log_level": "debug",
}


def wait_until(condition: Callable[[], Any], *, within_seconds: float = PATIENCE_SECONDS) -> Any:
    """What the condition returns, once it is true. Fails if it does not become true."""
    deadline = time.monotonic() + within_seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    pytest.fail(f"still not so after {within_seconds} s")


def is_running(pid: int) -> bool:
    return _state(pid) not in ("", "Z")


def is_stopped(pid: int) -> bool:
    return _state(pid) == "T"


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


class Workshop:
    """A database, a storage, and workers that share them."""

    def __init__(self, folder: Path, database: Database) -> None:
        self.database = database
        self.folder = folder
        self.storage = LocalStorage(folder)
        self.workers: list[subprocess.Popen[bytes]] = []

    def settings(self, **changes: Any) -> Settings:
        url = self.database.engine.url.render_as_string(hide_password=False)
        return Settings(data_dir=self.folder, database_url=url, **{**FAST, **changes})

    def start_worker(
        self,
        *,
        program: Path = WORKER,
        child_command: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        **changes: Any,
    ) -> subprocess.Popen[bytes]:
        settings = self.settings(**changes).model_dump(mode="json")
        command = [sys.executable, str(program), json.dumps(settings), *child_command]
        worker = subprocess.Popen(command, env=os.environ | dict(environment or {}))
        self.workers.append(worker)
        return worker

    def submit(self, story: str, *, kind: JobKind = JobKind.training, dataset_id: str = "ds_1") -> str:
        return submit(self.database, kind=kind, dataset_id=dataset_id, story=story)

    def status(self, job_id: str, *, kind: JobKind = JobKind.training) -> str:
        return find(self.database, job_id, kind=kind).status

    def wait_for(self, job_id: str, *statuses: str, kind: JobKind = JobKind.training) -> str:
        return str(wait_until(lambda: self.status(job_id, kind=kind) in statuses and self.status(job_id, kind=kind)))

    def wait_for_file(self, job_id: str, name: str, *, fence: int = 1) -> str:
        """The file's content, once the job's run has written it."""
        path = self.storage.path(f"jobs/{job_id}/{fence}/{name}")
        return str(wait_until(lambda: path.exists() and path.read_text()))

    def wait_for_pid(self, job_id: str, *, fence: int = 1) -> int:
        return int(self.wait_for_file(job_id, "pid", fence=fence))

    def release(self) -> None:
        self.storage.path("release").touch()

    def close(self) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGCONT)
                worker.terminate()
        for worker in self.workers:
            try:
                worker.wait(timeout=PATIENCE_SECONDS)
            finally:
                worker.kill()
