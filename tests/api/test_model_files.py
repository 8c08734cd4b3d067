"""Exports and cards over HTTP: made once, kept with the model, and gone with it."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import api_builders
import builders
import httpx
import numpy as np
import onnxruntime
import pytest
from api_builders import RunningServer, assert_is_problem
from PIL import Image
from typer.testing import CliRunner

from app.cli.root import cli
from app.vision import export


@pytest.fixture
def model(server: RunningServer) -> str:
    return api_builders.register_model(server.services)


def test_onnx_file_says_what_predict_says(server: RunningServer, client: httpx.Client, model: str) -> None:
    answer = client.get("/v1/models/default/export?format=onnx", timeout=120)

    assert answer.status_code == 200, answer.text
    assert answer.headers["content-disposition"] == f'attachment; filename="{model}.onnx"'
    verified = json.loads(answer.headers["x-graft-verified"])
    assert (verified["pictures"], verified["of"]) == (8, "random noise")  # its data set is not there
    assert verified["max_difference"] < export.SCORE_TOLERANCE
    session = onnxruntime.InferenceSession(answer.content, providers=["CPUExecutionProvider"])
    picture = builders.jpeg(5, size=(300, 256))
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
    (found,) = session.run(None, {"pictures": pixels[None]})
    (predicted,) = client.post("/predict", content=picture).json()["predictions"]
    names = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    scores = {row["label"]: row["score"] for row in predicted["top"]}
    assert dict(zip(names, found[0], strict=True)) == pytest.approx(scores, abs=0.01)


def test_file_is_made_once_however_many_ask_and_goes_with_the_model(
    server: RunningServer, client: httpx.Client
) -> None:
    model = api_builders.register_model(server.services, aliases=())
    path = f"/v1/models/{model}/export?format=safetensors"
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: httpx.get(f"{server.url}{path}", timeout=120), range(4)))

    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.content for answer in answers}) == 1
    made = server.services.storage.path(f"models/{model}/export-safetensors")
    before = made.stat().st_ino
    assert client.get(path).headers["etag"] == answers[0].headers["etag"]
    assert made.stat().st_ino == before
    assert client.get(path, headers={"Range": "bytes=0-7"}).status_code == 206

    assert client.delete(f"/v1/models/{model}").status_code == 200
    assert not made.exists()
    assert_is_problem(client.get(path), 404, "model-not-found")


def test_what_cannot_be_exported_is_told(server: RunningServer, client: httpx.Client, model: str) -> None:
    problem = assert_is_problem(client.get("/v1/models/default/export?format=tflite"), 422, "invalid-request")
    assert [error["pointer"] for error in problem["errors"]] == ["#/format"]
    assert_is_problem(client.get("/v1/models/default/export"), 422, "invalid-request")
    assert_is_problem(client.get("/v1/models/nobody/export?format=onnx"), 404, "model-not-found")
    server.services.storage.path(f"models/{model}/weights.safetensors").write_bytes(b"damaged")
    failed = client.get("/v1/models/default/export?format=safetensors", timeout=120)
    assert_is_problem(failed, 503, "export-unavailable")
    assert str(server.services.storage.root) not in failed.text


def test_card_tells_data_figures_and_limits(server: RunningServer, client: httpx.Client) -> None:
    dataset = api_builders.ready_dataset(server.services.database, classes=("cat", "d|og"))
    per_class = [{"name": name, "precision": 0.5, "recall": 1.0, "f1": 0.667, "support": 2} for name in ("cat", "d|og")]
    evaluation = {"per_class": per_class, "warnings": ["Measured on only 4 pictures."]}
    api_builders.register_model(server.services, dataset_id=dataset, evaluation=evaluation)

    answer = client.get("/v1/models/default/card")

    assert answer.headers["content-type"] == "text/markdown; charset=utf-8"
    card = answer.text
    assert "An image classifier of 2 classes" in card
    assert "| d\\|og | 8 | 2 | 0 |" in card
    assert "| cat | 0.500 | 1.000 | 0.667 | 2 |" in card
    assert "- Measured on only 4 pictures." in card
    assert "rough: cat, d|og." in card
    assert_is_problem(client.get("/v1/models/nobody/card"), 404, "model-not-found")


def test_command_line_writes_the_file_and_prints_the_card(server: RunningServer, model: str, tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    runner = CliRunner()
    wrote = runner.invoke(
        cli, ["models", "export", model, "--format", "safetensors", "-o", str(target), "--url", server.url]
    )
    assert (wrote.exit_code, target.exists()) == (0, True), wrote.output
    shown = runner.invoke(cli, ["models", "card", "default", "--url", server.url])
    assert f"# {model}\n" in shown.output  # beside the log lines of the server in this process
