"""Bytes appear whole or not at all, and what crashes leave behind is found."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import queue_builders

from app.db.engine import Database
from app.db.migrate import upgrade
from app.db.tables import DEFAULT_WORKSPACE, DatasetRow
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


def run_and_kill(storage: LocalStorage, *lines: str) -> None:
    """Runs a program that has `storage`, and `die`, which kills it."""
    start = (
        "import os, signal, pathlib",
        "from app.storage import LocalStorage",
        "die = lambda: os.kill(os.getpid(), signal.SIGKILL)",
        f"storage = LocalStorage(pathlib.Path({str(storage.root)!r}))",
    )
    program = subprocess.run([sys.executable, "-c", "\n".join([*start, *lines])], check=False)
    assert program.returncode == -signal.SIGKILL


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


def test_folder_that_several_publish_at_once_is_whole_and_nobody_fails(storage: LocalStorage) -> None:
    def publish() -> None:
        own = LocalStorage(storage.root)
        for _ in range(100):
            with own.staging() as staged:
                staged.mkdir()
                (staged / "weights").write_text("whole")
                own.publish(staged, "models/mdl_1")

    with ThreadPoolExecutor(4) as pool:
        publishing = [pool.submit(publish) for _ in range(4)]
    assert [each.result() for each in publishing] == [None] * 4

    assert storage.path("models/mdl_1/weights").read_text() == "whole"
    assert list(storage.path("staging").iterdir()) == []


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


def test_sweep_of_what_nobody_holds_removes_what_is_old_and_leaves_what_is_young(storage: LocalStorage) -> None:
    old = written(storage.path("staging/old"), a="1")
    young = written(storage.path("staging/young"), a="1")
    make_older(old, seconds=25 * HOUR)

    assert storage.sweep() == 1
    assert (old.exists(), young.exists()) == (False, True)


def test_what_is_being_staged_is_never_swept_however_old_it_looks(storage: LocalStorage) -> None:
    with storage.staging(".zip") as staged:
        staged.write_bytes(b"half")
        for path in storage.path("staging").iterdir():
            make_older(path, seconds=1000 * HOUR)

        assert LocalStorage(storage.root).sweep() == 0
        assert staged.read_bytes() == b"half"


def test_what_a_dead_process_staged_is_swept_at_once(storage: LocalStorage) -> None:
    run_and_kill(storage, "with storage.staging() as staged: staged.write_text('half'); die()")
    [_, _] = storage.path("staging").iterdir()  # it, and its lock

    assert storage.sweep() == 1
    assert list(storage.path("staging").iterdir()) == []


def test_staging_goes_on_beside_sweeps(storage: LocalStorage) -> None:
    """A sweep may come between the making of a lock and its holding."""
    stop = threading.Event()

    def sweep() -> None:
        while not stop.is_set():
            LocalStorage(storage.root).sweep()

    with ThreadPoolExecutor() as pool:
        sweeping = [pool.submit(sweep) for _ in range(2)]
        try:
            for number in range(100):
                with storage.staging() as staged:
                    staged.write_text(str(number))
                    assert staged.read_text() == str(number)
        finally:
            stop.set()
        assert [each.result() for each in sweeping] == [None, None]
    assert list(storage.path("staging").iterdir()) == []


def test_room_beyond_the_reserve_is_needed(tmp_path: Path) -> None:
    LocalStorage(tmp_path, min_free_bytes=0).check_room(1)

    with pytest.raises(StorageFull):
        LocalStorage(tmp_path, min_free_bytes=2**62).check_room(1)


@pytest.mark.parametrize("has_row", [True, False])
def test_files_whose_publisher_died_stay_only_with_a_row(
    database: Database, storage: LocalStorage, has_row: bool
) -> None:
    run_and_kill(
        storage,
        "with storage.announced('datasets/ds_1', is_wanted=die), storage.staging() as staged:",
        "    staged.write_text('archive')",
        "    storage.publish(staged, 'datasets/ds_1/archive')",
        "    die()",
    )
    if has_row:
        with database.write() as session:
            session.add(DatasetRow(id="ds_1", name="n", size_bytes=1, sha256="0", splits={}))
    [announcement] = storage.path("announced").iterdir()

    sweep_files(database, storage)
    is_there_at_first = storage.exists("datasets/ds_1/archive")
    make_older(announcement, seconds=2 * HOUR)
    sweep_files(database, storage)

    assert is_there_at_first, "a database server may still be at it"
    assert storage.exists("datasets/ds_1") is has_row
    assert list(storage.path("announced").iterdir()) == []


def test_files_whose_publisher_lives_are_never_swept_however_old_they_look(
    database: Database, storage: LocalStorage
) -> None:
    with storage.announced("datasets/ds_1", is_wanted=lambda _key: True):
        with storage.staging() as staged:
            staged.write_text("archive")
            storage.publish(staged, "datasets/ds_1/archive")
        [announcement] = storage.path("announced").iterdir()
        make_older(announcement, seconds=1000 * HOUR)

        sweep_files(database, storage)

        assert storage.exists("datasets/ds_1/archive")
    assert list(storage.path("announced").iterdir()) == []


def test_announcement_that_a_power_cut_left_empty_deletes_nothing(database: Database, storage: LocalStorage) -> None:
    with storage.staging() as staged:
        storage.publish(written(staged, a="1"), "models/mdl_1")
    for name, text in {"1.json": "", "2.json": '["models/md', "3.json": "\0" * 20}.items():
        (storage.path("announced") / name).write_text(text)
        make_older(storage.path("announced") / name, seconds=2 * HOUR)

    sweep_files(database, storage)

    assert storage.exists("models/mdl_1")
    assert list(storage.path("announced").iterdir()) == []


def test_what_an_earlier_version_announced_is_swept(database: Database, storage: LocalStorage) -> None:
    with storage.staging() as staged:
        storage.publish(written(staged, a="1"), "models/mdl_1")
    announcement = storage.path("announced") / "models+mdl_1"
    announcement.touch()
    make_older(announcement, seconds=2 * HOUR)

    sweep_files(database, storage)

    assert not storage.exists("models/mdl_1")
    assert list(storage.path("announced").iterdir()) == []


def test_files_that_were_never_announced_are_never_swept(database: Database, storage: LocalStorage) -> None:
    with storage.staging() as staged:
        storage.publish(written(staged, a="1"), "models/mdl_of_another_database")
    make_older(storage.path("models/mdl_of_another_database"), seconds=1000 * HOUR)

    sweep_files(database, storage)

    assert storage.exists("models/mdl_of_another_database")


def test_files_of_a_row_whose_deleter_died_are_swept(database: Database, storage: LocalStorage) -> None:
    with database.write() as session:
        session.add(DatasetRow(id="ds_1", name="n", size_bytes=1, sha256="0", splits={}))
    with storage.staging() as staged:
        storage.publish(written(staged, a="1"), "datasets/ds_1")
    url = database.engine.url.render_as_string()
    run_and_kill(
        storage,
        "from sqlalchemy import text",
        "from app import holdings",
        "from app.db.engine import Database",
        "LocalStorage.delete = lambda self, key: die()",
        "rows = lambda session: session.execute(text('DELETE FROM datasets'))",
        f"holdings.delete(Database({url!r}), storage, 'datasets/ds_1', rows=rows)",
    )
    [announcement] = storage.path("announced").iterdir()
    assert storage.exists("datasets/ds_1")
    make_older(announcement, seconds=2 * HOUR)

    sweep_files(database, storage)

    assert not storage.exists("datasets/ds_1")


def test_checkpoints_are_not_swept_by_who_looks_into_another_database(
    database: Database, storage: LocalStorage, tmp_path: Path
) -> None:
    job_id = queue_builders.claimed(database).job_id
    with storage.staging() as staged:
        storage.publish(written(staged, state="1"), f"jobs/{job_id}")
    make_older(storage.path(f"jobs/{job_id}"), seconds=1000 * HOUR)
    url = f"sqlite:///{tmp_path / 'other.db'}"
    upgrade(url)
    other = Database(url).within(DEFAULT_WORKSPACE)

    sweep_files(other, storage)

    assert storage.exists(f"jobs/{job_id}")
    other.dispose()
