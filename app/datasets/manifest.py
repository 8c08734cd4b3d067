"""The manifest of a data set: its class names, and a line for each image. Written by ingest, read by training.

A text file of JSON lines: first what holds for all, then one image a line. Line i speaks of image i in the packed
pixels.
"""

import hashlib
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
class Task:
    """One of several things that are told of each image, such as its colour. classes: a class's place is its label."""

    name: str
    classes: Sequence[str]


def digest_of(encoded: bytes) -> str:
    """By which a picture is known again: SHA-256 of it as it is encoded, hexadecimal."""
    return hashlib.sha256(encoded).hexdigest()


@dataclass(frozen=True, slots=True)
class Record:
    """One image."""

    image_id: str  # "img_…": depends on the path alone, so a second ingest of the same archive gives the same
    path: str  # within the archive
    label: int  # index into the manifest's classes, or UNLABELLED; of several tasks, the first one's
    split: Split
    digest: str  # as digest_of has it
    width: int  # of the packed pixels
    height: int
    labels: Sequence[int] = ()  # one for each of the manifest's tasks, each an index into its classes, or UNLABELLED


@dataclass(frozen=True)
class Manifest:
    """All images of a data set, in the order of the packed pixels.

    tasks: all of them where there are several, the first with `classes`; else empty, `classes` being the only one's.
    """

    classes: Sequence[str]
    records: Sequence[Record]
    tasks: Sequence[Task] = ()

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,): of the only task, or of the first one."""
        return np.array([record.label for record in self.records], dtype=np.int64)

    @property
    def targets(self) -> NDArray[np.int64]:
        """What is learnt: (N,) labels, or (N, T) of several tasks."""
        return np.array([record.labels for record in self.records], dtype=np.int64) if self.tasks else self.labels

    @property
    def each_task(self) -> Sequence[Task]:
        """All tasks; the only one is called ""."""
        return self.tasks or [Task("", self.classes)]

    @property
    def class_counts(self) -> tuple[int, ...]:
        """How many classes each task has."""
        return tuple(len(task.classes) for task in self.each_task)

    def indices(self, split: Split, *, exclude: AbstractSet[str] = frozenset()) -> NDArray[np.int64]:
        """Which images belong to a split, ascending. exclude: paths of images that are passed over."""
        found = (i for i, record in enumerate(self.records) if record.split == split and record.path not in exclude)
        return np.fromiter(found, dtype=np.int64)

    def counts(self, split: Split, *, exclude: AbstractSet[str] = frozenset(), task: int = 0) -> NDArray[np.int64]:
        """Images of a split per class of a task: (classes,)."""
        targets = self.targets[self.indices(split, exclude=exclude)]
        labels = targets if targets.ndim == 1 else targets[:, task]
        counts = np.bincount(labels[labels != UNLABELLED], minlength=self.class_counts[task])
        return counts[: self.class_counts[task]].astype(np.int64)

    def write(self, path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            head = {"format_version": FORMAT_VERSION, "classes": list(self.classes), "images": len(self.records)}
            if self.tasks:
                head["tasks"] = [{"name": task.name, "classes": list(task.classes)} for task in self.tasks]
            file.write(json.dumps(head, ensure_ascii=False) + "\n")
            for record in self.records:
                members = {name: value for name, value in asdict(record).items() if name != "labels" or value}
                file.write(json.dumps(members, ensure_ascii=False) + "\n")

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
        return cls(head["classes"], records, [Task(**task) for task in head.get("tasks", [])])
