"""A backup: a folder with every row, the files that rows speak of, and a digest of each file. Made while Graft runs.

Rows are kept in an SQLite file whichever database they come from, so that a backup may be restored into another kind
of database. Files are never changed once they are published, and are there before the row that speaks of them; so the
rows are read first, and what a row speaks of is missing only if it was deleted since, which the rows then say too.
Checkpoints come before the rows: as after a crash, a job's rows may be ahead of where it goes on from, never behind.
What can be made again (features, engines, exports) is left out. Knows tables and keys; not HTTP.
"""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Connection, Select, Table, delete, func, insert, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app.db.engine import Database, is_full
from app.db.migrate import upgrade
from app.db.sqlite import sqlite3
from app.db.tables import (
    DEFAULT_WORKSPACE,
    Base,
    DatasetRow,
    IdempotencyRow,
    JobRow,
    ModelRow,
    PredictionRow,
    UploadRow,
    WorkspaceRow,
    utc_now,
)
from app.errors import Conflict, GraftError, StorageFull
from app.jobs import queue
from app.jobs.states import JobKind, JobStatus
from app.predictions import picture_key
from app.settings import sqlite_url
from app.storage import LocalStorage, file_sha256, remove, sync, sync_tree

DATABASE_FILE, FILES_FOLDER, CONTENTS_FILE = "graft.db", "files", "backup.json"
_FORMAT_VERSION = 1
_ROWS_AT_A_TIME = 1000
# Made again when they are needed.
_LEFT_OUT = "features"
_CHECKPOINTS = "jobs"
# At copying what is replaced meanwhile, as checkpoints are once a minute.
_TRIES = 3


@dataclass(frozen=True)
class Contents:
    """What a backup holds. files: sha256 of each. missing: keys that rows speak of and that have no files."""

    format_version: int
    created_at: str
    rows: dict[str, int]
    files: dict[str, str]
    size_bytes: int
    missing: list[str]


class BackupDamaged(GraftError):
    """A backup that is not whole, or that this version cannot read."""

    title = "Damaged backup"


def back_up(database: Database, storage: LocalStorage, folder: Path) -> Contents:
    """Writes a backup to a folder that must not exist yet; it appears whole or not at all.

    Raises Conflict if the folder exists, StorageFull if its disk does not take it.
    """
    if folder.exists():
        raise Conflict(f"{folder} is there already; a backup goes to a new folder.")
    staged = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        with _room_for("The backup could not be written"):
            (staged / FILES_FOLDER).mkdir(parents=True)
            contents = _written(database, storage, staged)
            (staged / CONTENTS_FILE).write_text(json.dumps(asdict(contents), indent=1), "utf-8")
            sync_tree(staged)
            staged.rename(folder)
            sync(folder.parent)
    finally:
        remove(staged)
    return contents


def restore(folder: Path, database_url: str, storage: LocalStorage) -> Contents:
    """Puts a backup into an empty database and its storage; files first, then every row in one transaction.

    What was running is queued again and goes on from its last checkpoint. Nothing is changed before every file of the
    backup was read and found right. Raises BackupDamaged, Conflict if the database has rows, DatabaseMismatch if a
    newer version made the backup, StorageFull.
    """
    contents = _checked(folder)
    with _room_for("Nothing was restored"), storage.staging() as staged:
        staged.mkdir()
        shutil.copyfile(folder / DATABASE_FILE, staged / DATABASE_FILE)
        upgrade(sqlite_url(staged / DATABASE_FILE))  # of an older version
        upgrade(database_url)
        source, target = Database(sqlite_url(staged / DATABASE_FILE)), Database(database_url)
        try:
            _refuse_rows(target)
            keys = _top_keys(contents)
            with storage.announced(*keys, is_wanted=lambda _key: _has_rows(target)):
                _put_files(folder, keys, contents, storage)
                with source.read() as rows, target.write() as session:
                    _copy_rows(rows.connection(), session.connection())
                    _count_on(session)
                    _give_back(session)
        finally:
            source.dispose()
            target.dispose()
    return contents


@contextmanager
def _room_for(otherwise: str) -> Iterator[None]:
    """Raises StorageFull, which begins so, for files and rows that a disk does not take."""
    try:
        yield
    except OSError as error:
        raise StorageFull(f"{otherwise}: {error.strerror or error}.") from error
    except (OperationalError, sqlite3.OperationalError) as error:
        if not is_full(error):
            raise
        raise StorageFull(f"{otherwise}: {os.strerror(errno.ENOSPC)}.") from error


def _written(database: Database, storage: LocalStorage, staged: Path) -> Contents:
    digests = _checkpoints(database, storage, staged / FILES_FOLDER)  # of each key, of each of its files
    missing: list[str] | None = None
    while True:
        rows, keys = _snapshot(database, staged / DATABASE_FILE)
        for gone in digests.keys() - keys.keys():
            del digests[gone]
            remove(staged / FILES_FOLDER / gone)
        uncopied = [key for key in keys if key not in digests and key.split("/")[0] != _CHECKPOINTS]
        found = {key: _copied(storage, key, staged / FILES_FOLDER) for key in uncopied}
        digests |= {key: files for key, files in found.items() if files}
        before, missing = missing, [key for key, is_needed in keys.items() if is_needed and key not in digests]
        # What was deleted while files were copied is no longer in rows that are read after that; what is, is lost.
        if not missing or missing == before:
            break
    files = {DATABASE_FILE: file_sha256(staged / DATABASE_FILE)}
    files |= {f"{FILES_FOLDER}/{name}": digest for each in digests.values() for name, digest in each.items()}
    size = sum((staged / name).stat().st_size for name in files)
    return Contents(_FORMAT_VERSION, utc_now().isoformat(), rows, files, size, missing)


def _checkpoints(database: Database, storage: LocalStorage, target: Path) -> dict[str, dict[str, str]]:
    """Digests of the copied files of each unfinished job."""
    with database.read() as session:
        keys = _checkpoint_keys(session)
    return {key: files for key in keys if (files := _copied(storage, key, target))}


def _snapshot(database: Database, path: Path) -> tuple[dict[str, int], dict[str, bool]]:
    """Every row as of one moment, in an SQLite file; returns how many of each table, and the keys they speak of."""
    path.unlink(missing_ok=True)
    url = sqlite_url(path)
    upgrade(url)
    copy = Database(url)
    try:
        with database.read() as rows, copy.write() as session:
            counts = _copy_rows(rows.connection(), session.connection())
        with copy.read() as session:
            keys = _keys(session)
    finally:
        copy.dispose()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
    return counts, keys


def _keys(session: Session) -> dict[str, bool]:
    """What rows speak of, and whether it must be there."""
    datasets = session.execute(select(DatasetRow.id, DatasetRow.status))
    batches = session.execute(select(JobRow.id, JobRow.status).where(JobRow.kind == JobKind.prediction))
    return {
        **{f"datasets/{id}": status == "ready" for id, status in datasets},
        **{f"models/{id}": True for id in session.scalars(select(ModelRow.id))},
        **{picture_key(id): True for id in session.scalars(select(PredictionRow.id))},
        **{f"batches/{id}": status != JobStatus.failed for id, status in batches},
        **dict.fromkeys(_checkpoint_keys(session), False),
    }


def _checkpoint_keys(session: Session) -> list[str]:
    return [f"{_CHECKPOINTS}/{id}" for id in sorted(queue.unfinished_ids(session))]


def _copied(storage: LocalStorage, key: str, target: Path) -> dict[str, str]:
    """Digests of the copied files of a key, by their own keys; none if it is gone, or goes while it is copied."""
    for _ in range(_TRIES):
        try:
            names = [name for name in storage.files(key) if name.split("/")[2:3] != [_LEFT_OUT]]
            return {name: _copy(storage.path(name), target / name) for name in names}
        except FileNotFoundError:
            remove(target / key)
    return {}


def _copy(source: Path, target: Path) -> str:
    """Copies a file; returns the sha256 of what was read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with source.open("rb") as reading, target.open("wb") as writing:
        while block := reading.read(1024 * 1024):
            digest.update(block)
            writing.write(block)
    return digest.hexdigest()


def _copy_rows(source: Connection, target: Connection) -> dict[str, int]:
    counts = {}
    target.execute(delete(WorkspaceRow))  # every new database has the first one
    for table in Base.metadata.sorted_tables:
        counts[table.name] = 0
        for part in source.execute(_rows(table).execution_options(yield_per=_ROWS_AT_A_TIME)).mappings().partitions():
            target.execute(insert(table), [dict(row) for row in part])
            counts[table.name] += len(part)
    return counts


def _rows(table: Table) -> Select[Any]:
    rows = select(table)
    if table is IdempotencyRow.__table__:
        # Of requests that are being answered: whoever makes them must ask again.
        return rows.where(IdempotencyRow.response.is_not(None))
    if table is UploadRow.__table__:
        # What has come of unfinished ones is not in a backup.
        return rows.where(UploadRow.status != "open")
    return rows


def _count_on(session: Session) -> None:
    """Lets PostgreSQL number new rows after those that were brought; SQLite does so by itself."""
    if session.get_bind().dialect.name != "postgresql":
        return
    for table in Base.metadata.sorted_tables:
        if (column := table.autoincrement_column) is None:
            continue
        last = session.scalar(select(func.max(column)))
        if last is not None:
            sequence = func.pg_get_serial_sequence(table.name, column.name)
            session.execute(select(func.setval(sequence, last)))


def _give_back(session: Session) -> None:
    """Queues what was running: its worker is not here."""
    for job in session.scalars(select(JobRow).where(JobRow.status == JobStatus.running)).all():
        queue.give_back(session, queue.claim_of(job))


def _checked(folder: Path) -> Contents:
    """Raises BackupDamaged, naming what is wrong."""
    try:
        contents = TypeAdapter(Contents).validate_json((folder / CONTENTS_FILE).read_bytes())
    except (OSError, ValidationError):
        raise BackupDamaged(f"{folder} is no backup of Graft, or its {CONTENTS_FILE} is damaged.") from None
    if contents.format_version != _FORMAT_VERSION:
        raise BackupDamaged("A newer version of Graft made this backup; install that one to restore it.")
    for name, digest in contents.files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            raise BackupDamaged(f"The backup is not whole: {name} is missing.")
        if file_sha256(path) != digest:
            raise BackupDamaged(f"The backup is damaged: {name} is not what was written.")
    return contents


def _refuse_rows(database: Database) -> None:
    if _has_rows(database):
        raise Conflict("The database has data in it; restore into an empty one (a new GRAFT_DATA_DIR).")


def _has_rows(database: Database) -> bool:
    with database.read() as session:
        return any(session.execute(_made(table).limit(1)).first() for table in Base.metadata.sorted_tables)


def _made(table: Table) -> Select[Any]:
    """What is in a table besides what every new database has."""
    rows = select(table)
    return rows.where(WorkspaceRow.id != DEFAULT_WORKSPACE) if table is WorkspaceRow.__table__ else rows


def _put_files(folder: Path, keys: Sequence[str], contents: Contents, storage: LocalStorage) -> None:
    storage.check_room(contents.size_bytes)
    for key in keys:
        with storage.staging() as staged:
            source = folder / FILES_FOLDER / key
            shutil.copytree(source, staged) if source.is_dir() else shutil.copyfile(source, staged)
            storage.publish(staged, key)


def _top_keys(contents: Contents) -> list[str]:
    """Such as "models/mdl_…", of all files."""
    names = (name.removeprefix(f"{FILES_FOLDER}/") for name in contents.files if name != DATABASE_FILE)
    return sorted({"/".join(name.split("/")[:2]) for name in names})
