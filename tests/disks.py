"""A small file system of a test's own, and how it is filled to the last page."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, *, mebibytes: int, files: int = 0) -> Iterator[Path]:
    """files: that it takes, folders included; 0 for any number. The test is skipped where none may be mounted."""
    if shutil.which("mount") is None:
        pytest.skip("needs mount")
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m,nr_inodes={files}", "tmpfs", str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        pytest.skip(f"needs to mount a small file system: {ran.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Takes all that is free, to the last page."""
    filler = folder / "filler"
    with filler.open("ab", buffering=0) as file:
        for size in (64 * 1024, 4096):
            try:
                while file.write(b"\0" * size) == size:
                    pass
            except OSError:
                continue
    assert shutil.disk_usage(folder).free == 0
    return filler


def leave(folder: Path, free_bytes: int) -> Path:
    """Takes all but so many bytes."""
    filler = fill(folder)
    size = filler.stat().st_size - free_bytes
    with filler.open("rb+") as file:
        file.truncate(size)
    return filler
