"""/v1/files and /v1/fine_tuning with OpenAI's own client: how its words become ours, and what it shows of a refusal.

No worker runs here; the whole way is in tests/processes/test_openai_client.py.
"""

from collections.abc import Iterator
from typing import Any

import api_builders
import httpx
import openai
import pytest
import queue_builders
from api_builders import RunningServer, assert_is_problem

from app.db.engine import Database
from app.jobs import queue


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with api_builders.client_of(server) as client:
        yield client


@pytest.fixture
def database(server: RunningServer) -> Database:
    return server.services.database


@pytest.fixture
def file(database: Database) -> str:
    return api_builders.ready_dataset(database).replace("ds_", "file-")


def created(client: openai.OpenAI, file: str, tuned: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A job of full_fine_tuning with these hyperparameters, unless `changes` say otherwise."""
    options = {} if tuned is None else {"hyperparameters": tuned}
    method = {"type": "full_fine_tuning", "full_fine_tuning": options}
    asked: dict[str, Any] = {"model": "graft_small", "training_file": file, "method": method, **changes}
    return client.fine_tuning.jobs.create(**asked)


def our_job(http: httpx.Client, job: Any) -> dict[str, Any]:
    found: dict[str, Any] = http.get(f"/v1/jobs/{job.id.replace('ftjob-', 'job_')}").json()
    return found


# Files


def test_file_and_data_set_are_one(client: openai.OpenAI, http: httpx.Client) -> None:
    archive = api_builders.archive_of_classes()
    file = client.files.create(file=("pets.zip", archive), purpose="fine-tune", extra_body={"seed": "3"})

    [dataset] = http.get("/v1/datasets").json()["data"]
    assert file.id == dataset["id"].replace("ds_", "file-")
    assert (dataset["name"], dataset["filename"], dataset["seed"]) == ("pets", "pets.zip", 3)
    assert client.files.retrieve(file.id) == file
    assert (file.object, file.bytes, file.status, file.purpose) == ("file", len(archive), "uploaded", "fine-tune")

    deleted = client.files.delete(file.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (file.id, "file", True)
    assert http.get("/v1/datasets").json()["data"] == []


def test_status_of_a_file_is_that_of_its_data_set(client: openai.OpenAI, database: Database) -> None:
    made = [api_builders.processing_dataset, api_builders.ready_dataset, api_builders.failed_dataset]
    for build in made:
        build(database)

    assert [file.status for file in client.files.list()] == ["error", "processed", "uploaded"]


def test_files_are_listed_page_by_page(client: openai.OpenAI, database: Database) -> None:
    ids = [api_builders.ready_dataset(database).replace("ds_", "file-") for _ in range(5)]

    assert [file.id for file in client.files.list(limit=2)] == ids[::-1]
    assert len(client.files.list(limit=10_000, purpose="fine-tune").data) == 5
    assert client.files.list(purpose="batch").data == []


def test_upload_that_is_refused_says_why(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="purpose: input should be 'fine-tune'") as refused:
        client.files.create(file=("pets.zip", api_builders.archive_of_classes()), purpose="batch")
    assert refused.value.param == "purpose"
    with pytest.raises(openai.UnprocessableEntityError, match="not an archive"):
        client.files.create(file=("pets.jsonl", b'{"prompt": "a"}'), purpose="fine-tune")
    assert client.files.list().data == []


def test_upload_may_be_repeated_under_a_key(client: openai.OpenAI) -> None:
    archive = ("pets.zip", api_builders.archive_of_classes())
    headers = {"Idempotency-Key": "once"}

    first = client.files.create(file=archive, purpose="fine-tune", extra_headers=headers)
    again = client.files.create(file=archive, purpose="fine-tune", extra_headers=headers)

    assert again == first
    assert len(client.files.list().data) == 1


def test_file_that_a_job_needs_is_not_deleted(client: openai.OpenAI, file: str) -> None:
    job = created(client, file)

    with pytest.raises(openai.ConflictError, match="A job that has not ended needs this data set"):
        client.files.delete(file)
    client.fine_tuning.jobs.cancel(job.id)
    assert client.files.delete(file).deleted


@pytest.mark.parametrize("method", ["retrieve", "delete"])
def test_unknown_file_is_not_found(client: openai.OpenAI, method: str) -> None:
    with pytest.raises(openai.NotFoundError, match="There is no file with this id") as refused:
        getattr(client.files, method)("file-none")
    assert refused.value.code == "file-not-found"


# Jobs


def test_job_is_the_same_in_both_words(client: openai.OpenAI, http: httpx.Client, file: str) -> None:
    job = created(
        client, file, {"n_epochs": 3, "batch_size": 8, "mixup": 0.2}, seed=7, suffix="pets", metadata={"a": "b"}
    )

    ours = our_job(http, job)
    assert (ours["method"], ours["name"], ours["metadata"]) == ("full_fine_tuning", "pets", {"a": "b"})
    assert ours["dataset"] == file.replace("file-", "ds_")
    assert (ours["spec"]["backbone"]["name"], ours["spec"]["seed"]) == ("graft_small", 7)
    assert {name: ours["spec"]["hyperparameters"][name] for name in ("epochs", "batch_size", "mixup")} == {
        "epochs": 3,
        "batch_size": 8,
        "mixup": 0.2,
    }
    assert (job.object, job.status, job.model, job.seed, job.training_file) == (
        "fine_tuning.job", "queued", "graft_small", 7, file,
    )  # fmt: skip
    assert (job.metadata, job.error, job.fine_tuned_model, job.result_files) == ({"a": "b"}, None, None, [])
    assert job.method.to_dict() == {
        "type": "full_fine_tuning",
        "full_fine_tuning": {
            "hyperparameters": {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": "auto", "mixup": 0.2}
        },
    }
    assert job.hyperparameters.to_dict() == {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.0}
    assert client.fine_tuning.jobs.retrieve(job.id) == job


def test_job_made_the_other_way_is_there_too(client: openai.OpenAI, http: httpx.Client, file: str) -> None:
    ours = http.post("/v1/jobs", json={"dataset": file.replace("file-", "ds_"), "method": "few_shot"}).json()

    job = client.fine_tuning.jobs.retrieve(ours["id"].replace("job_", "ftjob-"))

    assert (job.method.type, job.training_file, job.metadata) == ("few_shot", file, {})
    assert client.fine_tuning.jobs.retrieve(ours["id"]).id == job.id


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": openai.omit},
        {"method": {"type": "supervised"}},
        {"method": {"type": "auto", "auto": {}}},
        {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto"}}}},
        {"method": openai.omit, "hyperparameters": {"batch_size": "auto", "learning_rate_multiplier": 1}},
        {"method": openai.omit, "validation_file": None, "seed": None, "suffix": None, "integrations": []},
    ],
)
def test_auto_leaves_the_choice_to_graft(
    client: openai.OpenAI, http: httpx.Client, file: str, changes: dict[str, Any]
) -> None:
    job = created(client, file, {"n_epochs": "auto", "learning_rate_multiplier": None}, **changes)

    is_auto = bool(changes)
    assert our_job(http, job)["method"] == ("auto" if is_auto else "full_fine_tuning")
    assert job.method.type == ("supervised" if is_auto else "full_fine_tuning")
    assert job.hyperparameters.n_epochs == (
        "auto" if is_auto else our_job(http, job)["spec"]["hyperparameters"]["epochs"]
    )


def test_multiplier_is_of_the_rate_that_the_job_would_have_had(
    client: openai.OpenAI, http: httpx.Client, file: str
) -> None:
    usual = our_job(http, created(client, file))["spec"]["hyperparameters"]
    job = created(client, file, {"learning_rate_multiplier": 0.5})

    found = our_job(http, job)["spec"]["hyperparameters"]
    for name in ("learning_rate", "backbone_learning_rate"):
        assert found[name] == pytest.approx(usual[name] / 2)
    assert job.hyperparameters.learning_rate_multiplier is None
    asked = job.method.to_dict()["full_fine_tuning"]["hyperparameters"]
    assert asked["learning_rate"] == pytest.approx(usual["learning_rate"] / 2)


def test_an_earlier_model_can_be_gone_on_from(
    server: RunningServer, client: openai.OpenAI, http: httpx.Client, file: str
) -> None:
    model = api_builders.register_model(server.services)

    job = created(client, file, model=model)

    assert job.model == model
    assert our_job(http, job)["spec"]["backbone"]["model"] == model


def test_options_of_ours_go_in_the_extra_body(client: openai.OpenAI, http: httpx.Client, file: str) -> None:
    extra = {"recipe": "classic", "promote": "never", "budget_seconds": 60}

    spec = our_job(http, created(client, file, extra_body=extra))["spec"]

    assert (spec["recipe"], spec["promote"], spec["budget_seconds"]) == ("classic", "never", 60.0)


@pytest.mark.parametrize(
    ("tuned", "changes", "pointer", "message"),
    [
        ({"n_epochs": 0}, {}, "#/method/full_fine_tuning/hyperparameters/n_epochs",
         "n_epochs: must be an integer from 1 to 1000"),
        ({"n_epochs": 2.5}, {}, "#/method/full_fine_tuning/hyperparameters/n_epochs", "n_epochs: must be an integer"),
        ({"epochs": 0}, {}, "#/method/full_fine_tuning/hyperparameters/epochs", "epochs: must be an integer"),
        ({"epochs": 2, "n_epochs": 2}, {}, "#/method/full_fine_tuning/hyperparameters/n_epochs", "beside epochs"),
        ({"batch_size": "many"}, {}, "#/method/full_fine_tuning/hyperparameters/batch_size", "batch_size: must be"),
        ({"epoch": 2}, {}, "#/method/full_fine_tuning/hyperparameters/epoch", "no such hyperparameter"),
        ({"unfreeze": 2}, {}, "#/method/full_fine_tuning/hyperparameters/unfreeze", "for the method fine_tuning only"),
        ({"learning_rate_multiplier": 0}, {}, "#/method/full_fine_tuning/hyperparameters/learning_rate_multiplier",
         "above 0"),
        ({"learning_rate_multiplier": True}, {}, "#/method/full_fine_tuning/hyperparameters/learning_rate_multiplier",
         "above 0"),
        ({"learning_rate_multiplier": 1e9}, {}, "#/method/full_fine_tuning/hyperparameters/learning_rate_multiplier",
         "makes a learning rate of 1e+06, which must be a number above 0 and at most 10"),
        ({"learning_rate_multiplier": 10**400}, {},
         "#/method/full_fine_tuning/hyperparameters/learning_rate_multiplier", "none too large"),
        (None, {"hyperparameters": {"n_epochs": -1}, "method": openai.omit}, "#/hyperparameters/n_epochs", "n_epochs"),
        (None, {"hyperparameters": {"n_epochs": 1}}, "#/hyperparameters", "beside `method`"),
        (None, {"method": {"type": "supervised", "supervised": {"hyperparameters": {"learning_rate_multiplier": 2}}}},
         "#/method/supervised/hyperparameters/learning_rate_multiplier", "is for one method"),
        (None, {"method": {"type": "few_shot", "few_shot": {"hyperparameters": {"learning_rate_multiplier": 2}}}},
         "#/method/few_shot/hyperparameters/learning_rate_multiplier", "no meaning for few_shot"),
        (None, {"method": {"type": "few_shot", "few_shot": {"hyperparameters": {"n_epochs": 2}}}},
         "#/method/few_shot/hyperparameters/n_epochs", "n_epochs: has no meaning for few_shot"),
        (None, {"method": {"type": "dpo"}}, "#/method/type", "input should be 'supervised'"),
        (None, {"method": {"type": "few_shot", "supervised": {}}}, "#/method/supervised", "the method is few_shot"),
        (None, {"method": {"type": "few_shot", "few_shot": {"beta": 1}}}, "#/method/few_shot/beta", "no such field"),
        (None, {"model": "gpt-4o-mini"}, "#/model", "There is no backbone of this name"),
        (None, {"model": "resnet18"}, "#/model", "There are no pretrained weights of resnet18 here"),
        (None, {"suffix": "x" * 65}, "#/suffix", "64"),
        (None, {"seed": -1}, "#/seed", "seed: must be an integer"),
        (None, {"metadata": {"a": "x" * 513}}, "#/metadata", "512"),
        (None, {"metadata": {str(index): "" for index in range(17)}}, "#/metadata", "16"),
        (None, {"validation_file": "file-other"}, "#/validation_file", "train and val folders"),
        (None, {"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "#/integrations", "there are none"),
        (None, {"extra_body": {"recipe": "best"}}, "#/recipe", "one of classic, modern"),
        (None, {"extra_body": {"colour": "red"}}, "#/colour", "no such field"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_pointed_at_in_the_callers_words(
    client: openai.OpenAI,
    file: str,
    tuned: dict[str, Any] | None,
    changes: dict[str, Any],
    pointer: str,
    message: str,
) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        created(client, file, tuned, **changes)

    problem = refused.value.response.json()
    assert [error["pointer"] for error in problem["errors"]] == [pointer]
    assert message in problem["error"]["message"]
    assert problem["error"]["message"] in str(refused.value)
    assert refused.value.param == pointer.rpartition("/")[2]
    assert client.fine_tuning.jobs.list().data == []


def test_unknown_file_is_pointed_at(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="There is no file with this id") as refused:
        created(client, "file-none")
    assert refused.value.param == "training_file"


def test_file_that_could_not_be_processed_is_a_conflict_that_is_not_repeated(
    client: openai.OpenAI, database: Database
) -> None:
    failed = api_builders.failed_dataset(database).replace("ds_", "file-")

    with pytest.raises(openai.ConflictError, match="could not be processed") as refused:
        created(client, failed)
    assert refused.value.response.headers["x-should-retry"] == "false"


def test_submission_may_be_repeated_under_a_key(client: openai.OpenAI, file: str) -> None:
    headers = {"Idempotency-Key": "once"}
    first = created(client, file, extra_headers=headers)

    assert created(client, file, extra_headers=headers) == first
    with pytest.raises(openai.UnprocessableEntityError, match="used for another request"):
        created(client, file, seed=1, extra_headers=headers)
    assert len(client.fine_tuning.jobs.list().data) == 1


def test_jobs_are_listed_page_by_page_and_by_metadata(client: openai.OpenAI, http: httpx.Client, file: str) -> None:
    jobs = [created(client, file, metadata={"colour": colour, "it's": "{é}"}) for colour in ("red", "blue", "red")]
    ids = [job.id for job in jobs][::-1]

    assert [job.id for job in client.fine_tuning.jobs.list(limit=1)] == ids
    assert [job.id for job in client.fine_tuning.jobs.list(limit=1, metadata={"colour": "red"})] == [ids[0], ids[2]]
    assert len(client.fine_tuning.jobs.list(metadata={"colour": "red", "it's": "{é}"}).data) == 2
    assert client.fine_tuning.jobs.list(metadata={"shape": "red"}).data == []
    for query in ('metadata["]=1', "metadata[]=1", "metadata[a\\]=1"):
        problem = assert_is_problem(http.get(f"/v1/fine_tuning/jobs?{query}"), 422, "invalid-request")
        assert problem["errors"][0]["pointer"] == "#/metadata"
    assert_is_problem(http.get("/v1/fine_tuning/jobs?colour[a]=1"), 422, "invalid-request")
    assert_is_problem(http.get("/v1/jobs?metadata[a]=1"), 422, "invalid-request")


def test_queued_job_is_cancelled_at_once(client: openai.OpenAI, file: str) -> None:
    job = client.fine_tuning.jobs.cancel(created(client, file).id)

    assert job.status == "cancelled"
    assert job.finished_at is not None
    with pytest.raises(openai.ConflictError, match="already ended as cancelled") as refused:
        client.fine_tuning.jobs.cancel(job.id)
    assert refused.value.response.headers["x-should-retry"] == "false"


def test_pausing_and_resuming_are_refused_with_what_can_be_done(client: openai.OpenAI, file: str) -> None:
    job = created(client, file)

    with pytest.raises(openai.ConflictError, match="does not pause jobs: cancel it") as refused:
        client.fine_tuning.jobs.pause(job.id)
    assert refused.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.ConflictError, match="The job is queued and not paused"):
        client.fine_tuning.jobs.resume(job.id)


@pytest.mark.parametrize("method", ["retrieve", "cancel", "pause", "resume", "list_events"])
def test_unknown_job_is_not_found(client: openai.OpenAI, method: str) -> None:
    with pytest.raises(openai.NotFoundError, match="There is no job with this id"):
        getattr(client.fine_tuning.jobs, method)("ftjob-none")


def test_failed_job_says_why(client: openai.OpenAI, database: Database, file: str) -> None:
    job = created(client, file)
    claim = queue_builders.claim_next(database)
    assert claim is not None
    with database.write() as session:
        queue.fail(session, claim, queue_builders.ERROR)

    failed = client.fine_tuning.jobs.retrieve(job.id)

    assert failed.status == "failed"
    assert failed.error is not None
    assert (failed.error.code, failed.error.message) == ("diverged", "The loss is not a number.")
    newest = client.fine_tuning.jobs.list_events(job.id).data[0]
    assert (newest.level, newest.message) == ("error", "The job has failed. The loss is not a number.")


def test_running_job_says_when_it_will_have_ended(client: openai.OpenAI, database: Database, file: str) -> None:
    job = created(client, file)
    claim = queue_builders.claim_next(database)
    assert claim is not None
    progress = {"stage": "train", "fraction": 0.25, "eta_seconds": 600.0}
    with database.write() as session:
        queue.record_progress(session, claim, progress, event=True)
        queue.record_epoch(session, claim, queue_builders.epoch(1), progress)

    running = client.fine_tuning.jobs.retrieve(job.id)

    assert running.status == "running"
    assert running.estimated_finish is not None
    assert running.estimated_finish == pytest.approx(running.created_at + 600, abs=60)
    epoch, progressed, *_ = client.fine_tuning.jobs.list_events(job.id)
    assert (progressed.message, progressed.type) == ("Train: 25 % done.", "metrics")
    assert epoch.message == "Epoch 1: training loss 1.0000, validation loss 1.1000, validation accuracy 0.5000."
    assert isinstance(epoch.data, dict)
    assert (epoch.data["step"], epoch.data["train_loss"]) == (1, 1.0)


def test_events_are_paged_from_the_newest_on(client: openai.OpenAI, file: str) -> None:
    job = client.fine_tuning.jobs.cancel(created(client, file).id)

    messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=1)]

    assert messages == ["The job was cancelled.", "The job is queued."]
    with pytest.raises(openai.UnprocessableEntityError, match="must be the id of an event"):
        client.fine_tuning.jobs.list_events(job.id, after="last")


def test_job_without_a_model_has_no_checkpoints(client: openai.OpenAI, file: str) -> None:
    job = created(client, file)

    assert client.fine_tuning.jobs.checkpoints.list(job.id).data == []
    with pytest.raises(openai.UnprocessableEntityError, match="start from the first page"):
        client.fine_tuning.jobs.checkpoints.list(job.id, after="ftckpt_none")
