"""The supervisor with real processes; only the clock that times pauses is a fake."""

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from app.supervisor import Crash, Program, StopRequests, Supervisor, free_port, is_port_free

SLEEPER = "import time; time.sleep(600)"
STUBBORN = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).touch()
time.sleep(600)
"""
PARENT = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
ready = pathlib.Path(sys.argv[1])
ready.with_suffix(".new").write_text(str(child.pid))
ready.with_suffix(".new").rename(ready)
time.sleep(600)
"""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def python(name: str, source: str, *arguments: str) -> Program:
    return Program(name, (sys.executable, "-c", source, *arguments))


def supervisor_of(*programs: Program, clock: Callable[[], float] = time.monotonic) -> Supervisor:
    return Supervisor(programs, environment=os.environ, stop_within_seconds=1.0, clock=clock)


def wait_until(is_true: Callable[[], object], *, within_seconds: float = 20.0) -> None:
    deadline = time.monotonic() + within_seconds
    while not is_true():
        assert time.monotonic() < deadline, "the deadline passed"
        time.sleep(0.01)


def next_crash(supervisor: Supervisor) -> Crash:
    crashes: list[Crash] = []
    wait_until(lambda: crashes.extend(supervisor.look_after()) or crashes)
    assert len(crashes) == 1
    return crashes[0]


def test_a_killed_program_is_reported_and_started_again_after_the_pause(clock: Clock) -> None:
    with supervisor_of(python("sleeper", SLEEPER), clock=clock) as supervisor:
        first = supervisor.pid("sleeper")
        assert first is not None
        os.kill(first, signal.SIGKILL)

        crash = next_crash(supervisor)
        assert crash == Crash("sleeper", exit_code=-signal.SIGKILL, restart_in_seconds=0.5)
        clock.now += 0.4
        assert supervisor.look_after() == []
        assert supervisor.pid("sleeper") is None
        clock.now += 0.2
        assert supervisor.look_after() == []

        second = supervisor.pid("sleeper")
        assert second is not None
        assert second != first


def test_pauses_double_up_to_half_a_minute(clock: Clock) -> None:
    pauses = []
    with supervisor_of(python("crasher", "raise SystemExit(3)"), clock=clock) as supervisor:
        for _ in range(9):
            crash = next_crash(supervisor)
            assert crash.exit_code == 3
            pauses.append(crash.restart_in_seconds)
            clock.now += crash.restart_in_seconds

    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_a_healthy_minute_wipes_out_earlier_crashes(clock: Clock) -> None:
    with supervisor_of(python("sleeper", SLEEPER), clock=clock) as supervisor:
        pauses = []
        for healthy_seconds in (1.0, 1.0, 60.0):
            clock.now += healthy_seconds
            pid = supervisor.pid("sleeper")
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            crash = next_crash(supervisor)
            pauses.append(crash.restart_in_seconds)
            clock.now += crash.restart_in_seconds
            supervisor.look_after()

    assert pauses == [0.5, 1.0, 0.5]


@contextmanager
def no_process_can_be_started() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_where_the_system_starts_no_process_others_run_on_and_it_is_tried_again(clock: Clock) -> None:
    programs = python("sleeper", SLEEPER), python("other", SLEEPER)
    with supervisor_of(*programs, clock=clock) as supervisor:
        killed, other = supervisor.pid("sleeper"), supervisor.pid("other")
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        clock.now += next_crash(supervisor).restart_in_seconds

        pauses = []
        for _ in range(8):
            with no_process_can_be_started():
                crashes = supervisor.look_after()
            assert [(crash.name, crash.exit_code) for crash in crashes] == [("sleeper", None)]
            pauses.append(crashes[0].restart_in_seconds)
            clock.now += pauses[-1]
        assert str(crashes[0]) == "The sleeper could not be started; it is started again in 30 s."
        assert supervisor.look_after() == []

        assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]
        assert supervisor.pid("sleeper") not in (None, killed)
        assert supervisor.pid("other") == other


def test_where_one_cannot_be_started_at_first_none_is_left() -> None:
    before = set(psutil.Process().children())
    programs = python("sleeper", SLEEPER), Program("missing", ("/nowhere/to/be/found",))

    with pytest.raises(FileNotFoundError), supervisor_of(*programs):
        pytest.fail("nothing is supervised")

    assert set(psutil.Process().children()) == before


def test_leaving_ends_every_program() -> None:
    with supervisor_of(python("one", SLEEPER), python("two", SLEEPER)) as supervisor:
        pids = [supervisor.pid("one"), supervisor.pid("two")]

    assert [psutil.pid_exists(pid) for pid in pids if pid] == [False, False]


def test_a_program_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    with supervisor_of(python("stubborn", STUBBORN, str(ready))) as supervisor:
        wait_until(ready.exists)
        pid = supervisor.pid("stubborn")
        began = time.monotonic()
    took_seconds = time.monotonic() - began

    assert pid is not None
    assert not psutil.pid_exists(pid)
    assert 1.0 <= took_seconds < 10.0


def test_what_a_killed_program_started_ends_with_it(tmp_path: Path) -> None:
    ready = tmp_path / "child"
    with supervisor_of(python("parent", PARENT, str(ready))) as supervisor:
        wait_until(ready.exists)
        child = int(ready.read_text())
        pid = supervisor.pid("parent")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        next_crash(supervisor)

        wait_until(lambda: not is_running(child))


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


STOPPED = """
import os, signal, sys
from app.supervisor import StopRequests
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be left ignored
with StopRequests() as requests:
    assert not requests.wait(0)
    os.kill(os.getpid(), int(sys.argv[1]))
    assert requests.wait(60)
    assert requests.wait(0)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_request_ends_the_wait_and_is_remembered(number: signal.Signals) -> None:
    # In a process of its own: should the signal not be caught, it is not the tests that end.
    subprocess.run([sys.executable, "-c", STOPPED, str(int(number))], check=True)


OUTLIVED = """
import os, signal
from app.supervisor import StopRequests
with StopRequests() as requests:
    os.kill(os.getpid(), signal.SIGHUP)
    assert not requests.wait(0)
"""


def test_under_nohup_a_closed_terminal_is_no_stop_request() -> None:
    subprocess.run(["nohup", sys.executable, "-c", OUTLIVED], check=True)


def test_signal_handlers_are_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequests():
        assert signal.getsignal(signal.SIGTERM) != before

    assert signal.getsignal(signal.SIGTERM) == before


def test_a_port_that_somebody_listens_on_is_not_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert not is_port_free("127.0.0.1", port)

    assert is_port_free("127.0.0.1", port)
    assert is_port_free("127.0.0.1", free_port("127.0.0.1"))


def test_an_address_of_another_machine_is_an_error() -> None:
    with pytest.raises(OSError, match="assign requested address"):
        is_port_free("192.0.2.1", 8000)
