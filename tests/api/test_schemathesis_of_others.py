"""The whole OpenAPI document with a small key, as another workspace and with no key: by another process than the
owner's, since each takes a minute or more."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from api_builders import RunningServer
from test_models_and_operations import create_key
from test_schemathesis import assert_keeps_to_the_document
from test_workspaces import key_for

from app.access import Scope

CASES_AN_OPERATION = 4  # fewer kinds of answers than an owner gets
KEYS: dict[str, Callable[[RunningServer], dict[str, str]]] = {
    "small key": lambda server: create_key(server, Scope.predict),
    "stranger": lambda server: {"Authorization": f"Bearer {key_for(server, 'strangers')}"},
    "nobody": lambda server: {},
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("who", KEYS)
def test_every_operation_keeps_to_the_document_for_others(tmp_path: Path, who: str) -> None:
    answered = assert_keeps_to_the_document(tmp_path, cases=CASES_AN_OPERATION, key=KEYS[who])

    if who == "nobody":  # but for the requests that prepared it
        open_ones = re.findall(r'graft_requests_total\{method="\w+",route="([^"]+)",status="2\d\d"\}', answered)
        assert set(open_ones) == {"/healthz", "/readyz", "/v1/jobs", "/v1/batches", "/v1/uploads", "/v1/webhooks"}
