"""The form of a new job, and the list of jobs: what is refused is told in the form, and for people."""

from collections.abc import Iterator
from pathlib import Path

import api_builders
import httpx
import pytest
import queue_builders
from api_builders import RunningServer, client_of

PERSON = {"Accept": "text/html"}


@pytest.fixture
def busy_server(tmp_path: Path) -> Iterator[RunningServer]:
    """Where one job may wait or run at a time, and one does."""
    settings = api_builders.settings_for(tmp_path, workspace_max_unfinished_jobs=1)
    with api_builders.running(settings) as server:
        queue_builders.submit(server.services.database)
        yield server


@pytest.mark.parametrize("path", ["/jobs", "/jobs/estimate"])
@pytest.mark.parametrize("field", ["seed", "epochs"])
def test_a_number_that_is_nested_without_end_is_no_number(
    server: RunningServer, client: httpx.Client, path: str, field: str
) -> None:
    dataset = api_builders.ready_dataset(server.services.database)

    answer = client.post(path, data={"dataset": dataset, field: "[" * 200_000}, headers=PERSON)

    assert answer.status_code == (422 if path == "/jobs" else 200)
    assert f"{field}: must be an integer" in answer.text


def test_a_spent_quota_is_told_in_the_form_which_stays_filled(busy_server: RunningServer) -> None:
    dataset = api_builders.ready_dataset(busy_server.services.database)
    filled = {"dataset": dataset, "backbone": "graft_small", "name": "the third", "epochs": "7"}
    with client_of(busy_server, headers=PERSON) as client:
        answer = client.post("/jobs", data=filled)

    assert (answer.status_code, answer.headers["retry-after"]) == (429, "30")
    assert '<p class="problem" role="alert">' in answer.text
    assert "1 jobs and batches wait or run already" in answer.text
    assert f'<option value="{dataset}" selected>' in answer.text
    assert '<option value="graft_small" selected>' in answer.text
    assert 'value="the third"' in answer.text and 'value="7"' in answer.text


def test_more_jobs_than_are_compared_are_refused_with_a_sentence(server: RunningServer, client: httpx.Client) -> None:
    ids = [queue_builders.submit(server.services.database) for _ in range(7)]

    six, seven = (client.get("/jobs/compare", params={"job": ids[:count]}, headers=PERSON) for count in (6, 7))

    assert (six.status_code, seven.status_code) == (200, 422)
    assert "7 jobs are too many to be held side by side: go back and tick 6 at most." in seven.text
    assert client.get("/jobs/compare", params={"job": ids[:6] + ids[:1]}, headers=PERSON).status_code == 200
