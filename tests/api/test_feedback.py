"""Predictions that are kept, what people say of them, and the data sets that come of it. A real server and ingest."""

import base64
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import api_builders
import builders
import httpx
import pytest
from api_builders import CLASSES, RunningServer, assert_is_problem

from app import access, holdings, predictions, workspaces
from app.api.schemas import Prediction
from app.datasets.ingest import manifest_key
from app.datasets.manifest import Manifest
from app.db.tables import PredictionRow, utc_now
from app.jobs import owner, queue
from app.jobs.states import JobKind
from app.serving.scores import Scores
from app.vision.evaluate import wilson_interval
from worker.child import run
from worker.reporter import Reporter
from worker.run_ingest import run_ingest
from worker.wakeup import Wakeup

PETS = builders.class_folders(8, classes=CLASSES)
PICTURE, OTHER = builders.jpeg(1001), builders.jpeg(1002)


@pytest.fixture
def model(server: RunningServer) -> str:
    return api_builders.register_model(server.services)


def kept(client: httpx.Client, *pictures: bytes, **query: str) -> list[dict[str, Any]]:
    parts = [("file", (f"{i}.jpg", picture)) for i, picture in enumerate(pictures or (PICTURE,))]
    answer = client.post("/predict", params={"store": "true", **query}, files=parts)
    assert answer.status_code == 200, answer.text
    told: list[dict[str, Any]] = answer.json()["predictions"]
    return told


def say(client: httpx.Client, prediction_id: str, label: str, **more: Any) -> httpx.Response:
    return client.post(f"/v1/predictions/{prediction_id}/feedback", json={"label": label, **more})


def stored(server: RunningServer) -> set[str]:
    folder = server.services.storage.path("predictions")
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def ingested(server: RunningServer) -> None:
    services = server.services
    with services.database.write() as session:
        claim = queue.claim_next(session, kind=JobKind.ingest, worker_id="test", owner=owner.current_process())
    assert claim is not None
    run(
        run_ingest,
        claim,
        settings=services.settings,
        database=services.database,
        storage=services.storage,
        reporter=Reporter(services.database, claim, shutdown=Wakeup()),
    )


def ready_dataset(server: RunningServer, client: httpx.Client, files: dict[str, bytes] | None = None) -> dict[str, Any]:
    archive = builders.zip_of(files or PETS)
    dataset: dict[str, Any] = client.put("/v1/datasets?name=pets", content=archive).json()
    ingested(server)
    return dataset


def test_what_counts_as_said_is_the_models_own_word_and_not_a_copys(
    server: RunningServer, client: httpx.Client, model: str
) -> None:
    own = Scores(CLASSES, [0.6, 0.4])
    answered = Prediction.model_validate(kept(client)[0] | {"id": None, "label": CLASSES[1], "score": 0.9})
    services = server.services

    (one,) = services.shelf.keep(services.workspace, model, "default", [(PICTURE, own, answered)])

    assert one.id is not None
    assert client.get(f"/v1/predictions/{one.id}").json()["label"] == CLASSES[1]
    assert say(client, one.id, CLASSES[0]).status_code == 200
    assert client.get(f"/v1/models/{model}/feedback").json()["right"] == 1


def test_nothing_is_kept_unless_it_is_asked_for(server: RunningServer, client: httpx.Client, model: str) -> None:
    answers = [
        client.post("/predict", content=PICTURE),
        client.post("/predict?store=false", content=PICTURE),
        client.post("/predict", files={"file": PICTURE}, data={"store": "false"}),
    ]

    assert ["id" in answer.json()["predictions"][0] for answer in answers] == [False] * 3
    assert client.get("/v1/predictions").json()["data"] == []
    assert stored(server) == set()


def test_every_form_of_a_request_may_ask(server: RunningServer, client: httpx.Client, model: str) -> None:
    encoded = base64.b64encode(PICTURE).decode()
    answers = [
        client.post("/predict?store=true", content=PICTURE),
        client.post("/predict", files={"file": ("a.jpg", PICTURE)}, data={"store": "true"}),
        client.post("/predict", json={"images": [{"b64": encoded}], "store": True}),
    ]

    ids = [answer.json()["predictions"][0]["id"] for answer in answers]
    assert stored(server) == set(ids)
    assert [one["id"] for one in client.get("/v1/predictions").json()["data"]] == ids[::-1]
    wrong = client.post("/predict", files={"file": PICTURE}, data={"store": "perhaps"})
    assert assert_is_problem(wrong, 422, "invalid-request")["errors"][0]["pointer"] == "#/store"


def test_kept_prediction_can_be_looked_at_and_deleted(server: RunningServer, client: httpx.Client, model: str) -> None:
    told = kept(client, PICTURE, b"no picture", OTHER)
    path = f"/v1/predictions/{told[0]['id']}"
    found = client.get(path).json()
    picture = client.get(found["picture"])

    assert "id" not in told[1]
    assert {name: found[name] for name in ("label", "score", "top")} == {
        name: told[0][name] for name in ("label", "score", "top")
    }
    assert (found["model"], found["alias"], found["filename"]) == (model, "default", "0.jpg")
    assert (found["feedback"], found["size_bytes"]) == (None, len(PICTURE))
    assert (picture.content, picture.headers["content-type"]) == (PICTURE, "image/jpeg")
    assert "default-src 'none'" in picture.headers["content-security-policy"]
    assert client.delete(path).json() == {"id": told[0]["id"], "object": "prediction", "deleted": True}
    assert_is_problem(client.get(path), 404, "not-found")
    assert_is_problem(client.get(found["picture"]), 404, "not-found")
    assert stored(server) == {told[2]["id"]}


def test_operator_may_turn_it_off(tmp_path: Path) -> None:
    settings = api_builders.settings_for(tmp_path, store_predictions=False)
    with api_builders.running(settings) as server, api_builders.client_of(server) as client:
        api_builders.register_model(server.services)

        assert_is_problem(client.post("/predict?store=true", content=PICTURE), 403, "storing-is-off")
        assert client.post("/predict", content=PICTURE).status_code == 200
        assert stored(server) == set()


def test_the_oldest_go_when_it_is_too_much_or_too_old(tmp_path: Path) -> None:
    most = 2 * len(PICTURE) + 10
    settings = api_builders.settings_for(tmp_path, max_stored_prediction_bytes=most, max_stored_prediction_days=1)
    with api_builders.running(settings) as server, api_builders.client_of(server) as client:
        api_builders.register_model(server.services)
        ids = [kept(client)[0]["id"] for _ in range(3)]

        assert stored(server) == set(ids[1:])
        assert [one["id"] for one in client.get("/v1/predictions").json()["data"]] == [ids[2], ids[1]]
        too_much = [("file", ("x.jpg", PICTURE))] * 3
        assert_is_problem(client.post("/predict?store=true", files=too_much), 413, "too-large")
        with server.services.database.write() as session:
            row = predictions.find(session, ids[1])
            row.created_at = utc_now() - timedelta(days=2)
        server.services.shelf.expire()
        assert stored(server) == {ids[2]}


def test_full_disk_keeps_nothing(tmp_path: Path) -> None:
    settings = api_builders.settings_for(tmp_path, min_free_bytes=2**62)
    with api_builders.running(settings) as server, api_builders.client_of(server) as client:
        api_builders.register_model(server.services)

        assert_is_problem(client.post("/predict?store=true", content=PICTURE), 507, "storage-full")
        assert client.get("/v1/predictions").json()["data"] == []


def test_feedback_is_the_last_word(client: httpx.Client, model: str) -> None:
    [told] = kept(client)

    assert say(client, told["id"], "cat").json()["feedback"]["label"] == "cat"
    assert say(client, told["id"], " dog ").json()["feedback"]["label"] == "dog"
    found = client.get(f"/v1/predictions/{told['id']}").json()["feedback"]
    assert (found["label"], found["tasks"], found["created_at"][-1]) == ("dog", None, "Z")


@pytest.mark.parametrize("label", ["à\u00a0la carte", "葉\u3000桜", "می\u200cخواهم", "👩\u200d🌾"])
def test_label_may_hold_blanks_and_joiners_of_every_script(client: httpx.Client, model: str, label: str) -> None:
    [told] = kept(client)
    assert say(client, told["id"], label, new_class=True).json()["feedback"]["label"] == label


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"label": "wasp"}, "#/label"),
        ({"label": "Cat"}, "#/label"),
        ({"label": "CAT", "new_class": True}, "#/label"),
        ({"label": "cat.", "new_class": True}, "#/label"),
        ({"label": "   ", "new_class": True}, "#/label"),
        ({"label": "a\nb", "new_class": True}, "#/label"),
        ({"label": "a\u2028b", "new_class": True}, "#/label"),
        ({"label": "\u3000", "new_class": True}, "#/label"),
        ({"label": "x" * 256, "new_class": True}, "#/label"),
        ({"label": ""}, "#/label"),
        ({"label": 7}, "#/label"),
        ({"label": "cat", "task": "colour"}, "#/task"),
        ({"label": "cat", "certain": True}, "#/certain"),
        ({}, "#/label"),
    ],
)
def test_feedback_that_makes_no_sense_is_pointed_at(
    client: httpx.Client, model: str, body: dict[str, Any], pointer: str
) -> None:
    [told] = kept(client)
    answer = client.post(f"/v1/predictions/{told['id']}/feedback", json=body)

    problem = assert_is_problem(answer, 422, "invalid-request")
    assert [error["pointer"] for error in problem["errors"]] == [pointer]


@pytest.mark.parametrize(
    "hostile", ["prd_0", "..%2f..%2fgraft.db", "%2e%2e", "'; DROP TABLE predictions; --", "é" * 30]
)
def test_hostile_ids_are_unknown_ids(client: httpx.Client, model: str, hostile: str) -> None:
    for answer in (
        client.get(f"/v1/predictions/{hostile}"),
        client.get(f"/v1/predictions/{hostile}/picture"),
        client.delete(f"/v1/predictions/{hostile}"),
        say(client, hostile, "cat"),
        client.get("/v1/predictions", params={"after": hostile}),
    ):
        assert answer.status_code in (404, 405), answer.text
        assert answer.headers["content-type"] == "application/problem+json"


def test_huge_bodies_and_ids_are_refused(client: httpx.Client, model: str) -> None:
    [told] = kept(client)

    assert_is_problem(say(client, told["id"], "x" * 100_000), 413, "too-large")
    assert_is_problem(client.get(f"/v1/predictions/{'x' * 101}"), 422, "invalid-request")


def test_accuracy_is_that_of_the_predictions_with_feedback(
    server: RunningServer, client: httpx.Client, model: str
) -> None:
    other = api_builders.register_model(server.services, aliases=("canary",))
    told = [*kept(client, *[PICTURE] * 3, model=model), *kept(client, *[OTHER] * 3), *kept(client, model="canary")]
    wrong = {name: next(each for each in CLASSES if each != name) for name in CLASSES}
    truth = [told[0]["label"], wrong[told[1]["label"]], "wasp", told[3]["label"], told[4]["label"]]
    for one, label in zip(told, truth, strict=False):
        assert say(client, one["id"], label, new_class=label == "wasp").status_code == 200

    found = client.get("/v1/models/default/feedback").json()

    assert (found["model"], found["stored"]) == (model, 6)
    assert (found["count"], found["right"], found["accuracy"]) == (5, 3, 0.6)
    assert found["accuracy_ci95"] == list(wilson_interval(3, 5))
    assert {name: (alias["count"], alias["right"]) for name, alias in found["aliases"].items()} == {"default": (2, 2)}
    by_class = {each["name"]: each for each in found["classes"]}
    assert [each["name"] for each in found["classes"]] == [*CLASSES, "wasp"]
    for name in CLASSES:
        said = [(one["label"], label) for one, label in zip(told, truth, strict=False) if label == name]
        assert (by_class[name]["count"], by_class[name]["right"]) == (len(said), sum(p == t for p, t in said))
    assert (by_class["wasp"]["is_known"], by_class["wasp"]["right"]) == (False, 0)
    unjudged = client.get(f"/v1/models/{other}/feedback").json()
    assert (unjudged["count"], unjudged["accuracy"], unjudged["accuracy_ci95"], unjudged["stored"]) == (
        0,
        None,
        None,
        1,
    )


def test_lists_are_paged_and_by_model(server: RunningServer, client: httpx.Client, model: str) -> None:
    other = api_builders.register_model(server.services, aliases=("canary",))
    ids = [one["id"] for one in kept(client, *[PICTURE] * 3)]
    [elsewhere] = kept(client, model="canary")

    first = client.get("/v1/predictions?limit=2&model=default").json()
    rest = client.get(f"/v1/predictions?limit=2&model={model}&after={first['last_id']}").json()

    assert [one["id"] for one in first["data"] + rest["data"]] == ids[::-1]
    assert (first["has_more"], rest["has_more"]) == (True, False)
    for name in ("canary", other):
        assert [one["id"] for one in client.get(f"/v1/predictions?model={name}").json()["data"]] == [elsewhere["id"]]


def test_predictions_outlive_their_model(server: RunningServer, client: httpx.Client, model: str) -> None:
    gone = api_builders.register_model(server.services, aliases=())
    [told] = kept(client, model=gone)
    say(client, told["id"], "cat")
    client.delete(f"/v1/models/{gone}")

    assert client.get(f"/v1/predictions?model={gone}").json()["data"][0]["feedback"]["label"] == "cat"
    assert_is_problem(say(client, told["id"], "dog"), 409, "model-deleted")
    assert_is_problem(client.get(f"/v1/models/{gone}/feedback"), 404, "model-not-found")


def test_feedback_on_several_tasks_is_told_by_task(server: RunningServer, client: httpx.Client, model: str) -> None:
    tasks = {"colour": ["red", "blue"], "light": ["dark", "bright"]}
    with server.services.database.write() as session:
        row = predictions._model(session, model)
        assert row is not None
        row.tasks = [{"name": name, "classes": classes} for name, classes in tasks.items()]
        row.classes = tasks["colour"]
        session.add(_of_two_tasks(model))

    said = say(client, "prd_two", "red").json()["feedback"]
    assert (said["label"], said["tasks"]) == ("red", {"colour": "red"})
    assert say(client, "prd_two", "dark", task="light").json()["feedback"]["tasks"] == {
        "colour": "red",
        "light": "dark",
    }
    found = client.get(f"/v1/models/{model}/feedback").json()
    assert (found["count"], found["right"]) == (1, 1)
    assert (found["tasks"]["light"]["count"], found["tasks"]["light"]["right"]) == (1, 0)


def _of_two_tasks(model: str) -> PredictionRow:
    return PredictionRow(
        id="prd_two",
        model_id=model,
        dataset_id="ds_none",
        size_bytes=1,
        sha256="0",
        predicted={"colour": "red", "light": "bright"},
        answer={"label": "red", "score": 0.9, "top": [], "tasks": {}},
    )


def test_feedback_from_many_at_once_is_kept_whole(client: httpx.Client, server: RunningServer, model: str) -> None:
    told = kept(client, *[PICTURE] * 6)
    answers: list[int] = []

    def judge(label: str) -> None:
        with api_builders.client_of(server) as own:
            answers.extend(say(own, one["id"], label).status_code for one in told)

    threads = [threading.Thread(target=judge, args=(label,)) for label in CLASSES * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert answers == [200] * 24
    found = client.get("/v1/models/default/feedback").json()
    assert (found["count"], sum(each["count"] for each in found["classes"])) == (6, 6)


# The next version of a data set


def test_next_version_has_the_same_validation_and_trains_on_the_feedback(
    server: RunningServer, client: httpx.Client
) -> None:
    dataset = ready_dataset(server, client)
    api_builders.register_model(server.services, dataset_id=dataset["id"])
    already_there = PETS["cat/0.jpg"]
    strangers = [builders.jpeg(5000 + i, tint=(60, 200, 60)) for i in range(3)]
    told = kept(client, PICTURE, already_there, *strangers, OTHER)
    for one, label in zip(told, ["dog", "dog", "Wasp", "wasp", "hornet"], strict=False):
        # Two people spell the wasp in two ways; the last one's counts.
        assert say(client, one["id"], label, new_class=label != "dog").status_code == 200

    answer = client.post(f"/v1/datasets/{dataset['id']}/versions")
    version = answer.json()
    ingested(server)
    done = client.get(f"/v1/datasets/{version['id']}").json()

    assert (answer.status_code, answer.headers["location"]) == (201, f"/v1/datasets/{version['id']}")
    assert (version["name"], version["parent"], version["status"]) == ("pets", dataset["id"], "processing")
    assert (done["status"], done["num_images"], done["num_rejected"]) == ("ready", 16 + 3, 0)
    assert [each["name"] for each in done["classes"]] == ["cat", "dog", "wasp"]
    assert "new_class_left_out" in [each["code"] for each in done["warnings"]]
    before, after = (
        {record.path: record for record in manifest_of(server, each["id"]).records} for each in (dataset, version)
    )
    assert {path: (before[path].split, before[path].digest) for path in before} == {
        path: (after[path].split, after[path].digest) for path in before
    }
    new = {path: after[path].split for path in after.keys() - before.keys()}
    assert new == {f"feedback/{told[i]['id']}.jpg": "train" for i in (0, 2, 3)}
    # What is in already is not added again, by the next version either.
    assert_is_problem(client.post(f"/v1/datasets/{version['id']}/versions"), 409, "no-new-feedback")


def test_version_of_several_tasks_keeps_all_of_their_labels(server: RunningServer, client: httpx.Client) -> None:
    # The first picture of the archive lacks a label of the first task, which stays the first.
    dataset = ready_dataset(server, client, builders.two_tasks(16, without={0: "colour", 3: "light"}))
    with server.services.database.write() as session:
        session.add(_of_dataset(dataset["id"], {"colour": "blue"}))
    server.services.storage.path("predictions").mkdir()
    server.services.storage.path("predictions/prd_two").write_bytes(PICTURE)

    version = client.post(f"/v1/datasets/{dataset['id']}/versions?name=next").json()
    ingested(server)

    before, after = manifest_of(server, dataset["id"]), manifest_of(server, version["id"])
    assert [(task.name, list(task.classes)) for task in after.tasks] == [
        (task.name, list(task.classes)) for task in before.tasks
    ]
    kept_labels = {record.path: record.labels for record in after.records}
    assert {record.path: record.labels for record in before.records}.items() <= kept_labels.items()
    assert kept_labels["feedback/prd_two.jpg"] == [0, -1]


def _of_dataset(dataset_id: str, feedback: dict[str, str]) -> PredictionRow:
    row = _of_two_tasks("mdl_gone")
    row.dataset_id, row.feedback, row.feedback_at = dataset_id, feedback, utc_now()
    return row


def manifest_of(server: RunningServer, dataset_id: str) -> Manifest:
    return Manifest.read(server.services.storage.path(manifest_key(dataset_id)))


def test_version_has_the_same_classes_and_paths_however_they_are_named(
    server: RunningServer, client: httpx.Client
) -> None:
    classes = ("daisy ", " rose", "à\u00a0la carte", "桜\u3000", "می\u200cخواهم", "👩\u200d🌾", "feedback", " ")
    files = builders.class_folders(4, classes=classes)
    blank_at_the_end = {f"{path} " if path.endswith("/0.jpg") else path: content for path, content in files.items()}
    dataset = ready_dataset(server, client, blank_at_the_end)
    model = api_builders.register_model(server.services, dataset_id=dataset["id"])
    with server.services.database.write() as session:
        row = predictions._model(session, model)
        assert row is not None
        row.classes = list(classes)
    told = kept(client, PICTURE, OTHER)
    assert say(client, told[0]["id"], "daisy ").json()["feedback"]["label"] == "daisy "
    assert say(client, told[1]["id"], " feedback ").json()["feedback"]["label"] == "feedback"
    twin = say(client, told[1]["id"], "daisy", new_class=True)
    assert "'daisy '" in assert_is_problem(twin, 422, "invalid-request")["detail"]

    version = client.post(f"/v1/datasets/{dataset['id']}/versions").json()
    ingested(server)

    before, after = manifest_of(server, dataset["id"]), manifest_of(server, version["id"])
    assert after.classes == before.classes == sorted(classes)
    labels = {record.path: after.classes[record.label] for record in after.records}
    new = {f"feedback-2/{told[0]['id']}.jpg": "daisy ", f"feedback-2/{told[1]['id']}.jpg": "feedback"}
    assert labels == {record.path: before.classes[record.label] for record in before.records} | new


@pytest.mark.parametrize("stored_first", ["red", "blue"])
def test_last_word_on_a_picture_counts_for_each_task_whenever_it_was_stored(
    server: RunningServer, client: httpx.Client, stored_first: str
) -> None:
    dataset = ready_dataset(server, client, builders.two_tasks(16))
    said = {"prd_red": ({"colour": "red", "light": "dark"}, 0), "prd_blue": ({"colour": "blue"}, 1)}
    folder = server.services.storage.path("predictions")
    folder.mkdir()
    with server.services.database.write() as session:
        for name in sorted(said, reverse=stored_first == "red"):
            row, minutes = _of_dataset(dataset["id"], said[name][0]), said[name][1]
            row.id, row.feedback_at = name, utc_now() + timedelta(minutes=minutes)
            session.add(row)
            session.flush()
            (folder / name).write_bytes(PICTURE)

    version = client.post(f"/v1/datasets/{dataset['id']}/versions").json()
    ingested(server)

    after = manifest_of(server, version["id"])
    [labels] = [record.labels for record in after.records if record.path.startswith("feedback/")]
    assert [task.classes[label] for task, label in zip(after.tasks, labels, strict=True)] == ["blue", "dark"]


def test_versions_need_a_ready_data_set_and_feedback(server: RunningServer, client: httpx.Client, model: str) -> None:
    database = server.services.database
    processing, failed = api_builders.processing_dataset(database), api_builders.failed_dataset(database)
    dataset = ready_dataset(server, client)

    assert "retry-after" in client.post(f"/v1/datasets/{processing}/versions").headers
    assert_is_problem(client.post(f"/v1/datasets/{failed}/versions"), 409, "dataset-without-versions")
    assert_is_problem(client.post(f"/v1/datasets/{dataset['id']}/versions"), 409, "no-new-feedback")
    assert_is_problem(client.post(f"/v1/datasets/{dataset['id']}/versions?model=nobody"), 404, "model-not-found")
    assert_is_problem(client.post("/v1/datasets/ds_none/versions"), 404, "not-found")
    without_files = api_builders.ready_dataset(database)
    assert_is_problem(client.post(f"/v1/datasets/{without_files}/versions"), 404, "dataset-unreadable")


def test_version_whose_pictures_are_gone_is_not_made(server: RunningServer, client: httpx.Client) -> None:
    dataset = ready_dataset(server, client)
    api_builders.register_model(server.services, dataset_id=dataset["id"])
    [told] = kept(client)
    say(client, told["id"], "cat")
    server.services.storage.delete(f"predictions/{told['id']}")

    assert_is_problem(client.post(f"/v1/datasets/{dataset['id']}/versions"), 409, "no-new-feedback")
    assert len(client.get("/v1/datasets").json()["data"]) == 1


def test_what_is_kept_and_made_of_it_counts_against_the_quota(server: RunningServer, client: httpx.Client) -> None:
    dataset = ready_dataset(server, client)
    model = api_builders.register_model(server.services, dataset_id=dataset["id"])
    [told] = kept(client)
    say(client, told["id"], "cat")
    storage, whole = server.services.storage, server.app.state.services.database

    def ask() -> list[httpx.Response]:
        mine = [("label", (None, "dog")), ("file", ("a.jpg", OTHER))]
        return [
            client.post("/predict?store=true", content=OTHER),
            client.post(f"/v1/datasets/{dataset['id']}/versions"),
            client.post(f"/v1/models/{model}/personalise", files=mine),
        ]

    def there() -> list[str]:
        return sorted(f"{folder}/{path.name}" for folder in holdings.TABLES for path in entries(storage.path(folder)))

    before = there()
    used = client.get("/v1/usage").json()["bytes"]["used"]
    with whole.write() as session:
        workspaces.change_limits(session, "default", {"max_bytes": used})
    for answer in ask():
        assert_is_problem(answer, 429, "quota-of-bytes-spent")
    assert there() == before
    assert client.get("/v1/usage").json()["bytes"]["used"] == used

    with whole.write() as session:
        workspaces.change_limits(session, "default", {"max_bytes": None})
    assert [answer.status_code for answer in ask()] == [200, 201, 201]


def entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.exists() else []


def test_keys_that_predict_may_say_but_not_look(server: RunningServer, client: httpx.Client, model: str) -> None:
    [told] = kept(client)
    predict, train = (api_key(server, scope) for scope in ("predict", "train"))

    said = client.post(f"/v1/predictions/{told['id']}/feedback", json={"label": "cat"}, headers=predict)
    assert said.status_code == 200
    assert client.get("/v1/models/default/feedback", headers=predict).status_code == 200
    assert client.put("/v1/batches", content=builders.zip_of({"a.jpg": PICTURE}), headers=predict).status_code == 201
    for path in ("/v1/predictions", f"/v1/predictions/{told['id']}", f"/v1/predictions/{told['id']}/picture"):
        assert_is_problem(client.get(path, headers=predict), 403, "scope-too-small")
        assert client.get(path, headers=train).status_code == 200


def api_key(server: RunningServer, scope: str) -> dict[str, str]:
    with server.services.database.write() as session:
        token = access.create_key(session, scopes={access.Scope(scope)}, name=None).token
    return {"Authorization": f"Bearer {token}"}
