"""Keeps a few programs running: starts them, restarts a crashed one after a pause, stops them all in good order.

Knows processes and signals; not what the programs do. Each program leads its own process group, so that Ctrl-C in a
terminal reaches the supervisor alone, which then stops each program once.
"""

import contextlib
import errno
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Self

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
HEALTHY_AFTER_SECONDS = 60.0  # a run this long wipes out the memory of earlier crashes


def stop_signals() -> list[signal.Signals]:
    """Ctrl-C, SIGTERM and a closed terminal, unless that is to be ignored, as `nohup` has it."""
    closed = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *closed]


class StopRequests:
    """What `stop_signals` says, as something to wait for. Main thread only."""

    def __enter__(self) -> Self:
        # A pipe, because a handler must not take locks; what is written once stays readable, so no request is missed.
        self._readable, self._writable = os.pipe()
        self._before = {number: signal.signal(number, self._remember) for number in stop_signals()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._readable)
        os.close(self._writable)

    def wait(self, seconds: float) -> bool:
        """Sleeps until stopping has been asked for, at most so long. Returns whether it has."""
        return bool(select.select([self._readable], [], [], seconds)[0])

    def _remember(self, number: int, frame: FrameType | None) -> None:
        os.write(self._writable, b".")


@dataclass(frozen=True)
class Program:
    name: str
    command: Sequence[str]


@dataclass
class _Running:
    """A program's present process, and what is remembered of the earlier ones."""

    program: Program
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    crashes: int = 0  # in a row, without a healthy run between
    restart_at: float = 0.0


@dataclass(frozen=True)
class Crash:
    """A program ended by itself. exit_code: negative is the number of the signal that killed it; None if the system did
    not start it."""

    name: str
    exit_code: int | None
    restart_in_seconds: float

    def __str__(self) -> str:
        if self.exit_code is None:
            how = "could not be started"
        else:
            killed = self.exit_code < 0
            how = f"was killed by signal {-self.exit_code}" if killed else f"ended with code {self.exit_code}"
        return f"The {self.name} {how}; it is started again in {self.restart_in_seconds:g} s."


class Supervisor:
    """Runs programs from `with` to the end of its block."""

    def __init__(
        self,
        programs: Sequence[Program],
        *,
        environment: Mapping[str, str],
        stop_within_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """stop_within_seconds: what is still running so long after it was asked to stop is killed."""
        self._running = [_Running(program) for program in programs]
        self._environment = dict(environment)
        self._stop_within_seconds = stop_within_seconds
        self._clock = clock

    def __enter__(self) -> Self:
        try:
            for running in self._running:
                self._start(running)
        except BaseException:
            self.stop()  # those that were started
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def pid(self, name: str) -> int | None:
        """The process id of a program, or None between a crash and its restart."""
        process = next(running.process for running in self._running if running.program.name == name)
        return process.pid if process and process.poll() is None else None

    def look_after(self) -> list[Crash]:
        """Notices what has crashed since the last call, or cannot be started just now, and starts again whatever has
        paused long enough."""
        crashes = []
        for running in self._running:
            if running.process is None:
                if self._clock() >= running.restart_at:
                    try:
                        self._start(running)
                    except OSError:  # no memory for one more process, or too many of them: others run on meanwhile
                        crashes.append(self._schedule_restart(running, None))
            elif (exit_code := running.process.poll()) is not None:
                _kill_group(running.process)  # what a killed program left behind
                crashes.append(self._schedule_restart(running, exit_code))
        return crashes

    def stop(self) -> None:
        """Asks every program to end, waits, kills what is left. Does nothing the second time."""
        living = [running.process for running in self._running if running.process]
        for process in living:
            process.terminate()
        deadline = time.monotonic() + self._stop_within_seconds
        for process in living:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            _kill_group(process)
            process.wait()
        for running in self._running:
            running.process = None
            running.restart_at = float("inf")

    def _start(self, running: _Running) -> None:
        running.started_at = self._clock()
        running.process = subprocess.Popen(
            running.program.command, env=self._environment, stdin=subprocess.DEVNULL, start_new_session=True
        )

    def _schedule_restart(self, running: _Running, exit_code: int | None) -> Crash:
        if self._clock() - running.started_at >= HEALTHY_AFTER_SECONDS:
            running.crashes = 0
        pause_seconds = min(FIRST_PAUSE_SECONDS * 2**running.crashes, LONGEST_PAUSE_SECONDS)
        running.process = None
        running.crashes += 1
        running.restart_at = self._clock() + pause_seconds
        return Crash(running.program.name, exit_code, pause_seconds)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        # Nobody is left. macOS says "not permitted" for a group of zombies.
        return


def free_port(host: str) -> int:
    """A port that nobody listens on at this moment."""
    with _bound(host, 0) as listener:
        port: int = listener.getsockname()[1]
        return port


def is_port_free(host: str, port: int) -> bool:
    """Raises OSError if the address itself cannot be used on this machine."""
    try:
        _bound(host, port).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True


def _bound(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # As servers do it: connections of a server that has just ended do not keep its port.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener
