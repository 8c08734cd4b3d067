"""Whether the files that rows speak of are there and are what was stored. Only reads, while everything runs.

What is uploaded or deleted meanwhile is not a finding: whatever looks like one is looked at again some seconds later,
and files that no row speaks of are strays only if nobody is about to write that row. Knows tables and keys.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from sqlalchemy import select

from app import holdings
from app.db.engine import Database
from app.db.tables import DatasetRow, JobRow, ModelRow, PredictionRow
from app.jobs import batches
from app.jobs.batches import BatchSpec
from app.jobs.states import JobKind, JobStatus
from app.predictions import picture_key
from app.storage import LocalStorage, file_sha256

# More than a deletion takes between a row and its files, or some files and their rows.
PAUSE_SECONDS = 5.0
# Read at a time; each is a small record, its files are read one by one.
ROWS_AT_A_TIME = 500


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be. key: of the file, or of the entry that no row speaks of."""

    what: Literal["missing", "corrupt", "stray"]
    key: str
    detail: str


Look = Callable[[], Finding | None]


@dataclass(frozen=True)
class _Expected:
    """A file that a row speaks of. sha256: None where none was written down."""

    key: str
    sha256: str | None = None
    is_json: bool = False


def check(database: Database, storage: LocalStorage, *, pause_seconds: float = PAUSE_SECONDS) -> Iterator[Finding]:
    """Findings of all workspaces: what is missing or corrupt, by kind of row, then what is stray.

    Whatever looks like one is looked at again at the end, after a pause: what is deleted takes two steps.
    """
    suspects = [look for look in _looks(database, storage) if look()]
    if suspects:
        time.sleep(pause_seconds)
    for look in suspects:
        if finding := look():
            yield finding


def _looks(database: Database, storage: LocalStorage) -> Iterator[Look]:
    for table in (ModelRow, DatasetRow, JobRow, PredictionRow):
        for row in _rows(database, table):
            for file in _expected(row):
                yield partial(_wrong, database, storage, row, file)
    for folder in holdings.TABLES:
        for path in _entries(storage, folder):
            yield partial(_stray, database, storage, folder, path.name)


def _rows(database: Database, table: type[Any]) -> Iterator[Any]:
    """Oldest first; no transaction is open while files are read."""
    last = 0
    while True:
        with database.read() as session:
            rows = session.scalars(
                select(table).where(table.seq > last).order_by(table.seq).limit(ROWS_AT_A_TIME)
            ).all()
        if not rows:
            return
        yield from rows
        last = rows[-1].seq


def _expected(row: Any) -> list[_Expected]:
    match row:
        case ModelRow():
            folder = f"models/{row.id}"
            return [
                _Expected(f"{folder}/weights.safetensors", row.sha256),
                _Expected(f"{folder}/model.json", is_json=True),
            ]
        case DatasetRow(status="ready"):
            folder = f"datasets/{row.id}"
            return [_Expected(f"{folder}/archive", row.sha256), _Expected(f"{folder}/manifest.jsonl")]
        case DatasetRow(status="processing"):
            return [_Expected(f"datasets/{row.id}/archive", row.sha256)]
        case JobRow(kind=JobKind.prediction) if row.status != JobStatus.failed:
            archive = _Expected(batches.archive_key(row.id), BatchSpec.model_validate(row.spec).sha256)
            results = batches.results_key(row.id, row.fence)
            names = ("results.jsonl", "results.csv") if row.status == JobStatus.succeeded else ()
            return [archive, *(_Expected(f"{results}/{name}") for name in names)]
        case PredictionRow():
            return [_Expected(picture_key(row.id), row.sha256)]
    return []


def _looked_at(storage: LocalStorage, file: _Expected) -> Finding | None:
    path = storage.path(file.key)
    try:
        if file.sha256 is not None and file_sha256(path) != file.sha256:
            return Finding("corrupt", file.key, "its sha256 is not the one that was written down")
        if file.is_json:
            json.loads(path.read_bytes())
        path.stat()
    except FileNotFoundError:
        return Finding("missing", file.key, "the database speaks of it")
    except OSError as error:
        return Finding("corrupt", file.key, f"it cannot be read: {error.strerror}")
    except ValueError:
        return Finding("corrupt", file.key, "it is no JSON")
    return None


def _wrong(database: Database, storage: LocalStorage, row: Any, file: _Expected) -> Finding | None:
    found = _looked_at(storage, file)
    return found if found and _is_as_it_was(database, row) else None


def _is_as_it_was(database: Database, row: Any) -> bool:
    """Whether the row is still there and says the same: it may have been deleted while its files were read."""
    table = type(row)
    with database.read() as session:
        now = session.scalar(select(table).where(table.seq == row.seq))
    return now is not None and getattr(now, "status", None) == getattr(row, "status", None)


def _stray(database: Database, storage: LocalStorage, folder: str, name: str) -> Finding | None:
    key = f"{folder}/{name}"
    # Announcements, each a file to read, are asked last: nearly everything has its row.
    if holdings.has_row(database, key) or not storage.exists(key) or key in storage.announced_keys():
        return None
    return Finding("stray", key, "no row of the database speaks of it")


def _entries(storage: LocalStorage, folder: str) -> list[Any]:
    path = storage.path(folder)
    return sorted(path.iterdir()) if path.is_dir() else []
