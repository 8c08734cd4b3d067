"""Sends what the outbox holds: in every API process, to each webhook one delivery after the other, at least once.

A receiver that hangs delays its own deliveries: each other of its workspace has a turn before its next one, and other
workspaces do not wait for it. What fails is tried again, later and later, for about a day.
"""

import asyncio
import random
from collections import Counter
from datetime import timedelta

import structlog
from sqlalchemy.exc import SQLAlchemyError
from standardwebhooks.webhooks import Webhook

from app import webhooks
from app.api.services import Services
from app.db.tables import utc_now
from app.egress import Answer, Refused, Unreachable
from app.errors import GraftError
from app.webhooks import Claim

POLL_INTERVAL_SECONDS = 0.5
RETRY_INTERVAL_SECONDS = 5.0
SWEEP_INTERVAL_SECONDS = 3600.0
# Webhooks that are sent to at the same time: in all, and of one workspace, so that another finds room at once.
PARALLEL = 32
PARALLEL_OF_WORKSPACE = PARALLEL // 2

# Eleven attempts: after 5 s, 20 s, 80 s, 5 min, 21 min, 85 min, 6 h and then every 6 h, a quarter more or less.
MAX_ATTEMPTS = 11
FIRST_PAUSE_SECONDS = 5.0
PAUSE_FACTOR = 4.0
LONGEST_PAUSE_SECONDS = 6 * 3600.0
JITTER = 0.25

# Of a receiver that wants no more.
GONE = 410

log = structlog.get_logger(__name__)


class Line:
    """Who is sent to next. A webhook waits in line for one delivery at a time; of several workspaces that wait, the one
    that is sent to least goes first, and then to the end of the line."""

    def __init__(self) -> None:
        # Webhooks, each with its workspace; those that wait in their order.
        self._waiting: dict[str, str] = {}
        self._served: dict[str, str] = {}

    def join(self, webhook_id: str, workspace_id: str) -> None:
        """Does nothing where it waits already, or is being sent to."""
        if webhook_id not in self._served:
            self._waiting.setdefault(webhook_id, workspace_id)

    def begin_next(self) -> tuple[str, str] | None:
        """The webhook whose turn begins, and its workspace; None while nobody's may."""
        served = Counter(self._served.values())
        may_begin = [waiting for waiting in self._waiting.items() if served[waiting[1]] < PARALLEL_OF_WORKSPACE]
        if not may_begin or len(self._served) >= PARALLEL:
            return None
        webhook_id, workspace_id = min(may_begin, key=lambda waiting: served[waiting[1]])
        self._served[webhook_id] = self._waiting.pop(webhook_id)
        self._waiting = dict(sorted(self._waiting.items(), key=lambda waiting: waiting[1] == workspace_id))
        return webhook_id, workspace_id

    def end(self, webhook_id: str) -> None:
        del self._served[webhook_id]


async def send_webhooks(services: Services) -> None:
    """Sends whatever is due. Never returns; cancelled, it leaves what it was at for the next process."""
    if not services.settings.webhooks:
        return
    line = Line()
    async with asyncio.TaskGroup() as turns:
        while True:
            pause = POLL_INTERVAL_SECONDS
            try:
                for webhook_id, workspace_id in (await asyncio.to_thread(_due, services)).items():
                    line.join(webhook_id, workspace_id)
            except (SQLAlchemyError, GraftError) as error:
                log.error("database does not answer", error=type(error).__name__)
                pause = RETRY_INTERVAL_SECONDS
            _begin_turns(services, line, turns)
            await asyncio.sleep(pause)


async def forget_deliveries(services: Services) -> None:
    """Removes old deliveries, at the start and every hour. Never returns."""
    while True:
        try:
            forgotten = await asyncio.to_thread(_forget, services)
            if forgotten:
                log.info("webhook deliveries forgotten", count=forgotten)
        except (SQLAlchemyError, GraftError) as error:
            log.error("webhook deliveries cannot be forgotten", error=type(error).__name__)
        await asyncio.sleep(SWEEP_INTERVAL_SECONDS)


def pause_seconds(attempt: int, *, retry_after_seconds: int | None, chance: random.Random) -> float:
    """From the end of a failed attempt to the next one. attempt: 1 for the first."""
    planned = min(FIRST_PAUSE_SECONDS * PAUSE_FACTOR ** (attempt - 1), LONGEST_PAUSE_SECONDS)
    jittered = planned * chance.uniform(1 - JITTER, 1 + JITTER)
    return max(jittered, min(retry_after_seconds or 0, LONGEST_PAUSE_SECONDS))


def _begin_turns(services: Services, line: Line, turns: asyncio.TaskGroup) -> None:
    while (begun := line.begin_next()) is not None:
        turns.create_task(_take_turn(services, line, turns, *begun))


async def _take_turn(
    services: Services, line: Line, turns: asyncio.TaskGroup, webhook_id: str, workspace_id: str
) -> None:
    has_sent = await _send_one(services, webhook_id)
    line.end(webhook_id)
    if has_sent:
        line.join(webhook_id, workspace_id)  # there may be more
    _begin_turns(services, line, turns)


async def _send_one(services: Services, webhook_id: str) -> bool:
    """Returns whether there was anything to be sent."""
    try:
        claim = await asyncio.to_thread(_claim, services, webhook_id)
        if claim is None:
            return False
        await _send(services, claim)
        return True
    except (SQLAlchemyError, GraftError) as error:
        log.error("database does not answer", error=type(error).__name__)
    except Exception:  # the door around what strangers' servers may answer: the delivery is due again by itself
        log.exception("webhook delivery broke", webhook_id=webhook_id)
    return False


async def _send(services: Services, claim: Claim) -> None:
    now = utc_now()
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "Graft",
        "webhook-id": claim.delivery_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": Webhook(claim.secret).sign(claim.delivery_id, now, claim.body),
    }
    answer, trouble = None, ""
    try:
        answer = await services.egress.post(claim.url, body=claim.body.encode(), headers=headers)
    except Refused as refusal:
        trouble = f"The webhook's URL may not be sent to: {refusal}."
    except Unreachable as failure:
        trouble = f"The receiver cannot be reached: {failure}."
    if answer is not None and not 200 <= answer.status < 300:
        trouble = f"The receiver answered with {answer.status}."
    await asyncio.to_thread(_settle, services, claim, answer, trouble)


def _due(services: Services) -> dict[str, str]:
    with services.database.read() as session:
        return webhooks.webhooks_with_due(session, now=utc_now())


def _claim(services: Services, webhook_id: str) -> Claim | None:
    with services.database.write() as session:
        return webhooks.claim_next(session, webhook_id, now=utc_now())


def _settle(services: Services, claim: Claim, answer: Answer | None, trouble: str) -> None:
    status = None if answer is None else answer.status
    fields = {"webhook_id": claim.webhook_id, "delivery_id": claim.delivery_id, "attempt": claim.attempt}
    with services.database.write() as session:
        if not trouble and status is not None:
            webhooks.settle_delivered(session, claim, response_status=status)
            log.info("webhook delivered", status=status, **fields)
            return
        log.info("webhook not delivered", reason=trouble, **fields)
        if status == GONE:
            webhooks.turn_off(session, claim.webhook_id, "The receiver answered with 410: it wants no more.")
        if status == GONE or claim.attempt >= MAX_ATTEMPTS:
            webhooks.settle_failed(session, claim, error=trouble, response_status=status)
            return
        pause = pause_seconds(
            claim.attempt,
            retry_after_seconds=None if answer is None else answer.retry_after_seconds,
            chance=random.SystemRandom(),
        )
        webhooks.settle_later(
            session, claim, at=utc_now() + timedelta(seconds=pause), error=trouble, response_status=status
        )


def _forget(services: Services) -> int:
    with services.database.write() as session:
        return webhooks.forget_before(session, services.clock.before(webhooks.KEPT_FOR))
