"""Which rows have files, and in which folders of the storage: said once, for all who publish, sweep, check, or remove.

An entry of such a folder is named by the id of its row: "models/mdl_…". Knows tables and keys.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.engine import Database
from app.db.tables import DatasetRow, JobRow, ModelRow, PredictionRow, UploadRow
from app.storage import LocalStorage, is_disk_full

FOLDERS: Mapping[type[Any], tuple[str, ...]] = {
    JobRow: ("jobs", "batches"),
    UploadRow: ("uploads",),
    PredictionRow: ("predictions",),
    ModelRow: ("models", "exports"),
    DatasetRow: ("datasets",),
}
TABLES: Mapping[str, type[Any]] = {folder: table for table, folders in FOLDERS.items() for folder in folders}


def has_row(database: Database, key: str) -> bool:
    """Whether the row is there that an entry of the storage belongs to. Raises KeyError for what belongs to none."""
    folder, _, row_id = key.partition("/")
    table = TABLES[folder]
    with database.read() as session:
        return session.scalar(select(table.seq).where(table.id == row_id)) is not None


def delete(database: Database, storage: LocalStorage, *keys: str, rows: Callable[[Session], None]) -> None:
    """Deletes rows, as `rows` does, and then their files. Should this process die between the two, a sweep comes to the
    files.

    keys: of rows that the caller has seen, and not as a client has written them. Raises what `rows` does.
    """
    with ExitStack() as announced:
        try:
            # Of all workspaces: a row that this one does not see keeps its files.
            announced.enter_context(storage.announced(*keys, is_wanted=partial(has_row, database.within(None))))
        except OSError as error:
            if not is_disk_full(error):
                raise
            # No room for that, and all the more reason to make some.
        database.free(rows)
    for key in keys:
        storage.delete(key)
