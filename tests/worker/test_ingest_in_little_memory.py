"""A data set whose pixels are more than twice the memory there is, is ingested."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from builders import encoded, written, zip_of
from queue_builders import submit

from app.datasets import catalog
from app.datasets.ingest import archive_key
from app.db.engine import Database
from app.db.tables import DatasetRow
from app.jobs.states import JobKind
from app.storage import LocalStorage

PROGRAM = Path(__file__).with_name("ingest_in_little_memory.py")
PICTURES, HEIGHT, WIDTH = 1500, 256, 341  # 393 MB of pixels
CLASSES = ("cat", "dog", "wasp")
MEBIBYTE = 1024**2
SPARE_BYTES = 160 * MEBIBYTE  # beyond what the process has when it begins


def archive() -> bytes:
    """Pictures of a few coarse squares, each its own: some hundred bytes each, and 262 kB once they are decoded."""
    random = np.random.default_rng(0)
    squares = random.integers(0, 256, (PICTURES, 4, 11, 3), dtype=np.uint8)
    return zip_of(
        {
            f"{CLASSES[i % 3]}/{i}.png": encoded(np.kron(each, np.ones((64, 31, 1), dtype=np.uint8)))
            for i, each in enumerate(squares)
        }
    )


def run(database: Database, storage: LocalStorage) -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM, storage.root, str(database.engine.url), str(SPARE_BYTES), str(PICTURES)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.splitlines()[:1]) == (0, ["the pixels do not fit"]), done.stderr


def dataset(database: Database, id: str) -> DatasetRow:
    with database.read() as session:
        return catalog.find(session, id)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA limits private mappings on Linux only")
def test_a_data_set_larger_than_memory_is_ingested(database: Database, storage: LocalStorage) -> None:
    with database.write() as session:
        row = catalog.create(session, name="x", size_bytes=1, sha256="00", options={"val_fraction": 0.1, "seed": 0})
    written(storage.path(archive_key(row.id)), archive())
    submit(database, kind=JobKind.ingest, dataset_id=row.id)

    run(database, storage)

    ingested = dataset(database, row.id)
    assert (ingested.status, ingested.num_images, ingested.rejected) == ("ready", PICTURES, [])
    assert ingested.packed_bytes > PICTURES * HEIGHT * WIDTH * 3
