"""Webhooks from an API that is killed between what it tells of and the telling, and in the middle of that."""

import os
import random
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import hook_receiver
import httpx
import pytest
from hook_receiver import Receiver
from killed_api import KilledApi, killed_api
from running import wait_until
from sqlalchemy import update

from app.db.engine import Database
from app.db.tables import DeliveryRow, utc_now

DELIVER_WITHIN_SECONDS = 60.0
KILLS = int(os.environ.get("GRAFT_TEST_KILLS", "30"))


@pytest.fixture
def api(tmp_path: Path) -> Iterator[KilledApi]:
    with killed_api(tmp_path, webhooks="true", webhook_networks='["127.0.0.0/8"]') as api:
        yield api


def webhook_for(api: KilledApi, url: str) -> tuple[str, str]:
    """Its address, and its secret."""
    answer = httpx.post(f"{api.url}/v1/webhooks", json={"url": url})
    assert answer.status_code == 201, answer.text
    return api.url + answer.headers["location"], answer.json()["secret"]


def deliveries(webhook: str) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = httpx.get(f"{webhook}/deliveries", params={"limit": 200}).json()["data"]
    return listed


def pass_time(api: KilledApi) -> None:
    """Claims of the dead have run out."""
    database = Database(api.database_url)
    with database.write() as session:
        due = update(DeliveryRow).where(DeliveryRow.status == "pending")
        session.execute(due.values(next_attempt_at=utc_now() - timedelta(seconds=1)))
    database.dispose()


@pytest.mark.slow
def test_what_was_written_down_is_sent_after_a_kill(api: KilledApi) -> None:
    port = hook_receiver.unused_port()
    webhook, secret = webhook_for(api, f"http://127.0.0.1:{port}/")
    ids = [httpx.post(f"{webhook}/test").json()["id"] for _ in range(3)]
    api.kill()
    with Receiver(port=port) as receiver:
        receiver.secret = secret
        pass_time(api)
        api.start()

        told = receiver.wait_for(3)

        assert sorted(payload["id"] for payload in told) == sorted(ids)


def test_delivery_that_a_kill_cut_comes_again_under_the_same_id(api: KilledApi) -> None:
    with Receiver() as receiver:
        webhook, receiver.secret = webhook_for(api, receiver.url)
        receiver.answers = [receiver.hang]
        delivery = httpx.post(f"{webhook}/test").json()
        receiver.wait_for(1)
        api.kill()
        pass_time(api)
        api.start()

        told = receiver.wait_for(2)

        assert [payload["id"] for payload in told] == [delivery["id"]] * 2
        wait_until(
            lambda: deliveries(webhook)[0]["status"] == "delivered",
            within_seconds=DELIVER_WITHIN_SECONDS,
            otherwise="it was never delivered",
        )
        assert deliveries(webhook)[0]["attempts"] == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_everything_that_was_answered_is_told_whenever_the_api_is_killed(api: KilledApi) -> None:
    chance = random.Random(KILLS)
    asked: set[str] = set()
    with Receiver() as receiver:
        webhook, receiver.secret = webhook_for(api, receiver.url)
        for _ in range(KILLS):
            for _ in range(chance.randrange(1, 12)):
                asked.add(httpx.post(f"{webhook}/test").json()["id"])
            api.kill()
            pass_time(api)
            api.start()

        wait_until(
            lambda: {each["status"] for each in deliveries(webhook)} == {"delivered"},
            within_seconds=DELIVER_WITHIN_SECONDS,
            otherwise="some were never delivered",
        )

        assert {payload["id"] for payload in receiver.verified()} == asked
