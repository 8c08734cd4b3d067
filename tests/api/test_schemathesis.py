"""The whole OpenAPI document against a real server, by Schemathesis, as owner; others: test_schemathesis_of_others.

All of its checks, in all of its phases. What fits the document must be accepted, but for rules that a schema cannot say
(an archive that is one, options that exclude each other): those the hooks keep.
"""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import api_builders
import pytest
from api_builders import RunningServer
from test_models_and_operations import EVALUATION, create_key
from test_resumable_uploads import PIECE

from app.access import Scope

HOOKS = Path(__file__).with_name("schemathesis_hooks.py")
CASES_AN_OPERATION = int(os.environ.get("GRAFT_TEST_CASES", "15"))
# Besides what it takes for a refusal by itself, a body beyond the limit.
CHECKS = """
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 406, 409, 412, 413, 415, 422, 428, 429]
[checks.missing_required_header]
expected-statuses = [400, 401, 403, 412, 415, 422]
[[operations]]
include-path = "/v1/aliases/{name}"
include-method = "PUT"
parameters = { "path.name" = "latest" }
"""
# What the paths' parameters are taken from, so that requests get beyond 404.
MODELS = dict.fromkeys(("model", "model_id", "name"), "model")
PARAMETERS = {
    **MODELS,
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


@contextmanager
def served(folder: Path) -> Iterator[RunningServer]:
    settings = api_builders.settings_for(folder, max_upload_bytes=2**20, webhooks=True)
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


def run(server: RunningServer, folder: Path, *, cases: int, headers: Mapping[str, str]) -> list[str]:
    """What Schemathesis says of each operation by itself, and of what follows from another's answer. Fails where it
    finds something."""
    there = what_is_there(server)
    (folder / "openapi.json").write_text(json.dumps(server.app.openapi()))
    # Where links lead from what was made to what is done with it, ids from elsewhere would take their place.
    return [
        _run(
            server, folder, phases="coverage,fuzzing", parameters=PARAMETERS, there=there, cases=cases, headers=headers
        ),
        _run(server, folder, phases="stateful", parameters=MODELS, there=there, cases=cases, headers=headers),
    ]


def _run(
    server: RunningServer,
    folder: Path,
    *,
    phases: str,
    parameters: Mapping[str, str],
    there: Mapping[str, str],
    cases: int,
    headers: Mapping[str, str],
) -> str:
    lines = [f'"path.{name}" = "{there[kind]}"' for name, kind in parameters.items()]
    (folder / "schemathesis.toml").write_text("\n".join(["[parameters]", *lines, CHECKS]))
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml", "run"),
        *("openapi.json", "--url", server.url, "--no-color", "--continue-on-failure", "--no-shrink"),
        *(part for name, value in headers.items() for part in ("--header", f"{name}: {value}")),
        *("--checks", "all", "--mode", "all"),
        *("--exclude-path-regex", "/export$"),  # each takes seconds of a core
        *("--phases", phases, "--max-examples", str(cases)),
        *("--generation-allow-x00", "true", "--generation-deterministic", "--request-timeout", "30"),
    ]
    environment = os.environ | {
        "SCHEMATHESIS_HOOKS": str(HOOKS),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "GRAFT_TEST_THERE": json.dumps(there),
    }
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    # Without the ends of long lines: a whole picture may be in what reproduces a finding.
    assert ran.returncode == 0, "\n".join(line[:400] for line in ran.stdout.splitlines()) + ran.stderr[-5000:]
    return ran.stdout


def cases_in(said: str) -> int:
    found = re.search(r"(\d+) generated", said)
    assert found is not None, said
    return int(found[1])


def assert_keeps_to_the_document(folder: Path, *, cases: int, key: Callable[[RunningServer], Mapping[str, str]]) -> str:
    """Returns the metrics of the server that was asked. key: makes one, as a header."""
    with served(folder) as server:
        said = run(server, folder, cases=cases, headers=key(server))

        cases_alone, cases_in_chains = map(cases_in, said)
        logging.getLogger(__name__).info("%d cases of operations alone, %d in chains", cases_alone, cases_in_chains)
        assert cases_alone > 1000 and cases_in_chains > 0
        answered = server.services.metrics.exposition().decode()
    assert not re.search(r'graft_requests_total\{[^}]*status="500"', answered)
    return answered


@pytest.mark.slow
@pytest.mark.timeout(900 + 20 * CASES_AN_OPERATION)
def test_every_operation_keeps_to_the_document(tmp_path: Path) -> None:
    assert_keeps_to_the_document(tmp_path, cases=CASES_AN_OPERATION, key=lambda server: create_key(server, Scope.admin))
