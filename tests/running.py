"""Graft as its users run it: `graft up` in a process, on a fresh data folder and a free port."""

import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
from PIL import Image, ImageDraw

START_WITHIN_SECONDS = 90.0  # three processes import torch, on a machine that may be busy
STOP_WITHIN_SECONDS = 45.0


def wait_until(is_true: Callable[[], object], *, within_seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + within_seconds
    while not is_true():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)


class RunningGraft:
    """A started `graft up`; `url` is known once `wait_until_serving` has returned."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.url = ""
        self.lines: list[str] = []  # of standard output
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_until_serving(self) -> None:
        wait_until(
            lambda: self.url or self.process.poll() is not None,
            within_seconds=START_WITHIN_SECONDS,
            otherwise="graft up did not say where it serves",
        )
        assert self.process.poll() is None, "graft up ended"
        wait_until(self.is_ready, within_seconds=START_WITHIN_SECONDS, otherwise="/readyz did not become ready")

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def program(self, *words: str) -> psutil.Process:
        """The one running process whose command has all of these words."""
        found: list[psutil.Process] = []

        def look() -> bool:
            found[:] = [process for process in self.descendants() if set(words) <= set(command_of(process))]
            return len(found) == 1

        wait_until(look, within_seconds=START_WITHIN_SECONDS, otherwise=f"there is no process {words}")
        return found[0]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Asks it to stop. Returns its exit code."""
        self.process.send_signal(number)
        code = self.process.wait(timeout=STOP_WITHIN_SECONDS)
        self._reader.join()
        return code

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("Graft serves at "):
                self.url = line.split()[3]


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def environment_for(data_dir: Path, **settings: str) -> dict[str, str]:
    """The environment without any GRAFT_ variable but these; with little for torch to fight over."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}
    own = {f"GRAFT_{name.upper()}": value for name, value in settings.items()}
    return inherited | {"GRAFT_DATA_DIR": str(data_dir), "OMP_NUM_THREADS": "1"} | own


@contextmanager
def graft_up(folder: Path, *, port: int = 0, under: Sequence[str] = (), **settings: str) -> Iterator[RunningGraft]:
    """Runs `graft up` in `folder`, with its log in graft.log there; what is left at the end is killed.

    under: a command that runs it, and whose only child it is.
    """
    with (folder / "graft.log").open("w") as log:
        process = subprocess.Popen(
            [*under, sys.executable, "-m", "app.cli", "up", "--port", str(port)],
            cwd=folder,
            env=environment_for(folder / "data", **settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    running = RunningGraft(process)
    try:
        running.wait_until_serving()
        yield running
    except BaseException:
        sys.stderr.write((folder / "graft.log").read_text())  # pytest shows it with the failure
        raise
    finally:
        if process.poll() is None:
            left = running.descendants()
            process.kill()
            for descendant in left:
                with suppress(psutil.NoSuchProcess):  # it ends with what started it
                    descendant.kill()
            process.wait()
        running._reader.join()
        assert process.stdout is not None
        process.stdout.close()


def pictures_zip(*, classes: int = 2, per_class: int = 20, side: int = 40, seed: int = 0) -> bytes:
    """A zip of class folders whose classes differ in colour; the pictures of one class differ in what is drawn."""
    chance = random.Random(seed)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for label in range(classes):
            for index in range(per_class):
                archive.writestr(f"colour{label}/{index:03}.png", picture(label, side=side, chance=chance))
    return packed.getvalue()


def picture(label: int, *, side: int = 40, chance: random.Random) -> bytes:
    colours = [(200, 40, 40), (40, 60, 200), (40, 180, 60), (220, 200, 40)]
    image = Image.new("RGB", (side, side), colours[label])
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, size = chance.randrange(side), chance.randrange(side), chance.randrange(2, side // 3)
        shade = chance.randrange(256)
        draw.rectangle((x, y, x + size, y + size), fill=(shade, shade, shade))
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()
