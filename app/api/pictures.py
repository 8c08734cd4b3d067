"""The images of a data set, for looking at: a few manifests and packed stores kept open, so that a page of thumbnails
does not read a million lines fifty times. Knows the storage's data sets; not HTTP.
"""

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from app.datasets.ingest import PACKED_SIDE, manifest_key, packed_key
from app.datasets.manifest import UNLABELLED, Manifest, Record, Split
from app.datasets.packed import PackedPixels
from app.errors import NotFound
from app.storage import LocalStorage
from app.vision.images import encode_thumbnail

# A manifest of a million images takes some 400 MB of memory; people look at one or two data sets at a time.
OPEN_DATASETS = 4


@dataclass(frozen=True)
class _Opened:
    manifest: Manifest
    index_of: dict[str, int]  # image id → index
    pixels: PackedPixels


class Pictures:
    """Records and thumbnails of ready data sets; safe to use from many threads."""

    def __init__(self, storage: LocalStorage) -> None:
        self._storage = storage
        self._lock = threading.Lock()
        self._opened: OrderedDict[str, _Opened] = OrderedDict()  # least recently used first

    def page(
        self, dataset_id: str, *, class_name: str | None, split: Split | None, limit: int, after: str | None
    ) -> tuple[list[tuple[Record, str | None]], bool]:
        """Up to `limit` (record, class name or None) in the manifest's order, and whether there are more.

        Raises NotFound for a class or an `after` that the data set does not have, and for missing files.
        """
        opened = self._open(dataset_id)
        classes = opened.manifest.classes
        if class_name is not None and class_name not in classes:
            raise NotFound("The data set has no class of this name; its `classes` lists them.")
        start = 0 if after is None else self._index(opened, after) + 1
        matching = self._matching(opened, start, class_name=class_name, split=split)
        found = [record for record, _ in zip(matching, range(limit + 1), strict=False)]
        names = [None if record.label == UNLABELLED else classes[record.label] for record in found[:limit]]
        return list(zip(found, names, strict=False)), len(found) > limit

    def samples(self, dataset_id: str, *, per_class: int) -> dict[str, list[Record]]:
        """The first training pictures of each class, or of any split where it has none. Raises NotFound."""
        manifest = self._open(dataset_id).manifest
        found: dict[str, list[Record]] = {name: [] for name in manifest.classes}
        others: dict[str, list[Record]] = {name: [] for name in manifest.classes}
        unfilled = len(found) * per_class
        for record in manifest.records:
            if record.label == UNLABELLED:
                continue
            kept = (found if record.split == "train" else others)[manifest.classes[record.label]]
            if len(kept) < per_class:
                kept.append(record)
                unfilled -= record.split == "train"
            if not unfilled:
                break
        return {name: (records + others[name])[:per_class] for name, records in found.items()}

    def at_paths(self, dataset_id: str, paths: Collection[str]) -> dict[str, tuple[Record, str | None]]:
        """Path → (record, class name or None) of those that the data set has. Raises NotFound."""
        manifest, wanted = self._open(dataset_id).manifest, frozenset(paths)
        return {
            record.path: (record, None if record.label == UNLABELLED else manifest.classes[record.label])
            for record in manifest.records
            if record.path in wanted
        }

    def thumbnail(self, dataset_id: str, image_id: str) -> bytes:
        """A JPEG made anew from pixels: nothing of the uploaded file is in it. Raises NotFound."""
        opened = self._open(dataset_id)
        return encode_thumbnail(opened.pixels[self._index(opened, image_id)])

    def forget(self, dataset_id: str) -> None:
        """Closes a deleted data set."""
        with self._lock:
            self._opened.pop(dataset_id, None)

    def _open(self, dataset_id: str) -> _Opened:
        with self._lock:
            opened = self._opened.get(dataset_id)
            if opened is None:
                opened = self._read(dataset_id)
                self._opened[dataset_id] = opened
                if len(self._opened) > OPEN_DATASETS:
                    self._opened.popitem(last=False)
            self._opened.move_to_end(dataset_id)
            return opened

    def _read(self, dataset_id: str) -> _Opened:
        try:
            manifest = Manifest.read(self._storage.path(manifest_key(dataset_id)))
            pixels = PackedPixels(self._storage.path(packed_key(dataset_id, PACKED_SIDE)))
        except (OSError, ValueError) as error:  # deleted a moment ago, or damaged
            raise NotFound(
                "The data set's files are missing or damaged; delete it and upload it again.", code="dataset-unreadable"
            ) from error
        index_of = {record.image_id: index for index, record in enumerate(manifest.records)}
        return _Opened(manifest, index_of, pixels)

    @staticmethod
    def _matching(opened: _Opened, start: int, *, class_name: str | None, split: Split | None) -> Iterator[Record]:
        records = opened.manifest.records
        label = None if class_name is None else list(opened.manifest.classes).index(class_name)
        for index in range(start, len(records)):
            record = records[index]
            if split in (None, record.split) and label in (None, record.label):
                yield record

    @staticmethod
    def _index(opened: _Opened, image_id: str) -> int:
        index = opened.index_of.get(image_id)
        if index is None:
            raise NotFound("The data set has no image with this id.")
        return index
