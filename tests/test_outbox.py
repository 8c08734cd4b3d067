"""The outbox, on both databases: who holds a delivery, and who may say what became of it."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta

import pytest

from app import webhooks
from app.db.engine import Database
from app.db.tables import DEFAULT_WORKSPACE, WorkspaceRow, utc_now
from app.errors import NotFound
from app.webhooks import CLAIM, Claim


def webhook_with(database: Database, deliveries: int) -> str:
    """Its id."""
    with database.write() as session:
        webhook = webhooks.create(session, url="https://hooks.example/", events=webhooks.EVENTS, is_enabled=True)
        for number in range(deliveries):
            webhooks.emit(session, "alias.changed", {"number": number}, workspace_id=DEFAULT_WORKSPACE)
        return webhook.id


def claim(database: Database, webhook_id: str, *, later: timedelta = timedelta()) -> Claim | None:
    with database.write() as session:
        return webhooks.claim_next(session, webhook_id, now=utc_now() + later)


def test_claim_is_held_for_its_time_and_then_lost_to_the_next(any_database: Database) -> None:
    webhook_id = webhook_with(any_database, 1)
    first = claim(any_database, webhook_id)
    assert first is not None
    assert claim(any_database, webhook_id) is None
    assert claim(any_database, webhook_id, later=CLAIM / 2) is None

    second = claim(any_database, webhook_id, later=CLAIM * 1.01)

    assert second is not None
    assert (second.delivery_id, first.attempt, second.attempt) == (first.delivery_id, 1, 2)
    with any_database.write() as session:
        assert not webhooks.settle_delivered(session, first, response_status=200)
        assert not webhooks.settle_failed(session, first, error="x", response_status=None)
        assert not webhooks.settle_later(session, first, at=utc_now(), error="x", response_status=None)
        assert webhooks.settle_delivered(session, second, response_status=204)
        assert not webhooks.settle_delivered(session, second, response_status=204)
        [delivery] = webhooks.list_deliveries(session, webhook_id, limit=10)
        assert (delivery.status, delivery.response_status) == ("delivered", 204)


def test_where_the_clock_is_set_back_what_waits_is_due_within_hours(any_database: Database) -> None:
    webhook_id = webhook_with(any_database, 2)
    first = claim(any_database, webhook_id)
    assert first is not None
    with any_database.write() as session:
        webhooks.settle_later(session, first, at=utc_now() + timedelta(hours=6), error="x", response_status=None)
    assert claim(any_database, webhook_id, later=timedelta(hours=-1)) is None, "it may have been meant so"

    taken = claim(any_database, webhook_id, later=timedelta(days=-2))

    assert taken is not None
    assert (taken.delivery_id, taken.attempt) == (first.delivery_id, 2)


def test_oldest_is_taken_first_and_nothing_of_a_webhook_that_is_off(any_database: Database) -> None:
    webhook_id = webhook_with(any_database, 3)
    with any_database.read() as session:
        ids = [delivery.id for delivery in reversed(webhooks.list_deliveries(session, webhook_id, limit=10))]
        assert webhooks.webhooks_with_due(session, now=utc_now()) == {webhook_id: DEFAULT_WORKSPACE}
    assert [taken.delivery_id for _ in range(2) if (taken := claim(any_database, webhook_id))] == ids[:2]

    with any_database.write() as session:
        webhooks.turn_off(session, webhook_id, "x")

    assert claim(any_database, webhook_id) is None
    with any_database.read() as session:
        assert webhooks.webhooks_with_due(session, now=utc_now()) == {}


def test_whoever_makes_a_change_only_webhooks_of_its_workspace_are_told(any_database: Database) -> None:
    ours = webhook_with(any_database, 0)
    with any_database.write() as session:
        session.add(WorkspaceRow(id="ws_theirs", name="theirs"))
    everybodys = any_database.within(None)  # as the worker sees it
    theirs = webhook_with(any_database.within("ws_theirs"), 0)

    with everybodys.write() as session:
        webhooks.emit(session, "alias.changed", {}, workspace_id="ws_theirs")

    with everybodys.read() as session:
        assert webhooks.webhooks_with_due(session, now=utc_now()) == {theirs: "ws_theirs"}
        assert not webhooks.list_deliveries(session, ours, limit=10)


def test_a_webhook_that_is_just_being_deleted_takes_no_change_with_it(any_database: Database) -> None:
    webhook_id = webhook_with(any_database, 1)

    def change() -> list[str]:
        with any_database.write() as session:
            webhooks.emit(session, "alias.changed", {}, workspace_id=DEFAULT_WORKSPACE)
            return [row.id for row in webhooks.list_webhooks(session, limit=10)]

    def test() -> None:
        with any_database.write() as session:
            webhooks.emit_test(session, webhook_id)

    def turn_off() -> None:
        with any_database.write() as session:
            webhooks.change(session, webhook_id, {"is_enabled": False})

    with ThreadPoolExecutor(3) as pool:
        with any_database.write() as session:
            webhooks.delete(session, webhook_id)
            changing, testing, turning = pool.submit(change), pool.submit(test), pool.submit(turn_off)
            assert not wait([changing, testing, turning], timeout=0.2).done, "they wait for what comes of the webhook"

        assert changing.result() == []
        for refused in (testing, turning):
            with pytest.raises(NotFound):
                refused.result()


def test_senders_at_the_same_time_take_different_deliveries(new_database_url: Callable[[], str]) -> None:
    url = new_database_url()
    database = Database(url).within(DEFAULT_WORKSPACE)
    webhook_id = webhook_with(database, 60)
    taken: list[str] = []

    def send() -> None:
        own = Database(url)
        for _ in range(60):
            if (found := claim(own, webhook_id)) is not None:
                taken.append(found.delivery_id)
        own.dispose()

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    database.dispose()

    assert len(taken) == len(set(taken)) == 60
