"""`graft check` names each file that is missing, corrupt or stray, and nothing else, while the server runs."""

import subprocess
import sys
from pathlib import Path

import api_builders
import builders
import httpx
import pytest
from api_builders import RunningServer
from running import environment_for
from test_pretraining_journey import upload

from app import check
from app.db.tables import new_id
from app.jobs import batches, queue
from app.jobs.states import JobKind
from app.storage import file_sha256


@pytest.fixture
def keys(server: RunningServer, client: httpx.Client) -> dict[str, str]:
    """A checked data set, a model, a kept prediction, a batch with results, an upload and a job: their keys."""
    services = server.services
    dataset = upload(server, client, builders.class_folders(4))["id"]
    model = api_builders.register_model(services, dataset_id=dataset)
    kept = client.post("/predict?store=true", content=builders.jpeg()).json()["predictions"][0]["id"]
    client.post("/v1/uploads", headers={"Tus-Resumable": "1.0.0", "Upload-Length": "1000"})
    batch = new_id("batch")
    archive = builders.written(services.storage.path(batches.archive_key(batch)), builders.zip_of({"a.jpg": b"x"}))
    spec = {"size_bytes": 1, "top_k": 1, "files": 1, "sha256": file_sha256(archive)}
    with services.database.write() as session:
        queue.submit(session, kind=JobKind.prediction, dataset_id="", model_id=model, spec=spec, job_id=batch)
        claim = queue.claim_next(session, kind=JobKind.prediction, worker_id="w", owner={})
        assert claim is not None
        queue.succeed(session, claim)
    for name in ("results.jsonl", "results.csv"):
        builders.written(services.storage.path(f"{batches.results_key(batch, 1)}/{name}"), b"x")
    return {"dataset": f"datasets/{dataset}", "model": f"models/{model}", "kept": f"predictions/{kept}", "batch": batch}


def findings(server: RunningServer) -> list[tuple[str, str]]:
    services = server.app.state.services
    return [
        (finding.what, finding.key) for finding in check.check(services.database, services.storage, pause_seconds=0.0)
    ]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_where_all_is_well_nothing_is_found(server: RunningServer, keys: dict[str, str]) -> None:
    assert findings(server) == []


def test_each_fault_is_named(server: RunningServer, keys: dict[str, str]) -> None:
    storage = server.services.storage
    for key in (f"{keys['model']}/weights.safetensors", f"{keys['dataset']}/archive", keys["kept"]):
        flip_a_byte(storage.path(key))
    storage.path(f"{keys['model']}/model.json").write_text("{")
    for key in (f"{keys['dataset']}/manifest.jsonl", f"{batches.results_key(keys['batch'], 1)}/results.csv"):
        storage.path(key).unlink()
    stray, publishing = f"models/{new_id('mdl')}", f"models/{new_id('mdl')}"
    for key in (stray, publishing):
        builders.written(storage.path(f"{key}/weights.safetensors"), b"x")

    with storage.announced(publishing, is_wanted=lambda _key: True):
        found = findings(server)

    assert found == [
        ("corrupt", f"{keys['model']}/weights.safetensors"),
        ("corrupt", f"{keys['model']}/model.json"),
        ("corrupt", f"{keys['dataset']}/archive"),
        ("missing", f"{keys['dataset']}/manifest.jsonl"),
        ("missing", f"{batches.results_key(keys['batch'], 1)}/results.csv"),
        ("corrupt", keys["kept"]),
        ("stray", stray),
    ]


def test_what_is_deleted_while_it_is_read_is_no_finding(
    server: RunningServer, client: httpx.Client, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def deleting(path: Path) -> str:
        if path.name == "archive" and keys["dataset"] in str(path):
            assert client.delete(f"/v1/{keys['dataset']}").status_code == 200
        return file_sha256(path)

    monkeypatch.setattr(check, "file_sha256", deleting)

    assert findings(server) == []


@pytest.mark.slow
def test_the_command_ends_with_1_where_anything_is_wrong(
    server: RunningServer, keys: dict[str, str], tmp_path: Path
) -> None:
    def graft_check() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "app.cli", "check"]
        return subprocess.run(
            command, env=environment_for(tmp_path / "data"), capture_output=True, text=True, check=False, cwd=tmp_path
        )

    assert graft_check().returncode == 0
    server.services.storage.path(f"{keys['model']}/weights.safetensors").unlink()
    failed = graft_check()
    assert (failed.returncode, failed.stdout.split(":")[0]) == (1, f"missing {keys['model']}/weights.safetensors")
    assert failed.stderr == "Not all is well: 1 missing.\n"
