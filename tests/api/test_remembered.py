"""What the database said is asked once until anything changes, however many want to know."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from sqlalchemy import text

from app.api.remembered import Remembered
from app.db.engine import Database
from app.errors import NotFound

LONG = 30.0


class Question:
    """How many aliases there are, by the database; takes until it is let go on."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.asked = 0
        self.begun, self.may_end = threading.Event(), threading.Event()

    def __call__(self) -> int:
        self.asked += 1
        with self._database.read() as session:
            count = session.execute(text("SELECT count(*) FROM aliases")).scalar_one()
        self.begun.set()
        assert self.may_end.wait(LONG)
        return int(count)


Story = Callable[[Remembered, Question], Coroutine[Any, Any, None]]
Run = Callable[[Story], None]


@pytest.fixture
def run(database: Database) -> Run:
    def run(story: Story) -> None:
        remembered = Remembered(database)
        try:
            asyncio.run(story(remembered, Question(database)))
        finally:
            remembered.close()

    return run


def change(database: Database) -> None:
    with database.write() as session:
        session.execute(text("CREATE TABLE IF NOT EXISTS changes (number INTEGER)"))
        session.execute(text("INSERT INTO changes VALUES (1)"))


def test_many_who_ask_at_once_cost_one_question(run: Run) -> None:
    async def story(remembered: Remembered, question: Question) -> None:
        asking = [asyncio.create_task(remembered.get("key", question)) for _ in range(40)]
        await asyncio.to_thread(question.begun.wait, LONG)
        asking[0].cancel()  # who asked first leaves, and takes the answer from nobody
        await asyncio.sleep(0)
        question.may_end.set()
        assert await asyncio.gather(*asking[1:]) == [0] * 39
        assert await remembered.get("key", question) == 0
        assert question.asked == 1
        assert await remembered.get("another", question) == 0
        assert question.asked == 2

    run(story)


def test_who_asks_after_a_change_gets_no_answer_from_before_it(run: Run, database: Database) -> None:
    async def story(remembered: Remembered, question: Question) -> None:
        before = asyncio.create_task(remembered.get("key", question))
        await asyncio.to_thread(question.begun.wait, LONG)
        question.begun.clear()
        change(database)
        after = asyncio.create_task(remembered.get("key", question))
        await asyncio.to_thread(question.begun.wait, LONG)
        assert question.asked == 2
        question.may_end.set()
        await asyncio.gather(before, after)
        await remembered.get("key", question)
        assert question.asked == 2
        change(database)
        await remembered.get("key", question)
        assert question.asked == 3

    run(story)


def test_what_was_raised_is_raised_for_all_and_asked_again(run: Run) -> None:
    asked = 0

    def refuse() -> None:
        nonlocal asked
        asked += 1
        raise NotFound("There is none.")

    async def story(remembered: Remembered, _question: Question) -> None:
        found = await asyncio.gather(*(remembered.get("key", refuse) for _ in range(5)), return_exceptions=True)
        assert [type(each) for each in found] == [NotFound] * 5
        assert asked == 1
        with pytest.raises(NotFound):
            await remembered.get("key", refuse)
        assert asked == 2

    run(story)
