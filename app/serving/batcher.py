"""Pictures of many requests → batches for one device: a bounded queue, no waiting while the device is idle.

A batch is whatever waits for the same network when the device becomes free: a lone picture runs at once, and under load
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
    """Runs `run(key, items)`, which gives a result per item, in one thread of its own, a batch at a time.

    Items whose caller has left, or whose deadline has passed, are dropped before they cost anything. All methods belong
    to one event loop; close with `close()`.
    """

    run: Callable[[Any, Sequence[Item]], Sequence[Result]]
    max_batch: int
    on_batch: Callable[[int], None] = lambda _size: None
    _queue: deque[_Waiting[Item, Result]] = field(default_factory=deque)
    _thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(max_workers=1, thread_name_prefix="forward")
    )
    _runner: "asyncio.Task[None] | None" = None

    async def submit(self, key: object, item: Item, *, deadline: float) -> Result:
        """The item's result. Raises Overloaded once the deadline has passed, and whatever `run` raises."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._queue.append(_Waiting(key, item, deadline, future))
        if self._runner is None:
            self._runner = asyncio.create_task(self._work())
        return await future

    async def alone(self, function: Callable[..., T], *arguments: Any) -> T:
        """Something else in the same thread, between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while batch := self._take():
                self.on_batch(len(batch))
                try:
                    results = await loop.run_in_executor(
                        self._thread, self.run, batch[0].key, [waiting.item for waiting in batch]
                    )
                except Exception as error:  # noqa: BLE001 (handed to those who wait, who are at a request's door)
                    _fail(batch, error)
                    continue
                for waiting, result in zip(batch, results, strict=True):
                    if not waiting.future.done():
                        waiting.future.set_result(result)
        finally:
            self._runner = None

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
                _fail([waiting], Overloaded("The picture waited too long; try again soon.", retry_after_seconds=1))
            elif batch and waiting.key is not batch[0].key:
                left.append(waiting)
            else:
                batch.append(waiting)
        self._queue.extendleft(reversed(left))
        return batch


def _fail(batch: Sequence[_Waiting[Any, Any]], error: Exception) -> None:
    for waiting in batch:
        if not waiting.future.done():
            waiting.future.set_exception(error)
