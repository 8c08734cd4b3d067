"""POST /predict with several models, none, or a damaged one; and within its limits."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import api_builders
import httpx
import pytest
from api_builders import RunningServer, assert_is_problem
from test_predict import BROKEN, PICTURE, assert_answers, b64

from app.serving.predictor import Predictor


@pytest.fixture
def model(server: RunningServer) -> str:
    return api_builders.register_model(server.services)


@pytest.mark.parametrize("form", [True, False])
def test_body_beyond_the_limit_is_413(tmp_path: Path, form: bool) -> None:
    settings = api_builders.settings_for(tmp_path, max_predict_bytes=10_000)
    with api_builders.running(settings) as server, api_builders.client_of(server) as client:
        body: dict[str, Any] = {"files": {"file": bytes(20_000)}} if form else {"content": bytes(20_000)}
        assert_is_problem(client.post("/predict", **body), 413, "too-large")

        chunked = client.post("/predict", content=iter([bytes(9_000), bytes(9_000)]))
        assert_is_problem(chunked, 413, "too-large")


def test_without_any_model_the_answer_says_how_to_train_one(client: httpx.Client) -> None:
    problem = assert_is_problem(client.post("/predict", content=PICTURE), 404, "model-not-found")

    assert "/v1/datasets" in problem["detail"]
    assert "/v1/jobs" in problem["detail"]


def test_model_is_named_by_id_or_alias(server: RunningServer, client: httpx.Client, model: str) -> None:
    other = api_builders.register_model(server.services, seed=1, aliases=("shadow",))

    def answering(**query: str) -> str:
        answer: str = client.post("/predict", params=query, content=PICTURE).json()["model"]
        return answer

    assert answering() == answering(model="default") == answering(model=model) == model
    assert answering(model="shadow") == answering(model=other) == other
    assert_is_problem(client.post("/predict?model=none", content=PICTURE), 404, "model-not-found")
    in_json = client.post("/predict", json={"images": [{"b64": b64(PICTURE)}], "model": "shadow"})
    assert in_json.json()["model"] == other


def test_damaged_model_is_503_and_others_go_on(server: RunningServer, client: httpx.Client, model: str) -> None:
    damaged = api_builders.register_model(server.services, seed=1, aliases=())
    server.services.storage.path(f"models/{damaged}/weights.safetensors").write_bytes(b"\x00" * 100)

    assert_is_problem(client.post(f"/predict?model={damaged}", content=PICTURE), 503, "model-unavailable")
    assert_answers(client.post("/predict", content=PICTURE), model, [None])


def test_predictions_are_counted(client: httpx.Client, model: str) -> None:
    client.post("/predict", files=[("file", ("a.jpg", PICTURE)), ("file", ("b.jpg", BROKEN))])

    metrics = client.get("/metrics").text
    assert 'graft_predictions_total{outcome="answered"} 1.0' in metrics
    assert 'graft_predictions_total{outcome="refused"} 1.0' in metrics
    assert 'graft_model_loads_total{outcome="loaded"} 1.0' in metrics
    assert 'graft_models_loaded{engine="torch"} 1.0' in metrics
    assert 'graft_requests_total{method="POST",route="/predict",status="200"} 1.0' in metrics


def test_a_default_that_cannot_be_loaded_for_whatever_reason_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, failures = Predictor.keep, iter([RuntimeError("the driver says no"), MemoryError()])

    async def failing(predictor: Predictor, default: str | None, *, aliased: Collection[str] = ()) -> None:
        if default is not None and (failure := next(failures, None)):
            raise failure
        await keep(predictor, default, aliased=aliased)

    monkeypatch.setattr(Predictor, "keep", failing)
    monkeypatch.setattr("app.api.services.RETRY_INTERVAL_SECONDS", 0.05)
    with api_builders.running(api_builders.settings_for(tmp_path)) as server, api_builders.client_of(server) as client:
        model = api_builders.register_model(server.services)
        api_builders.wait_for(lambda: server.services.predictor.engine_of(model) == "torch")
        api_builders.wait_for(lambda: client.get("/readyz").status_code == 200)
    assert next(failures, None) is None
