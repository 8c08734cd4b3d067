"""Webhooks: what happens reaches a real receiver, signed, at least once; and nothing reaches anywhere else."""

import contextlib
import io
import random
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import api_builders
import hook_receiver
import httpx
import pytest
from api_builders import RunningServer, assert_is_problem
from hook_receiver import Receiver
from sqlalchemy import text as sql
from sqlalchemy import update
from test_models_and_operations import create_key

from app import logs, registry, webhooks, workspaces
from app.access import Scope
from app.api import webhook_dispatch
from app.api.webhook_dispatch import Line
from app.db.engine import Database
from app.db.tables import DEFAULT_WORKSPACE, DeliveryRow, utc_now
from app.jobs import queue
from app.jobs.states import JobKind
from app.settings import Settings
from app.workspaces import Limits

ON = {"webhooks": True, "webhook_networks": ["127.0.0.0/8"]}


def settings_for(folder: Path, **changes: Any) -> Settings:
    return api_builders.settings_for(folder, **{**ON, **changes})


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with api_builders.running(settings_for(tmp_path)) as server:
        yield server


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


def create(client: httpx.Client, receiver: Receiver, **fields: Any) -> str:
    """Returns the webhook's path."""
    answer = client.post("/v1/webhooks", json={"url": receiver.url, **fields})
    assert answer.status_code == 201, answer.text
    receiver.secret = answer.json()["secret"]
    return str(answer.headers["location"])


def deliveries(client: httpx.Client, path: str, **query: Any) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = client.get(f"{path}/deliveries", params={"limit": 200, **query}).json()["data"]
    return listed


def pass_time(server: RunningServer) -> None:
    """Everything that waits for its next attempt is due."""
    with server.services.database.write() as session:
        session.execute(update(DeliveryRow).values(next_attempt_at=utc_now() - timedelta(seconds=1)))


def point(server: RunningServer, name: str, model: str) -> None:
    with server.services.database.write() as session:
        registry.point_alias(session, name, model)


def test_secret_is_shown_once_and_never_written_to_the_log(
    tmp_path: Path, receiver: Receiver, printed: io.StringIO
) -> None:
    with api_builders.running(settings_for(tmp_path)) as server, api_builders.client_of(server) as client:
        path = create(client, receiver, events=["alias.changed", "job.failed", "job.failed"])
        webhook = client.get(path).json()

        assert webhook == client.get("/v1/webhooks").json()["data"][0]
        assert (webhook["url"], webhook["enabled"]) == (receiver.url, True)
        assert webhook["events"] == ["job.failed", "alias.changed"]
        assert receiver.secret.startswith("whsec_")
        receiver.answers = [hook_receiver.status(500)]
        client.post(f"{path}/test", params={"wait": 30})
        said = client.get(path).text + client.get(f"{path}/deliveries").text
    for text in (said, printed.getvalue()):
        assert receiver.secret.removeprefix("whsec_") not in text


def test_secret_is_not_in_the_log_if_the_database_does_not_take_it(
    any_server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(any_server.services.settings)
    with any_server.services.database.migration() as connection:
        connection.execute(sql("ALTER TABLE webhooks DROP COLUMN url"))
    with api_builders.client_of(any_server) as client:
        assert client.post("/v1/webhooks", json={"url": "https://example.com/"}).status_code == 500
    printed = capsys.readouterr().err
    assert "INSERT INTO webhooks" in printed
    assert "whsec_" not in printed


def test_what_happens_is_told_signed_and_in_order(
    server: RunningServer, client: httpx.Client, receiver: Receiver
) -> None:
    path = create(client, receiver)
    first, second = (api_builders.register_model(server.services, aliases=(), seed=seed) for seed in (1, 2))
    client.put("/v1/aliases/best", json={"model": first})
    client.put("/v1/aliases/best", json={"model": first})  # changes nothing
    client.put("/v1/aliases/best", json={"model": second})
    client.delete("/v1/aliases/best")
    dataset = api_builders.ready_dataset(server.services.database)
    request = {"dataset": dataset, "method": "from_scratch", "backbone": "squeezenet1_1"}
    job = client.post("/v1/jobs", json=request).json()["id"]
    client.post(f"/v1/jobs/{job}/cancel")

    told = receiver.wait_for(6)

    said = [(payload["type"], payload["data"].get("model"), payload["data"].get("previous_model")) for payload in told]
    assert said == [
        ("model.registered", None, None),
        ("model.registered", None, None),
        ("alias.changed", first, None),
        ("alias.changed", second, first),
        ("alias.changed", None, second),
        ("job.cancelled", None, None),
    ]
    assert [payload["data"]["id"] for payload in told if payload["type"] != "alias.changed"] == [first, second, job]
    assert told[-1]["data"] == {"id": job, "object": "job", "status": "cancelled"}
    headers = [headers for headers, _ in receiver.requests]
    assert [sent["webhook-id"] for sent in headers] == [payload["id"] for payload in told]
    assert {sent["content-type"] for sent in headers} == {"application/json"}
    api_builders.wait_for(lambda: {each["status"] for each in deliveries(client, path)} == {"delivered"})
    assert [each["payload"] for each in reversed(deliveries(client, path))] == told


def test_only_what_is_wanted_is_told(server: RunningServer, client: httpx.Client, receiver: Receiver) -> None:
    path = create(client, receiver, events=["alias.changed"])
    off = create(client, receiver, enabled=False)
    model = api_builders.register_model(server.services, aliases=("default",))

    assert [each["event"] for each in deliveries(client, path)] == ["alias.changed"]
    assert deliveries(client, off) == []
    assert model


def test_what_did_not_happen_is_not_told(server: RunningServer, client: httpx.Client, receiver: Receiver) -> None:
    path = create(client, receiver)
    model = api_builders.register_model(server.services, aliases=())
    with contextlib.suppress(ZeroDivisionError), server.services.database.write() as session:
        registry.point_alias(session, "best", model)
        raise ZeroDivisionError

    assert [each["event"] for each in deliveries(client, path)] == ["model.registered"]


def test_job_is_told_of_from_its_start_to_its_end(
    server: RunningServer, client: httpx.Client, receiver: Receiver
) -> None:
    path = create(client, receiver)
    with server.services.database.write() as session:
        for kind in JobKind:
            queue.submit(session, kind=kind, dataset_id="ds_1", spec={})
    with server.services.database.write() as session:
        claims = {kind: queue.claim_next(session, kind=kind, worker_id="w", owner={}) for kind in JobKind}
        training, batch, ingest = (claims[kind] for kind in (JobKind.training, JobKind.prediction, JobKind.ingest))
        assert training and batch and ingest
        queue.crashed(session, training, "It died.", max_crashes=3)
        again = queue.claim_next(session, kind=JobKind.training, worker_id="w", owner={})
        assert again
        queue.succeed(session, again, model_id="mdl_1")
        queue.fail(session, batch, {"code": "x", "detail": "y"})
        queue.succeed(session, ingest)

    told = [each["payload"] for each in reversed(deliveries(client, path))]

    said = [(payload["type"], payload["data"].get("attempt"), payload["data"].get("model")) for payload in told]
    assert sorted(said[:2]) == [("batch.started", 1, None), ("job.started", 1, None)]
    assert said[2:] == [
        ("job.started", 2, None),
        ("job.succeeded", None, "mdl_1"),
        ("batch.failed", None, None),
    ]
    assert told[-1]["data"]["error"] == {"code": "x", "detail": "y"}


def test_test_delivery_says_what_came_of_it(server: RunningServer, client: httpx.Client, receiver: Receiver) -> None:
    path = create(client, receiver, events=["job.failed"])

    answer = client.post(f"{path}/test", params={"wait": 30})

    delivery = answer.json()
    assert (answer.status_code, delivery["status"], delivery["response_status"]) == (201, "delivered", 204)
    assert (delivery["attempts"], delivery["error"], delivery["event"]) == (1, None, "webhook.test")
    assert receiver.verified() == [delivery["payload"]]


def test_failed_delivery_is_tried_again_under_the_same_id(
    server: RunningServer, client: httpx.Client, receiver: Receiver
) -> None:
    path = create(client, receiver)
    receiver.answers = [hook_receiver.status(500), hook_receiver.status(302, Location=receiver.url), receiver.hang]
    said = []
    delivery = client.post(f"{path}/test", params={"wait": 30}).json()
    for _ in range(3):
        said.append((delivery["status"], delivery["response_status"], delivery["error"]))
        pass_time(server)
        delivery = next_attempt(client, path, delivery)
    said.append((delivery["status"], delivery["response_status"], delivery["error"]))

    assert said == [
        ("pending", 500, "The receiver answered with 500."),
        ("pending", 302, "The receiver answered with 302."),
        ("pending", None, "The receiver cannot be reached: there was no answer within 5 s."),
        ("delivered", 204, None),
    ]
    assert len(receiver.verified()) == 4
    assert len({headers["webhook-id"] for headers, _ in receiver.requests}) == 1
    assert len({body for _, body in receiver.requests}) == 1


def next_attempt(client: httpx.Client, path: str, before: dict[str, Any]) -> dict[str, Any]:
    """The only delivery, once another attempt has ended."""
    api_builders.wait_for(lambda: deliveries(client, path)[0]["last_attempt_at"] != before["last_attempt_at"])
    return deliveries(client, path)[0]


@pytest.mark.slow
def test_delivery_is_given_up_after_about_a_day(
    server: RunningServer, client: httpx.Client, receiver: Receiver
) -> None:
    path = create(client, receiver)
    receiver.answers = [hook_receiver.status(500)] * 100
    client.post(f"{path}/test")

    def give_up() -> bool:
        pass_time(server)
        return bool(deliveries(client, path)[0]["status"] == "failed")

    api_builders.wait_for(give_up)

    [delivery] = deliveries(client, path, status="failed")
    assert (delivery["attempts"], delivery["next_attempt_at"]) == (webhook_dispatch.MAX_ATTEMPTS, None)
    assert len(receiver.requests) == webhook_dispatch.MAX_ATTEMPTS
    assert client.get(path).json()["enabled"] is True


def test_pauses_grow_to_about_a_day_and_heed_the_receiver() -> None:
    chance = random.Random(0)
    days = [
        sum(webhook_dispatch.pause_seconds(n, retry_after_seconds=None, chance=chance) for n in range(1, 11)) / 86400
        for _ in range(1000)
    ]
    assert min(days) > 0.75
    assert max(days) < 1.4
    first = {webhook_dispatch.pause_seconds(1, retry_after_seconds=None, chance=chance) for _ in range(1000)}
    assert 3.75 <= min(first) < 3.8
    assert 6.2 < max(first) <= 6.25
    assert webhook_dispatch.pause_seconds(1, retry_after_seconds=900, chance=chance) == 900
    assert webhook_dispatch.pause_seconds(1, retry_after_seconds=10**9, chance=chance) == 6 * 3600


def test_receiver_that_wants_no_more_turns_its_webhook_off(
    server: RunningServer, client: httpx.Client, receiver: Receiver
) -> None:
    path = create(client, receiver)
    receiver.answers = [hook_receiver.status(410)]

    delivery = client.post(f"{path}/test", params={"wait": 30}).json()

    assert (delivery["status"], delivery["response_status"]) == ("failed", 410)
    webhook = client.get(path).json()
    assert (webhook["enabled"], webhook["disabled_reason"]) == (
        *(False, "The receiver answered with 410: it wants no more."),
    )
    assert_is_problem(client.post(f"{path}/test"), 409, "webhook-off")
    api_builders.register_model(server.services)
    assert len(deliveries(client, path)) == 1
    again = client.patch(path, json={"enabled": True}).json()
    assert (again["enabled"], again["disabled_reason"]) == (True, None)
    assert client.post(f"{path}/test", params={"wait": 30}).json()["status"] == "delivered"


def test_receiver_that_hangs_delays_nobody_else(
    server: RunningServer, client: httpx.Client, receiver: Receiver
) -> None:
    with Receiver() as hanging:
        hanging.answers = [hanging.hang] * 100
        create(client, hanging)
        create(client, receiver)
        model = api_builders.register_model(server.services, aliases=())
        began = time.monotonic()
        for index in range(20):
            point(server, f"alias{index}", model)

        receiver.wait_for(21)

        assert len(hanging.requests) <= 1 + (time.monotonic() - began) / 5


@pytest.mark.usefixtures("printed")
def test_workspace_whose_receivers_all_hang_delays_no_other(server: RunningServer, receiver: Receiver) -> None:
    whole: Database = server.app.state.services.database
    with whole.write() as session:
        theirs = workspaces.create(session, "theirs", Limits()).id
    with Receiver() as hanging:
        hanging.answers = [hanging.hang] * 1000
        for workspace_id, url, count in ((DEFAULT_WORKSPACE, hanging.url, 40), (theirs, receiver.url, 1)):
            with whole.within(workspace_id).write() as session:
                for _ in range(count):
                    webhooks.create(session, url=url, events=["alias.changed"], is_enabled=True)
        with whole.write() as session:
            for _ in range(5):
                webhooks.emit(session, "alias.changed", {}, workspace_id=DEFAULT_WORKSPACE)
        most = webhook_dispatch.PARALLEL_OF_WORKSPACE
        api_builders.wait_for(lambda: len(hanging.requests) == most)
        with whole.write() as session:
            webhooks.emit(session, "alias.changed", {}, workspace_id=theirs)

        api_builders.wait_for(lambda: len(receiver.requests) == 1)

        with whole.read() as session:
            failed = session.query(DeliveryRow).where(DeliveryRow.error.is_not(None)).count()
        assert failed == 0, "it has waited for the end of an attempt"
        assert len(hanging.requests) == most


def test_each_webhook_of_a_workspace_has_a_turn_before_another_has_two() -> None:
    line = Line()
    for number in range(40):
        line.join(f"wh_{number}", "ws_1")

    turns = []
    for _ in range(80):
        begun = line.begin_next()
        assert begun is not None
        turns.append(begun[0])
        line.join(*begun)  # found due while it is sent to: it is not sent to twice at a time
        line.end(begun[0])
        line.join(*begun)

    assert turns == [f"wh_{number}" for number in range(40)] * 2


def line_of(num_workspaces: int) -> Line:
    """A hundred webhooks of each wait."""
    line = Line()
    for number in range(100 * num_workspaces):
        line.join(f"wh_{number}", f"ws_{number // 100}")
    return line


def begin_all(line: Line) -> list[tuple[str, str]]:
    """The turns that may begin: webhooks, and the number of the workspace of each."""
    return list(iter(line.begin_next, None))


def numbers(begun: Sequence[tuple[str, str]]) -> list[int]:
    return [int(workspace_id.removeprefix("ws_")) for _, workspace_id in begun]


def test_workspaces_share_the_slots_and_none_has_all() -> None:
    line = line_of(num_workspaces=3)
    begun = begin_all(line)

    assert numbers(begin_all(line_of(num_workspaces=1))) == [0] * webhook_dispatch.PARALLEL_OF_WORKSPACE
    assert numbers(begun) == [0, 1, 2] * 10 + [0, 1]
    line.join("wh_late", "ws_late")
    line.end(begun[0][0])
    assert line.begin_next() == ("wh_late", "ws_late")


def test_workspaces_of_which_there_are_more_than_slots_take_turns() -> None:
    line = line_of(num_workspaces=40)
    begun = []
    for _ in range(5):
        turns = begin_all(line)
        begun += numbers(turns)
        for webhook_id, workspace_id in turns:
            line.end(webhook_id)
            line.join(webhook_id, workspace_id)

    assert begun == [*range(40)] * 4


@pytest.mark.slow
def test_several_processes_send_each_delivery_once(tmp_path: Path, receiver: Receiver) -> None:
    settings = settings_for(tmp_path)
    with (
        api_builders.running(settings) as server,
        RunningServer(settings) as second,
        RunningServer(settings) as third,
        api_builders.client_of(server) as client,
    ):
        path = create(client, receiver)
        model = api_builders.register_model(server.services, aliases=())
        for index in range(100):
            point((server, second, third)[index % 3], f"alias{index}", model)

        api_builders.wait_for(lambda: {each["status"] for each in deliveries(client, path)} == {"delivered"})

        assert len(receiver.requests) == 101
        assert len({payload["id"] for payload in receiver.verified()}) == 101
        assert {each["attempts"] for each in deliveries(client, path)} == {1}


def test_delivery_of_a_process_that_died_is_sent_by_the_next(
    server: RunningServer, client: httpx.Client, receiver: Receiver
) -> None:
    path = create(client, receiver)
    with server.services.database.write() as session:
        # Claimed before the server looks, by somebody who never comes back.
        delivery = webhooks.emit_test(session, path.rpartition("/")[2])
        claim = webhooks.claim_next(session, delivery.webhook_id, now=utc_now())
    assert claim is not None
    assert (claim.attempt, receiver.secret in repr(claim)) == (1, False)
    assert client.get(f"{path}/deliveries").json()["data"][0]["status"] == "pending"
    assert receiver.requests == []

    pass_time(server)

    [payload] = receiver.wait_for(1)
    assert payload["id"] == delivery.id
    api_builders.wait_for(lambda: deliveries(client, path)[0]["status"] == "delivered")
    # Who lost the claim can write nothing.
    with server.services.database.write() as session:
        assert not webhooks.settle_failed(session, claim, error="late", response_status=None)
    assert deliveries(client, path)[0]["attempts"] == 2


def test_name_that_leads_inside_is_refused_at_the_time_of_sending(tmp_path: Path) -> None:
    async def rebound(host: str, port: int) -> Sequence[str]:
        return ["127.0.0.1"]

    with Receiver() as victim:
        settings = settings_for(tmp_path, webhook_networks=[])
        with api_builders.running(settings, resolve=rebound) as server, api_builders.client_of(server) as client:
            answer = client.post("/v1/webhooks", json={"url": f"https://hooks.example:{victim.port}/"})
            assert answer.status_code == 201

            delivery = client.post(f"{answer.headers['location']}/test", params={"wait": 30}).json()

            assert delivery["error"] == "The webhook's URL may not be sent to: the host's address is not public."
            assert delivery["status"] == "pending"
        assert victim.requests == []


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"url": 5},
        {"url": ""},
        {"url": "http://8.8.8.8/"},
        {"url": "https://10.0.0.1/"},
        {"url": "https://u:p@example.com/"},
        {"url": "https://example.com/", "events": []},
        {"url": "https://example.com/", "events": ["job.exploded"]},
        {"url": "https://example.com/", "enabled": "perhaps"},
        {"url": "https://example.com/", "enabled": 0},
        {"url": "https://example.com/", "secret": "mine"},
    ],
)
def test_webhook_that_cannot_be_is_refused(client: httpx.Client, body: dict[str, Any]) -> None:
    assert_is_problem(client.post("/v1/webhooks", json=body), 422, "invalid-request")
    assert client.get("/v1/webhooks").json()["data"] == []


def test_webhook_is_changed_and_deleted_with_its_deliveries(
    server: RunningServer, client: httpx.Client, receiver: Receiver
) -> None:
    path = create(client, receiver)
    assert_is_problem(client.patch(path, json={"url": "https://10.0.0.1/"}), 422, "invalid-request")
    changed = client.patch(path, json={"url": f"{receiver.url}&c", "events": ["job.failed"]}).json()
    assert (changed["url"], changed["events"], changed["enabled"]) == (f"{receiver.url}&c", ["job.failed"], True)
    client.post(f"{path}/test", params={"wait": 30})

    assert client.delete(path).json()["deleted"] is True

    for answer in (
        client.get(path),
        client.delete(path),
        client.get(f"{path}/deliveries"),
        client.post(f"{path}/test"),
    ):
        assert_is_problem(answer, 404, "not-found")
    with server.services.database.read() as session:
        assert session.query(DeliveryRow).count() == 0


def test_there_is_a_most_of_webhooks(client: httpx.Client, receiver: Receiver) -> None:
    for _ in range(webhooks.MAX_WEBHOOKS):
        create(client, receiver, enabled=False)

    assert_is_problem(client.post("/v1/webhooks", json={"url": receiver.url}), 409, "too-many-webhooks")
    pages, after = 0, ""
    while True:
        page = client.get("/v1/webhooks", params={"limit": 40, "after": after}).json()
        pages, after = pages + 1, page["last_id"]
        if not page["has_more"]:
            break
    assert pages == 3


def test_old_deliveries_are_forgotten(server: RunningServer, client: httpx.Client, receiver: Receiver) -> None:
    path = create(client, receiver)
    for _ in range(2):
        client.post(f"{path}/test", params={"wait": 30})
    with server.services.database.write() as session:
        old = utc_now() - webhooks.KEPT_FOR - timedelta(minutes=1)
        newest = deliveries(client, path)[0]["id"]
        session.execute(update(DeliveryRow).where(DeliveryRow.id != newest).values(created_at=old))
    with server.services.database.write() as session:
        assert webhooks.forget_before(session, utc_now() - webhooks.KEPT_FOR) == 1
    assert [each["id"] for each in deliveries(client, path)] == [newest]


def test_webhooks_are_off_until_the_operator_turns_them_on(tmp_path: Path, receiver: Receiver) -> None:
    with api_builders.running(api_builders.settings_for(tmp_path)) as server, api_builders.client_of(server) as client:
        for answer in (client.get("/v1/webhooks"), client.post("/v1/webhooks", json={"url": receiver.url})):
            assert_is_problem(answer, 403, "webhooks-are-off")


def test_webhooks_need_an_admin(server: RunningServer, client: httpx.Client, receiver: Receiver) -> None:
    admin, trainer = create_key(server, Scope.admin), create_key(server, Scope.train)
    path = client.post("/v1/webhooks", json={"url": receiver.url}, headers=admin).headers["location"]
    for method, address in (
        *(("GET", "/v1/webhooks"), ("POST", "/v1/webhooks"), ("GET", path), ("PATCH", path), ("DELETE", path)),
        *(("POST", f"{path}/test"), ("GET", f"{path}/deliveries")),
    ):
        assert client.request(method, address, headers=trainer).status_code == 403
        assert client.request(method, address).status_code == 401
    assert client.get(path, headers=admin).status_code == 200
