"""What an idle worker costs, and how soon it picks a job up: CPU share of all its processes, latency to the claim.

Usage: python benchmarks/idle_worker.py [--seconds 30] [--jobs 20] [--poll 0.2]
"""

import argparse
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from app.db.engine import Database
from app.db.migrate import upgrade
from app.db.tables import DEFAULT_WORKSPACE
from app.jobs import queue
from app.jobs.states import JobKind
from app.settings import Settings
from worker.child import main as run_child
from worker.main import STARTED_AHEAD

CHILD = "--kind" in sys.argv  # the worker starts this same file for its children


def succeed_at_once(claim, *, settings, database, storage, reporter) -> None:  # type: ignore[no-untyped-def]
    reporter.transaction(lambda session: queue.succeed(session, claim))


def cpu_seconds(process: psutil.Process) -> float:
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def started_after(database: Database, job_id: str) -> float:
    """Seconds from submission to claim, by the clock of this host, which stamped both."""
    while True:
        with database.read() as session:
            job = queue.find(session, job_id)
        if job.started_at is not None:
            return (job.started_at - job.created_at).total_seconds()
        time.sleep(0.005)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--poll", type=float, default=0.2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(data_dir=Path(folder), poll_interval_seconds=arguments.poll)
        upgrade(settings.resolved_database_url)
        database = Database(settings.resolved_database_url).within(DEFAULT_WORKSPACE)
        worker = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys; from app.settings import Settings; from worker.main import run_worker; "
                f"run_worker(Settings(data_dir={folder!r}, poll_interval_seconds={arguments.poll}, log_level='error'),"
                f" child_command=[sys.executable, {os.path.abspath(__file__)!r}])",
            ]
        )
        process = psutil.Process(worker.pid)
        while len(process.children()) < len(STARTED_AHEAD):
            time.sleep(0.1)
        time.sleep(5)
        before, began = cpu_seconds(process), time.monotonic()
        time.sleep(arguments.seconds)
        share = (cpu_seconds(process) - before) / (time.monotonic() - began)

        latencies = []
        for _ in range(arguments.jobs):
            time.sleep(3 + random.random())  # its next child is ready, at no fixed point of the poll
            with database.write() as session:
                job = queue.submit(session, kind=JobKind.training, dataset_id="ds_1", spec={})
            latencies.append(started_after(database, job.id))
        worker.terminate()
        worker.wait()
        database.dispose()
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, SQLite")
    print(f"poll every {arguments.poll} s: idle worker and its two children use {share:.2%} of one core")
    print(
        f"pick-up of {len(latencies)} jobs: median {statistics.median(latencies) * 1000:.0f} ms, "
        f"worst {max(latencies) * 1000:.0f} ms"
    )


if __name__ == "__main__":
    if CHILD:
        sys.exit(run_child(lambda _kind: succeed_at_once))
    main()
