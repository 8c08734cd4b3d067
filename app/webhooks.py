"""Webhooks and what is sent to them, in the database: every statement, inside `Database.write()` or `.read()`.

An outbox: what happens is written down by `emit`, in the transaction of the change itself, once for every webhook that
wants it; so nothing is told that did not happen, and nothing that happened is forgotten. Sending it is somebody else's,
who claims a delivery by a guarded update. Its attempt's number is the claim: who lost it can write nothing. When one is
due the wall clock says, which processes on several machines share well enough for that; where it is set back, one waits
for LONGEST_WAIT at most.
"""

import base64
import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, get_args

from sqlalchemy import ColumnElement, Select, func, select, update
from sqlalchemy import delete as sql_delete
from sqlalchemy import exists as exists_row
from sqlalchemy.orm import Session

from app.db.tables import DeliveryRow, WebhookRow, new_id, rfc3339, utc_now
from app.errors import Conflict, InvalidRequest, NotFound

Event = Literal[
    "dataset.ready",
    "dataset.failed",
    "job.started",
    "job.succeeded",
    "job.failed",
    "job.cancelled",
    "batch.started",
    "batch.succeeded",
    "batch.failed",
    "batch.cancelled",
    "model.registered",
    "alias.changed",
]
EVENTS: tuple[Event, ...] = get_args(Event)
TEST_EVENT = "webhook.test"

# Every change writes a row for each.
MAX_WEBHOOKS = 100
SECRET_BYTES = 32
# A sender that died gives its delivery back after this; longer than any attempt takes.
CLAIM = timedelta(seconds=60)
KEPT_FOR = timedelta(days=30)
# No delivery waits for longer; what is due later than that was put there by a clock that has been set back since.
LONGEST_WAIT = timedelta(hours=8)


@dataclass(frozen=True)
class Claim:
    """One attempt at one delivery. attempt: 1 for the first."""

    delivery_id: str
    attempt: int
    webhook_id: str
    url: str
    secret: str
    body: str

    def __repr__(self) -> str:
        return f"Claim({self.delivery_id}, attempt {self.attempt})"  # never the secret


# Webhooks


def create(session: Session, *, url: str, events: Collection[str], is_enabled: bool) -> WebhookRow:
    """Raises Conflict if there are too many."""
    if (session.scalar(select(func.count()).select_from(WebhookRow)) or 0) >= MAX_WEBHOOKS:
        raise Conflict(
            f"There are {MAX_WEBHOOKS} webhooks, the most there may be; delete one.", code="too-many-webhooks"
        )
    secret = "whsec_" + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()
    row = WebhookRow(id=new_id("wh"), url=url, events=sorted(events), secret=secret, is_enabled=is_enabled)
    session.add(row)
    session.flush()
    return row


def find(session: Session, webhook_id: str) -> WebhookRow:
    """Raises NotFound."""
    return _found(session.scalar(_row(webhook_id)))


def list_webhooks(session: Session, *, limit: int, after: str | None = None) -> Sequence[WebhookRow]:
    """Newest first. Raises NotFound for an `after` that is gone."""
    query = select(WebhookRow).order_by(WebhookRow.seq.desc()).limit(limit)
    if after is not None:
        query = query.where(WebhookRow.seq < find(session, after).seq)
    return session.scalars(query).all()


def change(session: Session, webhook_id: str, changes: Mapping[str, Any]) -> WebhookRow:
    """changes: any of url, events and is_enabled. Raises NotFound."""
    row = _found(session.scalar(_row(webhook_id).with_for_update(key_share=True)))
    for name, value in changes.items():
        setattr(row, name, value)
    if changes.get("is_enabled"):
        row.disabled_reason = None
    session.flush()
    return row


def delete(session: Session, webhook_id: str) -> None:
    """With all its deliveries. Raises NotFound."""
    removed = session.scalar(sql_delete(WebhookRow).where(WebhookRow.id == webhook_id).returning(WebhookRow.seq))
    if removed is None:
        raise NotFound("There is no such webhook.")


def _row(webhook_id: str) -> Select[WebhookRow]:
    return select(WebhookRow).where(WebhookRow.id == webhook_id).execution_options(populate_existing=True)


def _found(row: WebhookRow | None) -> WebhookRow:
    if row is None:
        raise NotFound("There is no such webhook; GET /v1/webhooks lists those there are.")
    return row


# What happened


def emit(session: Session, event: Event, data: Mapping[str, Any], *, workspace_id: str) -> None:
    """Writes down, for every webhook of the workspace that wants it, what the transaction does to something of it.

    data: JSON, and thin: ids and states.
    """
    is_told = (WebhookRow.workspace_id == workspace_id) & WebhookRow.is_enabled
    told = select(WebhookRow.id, WebhookRow.events).where(is_told).order_by(WebhookRow.seq)
    # Nobody deletes them until the transaction ends: one that is just being deleted would take the change with it.
    for webhook_id, events in session.execute(told.with_for_update(read=True, key_share=True)).all():
        if event in events:
            _add(session, webhook_id, event, data)


def emit_test(session: Session, webhook_id: str) -> DeliveryRow:
    """Raises NotFound, or Conflict where the webhook is off."""
    webhook = _found(session.scalar(_row(webhook_id).with_for_update(read=True, key_share=True)))
    if not webhook.is_enabled:
        raise Conflict('The webhook is off; turn it on first: PATCH it with {"enabled": true}.', code="webhook-off")
    return _add(session, webhook_id, TEST_EVENT, {"id": webhook_id, "object": "webhook"})


def _add(session: Session, webhook_id: str, event: str, data: Mapping[str, Any]) -> DeliveryRow:
    delivery_id, now = new_id("evt"), utc_now()
    body = {
        "id": delivery_id,
        "object": "event",
        "type": event,
        "timestamp": rfc3339(now),
        "data": dict(data),
    }
    row = DeliveryRow(
        id=delivery_id,
        webhook_id=webhook_id,
        event=event,
        body=json.dumps(body),
        status="pending",
        attempts=0,
        created_at=now,
        next_attempt_at=now,
    )
    session.add(row)
    session.flush()
    return row


# Deliveries


def find_delivery(session: Session, webhook_id: str, delivery_id: str) -> DeliveryRow:
    """Raises NotFound."""
    row = session.scalar(select(DeliveryRow).where(DeliveryRow.id == delivery_id, DeliveryRow.webhook_id == webhook_id))
    if row is None:
        raise NotFound("There is no such delivery; GET /v1/webhooks/{id}/deliveries lists those there are.")
    return row


def list_deliveries(
    session: Session, webhook_id: str, *, limit: int, after: str | None = None, status: str | None = None
) -> Sequence[DeliveryRow]:
    """Newest first. Raises NotFound if there is no such webhook, InvalidRequest for an `after` that is gone."""
    find(session, webhook_id)
    of_webhook = select(DeliveryRow).where(DeliveryRow.webhook_id == webhook_id)
    query = of_webhook.order_by(DeliveryRow.seq.desc()).limit(limit)
    if status is not None:
        query = query.where(DeliveryRow.status == status)
    if after is not None:
        last = session.scalar(of_webhook.where(DeliveryRow.id == after))
        if last is None:
            raise InvalidRequest("`after` names no delivery that exists; list again from the start.")
        query = query.where(DeliveryRow.seq < last.seq)
    return session.scalars(query).all()


def webhooks_with_due(session: Session, *, now: datetime) -> dict[str, str]:
    """Webhooks that have something to be sent now, oldest first: ids, each with its workspace's."""
    some_due = exists_row().where(DeliveryRow.webhook_id == WebhookRow.id, _is_due(now))
    found = session.execute(
        select(WebhookRow.id, WebhookRow.workspace_id).where(WebhookRow.is_enabled, some_due).order_by(WebhookRow.seq)
    )
    return {row.id: row.workspace_id for row in found}


def claim_next(session: Session, webhook_id: str, *, now: datetime) -> Claim | None:
    """Takes the webhook's oldest delivery that is due; None if there is none, or somebody was quicker.

    Whoever took it is to settle it within CLAIM, after which it is due again.
    """
    oldest = (
        select(DeliveryRow.id)
        .join(WebhookRow, WebhookRow.id == DeliveryRow.webhook_id)
        .where(
            DeliveryRow.webhook_id == webhook_id,
            _is_due(now),
            WebhookRow.is_enabled,
        )
        .order_by(DeliveryRow.seq)
        .limit(1)
        .with_for_update(skip_locked=True, of=DeliveryRow)
        .scalar_subquery()
    )
    taken = session.execute(
        update(DeliveryRow)
        .where(DeliveryRow.id == oldest, _is_due(now))
        .values(attempts=DeliveryRow.attempts + 1, next_attempt_at=now + CLAIM)
        .returning(DeliveryRow.id, DeliveryRow.attempts, DeliveryRow.body),
        execution_options={"synchronize_session": False},
    ).first()
    if taken is None:
        return None
    webhook = find(session, webhook_id)
    return Claim(taken.id, taken.attempts, webhook_id, webhook.url, webhook.secret, taken.body)


def settle_delivered(session: Session, claim: Claim, *, response_status: int) -> bool:
    """pending → delivered. Returns whether the claim was still held."""
    return _settle(session, claim, status="delivered", response_status=response_status, error=None, ended_at=utc_now())


def settle_later(session: Session, claim: Claim, *, at: datetime, error: str, response_status: int | None) -> bool:
    """Stays pending, until `at`. error: a sentence of ours."""
    return _settle(session, claim, next_attempt_at=at, response_status=response_status, error=error)


def settle_failed(session: Session, claim: Claim, *, error: str, response_status: int | None) -> bool:
    """pending → failed, for good."""
    return _settle(session, claim, status="failed", response_status=response_status, error=error, ended_at=utc_now())


def turn_off(session: Session, webhook_id: str, reason: str) -> None:
    session.execute(
        update(WebhookRow).where(WebhookRow.id == webhook_id).values(is_enabled=False, disabled_reason=reason),
        execution_options={"synchronize_session": False},
    )


def forget_before(session: Session, moment: datetime) -> int:
    """Removes deliveries of long ago, whatever became of them. Returns how many."""
    return len(
        session.scalars(
            sql_delete(DeliveryRow).where(DeliveryRow.created_at < moment).returning(DeliveryRow.seq),
            execution_options={"synchronize_session": False},
        ).all()
    )


def _is_due(now: datetime) -> ColumnElement[bool]:
    is_time = (DeliveryRow.next_attempt_at <= now) | (DeliveryRow.next_attempt_at > now + LONGEST_WAIT)
    return (DeliveryRow.status == "pending") & is_time


def _settle(session: Session, claim: Claim, **values: Any) -> bool:
    settled = session.scalar(
        update(DeliveryRow)
        .where(
            DeliveryRow.id == claim.delivery_id, DeliveryRow.status == "pending", DeliveryRow.attempts == claim.attempt
        )
        .values(last_attempt_at=utc_now(), **values)
        .returning(DeliveryRow.id),
        execution_options={"synchronize_session": False},
    )
    return settled is not None
