"""The other stages: a backbone from pictures without labels, a few-shot classifier that starts from it, one class more.

On the backbone that comes with Graft: no weights of anybody else are needed.
"""

from typing import Any

import builders
import httpx
import pytest
from api_builders import RunningServer, assert_is_problem
from test_journey import work

from app.jobs.states import JobKind
from worker.run_ingest import run_ingest
from worker.run_job import run_training

UNLABELLED = {f"{'a/b/' * (i % 3)}{i}.jpg": builders.jpeg(i) for i in range(20)}
SMALL: dict[str, Any] = {"image_size": 64}


def upload(server: RunningServer, client: httpx.Client, files: dict[str, bytes], **form: str) -> dict[str, Any]:
    answer = client.post("/v1/datasets", files={"file": ("x.zip", builders.zip_of(files))}, data=form)
    assert answer.status_code == 201, answer.text
    work(server, JobKind.ingest, run_ingest)
    dataset: dict[str, Any] = client.get(f"/v1/datasets/{answer.json()['id']}").json()
    assert (dataset["status"], dataset["error"]) == ("ready", None)
    return dataset


def train(server: RunningServer, client: httpx.Client, **request: Any) -> dict[str, Any]:
    queued = client.post("/v1/jobs", json=request)
    assert queued.status_code == 201, queued.text
    work(server, JobKind.training, run_training)
    job: dict[str, Any] = client.get(f"/v1/jobs/{queued.json()['id']}").json()
    assert (job["status"], job["error"]) == ("succeeded", None)
    return job


def test_from_pictures_without_labels_to_a_classifier_with_one_class_more(
    server: RunningServer, client: httpx.Client
) -> None:
    unlabelled = upload(server, client, {**UNLABELLED, "notes.txt": b"text"}, kind="unlabelled", name="roll")
    assert (unlabelled["kind"], unlabelled["classes"], unlabelled["warnings"]) == ("unlabelled", [], [])
    assert unlabelled["splits"] == {"train": 20, "val": 0, "test": 0}
    assert [rejected["path"] for rejected in unlabelled["rejected"]] == ["notes.txt"]
    images = client.get(f"/v1/datasets/{unlabelled['id']}/images").json()["data"]
    assert {image["class"] for image in images} == {None}

    backbone = pretrain(server, client, unlabelled)
    look_at_the_backbone(client, backbone)
    classifier = few_shot(server, client, backbone)
    add_a_class(client, classifier)


def pretrain(server: RunningServer, client: httpx.Client, dataset: dict[str, Any]) -> str:
    request = {"dataset": dataset["id"], "hyperparameters": {"epochs": 2, "batch_size": 16, **SMALL}}
    # auto has no choice, and says so; what needs labels is refused.
    expected = client.post("/v1/jobs?dry_run=true", json=request).json()
    assert expected["spec"]["method"] == "self_supervised"
    assert expected["spec"]["backbone"]["name"] == "graft_small"
    assert "the data set has no labels" in " ".join(expected["spec"]["reasons"])
    for method in ("feature_extraction", "few_shot", "from_scratch"):
        refused = client.post("/v1/jobs", json={"dataset": dataset["id"], "method": method})
        problem = assert_is_problem(refused, 422, "invalid-request")
        assert [error["pointer"] for error in problem["errors"]] == ["#/method"]
    useless = client.post("/v1/jobs", json={**request, "hyperparameters": {"mixup": 0.2}})
    assert_is_problem(useless, 422, "invalid-hyperparameter")

    job = train(server, client, **request)

    assert job["method"] == "self_supervised"
    assert set(job["metrics"]) >= {"feature_std", "val_loss"}
    history = client.get(f"/v1/jobs/{job['id']}/history").json()["data"]
    assert [epoch["epoch"] for epoch in history] == [1, 2]
    assert all(epoch["val_accuracy"] is None and epoch["figures"]["feature_std"] > 0 for epoch in history)
    model: str = job["model"]
    return model


def look_at_the_backbone(client: httpx.Client, backbone: str) -> None:
    model = client.get(f"/v1/models/{backbone}").json()
    assert (model["classes"], model["aliases"], model["promotion"]["promoted"]) == ([], [], False)
    listed = {entry["name"]: entry for entry in client.get("/v1/backbones").json()["data"]}
    assert listed["graft_small"]["available"] == "bundled"
    assert (listed[backbone]["available"], listed[backbone]["method"]) == ("local", "self_supervised")
    assert (listed[backbone]["architecture"], listed[backbone]["image_size"]) == ("mobilenet_v3_small", 64)
    # It answers nothing by itself, and says what it is for.
    for refused in (
        client.post(f"/predict?model={backbone}", content=builders.jpeg(1)),
        client.get(f"/v1/models/{backbone}/evaluation"),
        client.put("/v1/aliases/default", json={"model": backbone}),
    ):
        assert backbone in assert_is_problem(refused, 409, "not-a-classifier")["detail"]


def few_shot(server: RunningServer, client: httpx.Client, backbone: str) -> dict[str, Any]:
    dataset = upload(server, client, builders.class_folders(4), val_fraction="0.5")
    assert dataset["kind"] == "labelled"
    job = train(server, client, dataset=dataset["id"], method="few_shot", backbone=backbone)
    assert job["spec"]["backbone"]["model"] == backbone
    model: dict[str, Any] = client.get(f"/v1/models/{job['model']}").json()
    assert (model["method"], model["classes"], model["aliases"]) == ("few_shot", ["cat", "dog"], ["default"])
    predicted = client.post("/predict", content=builders.jpeg(77, tint=(200, 60, 60))).json()["predictions"][0]
    assert predicted["label"] == "cat"
    return model


def add_a_class(client: httpx.Client, model: dict[str, Any]) -> None:
    green = (60, 200, 60)
    files = [("file", (f"{i}.jpg", builders.jpeg(900 + i, tint=green))) for i in range(3)]
    made = client.post(f"/v1/models/{model['id']}/classes", data={"name": "frog"}, files=files).json()
    assert (made["classes"], made["parent"]) == (["cat", "dog", "frog"], model["id"])
    pictures = [
        ("file", ("f.jpg", builders.jpeg(990, tint=green))),
        ("file", ("c.jpg", builders.jpeg(78, tint=(200, 60, 60)))),
    ]
    answer = client.post(f"/predict?model={made['id']}", files=pictures).json()
    assert [prediction["label"] for prediction in answer["predictions"]] == ["frog", "cat"]


def test_pictures_without_folders_are_refused_with_both_ways_on(client: httpx.Client) -> None:
    flat = builders.zip_of({f"{i}.jpg": builders.jpeg(i) for i in range(20)})
    answer = client.post("/v1/datasets", files={"file": ("x.zip", flat)})
    problem = assert_is_problem(answer, 422, "no-usable-layout")
    assert "kind=unlabelled" in problem["detail"]
    assert "class" in problem["detail"]


@pytest.mark.parametrize("count", [0, 3])
def test_too_few_pictures_without_labels_are_refused_at_once(client: httpx.Client, count: int) -> None:
    files = {"notes.txt": b"text"} | {f"{i}.jpg": builders.jpeg(i) for i in range(count)}
    answer = client.put("/v1/datasets?kind=unlabelled", content=builders.zip_of(files))
    assert_is_problem(answer, 422, "too-few-images")


def test_an_unknown_kind_is_refused(client: httpx.Client) -> None:
    form = client.post("/v1/datasets", files={"file": ("x.zip", builders.zip_of(UNLABELLED))}, data={"kind": "maybe"})
    assert [error["pointer"] for error in assert_is_problem(form, 422, "invalid-request")["errors"]] == ["#/kind"]


def test_pictures_that_the_backbone_was_trained_on_are_told_where_they_measure(
    server: RunningServer, client: httpx.Client
) -> None:
    labelled = {f"{split}/{path}": data for split in ("train", "val") for path, data in folders(split).items()}
    roll = {**UNLABELLED, **{path: data for path, data in labelled.items() if path.startswith("val/cat")}}
    pictures = upload(server, client, roll, kind="unlabelled")
    hyperparameters = {"epochs": 1, "batch_size": 16, **SMALL}
    backbone = train(server, client, dataset=pictures["id"], method="self_supervised", hyperparameters=hyperparameters)
    dataset = upload(server, client, labelled)["id"]

    warned = train(server, client, dataset=dataset, method="few_shot", backbone=backbone["model"])
    again = train(server, client, dataset=dataset, method="feature_extraction", backbone=warned["model"])
    plain = train(server, client, dataset=dataset, method="few_shot")

    told = "The backbone had been trained on 3 of the 6 pictures that this was measured on"
    for job in (warned, again):
        assert told in job["metrics"]["validation_warning"]
        evaluation = client.get(f"/v1/models/{job['model']}/evaluation").json()
        assert any(warning.startswith(told) for warning in evaluation["warnings"])
    assert told not in plain["metrics"]["validation_warning"]


def folders(split: str) -> dict[str, bytes]:
    """Three pictures a class, other ones in each split."""
    first = {"train": 100, "val": 200}[split]
    tints = {"cat": (200, 60, 60), "dog": (60, 60, 200)}
    return {
        f"{name}/{i}.jpg": builders.jpeg(first + 10 * place + i, tint=tint)
        for place, (name, tint) in enumerate(tints.items())
        for i in range(3)
    }
