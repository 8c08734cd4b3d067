"""The manifest of a data set: its class names, and a line for each image. Written by ingest, read by training.

A text file of JSON lines: first what holds for all, then one image a line. Line i speaks of image i in the packed
pixels.
"""

import json
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 1

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
UNLABELLED = -1  # the label of an image of a data set without classes


@dataclass(frozen=True, slots=True)
class Record:
    """One image."""

    image_id: str  # "img_…": depends on the path alone, so a second ingest of the same archive gives the same
    path: str  # within the archive
    label: int  # index into the manifest's classes, or UNLABELLED
    split: Split
    digest: str  # SHA-256 of the encoded picture, hexadecimal
    width: int  # of the packed pixels
    height: int


@dataclass(frozen=True)
class Manifest:
    """All images of a data set, in the order of the packed pixels."""

    classes: Sequence[str]
    records: Sequence[Record]

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.array([record.label for record in self.records], dtype=np.int64)

    def indices(self, split: Split, *, exclude: AbstractSet[str] = frozenset()) -> NDArray[np.int64]:
        """Which images belong to a split, ascending. exclude: paths of images that are passed over."""
        found = (i for i, record in enumerate(self.records) if record.split == split and record.path not in exclude)
        return np.fromiter(found, dtype=np.int64)

    def counts(self, split: Split, *, exclude: AbstractSet[str] = frozenset()) -> NDArray[np.int64]:
        """Images of a split per class: (len(classes),)."""
        kept = self.indices(split, exclude=exclude)
        if not self.classes:
            return np.zeros(0, dtype=np.int64)
        return np.bincount(self.labels[kept], minlength=len(self.classes)).astype(np.int64)

    def write(self, path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            head = {"format_version": FORMAT_VERSION, "classes": list(self.classes), "images": len(self.records)}
            file.write(json.dumps(head, ensure_ascii=False) + "\n")
            for record in self.records:
                file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises ValueError for a manifest of another version, or one that is cut off."""
        with path.open(encoding="utf-8") as file:
            head = json.loads(file.readline())
            if head["format_version"] != FORMAT_VERSION:
                raise ValueError(f"manifest of version {head['format_version']}, not {FORMAT_VERSION}")
            records = [Record(**json.loads(line)) for line in file]
        if len(records) != head["images"]:
            raise ValueError(f"manifest with {len(records)} of {head['images']} images")
        return cls(head["classes"], records)
