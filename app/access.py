"""API keys and their scopes: who may do what. Knows keys and hashes; not HTTP.

A key looks like `ft_<id>_<secret>_<crc>`: scanners can find a leaked one, a mistyped one fails before the database is
asked, and the row is found by its id, so that only one secret is ever compared.
"""

import hashlib
import ipaddress
import re
import secrets
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from functools import lru_cache

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.db.tables import DEFAULT_WORKSPACE, ApiKeyRow, new_id, utc_now
from app.errors import Misdirected, NotFound, Unauthenticated

# A write per request would cost a disk sync each; a minute is exact enough to see which keys are still in use.
LAST_USED_RESOLUTION = timedelta(minutes=1)

_TOKEN = re.compile(r"ft_([0-9a-f]{30})_([0-9a-f]{64})_([0-9a-f]{8})", re.ASCII)
# RFC 9110, 7.2: a name or an address, of IPv6 in brackets, and perhaps a port.
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([0-9a-z._-]+))(?::[0-9]*)?", re.ASCII)


class Scope(StrEnum):
    """What a key is for. Each includes the ones before it."""

    predict = "predict"  # predictions, and reading models
    train = "train"  # data sets, jobs, models and aliases, and reading all of them
    admin = "admin"  # everything


_RANK = {scope: rank for rank, scope in enumerate(Scope)}


@dataclass(frozen=True)
class Caller:
    """Who makes a request, and for which workspace. key_id is None where no key has been created yet."""

    key_id: str | None
    scopes: frozenset[Scope]
    workspace_id: str = DEFAULT_WORKSPACE

    def may(self, needed: Scope) -> bool:
        return any(_RANK[scope] >= _RANK[needed] for scope in self.scopes)


# Without any key everybody who reaches the server may do everything; `check_listen_address` keeps that to one machine.
ANYONE = Caller(key_id=None, scopes=frozenset({Scope.admin}))


@dataclass(frozen=True)
class NewKey:
    """A key as it is shown once, at its creation."""

    id: str
    token: str


def create_key(
    session: Session, *, scopes: Collection[Scope], name: str | None = None, expires_at: datetime | None = None
) -> NewKey:
    """Creates a key of the session's workspace; from now on every request needs one. Only the hash of its secret is
    kept."""
    if not scopes:
        raise ValueError("a key needs a scope: predict, train or admin")
    key_id = new_id("key")
    secret = secrets.token_hex(32)
    session.add(
        ApiKeyRow(
            id=key_id,
            name=name,
            secret_sha256=_digest(secret),
            scopes=sorted(scopes, key=_RANK.__getitem__),
            expires_at=expires_at,
        )
    )
    session.flush()
    body = f"ft_{key_id.removeprefix('key_')}_{secret}"
    return NewKey(id=key_id, token=f"{body}_{_checksum(body)}")


def list_keys(session: Session) -> list[ApiKeyRow]:
    return list(session.scalars(select(ApiKeyRow).order_by(ApiKeyRow.created_at)))


def find_key(session: Session, key_id: str) -> ApiKeyRow:
    """Raises NotFound."""
    row = session.get(ApiKeyRow, key_id)
    if row is None:
        raise NotFound(f"There is no key {key_id}; `graft keys list` shows them.")
    return row


def revoke_key(session: Session, key_id: str) -> None:
    """Ends a key at once, and for good; the server still asks for one. Raises NotFound."""
    revoked = session.scalars(
        update(ApiKeyRow)
        .where(ApiKeyRow.id == key_id, ApiKeyRow.revoked_at.is_(None))
        .values(revoked_at=utc_now())
        .returning(ApiKeyRow.id)
    ).all()
    if not revoked:
        raise NotFound(f"There is no key {key_id} in use; `graft keys list` shows them.")


def revoke_all(session: Session) -> None:
    """Ends every key of the session's workspace at once."""
    in_use = update(ApiKeyRow).where(ApiKeyRow.revoked_at.is_(None)).values(revoked_at=utc_now())
    session.execute(in_use, execution_options={"synchronize_session": False})


def has_keys(session: Session) -> bool:
    """Whether a key was ever created. Revoked and expired ones count: losing the last key must not open the server."""
    return session.scalar(select(ApiKeyRow.id).limit(1)) is not None


def authenticate(session: Session, authorization: str | None) -> Caller:
    """The caller behind an Authorization header. Raises Unauthenticated; the reason never says which part was wrong."""
    if authorization is None:
        if has_keys(session):
            raise Unauthenticated("Send your API key as `Authorization: Bearer ft_…`.")
        return ANYONE
    if not has_keys(session):
        return ANYONE
    method, _, token = authorization.partition(" ")
    parts = _TOKEN.fullmatch(token.strip()) if method.lower() == "bearer" else None
    if parts is None or _checksum(token.strip().rpartition("_")[0]) != parts[3]:
        raise Unauthenticated("This is not a Graft API key; send `Authorization: Bearer ft_…` as it was shown to you.")
    row = session.get(ApiKeyRow, f"key_{parts[1]}")
    expected = row.secret_sha256 if row else ""
    is_known = secrets.compare_digest(_digest(parts[2]).encode(), expected.encode())
    if row is None or not is_known or row.revoked_at or (row.expires_at and row.expires_at <= utc_now()):
        raise Unauthenticated("This API key is unknown, revoked or expired; ask for a new one.")
    return Caller(row.id, frozenset(Scope(scope) for scope in row.scopes), row.workspace_id)


def is_use_due(session: Session, caller: Caller) -> bool:
    """Whether the key's last use is so long ago that it is worth a write to note this one."""
    if caller.key_id is None:
        return False
    last_used = session.scalar(select(ApiKeyRow.last_used_at).where(ApiKeyRow.id == caller.key_id))
    return last_used is None or utc_now() - last_used > LAST_USED_RESOLUTION


def note_use(session: Session, caller: Caller) -> None:
    session.execute(update(ApiKeyRow).where(ApiKeyRow.id == caller.key_id).values(last_used_at=utc_now()))


def check_listen_address(host: str, *, has_keys: bool) -> None:
    """Raises ValueError where the server would be open to other machines without asking for a key."""
    if has_keys or is_loopback(host):
        return
    raise ValueError(
        f"Graft does not listen on {host or 'every address'} without an API key, since anybody could then use it. "
        "Create one with `graft keys create --scope admin`, or listen on 127.0.0.1."
    )


def check_called_by_its_name(host: str, *, allowed: Collection[str]) -> None:
    """Raises Misdirected where a server that asks for no key is called by a name that may be anybody's.

    Whoever has a name can let it lead to this machine, and their page then reads what our own pages may (DNS
    rebinding). What a request says of its name a browser fills in, and lets no page choose.

    host: the header, with or without a port. allowed: names, in lower case, that lead here for a good reason.
    """
    name = _without_port(host)
    # Nobody can be given an address as a name, nor one without a dot; browsers look those below localhost up nowhere.
    if name in allowed or _address(name) or name.endswith(".localhost") or (name and "." not in name):
        return
    raise Misdirected(
        "Without an API key this server is for its own machine, by names such as localhost. If this name is meant to "
        "lead here, add it to GRAFT_ALLOWED_HOSTS, or make a key with `graft keys create --scope admin`."
    )


def _without_port(host: str) -> str:
    """The name or address in a Host header, in lower case; "" of what is none."""
    found = _HOST.fullmatch(host.lower())
    return (found[1] or found[2]).removesuffix(".") if found else ""


def is_loopback(host: str) -> bool:
    """Whether an address, or name, can be nothing but this machine itself."""
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


@lru_cache(maxsize=64)
def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None of a name, which may resolve to anything."""
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def _digest(secret: str) -> str:
    # A plain hash is enough for 256 random bits; slow hashes are for passwords.
    return hashlib.sha256(secret.encode()).hexdigest()


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"
