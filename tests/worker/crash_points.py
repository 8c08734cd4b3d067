"""A real worker and its real children, which die or freeze the first time that a job comes to a named point.

Run as `python crash_points.py SETTINGS COMMAND…`, as worker_process.py is, its children's command being this program
again with the folder of the traps. A trap is a file named by the job's data set, with a point and a victim; once it has
sprung it has another name, so the next run passes. Real functions are wrapped here; the product knows nothing of it.
"""

import importlib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from app.datasets import catalog
from app.datasets.packed import PackedWriter
from app.jobs import queue
from app.jobs.queue import Claim
from app.jobs.states import JobKind
from app.settings import Settings
from app.storage import LocalStorage
from worker import child
from worker import main as workers
from worker.reporter import Reporter

# In order. Of calls that come more than once, the one that is told here.
TRAINING_POINTS = (
    "claimed",
    "features staged",
    "mid-epoch",
    "checkpoint staged",
    "checkpoint published",
    "artifact staged",
    "artifact published",
    "registering",
    "registered",
)
INGEST_POINTS = (
    "claimed",
    "pictures decoded",
    "pixels staged",
    "pixels published",
    "manifest published",
    "getting ready",
    "ready",
)
PICTURE = 7
STEP = 5  # with three in an epoch, the second one of the second epoch
CHECKPOINT = 5  # with one after each step and each epoch, the one before that step


class Trap:
    """A job's, if there is one for it."""

    def __init__(self, folder: Path, claim: Claim) -> None:
        self._path = folder / claim.dataset_id
        self._point, self._victim = self._path.read_text().split("/") if self._path.exists() else ("", "")

    def reach(self, point: str, *, worker: int, child: int) -> None:
        """Springs if it is there for this point. worker, child: pids; the caller has one of them."""
        if point != self._point:
            return
        self._point = ""
        self._path.write_text(str(child))
        self._path.rename(self._path.with_suffix(".sprung"))
        if self._victim == "frozen":
            os.kill(child, signal.SIGSTOP)
            return
        os.kill(worker if self._victim == "worker" else child, signal.SIGKILL)
        if child == os.getpid():
            time.sleep(600)  # it ends with its worker, and does nothing until then


def watch(
    owner: Any,
    name: str,
    reach: Callable[[str], None],
    *,
    before: str = "",
    after: str = "",
    only: Callable[..., bool] = lambda *_arguments: True,
    call: int = 1,
) -> None:
    """Wraps a function: the points `before` and `after` are reached at its call of this number, from 1 on.

    only: of calls with such arguments.
    """
    real, calls = getattr(owner, name), itertools.count(1)

    def watched(*arguments: Any, **named: Any) -> Any:
        is_it = only(*arguments) and next(calls) == call
        if is_it and before:
            reach(before)
        result = real(*arguments, **named)
        if is_it and after:
            reach(after)
        return result

    setattr(owner, name, watched)


def publishing(part: str) -> Callable[..., bool]:
    """Whether LocalStorage.publish is called for a key with this part."""
    return lambda _storage, _staged, key: part in f"/{key}"


def watch_training(reach: Callable[[str], None]) -> None:
    loop, workbench = (importlib.import_module(f"worker.{name}") for name in ("training.loop", "workbench"))
    # A checkpoint after every step, so that a run goes on in the middle of an epoch.
    loop.TICK_SECONDS = 0.0
    workbench.Hooks = partial(workbench.Hooks, checkpoint_seconds=0.0)
    watch(LocalStorage, "publish", reach, before="features staged", only=publishing("/features/"))
    watch(loop, "_step", reach, before="mid-epoch", call=STEP)
    watch(
        LocalStorage,
        "publish",
        reach,
        before="checkpoint staged",
        after="checkpoint published",
        only=publishing("/jobs/"),
        call=CHECKPOINT,
    )
    watch(
        LocalStorage,
        "publish",
        reach,
        before="artifact staged",
        after="artifact published",
        only=publishing("/models/"),
    )
    watch(queue, "succeed", reach, after="registering")  # in the transaction, before it is committed
    watch(Reporter, "transaction", reach, after="registered")


def watch_ingest(reach: Callable[[str], None]) -> None:
    watch(PackedWriter, "append", reach, after="pictures decoded", call=PICTURE)
    watch(
        LocalStorage,
        "publish",
        reach,
        before="pixels staged",
        after="pixels published",
        only=publishing("/packed-"),
    )
    watch(LocalStorage, "publish", reach, after="manifest published", only=publishing("/manifest"))
    watch(catalog, "mark_ready", reach, after="getting ready")  # in the transaction, before it is committed
    # What it had announced is settled after the last commit.
    watch(LocalStorage, "_settle", reach, before="ready")


def load_story(traps: Path, kind: JobKind) -> child.Story:
    """Unlike the worker's own, a child imports torch when there is work: many of these never get any."""

    def run(claim: Claim, **surroundings: Any) -> None:
        story = child._import_story(kind)
        reach = partial(Trap(traps, claim).reach, worker=os.getppid(), child=os.getpid())
        (watch_ingest if kind is JobKind.ingest else watch_training)(reach)
        story(claim, **surroundings)

    return run


def watch_claims(traps: Path) -> None:
    """In the worker: a claim is committed, and its child does not know of it yet."""
    hand_over = workers.Child.hand_over

    def watched(self: workers.Child, claim: Claim, settings: Settings) -> None:
        Trap(traps, claim).reach("claimed", worker=os.getpid(), child=self._process.pid)
        hand_over(self, claim, settings)

    workers.Child.hand_over = watched  # type: ignore[method-assign]


if __name__ == "__main__":
    if "--kind" in sys.argv:
        folder = Path(sys.argv.pop(1))
        sys.exit(child.main(partial(load_story, folder)))
    settings, *child_command = sys.argv[1:]
    watch_claims(Path(child_command[-1]))
    workers.run_worker(Settings(**json.loads(settings)), child_command=child_command)
