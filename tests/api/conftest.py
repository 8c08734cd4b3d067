"""A real server per test, and a client that speaks to it."""

from collections.abc import Iterator
from pathlib import Path

import api_builders
import httpx
import pytest
from api_builders import RunningServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with api_builders.running(api_builders.settings_for(tmp_path)) as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with api_builders.client_of(server) as client:
        yield client
