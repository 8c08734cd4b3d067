"""Workspaces at the door: a stranger finds nothing, a quota holds whatever comes at once, changes are written down."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import api_builders
import builders
import httpx
import pytest
from api_builders import CLASSES, RunningServer, assert_is_problem

from app import access, workspaces
from app.access import Scope
from app.api.services import Services
from app.api.traffic import WRONG_KEYS_PER_MINUTE, Throttle
from app.db.engine import Database
from app.db.tables import new_id
from app.jobs import queue
from app.jobs.states import JobKind
from app.workspaces import Limits, Workspace

NO_LIMITS = Limits()
TUS = {"Tus-Resumable": "1.0.0"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with api_builders.running(api_builders.settings_for(tmp_path, webhooks=True)) as server:
        yield server


def key_for(server: RunningServer, workspace: str, *, scope: Scope = Scope.admin, limits: Limits = NO_LIMITS) -> str:
    """A new workspace's key, or one more of the first workspace's."""
    whole: Database = server.app.state.services.database
    database = server.services.database
    if workspace != "default":
        with whole.write() as session:
            database = whole.within(workspaces.create(session, workspace, limits).id)
    with database.write() as session:
        return access.create_key(session, scopes=[scope]).token


def services_within(server: RunningServer, name: str) -> Services:
    with server.services.database.read() as session:
        return server.services_of(Workspace.of(workspaces.find_by_name(session, name), NO_LIMITS))


@contextmanager
def client_with(server: RunningServer, key: str) -> Iterator[httpx.Client]:
    with api_builders.client_of(server, headers={"Authorization": f"Bearer {key}"}) as client:
        yield client


def everything(server: RunningServer, own: httpx.Client, *, workspace: str = "default") -> dict[str, str]:
    """One of each kind, of a workspace whose key the client has: by the names of the parameters that paths have for
    it."""
    services = services_within(server, workspace)
    dataset = api_builders.ready_dataset(services.database)
    model = api_builders.register_model(services, dataset_id=dataset)
    with services.database.write() as session:
        spec = {"size_bytes": 1, "top_k": 1, "files": 1, "sha256": "0" * 64}
        batch = new_id("batch")
        queue.submit(session, kind=JobKind.prediction, dataset_id="", model_id=model, spec=spec, job_id=batch)
    job = own.post("/v1/jobs", json={"dataset": dataset}).json()["id"]
    upload = own.post("/v1/uploads", headers=TUS | {"Upload-Length": "1000"})
    webhook = own.post("/v1/webhooks", json={"url": "https://example.org/"})
    kept = own.post("/predict", params={"store": True}, content=builders.jpeg())
    return {
        "dataset_id": dataset,
        "file_id": dataset,
        "job_id": job,
        "model": model,
        "name": model,
        "batch_id": batch,
        "prediction_id": kept.json()["predictions"][0]["id"],
        "upload_id": upload.json()["id"],
        "webhook_id": webhook.json()["id"],
        "image_id": "0" * 16,
        "version": "1",
    }


def body_of(path: str, ids: dict[str, str]) -> dict[str, Any]:
    """What a request needs besides its path to be refused for no other reason."""
    if path.endswith("/infer"):
        inputs = [{"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": ["aGVsbG8="]}]
        return {"json": {"inputs": inputs}}
    if path.startswith("/v1/uploads"):
        return {"headers": TUS | {"Upload-Offset": "0", "Content-Type": "application/offset+octet-stream"}}
    if path.endswith("/export"):
        return {"params": {"format": "safetensors"}}
    if path.endswith(("/classes", "/personalise")):
        field = {"name": "new"} if path.endswith("/classes") else {"label": CLASSES[0]}
        return {"files": {"file": ("a.jpg", builders.jpeg())}, "data": field}
    return {
        "/hf/{model}": {"content": builders.jpeg()},
        "/v1/predictions/{prediction_id}/feedback": {"json": {"label": CLASSES[0]}},
        "/v1/datasets/{dataset_id}/versions": {"json": {}},
        "/v1/webhooks/{webhook_id}": {"json": {}},
        "/v1/aliases/{name}": {"json": {"model": ids["model"]}},
    }.get(path, {})


def without_ids(text: str) -> str:
    return re.sub(r"(ds|job|mdl|batch|prd|up|wh)_[0-9a-f]{30}|\"request_id\": \"[^\"]*\"", "…", text)


def test_a_stranger_finds_at_no_path_what_another_workspace_has(server: RunningServer) -> None:
    with client_with(server, key_for(server, "default")) as own, client_with(server, key_for(server, "other")) as other:
        ids = everything(server, own)
        unknown = {name: re.sub("[0-9a-f]{30}", "0" * 30, value) for name, value in ids.items()}
        tried = []
        for path, operations in server.app.openapi()["paths"].items():
            if "{" not in path:
                continue
            for method in operations:
                asked, missed = (
                    other.request(method, path.format(**names), **body_of(path, names)) for names in (ids, unknown)
                )
                assert asked.status_code == missed.status_code == 404, (method, path, asked.text)
                assert without_ids(asked.text) == without_ids(missed.text), (method, path)
                tried.append((method, path))
        assert len(tried) >= 45

        for name, path in (
            ("dataset_id", "datasets"),
            ("job_id", "jobs"),
            ("model", "models"),
            ("batch_id", "batches"),
        ):
            assert own.get(f"/v1/{path}/{ids[name]}").status_code == 200
        assert own.get(f"/v1/predictions/{ids['prediction_id']}").json()["feedback"] is None
        assert own.get("/v1/aliases").json()["data"][0]["model"] == ids["model"]


PAGES = {
    "get": (
        *("/datasets/{dataset_id}", "/datasets/{dataset_id}/cases", "/datasets/{dataset_id}/images"),
        *("/datasets/{dataset_id}/progress", "/datasets/{dataset_id}/samples", "/jobs/{job_id}", "/jobs/{job_id}/live"),
        *("/models/{model}", "/models/{model}/cell?row=0&column=1"),
    ),
    "post": (
        *("/datasets/{dataset_id}/delete", "/datasets/{dataset_id}/versions", "/jobs/{job_id}/cancel"),
        *("/jobs/{job_id}/delete", "/jobs/{job_id}/stop", "/models/{model}/delete", "/models/{model}/promote"),
        "/try/{prediction_id}/feedback",
    ),
}


def test_a_stranger_sees_no_page_of_another_workspace(server: RunningServer) -> None:
    with client_with(server, key_for(server, "default")) as own, client_with(server, key_for(server, "other")) as other:
        ids = everything(server, own)
        for method, paths in PAGES.items():
            for path in paths:
                answer = other.request(method, path.format(**ids), headers={"Accept": "text/html"})
                assert answer.status_code in (404, 422), (method, path, answer.status_code)
                assert "colours" not in answer.text
        for path in ("/", "/datasets", "/jobs", "/models", "/try", "/jobs/new", f"/jobs/compare?job={ids['job_id']}"):
            page = other.get(path, headers={"Accept": "text/html"}).text
            assert not any(value in page for value in ids.values() if re.search("_[0-9a-f]{30}", value)), path
        for name in ("dataset", "job", "model"):
            assert own.get(f"/v1/{name}s/{ids.get(f'{name}_id', ids['model'])}").status_code == 200


def test_a_stranger_lists_and_names_nothing_of_another_workspace(server: RunningServer) -> None:
    with client_with(server, key_for(server, "default")) as own, client_with(server, key_for(server, "other")) as other:
        ids = everything(server, own)
        for path in (
            "datasets",
            "jobs",
            "models",
            "aliases",
            "predictions",
            "batches",
            "files",
            "fine_tuning/jobs",
            "webhooks",
        ):
            assert own.get(f"/v1/{path}").json()["data"], path
            assert other.get(f"/v1/{path}").json()["data"] == [], path
            assert other.get(f"/v1/{path}", params={"after": ids["dataset_id"]}).status_code in (200, 404, 422)
        assert other.post("/v2/repository/index").json() == []
        assert ids["model"] not in other.get("/v1/backbones").text

        assert_is_problem(other.post("/predict", content=builders.jpeg()), 404, "model-not-found")
        for name in (ids["model"], "default"):
            named = other.post("/predict", params={"model": name}, content=builders.jpeg())
            assert_is_problem(named, 404, "model-not-found")
        for job in ({"dataset": ids["dataset_id"]}, {"dataset": ids["dataset_id"], "backbone": ids["model"]}):
            for dry_run in (False, True):
                assert other.post("/v1/jobs", params={"dry_run": dry_run}, json=job).status_code == 404
        tuned = other.post("/v1/fine_tuning/jobs", json={"training_file": ids["dataset_id"], "model": "auto"})
        assert tuned.status_code == 404
        everywhere = other.get("/v1/usage").text + other.get("/v1/audit").text
        assert not re.search("|".join(value for value in ids.values() if "_" in value), everywhere)


def test_two_workspaces_have_aliases_of_one_name(server: RunningServer) -> None:
    other_key = key_for(server, "other")
    services = server.services
    ours = api_builders.register_model(services)
    theirs = api_builders.register_model(services_within(server, "other"), seed=1)

    with client_with(server, key_for(server, "default")) as own, client_with(server, other_key) as stranger:
        for client, model in ((own, ours), (stranger, theirs), (own, ours)):
            assert client.post("/predict", content=builders.jpeg()).json()["model"] == model
        assert stranger.delete("/v1/aliases/default").status_code == 200
        assert own.post("/predict", content=builders.jpeg()).json()["model"] == ours


def test_metrics_are_the_operators(server: RunningServer) -> None:
    with client_with(server, key_for(server, "default", scope=Scope.predict)) as own:
        assert own.get("/metrics").status_code == 200
        with client_with(server, key_for(server, "other")) as other:
            assert_is_problem(other.get("/metrics"), 403, "scope-too-small")


def test_a_repeated_upload_gets_its_answer_though_the_quota_has_no_room_for_another(server: RunningServer) -> None:
    archive = api_builders.archive_of_classes()
    limits = Limits(max_bytes=int(1.1 * len(archive)))
    with client_with(server, key_for(server, "small", limits=limits)) as client:

        def upload(key: str) -> httpx.Response:
            return client.post("/v1/datasets", content=archive, headers={"Idempotency-Key": key})

        first, again = upload("k1"), upload("k1")
        assert (first.status_code, again.status_code, again.json()) == (201, 201, first.json())
        assert again.headers["idempotent-replayed"] == "true"
        assert_is_problem(upload("k2"), 429, "quota-of-bytes-spent")
        client.delete(f"/v1/datasets/{first.json()['id']}")
        assert upload("k2").status_code == 201  # what was refused has left its key free


def test_uploads_at_once_never_exceed_the_quota_of_bytes(any_server: RunningServer) -> None:
    server = any_server
    archive = api_builders.archive_of_classes()
    room_for_three = Limits(max_bytes=int(3.5 * len(archive)))
    with client_with(server, key_for(server, "small", limits=room_for_three)) as client:

        def upload(_: int) -> httpx.Response:
            # Without a length ahead, nothing can be refused before it is there.
            return client.post("/v1/datasets", content=iter([archive]))

        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(upload, range(20)))

        assert sorted(answer.status_code for answer in answers) == [201] * 3 + [429] * 17
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert "Delete" in assert_is_problem(refused, 429, "quota-of-bytes-spent")["detail"]
        usage = client.get("/v1/usage").json()
        assert usage["bytes"] == {"used": 3 * len(archive), "limit": room_for_three.max_bytes}
        kept = [path for path in (server.services.storage.path("datasets")).iterdir() if not path.name.startswith(".")]
        assert len(kept) == 3

        client.delete(f"/v1/datasets/{client.get('/v1/datasets').json()['data'][0]['id']}")
        assert upload(0).status_code == 201


def test_an_upload_beyond_the_quota_is_refused_before_its_body_is_read(server: RunningServer) -> None:
    key = key_for(server, "small", limits=Limits(max_bytes=1000))
    head = f"POST /v1/datasets HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: 5000000\r\n\r\n"

    answer = api_builders.raw_exchange(server, head.encode())

    assert answer.startswith(b"HTTP/1.1 429") and b"quota-of-bytes-spent" in answer


def test_jobs_beyond_the_quota_wait_outside(any_server: RunningServer) -> None:
    server = any_server
    with client_with(server, key_for(server, "small", limits=Limits(max_unfinished_jobs=2))) as client:
        client.post("/v1/datasets", content=api_builders.archive_of_classes())
        dataset = client.get("/v1/datasets").json()["data"][0]["id"]
        dataset = api_builders.ready_dataset(services_within(server, "small").database)

        with ThreadPoolExecutor(8) as pool:
            submitted = list(pool.map(lambda _: client.post("/v1/jobs", json={"dataset": dataset}), range(8)))

        assert sorted(answer.status_code for answer in submitted) == [201] * 2 + [429] * 6
        refused = next(answer for answer in submitted if answer.status_code == 429)
        assert_is_problem(refused, 429, "quota-of-jobs-spent")
        assert int(refused.headers["retry-after"]) > 0
        done = next(answer for answer in submitted if answer.status_code == 201)
        client.post(f"/v1/jobs/{done.json()['id']}/cancel")
        assert client.post("/v1/jobs", json={"dataset": dataset}).status_code == 201


def test_pictures_beyond_the_days_quota_are_refused_also_after_a_restart(tmp_path: Path) -> None:
    settings = api_builders.settings_for(tmp_path, workspace_max_predictions_per_day=5)
    with api_builders.running(settings) as server, api_builders.client_of(server) as client:
        api_builders.register_model(server.services)
        two = [("file", ("a.jpg", builders.jpeg()))] * 2
        assert [client.post("/predict", files=two).status_code for _ in range(3)] == [200, 200, 429]
        tensor = {"name": "image", "datatype": "FP32", "shape": [2, 3, 32, 32], "data": [0.0] * (2 * 3 * 32 * 32)}
        assert client.post("/v2/models/default/infer", json={"inputs": [tensor]}).status_code == 429
        assert client.post("/hf/default", content=builders.jpeg()).status_code == 200
        assert client.get("/v1/usage").json()["predictions_today"] == {"used": 5, "limit": 5}
    with RunningServer(settings) as server, api_builders.client_of(server) as client:
        refused = client.post("/predict", content=builders.jpeg())
        assert_is_problem(refused, 429, "quota-of-predictions-spent")
        assert 0 < int(refused.headers["retry-after"]) <= 86400


def test_requests_faster_than_allowed_are_told_when_to_come_back(server: RunningServer) -> None:
    quick = key_for(server, "quick")
    with client_with(server, key_for(server, "slow", limits=Limits(requests_per_second=0.5))) as client:
        assert client.get("/v1/models").status_code == 200
        refused = client.get("/v1/models")
        assert_is_problem(refused, 429, "too-many-requests")
        assert refused.headers["retry-after"] in ("1", "2")
    with client_with(server, quick) as other:
        assert {other.get("/v1/models").status_code for _ in range(20)} == {200}


def test_many_wrong_keys_are_answered_with_429_and_a_right_one_still_opens(server: RunningServer) -> None:
    with client_with(server, key_for(server, "default")) as own, client_with(server, "ft_wrong") as wrong:
        answers = [wrong.get("/v1/models").status_code for _ in range(WRONG_KEYS_PER_MINUTE + 10)]
        assert set(answers[:WRONG_KEYS_PER_MINUTE]) == {401}
        assert answers[-1] == 429
        assert own.get("/v1/models").status_code == 200
    with api_builders.client_of(server) as keyless:
        assert keyless.get("/v1/models").status_code == 401


def test_a_throttle_allows_a_burst_and_then_its_rate() -> None:
    now = 100.0
    throttle = Throttle(lambda: now)
    assert [throttle.take("a", per_second=2, burst=4) for _ in range(4)] == [0, 0, 0, 0]
    assert throttle.take("a", per_second=2, burst=4) == pytest.approx(0.5)
    assert throttle.take("b", per_second=2, burst=4) == 0
    now += 0.5
    assert throttle.take("a", per_second=2, burst=4) == 0
    assert throttle.take("a", per_second=2, burst=4) > 0


def test_changes_are_in_the_audit_log_with_who_made_them(server: RunningServer) -> None:
    key = key_for(server, "default")
    model = api_builders.register_model(server.services, aliases=())
    with client_with(server, key) as client:
        before = client.get("/v1/audit").json()["data"]
        put = client.put("/v1/aliases/shop", json={"model": model}, headers={"X-Request-ID": "mine"})
        made = client.post("/v1/datasets", content=api_builders.archive_of_classes()).json()
        client.put("/v1/aliases/nothing", json={"model": "mdl_0"})
        client.get("/v1/models")

        page = client.get("/v1/audit", params={"limit": 1}).json()
        older = client.get("/v1/audit", params={"after": page["last_id"]}).json()["data"]

    assert put.status_code == 200
    assert page["has_more"] and made["id"] in page["data"][0]["changed"]
    assert older[0]["action"] == "PUT /v1/aliases/shop"
    assert older[0]["request_id"] == "mine" and older[0]["key"].startswith("key_") and older[0]["changed"] == ["shop"]
    assert older[1:] == before
    assert key not in json.dumps([page, older])


def test_the_audit_log_needs_an_admin(server: RunningServer) -> None:
    with client_with(server, key_for(server, "default", scope=Scope.train)) as client:
        assert_is_problem(client.get("/v1/audit"), 403, "scope-too-small")


@pytest.mark.parametrize(
    ("scope", "path"),
    [
        (Scope.predict, "/v1/models/default/export%0A?format=safetensors"),
        (Scope.train, "/v1/audit%0A"),
        (Scope.train, "/v1/webhooks%0A"),
        (Scope.train, "/metrics%0A"),
    ],
)
def test_a_line_break_behind_a_path_opens_nothing(server: RunningServer, scope: Scope, path: str) -> None:
    with client_with(server, key_for(server, "other", scope=scope)) as client:
        assert_is_problem(client.get(path.replace("%0A", "")), 403, "scope-too-small")
        assert_is_problem(client.get(path), 422, "invalid-request")
