"""Runs one ingest as a worker's child does, with a limit on the memory that it may take beyond what it begins with.

Arguments: the data folder, the database's URL, the limit in bytes, and how many pictures there are. Only private memory
is limited (RLIMIT_DATA counts no file mapping). Says whether the pixels of the data set would have fitted.
"""

import resource
import sys
from pathlib import Path

import numpy as np
import torch
from queue_builders import claim_next

from app.db.engine import Database
from app.db.tables import DEFAULT_WORKSPACE
from app.jobs.states import JobKind
from app.settings import Settings
from app.storage import LocalStorage
from worker.reporter import Reporter
from worker.run_ingest import run_ingest
from worker.wakeup import Wakeup

# Every picture of 256 x 341 pixels.
PICTURE_BYTES = 256 * 341 * 3


def limit_memory(spare_bytes: int) -> None:
    with open("/proc/self/status", encoding="utf-8") as status:
        used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + spare_bytes, used + spare_bytes))


def main() -> None:
    folder, url, spare_bytes, pictures = sys.argv[1:]
    torch.set_num_threads(1)
    settings = Settings(_env_file=None, data_dir=Path(folder), database_url=url, device="cpu", allow_downloads=False)
    database = Database(url).within(DEFAULT_WORKSPACE)
    claim = claim_next(database, kind=JobKind.ingest)
    assert claim is not None
    limit_memory(int(spare_bytes))
    try:
        np.ones(int(pictures) * PICTURE_BYTES, dtype=np.uint8)
    except MemoryError:
        sys.stdout.write("the pixels do not fit\n")
    reporter = Reporter(database, claim, shutdown=Wakeup())
    run_ingest(claim, settings=settings, database=database, storage=LocalStorage(settings.data_dir), reporter=reporter)


if __name__ == "__main__":
    main()
