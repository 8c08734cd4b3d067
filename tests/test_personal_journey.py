"""A model of one's own from a few labelled pictures: through a real server and worker, on the bundled backbone."""

import base64
import time
from typing import Any

import builders
import httpx
import pytest
from api_builders import RunningServer, assert_is_problem
from test_pretraining_journey import train, upload

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


def test_model_of_several_tasks_is_refused(server: RunningServer, client: httpx.Client) -> None:
    dataset = upload(server, client, builders.two_tasks(40), val_fraction="0.3")
    job = train(server, client, dataset=dataset["id"], method="feature_extraction", hyperparameters=SMALL)

    answer = client.post(f"/v1/models/{job['model']}/personalise", files=form("red", MINE))

    assert_is_problem(answer, 409, "several-tasks")


def test_unknown_model_is_404(client: httpx.Client) -> None:
    answer = client.post("/v1/models/mdl_none/personalise", files=form("cat", MINE[:1]))

    assert_is_problem(answer, 404, "model-not-found")
