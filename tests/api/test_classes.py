"""POST /v1/models/{model}/classes: one class more for a few-shot model, measured, and the first one left as it is."""

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import api_builders
import builders
import httpx
import pytest
import torch
from api_builders import CLASSES, RunningServer, assert_is_problem

from app.serving.extension import extend
from app.vision import artifact
from app.vision.artifact import Artifact, Support
from app.vision.prototypes import Prototypes

WIDTH = 512
PICTURES = [builders.jpeg(seed) for seed in range(40, 44)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One for all tests here: each makes a model of its own."""
    with api_builders.running(api_builders.settings_for(tmp_path_factory.mktemp("server"))) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with api_builders.client_of(server) as client:
        yield client


def support_of(images: int) -> Support:
    generator = torch.Generator().manual_seed(0)
    return Support(
        metric=0.1 * torch.eye(WIDTH),
        features=torch.rand(images, WIDTH, generator=generator),
        labels=torch.arange(images) % len(CLASSES),
        is_shot=torch.zeros(images, dtype=torch.bool),
        images=[(f"img_{i}", f"{i}.png") for i in range(images)],
    )


@pytest.fixture
def model(server: RunningServer) -> str:
    return api_builders.register_model(server.services, aliases=("shots",), support=support_of(9))


def add(client: httpx.Client, model: str, pictures: list[bytes] = PICTURES, name: str = "wasp") -> httpx.Response:
    files = [("file", (f"{i}.jpg", picture)) for i, picture in enumerate(pictures)]
    return client.post(f"/v1/models/{model}/classes", data={"name": name}, files=files)


def scores(client: httpx.Client, model: str, picture: bytes) -> dict[str, float]:
    answer = client.post(f"/predict?model={model}&top_k=9", content=picture).json()
    return {row["label"]: row["score"] for row in answer["predictions"][0]["top"]}


def test_a_class_is_added_as_a_new_version_and_the_first_one_stays(client: httpx.Client, model: str) -> None:
    before = scores(client, model, PICTURES[0])

    response = add(client, "shots")

    made = response.json()
    assert response.status_code == 201, response.text
    assert made["id"] != model
    assert (made["parent"], made["role"], made["method"]) == (model, "extended", "fine_tuning")
    assert made["classes"] == [*CLASSES, "wasp"]
    assert made["aliases"] == []
    assert client.get(f"/v1/models/{made['id']}").json() == made
    assert client.get("/v1/models/shots").json()["classes"] == list(CLASSES)
    assert scores(client, model, PICTURES[0]) == before
    after = scores(client, made["id"], PICTURES[0])
    assert max(after, key=lambda label: after[label]) == "wasp"
    # What the others say among themselves has not changed.
    ratio = [after[name] / before[name] for name in CLASSES]
    assert ratio == pytest.approx([ratio[0]] * len(CLASSES), rel=1e-3)


def test_the_new_version_is_measured_on_the_same_images_and_on_the_new_ones_one_by_one(
    client: httpx.Client, model: str
) -> None:
    made = add(client, model).json()
    assert made["metrics"]["left_out_one_by_one"] == len(PICTURES)
    evaluation = client.get(f"/v1/models/{made['id']}/evaluation").json()
    assert evaluation["images"] == 9 + len(PICTURES)
    assert [row["support"] for row in evaluation["per_class"]] == [5, 4, len(PICTURES)]
    assert sum(map(sum, evaluation["confusion_matrix"])) == evaluation["images"]
    assert {mistake["path"] for mistake in evaluation["mistakes"]} <= {f"{i}.png" for i in range(9)}


def test_one_picture_makes_a_class_too_and_is_not_counted_as_a_measurement(client: httpx.Client, model: str) -> None:
    made = add(client, model, PICTURES[:1]).json()
    assert made["metrics"]["left_out_one_by_one"] == 0
    assert client.get(f"/v1/models/{made['id']}/evaluation").json()["images"] == 9


def test_a_version_can_be_extended_in_its_turn(server: RunningServer, client: httpx.Client, model: str) -> None:
    first = add(client, model).json()
    second = add(client, first["id"], [builders.jpeg(50), builders.jpeg(51)], name="hornet").json()
    assert second["classes"] == [*CLASSES, "wasp", "hornet"]
    assert second["parent"] == first["id"]
    # What each class was added with is known of the newest, as a data set's manifest would have it.
    added = [*PICTURES, builders.jpeg(50), builders.jpeg(51)]
    made = artifact.load(server.services.storage.path(f"models/{second['id']}"))
    assert made.metadata["shots"] == [hashlib.sha256(picture).hexdigest() for picture in added]
    assert second["metrics"]["left_out_one_by_one"] == len(PICTURES) + 2
    assert add(client, model, name="hornet").status_code == 201


def test_json_says_the_same_as_a_form(client: httpx.Client, model: str) -> None:
    images = [{"b64": base64.b64encode(picture).decode()} for picture in PICTURES]
    encoded = client.post(f"/v1/models/{model}/classes", json={"name": "wasp", "images": images})
    assert encoded.status_code == 201
    assert encoded.json()["sha256"] == add(client, model).json()["sha256"]


def test_a_shot_is_measured_by_the_prototype_of_the_others(server: RunningServer, model: str) -> None:
    parent = artifact.load(server.services.storage.path(f"models/{model}"))
    support, features = support_of(9), torch.rand(3, WIDTH, generator=torch.Generator().manual_seed(3))
    extension = extend(parent, support, "wasp", features)

    head = parent.classifier.head
    right = 0
    for i in range(3):
        others = torch.cat([features[:i], features[i + 1 :]])
        own = Prototypes(others.mean(0, keepdim=True), support.metric).logits(features[i : i + 1])
        with torch.no_grad():
            right += int(own.item() > head(features[i]).max().item())
    assert extension.evaluation["confusion_matrix"][2][2] == right
    assert extension.artifact.classifier is not parent.classifier
    assert parent.classifier.head.out_features == len(CLASSES)


def test_a_name_may_hold_blanks_and_joiners_of_every_script(client: httpx.Client, model: str) -> None:
    assert add(client, model, name="葉\u3000桜 👩\u200d🌾").json()["classes"][-1] == "葉\u3000桜 👩\u200d🌾"


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "a\u2028b", "x" * 256])
def test_a_name_that_is_none_is_refused(client: httpx.Client, model: str, name: str) -> None:
    problem = assert_is_problem(add(client, model, name=name), 422, "invalid-request")
    assert [error["pointer"] for error in problem["errors"]] == ["#/name"]


@pytest.mark.parametrize("name", [CLASSES[0].upper(), f"{CLASSES[0]}.", f"{CLASSES[0]} .", f"{CLASSES[0]}\u00a0"])
def test_a_class_that_is_there_already_is_a_conflict(client: httpx.Client, model: str, name: str) -> None:
    problem = assert_is_problem(add(client, model, name=name), 409, "class-exists")
    assert repr(CLASSES[0]) in problem["detail"]


def test_a_picture_that_cannot_be_read_is_named_and_nothing_is_made(client: httpx.Client, model: str) -> None:
    known = client.get("/v1/models").json()["data"]
    problem = assert_is_problem(add(client, model, [PICTURES[0], PICTURES[1][:100]]), 422, "unreadable-image")
    assert [error["pointer"] for error in problem["errors"]] == ["#/file/1"]
    assert client.get("/v1/models").json()["data"] == known


def test_a_model_with_another_head_says_how_to_get_one_that_can(server: RunningServer, client: httpx.Client) -> None:
    other = api_builders.register_model(server.services, aliases=())
    problem = assert_is_problem(add(client, other), 409, "not-extensible")
    assert "few_shot" in problem["detail"]


@pytest.mark.parametrize("what", ["name", "kind"])
def test_what_the_model_cannot_be_given_is_refused_before_its_weights_are_read(
    server: RunningServer, client: httpx.Client, model: str, what: str
) -> None:
    other = api_builders.register_model(server.services, aliases=())
    name, extended = (CLASSES[0], model) if what == "name" else ("wasp", other)
    server.services.storage.path(f"models/{extended}/weights.safetensors").write_bytes(b"damaged")
    assert add(client, extended, name=name).status_code == 409


def test_a_disk_without_room_for_the_version_is_full(tmp_path: Path) -> None:
    with api_builders.running(api_builders.settings_for(tmp_path, min_free_bytes=2**60)) as server:
        model = api_builders.register_model(server.services, support=support_of(9))
        with api_builders.client_of(server) as client:
            assert_is_problem(add(client, model), 507, "storage-full")


def test_a_disk_that_does_not_take_the_version_is_full_and_nothing_is_left(
    server: RunningServer, client: httpx.Client, model: str
) -> None:
    storage = server.services.storage
    made = sorted(storage.path("models").iterdir())
    staging = storage.root / "staging"
    staging.rename(storage.root / "aside")
    staging.write_text("no folder")
    try:
        assert_is_problem(add(client, model), 507, "storage-full")
    finally:
        staging.unlink()
        (storage.root / "aside").rename(staging)
    assert sorted(storage.path("models").iterdir()) == made
    assert list((storage.root / "announced").iterdir()) == []


def test_what_a_model_is_extended_by_is_checked_when_it_is_read(server: RunningServer, model: str) -> None:
    path = server.services.storage.path(f"models/{model}/support.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with api_builders.client_of(server) as client:
        assert_is_problem(add(client, model), 503, "model-unavailable")


def test_artifacts_of_earlier_versions_can_be_read(server: RunningServer, model: str) -> None:
    path = server.services.storage.path(f"models/{model}/model.json")
    record: dict[str, Any] = json.loads(path.read_text())
    del record["support"]
    path.write_text(json.dumps(record))
    assert isinstance(artifact.load(path.parent), Artifact)
    assert artifact.load_support(path.parent) is None
