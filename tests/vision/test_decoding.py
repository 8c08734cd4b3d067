"""Decoding in processes: the same pixels as without, and whatever a picture does to its decoder ends there."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import builders
import numpy as np
import psutil
import pytest
from builders import encoded, picture
from PIL import Image

from app.errors import ImageRefused
from app.settings import MEBIBYTE, Settings
from app.vision.decoding import Decoders
from app.vision.images import ImageLimits, decode

LIMITS = ImageLimits.from_settings(Settings(_env_file=None))
DEADLINE_SECONDS = 120.0


@pytest.fixture
def decoders() -> Iterator[Decoders]:
    """Two processes, with little memory and little time."""
    with Decoders(LIMITS, processes=2, memory_bytes=96 * MEBIBYTE, cpu_seconds=1.0) as opened:
        yield opened


def png(seed: int, *, size: tuple[int, int] = (48, 40)) -> bytes:
    """A picture that goes to a process, however small it is."""
    return encoded(picture(seed, size=size))


def processes() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and "app.vision.decoder" in child.cmdline()
    ]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        threading.Event().wait(0.01)


def refusal(decoders: Decoders, content: bytes) -> str:
    with pytest.raises(ImageRefused) as refused:
        decoders.decode(content, side=256)
    return refused.value.detail


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_pixels_are_the_same_as_without_processes(decoders: Decoders, image_format: str) -> None:
    for size in ((48, 40), (700, 500), (1, 1)):
        content = encoded(picture(3, size=size), image_format)
        np.testing.assert_array_equal(decoders.decode(content, side=64), decode(content, side=64, limits=LIMITS))


def test_small_plain_jpeg_needs_no_process(decoders: Decoders) -> None:
    content = encoded(picture(3), "JPEG")
    np.testing.assert_array_equal(decoders.decode(content, side=64), decode(content, side=64, limits=LIMITS))
    assert processes() == []


def test_refusals_are_the_same_as_without_processes(decoders: Decoders) -> None:
    assert refusal(decoders, b"") == "empty file"
    assert refusal(decoders, encoded(picture(), "GIF")) == "not a picture: JPEG, PNG and WebP are read"
    assert refusal(decoders, png(1)[:-300]) == "truncated PNG"
    assert refusal(decoders, bytes(LIMITS.max_bytes + 1)) == f"larger than {LIMITS.max_bytes} bytes"
    assert len(processes()) == 1


def test_extra_formats_are_read_where_they_are_enabled() -> None:
    limits = replace(LIMITS, extra_formats=frozenset({"TIFF", "BMP"}))
    with Decoders(limits, processes=1, memory_bytes=96 * MEBIBYTE, cpu_seconds=5.0) as decoders:
        for image_format in ("TIFF", "BMP"):
            np.testing.assert_array_equal(decoders.decode(encoded(picture(1), image_format), side=64), picture(1))


def test_many_threads_share_few_processes(decoders: Decoders) -> None:
    files = [png(i, size=(300 + i, 200)) for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda content: decoders.decode(content, side=64), files))
    for content, pixels in zip(files, found, strict=True):
        np.testing.assert_array_equal(pixels, decode(content, side=64, limits=LIMITS))
    assert len(processes()) == 2


def test_picture_that_takes_too_much_memory_is_refused_and_the_next_is_read(decoders: Decoders) -> None:
    """36 Mpx with alpha take 144 MB decoded; its file has a seventh of a megabyte."""
    vast = encoded(Image.new("RGBA", (6000, 6000), (255, 0, 0, 128)))
    assert len(vast) < MEBIBYTE
    assert refusal(decoders, vast) == "takes more memory to decode than this server gives a picture"
    assert refusal(decoders, builders.slow_jpeg(scans=20)) == (
        "damaged JPEG, or takes more memory to decode than this server gives a picture"
    )
    assert decoders.decode(png(2), side=64).shape == (40, 48, 3)
    roomy = Decoders(LIMITS, processes=1, memory_bytes=512 * MEBIBYTE, cpu_seconds=20.0)
    with roomy:
        assert roomy.decode(vast, side=256).shape == (256, 256, 3)


def test_picture_that_takes_too_long_ends_its_process_alone() -> None:
    slow = builders.slow_jpeg()
    with (
        Decoders(LIMITS, processes=2, memory_bytes=512 * MEBIBYTE, cpu_seconds=0.5) as decoders,
        ThreadPoolExecutor(1) as pool,
    ):
        refused = pool.submit(refusal, decoders, slow)
        while not refused.done():
            assert decoders.decode(png(3), side=64).shape == (40, 48, 3)
        assert refused.result() == "takes more than 0.5 s to decode"
        assert decoders.decode(png(3), side=64).shape == (40, 48, 3)
        # The one that ended is started anew by whoever needs it.
        assert len(processes()) in (1, 2)


def at_work() -> psutil.Process:
    """The process that has been busy for a while with what it decodes."""
    found: list[psutil.Process] = []

    def is_busy() -> bool:
        found[:] = [each for each in processes() if sum(each.cpu_times()[:2]) > BUSY_SECONDS]
        return bool(found)

    wait_for(is_busy)
    return found[0]


# More than starting takes; the pictures below take seconds more.
BUSY_SECONDS = 1.0
MANY_SCANS = replace(LIMITS, max_jpeg_scans=1000)


@pytest.mark.slow
def test_process_that_is_killed_from_outside_costs_its_picture_nothing() -> None:
    with (
        Decoders(MANY_SCANS, processes=1, memory_bytes=512 * MEBIBYTE, cpu_seconds=60.0) as decoders,
        ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(decoders.decode, builders.slow_jpeg(scans=150), side=64)
        first = at_work()
        first.kill()
        assert answer.result(DEADLINE_SECONDS).shape == (64, 64, 3)
        assert [each.pid for each in processes()] != [first.pid]


def test_picture_that_breaks_its_decoder_is_refused_at_the_first_try() -> None:
    with (
        Decoders(MANY_SCANS, processes=1, memory_bytes=512 * MEBIBYTE, cpu_seconds=60.0) as decoders,
        ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(refusal, decoders, builders.slow_jpeg(scans=300))
        at_work().send_signal(signal.SIGSEGV)  # what a fault in a library does
        assert answer.result(DEADLINE_SECONDS) == "ends the process that decodes it: damaged, or made to do harm"
        assert decoders.decode(png(4), side=64).shape == (40, 48, 3)


def test_process_that_died_while_idle_is_replaced(decoders: Decoders) -> None:
    decoders.decode(png(5), side=64)
    (idle,) = processes()
    idle.kill()
    wait_for(lambda: not processes())
    assert decoders.decode(png(5), side=64).shape == (40, 48, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="limits are read from /proc")
def test_process_can_open_and_write_no_file(decoders: Decoders) -> None:
    decoders.decode(png(6), side=64)
    (process,) = processes()
    assert process.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
    assert process.rlimit(psutil.RLIMIT_CORE) == (0, 0)
    assert process.rlimit(psutil.RLIMIT_NOFILE)[0] <= 1 + max(
        int(name) for name in os.listdir(f"/proc/{process.pid}/fd")
    )
    assert process.rlimit(psutil.RLIMIT_AS)[0] - process.memory_info().vms in range(64 * MEBIBYTE, 97 * MEBIBYTE)
    assert not any(name.startswith("GRAFT_") for name in process.environ())


def test_processes_end_with_who_started_them(tmp_path: Path) -> None:
    script = f"""
import sys, time
from app.settings import Settings
from app.vision.decoding import Decoders
from app.vision.images import ImageLimits
decoders = Decoders(ImageLimits.from_settings(Settings(_env_file=None)), processes=1, memory_bytes=2**28, cpu_seconds=5)
decoders.decode({png(7)!r}, side=64)
print("decoded", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "decoded\n"
        (decoder,) = psutil.Process(program.pid).children()
        program.kill()
    wait_for(lambda: not decoder.is_running() or decoder.status() == psutil.STATUS_ZOMBIE)


def test_closing_ends_every_process(decoders: Decoders) -> None:
    decoders.decode(png(8), side=64)
    assert len(processes()) == 1
    decoders.close()
    wait_for(lambda: not processes())
