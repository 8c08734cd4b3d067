"""The whole of Graft as real processes: the journey, and what happens when each of them is killed."""

import io
import json
import random
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from running import RunningGraft, environment_for, graft_up, picture, pictures_zip, wait_until

# Small enough that an epoch takes a fraction of a second, many enough to be killed in the middle of.
SHORT = {"epochs": 2, "image_size": 32, "batch_size": 8}
LONG = {"epochs": 15, "image_size": 32, "batch_size": 4}
FINISH_WITHIN_SECONDS = 120.0


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def graft(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGraft]:
    """One server for all tests but those that stop it: it must survive each of the others anyway."""
    url = request.getfixturevalue("postgres_url") if request.param == "postgresql" else ""
    with graft_up(tmp_path_factory.mktemp("graft"), database_url=url) as running:
        yield running


@pytest.fixture
def http(graft: RunningGraft) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=graft.url, timeout=90) as client:
        yield client


@pytest.fixture(scope="module")
def undisturbed(graft: RunningGraft) -> dict[str, Any]:
    """What a LONG job comes to that nobody disturbs."""
    with httpx.Client(base_url=graft.url, timeout=90) as http:
        job = finished(http, submit(http, ready_dataset(http), LONG))
        assert job["attempt"] == 1
        return learnt(http, job)


def ready_dataset(http: httpx.Client) -> str:
    uploaded = http.put("/v1/datasets", params={"name": "colours"}, content=pictures_zip())
    assert uploaded.status_code == 201, uploaded.text
    dataset = http.get(f"/v1/datasets/{uploaded.json()['id']}", params={"wait": 60}).json()
    assert dataset["status"] == "ready", dataset
    return str(dataset["id"])


def submit(http: httpx.Client, dataset_id: str, hyperparameters: dict[str, Any]) -> str:
    request = {
        "dataset": dataset_id,
        "method": "from_scratch",
        "backbone": "squeezenet1_1",
        "recipe": "classic",
        "hyperparameters": hyperparameters,
        "promote": "always",
    }
    submitted = http.post("/v1/jobs", json=request)
    assert submitted.status_code == 201, submitted.text
    return str(submitted.json()["id"])


def epochs_done(http: httpx.Client, job_id: str) -> int:
    return len(http.get(f"/v1/jobs/{job_id}/history").json()["data"])


def finished(http: httpx.Client, job_id: str) -> dict[str, Any]:
    """The job once it has ended."""
    job: dict[str, Any] = {}

    def look() -> bool:
        job.update(http.get(f"/v1/jobs/{job_id}", params={"wait": 30}).json())
        return job["finished_at"] is not None

    wait_until(look, within_seconds=FINISH_WITHIN_SECONDS, otherwise="the job did not end")
    return job


def learnt(http: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    """What each epoch came to, and the digest of the weights, which are those of the best epoch."""
    history = http.get(f"/v1/jobs/{job['id']}/history").json()["data"]
    figures = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
    model = http.get(f"/v1/models/{job['model']}").json()
    return {"sha256": model["sha256"], "epochs": [[epoch[name] for name in figures] for epoch in history]}


def zip_of_pictures(pictures: list[bytes], *, copies: int) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for copy in range(copies):
            for index, content in enumerate(pictures):
                archive.writestr(f"{copy}/{index}.png", content)
    return packed.getvalue()


def batch_of(http: httpx.Client, archive: bytes, *, model: str) -> str:
    answer = http.put("/v1/batches", params={"model": model}, content=archive)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def ended_batch(http: httpx.Client, batch_id: str) -> dict[str, Any]:
    batch: dict[str, Any] = {}

    def look() -> bool:
        batch.update(http.get(f"/v1/batches/{batch_id}", params={"wait": 30}).json())
        return batch["finished_at"] is not None

    wait_until(look, within_seconds=FINISH_WITHIN_SECONDS, otherwise="the batch did not end")
    return batch


def assert_whole(http: httpx.Client, job: dict[str, Any], epochs: int) -> None:
    """The job has succeeded as if nothing had happened: each epoch once, and a model that answers."""
    assert (job["status"], job["error"]) == ("succeeded", None)
    history = http.get(f"/v1/jobs/{job['id']}/history").json()["data"]
    assert [entry["epoch"] for entry in history] == list(range(1, epochs + 1))
    assert (job["progress"]["epoch"], job["progress"]["fraction"]) == (epochs, 1.0)
    answer = http.post("/predict", params={"model": job["model"]}, content=picture(0, chance=random.Random(1)))
    assert answer.status_code == 200, answer.text


def test_three_requests_lead_from_a_zip_to_a_prediction(http: httpx.Client) -> None:
    dataset = http.put("/v1/datasets", params={"wait": 60}, content=pictures_zip()).json()
    request = {
        "dataset": dataset["id"],
        "method": "from_scratch",
        "backbone": "squeezenet1_1",
        "hyperparameters": SHORT,
        "promote": "always",
    }
    answer = http.post("/v1/jobs", params={"wait": 60}, json=request)
    job = answer.json()
    predicted = http.post("/predict", content=picture(0, chance=random.Random(1))).json()

    assert dataset["status"] == "ready"
    assert (answer.status_code, job["status"]) == (201, "succeeded")
    assert predicted["model"] == job["model"]


@pytest.mark.slow
def test_a_data_set_gets_ready_while_a_job_trains(http: httpx.Client) -> None:
    job_id = submit(http, ready_dataset(http), LONG | {"epochs": 1000})
    wait_until(
        lambda: epochs_done(http, job_id) >= 1, within_seconds=FINISH_WITHIN_SECONDS, otherwise="the job did not train"
    )

    uploaded = http.put("/v1/datasets", params={"wait": 60}, content=pictures_zip()).json()
    job = http.post(f"/v1/jobs/{job_id}/cancel").json()

    assert (uploaded["status"], job["status"]) == ("ready", "running")
    assert finished(http, job_id)["status"] == "cancelled"


def test_from_a_zip_to_predictions_by_way_of_the_event_stream(http: httpx.Client) -> None:
    job_id = submit(http, ready_dataset(http), SHORT)
    with http.stream("GET", f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"}) as stream:
        assert stream.headers["Content-Type"].startswith("text/event-stream")
        lines = list(stream.iter_lines())  # ends by itself, when the job does

    assert lines.count("event: epoch") == 2
    assert lines.count("event: model") == 1
    assert [line for line in lines if line.startswith("event: ")][-1] == "event: done"
    last_id = [line for line in lines if line.startswith("id: ")][-1].removeprefix("id: ")
    again = {"Accept": "text/event-stream", "Last-Event-ID": last_id}
    assert http.get(f"/v1/jobs/{job_id}/events", headers=again).status_code == 204
    job = http.get(f"/v1/jobs/{job_id}").json()
    assert job["attempt"] == 1
    assert_whole(http, job, epochs=2)
    default = http.post("/predict", files={"file": ("a.png", picture(1, chance=random.Random(2)))}).json()
    assert default["model"] == job["model"]
    assert {entry["label"] for entry in default["predictions"][0]["top"]} == {"colour0", "colour1"}


@pytest.mark.slow
def test_a_job_whose_process_is_killed_goes_on_as_attempt_2(
    graft: RunningGraft, http: httpx.Client, undisturbed: dict[str, Any]
) -> None:
    job_id = submit(http, ready_dataset(http), LONG)
    wait_until(lambda: epochs_done(http, job_id) >= 2, within_seconds=60, otherwise="no epoch was recorded")
    graft.program("worker.child", "training").kill()

    job = finished(http, job_id)

    assert job["attempt"] == 2
    assert_whole(http, job, epochs=LONG["epochs"])
    assert learnt(http, job) == undisturbed


def test_a_killed_worker_is_restarted_and_its_job_goes_on(
    graft: RunningGraft, http: httpx.Client, undisturbed: dict[str, Any]
) -> None:
    job_id = submit(http, ready_dataset(http), LONG)
    wait_until(lambda: epochs_done(http, job_id) >= 2, within_seconds=60, otherwise="no epoch was recorded")
    killed = graft.program("worker.main")
    killed.kill()

    job = finished(http, job_id)

    assert graft.program("worker.main").pid != killed.pid
    assert job["attempt"] == 2
    assert_whole(http, job, epochs=LONG["epochs"])
    assert learnt(http, job) == undisturbed


@pytest.mark.slow
def test_a_batch_whose_process_is_killed_goes_on_and_tells_the_same(graft: RunningGraft, http: httpx.Client) -> None:
    job = finished(http, submit(http, ready_dataset(http), SHORT))
    chance = random.Random(4)
    archive = zip_of_pictures([picture(label % 2, side=600, chance=chance) for label in range(20)], copies=120)
    undisturbed = batch_of(http, archive, model=job["model"])
    assert ended_batch(http, undisturbed)["attempt"] == 1

    disturbed = batch_of(http, archive, model=job["model"])

    def has_reached(status: str, *, num_images: int) -> bool:
        told = http.get(f"/v1/batches/{disturbed}").json()
        return bool(told["status"] == status and told["num_images"] >= num_images)

    wait_until(lambda: has_reached("running", num_images=0), within_seconds=60, otherwise="the batch did not begin")
    # Looked for before there is a part on disk: a fast batch would be done by the time it is found.
    running = graft.program("worker.child", "prediction")
    wait_until(lambda: has_reached("running", num_images=1), within_seconds=60, otherwise="no picture was predicted")
    running.kill()
    batch = ended_batch(http, disturbed)

    assert (batch["status"], batch["attempt"], batch["num_images"]) == ("succeeded", 2, 2400)
    for kind in ("jsonl", "csv"):
        assert (
            http.get(batch["results"][kind]).content
            == http.get(f"/v1/batches/{undisturbed}/results", params={"format": kind}).content
        )


def test_a_killed_api_is_restarted_at_the_same_address(graft: RunningGraft, http: httpx.Client) -> None:
    dataset_id = ready_dataset(http)
    killed = graft.program("app.main")
    killed.kill()
    killed.wait()

    wait_until(graft.is_ready, within_seconds=60, otherwise="the API did not come back")
    assert http.get(f"/v1/datasets/{dataset_id}").json()["status"] == "ready"
    assert graft.program("app.main").pid != killed.pid


@pytest.mark.slow
def test_ctrl_c_during_training_leaves_no_process_and_the_job_for_the_next_start(tmp_path: Path) -> None:
    with graft_up(tmp_path) as graft, httpx.Client(base_url=graft.url, timeout=90) as http:
        job_id = submit(http, ready_dataset(http), LONG)
        wait_until(lambda: epochs_done(http, job_id) >= 1, within_seconds=60, otherwise="no epoch was recorded")
        left = graft.descendants()

        assert graft.stop(signal.SIGINT) == 0
        assert [process for process in left if process.is_running()] == []

    with graft_up(tmp_path) as graft, httpx.Client(base_url=graft.url, timeout=90) as http:
        job = finished(http, job_id)
        # Given back in good order: that is not a failed attempt.
        assert job["attempt"] == 1
        assert_whole(http, job, epochs=LONG["epochs"])
        left = graft.descendants()

        assert graft.stop(signal.SIGTERM) == 0
        assert [process for process in left if process.is_running()] == []


@pytest.mark.slow
def test_the_command_trains_and_predicts(graft: RunningGraft, tmp_path: Path) -> None:
    archive, photo = tmp_path / "colours.zip", tmp_path / "photo.png"
    archive.write_bytes(pictures_zip())
    photo.write_bytes(picture(0, chance=random.Random(3)))
    options = "--method from_scratch --backbone squeezenet1_1 --recipe classic --epochs 2 -H image_size=32 --json"

    trained = run_graft(tmp_path, graft.url, "train", str(archive), "--promote", "always", *options.split())
    predicted = run_graft(tmp_path, graft.url, "predict", str(photo), "--json")

    assert trained.returncode == 0, trained.stderr
    model = json.loads(trained.stdout)["model"]
    assert model["aliases"] == ["default"]
    assert sum(line.startswith("epoch ") for line in trained.stderr.splitlines()) == 2
    assert json.loads(predicted.stdout)["model"] == model["id"]


@pytest.mark.slow
def test_ctrl_c_while_watching_leaves_the_job_running(graft: RunningGraft, http: httpx.Client, tmp_path: Path) -> None:
    job_id = submit(http, ready_dataset(http), LONG | {"epochs": 1000})
    command = [sys.executable, "-m", "app.cli", "jobs", "watch", job_id, "--url", graft.url]
    watching = subprocess.Popen(command, cwd=tmp_path, env=environment_for(tmp_path), stderr=subprocess.PIPE, text=True)
    assert watching.stderr is not None
    first_lines = [next(watching.stderr), next(watching.stderr)]
    watching.send_signal(signal.SIGINT)
    rest = watching.stderr.read()
    watching.stderr.close()

    assert watching.wait() == 130
    assert first_lines[0] == f"Job {job_id}\n"
    assert rest.splitlines()[-1] == (
        f"The job goes on. `graft jobs watch {job_id}` follows it, `graft jobs cancel {job_id}` ends it."
    )
    assert http.post(f"/v1/jobs/{job_id}/cancel").status_code == 200
    assert finished(http, job_id)["status"] == "cancelled"


@pytest.mark.slow
def test_up_refuses_another_address_without_a_key(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "app.cli", "up", "--host", "0.0.0.0", "--port", "0"]
    refused = subprocess.run(
        command, cwd=tmp_path, env=environment_for(tmp_path / "data"), capture_output=True, text=True, check=False
    )

    assert refused.returncode == 1
    assert "graft keys create --scope admin" in refused.stderr
    assert refused.stderr.splitlines()[-1] == "The API could not start; the lines above say why."


def run_graft(folder: Path, url: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "app.cli", *arguments],
        cwd=folder,
        env=environment_for(folder) | {"GRAFT_URL": url},
        capture_output=True,
        text=True,
        check=False,
    )
