"""What a job's body may look like, and what is said of one that may not."""

import json
from collections.abc import Iterator
from typing import Any

import api_builders
import httpx
import pytest
from api_builders import RunningServer, assert_is_problem
from test_job_routes import asked_for


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One for all tests here: none of them leaves anything behind."""
    with api_builders.running(api_builders.settings_for(tmp_path_factory.mktemp("server"))) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with api_builders.client_of(server) as client:
        yield client


@pytest.fixture(scope="module")
def dataset(server: RunningServer) -> str:
    return api_builders.ready_dataset(server.services.database)


@pytest.mark.parametrize(
    ("hyperparameters", "pointer"),
    [
        ({"epochs": 0}, "#/hyperparameters/epochs"),
        ({"epochs": 10**30}, "#/hyperparameters/epochs"),
        ({"epochz": 3}, "#/hyperparameters/epochz"),
        ({"learning_rate": "fast"}, "#/hyperparameters/learning_rate"),
        ({"unfreeze": 2}, "#/hyperparameters/unfreeze"),
    ],
)
def test_bad_hyperparameter_is_pointed_at(
    client: httpx.Client, dataset: str, hyperparameters: dict[str, Any], pointer: str
) -> None:
    response = client.post("/v1/jobs", json=asked_for(dataset, hyperparameters=hyperparameters))

    problem = assert_is_problem(response, 422, "invalid-hyperparameter")
    assert [error["pointer"] for error in problem["errors"]] == [pointer]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'"text"',
        b"null",
        b"{",
        b"\xff{}",
        b'{"dataset": "ds_1", "dataset": "ds_2"}',
        b'{"dataset": "ds_1", "budget_seconds": NaN}',
        b'{"dataset": "ds_1", "budget_seconds": -Infinity}',
        b'{"dataset": "ds_1", "budget_seconds": 1e999}',
        b'{"dataset": "ds_1", "seed": ' + b"9" * 5000 + b"}",
        b'{"dataset": "ds_1", "name": "a\\u0000b"}',
        b'{"dataset": "ds_1", "name": "\\ud800"}',
        b'{"\\ud800": 1}',
        b'{"dataset": ' + b"[" * 40 + b"]" * 40 + b"}",
        b"[" * 60_000,
        b'{"dataset": "ds_1", "state": "running", "fence": 3}',
        b'{"dataset": "../../x"}',
        b'{"dataset": ""}',
        b'{"dataset": null}',
        b"{}",
    ],
)
def test_hostile_json_is_refused_with_a_reason(client: httpx.Client, body: bytes) -> None:
    problem = assert_is_problem(client.post("/v1/jobs", content=body), 422, "invalid-request")

    assert problem["detail"]


def test_large_json_is_refused(client: httpx.Client) -> None:
    assert_is_problem(client.post("/v1/jobs", content=b" " * (1024 * 1024 + 1)), 413, "too-large")


@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded", "text/plain", "application/json"])
def test_json_is_read_whatever_its_content_type_says(
    client: httpx.Client, dataset: str, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}

    response = client.post("/v1/jobs", content=json.dumps(asked_for(dataset)), headers=headers)

    assert response.status_code == 201


def test_job_on_an_unknown_data_set_is_404(client: httpx.Client) -> None:
    assert_is_problem(client.post("/v1/jobs", json=asked_for("ds_none")), 404, "not-found")


def test_job_whose_weights_cannot_be_had_is_refused_with_the_remedy(client: httpx.Client, dataset: str) -> None:
    response = client.post("/v1/jobs", json={"dataset": dataset, "backbone": "vgg16", "method": "fine_tuning"})

    problem = assert_is_problem(response, 422, "weights-unavailable")
    assert "GRAFT_WEIGHTS_DIR" in problem["detail"]


@pytest.mark.parametrize("seconds", ["61", "-1", "nan", "x"])
def test_wait_out_of_range_is_refused(client: httpx.Client, seconds: str) -> None:
    problem = assert_is_problem(client.get(f"/v1/jobs/job_1?wait={seconds}"), 422, "invalid-request")

    assert problem["errors"][0]["pointer"] == "#/wait"
