import os
import subprocess
import sys

import pytest

ASKS_FOR_LARGE_BLOCKS = """
import resource
import torch
from app.allocator import keep_freed_memory

keep_freed_memory()
torch.set_num_threads(1)

def ask(times):
    for _ in range(times):
        torch.ones(4 * 2**20)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    ask(80)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

ask(20)
print(faults())
"""


def faults(**environment: str) -> int:
    """Of blocks of 16 MiB, eighty times: given back each time, they would be 4,096 pages of 4 KiB each time."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", ASKS_FOR_LARGE_BLOCKS]
    return int(subprocess.run(command, env=kept | environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_that_was_freed_is_kept_for_what_is_asked_for_next() -> None:
    assert faults() < 100_000


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_whoever_sets_the_allocator_has_the_last_word() -> None:
    assert faults(MALLOC_MMAP_THRESHOLD_="131072") > 200_000
