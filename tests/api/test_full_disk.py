"""A disk without a byte left: who reads is answered, who writes is told, and nothing is half done."""

import shutil
import tempfile
from pathlib import Path

import api_builders
import builders
import disks
import numpy as np
import pytest
import queue_builders
from api_builders import CLASSES, assert_is_problem, wait_for
from disks import fill
from sqlalchemy import update
from test_job_routes import asked_for
from test_resumable_uploads import TUS, assert_is_whole, begin, half_a_piece, noise, offset_of, send

from app.db.tables import JobRow
from app.jobs.states import JobKind
from app.settings import MEBIBYTE


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


@pytest.mark.parametrize("what", ["dataset", "model", "job"])
def test_deleting_works_on_a_full_disk_in_the_room_of_the_ballast(small_disk: Path, what: str) -> None:
    settings = api_builders.settings_for(small_disk, ballast_bytes=MEBIBYTE)
    with api_builders.running(settings) as server, api_builders.client_of(server) as client:
        ballast = settings.data_dir / "graft.db-ballast"
        wait_for(ballast.exists)
        paths = {
            "dataset": f"/v1/datasets/{api_builders.ready_dataset(server.services.database)}",
            "model": f"/v1/models/{api_builders.register_model(server.services, aliases=())}",
        }
        request = {
            "dataset": api_builders.ready_dataset(server.services.database),
            "method": "from_scratch",
            "backbone": "squeezenet1_1",
        }
        paths["job"] = f"/v1/jobs/{client.post('/v1/jobs', json=request).json()['id']}"
        filler = fill(small_disk)
        # The log of the database is used up by writers who get no ballast.
        assert any(client.post("/v1/jobs", json=request).status_code == 507 for _ in range(500))
        assert ballast.stat().st_size == MEBIBYTE

        if what == "job":
            assert client.post(f"{paths['job']}/cancel").json()["status"] == "cancelled"
        assert client.delete(paths[what]).status_code == 200

        assert client.get(paths[what]).status_code == 404
        assert not ballast.exists()
        filler.unlink()
        assert server.services.database.keep_ballast()
        assert ballast.stat().st_size == MEBIBYTE


@pytest.mark.parametrize(
    "path", ["jobs/{job}/stop", "jobs/{job}/cancel", "fine_tuning/jobs/{job}/cancel", "batches/{batch}/cancel"]
)
def test_ending_a_job_works_on_a_full_disk_in_the_room_of_the_ballast(small_disk: Path, path: str) -> None:
    settings = api_builders.settings_for(small_disk, ballast_bytes=MEBIBYTE)
    with api_builders.running(settings) as server, api_builders.client_of(server) as client:
        database = server.services.database
        wait_for((settings.data_dir / "graft.db-ballast").exists)
        request = asked_for(api_builders.ready_dataset(database))
        job = client.post("/v1/jobs", json=request).json()["id"]
        batch = queue_builders.submit(database, kind=JobKind.prediction, top_k=1, files=1, size_bytes=1, sha256="")
        with database.write() as session:
            session.execute(update(JobRow).where(JobRow.id == batch).values(model_id="mdl_1"))
        queue_builders.claim_next(database)
        fill(small_disk)
        assert any(client.post("/v1/jobs", json=request).status_code == 507 for _ in range(500))

        assert client.post("/v1/" + path.format(job=job, batch=batch)).status_code == 200


def test_ballast_is_made_only_where_there_is_plenty_of_room(small_disk: Path) -> None:
    settings = api_builders.settings_for(small_disk, ballast_bytes=5 * MEBIBYTE)
    with api_builders.running(settings) as server:
        assert not server.services.database.keep_ballast()
        assert list(settings.data_dir.glob("*ballast*")) == []


def test_disk_that_takes_no_more_files_is_told_and_deleting_works(tmp_path: Path) -> None:
    archive = api_builders.archive_of_classes()
    with (
        disks.mounted(tmp_path / "disk", mebibytes=256, files=200) as disk,
        api_builders.running(api_builders.settings_for(disk)) as server,
        api_builders.client_of(server) as client,
    ):
        ready = api_builders.ready_dataset(server.services.database)
        fillers = disk / "fillers"
        fillers.mkdir()
        with pytest.raises(OSError, match="No space left"):
            for number in range(200):
                (fillers / str(number)).touch()

        assert_is_problem(client.put("/v1/datasets", content=archive), 507, "storage-full")
        assert_is_problem(client.post("/v1/uploads", headers={**TUS, "Upload-Length": "1000"}), 507, "storage-full")
        assert [dataset["id"] for dataset in client.get("/v1/datasets").json()["data"]] == [ready]
        assert client.delete(f"/v1/datasets/{ready}").status_code == 200

        shutil.rmtree(fillers)
        assert client.put("/v1/datasets", content=archive).status_code == 201


def test_picture_that_finds_no_room_on_its_way_in_is_told_so(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with api_builders.running(api_builders.settings_for(tmp_path)) as server, api_builders.client_of(server) as client:
        api_builders.register_model(server.services)
        large = builders.encoded(np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8))
        fill(small_disk)
        monkeypatch.setattr(tempfile, "tempdir", str(small_disk))  # where forms put parts of more than a MiB

        refused = client.post("/predict", files={"file": ("a.png", large)})

        assert_is_problem(refused, 507, "storage-full")
        assert client.post("/predict", content=large).status_code == 200  # needs none
