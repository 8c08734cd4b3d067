"""Which rows have files, and in which folders of the storage: said once, for all who publish, sweep, check, or remove.

An entry of such a folder is named by the id of its row: "models/mdl_…". Knows tables and keys.
"""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select

from app.db.engine import Database
from app.db.tables import DatasetRow, JobRow, ModelRow, PredictionRow, UploadRow

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
