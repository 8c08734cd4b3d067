"""What POST /predict says of how far to trust an answer: in every form of a request, and of models old and new."""

import base64
import io
from collections.abc import Callable, Iterator
from typing import Any

import api_builders
import builders
import httpx
import numpy as np
import pytest
import torch
from api_builders import CLASSES, SMALL, RunningServer, assert_is_problem
from PIL import Image

from app.vision import images
from app.vision.classifier import Classifier
from app.vision.images import ImageLimits
from app.vision.preprocessing import eval_pixels, normalise
from app.vision.reference import Reference


def alike(seed: int) -> bytes:
    """One picture a little noisy, each time anew: to a network of random weights all else is far from it."""
    noise = np.random.default_rng(seed).integers(-20, 21, (40, 48, 3))
    return builders.encoded((builders.picture(0) + noise).clip(0, 255).astype(np.uint8))


TRAINED_ON = [alike(seed) for seed in range(12)]
HELD_OUT = [alike(seed) for seed in range(100, 140)]
PICTURE = TRAINED_ON[3]
STRANGE = builders.jpeg(1, size=(40, 40))
BROKEN = PICTURE[: len(PICTURE) // 2]

TRUSTED = {"filename", "label", "score", "top", "in_distribution", "ood_score"}


def reference() -> Reference:
    """Of the network that `register_model` makes, on the pictures above; alternately of one class and the other."""
    classifier = Classifier.new("squeezenet1_1", len(CLASSES), seed=0).eval()
    limits = ImageLimits(10**7, 10**7, 10_000, 100.0, 100)

    def features(pictures: list[bytes]) -> np.ndarray[Any, Any]:
        pixels = [eval_pixels(images.decode(each, side=SMALL.side, limits=limits), SMALL) for each in pictures]
        with torch.inference_mode():
            return classifier.backbone(normalise(torch.stack(pixels), SMALL)).numpy()

    return Reference.fit(
        features(TRAINED_ON),
        np.arange(len(TRAINED_ON)) % 2,
        [(f"img_{i}", f"{CLASSES[i % 2]}/{i}.jpg") for i in range(len(TRAINED_ON))],
        held_out=features(HELD_OUT),
        probability_of_true=[np.linspace(0.02, 0.8, 39)],
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One for all tests here: none of them leaves anything behind."""
    with api_builders.running(api_builders.settings_for(tmp_path_factory.mktemp("server"))) as server:
        api_builders.register_model(server.services, dataset_id="ds_7", reference=reference())
        api_builders.register_model(server.services, aliases=("old",))
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with api_builders.client_of(server) as client:
        yield client


def in_query(client: httpx.Client, picture: bytes = PICTURE, **options: Any) -> httpx.Response:
    return client.post("/predict", params=options, content=picture)


def in_form(client: httpx.Client, picture: bytes = PICTURE, **options: Any) -> httpx.Response:
    return client.post("/predict", data=options, files={"file": ("a.jpg", picture)})


def in_json(client: httpx.Client, picture: bytes = PICTURE, **options: Any) -> httpx.Response:
    return client.post("/predict", json={"images": [{"b64": base64.b64encode(picture).decode()}], **options})


FORMS = pytest.mark.parametrize("ask", [in_query, in_form, in_json])
Ask = Callable[..., httpx.Response]


def the_one(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    (prediction,) = response.json()["predictions"]
    return dict(prediction)


def test_every_prediction_says_whether_the_picture_is_of_a_known_kind(client: httpx.Client) -> None:
    known, strange = the_one(in_query(client)), the_one(in_query(client, STRANGE))

    assert set(known) == set(strange) == TRUSTED
    assert (known["in_distribution"], strange["in_distribution"]) == (True, False)
    assert 0 <= known["ood_score"] < 0.1 < 0.5 < strange["ood_score"] <= 1


def test_of_held_out_pictures_95_percent_are_known_and_half_are_below_a_tenth(client: httpx.Client) -> None:
    files = [("file", (f"{i}.jpg", picture)) for i, picture in enumerate(HELD_OUT)]
    found = client.post("/predict", files=files).json()["predictions"]

    # The one that lies on the limit itself falls to either side by what runs beside it in a batch.
    assert sum(each["in_distribution"] for each in found) in (38, 39)
    assert [each["in_distribution"] for each in found] == [each["ood_score"] <= 0.5 for each in found]
    assert sum(each["ood_score"] <= 0.1 for each in found) == 20


@FORMS
def test_prediction_set_is_as_large_as_the_coverage_needs(client: httpx.Client, ask: Ask) -> None:
    for coverage, expected in ((0.01, 1), (0.99, 2)):
        answer = ask(client, coverage=coverage)
        prediction = the_one(answer)
        assert set(prediction) == {*TRUSTED, "prediction_set"}
        assert prediction["prediction_set"] == [row["label"] for row in prediction["top"]][:expected]
        assert answer.json()["coverage"] == {"asked": coverage, "images": 39, "largest": 0.975}


@FORMS
def test_neighbors_are_training_pictures_the_nearest_first(client: httpx.Client, ask: Ask) -> None:
    prediction = the_one(ask(client, neighbors=3))

    assert set(prediction) == {*TRUSTED, "neighbors"}
    first = prediction["neighbors"][0]
    assert first == {
        "id": "img_3",
        "path": "dog/3.jpg",
        "label": "dog",
        "similarity": pytest.approx(1.0, abs=1e-3),
        "thumbnail": "/v1/datasets/ds_7/images/img_3/thumbnail",
    }
    similarities = [each["similarity"] for each in prediction["neighbors"]]
    assert similarities == sorted(similarities, reverse=True)
    assert len(similarities) == 3


def test_more_neighbors_than_there_are_is_all_of_them(client: httpx.Client) -> None:
    assert len(the_one(in_query(client, neighbors=50))["neighbors"]) == len(TRAINED_ON)


@FORMS
def test_explanation_is_a_png_of_the_upright_picture(client: httpx.Client, ask: Ask) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    lying = builders.encoded(builders.picture(3, size=(96, 48)), "JPEG", exif=exif)

    prediction = the_one(ask(client, lying, explain=True))

    assert set(prediction) == {*TRUSTED, "explanation"}
    assert size_of(prediction["explanation"]) == (40, 80)


def size_of(data_url: str) -> tuple[int, int]:
    kind, _, payload = data_url.partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(payload, validate=True))) as picture:
        assert picture.format == "PNG"
        return picture.size


def test_options_can_be_had_together_and_the_same_request_has_the_same_answer(client: httpx.Client) -> None:
    first = in_query(client, explain=True, coverage=0.9, neighbors=2, top_k=1)
    again = in_query(client, explain=True, coverage=0.9, neighbors=2, top_k=1)

    assert set(the_one(first)) == {*TRUSTED, "prediction_set", "neighbors", "explanation"}
    assert first.json() == again.json()


def test_query_goes_before_the_body(client: httpx.Client) -> None:
    answer = client.post("/predict?neighbors=1", files={"file": ("a.jpg", PICTURE)}, data={"neighbors": "2"})

    assert len(the_one(answer)["neighbors"]) == 1


@pytest.mark.parametrize("value", ["false", "0", "no"])
def test_explanation_that_is_not_wanted_is_not_there(client: httpx.Client, value: str) -> None:
    assert set(the_one(in_query(client, explain=value))) == TRUSTED
    assert set(the_one(in_form(client, explain=value))) == TRUSTED


def test_in_a_batch_each_readable_picture_has_its_own(client: httpx.Client) -> None:
    parts = [("file", (name, content)) for name, content in [("a", PICTURE), ("b", BROKEN), ("c", STRANGE)]]

    answer = client.post("/predict?explain=true&neighbors=1&coverage=0.5", files=parts)

    known, broken, strange = answer.json()["predictions"]
    assert [each["filename"] for each in (known, broken, strange)] == ["a", "b", "c"]
    assert set(broken) == {"filename", "error"}
    assert (known["in_distribution"], strange["in_distribution"]) == (True, False)
    assert size_of(known["explanation"]) == (48, 40)
    assert size_of(strange["explanation"]) == (40, 40)
    assert known["explanation"] == the_one(in_query(client, explain=True))["explanation"]


@FORMS
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("coverage", 0),
        ("coverage", 1),
        ("coverage", -0.1),
        ("coverage", 1.5),
        ("coverage", "nan"),
        ("coverage", "x"),
        ("neighbors", 0),
        ("neighbors", 51),
        ("neighbors", 1.5),
        ("neighbors", "x"),
        ("explain", "maybe"),
        ("explain", 2),
    ],
)
def test_value_out_of_range_is_pointed_at(client: httpx.Client, ask: Ask, option: str, value: Any) -> None:
    problem = assert_is_problem(ask(client, **{option: value}), 422, "invalid-request")

    assert [error["pointer"] for error in problem["errors"]] == [f"#/{option}"]


@FORMS
@pytest.mark.parametrize("options", [{"coverage": 0.9}, {"neighbors": 3}, {"coverage": 0.9, "neighbors": 3}])
def test_model_without_statistics_says_to_train_again(client: httpx.Client, ask: Ask, options: dict[str, Any]) -> None:
    problem = assert_is_problem(ask(client, model="old", **options), 409, "no-statistics")

    assert "Train it again" in problem["detail"]
    assert all(name in problem["detail"] for name in options)


def test_model_without_statistics_answers_as_before_and_explains(client: httpx.Client) -> None:
    assert set(the_one(in_query(client, model="old"))) == {"filename", "label", "score", "top"}
    explained = the_one(in_query(client, model="old", explain=True))
    assert set(explained) == {"filename", "label", "score", "top", "explanation"}


def test_explanations_count_as_work_and_leave_nothing_behind(server: RunningServer, client: httpx.Client) -> None:
    files = [("file", (f"{i}.jpg", picture)) for i, picture in enumerate(HELD_OUT)]

    found = client.post("/predict?explain=true", files=files).json()["predictions"]

    assert len({each["explanation"] for each in found}) == len(HELD_OUT)
    assert server.services.predictor.pending == 0


# Instance tuning


@FORMS
def test_copy_tuned_by_entropy_answers_and_the_model_stays_as_it_was(client: httpx.Client, ask: Ask) -> None:
    before = the_one(ask(client, STRANGE))

    adapted = the_one(ask(client, STRANGE, adapt="entropy"))
    after = the_one(ask(client, STRANGE))

    assert set(adapted) == {*TRUSTED, "adaptation"}
    assert after == before
    assert adapted["score"] != before["score"]
    assert sum(row["score"] for row in adapted["top"]) == pytest.approx(1.0, abs=1e-5)
    assert (adapted["ood_score"], adapted["in_distribution"]) == (before["ood_score"], before["in_distribution"])
    seconds = adapted["adaptation"].pop("seconds")
    assert 0 < seconds < 60
    assert adapted["adaptation"] == {
        "method": "entropy",
        "parameters": "normalisation",
        "steps": 1,
        "learning_rate": 0.005,
        "share": 1.0,
        "before": {"label": before["label"], "score": pytest.approx(before["score"], abs=1e-5)},
    }


@FORMS
def test_steps_learning_rate_and_parameters_of_the_copy_can_be_chosen(client: httpx.Client, ask: Ask) -> None:
    asked = {"adapt_parameters": "all", "adapt_steps": 2, "adapt_learning_rate": 0.001}

    told = the_one(ask(client, STRANGE, adapt="entropy", **asked))["adaptation"]

    assert {f"adapt_{name}": told[name] for name in ("parameters", "steps", "learning_rate")} == asked


def test_picture_of_the_usual_kind_is_hardly_answered_by_the_copy(client: httpx.Client) -> None:
    own, adapted = the_one(in_query(client)), the_one(in_query(client, adapt="entropy"))

    assert adapted["adaptation"]["share"] < 0.04
    assert adapted["score"] == pytest.approx(own["score"], abs=0.05)


def test_each_picture_has_a_copy_of_its_own(client: httpx.Client) -> None:
    files = [("file", ("a.jpg", STRANGE)), ("file", ("b.jpg", BROKEN)), ("file", ("c.jpg", PICTURE))]

    strange, broken, known = client.post("/predict?adapt=entropy", files=files).json()["predictions"]

    assert set(broken) == {"filename", "error"}
    for together, picture in ((strange, STRANGE), (known, PICTURE)):
        alone = the_one(in_query(client, picture, adapt="entropy"))
        assert together["label"] == alone["label"]
        assert together["score"] == pytest.approx(alone["score"], abs=1e-4)


def test_model_without_statistics_is_tuned_by_its_surest_views(client: httpx.Client) -> None:
    adapted = the_one(in_query(client, STRANGE, model="old", adapt="entropy"))

    assert set(adapted) == {"filename", "label", "score", "top", "adaptation"}
    assert adapted["adaptation"]["share"] == 1.0


@pytest.mark.parametrize(("model", "code"), [("old", "no-statistics"), ("default", "no-training-pictures")])
def test_neighbors_to_tune_to_that_are_not_there_are_a_conflict(client: httpx.Client, model: str, code: str) -> None:
    problem = assert_is_problem(in_query(client, model=model, adapt="neighbors"), 409, code)

    assert "adapt=neighbors" in problem["detail"]


@FORMS
@pytest.mark.parametrize(
    ("options", "pointer"),
    [
        ({"adapt": "sometimes"}, "#/adapt"),
        ({"adapt": "entropy", "adapt_steps": 0}, "#/adapt_steps"),
        ({"adapt": "entropy", "adapt_steps": 51}, "#/adapt_steps"),
        ({"adapt": "entropy", "adapt_learning_rate": 0}, "#/adapt_learning_rate"),
        ({"adapt": "entropy", "adapt_parameters": "head"}, "#/adapt_parameters"),
        ({"adapt": "neighbors", "adapt_parameters": "all"}, "#/adapt_parameters"),
        ({"adapt_steps": 2}, "#/adapt_steps"),
    ],
)
def test_adaptation_that_is_none_is_pointed_at(
    client: httpx.Client, ask: Ask, options: dict[str, Any], pointer: str
) -> None:
    problem = assert_is_problem(ask(client, **options), 422, "invalid-request")

    assert [error["pointer"] for error in problem["errors"]] == [pointer]


def test_set_and_heat_map_go_with_an_adapted_answer(client: httpx.Client) -> None:
    own = the_one(in_query(client, STRANGE, coverage=0.9))

    adapted = the_one(in_query(client, STRANGE, adapt="entropy", coverage=0.9, explain="true", neighbors=1))

    assert set(adapted) == {*TRUSTED, "adaptation", "prediction_set", "explanation", "neighbors"}
    assert adapted["prediction_set"] == own["prediction_set"]


@FORMS
def test_step_so_large_that_no_numbers_are_left_is_pointed_at(client: httpx.Client, ask: Ask) -> None:
    answer = ask(client, STRANGE, adapt="entropy", adapt_learning_rate=1000, adapt_steps=3)

    problem = assert_is_problem(answer, 422, "invalid-request")
    assert [error["pointer"] for error in problem["errors"]] == ["#/adapt_learning_rate"]
