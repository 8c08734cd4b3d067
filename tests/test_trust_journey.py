"""Every method's model says how far to trust its answers, from its own training; through a real server and worker."""

from typing import Any

import builders
import httpx
import pytest
from api_builders import RunningServer, assert_is_problem
from test_pretraining_journey import train, upload

SMALL: dict[str, Any] = {"image_size": 64}
SHORT = {"epochs": 2, "batch_size": 8, **SMALL}
OPTIONS = "coverage=0.8&neighbors=3&explain=true"


def ask(client: httpx.Client, picture: bytes, options: str = OPTIONS) -> dict[str, Any]:
    answer = client.post(f"/predict?{options}", content=picture)
    assert answer.status_code == 200, answer.text
    (prediction,) = answer.json()["predictions"]
    return dict(prediction)


@pytest.mark.parametrize(
    "request_",
    [
        {"method": "few_shot"},
        {"method": "feature_extraction"},
        {"method": "feature_extraction", "recipe": "classic", "hyperparameters": SHORT},
        {"method": "fine_tuning", "hyperparameters": SHORT},
        {"method": "full_fine_tuning", "hyperparameters": SHORT},
        pytest.param(
            {"method": "from_scratch", "backbone": "resnet18", "hyperparameters": SHORT}, marks=pytest.mark.slow
        ),
        {"method": "auto", "budget_seconds": 4, "hyperparameters": SMALL},
    ],
    ids=lambda request: f"{request['method']}-{request.get('recipe', 'modern')}",
)
def test_model_of_each_method_knows_its_own_pictures(
    server: RunningServer, client: httpx.Client, request_: dict[str, Any]
) -> None:
    files = builders.class_folders(12)
    dataset = upload(server, client, files, val_fraction="0.25")
    train(server, client, dataset=dataset["id"], promote="always", **request_)
    listed = client.get(f"/v1/datasets/{dataset['id']}/images?split=train&limit=200").json()["data"]

    training_image = listed[4]
    prediction = ask(client, files[training_image["path"]])

    assert 0 <= prediction["ood_score"] <= 0.5
    assert prediction["in_distribution"] is True
    assert prediction["explanation"].startswith("data:image/png;base64,")
    assert set(prediction["prediction_set"]) <= {"cat", "dog"}
    nearest = prediction["neighbors"][0]
    assert nearest == {
        "id": training_image["id"],
        "path": training_image["path"],
        "label": training_image["class"],
        "similarity": pytest.approx(1.0, abs=1e-3),
        "thumbnail": training_image["thumbnail"],
    }
    assert client.get(nearest["thumbnail"]).headers["content-type"] == "image/jpeg"
    assert len(ask(client, builders.jpeg(77), "neighbors=50")["neighbors"]) == len(listed)


@pytest.mark.slow
def test_with_few_validation_pictures_the_answer_says_what_they_can_promise(
    server: RunningServer, client: httpx.Client
) -> None:
    dataset = upload(server, client, builders.class_folders(12), val_fraction="0.25")
    train(server, client, dataset=dataset["id"], method="feature_extraction")

    answer = client.post("/predict?coverage=0.95", content=builders.jpeg(77)).json()

    count = dataset["splits"]["val"]
    assert answer["coverage"] == {"asked": 0.95, "images": count, "largest": count / (count + 1)}
    assert len(answer["predictions"][0]["prediction_set"]) == 2


def test_excluded_pictures_are_nobodys_neighbors(server: RunningServer, client: httpx.Client) -> None:
    dataset = upload(server, client, builders.class_folders(12), val_fraction="0.25")
    train_images = client.get(f"/v1/datasets/{dataset['id']}/images?split=train&limit=200").json()["data"]
    excluded = train_images[0]["path"]
    train(server, client, dataset=dataset["id"], method="feature_extraction", exclude=[excluded])

    neighbors = ask(client, builders.class_folders(12)[excluded], "neighbors=50")["neighbors"]

    assert {each["path"] for each in neighbors} == {image["path"] for image in train_images} - {excluded}


def test_model_of_several_tasks_has_a_set_for_each_and_neighbors_with_all_labels(
    server: RunningServer, client: httpx.Client
) -> None:
    dataset = upload(server, client, builders.two_tasks(40, without={3: "colour"}), val_fraction="0.3")
    train(server, client, dataset=dataset["id"], method="feature_extraction")

    prediction = ask(client, builders.jpeg(999, tint=(0, 0, 110)))

    assert prediction["prediction_set"] == prediction["tasks"]["colour"]["prediction_set"]
    assert prediction["tasks"]["light"]["prediction_set"][0] == prediction["tasks"]["light"]["label"]
    for neighbor in prediction["neighbors"]:
        assert set(neighbor["tasks"]) == {"colour", "light"}
        assert neighbor["label"] == neighbor["tasks"]["colour"]
        assert neighbor["tasks"]["light"] in {"bright", "dark"}


def test_class_that_is_added_later_has_neighbors_and_sets_too(server: RunningServer, client: httpx.Client) -> None:
    dataset = upload(server, client, builders.class_folders(12), val_fraction="0.25")
    job = train(server, client, dataset=dataset["id"], method="few_shot")
    shots = [builders.jpeg(500 + i, tint=(60, 200, 60)) for i in range(4)]
    files = [("file", (f"{i}.jpg", shot)) for i, shot in enumerate(shots)]
    made = client.post(f"/v1/models/{job['model']}/classes", data={"name": "frog"}, files=files).json()

    prediction = ask(client, shots[1], f"{OPTIONS}&model={made['id']}")

    assert prediction["label"] == "frog"
    assert prediction["prediction_set"][0] == "frog"
    assert prediction["neighbors"][0] == {
        "id": None,
        "path": None,
        "label": "frog",
        "similarity": pytest.approx(1.0, abs=1e-3),
        "thumbnail": None,
    }
    assert prediction["in_distribution"] is True


def test_copy_is_tuned_to_the_neighbors_as_the_picture_was_taken_while_they_are_there(
    server: RunningServer, client: httpx.Client
) -> None:
    files = builders.class_folders(12)
    dataset = upload(server, client, files, val_fraction="0.25")
    train(server, client, dataset=dataset["id"], promote="always", method="feature_extraction")
    strange = builders.jpeg(500, size=(60, 60))
    own = ask(client, strange, "")

    adapted = ask(client, strange, "adapt=neighbors")
    again = ask(client, strange, "adapt=neighbors&adapt_steps=1")
    deeper = ask(client, strange, "adapt=neighbors&adapt_parameters=last_stage")

    assert ask(client, strange, "") == own
    assert (adapted["adaptation"]["parameters"], adapted["adaptation"]["steps"]) == ("head", 20)
    assert adapted["adaptation"]["share"] > 0
    assert (deeper["adaptation"]["parameters"], deeper["adaptation"]["steps"]) == ("last_stage", 3)
    assert len({own["score"], adapted["score"], again["score"], deeper["score"]}) == 4

    too_large = "adapt=neighbors&adapt_parameters=last_stage&adapt_learning_rate=1000&adapt_steps=5"
    problem = assert_is_problem(client.post(f"/predict?{too_large}", content=strange), 422, "invalid-request")
    assert problem["errors"][0]["pointer"] == "#/adapt_learning_rate"

    assert client.delete(f"/v1/datasets/{dataset['id']}").status_code == 200
    refused = client.post("/predict?adapt=neighbors", content=strange)
    assert_is_problem(refused, 409, "no-training-pictures")
    assert ask(client, strange, "") == own
