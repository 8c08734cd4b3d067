"""What a model, and those that its training began with, were trained on: pictures that say little about it."""

from dataclasses import dataclass

from app import registry
from app.datasets.ingest import manifest_key
from app.datasets.manifest import Manifest
from app.db.engine import Database
from app.errors import NotFound
from app.storage import LocalStorage


@dataclass(frozen=True)
class Seen:
    """Digests of the pictures that were trained on. is_complete: all are known, since no data set of them is gone."""

    digests: frozenset[str]
    is_complete: bool


def trained_on(*dataset_ids: str, start: str | None, database: Database, storage: LocalStorage) -> Seen:
    """By a training on these data sets that began with the model `start`, if any, and by those before it."""
    datasets, is_complete = set(dataset_ids), True
    with database.read() as session:
        while start is not None:
            try:
                row = registry.find(session, start)
            except NotFound:
                is_complete = False
                break
            datasets.add(row.dataset_id)
            start = row.backbone.get("model")
    digests: set[str] = set()
    for one in datasets:
        try:
            manifest = Manifest.read(storage.path(manifest_key(one)))
        except (OSError, ValueError, KeyError, TypeError):
            is_complete = False
            continue
        digests.update(record.digest for record in manifest.records if record.split == "train")
    return Seen(frozenset(digests), is_complete)
