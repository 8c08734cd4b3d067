"""Bytes appear whole or not at all, and what crashes leave behind is found."""

import os
import time
from pathlib import Path

import pytest

from app.db.engine import Database
from app.db.tables import DatasetRow
from app.errors import StorageFull
from app.storage import LocalStorage
from worker.endings import sweep_files

HOUR = 3600.0


def written(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def make_older(path: Path, *, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_published_folder_is_at_its_key_and_no_longer_in_staging(storage: LocalStorage) -> None:
    with storage.staging() as staged:
        storage.publish(written(staged, a="1"), "models/mdl_1")

    assert (storage.path("models/mdl_1") / "a").read_text() == "1"
    assert list(storage.path("staging").iterdir()) == []


def test_publishing_again_replaces_the_whole_folder(storage: LocalStorage) -> None:
    for files in ({"a": "1", "b": "1"}, {"a": "2"}):
        with storage.staging() as staged:
            storage.publish(written(staged, **files), "models/mdl_1")

    assert {path.name: path.read_text() for path in storage.path("models/mdl_1").iterdir()} == {"a": "2"}


def test_what_is_not_published_is_gone_after_an_error(storage: LocalStorage) -> None:
    with pytest.raises(RuntimeError), storage.staging(".zip") as staged:
        staged.write_bytes(b"half")
        raise RuntimeError

    assert list(storage.path("staging").iterdir()) == []


def test_deleted_file_stays_readable_for_who_has_it_open(storage: LocalStorage) -> None:
    with storage.staging() as staged:
        staged.write_text("text")
        storage.publish(staged, "datasets/ds_1/archive")

    with storage.path("datasets/ds_1/archive").open() as opened:
        storage.delete("datasets/ds_1")

        assert (storage.exists("datasets/ds_1"), opened.read()) == (False, "text")


def test_key_cannot_lead_out_of_the_storage(storage: LocalStorage) -> None:
    with pytest.raises(AssertionError):
        storage.path("../outside")


def test_sweep_removes_what_is_old_and_leaves_what_is_young(storage: LocalStorage) -> None:
    old = written(storage.path("staging/old"), a="1")
    young = written(storage.path("staging/young"), a="1")
    make_older(old, seconds=25 * HOUR)

    assert storage.sweep() == 1
    assert (old.exists(), young.exists()) == (False, True)


def test_room_beyond_the_reserve_is_needed(tmp_path: Path) -> None:
    LocalStorage(tmp_path, min_free_bytes=0).check_room(1)

    with pytest.raises(StorageFull):
        LocalStorage(tmp_path, min_free_bytes=2**62).check_room(1)


@pytest.mark.parametrize("has_row", [True, False])
def test_files_whose_publisher_died_stay_only_with_a_row(
    database: Database, storage: LocalStorage, has_row: bool
) -> None:
    storage.announce("datasets/ds_1")
    with storage.staging() as staged:
        staged.write_text("archive")
        storage.publish(staged, "datasets/ds_1/archive")
    if has_row:
        with database.write() as session:
            session.add(DatasetRow(id="ds_1", name="n", size_bytes=1, sha256="0", splits={}))
    [announcement] = storage.path("announced").iterdir()

    sweep_files(database, storage)
    is_there_at_first = storage.exists("datasets/ds_1/archive")
    make_older(announcement, seconds=2 * HOUR)
    sweep_files(database, storage)

    assert is_there_at_first, "its publisher may still be at it"
    assert storage.exists("datasets/ds_1") is has_row
    assert storage.announced(older_than_seconds=0) == []


def test_files_that_were_never_announced_are_never_swept(database: Database, storage: LocalStorage) -> None:
    with storage.staging() as staged:
        storage.publish(written(staged, a="1"), "models/mdl_of_another_database")
    make_older(storage.path("models/mdl_of_another_database"), seconds=1000 * HOUR)

    sweep_files(database, storage)

    assert storage.exists("models/mdl_of_another_database")
