"""Who waits for an answer goes first: what a server says, and what a job beside it does."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from running import wait_until

from app.precedence import MOST_SECONDS, Precedence


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "serving-busy"


def worked(job: Precedence, seconds: float = 0.05) -> Precedence:
    """After a step that took so long."""
    job.give_way()
    time.sleep(seconds)
    return job


def test_nobody_waits_where_no_server_was_ever_started(path: Path) -> None:
    assert worked(Precedence(path)).give_way() == 0.0


def test_job_waits_while_pictures_do_and_goes_on_when_they_are_answered(path: Path) -> None:
    job, server = Precedence(path), Precedence(path)

    server.claim()
    assert worked(job).give_way() > 0.0
    server.claim()
    server.release()
    assert worked(job).give_way() == 0.0


def test_job_goes_on_the_moment_the_last_picture_is_answered(path: Path) -> None:
    job, server = worked(Precedence(path), 0.2), Precedence(path)
    server.claim()
    answered = threading.Timer(0.02, server.release)
    answered.start()

    waited = job.give_way()

    answered.join()
    assert 0.0 < waited < 0.1  # the lease alone would be as long


def test_under_load_without_pause_the_job_still_gets_its_turns(path: Path) -> None:
    job, server = worked(Precedence(path)), Precedence(path)
    is_over = threading.Event()

    def ask_always() -> None:
        while not is_over.is_set():
            server.claim()

    load = threading.Thread(target=ask_always)
    server.claim()
    load.start()
    waited = job.give_way()
    again = job.give_way()  # at once: no work was done since
    is_over.set()
    load.join()

    assert waited > 0.0
    assert again < waited
    assert MOST_SECONDS < 1.0


def test_server_that_was_killed_is_busy_no_longer_than_a_moment(path: Path) -> None:
    program = "import sys, time; from app.precedence import Precedence; from pathlib import Path\n"
    program += "server = Precedence(Path(sys.argv[1]))\nwhile True: server.claim(); time.sleep(0.005)"
    job = worked(Precedence(path))
    with subprocess.Popen([sys.executable, "-c", program, str(path)]) as server:
        wait_until(lambda: worked(job).give_way() > 0.0, within_seconds=60, otherwise="the server was never busy")
        os.kill(server.pid, signal.SIGKILL)

    wait_until(lambda: worked(job).give_way() == 0.0, within_seconds=10, otherwise="a dead server is waited for")


def test_another_machine_with_the_same_folder_is_none_of_the_jobs_business(path: Path) -> None:
    job, server = Precedence(path), Precedence(path)
    server._machine = bytes(16)
    server.claim()

    assert worked(job).give_way() == 0.0


def test_without_the_file_nobody_waits_and_nothing_fails(path: Path) -> None:
    path.parent.write_bytes(b"a file where the folder should be")

    job, server = Precedence(path), Precedence(path)
    server.claim()

    assert worked(job).give_way() == 0.0
