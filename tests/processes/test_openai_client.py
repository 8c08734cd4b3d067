"""OpenAI's own client drives the whole of Graft: API and worker as real processes; and docs/protocols.md runs."""

import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob
from running import RunningGraft, environment_for, graft_up, picture, pictures_zip

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "protocols.md").read_text()
PATIENCE_SECONDS = 120.0


@pytest.fixture(scope="module")
def graft(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGraft]:
    """One server for all tests: none stops it."""
    with graft_up(tmp_path_factory.mktemp("graft")) as running:
        yield running


@pytest.fixture
def client(graft: RunningGraft) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{graft.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def ended(client: openai.OpenAI, job_id: str) -> FineTuningJob:
    deadline = time.monotonic() + PATIENCE_SECONDS
    job = client.fine_tuning.jobs.retrieve(job_id)
    while job.finished_at is None:
        assert time.monotonic() < deadline, "the job did not end"
        time.sleep(0.1)
        job = client.fine_tuning.jobs.retrieve(job_id)
    return job


def test_from_a_file_to_a_model(client: openai.OpenAI) -> None:
    archive = pictures_zip()
    file = client.files.create(file=("colours.zip", archive), purpose="fine-tune")
    assert (file.status, file.filename, file.bytes, file.purpose) == (
        "uploaded", "colours.zip", len(archive), "fine-tune",
    )  # fmt: skip
    assert client.files.wait_for_processing(file.id, poll_interval=0.1).status == "processed"

    hyperparameters = {"n_epochs": 2, "batch_size": 8, "learning_rate_multiplier": 0.5, "image_size": 64}
    submitted = client.fine_tuning.jobs.create(
        model="graft_small",
        training_file=file.id,
        method={"type": "full_fine_tuning", "full_fine_tuning": {"hyperparameters": hyperparameters}},
        seed=7,
        suffix="colours",
        metadata={"team": "red"},
        extra_body={"promote": "always"},
    )
    job = ended(client, submitted.id)

    assert (job.status, job.error, job.model, job.training_file) == ("succeeded", None, "graft_small", file.id)
    assert (job.seed, job.metadata) == (7, {"team": "red"})
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, 8)
    assert job.fine_tuned_model is not None
    look_at_the_events(client, job)
    look_at_the_model(client, job)
    client.files.delete(file.id)


def look_at_the_events(client: openai.OpenAI, job: FineTuningJob) -> None:
    newest_first = list(client.fine_tuning.jobs.list_events(job.id, limit=3))  # all of its pages
    numbers = [int(event.id.removeprefix("ftevent-")) for event in newest_first]
    messages = [event.message for event in newest_first]

    assert numbers == sorted(set(numbers), reverse=True)
    assert (messages[0], messages[-1]) == ("The job has succeeded.", "The job is queued.")
    assert f"The model {job.fine_tuned_model} is registered." in messages
    epochs = [event for event in newest_first if event.message.startswith("Epoch")]
    assert [(event.type, event.data["step"]) for event in epochs] == [("metrics", 2), ("metrics", 1)]


def look_at_the_model(client: openai.OpenAI, job: FineTuningJob) -> None:
    [checkpoint] = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.fine_tuned_model_checkpoint == job.fine_tuned_model
    assert checkpoint.step_number in (1, 2)
    assert checkpoint.metrics.valid_loss is not None

    model = client.models.retrieve("default")
    assert (model.id, model.object, model.owned_by) == (job.fine_tuned_model, "model", "graft")
    assert model.created >= job.created_at
    assert model.id in [listed.id for listed in client.models.list()]
    with pytest.raises(openai.ConflictError, match="The model is in use as default"):
        client.models.delete(model.id)


@pytest.mark.slow
def test_file_that_is_still_being_checked_is_waited_for_and_a_running_job_is_cancelled(client: openai.OpenAI) -> None:
    file = client.files.create(file=("colours.zip", pictures_zip(seed=1)), purpose="fine-tune")

    long = {"n_epochs": 1000, "image_size": 32}
    method = {"type": "from_scratch", "from_scratch": {"hyperparameters": long}}
    job = client.fine_tuning.jobs.create(model="squeezenet1_1", training_file=file.id, method=method)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while client.fine_tuning.jobs.retrieve(job.id).status != "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert client.fine_tuning.jobs.cancel(job.id).status == "running"

    assert ended(client, job.id).status == "cancelled"
    assert client.fine_tuning.jobs.list_events(job.id, limit=1).data[0].level == "warn"
    with pytest.raises(openai.ConflictError, match="already ended as cancelled"):
        client.fine_tuning.jobs.cancel(job.id)


@pytest.mark.slow
def test_models_can_be_deleted(client: openai.OpenAI) -> None:
    file = client.files.create(file=("colours.zip", pictures_zip(seed=2)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="auto",
        training_file=file.id,
        method={"type": "few_shot"},
        extra_body={"promote": "never"},
    )
    model_id = ended(client, job.id).fine_tuned_model
    assert model_id is not None

    deleted = client.models.delete(model_id)

    assert (deleted.id, deleted.deleted) == (model_id, True)
    with pytest.raises(openai.NotFoundError, match="There is no model"):
        client.models.retrieve(model_id)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="docs/protocols.md needs curl; installed by .ci/run")
def test_the_page_on_clients_runs(graft: RunningGraft, tmp_path: Path) -> None:
    (tmp_path / "flowers.zip").write_bytes(pictures_zip(per_class=8, seed=3))
    (tmp_path / "daisy.jpg").write_bytes(picture(0, chance=random.Random(5)))
    blocks = re.findall(r"^```(python|bash)\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert [language for language, _ in blocks] == ["python", "python", "python", "bash"]

    printed = [run(language, block, graft, tmp_path) for language, block in blocks]

    trained, classified, inferred, raw = printed
    assert trained.startswith("The job has succeeded.\n")
    assert "mdl_" in trained
    assert [line.split()[0] for line in classified.splitlines()] == ["colour0", "colour1"]
    assert re.search(r":0:colour0' b'.*:1:colour1", inferred), inferred
    assert '"shape": [1, 2]' in raw


def run(language: str, block: str, graft: RunningGraft, folder: Path) -> str:
    """What a block of the page prints, run as its reader would."""
    here = block.replace("localhost:8000", graft.url.removeprefix("http://")).replace("ft_…", "unused")
    program = [sys.executable, "-c"] if language == "python" else ["bash", "-c"]
    ran = subprocess.run(
        [*program, here],
        cwd=folder,
        env=environment_for(folder),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert ran.returncode == 0, f"{block}\n{ran.stdout}{ran.stderr}"
    return ran.stdout
