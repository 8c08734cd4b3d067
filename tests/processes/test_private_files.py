"""What Graft writes is for its user alone, whatever the system's usual modes are."""

from pathlib import Path

import httpx
import pytest
from running import graft_up
from test_processes import SHORT, ready_dataset, submit


@pytest.mark.slow
def test_files_and_folders_are_their_users_alone(tmp_path: Path) -> None:
    with graft_up(tmp_path) as running, httpx.Client(base_url=running.url, timeout=90) as http:
        job = submit(http, ready_dataset(http), SHORT)
        assert http.get(f"/v1/jobs/{job}", params={"wait": 60}).json()["status"] == "succeeded"
        found = {path.relative_to(tmp_path).as_posix(): path.stat().st_mode for path in (tmp_path / "data").rglob("*")}

    assert {name.rpartition("/")[2] for name in found} >= {"graft.db", "archive", "pixels.bin", "weights.safetensors"}
    assert [name for name, mode in found.items() if mode & 0o077] == []
