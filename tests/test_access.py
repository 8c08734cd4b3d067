"""API keys: created once, checked on every request, ended at once."""

from datetime import timedelta

import pytest

from app import access
from app.access import ANYONE, Caller, Scope
from app.db.engine import Database
from app.db.tables import ApiKeyRow, utc_now
from app.errors import NotFound, Unauthenticated


def create(database: Database, *scopes: Scope, **options: object) -> access.NewKey:
    with database.write() as session:
        return access.create_key(session, scopes=scopes, **options)  # type: ignore[arg-type]


def authenticate(database: Database, authorization: str | None) -> Caller:
    with database.read() as session:
        return access.authenticate(session, authorization)


def test_without_any_key_everybody_may_do_everything(database: Database) -> None:
    assert authenticate(database, None) == ANYONE
    assert ANYONE.may(Scope.admin)


def test_key_is_known_by_its_token(database: Database) -> None:
    key = create(database, Scope.train)

    assert authenticate(database, f"Bearer {key.token}") == Caller(key.id, frozenset({Scope.train}))
    assert authenticate(database, f"bearer  {key.token} ").key_id == key.id


def test_token_has_the_form_that_scanners_look_for(database: Database) -> None:
    key = create(database, Scope.predict)
    prefix, key_id, secret, checksum = key.token.split("_")

    assert (prefix, f"key_{key_id}", len(secret), len(checksum)) == ("ft", key.id, 64, 8)


def test_only_the_hash_of_the_secret_is_kept(database: Database) -> None:
    key = create(database, Scope.predict)
    with database.read() as session:
        row = session.get(ApiKeyRow, key.id)
        assert row is not None
        stored = " ".join(str(value) for value in vars(row).values())

    assert key.token.split("_")[2] not in stored


def test_once_a_key_exists_a_request_without_one_is_refused(database: Database) -> None:
    create(database, Scope.predict)

    with pytest.raises(Unauthenticated, match="Authorization: Bearer"):
        authenticate(database, None)


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer ", "Basic YTpi", "Bearer ft_x_y_z", "Bearer ключ", "Bearer ft_" + "0" * 30 + "_" + "0" * 64],
)
def test_what_is_no_key_is_refused(database: Database, authorization: str) -> None:
    create(database, Scope.predict)

    with pytest.raises(Unauthenticated):
        authenticate(database, authorization)


def test_key_with_another_secret_is_refused(database: Database) -> None:
    key, other = create(database, Scope.predict), create(database, Scope.predict)
    forged = "_".join(["ft", key.token.split("_")[1], other.token.split("_")[2]])

    with pytest.raises(Unauthenticated, match="unknown, revoked or expired"):
        authenticate(database, f"Bearer {forged}_{access._checksum(forged)}")


def test_mistyped_key_is_told_from_an_unknown_one(database: Database) -> None:
    token = create(database, Scope.predict).token
    mistyped = token[:-9] + ("0" if token[-9] == "_" else "1") + token[-8:]

    with pytest.raises(Unauthenticated, match="not a Graft API key"):
        authenticate(database, f"Bearer {mistyped}")


def test_revoked_key_is_refused_and_leaves_the_server_closed(database: Database) -> None:
    key = create(database, Scope.admin)
    with database.write() as session:
        access.revoke_key(session, key.id)

    with pytest.raises(Unauthenticated, match="unknown, revoked or expired"):
        authenticate(database, f"Bearer {key.token}")
    with pytest.raises(Unauthenticated):
        authenticate(database, None)


def test_revoking_twice_says_that_there_is_none(database: Database) -> None:
    key = create(database, Scope.admin)
    with database.write() as session:
        access.revoke_key(session, key.id)

    with pytest.raises(NotFound), database.write() as session:
        access.revoke_key(session, key.id)


def test_expired_key_is_refused(database: Database) -> None:
    expired = create(database, Scope.admin, expires_at=utc_now() - timedelta(seconds=1))
    valid = create(database, Scope.admin, expires_at=utc_now() + timedelta(hours=1))

    assert authenticate(database, f"Bearer {valid.token}").key_id == valid.id
    with pytest.raises(Unauthenticated):
        authenticate(database, f"Bearer {expired.token}")


def test_use_is_noted_at_most_once_a_minute(database: Database) -> None:
    caller = authenticate(database, f"Bearer {create(database, Scope.predict).token}")
    with database.write() as session:
        is_due_before = access.is_use_due(session, caller)
        access.note_use(session, caller)
        is_due_after = access.is_use_due(session, caller)

    assert (is_due_before, is_due_after) == (True, False)


@pytest.mark.parametrize(
    ("scope", "allowed"),
    [
        (Scope.predict, {Scope.predict}),
        (Scope.train, {Scope.predict, Scope.train}),
        (Scope.admin, {Scope.predict, Scope.train, Scope.admin}),
    ],
)
def test_each_scope_includes_the_smaller_ones(scope: Scope, allowed: set[Scope]) -> None:
    caller = Caller("key_1", frozenset({scope}))

    assert {needed for needed in Scope if caller.may(needed)} == allowed


def test_key_without_a_scope_is_not_created(database: Database) -> None:
    with pytest.raises(ValueError, match="needs a scope"):
        create(database)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "[::1]", "localhost", "127.8.0.1"])
def test_loopback_needs_no_key(host: str) -> None:
    access.check_listen_address(host, has_keys=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "", "example.org"])
def test_other_addresses_need_a_key(host: str) -> None:
    access.check_listen_address(host, has_keys=True)
    with pytest.raises(ValueError, match="graft keys create"):
        access.check_listen_address(host, has_keys=False)
