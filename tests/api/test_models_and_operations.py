"""Models, aliases and backbones; health, readiness and keys."""

import io
import re
import threading
from pathlib import Path
from typing import Any

import api_builders
import builders
import httpx
import pytest
from api_builders import RunningServer, assert_is_problem, create_key

from app import access
from app.access import Scope

PICTURE = builders.jpeg(1)

EVALUATION: dict[str, Any] = {
    "classes": ["cat", "dog"],
    "images": 3,
    "accuracy": 2 / 3,
    "accuracy_ci95": [0.2, 0.9],
    "loss": 0.7,
    "macro_f1": 0.6,
    "expected_calibration_error": 0.1,
    "confusion_matrix": [[1, 1], [0, 1]],
    "per_class": [
        {"name": "cat", "precision": 1.0, "recall": 0.5, "f1": 0.667, "support": 2},
        {"name": "dog", "precision": 0.5, "recall": 1.0, "f1": 0.667, "support": 1},
    ],
    "mistakes": [{"image_id": "img_1", "path": "cat/1.jpg", "true": "cat", "predicted": "dog", "score": 0.8}],
}


def test_model_is_shown_by_id_and_by_alias(server: RunningServer, client: httpx.Client) -> None:
    model_id = api_builders.register_model(server.services, aliases=("default", "best"))

    model = client.get(f"/v1/models/{model_id}").json()

    assert client.get("/v1/models/default").json() == client.get("/v1/models/best").json() == model
    assert (model["object"], model["aliases"], model["classes"]) == ("model", ["best", "default"], ["cat", "dog"])
    assert model["backbone"] == {"name": "squeezenet1_1", "weights": None}
    assert set(model) >= {"job", "dataset", "method", "metrics", "size_bytes", "sha256", "created_at"}


def test_models_are_listed_newest_first_and_filtered(server: RunningServer, client: httpx.Client) -> None:
    first = api_builders.register_model(server.services, dataset_id="ds_1")
    second = api_builders.register_model(server.services, dataset_id="ds_2")

    def found(**filters: Any) -> list[str]:
        return [model["id"] for model in client.get("/v1/models", params=filters).json()["data"]]

    assert found() == [second, first]
    assert found(dataset="ds_1") == found(after=second) == [first]
    assert found(limit=1) == [second]
    assert found(method="from_scratch") == []
    assert_is_problem(client.get("/v1/models?after=mdl_none"), 404, "model-not-found")


def test_evaluation_points_at_the_mistakes(server: RunningServer, client: httpx.Client) -> None:
    model_id = api_builders.register_model(server.services, dataset_id="ds_1", evaluation=EVALUATION)

    evaluation = client.get("/v1/models/default/evaluation").json()

    assert (evaluation["model"], evaluation["confusion_matrix"]) == (model_id, [[1, 1], [0, 1]])
    assert evaluation["per_class"] == [row | {"recall_ci95": None} for row in EVALUATION["per_class"]]
    assert evaluation["mistakes"][0]["thumbnail"] == "/v1/datasets/ds_1/images/img_1/thumbnail"


def test_evaluation_has_its_intervals_and_warnings_and_no_line_for_each_image(
    server: RunningServer, client: httpx.Client
) -> None:
    predictions = {"digests": ["00"], "true": ["cat"], "predicted": ["dog"], "probability_of_true": [0.2]}
    new = EVALUATION | {
        "macro_f1_ci95": [0.1, 0.9],
        "warnings": ["Measured on only 3 pictures."],
        "per_class": [row | {"recall_ci95": [0.1, 0.9]} for row in EVALUATION["per_class"]],
    }
    api_builders.register_model(
        server.services,
        dataset_id="ds_1",
        evaluation=new | {"predictions": predictions, "test": new | {"predictions": predictions}},
    )

    evaluation = client.get("/v1/models/default/evaluation").json()

    for split in (evaluation, evaluation["test"]):
        assert "predictions" not in split
        assert (split["macro_f1_ci95"], split["warnings"]) == (new["macro_f1_ci95"], new["warnings"])
        assert split["per_class"] == new["per_class"]


def test_model_shows_what_was_decided_of_its_promotion(server: RunningServer, client: httpx.Client) -> None:
    unknown = api_builders.register_model(server.services)
    promotion = {
        "promoted": True,
        "reason": "The model becomes the default.",
        "incumbent": unknown,
        "images": 60,
        "candidate_right_only": 9,
        "incumbent_right_only": 1,
        "p_value": 0.0107,
    }
    decided = api_builders.register_model(server.services, promotion=promotion)

    assert client.get(f"/v1/models/{unknown}").json()["promotion"] is None
    assert client.get(f"/v1/models/{decided}").json()["promotion"] == promotion
    assert [model["promotion"] for model in client.get("/v1/models").json()["data"]] == [promotion, None]


def test_missing_evaluation_is_503(server: RunningServer, client: httpx.Client) -> None:
    api_builders.register_model(server.services)

    assert_is_problem(client.get("/v1/models/default/evaluation"), 503, "model-unavailable")


def test_alias_moves_and_goes(server: RunningServer, client: httpx.Client) -> None:
    first = api_builders.register_model(server.services, seed=1)
    second = api_builders.register_model(server.services, seed=2, aliases=())

    moved = client.put("/v1/aliases/default", json={"model": second}).json()

    assert (moved["object"], moved["name"], moved["model"]) == ("alias", "default", second)
    assert client.post("/predict", content=PICTURE).json()["model"] == second
    assert [alias["model"] for alias in client.get("/v1/aliases").json()["data"]] == [second]
    assert client.delete(f"/v1/models/{first}").json() == {"id": first, "object": "model", "deleted": True}
    assert client.delete("/v1/aliases/default").json() == {"id": "default", "object": "alias", "deleted": True}
    assert_is_problem(client.post("/predict", content=PICTURE), 404, "model-not-found")
    assert_is_problem(client.delete("/v1/aliases/default"), 404, "alias-not-found")


def test_model_with_an_alias_is_not_deleted(server: RunningServer, client: httpx.Client) -> None:
    model_id = api_builders.register_model(server.services)

    response = client.delete(f"/v1/models/{model_id}")

    assert_is_problem(response, 409, "model-in-use")
    assert response.headers["x-should-retry"] == "false"


def test_model_that_an_unfinished_job_starts_from_is_not_deleted(any_server: RunningServer) -> None:
    model = api_builders.register_model(any_server.services, aliases=())
    dataset = api_builders.ready_dataset(any_server.services.database)
    with api_builders.client_of(any_server) as client:
        job = client.post("/v1/jobs", json={"dataset": dataset, "method": "fine_tuning", "backbone": model}).json()

        assert_is_problem(client.delete(f"/v1/models/{model}"), 409, "model-in-use")
        client.post(f"/v1/jobs/{job['id']}/cancel")
        assert client.delete(f"/v1/models/{model}").status_code == 200


def test_deleted_model_does_not_predict(server: RunningServer, client: httpx.Client) -> None:
    model_id = api_builders.register_model(server.services, aliases=())
    assert client.post(f"/predict?model={model_id}", content=PICTURE).status_code == 200

    client.delete(f"/v1/models/{model_id}")

    assert client.post(f"/predict?model={model_id}", content=PICTURE).status_code == 404
    assert not server.services.storage.exists(f"models/{model_id}")


def test_alias_does_not_move_to_a_model_that_cannot_be_loaded(server: RunningServer, client: httpx.Client) -> None:
    good = api_builders.register_model(server.services)
    damaged = api_builders.register_model(server.services, aliases=())
    server.services.storage.delete(f"models/{damaged}")

    assert_is_problem(client.put("/v1/aliases/default", json={"model": damaged}), 503, "model-unavailable")
    assert client.get("/v1/models/default").json()["id"] == good


def test_rollback_goes_to_the_model_from_before_and_back(server: RunningServer, client: httpx.Client) -> None:
    first = api_builders.register_model(server.services, seed=1)
    second = api_builders.register_model(server.services, seed=2, aliases=())
    assert client.get("/v1/aliases").json()["data"][0]["previous_model"] is None
    client.put("/v1/aliases/default", json={"model": second})

    back = client.post("/v1/aliases/default/rollback")

    assert (back.status_code, back.json()["model"], back.json()["previous_model"]) == (200, first, second)
    assert set(back.json()) == set(client.put("/v1/aliases/default", json={"model": first}).json())
    assert client.post("/predict", content=PICTURE).json()["model"] == first
    again = client.post("/v1/aliases/default/rollback").json()
    assert (again["model"], again["previous_model"]) == (second, first)
    assert client.post("/predict", content=PICTURE).json()["model"] == second


def test_rollback_to_nothing_is_refused_with_a_way_out(server: RunningServer, client: httpx.Client) -> None:
    first = api_builders.register_model(server.services, seed=1)
    second = api_builders.register_model(server.services, seed=2, aliases=())

    never_moved = client.post("/v1/aliases/default/rollback")
    client.put("/v1/aliases/default", json={"model": second})
    client.delete(f"/v1/models/{first}")
    deleted = client.post("/v1/aliases/default/rollback")

    for refusal in (never_moved, deleted):
        problem = assert_is_problem(refusal, 409, "no-previous-model")
        assert "PUT /v1/aliases/default" in problem["detail"]
        assert refusal.headers["x-should-retry"] == "false"
    assert client.get("/v1/models/default").json()["id"] == second
    assert_is_problem(client.post("/v1/aliases/none/rollback"), 404, "alias-not-found")


def test_rollback_does_not_go_to_a_model_that_cannot_be_loaded(server: RunningServer, client: httpx.Client) -> None:
    damaged, good = (api_builders.register_model(server.services, aliases=()) for _ in range(2))
    server.services.storage.delete(f"models/{damaged}")
    with server.services.database.write() as session:
        for model_id in (damaged, good):
            api_builders.registry.point_alias(session, "default", model_id)

    assert_is_problem(client.post("/v1/aliases/default/rollback"), 503, "model-unavailable")
    assert client.get("/v1/models/default").json()["id"] == good


@pytest.mark.parametrize(
    ("name", "body", "status"),
    [("default", {"model": "mdl_none"}, 404), ("mdl_x", {"model": "default"}, 422), ("default", {"modl": "x"}, 422)],
)
def test_bad_alias_is_refused(
    server: RunningServer, client: httpx.Client, name: str, body: dict[str, str], status: int
) -> None:
    api_builders.register_model(server.services)

    assert client.put(f"/v1/aliases/{name}", json=body).status_code == status


def test_no_request_is_lost_while_the_default_moves(server: RunningServer, client: httpx.Client) -> None:
    models = [api_builders.register_model(server.services, seed=seed) for seed in (1, 2)]
    answers: list[tuple[int, str]] = []
    is_over = threading.Event()

    def keep_asking() -> None:
        with api_builders.client_of(server) as asking:
            while not is_over.is_set():
                response = asking.post("/predict", content=PICTURE)
                answers.append((response.status_code, response.json().get("model")))

    thread = threading.Thread(target=keep_asking)
    thread.start()
    for turn in range(6):
        client.put("/v1/aliases/default", json={"model": models[turn % 2]})
        seen = len(answers)
        api_builders.wait_for(lambda seen=seen: len(answers) > seen + 3)
    is_over.set()
    thread.join()

    assert {status for status, _ in answers} == {200}
    assert {model for _, model in answers} == set(models)


def test_backbones_say_what_they_need(client: httpx.Client) -> None:
    backbones = {backbone["name"]: backbone for backbone in client.get("/v1/backbones").json()["data"]}

    assert {"resnet18", "resnet50", "vit_b_16", "squeezenet1_1"} <= set(backbones)
    assert backbones["resnet50"] | {"license": ""} == {
        "name": "resnet50",
        "object": "backbone",
        "architecture": "resnet50",
        "method": None,
        "parameters": 25_557_032,
        "image_size": 224,
        "weights": ["IMAGENET1K_V2", "IMAGENET1K_V1"],
        "available": "download",
        "is_obtainable": False,
        "license": "",
    }


def test_backbones_made_here_are_listed_newest_first_without_a_damaged_one(
    server: RunningServer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, damaged, last = (
        api_builders.register_model(server.services, aliases=(), method="from_scratch") for _ in range(3)
    )
    (server.services.storage.path(f"models/{damaged}") / "model.json").write_text("{")

    def made() -> list[str]:
        listed = client.get("/v1/backbones").json()["data"]
        return [backbone["name"] for backbone in listed if backbone["method"] is not None]

    assert made() == [last, first]
    monkeypatch.setattr("app.api.training.MAX_MADE_BACKBONES", 1)
    assert made() == [last]


def test_alive_and_ready_without_any_model(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json()["checks"] == {"database": "ok", "storage": "ok", "default_model": "ok"}


def test_ready_once_the_default_model_is_loaded_which_nobody_had_to_ask_for(
    server: RunningServer, client: httpx.Client
) -> None:
    model_id = api_builders.register_model(server.services)

    api_builders.wait_for(lambda: client.get("/readyz").status_code == 200)

    assert server.services.predictor.is_loaded(model_id)


def test_not_ready_while_the_default_model_cannot_be_loaded(server: RunningServer, client: httpx.Client) -> None:
    model_id = api_builders.register_model(server.services, aliases=())
    server.services.storage.delete(f"models/{model_id}")
    with server.services.database.write() as session:
        api_builders.registry.point_alias(session, "default", model_id)

    problem = assert_is_problem(client.get("/readyz"), 503, "not-ready")

    assert problem["checks"]["default_model"] == "the default model is not loaded yet"


def test_not_ready_on_a_database_of_another_version(tmp_path: Path) -> None:
    settings = api_builders.settings_for(tmp_path)
    settings.data_dir.mkdir()
    with RunningServer(settings) as server, api_builders.client_of(server) as client:
        problem = assert_is_problem(client.get("/readyz"), 503, "not-ready")

    assert "graft migrate" in problem["checks"]["database"]


def test_the_page_of_the_api_needs_no_other_server(client: httpx.Client) -> None:
    page = client.get("/docs")
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page.text)

    assert page.status_code == 200
    assert {address.rpartition(".")[2] for address in addresses} == {"js", "css", "png"}
    for address in addresses:
        assert address.startswith("/swagger/")
        assert client.get(address).status_code == 200
    assert "http" not in page.text
    assert_is_problem(client.get("/swagger/nothing.js"), 404, "not-found")


def test_once_there_is_a_key_every_route_but_the_probes_needs_one(server: RunningServer, client: httpx.Client) -> None:
    create_key(server, Scope.admin)
    document = server.app.openapi()
    operations = [(method, path) for path, methods in document["paths"].items() for method in methods]

    open_to_all = {
        path for method, path in [*operations, ("get", "/docs"), ("get", "/openapi.json"), ("get", "/")]
        if client.request(method, path).status_code != 401
    }  # fmt: skip

    assert open_to_all == {"/healthz", "/readyz"}


@pytest.mark.parametrize(
    ("method", "path", "least"),
    [
        ("POST", "/predict", Scope.predict),
        ("GET", "/v1/models/default", Scope.predict),
        ("GET", "/v1/backbones", Scope.predict),
        ("GET", "/v1/jobs", Scope.train),
        ("GET", "/v1/datasets", Scope.train),
        ("POST", "/v1/jobs", Scope.train),
        ("POST", "/v1/datasets", Scope.train),
        ("PUT", "/v1/aliases/default", Scope.train),
        ("POST", "/v1/aliases/default/rollback", Scope.train),
        ("DELETE", "/v1/models/default", Scope.train),
        ("GET", "/v1/nothing", Scope.train),
    ],
)
def test_each_route_asks_for_its_scope(
    server: RunningServer, client: httpx.Client, method: str, path: str, least: Scope
) -> None:
    refused = {
        scope for scope in Scope if client.request(method, path, headers=create_key(server, scope)).status_code == 403
    }

    assert refused == ({Scope.predict} if least is Scope.train else set())


def test_refusals_name_their_kind(server: RunningServer, client: httpx.Client) -> None:
    headers = create_key(server, Scope.predict)

    unknown = client.get("/v1/jobs", headers={"Authorization": "Bearer nonsense"})
    too_small = client.get("/v1/jobs", headers=headers)

    assert_is_problem(unknown, 401, "unauthenticated")
    assert unknown.headers["www-authenticate"] == "Bearer"
    assert_is_problem(too_small, 403, "scope-too-small")


def test_large_body_without_a_key_is_not_waited_for(server: RunningServer, client: httpx.Client) -> None:
    create_key(server, Scope.admin)

    response = client.post("/v1/datasets", content=iter([b"x" * 1000]), headers={"Content-Length": "1000"})

    assert_is_problem(response, 401, "unauthenticated")


def test_revoked_key_ends_with_the_next_request(server: RunningServer, client: httpx.Client) -> None:
    headers = create_key(server, Scope.admin)
    assert client.get("/v1/jobs", headers=headers).status_code == 200
    server.services.traffic.write_down()
    with server.services.database.write() as session:
        (row,) = access.list_keys(session)
        assert row.last_used_at is not None
        access.revoke_key(session, row.id)

    assert client.get("/v1/jobs", headers=headers).status_code == 401


def test_keys_are_never_logged(server: RunningServer, client: httpx.Client, printed: io.StringIO) -> None:
    headers = create_key(server, Scope.admin)
    client.get("/v1/jobs?limit=5", headers=headers)
    client.get("/v1/jobs", headers={"Authorization": headers["Authorization"] + "x"})

    assert "path=/v1/jobs" in printed.getvalue()
    assert headers["Authorization"].split("_")[2] not in printed.getvalue()


def test_answers_are_not_to_be_guessed_at_or_framed(client: httpx.Client) -> None:
    headers = client.get("/healthz").headers

    assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY")
