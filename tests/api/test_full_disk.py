"""A disk without a byte left: who reads is answered, who writes is told, and nothing is half done."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import api_builders
import builders
import pytest
from api_builders import CLASSES, assert_is_problem
from test_resumable_uploads import TUS, assert_is_whole, begin, half_a_piece, noise, offset_of, send


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own; the test is skipped where none may be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"needs to mount a small file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path) -> Path:
    """Takes all that is free, to the last page."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (64 * 1024, 4096):
            try:
                while file.write(b"\0" * size) == size:
                    pass
            except OSError:
                continue
    assert shutil.disk_usage(folder).free == 0
    return filler


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
def test_upload_in_pieces_keeps_what_there_was_room_for_and_goes_on_later(small_disk: Path) -> None:
    archive = builders.zip_of({f"{name}/{i}.jpg": noise(i) for i in range(8) for name in CLASSES})
    with (
        api_builders.running(api_builders.settings_for(small_disk)) as server,
        api_builders.client_of(server) as client,
    ):
        assert_is_problem(client.post("/v1/uploads", headers={**TUS, "Upload-Length": str(2**30)}), 507, "storage-full")
        path = begin(client, len(archive))
        with half_a_piece(server, path, archive, 3 * 2**19) as connection:
            api_builders.wait_for(lambda: offset_of(client, path) >= 2**20)
            filler = fill(small_disk)
            connection.sendall(archive[3 * 2**19 :])
            assert b" 507 " in connection.recv(1000)

        kept = offset_of(client, path)
        assert 2**20 <= kept < len(archive)
        assert_is_problem(send(client, path, kept, archive[kept:]), 507, "storage-full")
        assert offset_of(client, path) == kept
        filler.unlink()
        assert send(client, path, kept, archive[kept:]).status_code == 204
        assert_is_whole(server, client, path, archive)


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
def test_full_disk_is_told_and_everything_goes_on_once_there_is_room(small_disk: Path) -> None:
    with (
        api_builders.running(api_builders.settings_for(small_disk)) as server,
        api_builders.client_of(server) as client,
    ):
        model = api_builders.register_model(server.services, aliases=())
        dataset = api_builders.ready_dataset(server.services.database)
        filler = fill(small_disk)
        request = {"dataset": dataset, "method": "from_scratch", "backbone": "squeezenet1_1"}

        # The log of a database has some room of its own; it is used up in time.
        refused = [answer for _ in range(200) if (answer := client.post("/v1/jobs", json=request)).status_code != 201]
        assert len(refused) > 0
        for answer in refused:
            assert_is_problem(answer, 507, "storage-full")
        assert_is_problem(client.delete(f"/v1/models/{model}"), 507, "storage-full")
        assert_is_problem(client.put("/v1/datasets", content=b"PK" * 100), 507, "storage-full")
        jobs = client.get("/v1/jobs", params={"limit": 200}).json()["data"]
        assert len(jobs) == 200 - len(refused)
        assert client.get(f"/v1/models/{model}").status_code == 200
        assert client.get("/readyz").status_code == 200

        filler.unlink()
        assert client.post("/v1/jobs", json=request).status_code == 201
        assert client.delete(f"/v1/models/{model}").status_code == 200
        assert client.get("/v1/jobs", params={"limit": 200}).json()["data"][1:] == jobs
        with server.services.database.read() as session:
            assert session.connection().exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
