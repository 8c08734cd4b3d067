"""Uploads in pieces: each row ends once, on both databases, and a file has one writer in all processes."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from app import holdings
from app.datasets import partial, uploads
from app.db.engine import Database
from app.db.tables import utc_now
from app.errors import Conflict, Locked, NotFound

HOLD = """
import sys
from pathlib import Path
from app.datasets import partial
with partial.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def begin(database: Database, upload_id: str) -> None:
    with database.write() as session:
        uploads.create(session, upload_id, size_bytes=2**40, filename=None, options={"seed": 0}, client_metadata="")


def test_upload_ends_once(any_database: Database) -> None:
    for upload_id in ("up_1", "up_2", "up_3"):
        begin(any_database, upload_id)
    with any_database.write() as session:
        uploads.finish(session, "up_1", dataset_id="ds_1")
        uploads.refuse(session, "up_2", {"code": "x"})

    for upload_id in ("up_1", "up_2"):
        with any_database.write() as session:
            with pytest.raises(Conflict):
                uploads.finish(session, upload_id, dataset_id="ds_2")
            with pytest.raises(Conflict):
                uploads.refuse(session, upload_id, {"code": "y"})
            with pytest.raises(Conflict):
                uploads.count_attempt(session, upload_id)

    with any_database.read() as session:
        assert [row.id for row in uploads.list_open(session)] == ["up_3"]
        ended = [(row.id, row.status, row.dataset_id, row.error) for row in uploads.list_ended(session)]
        assert ended == [("up_1", "finished", "ds_1", None), ("up_2", "refused", None, {"code": "x"})]


def test_attempts_are_counted_and_ended_uploads_forgotten(any_database: Database) -> None:
    begin(any_database, "up_1")
    begin(any_database, "up_2")
    with any_database.write() as session:
        assert [uploads.count_attempt(session, "up_1", by=by) for by in (1, 1, -1)] == [1, 2, 1]
        uploads.finish(session, "up_1", dataset_id="ds_1")

    for before, left in ((utc_now() - timedelta(hours=1), True), (utc_now() + timedelta(hours=1), False)):
        with any_database.write() as session:
            uploads.forget_ended(session, before=before)
        assert [holdings.has_row(any_database, f"uploads/{upload_id}") for upload_id in ("up_1", "up_2")] == [
            left,
            True,
        ]


def test_file_has_one_writer_in_all_processes_and_is_free_when_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "archive"
    with pytest.raises(NotFound), partial.locked(path):
        pass
    partial.create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    with holder.stdin, holder.stdout:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Locked), partial.locked(path):
            pass
        holder.kill()
        holder.wait()
    with partial.locked(path) as file:
        assert file.size_bytes == 0
