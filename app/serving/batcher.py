"""Pictures of many requests → batches for one device: a bounded queue, no waiting while the device is idle.

A batch is whatever waits for the same network when a thread becomes free: a lone picture runs at once, and under load
batches grow by themselves to what arrives during the batch before. Knows futures and threads; not models, not HTTP.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from app.errors import Overloaded

Item = TypeVar("Item")
Result = TypeVar("Result")
T = TypeVar("T")


@dataclass(frozen=True)
class _Waiting(Generic[Item, Result]):
    """A piece of work in the queue. key: what may run together."""

    key: object
    item: Item
    deadline: float  # on time.monotonic's clock
    future: "asyncio.Future[Result]"


@dataclass
class Batcher(Generic[Item, Result]):
    """Runs `run(key, items)`, which gives a result per item, in threads of its own, in each a batch at a time.

    threads: one for a device that does one thing at a time. Items whose caller has left, or whose deadline has passed,
    are dropped before they cost anything. All methods belong to one event loop; close with `close()`.
    """

    run: Callable[[Any, Sequence[Item]], Sequence[Result]]
    max_batch: int
    threads: int = 1
    on_batch: Callable[[int], None] = lambda _size: None
    _queue: deque[_Waiting[Item, Result]] = field(default_factory=deque)
    _working: int = 0  # of the tasks below, those that will look at the queue again
    _runners: set["asyncio.Task[None]"] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="forward")

    def submit(self, key: object, item: Item, *, deadline: float, future: "asyncio.Future[Result]") -> None:
        """Queues an item, whose result `future` gets: Overloaded once the deadline has passed, or what `run` raises."""
        self._queue.append(_Waiting(key, item, deadline, future))
        if self._working < self.threads:
            self._working += 1
            runner = asyncio.create_task(self._work())
            self._runners.add(runner)
            runner.add_done_callback(self._runners.discard)

    async def alone(self, function: Callable[..., T], *arguments: Any) -> T:
        """Something else in the same threads, between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while batch := self._take():
                self.on_batch(len(batch))
                try:
                    results = await loop.run_in_executor(
                        self._pool, self.run, batch[0].key, [waiting.item for waiting in batch]
                    )
                except Exception as error:  # noqa: BLE001 (handed to those who wait, who are at a request's door)
                    _fail(batch, error)
                    continue
                for waiting, result in zip(batch, results, strict=True):
                    if not waiting.future.done():
                        waiting.future.set_result(result)
        finally:
            self._working -= 1

    def _take(self) -> list[_Waiting[Item, Result]]:
        """What has waited longest, and what may run with it, in order; empty when nothing waits."""
        now = time.monotonic()
        batch: list[_Waiting[Item, Result]] = []
        left: deque[_Waiting[Item, Result]] = deque()
        while self._queue and len(batch) < self.max_batch:
            waiting = self._queue.popleft()
            if waiting.future.done():
                continue
            if waiting.deadline < now:
                fail(waiting.future, waited_too_long())
            elif batch and waiting.key != batch[0].key:
                left.append(waiting)
            else:
                batch.append(waiting)
        self._queue.extendleft(reversed(left))
        return batch


def _fail(batch: Sequence[_Waiting[Any, Any]], error: Exception) -> None:
    for waiting in batch:
        fail(waiting.future, error)


def fail(future: "asyncio.Future[Any]", error: Exception) -> None:
    """Tells whoever waits for it, if anybody still does."""
    if not future.done():
        future.set_exception(error)


def waited_too_long() -> Overloaded:
    return Overloaded("The picture waited too long; try again soon.", retry_after_seconds=1)
