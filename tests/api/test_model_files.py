"""Exported files and cards over HTTP and from the command line: checked, made once, kept, and gone with the model."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from pathlib import Path

import api_builders
import builders
import httpx
import pytest
from api_builders import CLASSES, RunningServer, assert_is_problem
from exported_files import ask_without_graft, facts_of
from test_models_and_operations import EVALUATION, create_key

from app.access import Scope
from app.cli import main
from app.datasets.ingest import PACKED_SIDE, manifest_key, packed_key
from app.datasets.manifest import Manifest, Record
from app.datasets.packed import PackedWriter
from app.db.tables import DatasetRow
from app.vision import usage
from app.vision.outputs import Output

PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"
# An export imports torch twice on a machine that may be busy.
PATIENCE = 240.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One for all tests here: each makes a model of its own, or asks the one of `exported`."""
    with api_builders.running(api_builders.settings_for(tmp_path_factory.mktemp("server"))) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        yield client


@pytest.fixture(scope="module")
def model(server: RunningServer) -> str:
    """On a data set with pictures."""
    return api_builders.register_model(server.services, dataset_id=dataset_with_pictures(server), evaluation=EVALUATION)


def dataset_with_pictures(server: RunningServer, *, name: str = "Blümchen / «x»") -> str:
    services = server.services
    dataset_id = api_builders.ready_dataset(services.database)
    with services.database.write() as session:
        session.query(DatasetRow).where(DatasetRow.id == dataset_id).update({"name": name})
    pictures = [builders.picture(seed, size=(60 + seed, 48)) for seed in range(5)]
    records = [
        Record(f"img_{i}", f"{i}.png", i % 2, "train" if i == 0 else "val", f"{i:064}", 60 + i, 48) for i in range(5)
    ]
    manifest = services.storage.path(manifest_key(dataset_id))
    manifest.parent.mkdir(parents=True)
    Manifest(list(CLASSES), records).write(manifest)
    with PackedWriter(services.storage.path(packed_key(dataset_id, PACKED_SIDE))) as writer:
        for picture in pictures:
            writer.append(picture)
        writer.finish(range(5))
    return dataset_id


def export_path(model: str, file_format: str) -> str:
    return f"/v1/models/{model}/export?format={file_format}"


def scores(client: httpx.Client, model: str, picture: bytes) -> dict[str, float]:
    [prediction] = client.post(f"/predict?model={model}", content=picture).json()["predictions"]
    return {row["label"]: row["score"] for row in prediction["top"]}


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["onnx", "pt2", "safetensors"])
def test_a_file_answers_pictures_as_predict_does(
    client: httpx.Client, model: str, tmp_path: Path, file_format: str
) -> None:
    answer = client.get(export_path("default", file_format))
    assert answer.status_code == 200, answer.text
    path = builders.written(tmp_path / f"model.{file_format}", answer.content)

    for picture in (builders.jpeg(5, size=(700, 500)), builders.jpeg(6, size=(90, 300))):
        assert ask_without_graft(path, picture) == pytest.approx(scores(client, model, picture), abs=1e-2)

    facts = facts_of(path)
    assert (facts["model"], json.loads(facts["classes"])) == (model, list(CLASSES))
    assert facts["card"].startswith("# Model card: Blümchen")
    verified = json.loads(answer.headers["x-graft-verified"])
    assert json.loads(facts["verification"]) == verified
    # Four validation images, and each enlarged.
    assert (verified["source"], verified["pictures"], verified["same_label"]) == ("validation images", 8, 8)


def test_the_answer_names_the_file_and_its_digest(client: httpx.Client, model: str) -> None:
    answer = client.get(export_path(model, "safetensors"))

    digest = hashlib.sha256(answer.content).digest()
    assert answer.headers["etag"] == f'"{digest.hex()}"'
    assert answer.headers["content-type"] == "application/octet-stream"
    disposition = answer.headers["content-disposition"]
    assert disposition.isascii()
    assert f'attachment; filename="Bl_mchen_x_-{model}.safetensors"; ' in disposition
    message = Message()
    message["Content-Disposition"] = disposition.replace(' filename="', ' ignored="')
    assert message.get_filename() == f"Blümchen _ «x»-{model}.safetensors"


def test_head_part_and_unchanged_files_cost_no_download(client: httpx.Client, model: str) -> None:
    path = export_path(model, "safetensors")
    whole = client.get(path)

    head = client.head(path)
    part = client.get(path, headers={"Range": "bytes=8-15"})
    tail = client.get(path, headers={"Range": "bytes=-4", "If-Range": whole.headers["etag"]})
    unchanged = client.get(path, headers={"If-None-Match": whole.headers["etag"]})

    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-length", "etag", "content-disposition", "accept-ranges", "content-type"):
        assert head.headers[name] == whole.headers[name], name
    assert (part.status_code, part.content) == (206, whole.content[8:16])
    assert part.headers["content-range"] == f"bytes 8-15/{len(whole.content)}"
    assert (tail.status_code, tail.content) == (206, whole.content[-4:])
    assert (unchanged.status_code, unchanged.content) == (304, b"")


@pytest.mark.parametrize(
    "headers",
    [
        {"Range": "bytes=5-2"},
        {"Range": "bytes=0-1,4-5"},
        {"Range": "lines=1-2"},
        {"Range": "bytes=0-3", "If-Range": '"another"'},
    ],
    ids=lambda headers: next(iter(headers.values())),
)
def test_a_range_that_means_nothing_here_gets_the_whole(
    client: httpx.Client, model: str, headers: dict[str, str]
) -> None:
    path = export_path(model, "safetensors")

    answer = client.get(path, headers=headers)

    assert (answer.status_code, answer.content) == (200, client.get(path).content)


@pytest.mark.parametrize("asked", ["bytes=999999999-", "bytes=-0"])
def test_a_range_behind_the_end_is_a_problem(client: httpx.Client, model: str, asked: str) -> None:
    path = export_path(model, "safetensors")
    answer = client.get(path, headers={"Range": asked})

    assert_is_problem(answer, 416, "range-not-satisfiable")
    assert answer.headers["content-range"] == f"bytes */{client.head(path).headers['content-length']}"


HOSTILE_RANGES = {
    "ten thousand": "bytes=" + ",".join("0-" for _ in range(10_000)),
    "five thousand apart": "bytes=" + ",".join(f"{2 * at}-{2 * at}" for at in range(5_000)),
    "overlapping": "bytes=" + ",".join(f"{at}-" for at in range(100)),
    "apart": "bytes=" + ",".join(f"{2 * at}-{2 * at}" for at in range(100)),
    "suffix beyond the file": "bytes=-999999999999999",
    "suffixes beyond the file": "bytes=" + ",".join("-999999999999999" for _ in range(100)),
    "longer than Python's integers": "bytes=0-" + "9" * 5_000,
    "begins beyond Python's integers": f"bytes={'9' * 5_000}-",
    "digits of other scripts": "bytes=٠-١".encode().decode("latin-1"),
    "nothing": "bytes=,,,-,--",
    "words": "bytes=a-b,1-2-3,-1-",
}


@pytest.mark.parametrize("name", HOSTILE_RANGES)
def test_no_range_breaks_a_download_or_makes_it_larger(client: httpx.Client, model: str, name: str) -> None:
    for path in (export_path(model, "safetensors"), "/static/graft.css", "/swagger/swagger-ui.css"):
        whole = client.get(path)
        assert whole.status_code == 200, path

        answer = client.get(path, headers={"Range": HOSTILE_RANGES[name].encode("latin-1")})

        if answer.status_code == 416:
            assert_is_problem(answer, 416, "range-not-satisfiable")
        elif answer.status_code == 206:
            assert answer.content in whole.content
        else:
            assert (answer.status_code, answer.content) == (200, whole.content), path


@pytest.mark.slow
def test_a_file_is_made_once_and_goes_with_its_model(server: RunningServer, client: httpx.Client) -> None:
    model = api_builders.register_model(server.services, aliases=())
    path = export_path(model, "safetensors")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: httpx.get(f"{server.url}{path}", timeout=PATIENCE), range(4)))

    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.content for answer in answers}) == 1
    # Its data set is not there.
    assert json.loads(answers[0].headers["x-graft-verified"])["source"] == "generated pictures"
    made = server.services.storage.path(f"exports/{model}")
    assert made.is_dir()
    assert client.delete(f"/v1/models/{model}").status_code == 200
    assert not made.exists()
    assert_is_problem(client.get(path), 404, "model-not-found")


@pytest.mark.slow
def test_a_model_deleted_while_it_is_exported_leaves_nothing(server: RunningServer, client: httpx.Client) -> None:
    model = api_builders.register_model(server.services, aliases=())
    found: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: found.append(httpx.get(f"{server.url}{export_path(model, 'onnx')}", timeout=PATIENCE))
    )
    asking.start()
    staging = server.services.storage.path("staging")
    api_builders.wait_for(lambda: any(staging.iterdir()))

    assert client.delete(f"/v1/models/{model}").status_code == 200
    asking.join()

    # Found out before or after its files were read, as it happens.
    assert found[0].status_code in (404, 503), found[0].text
    assert found[0].headers["content-type"] == "application/problem+json"
    assert not server.services.storage.exists(f"exports/{model}")
    assert not server.services.storage.exists(f"models/{model}")


@pytest.mark.slow
def test_what_cannot_be_exported_is_told(server: RunningServer, client: httpx.Client) -> None:
    model = api_builders.register_model(server.services, aliases=())
    problem = assert_is_problem(client.get(export_path(model, "tflite")), 422, "invalid-request")
    assert [error["pointer"] for error in problem["errors"]] == ["#/format"]
    assert_is_problem(client.get(f"/v1/models/{model}/export"), 422, "invalid-request")
    assert_is_problem(client.get(export_path("mdl_none", "onnx")), 404, "model-not-found")

    server.services.storage.path(f"models/{model}/weights.safetensors").write_bytes(b"damaged")
    failed = client.get(export_path(model, "safetensors"))

    assert_is_problem(failed, 503, "model-unavailable")
    assert str(server.services.storage.root) not in failed.text


def test_whoever_may_predict_may_read_the_card_and_not_take_the_model(tmp_path: Path) -> None:
    with api_builders.running(api_builders.settings_for(tmp_path)) as server, api_builders.client_of(server) as client:
        model = api_builders.register_model(server.services)
        headers = create_key(server, Scope.predict)

        assert client.get(f"/v1/models/{model}/card", headers=headers).status_code == 200
        assert_is_problem(client.get(export_path(model, "onnx"), headers=headers), 403, "scope-too-small")


def test_the_commands_write_the_file_and_print_the_card(
    server: RunningServer, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def graft(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*words, "--url", server.url])
        assert ended.value.code == 0
        return capsys.readouterr().out

    target = tmp_path / "pets.safetensors"
    said = graft("models", "export", "default", "--format", "safetensors", "-o", str(target))

    assert f"Wrote {target}: on 8 validation images" in said
    assert facts_of(target)["model"] == model
    assert [path.name for path in tmp_path.iterdir()] == ["pets.safetensors"]
    assert "# Model card: Blümchen" in graft("models", "card", model)


def test_the_page_on_export_shows_the_lines_that_the_files_carry() -> None:
    shown = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    outputs = [Output("", ["daisy", "rose"], 1.0)]

    assert shown[0] == usage.of_graph("onnx", outputs)
    assert shown[1] == usage.of_graph("pt2", outputs)
    made = 'network = torchvision.models.get_model("resnet18", weights=None, num_classes=2)\n'
    assert shown[2] == usage.of_weights(outputs, network=made + "network.load_state_dict(tensors)\n")


# Cards


def card_of(client: httpx.Client, model: str) -> str:
    answer = client.get(f"/v1/models/{model}/card")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/markdown; charset=utf-8"
    return answer.text


def test_a_card_tells_data_training_numbers_and_limits(client: httpx.Client, model: str) -> None:
    card = card_of(client, "default")

    headings = [line for line in card.splitlines() if line.startswith("## ")]
    assert headings == ["## Data", "## Training", "## Numbers", "## Limits", "## Licence", "## Use"]
    assert "| cat | 8 | 2 | 0 |" in card
    assert f"SHA-256 `{'0' * 64}`" in card
    assert "Method `fine_tuning`" in card
    assert "On 3 validation images: accuracy **0.667** (95 % interval 0.200 to 0.900)" in card
    assert "| cat | 1.000 | 0.500 | – | 0.667 | 2 |" in card
    assert "- 1 × cat taken for dog" in card
    assert "temperature 1.500" in card
    assert "Fewer than 30 validation images, so their figures say little: cat (2), dog (1)." in card
    assert "No pretrained weights: it was trained from nothing." in card
    assert f'curl -F file=@picture.jpg "http://localhost:8000/predict?model={model}"' in card


def test_a_card_shows_names_and_runs_nothing(server: RunningServer, client: httpx.Client) -> None:
    dataset = dataset_with_pictures(server, name="<script>*a|b*\n# c</script>")
    model = api_builders.register_model(server.services, aliases=(), dataset_id=dataset)

    card = card_of(client, model)

    assert card.splitlines()[0] == r"# Model card: \<script\>\*a\|b\* \# c\</script\>"
    assert "The evaluation is missing" in card


def test_a_card_of_a_deleted_data_set_says_so(server: RunningServer, client: httpx.Client) -> None:
    model = api_builders.register_model(server.services, aliases=(), dataset_id="ds_gone", evaluation=EVALUATION)

    assert "The data set `ds_gone` has been deleted since" in card_of(client, model)


def test_no_card_of_an_unknown_model(client: httpx.Client) -> None:
    assert_is_problem(client.get("/v1/models/mdl_none/card"), 404, "model-not-found")
