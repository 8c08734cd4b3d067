"""An owner is gone only if that is certain."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from app.jobs import owner


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def test_this_process_is_not_gone() -> None:
    assert owner.current_process()["pid"] == os.getpid()
    assert not owner.is_gone(owner.current_process())


def test_another_living_process_is_not_gone(process: subprocess.Popen[bytes]) -> None:
    assert not owner.is_gone(owner.owner_of(process.pid))


def test_stopped_process_is_not_gone(process: subprocess.Popen[bytes]) -> None:
    its_owner = owner.owner_of(process.pid)
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    assert not owner.is_gone(its_owner)


def test_ended_process_is_gone(process: subprocess.Popen[bytes]) -> None:
    its_owner = owner.owner_of(process.pid)
    process.kill()
    process.wait()
    assert owner.is_gone(its_owner)


def test_ended_process_that_nobody_waited_for_is_gone(process: subprocess.Popen[bytes]) -> None:
    its_owner = owner.owner_of(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert owner.is_gone(its_owner)


def test_process_that_got_a_dead_ones_pid_is_not_mistaken_for_it() -> None:
    predecessor = {**owner.current_process(), "started": 1}
    assert owner.is_gone(predecessor)


@pytest.mark.parametrize("elsewhere", ["host", "boot_id", "pid_namespace"])
def test_nothing_is_said_about_processes_elsewhere(process: subprocess.Popen[bytes], elsewhere: str) -> None:
    its_owner = {**owner.owner_of(process.pid), elsewhere: "another"}
    process.kill()
    process.wait()
    assert not owner.is_gone(its_owner)


def test_nothing_is_said_about_nobody() -> None:
    assert not owner.is_gone(None)


def test_process_that_does_not_run_has_no_owner(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    with pytest.raises(ProcessLookupError):
        owner.owner_of(process.pid)
