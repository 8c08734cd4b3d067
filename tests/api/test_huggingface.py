"""/hf as Hugging Face's own client speaks it."""

import base64
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import api_builders
import builders
import httpx
import pytest
from api_builders import RunningServer, assert_is_problem
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from app import access
from app.access import Scope
from app.api.huggingface import ClassificationParameters, ranked
from app.serving.scores import Scores

PICTURE = builders.jpeg(1)
PATH = "/hf/default"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One for all tests here: none of them leaves anything behind."""
    with api_builders.running(api_builders.settings_for(tmp_path_factory.mktemp("server"))) as server:
        api_builders.register_model(server.services)
        yield server


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with api_builders.client_of(server) as client:
        yield client


@pytest.fixture
def client(server: RunningServer) -> InferenceClient:
    return InferenceClient(model=f"{server.url}{PATH}")


@pytest.fixture(scope="module")
def expected(http: httpx.Client) -> dict[str, float]:
    """What /predict says of PICTURE, best first."""
    return {
        row["label"]: row["score"] for row in http.post("/predict", content=PICTURE).json()["predictions"][0]["top"]
    }


def scores_of(answer: list[Any]) -> dict[str, float]:
    return {element.label: element.score for element in answer}


def test_bytes_and_a_path_are_classified(client: InferenceClient, expected: dict[str, float], tmp_path: Path) -> None:
    path = tmp_path / "cat.jpg"
    path.write_bytes(PICTURE)

    for picture in (PICTURE, path, str(path)):
        answer = client.image_classification(picture)

        assert scores_of(answer) == pytest.approx(expected)
        assert [element.label for element in answer] == list(expected)


def test_parameters_are_followed(client: InferenceClient, expected: dict[str, float]) -> None:
    best = next(iter(expected))

    [only] = client.image_classification(PICTURE, top_k=1)
    softmax = scores_of(client.image_classification(PICTURE, function_to_apply="softmax"))
    logits = scores_of(client.image_classification(PICTURE, function_to_apply="none"))
    sigmoid = scores_of(client.image_classification(PICTURE, function_to_apply="sigmoid", top_k=1000))

    assert (only.label, only.score) == (best, pytest.approx(expected[best]))
    assert softmax == pytest.approx(expected)
    total = sum(math.exp(logit) for logit in logits.values())
    assert {label: math.exp(logit) / total for label, logit in logits.items()} == pytest.approx(expected)
    assert sigmoid == pytest.approx({label: 1 / (1 + math.exp(-logit)) for label, logit in logits.items()})


def test_five_classes_are_answered_unless_more_are_asked_for() -> None:
    scores = Scores([f"c{index}" for index in range(8)], [0.0, 0.02, 0.4, 0.1, 0.2, 0.05, 0.03, 0.2])

    assert [row.label for row in ranked(scores, ClassificationParameters())] == ["c2", "c4", "c7", "c3", "c5"]
    assert len(ranked(scores, ClassificationParameters(top_k=7))) == 7
    logits = ranked(scores, ClassificationParameters(top_k=8, function_to_apply="none"))
    assert [row.label for row in logits] == [row.label for row in ranked(scores, ClassificationParameters(top_k=8))]
    assert all(math.isfinite(row.score) for row in logits)


def test_errors_are_readable_in_the_client(server: RunningServer, client: InferenceClient) -> None:
    with pytest.raises(HfHubHTTPError, match=r"The picture cannot be read: truncated JPEG\."):
        client.image_classification(PICTURE[:200])
    with pytest.raises(HfHubHTTPError, match="parameters/top_k: input should be greater than or equal to 1"):
        client.image_classification(PICTURE, top_k=-1)
    with pytest.raises(HfHubHTTPError, match="There is no model with this id or alias"):
        InferenceClient(model=f"{server.url}/hf/nobody").image_classification(PICTURE)


def test_key_is_sent_as_the_token(tmp_path: Path) -> None:
    with api_builders.running(api_builders.settings_for(tmp_path)) as server:
        api_builders.register_model(server.services)
        with server.services.database.write() as session:
            key = access.create_key(session, scopes=[Scope.predict])
        client = InferenceClient(model=f"{server.url}{PATH}", token=key.token)
        stranger = InferenceClient(model=f"{server.url}{PATH}", token="hf_another")

        assert len(client.image_classification(PICTURE)) == 2
        with pytest.raises(HfHubHTTPError, match="not a Graft API key"):
            stranger.image_classification(PICTURE)


@pytest.mark.parametrize(
    "content_type", [None, "application/octet-stream", "application/json", "application/x-www-form-urlencoded"]
)
@pytest.mark.parametrize(
    "body",
    [
        PICTURE,
        b' {"inputs": "%s"}' % base64.b64encode(PICTURE),
        b'{"inputs": "data:image/jpeg;base64,%s", "parameters": null, "options": {"use_cache": false}}'
        % base64.b64encode(PICTURE),
        b'{"inputs": "%s", "parameters": {"top_k": null, "function_to_apply": null}}' % base64.b64encode(PICTURE),
    ],
)
def test_content_type_does_not_matter(
    http: httpx.Client, expected: dict[str, float], body: bytes, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = http.post(PATH, content=body, headers=headers).json()

    assert {row["label"]: row["score"] for row in answer} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        (b"", None),
        (b"{", None),
        (b"{}", "#/inputs"),
        (b'{"inputs": 5}', "#/inputs"),
        (b'{"inputs": "?"}', "#/inputs"),
        (b'{"inputs": "AAAA", "parameter": {}}', "#/parameter"),
        (b'{"inputs": "AAAA", "parameters": {"topk": 5}}', "#/parameters/topk"),
        (b'{"inputs": "AAAA", "parameters": {"function_to_apply": "relu"}}', "#/parameters/function_to_apply"),
    ],
)
def test_what_is_wrong_is_pointed_at(http: httpx.Client, body: bytes, pointer: str | None) -> None:
    response = http.post(PATH, content=body)

    problem = assert_is_problem(response, 422, "invalid-request")
    assert [error["pointer"] for error in problem.get("errors", [])] == ([pointer] if pointer else [])
    assert problem["error"] == problem["detail"] == response.headers["x-error-message"]


def test_picture_over_the_limit_is_413(http: httpx.Client) -> None:
    assert_is_problem(http.post(PATH, content=PICTURE + bytes(32 * 1024**2)), 413, "too-large")


def test_without_any_model_it_says_how_to_train_one(tmp_path: Path) -> None:
    with api_builders.running(api_builders.settings_for(tmp_path)) as server:
        client = InferenceClient(model=f"{server.url}{PATH}")
        with pytest.raises(HfHubHTTPError, match="There is no model yet"):
            client.image_classification(PICTURE)
