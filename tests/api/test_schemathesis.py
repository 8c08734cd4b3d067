"""The whole OpenAPI document against a real server, by Schemathesis: as owner, with a small key, as another workspace,
and with no key.

All of its checks but one: that whatever fits the document is accepted. Rules that a schema cannot say (an archive that
is one, options that exclude each other) refuse some of it, with a problem that says why.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import api_builders
import pytest
from api_builders import RunningServer
from test_models_and_operations import EVALUATION, create_key
from test_resumable_uploads import PIECE
from test_workspaces import key_for

from app.access import Scope

HOOKS = Path(__file__).with_name("schemathesis_hooks.py")
# As owner, and as each of the others, who get fewer kinds of answers.
CASES_AN_OPERATION, CASES_OF_OTHERS = int(os.environ.get("GRAFT_TEST_CASES", "40")), 10
# Besides what it takes for a refusal by itself, a body beyond the limit.
CHECKS = """
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 406, 409, 412, 413, 415, 422, 428, 429]
"""
# What the paths' parameters are taken from, so that requests get beyond 404.
PARAMETERS = {
    **dict.fromkeys(("model", "model_id", "name"), "model"),
    "job_id": "job",
    "dataset_id": "dataset",
    "file_id": "dataset",
    "batch_id": "batch",
    "upload_id": "upload",
    "webhook_id": "webhook",
}


async def nowhere(host: str, port: int) -> Sequence[str]:
    """Webhooks that are made up here are sent to nobody."""
    return []


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    settings = api_builders.settings_for(tmp_path, max_upload_bytes=2**20, webhooks=True)
    with api_builders.running(settings, resolve=nowhere) as server:
        yield server


def what_is_there(server: RunningServer) -> dict[str, str]:
    """Ids of one of each kind."""
    model = api_builders.register_model(server.services, evaluation=EVALUATION)
    dataset = api_builders.ready_dataset(server.services.database)
    with api_builders.client_of(server, headers=create_key(server, Scope.admin)) as client:
        request = {"dataset": dataset, "method": "from_scratch", "backbone": "squeezenet1_1"}
        job = client.post("/v1/jobs", json=request)
        batch = client.put("/v1/batches", params={"model": model}, content=api_builders.archive_of_classes())
        whole = api_builders.archive_of_classes()
        upload = client.post("/v1/uploads", content=whole, headers={**PIECE, "Upload-Length": str(len(whole))})
        webhook = client.post("/v1/webhooks", json={"url": "https://hooks.example/"})
    made = {"job": job, "batch": batch, "upload": upload, "webhook": webhook}
    return {"model": model, "dataset": dataset, **{kind: answer.json()["id"] for kind, answer in made.items()}}


def run(server: RunningServer, folder: Path, *, cases: int, headers: Mapping[str, str]) -> str:
    """What Schemathesis says. Fails where it finds something."""
    there = what_is_there(server)
    lines = [f'"path.{name}" = "{there[kind]}"' for name, kind in PARAMETERS.items()]
    (folder / "schemathesis.toml").write_text("\n".join(["[parameters]", *lines, CHECKS]))
    (folder / "openapi.json").write_text(json.dumps(server.app.openapi()))
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml", "run"),
        *("openapi.json", "--url", server.url, "--no-color", "--continue-on-failure", "--no-shrink"),
        *(part for name, value in headers.items() for part in ("--header", f"{name}: {value}")),
        *("--checks", "all", "--exclude-checks", "positive_data_acceptance", "--mode", "all"),
        *("--exclude-path-regex", "/export$"),  # each takes seconds of a core
        *("--phases", "coverage,fuzzing", "--max-examples", str(cases)),
        *("--generation-allow-x00", "true", "--generation-deterministic", "--request-timeout", "30"),
    ]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": str(HOOKS), "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-20_000:] + ran.stderr[-5000:]
    return ran.stdout


def cases_in(said: str) -> int:
    found = re.search(r"(\d+) generated", said)
    assert found is not None, said
    return int(found[1])


@pytest.mark.slow
@pytest.mark.timeout(900 + 20 * CASES_AN_OPERATION)
@pytest.mark.parametrize("who", ["owner", "small key", "stranger", "nobody"])
def test_every_operation_keeps_to_the_document(server: RunningServer, tmp_path: Path, who: str) -> None:
    keys: dict[str, Callable[[], dict[str, str]]] = {
        "owner": lambda: create_key(server, Scope.admin),
        "small key": lambda: create_key(server, Scope.predict),
        "stranger": lambda: {"Authorization": f"Bearer {key_for(server, 'strangers')}"},
        "nobody": dict,
    }
    cases = CASES_AN_OPERATION if who == "owner" else CASES_OF_OTHERS
    said = run(server, tmp_path, cases=cases, headers=keys[who]())

    assert cases_in(said) > 1000
    answered = server.services.metrics.exposition().decode()
    assert not re.search(r'graft_requests_total\{[^}]*status="500"', answered)
    if who == "nobody":  # but for the requests that prepared it
        open_ones = re.findall(r'graft_requests_total\{method="\w+",route="([^"]+)",status="2\d\d"\}', answered)
        assert set(open_ones) == {"/healthz", "/readyz", "/v1/jobs", "/v1/batches", "/v1/uploads", "/v1/webhooks"}
