"""A model of one's own from a few labelled pictures: through a real server and worker, on the bundled backbone."""

import base64
import time
from typing import Any

import builders
import httpx
import numpy as np
import pytest
import torch
from api_builders import RunningServer, assert_is_problem
from test_pretraining_journey import train, upload

import graft_client
from app.vision import artifact
from app.vision.artifact import Artifact

SMALL: dict[str, Any] = {"image_size": 96}
# Of a colour between the classes', so that a model says something of them, and its owner something else.
MINE = [builders.jpeg(700 + i, tint=(130, 60, 130)) for i in range(6)]
Files = list[tuple[str, tuple[str | None, Any]]]


@pytest.fixture
def model(server: RunningServer, client: httpx.Client) -> str:
    dataset = upload(server, client, builders.class_folders(16), val_fraction="0.25")
    job = train(
        server, client, dataset=dataset["id"], promote="always", method="feature_extraction", hyperparameters=SMALL
    )
    return str(job["model"])


def ask(client: httpx.Client, model: str, picture: bytes) -> dict[str, Any]:
    answer = client.post("/predict", params={"model": model}, content=picture)
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["predictions"][0])


def form(label: str, pictures: list[bytes]) -> Files:
    return [("label", (None, label)), *(("file", (f"{i}.jpg", each)) for i, each in enumerate(pictures))]


def other_than_said(client: httpx.Client, model: str) -> str:
    said = [ask(client, model, picture)["label"] for picture in MINE]
    return "dog" if said.count("cat") >= 3 else "cat"


def test_copy_learns_ones_own_pictures_and_keeps_what_it_knew(
    server: RunningServer, client: httpx.Client, model: str
) -> None:
    wanted = other_than_said(client, model)
    held_out = [builders.jpeg(800 + i, tint=(130, 60, 130)) for i in range(4)]
    known = builders.class_folders(4, first_seed=5000)
    before = client.get(f"/v1/models/{model}").json()
    said_before = ask(client, model, MINE[0])

    start = time.monotonic()
    answer = client.post(f"/v1/models/{model}/personalise", files=form(wanted, MINE))
    seconds = time.monotonic() - start

    assert answer.status_code == 201, answer.text
    made = answer.json()
    assert seconds < 30
    assert (made["role"], made["parent"], made["aliases"]) == ("personalised", model, [])
    assert (made["job"], made["dataset"], made["classes"]) == (before["job"], before["dataset"], ["cat", "dog"])
    # Measured on the same validation pictures as its parent, and as well.
    assert made["metrics"]["val_accuracy"] == before["metrics"]["val_accuracy"] == 1.0
    evaluation = client.get(f"/v1/models/{made['id']}/evaluation").json()
    assert sum(map(sum, evaluation["confusion_matrix"])) == 8
    personal = made["metrics"]["personal"]
    assert (personal["images"], personal["accuracy"]) == (6, 1.0)
    assert personal["accuracy_before"] < 1.0
    assert personal["accuracy_left_out"] >= 5 / 6 - 1e-6  # each by what was learnt from the other five
    assert [ask(client, made["id"], picture)["label"] for picture in held_out] == [wanted] * 4
    for path, picture in known.items():
        assert ask(client, made["id"], picture)["label"] == path.partition("/")[0]
    # What it learnt is of a kind that it knows; the parent and the alias are as they were.
    assert ask(client, made["id"], MINE[0])["ood_score"] < said_before["ood_score"] + 1e-6
    assert ask(client, model, MINE[0]) == said_before
    assert client.get("/v1/aliases").json()["data"][0]["model"] == model
    assert client.get(f"/v1/models/{model}").json() == before
    assert "learnt a few labelled pictures more" in client.get(f"/v1/models/{made['id']}/card").text


def test_validation_pictures_that_are_learnt_are_no_longer_measured_on(client: httpx.Client, model: str) -> None:
    dataset = client.get(f"/v1/models/{model}").json()["dataset"]
    rows = client.get(f"/v1/datasets/{dataset}/images", params={"limit": 100}).json()["data"]
    files = builders.class_folders(16)
    held_out = [row["path"] for row in rows if row["split"] == "val"]
    mine = form("cat", [files[path] for path in held_out if path.startswith("cat/")][:3])

    made = client.post(f"/v1/models/{model}/personalise", files=mine).json()

    evaluation = client.get(f"/v1/models/{made['id']}/evaluation").json()
    assert sum(map(sum, evaluation["confusion_matrix"])) == len(held_out) - 3
    again = client.post(f"/v1/models/{made['id']}/personalise", files=form("cat", MINE[:1])).json()
    evaluation = client.get(f"/v1/models/{again['id']}/evaluation").json()
    assert sum(map(sum, evaluation["confusion_matrix"])) == len(held_out) - 3
    everything = [("label", (None, "cat")), *(("file", (path, files[path])) for path in held_out)]
    assert_is_problem(client.post(f"/v1/models/{model}/personalise", files=everything), 409, "no-validation-pictures")


def test_json_does_the_same_and_copies_can_be_personalised_again(client: httpx.Client, model: str) -> None:
    wanted = other_than_said(client, model)
    images = [{"b64": base64.b64encode(each).decode(), "label": wanted} for each in MINE]

    first = client.post(f"/v1/models/{model}/personalise", json={"images": images[:1]})
    second = client.post(f"/v1/models/{first.json()['id']}/personalise", json={"images": images[1:]})

    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json()["metrics"]["personal"]["accuracy_left_out"] is None  # nothing would be left to learn
    assert second.json()["parent"] == first.json()["id"]
    assert ask(client, second.json()["id"], MINE[0])["label"] == wanted


def test_in_a_form_a_label_is_that_of_the_files_behind_it(client: httpx.Client, model: str) -> None:
    known = builders.class_folders(2, first_seed=9000)
    cats, dogs = ([each for path, each in known.items() if path.startswith(name)] for name in ("cat", "dog"))

    answer = client.post(f"/v1/models/{model}/personalise", files=[*form("cat", cats), *form("dog", dogs)])

    assert answer.json()["metrics"]["personal"] == {
        "images": 4,
        "accuracy_before": 1.0,
        "accuracy": 1.0,
        "accuracy_left_out": 1.0,
    }


def test_as_many_pictures_as_a_request_may_have_each_with_its_label(client: httpx.Client, model: str) -> None:
    known = list(builders.class_folders(20, first_seed=9000).items())
    files = [part for path, each in known for part in form(path.partition("/")[0], [each])]

    answer = client.post(f"/v1/models/{model}/personalise", files=files)

    assert answer.status_code == 201, answer.text
    assert answer.json()["metrics"]["personal"]["images"] == 40


@pytest.mark.parametrize(
    ("files", "pointers"),
    [
        (form("wasp", MINE[:2]), ["#/images/0/label", "#/images/1/label"]),
        ([*form("cat", MINE[:1]), *form("wasp", MINE[:1])], ["#/images/1/label"]),
        ([("file", ("a.jpg", MINE[0])), ("label", (None, "cat"))], ["#/images/0/label"]),
        ([("label", (None, "cat"))], ["#/file"]),
        ([*form("cat", MINE[:1]), *form("cat", [b"text"])], ["#/file/1"]),
        ([*form("cat", MINE[:1]), ("top_k", (None, "1"))], ["#/top_k"]),
    ],
)
def test_what_cannot_be_learnt_is_pointed_at_and_nothing_is_made(
    client: httpx.Client, model: str, files: Files, pointers: list[str]
) -> None:
    answer = client.post(f"/v1/models/{model}/personalise", files=files)

    assert answer.status_code == 422, answer.text
    assert [error["pointer"] for error in answer.json()["errors"]] == pointers
    assert [each["id"] for each in client.get("/v1/models").json()["data"]] == [model]


def test_model_without_its_data_set_cannot_be_measured_and_says_so(client: httpx.Client, model: str) -> None:
    dataset = client.get(f"/v1/models/{model}").json()["dataset"]
    assert client.delete(f"/v1/datasets/{dataset}").status_code == 200

    answer = client.post(f"/v1/models/{model}/personalise", files=form("cat", MINE))

    assert_is_problem(answer, 409, "no-validation-pictures")


@pytest.fixture
def two_things(server: RunningServer, client: httpx.Client) -> str:
    """A model that tells colour and light; of its pictures some lack a label of one."""
    files = builders.two_tasks(40, without={3: "colour", 8: "light", 9: "light"})
    dataset = upload(server, client, files, val_fraction="0.3")
    job = train(
        server, client, dataset=dataset["id"], promote="always", method="feature_extraction", hyperparameters=SMALL
    )
    return str(job["model"])


def evaluation(client: httpx.Client, model: str) -> list[list[dict[str, Any]]]:
    """Of each thing, its classes."""
    found = client.get(f"/v1/models/{model}/evaluation").json()
    return [task["per_class"] for task in found["tasks"].values()]


def loaded(server: RunningServer, model: str) -> Artifact:
    return artifact.load(server.services.storage.path(f"models/{model}"))


def test_of_several_things_those_with_labels_are_learnt_and_the_others_stay_to_the_bit(
    server: RunningServer, client: httpx.Client, two_things: str
) -> None:
    before = client.get(f"/v1/models/{two_things}").json()
    said = ask(client, two_things, MINE[0])["tasks"]
    wanted = "dark" if said["light"]["label"] == "bright" else "bright"

    made = client.post(
        f"/v1/models/{two_things}/personalise",
        files=[("label:light", (None, wanted)), *(("file", (f"{i}.jpg", each)) for i, each in enumerate(MINE))],
    )

    assert made.status_code == 201, made.text
    model = made.json()
    assert (model["tasks"], model["classes"]) == (before["tasks"], before["classes"])
    now = ask(client, model["id"], MINE[0])["tasks"]
    assert (now["light"]["label"], now["colour"]) == (wanted, said["colour"])
    # What is told of the validation pictures, too: a label that is missing there is asked of nobody.
    evaluations = [client.get(f"/v1/models/{each}/evaluation").json() for each in (two_things, model["id"])]
    supports = [
        {task: sum(map(sum, found["confusion_matrix"])) for task, found in evaluation["tasks"].items()}
        for evaluation in evaluations
    ]
    assert supports[0] == supports[1]
    personal = model["metrics"]["personal"]
    assert list(personal["tasks"]) == ["light"]
    assert personal["tasks"]["light"] == {name: value for name, value in personal.items() if name != "tasks"}
    assert (personal["images"], personal["accuracy"]) == (6, 1.0)
    assert personal["accuracy_before"] < 1.0
    figures = [found["metrics"]["tasks"]["colour"] for found in (before, model)]
    assert figures[0]["val_accuracy"] == figures[1]["val_accuracy"]
    assert figures[0]["val_loss"] == pytest.approx(figures[1]["val_loss"], rel=1e-3)

    parent, copy = (loaded(server, each) for each in (two_things, model["id"]))
    assert torch.equal(copy.classifier.head.weight[:2], parent.classifier.head.weight[:2])
    assert not torch.equal(copy.classifier.head.weight[2:], parent.classifier.head.weight[2:])
    assert (copy.tasks[0], copy.temperature) == (parent.tasks[0], parent.temperature)
    assert parent.reference is not None
    assert copy.reference is not None
    assert np.array_equal(copy.reference.errors[0], parent.reference.errors[0])
    assert copy.reference.labels[-6:].tolist() == [[-1, copy.tasks[1].classes.index(wanted)]] * 6
    assert "learnt a few labelled pictures more" in client.get(f"/v1/models/{model['id']}/card").text
    sets = client.post(f"/predict?model={model['id']}&coverage=0.5&neighbors=1", content=MINE[0]).json()["predictions"]
    assert set(sets[0]["tasks"]["colour"]["prediction_set"]) <= {"blue", "red"}
    assert sets[0]["neighbors"][0]["tasks"] == {"colour": None, "light": wanted}


def test_pictures_may_have_labels_of_all_things_or_of_some(
    server: RunningServer, client: httpx.Client, two_things: str
) -> None:
    labels: list[Any] = [{"colour": "red", "light": "dark"}, {"light": "bright"}, "blue", {"colour": "blue"}]
    images = [
        {"b64": base64.b64encode(each).decode(), "label": label} for each, label in zip(MINE, labels, strict=False)
    ]

    as_json = client.post(f"/v1/models/{two_things}/personalise", json={"images": images})
    with graft_client.Graft(str(client.base_url)) as graft:
        by_client = graft.models.personalise(two_things, list(zip(labels, MINE, strict=False)))

    assert as_json.status_code == 201, as_json.text
    personal = as_json.json()["metrics"]["personal"]
    assert by_client.metrics["personal"] == personal
    assert personal["images"] == 4
    assert {task: found["images"] for task, found in personal["tasks"].items()} == {"colour": 3, "light": 2}
    # As the default it is what the next model is held against, by its answers about everything.
    assert client.put("/v1/aliases/default", json={"model": by_client.id}).status_code == 200
    job = train(server, client, dataset=by_client.dataset, method="feature_extraction", hyperparameters=SMALL, seed=1)
    promotion = client.get(f"/v1/models/{job['model']}").json()["promotion"]
    assert (promotion["incumbent"], promotion["promoted"]) == (by_client.id, False)
    pictures_of_validation = {sum(found["support"] for found in task) for task in evaluation(client, by_client.id)}
    assert pictures_of_validation == {promotion["images"]}


def test_what_a_model_does_not_tell_cannot_be_learnt(client: httpx.Client, two_things: str) -> None:
    for fields, pointer in [
        ({"label:size": "red"}, "#/images/0/label/size"),
        ({"label:colour": "dark"}, "#/images/0/label/colour"),
        ({"label:colour": ""}, "#/images/0/label"),
        ({"label": "dark"}, "#/images/0/label"),
    ]:
        picture = {"file": ("a.jpg", MINE[0], "image/jpeg")}
        answer = client.post(f"/v1/models/{two_things}/personalise", data=fields, files=picture)
        problem = assert_is_problem(answer, 422, "invalid-request")
        assert [error["pointer"] for error in problem["errors"]] == [pointer]
        assert "colour: blue, red; light: bright, dark" in problem["detail"]


def test_a_model_of_one_thing_knows_no_names_of_things(client: httpx.Client, model: str) -> None:
    files = [("label:colour", (None, "cat")), ("file", ("a.jpg", MINE[0]))]

    answer = client.post(f"/v1/models/{model}/personalise", files=files)

    assert [error["pointer"] for error in answer.json()["errors"]] == ["#/images/0/label/colour"]


def test_unknown_model_is_404(client: httpx.Client) -> None:
    answer = client.post("/v1/models/mdl_none/personalise", files=form("cat", MINE[:1]))

    assert_is_problem(answer, 404, "model-not-found")
