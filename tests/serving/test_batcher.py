"""What waits runs together, in as many threads as there are, and nothing is forgotten."""

import asyncio
import random
import threading
import time
from collections.abc import Sequence

import pytest

from app.errors import Overloaded
from app.serving.batcher import Batcher

LONG = 60.0  # seconds; nothing here waits so long


def ask(
    batcher: Batcher[int, int], item: int, *, key: object = "network", seconds: float = LONG
) -> asyncio.Future[int]:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    batcher.submit(key, item, deadline=time.monotonic() + seconds, future=future)
    return future


def test_what_comes_during_a_batch_is_the_next_one_and_networks_do_not_mix() -> None:
    batches: list[tuple[object, list[int]]] = []
    taken, released = threading.Event(), threading.Event()

    def run(key: object, items: Sequence[int]) -> list[int]:
        batches.append((key, list(items)))
        taken.set()
        assert released.wait(LONG)
        return [10 * item for item in items]

    async def story() -> list[int]:
        batcher = Batcher(run, max_batch=3)
        first = ask(batcher, 0)
        await asyncio.to_thread(taken.wait, LONG)
        others = [ask(batcher, item, key="other" if item == 2 else "network") for item in range(1, 6)]
        released.set()
        try:
            return list(await asyncio.gather(first, *others))
        finally:
            batcher.close()

    assert asyncio.run(story()) == [0, 10, 20, 30, 40, 50]
    assert batches == [("network", [0]), ("network", [1, 3, 4]), ("other", [2]), ("network", [5])]


def test_as_many_batches_run_at_once_as_there_are_threads() -> None:
    together = threading.Barrier(2, timeout=LONG)

    def run(key: object, items: Sequence[int]) -> Sequence[int]:
        together.wait()  # raises where the other one never comes
        return items

    async def story() -> None:
        batcher = Batcher(run, max_batch=1, threads=2)
        try:
            assert await asyncio.gather(*(ask(batcher, item) for item in range(4))) == [0, 1, 2, 3]
        finally:
            batcher.close()

    asyncio.run(story())


@pytest.mark.parametrize("threads", [1, 3])
def test_nothing_is_forgotten_whenever_it_comes(threads: int) -> None:
    async def story() -> None:
        batcher = Batcher(lambda _key, items: items, max_batch=4, threads=threads)
        chance = random.Random(0)

        async def one(item: int) -> int:
            await asyncio.sleep(chance.random() * 0.2)
            return await ask(batcher, item)

        try:
            async with asyncio.timeout(LONG):
                assert await asyncio.gather(*(one(item) for item in range(2000))) == list(range(2000))
        finally:
            batcher.close()

    asyncio.run(story())


def test_a_failure_is_told_to_all_of_its_batch_and_to_nobody_else() -> None:
    def run(key: object, items: Sequence[int]) -> Sequence[int]:
        if key == "broken":
            raise ValueError("broken")
        return items

    async def story() -> None:
        batcher = Batcher(run, max_batch=8)
        try:
            found = await asyncio.gather(
                ask(batcher, 1, key="broken"), ask(batcher, 2), ask(batcher, 3, seconds=-1), return_exceptions=True
            )
        finally:
            batcher.close()
        assert [type(each) for each in found] == [ValueError, int, Overloaded]

    asyncio.run(story())
