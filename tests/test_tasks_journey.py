"""Several label columns: one backbone, a head for each, one forward pass. Through a real server and worker."""

import json
from typing import Any

import builders
import httpx
import pytest
from api_builders import RunningServer, assert_is_problem
from test_pretraining_journey import train, upload

SMALL: dict[str, Any] = {"image_size": 64}
BLUE_DARK = builders.jpeg(999, tint=(0, 0, 110))


@pytest.mark.parametrize(
    "request_",
    [
        {"method": "feature_extraction"},
        {"method": "full_fine_tuning", "hyperparameters": {"epochs": 2, "batch_size": 8, "mixup": 0.2, **SMALL}},
        {"method": "fine_tuning", "recipe": "classic", "hyperparameters": {"epochs": 2, "batch_size": 8, **SMALL}},
        {"method": "auto", "budget_seconds": 4, "hyperparameters": SMALL},
    ],
    ids=lambda request: request["method"],
)
def test_each_method_learns_and_answers_all_tasks(
    server: RunningServer, client: httpx.Client, request_: dict[str, Any]
) -> None:
    files = builders.two_tasks(40, without={3: "colour", 8: "light", 9: "light"})
    dataset = upload(server, client, files, val_fraction="0.3")
    assert [(task["name"], [c["name"] for c in task["classes"]]) for task in dataset["tasks"]] == [
        ("colour", ["blue", "red"]),
        ("light", ["bright", "dark"]),
    ]

    job = train(server, client, dataset=dataset["id"], **request_)

    model = client.get(f"/v1/models/{job['model']}").json()
    assert model["classes"] == ["blue", "red"]
    assert model["tasks"] == [
        {"name": "colour", "classes": ["blue", "red"]},
        {"name": "light", "classes": ["bright", "dark"]},
    ]
    assert model["aliases"] == ["default"]
    look_at_the_figures(client, model, dataset)
    look_at_an_answer(client)


def look_at_the_figures(client: httpx.Client, model: dict[str, Any], dataset: dict[str, Any]) -> None:
    of_tasks = model["metrics"]["tasks"]
    assert model["metrics"]["val_accuracy"] == of_tasks["colour"]["val_accuracy"]
    evaluation = client.get(f"/v1/models/{model['id']}/evaluation").json()
    for task in dataset["tasks"]:
        validated = [row["val"] for row in task["classes"]]
        found = evaluation["tasks"][task["name"]]
        assert [sum(row) for row in found["confusion_matrix"]] == validated
        assert [each["support"] for each in found["per_class"]] == validated
        assert found["accuracy"] == of_tasks[task["name"]]["val_accuracy"]
        assert "predictions" not in found
    assert evaluation["confusion_matrix"] == evaluation["tasks"]["colour"]["confusion_matrix"]
    history = client.get(f"/v1/jobs/{model['job']}/history").json()["data"]
    assert {"val_accuracy:colour", "val_accuracy:light"} <= set(history[-1]["figures"])


def look_at_an_answer(client: httpx.Client) -> None:
    (prediction,) = client.post("/predict?top_k=1", content=BLUE_DARK).json()["predictions"]
    assert set(prediction["tasks"]) == {"colour", "light"}
    assert [len(task["top"]) for task in prediction["tasks"].values()] == [1, 1]
    assert prediction["label"] == prediction["tasks"]["colour"]["label"]
    (whole,) = client.post("/predict?top_k=9", content=BLUE_DARK).json()["predictions"]
    for task in whole["tasks"].values():
        assert sum(row["score"] for row in task["top"]) == pytest.approx(1, abs=1e-5)


def test_probe_of_two_tasks_is_right_about_both(server: RunningServer, client: httpx.Client) -> None:
    dataset = upload(server, client, builders.two_tasks(40), val_fraction="0.3")
    train(server, client, dataset=dataset["id"], method="feature_extraction")
    (prediction,) = client.post("/predict", content=BLUE_DARK).json()["predictions"]
    assert {name: task["label"] for name, task in prediction["tasks"].items()} == {"colour": "blue", "light": "dark"}


def test_second_model_is_compared_by_all_labels_of_each_image(server: RunningServer, client: httpx.Client) -> None:
    dataset = upload(server, client, builders.two_tasks(24), val_fraction="0.5")
    val = dataset["splits"]["val"]
    first = train(server, client, dataset=dataset["id"], method="feature_extraction")
    second = train(server, client, dataset=dataset["id"], method="feature_extraction", seed=1)
    promotion = client.get(f"/v1/models/{second['model']}").json()["promotion"]
    assert (promotion["incumbent"], promotion["images"], promotion["promoted"]) == (first["model"], val, False)

    # One that knows other things cannot be compared, and somebody wants it served.
    single = upload(server, client, builders.class_folders(6, classes=("blue", "red")), val_fraction="0.5")
    third = train(server, client, dataset=single["id"], method="feature_extraction")
    promotion = client.get(f"/v1/models/{third['model']}").json()["promotion"]
    assert promotion["promoted"] is True
    assert "other classes" in promotion["reason"]


def test_what_one_task_alone_can_do_is_refused_for_several(server: RunningServer, client: httpx.Client) -> None:
    dataset = upload(server, client, builders.two_tasks(24), val_fraction="0.5")
    refused = client.post("/v1/jobs", json={"dataset": dataset["id"], "method": "few_shot"})
    problem = assert_is_problem(refused, 422, "invalid-request")
    assert [error["pointer"] for error in problem["errors"]] == ["#/method"]


def test_pictures_without_the_first_label_are_listed_without_a_class(
    server: RunningServer, client: httpx.Client
) -> None:
    dataset = upload(server, client, builders.two_tasks(24, without={5: "colour"}), val_fraction="0.5")
    images = client.get(f"/v1/datasets/{dataset['id']}/images?limit=200").json()["data"]
    assert {image["path"]: image["class"] for image in images if image["class"] is None} == {"5.jpg": None}
    blue = client.get(f"/v1/datasets/{dataset['id']}/images?class=blue&limit=200").json()["data"]
    assert len(blue) == 11
    # Left out, a class that would have no picture to train on is named whichever task it belongs to.
    dark = [f"{i}.jpg" for i in range(24) if i // 2 % 2]
    refused = client.post("/v1/jobs", json={"dataset": dataset["id"], "exclude": dark})
    assert "no training image of dark" in assert_is_problem(refused, 422, "invalid-request")["detail"]
    assert json.dumps(refused.json()).count("bright") == 0
