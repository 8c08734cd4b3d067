"""Batches from upload to results, by a real server and the worker's own function."""

import csv
import io
import json
from typing import Any

import api_builders
import builders
import httpx
import pytest
from api_builders import CLASSES, RunningServer, assert_is_problem

from app.jobs import owner, queue
from app.jobs.states import JobKind
from worker.child import run
from worker.reporter import Reporter
from worker.run_batch import run_batch
from worker.wakeup import Wakeup

FILES = {f"in/{i}.jpg": builders.jpeg(i) for i in range(3)} | {"broken.png": b"\x89PNG\r\n\x1a\nnothing"}
ARCHIVE = builders.zip_of(FILES)


def work(server: RunningServer) -> None:
    """What the worker does with the next batch."""
    services = server.services
    with services.database.write() as session:
        claim = queue.claim_next(session, kind=JobKind.prediction, worker_id="test", owner=owner.current_process())
    assert claim is not None
    reporter = Reporter(services.database, claim, shutdown=Wakeup())
    run(
        run_batch,
        claim,
        settings=services.settings,
        database=services.database,
        storage=services.storage,
        reporter=reporter,
    )


def submitted(client: httpx.Client, **query: str) -> dict[str, Any]:
    answer = client.put("/v1/batches", params=query, content=ARCHIVE)
    assert answer.status_code == 201, answer.text
    batch: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"/v1/batches/{batch['id']}"
    return batch


def stored(server: RunningServer, folder: str) -> list[str]:
    root = server.services.settings.storage_root / folder
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.fixture
def model(server: RunningServer) -> str:
    return api_builders.register_model(server.services)


def test_batch_goes_from_upload_to_both_files(server: RunningServer, client: httpx.Client, model: str) -> None:
    batch = submitted(client, model="default", top_k="1")
    assert batch["id"].startswith("batch_")
    assert (batch["object"], batch["status"], batch["queue_position"]) == ("batch", "queued", 1)
    assert (batch["model"], batch["top_k"], batch["num_files"]) == (model, 1, 4)
    assert (batch["progress"], batch["results"], batch["error"]) == (None, None, None)

    work(server)
    done = client.get(f"/v1/batches/{batch['id']}", params={"wait": 5}).json()
    lines = client.get(done["results"]["jsonl"])
    table = client.get(done["results"]["csv"])

    assert (done["status"], done["num_images"], done["num_rejected"]) == ("succeeded", 3, 1)
    assert (done["progress"]["stage"], done["progress"]["fraction"]) == ("done", 1.0)
    assert done["created_at"].endswith("Z") and done["finished_at"].endswith("Z")
    assert lines.headers["content-type"] == "application/x-ndjson"
    assert lines.headers["content-disposition"] == f'attachment; filename="{batch["id"]}.jsonl"'
    assert table.headers["content-type"] == "text/csv; charset=utf-8"
    rows = [json.loads(line) for line in lines.text.splitlines()]
    assert [row["path"] for row in rows] == list(FILES)
    assert [len(row["top"]) for row in rows[:3]] == [1, 1, 1]
    assert rows[3]["error"]["type"] == "/problems/unreadable-image"
    cells = list(csv.DictReader(io.StringIO(table.text)))
    assert [cell["label"] in CLASSES for cell in cells] == [True, True, True, False]


def test_rows_say_what_predict_says(server: RunningServer, client: httpx.Client, model: str) -> None:
    batch = submitted(client)
    work(server)

    rows = [json.loads(line) for line in client.get(f"/v1/batches/{batch['id']}/results").text.splitlines()]
    parts = [("file", (path, content)) for path, content in FILES.items()]
    answered = client.post("/predict", files=parts).json()["predictions"]

    for row, told in zip(rows[:3], answered[:3], strict=True):
        assert (row["label"], row["score"]) == (told["label"], pytest.approx(told["score"], abs=1e-5))
        assert set(row) - {"path"} == set(told) - {"filename"}


@pytest.mark.parametrize("pack", [builders.tar_of, lambda files: builders.tar_of(files, mode="w:gz")])
def test_form_and_tars_are_taken(server: RunningServer, client: httpx.Client, model: str, pack: Any) -> None:
    other = api_builders.register_model(server.services, seed=1, aliases=("other",))

    answer = client.post(
        "/v1/batches", files={"file": ("p.tar", pack(FILES))}, data={"model": "other", "top_k": "2"}
    ).json()

    assert (answer["model"], answer["top_k"], answer["num_files"]) == (other, 2, 4)


def test_repeated_upload_is_one_batch(client: httpx.Client, model: str) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = client.post("/v1/batches", content=ARCHIVE, headers=headers)
    again = client.post("/v1/batches", content=ARCHIVE, headers=headers)
    other = client.post("/v1/batches?top_k=1", content=ARCHIVE, headers=headers)

    assert (first.status_code, again.status_code, again.json()) == (201, 201, first.json())
    assert again.headers["idempotent-replayed"] == "true"
    assert_is_problem(other, 422, "idempotency-key-reused")


@pytest.mark.parametrize(
    ("content", "slug"),
    [
        (b"this is not an archive", "not-an-archive"),
        (b"", "empty-upload"),
        (builders.zip_of({"../a.jpg": builders.jpeg(1)}), "unsafe-path"),
        (builders.zip_of({"a.txt": b"text"}), "no-pictures"),
        (builders.zip_of({}), "no-pictures"),
    ],
)
def test_refused_upload_leaves_nothing(
    server: RunningServer, client: httpx.Client, model: str, content: bytes, slug: str
) -> None:
    assert_is_problem(client.post("/v1/batches", content=content), 422, slug)

    assert client.get("/v1/batches").json()["data"] == []
    assert stored(server, "batches") == stored(server, "staging") == []


def test_bad_options_and_unknown_models_are_refused(server: RunningServer, client: httpx.Client, model: str) -> None:
    assert_is_problem(client.post("/v1/batches?model=nobody", content=ARCHIVE), 404, "model-not-found")
    assert_is_problem(client.post("/v1/batches?top_k=0", content=ARCHIVE), 422, "invalid-request")
    unknown = client.post("/v1/batches", files={"file": ARCHIVE}, data={"model": "nobody"})
    assert_is_problem(unknown, 404, "model-not-found")
    wrong = client.post("/v1/batches", files={"file": ARCHIVE}, data={"seed": "1"})
    assert assert_is_problem(wrong, 422, "invalid-request")["errors"][0]["pointer"] == "#/seed"
    assert stored(server, "batches") == []


def test_without_a_model_there_is_no_batch(client: httpx.Client) -> None:
    assert_is_problem(client.post("/v1/batches", content=ARCHIVE), 404, "model-not-found")


def test_full_disk_refuses_batches(tmp_path: Any) -> None:
    settings = api_builders.settings_for(tmp_path, min_free_bytes=2**62)
    with api_builders.running(settings) as server, api_builders.client_of(server) as client:
        assert_is_problem(client.post("/v1/batches", content=ARCHIVE), 507, "storage-full")


def test_queued_batch_is_cancelled_at_once_and_deleted_with_its_archive(
    server: RunningServer, client: httpx.Client, model: str
) -> None:
    path = f"/v1/batches/{submitted(client)['id']}"

    early = assert_is_problem(client.get(f"{path}/results"), 409, "batch-not-finished")
    assert "wait=60" in early["detail"]
    assert_is_problem(client.delete(path), 409, "batch-not-finished")
    assert client.post(f"{path}/cancel").json()["status"] == "cancelled"
    assert_is_problem(client.post(f"{path}/cancel"), 409, "batch-finished")
    assert_is_problem(client.get(f"{path}/results"), 409, "batch-without-results")
    assert client.delete(path).json()["deleted"] is True
    assert_is_problem(client.get(path), 404, "not-found")
    assert stored(server, "batches") == []


def test_finished_batch_is_deleted_with_its_results(server: RunningServer, client: httpx.Client, model: str) -> None:
    path = f"/v1/batches/{submitted(client)['id']}"
    work(server)
    with client.stream("GET", f"{path}/results?format=csv") as reading:
        client.delete(path)
        reading.read()

    assert reading.text.count("\n") == 5
    assert stored(server, "batches") == []
    assert_is_problem(client.get(f"{path}/results"), 404, "not-found")


def test_model_is_kept_while_a_batch_asks_it(server: RunningServer, client: httpx.Client, model: str) -> None:
    asked = api_builders.register_model(server.services, aliases=())
    batch = submitted(client, model=asked)

    assert_is_problem(client.delete(f"/v1/models/{asked}"), 409, "model-in-use")
    client.post(f"/v1/batches/{batch['id']}/cancel")
    assert client.delete(f"/v1/models/{asked}").status_code == 200


def test_damaged_model_fails_the_batch_with_its_reason(server: RunningServer, client: httpx.Client, model: str) -> None:
    batch = submitted(client)
    server.services.storage.path(f"models/{model}/weights.safetensors").write_bytes(b"")
    work(server)

    failed = client.get(f"/v1/batches/{batch['id']}").json()
    assert (failed["status"], failed["error"]["code"]) == ("failed", "model-unavailable")
    assert_is_problem(client.get(f"/v1/batches/{batch['id']}/results"), 409, "batch-without-results")


def test_batches_are_listed_apart_from_jobs(client: httpx.Client, model: str) -> None:
    first, second = submitted(client)["id"], submitted(client)["id"]
    client.post(f"/v1/batches/{first}/cancel")

    assert [batch["id"] for batch in client.get("/v1/batches").json()["data"]] == [second, first]
    assert [b["id"] for b in client.get("/v1/batches?status=cancelled").json()["data"]] == [first]
    page = client.get(f"/v1/batches?limit=1&after={second}").json()
    assert ([batch["id"] for batch in page["data"]], page["has_more"]) == ([first], False)
    assert client.get("/v1/jobs").json()["data"] == []
    for path in (f"/v1/jobs/{first}", "/v1/batches/job_x", "/v1/batches?after=nobody", f"/v1/batches/{'x' * 90}"):
        assert_is_problem(client.get(path), 404, "not-found")
