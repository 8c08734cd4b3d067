"""Memory does not grow with the data set: an epoch over a store that would not fit."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
PICTURES, HEIGHT, WIDTH = 3000, 256, 341
PICTURE_BYTES = HEIGHT * WIDTH * 3
STORE_BYTES = PICTURES * PICTURE_BYTES  # 786 MB
# What the epoch may take beyond what the process has when it begins: a third of the store.
SPARE_BYTES = 256 * 1024**2

# Limits private memory only (RLIMIT_DATA counts no file mapping), shows that the limit bites, and trains on each
# picture of the store once. Prints how many it saw.
EPOCH = """
import resource, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import torch
import training_builders as builders
from app.datasets.packed import PackedPixels
from worker.training.augment import training_transform
from worker.training.loop import fit
from worker.training.optim import Schedule
from worker.training.pixels import PixelSource, Split

folder, spare = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
images = PackedPixels(folder)
labels = np.arange(len(images), dtype=np.int64) % 3
train = Split(images, np.arange(len(images)), labels)
augment = training_transform(
    "classic", image_size=16, crop_scale=(0.5, 1.0), horizontal_flip=True, interpolation="bilinear",
)
plan = replace(
    builders.plan(), train=PixelSource(train, augment, builders.prepare), epochs=1, batch_size=64,
    val=PixelSource(Split(images, np.arange(0, len(images), 10), labels[::10]), None, builders.prepare),
    schedule=Schedule("constant", 1, 47),
)
state = builders.state(builders.network())
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + spare, used + spare))
try:
    np.array(np.memmap(folder / "pixels.bin", dtype=np.uint8, mode="r"))
except MemoryError:
    print("the store does not fit")
(result,) = fit(state, plan)
print(state.total_steps, "steps")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA limits private mappings on Linux only")
def test_an_epoch_over_a_store_three_times_the_free_memory_succeeds(tmp_path: Path) -> None:
    offsets = np.arange(PICTURES, dtype=np.int64) * PICTURE_BYTES
    sizes = np.broadcast_to(np.array([HEIGHT, WIDTH], dtype=np.int64), (PICTURES, 2))
    np.save(tmp_path / "index.npy", np.column_stack([offsets, sizes]))
    with (tmp_path / "pixels.bin").open("wb") as pixels:
        pixels.truncate(STORE_BYTES)  # a file of holes, which read as black and take no room on the disk
    done = subprocess.run(
        [sys.executable, "-c", EPOCH, tmp_path, str(SPARE_BYTES)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    (tmp_path / "pixels.bin").unlink()  # where the folder is in memory, what was read of it is too
    assert (done.returncode, done.stdout.splitlines()) == (0, ["the store does not fit", "47 steps"]), done.stderr
