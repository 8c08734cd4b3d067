"""Requests that may be sent twice: `Idempotency-Key`, kept for 24 hours in the database, across restarts.

A request first claims its key; what it makes and the end of the claim are one transaction. So a key is either free,
being worked on by one request, or has exactly one resource, whenever a process is killed. What a process that lives is
working on is never forgotten, whatever the clock says; what its process has left, or a dead one, is taken over.
"""

import hashlib
import json
import re
import secrets
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.clock import PatientClock
from app.db.engine import Database
from app.db.tables import IdempotencyRow
from app.errors import Conflict, InvalidRequest
from app.jobs.owner import current_process, is_alive, is_gone

KEPT_FOR = timedelta(hours=24)
# For so long somebody may be at work of whom it cannot be told from here. Longer than most requests take.
UNSURE_FOR = timedelta(minutes=1)

_BARE_KEY = r"[\x21\x23-\x7e]{1,255}"  # visible ASCII but the quotation mark
KEY_PATTERN = rf'^("{_BARE_KEY}"|{_BARE_KEY})$'
_KEY = re.compile(_BARE_KEY)

# The nonces of what requests of this process work under just now.
_in_flight: set[str] = set()


class KeyReused(InvalidRequest):
    code = "idempotency-key-reused"
    title = "The Idempotency-Key belongs to another request"


@dataclass(frozen=True)
class Claim:
    """A key that this request works under; `answered` if an earlier one has finished under it."""

    scope: str
    key: str
    nonce: str = ""  # of this claim; with the owner in the row
    answered: dict[str, Any] | None = None  # the body first answered
    fingerprint: str | None = None  # of the request that was answered


def fingerprint(*parts: Any) -> str:
    """SHA-256 of what makes two requests the same. parts: JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def parse_key(header: str | None) -> str | None:
    """The key in a header, which may be quoted (it is a structured-field string) or bare. Raises InvalidRequest."""
    if header is None:
        return None
    key = header.strip()
    if len(key) >= 2 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if not _KEY.fullmatch(key):
        raise InvalidRequest(
            "Idempotency-Key must be 1 to 255 visible ASCII characters other than quotation marks, or that in quotes."
        )
    return key


def begin(database: Database, clock: PatientClock, *, scope: str, key: str) -> Claim:
    """Claims the key, or finds what was answered under it.

    scope: what keys are unique within: API key, method and path.
    Raises Conflict while another living request works under the key; what a dead one has left is taken over, and what
    may be either, once it is older than UNSURE_FOR. Whoever gets a claim that is not answered ends it with `finish` or
    `release`.
    """
    nonce = secrets.token_hex(8)
    try:
        with database.write() as session:
            _forget_old(session, clock)
            row = session.get(IdempotencyRow, (scope, key), with_for_update=True)
            if row is None:
                row = IdempotencyRow(scope=scope, key=key)
                session.add(row)
            elif row.response is not None:
                return Claim(scope, key, answered=row.response, fingerprint=row.fingerprint)
            elif not _may_be_taken_over(row, clock):
                raise _in_progress()
            row.owner, row.created_at = {**current_process(), "nonce": nonce}, clock.date()
            _in_flight.add(nonce)
    except BaseException as error:
        _in_flight.discard(nonce)
        if isinstance(error, IntegrityError):  # another request inserted the same key between our look and our insert
            raise _in_progress() from None
        raise
    return Claim(scope, key, nonce)


def check_same(claim: Claim, fingerprint: str) -> None:
    """Raises KeyReused if the key was answered for another request."""
    if claim.answered is not None and claim.fingerprint != fingerprint:
        raise KeyReused(
            "This Idempotency-Key was used for another request within the last 24 hours; use a new key for a new "
            "request, or repeat the first one unchanged."
        )


def finish(session: Session, claim: Claim, *, fingerprint: str, resource_id: str, response: dict[str, Any]) -> None:
    """Stores the answer, in the transaction that makes the resource. Raises Conflict if another has answered.

    Of two at work, because one took over what the other had not left, the first to come here has the key; the other
    makes nothing, and is answered the same when it asks again. If only the later claim counted, who repeats a long
    upload every minute would never get through.
    """
    changed = session.scalars(
        update(IdempotencyRow)
        .where(*_is_unanswered(claim))
        .values(fingerprint=fingerprint, resource_id=resource_id, response=response)
        .returning(IdempotencyRow.key)
    ).all()
    # From here on the transaction has the row: whoever asks waits for its end, and then finds the answer or none.
    _in_flight.discard(claim.nonce)
    if not changed:
        raise Conflict(
            "Another request has been answered under this Idempotency-Key meanwhile, or the key was freed; send this "
            "one again to get its answer.",
            code="request-in-progress",
            retry_after_seconds=1,
        )


def release(database: Database, claim: Claim) -> None:
    """Frees the key of a request that made nothing, so that it can be sent again.

    Raises Overloaded without the database; then whoever sends it again takes the key over.
    """
    _in_flight.discard(claim.nonce)
    is_ours = IdempotencyRow.owner["nonce"].as_string() == claim.nonce  # and not of who has taken it over
    with database.write() as session:
        session.execute(delete(IdempotencyRow).where(*_is_unanswered(claim), is_ours))


def _is_unanswered(claim: Claim) -> tuple[ColumnElement[bool], ...]:
    return (
        IdempotencyRow.scope == claim.scope,
        IdempotencyRow.key == claim.key,
        IdempotencyRow.resource_id.is_(None),
    )


def _forget_old(session: Session, clock: PatientClock) -> None:
    is_old = IdempotencyRow.created_at < clock.before(KEPT_FOR)
    session.execute(delete(IdempotencyRow).where(is_old, IdempotencyRow.resource_id.is_not(None)))
    for scope, key, owner in session.execute(
        select(IdempotencyRow.scope, IdempotencyRow.key, IdempotencyRow.owner).where(is_old)
    ).all():
        if not is_alive(owner) or _was_left_here(owner):
            # If it is still that old one: another request may have claimed the key anew.
            session.execute(
                delete(IdempotencyRow).where(IdempotencyRow.scope == scope, IdempotencyRow.key == key, is_old)
            )


def _may_be_taken_over(row: IdempotencyRow, clock: PatientClock) -> bool:
    if is_alive(row.owner):
        return _was_left_here(row.owner)
    # Of another machine's process, or one from before a boot or in a container that is no more, it cannot be told
    # whether it is gone. Where it is still at work the work is done twice, and kept once: see `finish`.
    return is_gone(row.owner) or row.created_at < clock.before(UNSURE_FOR)


def _was_left_here(owner: dict[str, Any]) -> bool:
    """Whether a request of this process claimed it, and has ended: the database was away when it was to be released."""
    return current_process().items() <= owner.items() and owner.get("nonce") not in _in_flight


def _in_progress() -> Conflict:
    return Conflict(
        "A request with this Idempotency-Key is still being worked on; repeat it in a second to get its answer.",
        code="request-in-progress",
        retry_after_seconds=1,
    )
