"""A real child process whose jobs are small stories, chosen by the job's spec: {"story": name, …}.

Run as `python stories.py --kind … --ready-fd …`, as the worker runs `python -m worker.child`.
"""

import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sqlalchemy.orm import Session

from app import registry
from app.db.engine import Database
from app.errors import JobFailed
from app.jobs import queue
from app.jobs.queue import Claim
from app.settings import Settings
from app.storage import LocalStorage
from worker.child import main
from worker.reporter import Reporter


def folder_of(storage: LocalStorage, claim: Claim) -> Path:
    folder = storage.path(f"jobs/{claim.job_id}/{claim.fence}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def succeed(claim: Claim, reporter: Reporter, storage: LocalStorage) -> None:
    folder_of(storage, claim).joinpath("checkpoint").write_text("1")
    reporter.transaction(lambda session: queue.succeed(session, claim, metrics={"attempt": claim.attempt}))


def work_until_released(claim: Claim, reporter: Reporter, storage: LocalStorage) -> None:
    """Takes steps until the file `release` exists, and a checkpoint before the first step of each attempt."""
    folder_of(storage, claim).joinpath("pid").write_text(str(os.getpid()))
    reporter.checkpoint(claim.attempt)
    while not storage.path("release").exists() and not reporter.stop_requested:
        reporter.progress("train", fraction=0.5, epoch=1, epochs=2)
        select.select([], [], [], 0.01)  # libfaketime refuses the call that time.sleep makes
    succeed(claim, reporter, storage)


def be_deaf(claim: Claim, reporter: Reporter, storage: LocalStorage) -> None:
    """Works, and never asks what is wanted of it."""
    folder_of(storage, claim).joinpath("pid").write_text(str(os.getpid()))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(0.01)


def be_deaf_with_a_helper(claim: Claim, reporter: Reporter, storage: LocalStorage) -> None:
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    folder_of(storage, claim).joinpath("helper").write_text(str(helper.pid))
    be_deaf(claim, reporter, storage)


def say_last_words(claim: Claim, reporter: Reporter, storage: LocalStorage) -> None:
    """Ends its job, and has something left to do, for many heartbeats."""
    succeed(claim, reporter, storage)
    time.sleep(1.0)
    storage.path("last words").touch()


def crash_once(claim: Claim, reporter: Reporter, storage: LocalStorage) -> None:
    if claim.attempt == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    succeed(claim, reporter, storage)


def crash_always(claim: Claim, reporter: Reporter, storage: LocalStorage) -> None:
    os._exit(3)


def forget_to_end(claim: Claim, reporter: Reporter, storage: LocalStorage) -> None:
    """Returns, and has told nobody how the job went."""


def raise_expected(claim: Claim, reporter: Reporter, storage: LocalStorage) -> None:
    raise JobFailed("The loss is not a number; use a smaller learning rate.", code="diverged")


def raise_unexpected(claim: Claim, reporter: Reporter, storage: LocalStorage) -> None:
    raise ValueError("/secret/path")


def run_out_of_memory(claim: Claim, reporter: Reporter, storage: LocalStorage) -> None:
    bytearray(1 << 62)


def normalise_a_single_number(claim: Claim, reporter: Reporter, storage: LocalStorage) -> None:
    torch.nn.BatchNorm2d(2)(torch.zeros(1, 2, 1, 1))


STEPS = 8


def count(claim: Claim, reporter: Reporter, storage: LocalStorage) -> None:
    """Takes STEPS steps with a checkpoint after each, and notes what it found and what it was told is stored.

    One run in three is frozen right before it ends, and its worker with it, until somebody thaws them: the moment in
    which a run that has lost its job would still end it, were it not for the fence.
    """
    notes = storage.path(f"notes/{claim.job_id}-{claim.fence}")
    notes.parent.mkdir(exist_ok=True)
    found = [int(path.read_text()) for path in storage.path(f"jobs/{claim.job_id}").glob("*/step")]
    folder = folder_of(storage, claim)
    with notes.open("w", buffering=1) as stored:
        stored.write(f"{max(found, default=0)}\n")
        for step in range(max(found, default=0) + 1, STEPS + 1):
            time.sleep(0.05)
            folder.joinpath("new").write_text(str(step))
            folder.joinpath("new").replace(folder / "step")
            reporter.checkpoint(step)
            stored.write(f"{step}\n")
    if random.Random(f"{claim.job_id}/{claim.fence}").random() < 1 / 3:
        os.kill(os.getppid(), signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)

    def end(session: Session) -> None:
        model_id = f"mdl_{claim.job_id}_{claim.fence}"
        registry.register(
            session,
            model_id=model_id,
            job_id=claim.job_id,
            dataset_id=claim.dataset_id,
            method="fine_tuning",
            backbone={},
            classes=["a", "b"],
            metrics={},
            size_bytes=1,
            sha256="",
        )
        queue.succeed(session, claim, model_id=model_id)

    reporter.transaction(end)


STORIES: dict[str, Callable[[Claim, Reporter, LocalStorage], None]] = {
    story.__name__: story
    for story in (
        succeed,
        work_until_released,
        be_deaf,
        be_deaf_with_a_helper,
        say_last_words,
        crash_once,
        crash_always,
        forget_to_end,
        raise_expected,
        raise_unexpected,
        run_out_of_memory,
        normalise_a_single_number,
        count,
    )
}


def tell(claim: Claim, *, settings: Settings, database: Database, storage: LocalStorage, reporter: Reporter) -> None:
    STORIES[claim.spec["story"]](claim, reporter, storage)


def load_story(_kind: Any) -> Any:
    return tell


if __name__ == "__main__":
    sys.exit(main(load_story))
