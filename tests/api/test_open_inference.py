"""/v2 as the stock client of Triton speaks it, and as nobody should."""

import base64
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import api_builders
import builders
import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from api_builders import CLASSES, SMALL, RunningServer, assert_is_problem
from tritonclient.utils import InferenceServerException

from app import access
from app.access import Scope
from app.vision import images
from app.vision.images import ImageLimits
from app.vision.preprocessing import eval_pixels, normalise

PICTURES = [builders.jpeg(seed) for seed in range(3)]
BROKEN = PICTURES[0][:200]
INFER = "/v2/models/default/infer"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One for all tests here: none of them leaves anything behind."""
    with api_builders.running(api_builders.settings_for(tmp_path_factory.mktemp("server"))) as server:
        yield server


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with api_builders.client_of(server) as client:
        yield client


@pytest.fixture(scope="module")
def model(server: RunningServer) -> str:
    model_id = api_builders.register_model(server.services)
    api_builders.wait_for(lambda: server.services.predictor.is_loaded(model_id))
    return model_id


@pytest.fixture(scope="module")
def other(server: RunningServer) -> str:
    return api_builders.register_model(server.services, seed=1, aliases=("other",))


@pytest.fixture
def client(server: RunningServer, model: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        yield client


@pytest.fixture(scope="module")
def expected(http: httpx.Client, model: str) -> np.ndarray[Any, Any]:
    """What /predict says of PICTURES."""
    parts = [("file", (f"{index}.jpg", picture)) for index, picture in enumerate(PICTURES)]
    predictions = http.post("/predict", files=parts).json()["predictions"]
    scores = [{row["label"]: row["score"] for row in prediction["top"]} for prediction in predictions]
    return np.array([[row[name] for name in CLASSES] for row in scores])


def encoded(pictures: list[bytes], *, name: str = "image") -> triton.InferInput:
    tensor = triton.InferInput(name, [len(pictures), 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[picture] for picture in pictures], dtype=np.object_))
    return tensor


def encoded_in_json(pictures: list[bytes]) -> triton.InferInput:
    tensor = triton.InferInput("image", [len(pictures), 1], "BYTES")
    texts = [[base64.b64encode(picture)] for picture in pictures]
    tensor.set_data_from_numpy(np.array(texts, dtype=np.object_), binary_data=False)
    return tensor


def batch_of(pictures: list[bytes]) -> np.ndarray[Any, Any]:
    """As the metadata says, by a client that knows how the model was validated."""
    limits = ImageLimits(max_bytes=10**7, max_pixels=10**7, max_side=10_000, max_aspect=100.0, max_jpeg_scans=100)
    side = SMALL.side
    rows = [normalise(eval_pixels(images.decode(p, side=side, limits=limits), SMALL)[None], SMALL) for p in pictures]
    return np.concatenate([row.numpy() for row in rows])


def preprocessed(pictures: list[bytes], *, binary_data: bool) -> triton.InferInput:
    batch = batch_of(pictures)
    tensor = triton.InferInput("preprocessed", list(batch.shape), "FP32")
    tensor.set_data_from_numpy(batch, binary_data=binary_data)
    return tensor


def in_json(pictures: list[bytes], **changes: Any) -> dict[str, Any]:
    texts = [base64.b64encode(picture).decode() for picture in pictures]
    return {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [len(texts), 1], "data": texts}], **changes}


def test_server_says_what_it_is(client: triton.InferenceServerClient) -> None:
    assert (client.is_server_live(), client.is_server_ready()) == (True, True)
    metadata = client.get_server_metadata()
    assert metadata["name"] == "graft"
    assert metadata["extensions"] == ["binary_tensor_data", "classification", "model_repository"]


@pytest.mark.parametrize("version", ["", "1", "its id"])
def test_model_says_what_it_takes_and_gives(client: triton.InferenceServerClient, model: str, version: str) -> None:
    metadata = client.get_model_metadata("default", version.replace("its id", model))

    assert metadata == {
        "name": "default",
        "versions": [model],
        "platform": "graft",
        "inputs": [
            {"name": "image", "datatype": "BYTES", "shape": [-1, 1]},
            {"name": "preprocessed", "datatype": "FP32", "shape": [-1, 3, 32, 32]},
        ],
        "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, 2]}],
        "parameters": {"classes": ["cat", "dog"]},
    }


def test_model_is_ready_under_its_id_and_its_aliases(
    client: triton.InferenceServerClient, model: str, other: str
) -> None:
    assert [client.is_model_ready(name) for name in ("default", model, other, "other")] == [True] * 4
    assert client.is_model_ready("default", model)
    assert not client.is_model_ready("default", other)
    assert not client.is_model_ready("nobody")


def test_repository_lists_each_model_under_all_its_names(
    client: triton.InferenceServerClient, model: str, other: str
) -> None:
    listed = {(entry["name"], entry["version"], entry["state"]) for entry in client.get_model_repository_index()}

    names = {(model, model), ("default", model), (other, other), ("other", other)}
    assert listed == {(name, version, "READY") for name, version in names}


def test_model_is_loaded_and_unloaded(server: RunningServer, client: triton.InferenceServerClient, other: str) -> None:
    client.load_model("other")
    assert server.services.predictor.is_loaded(other)

    client.unload_model("other")
    assert not server.services.predictor.is_loaded(other)
    assert client.infer("other", [encoded(PICTURES)]).as_numpy("scores").shape == (3, 2)


def test_default_model_is_not_unloaded(client: triton.InferenceServerClient, model: str) -> None:
    with pytest.raises(InferenceServerException, match="The default model stays loaded"):
        client.unload_model(model)

    assert client.is_server_ready()


def test_model_is_not_loaded_with_another_configuration(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="leave out config and files"):
        client.load_model("default", config='{"max_batch_size": 8}')


def test_every_form_of_the_same_pictures_scores_as_predict_does(
    client: triton.InferenceServerClient, model: str, expected: np.ndarray[Any, Any]
) -> None:
    in_binary = [triton.InferRequestedOutput("scores", binary_data=True)]
    as_json = [triton.InferRequestedOutput("scores", binary_data=False)]
    for tensor in (
        encoded(PICTURES),
        encoded_in_json(PICTURES),
        preprocessed(PICTURES, binary_data=True),
        preprocessed(PICTURES, binary_data=False),
    ):
        for outputs in (None, in_binary, as_json):
            result = client.infer("default", [tensor], outputs=outputs, request_id="42")

            assert result.as_numpy("scores") == pytest.approx(expected, abs=1e-5)
            answer = result.get_response()
            assert (answer["model_name"], answer["model_version"], answer["id"]) == ("default", model, "42")


@pytest.mark.parametrize("binary_data", [True, False])
def test_classification_gives_the_best_classes_by_name(
    client: triton.InferenceServerClient, expected: np.ndarray[Any, Any], binary_data: bool
) -> None:
    wanted = triton.InferRequestedOutput("scores", binary_data=binary_data, class_count=1)
    best = client.infer("default", [encoded(PICTURES)], outputs=[wanted]).as_numpy("scores")

    assert best.shape == (3, 1)
    for text, scores in zip(best[:, 0], expected, strict=True):
        score, index, name = (text.decode() if isinstance(text, bytes) else text).split(":")
        assert (int(index), name) == (scores.argmax(), CLASSES[scores.argmax()])
        assert float(score) == pytest.approx(scores.max(), abs=1e-5)


def test_more_classes_than_there_are_gives_all(client: triton.InferenceServerClient) -> None:
    wanted = triton.InferRequestedOutput("scores", class_count=1000)

    assert client.infer("default", [encoded(PICTURES)], outputs=[wanted]).as_numpy("scores").shape == (3, 2)


def test_version_that_the_alias_does_not_point_at_is_refused(client: triton.InferenceServerClient, other: str) -> None:
    assert client.infer("other", [encoded(PICTURES)], model_version=other).as_numpy("scores").shape == (3, 2)
    with pytest.raises(InferenceServerException, match="default is the version"):
        client.infer("default", [encoded(PICTURES)], model_version=other)


def test_the_datatype_says_what_a_tensor_is_and_not_its_name(client: triton.InferenceServerClient) -> None:
    named, other = (client.infer("default", [encoded(PICTURES, name=name)]) for name in ("image", "input_1"))
    assert np.allclose(named.as_numpy("scores"), other.as_numpy("scores"), atol=1e-5)


def test_errors_are_readable_in_the_client(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="There is no model with this id or alias"):
        client.infer("nobody", [encoded(PICTURES)])
    with pytest.raises(InferenceServerException, match=r"shape \[n, 3, 32, 32\], not \[1, 3, 16, 16\]"):
        tensor = triton.InferInput("preprocessed", [1, 3, 16, 16], "FP32")
        tensor.set_data_from_numpy(np.zeros((1, 3, 16, 16), np.float32))
        client.infer("default", [tensor])
    with pytest.raises(InferenceServerException, match="not finite"):
        tensor = triton.InferInput("preprocessed", [1, 3, 32, 32], "FP32")
        tensor.set_data_from_numpy(np.full((1, 3, 32, 32), np.nan, np.float32))
        client.infer("default", [tensor])


def test_one_bad_picture_refuses_all_and_is_named(client: triton.InferenceServerClient, http: httpx.Client) -> None:
    with pytest.raises(InferenceServerException, match=r"Picture 1 cannot be read: truncated JPEG\. The protocol"):
        client.infer("default", [encoded([PICTURES[0], BROKEN, PICTURES[1]])])

    problem = assert_is_problem(http.post(INFER, json=in_json([PICTURES[0], BROKEN, b"text"])), 422, "unreadable-image")
    assert [error["pointer"] for error in problem["errors"]] == ["#/inputs/0/data/1", "#/inputs/0/data/2"]


@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded", "text/plain", "image/png"])
def test_content_type_does_not_matter(
    http: httpx.Client, expected: np.ndarray[Any, Any], content_type: str | None
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = http.post(INFER, content=json.dumps(in_json(PICTURES, id="")), headers=headers).json()

    assert answer["id"] == ""
    [tensor] = answer["outputs"]
    assert (tensor["name"], tensor["datatype"], tensor["shape"]) == ("scores", "FP32", [3, 2])
    assert np.reshape(tensor["data"], (3, 2)) == pytest.approx(expected, abs=1e-5)


def test_picture_as_it_is_under_a_header_of_0(http: httpx.Client, expected: np.ndarray[Any, Any]) -> None:
    response = http.post(INFER, content=PICTURES[1], headers={"Inference-Header-Content-Length": "0"})

    assert response.json()["outputs"][0]["data"] == pytest.approx(expected[1], abs=1e-5)


def test_tensor_as_it_is_under_a_header_of_0(http: httpx.Client, expected: np.ndarray[Any, Any]) -> None:
    raw = batch_of(PICTURES).tobytes()
    response = http.post(INFER, content=raw, headers={"Inference-Header-Content-Length": "0"})

    assert np.reshape(response.json()["outputs"][0]["data"], (3, 2)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("path", ["index", "models/other/load", "models/other/unload"])
@pytest.mark.parametrize("body", [b"", b"{}"])
def test_repository_needs_no_body(http: httpx.Client, other: str, path: str, body: bytes) -> None:
    assert http.post(f"/v2/repository/{path}", content=body).status_code == 200


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"", {}),
        (b"", {"Inference-Header-Content-Length": "0"}),
        (b"not a picture", {"Inference-Header-Content-Length": "0"}),
        (PICTURES[0], {}),
        (b"[]", {}),
        (b'{"inputs": NaN}', {}),
        (b"{}", {"Inference-Header-Content-Length": "3"}),
        (b"{}", {"Inference-Header-Content-Length": "1"}),
        (b"{}", {"Inference-Header-Content-Length": "-2"}),
        (b"{}" + PICTURES[0], {"Inference-Header-Content-Length": "2"}),
        (b'{"inputs": [{"name": "image\\r\\nX: y\\u000b", "datatype": "BYTES", "shape": [1, 1]}]}', {}),
    ],
)
def test_what_is_no_request_is_a_problem_with_the_error_as_a_string(
    http: httpx.Client, model: str, body: bytes, headers: dict[str, str]
) -> None:
    response = http.post(INFER, content=body, headers=headers)

    problem = response.json()
    assert_is_problem(response, 422, problem["type"].rpartition("/")[2])
    assert problem["error"] == problem["detail"]
    assert response.headers["x-error-message"]


def test_element_that_says_it_has_four_gigabytes_is_refused(http: httpx.Client, model: str) -> None:
    raw = struct.pack("<I", 2**32 - 1) + b"short"
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    response = http.post(INFER, content=head + raw, headers={"Inference-Header-Content-Length": str(len(head))})

    assert_is_problem(response, 422, "invalid-request")


def test_more_than_64_pictures_are_refused(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="1 to 64 pictures, and is of 65"):
        client.infer("default", [encoded([b"x"] * 65)])


def test_single_picture_over_the_limit_is_413(http: httpx.Client, model: str) -> None:
    response = http.post(
        INFER, content=PICTURES[0] + bytes(32 * 1024**2), headers={"Inference-Header-Content-Length": "0"}
    )

    assert_is_problem(response, 413, "too-large")


@pytest.mark.parametrize("path", ["/v2/nothing", "/v2/models/default/config", "/v2/models/nobody", INFER])
def test_every_refusal_of_a_get_has_the_error_as_a_string(http: httpx.Client, path: str) -> None:
    response = http.get(path)

    assert response.status_code in (404, 405)
    assert response.json()["error"] == response.json()["detail"]


def test_model_whose_files_are_damaged_is_not_ready(server: RunningServer, http: httpx.Client) -> None:
    broken = api_builders.register_model(server.services, seed=2, aliases=())
    server.services.storage.path(f"models/{broken}/weights.safetensors").write_bytes(b"damaged")

    assert_is_problem(http.get(f"/v2/models/{broken}/ready"), 503, "model-unavailable")
    assert http.get(f"/v2/models/{broken}").status_code == 200


def test_a_key_for_predictions_is_enough_and_needed(tmp_path: Path) -> None:
    with api_builders.running(api_builders.settings_for(tmp_path)) as server:
        api_builders.register_model(server.services)
        with server.services.database.write() as session:
            key = access.create_key(session, scopes=[Scope.predict])
        with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
            with pytest.raises(InferenceServerException, match="Authorization: Bearer"):
                client.infer("default", [encoded(PICTURES)])
            headers = {"Authorization": f"Bearer {key.token}"}
            result = client.infer("default", [encoded(PICTURES)], headers=headers)

    assert result.as_numpy("scores").shape == (3, 2)
