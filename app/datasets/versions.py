"""A data set with more pictures → an archive, for ingest to read as any other.

What was there keeps its path, its class and its split, so that what validated the version before validates this one;
what comes in is to train on. A table in the archive says so. Knows files; not predictions, not the database.
"""

import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from app.datasets import archive as archives
from app.datasets.archive import ArchiveLimits
from app.datasets.layout import MIN_PICTURES_PER_CLASS
from app.datasets.manifest import UNLABELLED, Manifest, Record
from app.names import folded

TABLE = "metadata.jsonl"
FOLDER = "feedback"


@dataclass(frozen=True)
class Addition:
    """A picture that comes in. name: its file's, in the archive. labels: by task; the only task's name is ""."""

    name: str
    picture: Path
    sha256: str
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Chosen:
    """Which additions come in; lonely: classes that nobody knows yet and that too few pictures are of."""

    additions: Sequence[Addition]
    lonely: Sequence[str]


def choose(manifest: Manifest, additions: Sequence[Addition]) -> Chosen:
    """Those that the data set does not hold yet, each picture once, for each task with its last label; without classes
    too small to train. additions: in the order in which their labels were said.

    A picture that is there already stays what it is: one of validation must not be trained on.
    """
    here = {record.digest for record in manifest.records}
    tasks = {task.name: frozenset(task.classes) for task in manifest.each_task}
    # Two people may have spelt a new class in two ways, which no data set can hold beside each other: the last one's.
    spelt = {(task, folded(label)): label for each in additions for task, label in each.labels.items()}
    spelt |= {(task, folded(name)): name for task, names in tasks.items() for name in names}
    found: dict[str, Addition] = {}
    for each in additions:
        if each.sha256 not in here:
            said_before = found[each.sha256].labels if each.sha256 in found else {}
            said = {task: spelt[task, folded(label)] for task, label in each.labels.items()}
            found[each.sha256] = replace(each, labels={**said_before, **said})
    counts = Counter(pair for each in found.values() for pair in each.labels.items())
    lonely = {
        (task, label)
        for (task, label), count in counts.items()
        if task in tasks and label not in tasks[task] and count < MIN_PICTURES_PER_CLASS
    }
    chosen = []
    for each in found.values():
        labels = {task: label for task, label in each.labels.items() if task in tasks and (task, label) not in lonely}
        if labels:
            chosen.append(replace(each, labels=labels))
    return Chosen(chosen, sorted({label for _, label in lonely}))


def write_version(
    target: Path,
    archive: Path,
    manifest: Manifest,
    additions: Sequence[Addition],
    *,
    limits: ArchiveLimits,
    tick: Callable[[float], None],
) -> None:
    """Writes a zip of the archive's pictures that the manifest names, the additions, and the table of both.

    tick: called for each file with the share of the archive read; may raise to stop. Raises FileNotFoundError for an
    archive or an addition that was deleted meanwhile.
    """
    records = {record.path: record for record in manifest.records}
    folder = _unused(FOLDER, records)
    size_bytes = max(archive.stat().st_size, 1)
    # Pictures are compressed already: storing them is faster and as small.
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, strict_timestamps=False) as packed:
        rows: list[dict[str, Any]] = []
        for member, content in archives.iterate(archive, limits=limits):
            tick(min(member.position / size_bytes, 1.0))
            record = records.get(member.path)
            if record is not None:
                packed.writestr(record.path, content)
                label = _label(_named(record, manifest))
                rows.append({"file_name": record.path, "split": record.split, "label": label})
        for each in additions:
            path = f"{folder}/{each.name}"
            packed.write(each.picture, path)
            rows.append({"file_name": path, "split": "train", "label": _label(each.labels)})
        packed.writestr(TABLE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _named(record: Record, manifest: Manifest) -> dict[str, str | None]:
    """Labels by task, None for those that are not known: tasks keep the order in which a table first names them."""
    pairs = zip(manifest.each_task, record.labels or [record.label], strict=True)
    return {task.name: None if label == UNLABELLED else task.classes[label] for task, label in pairs}


def _label(labels: Mapping[str, str | None]) -> str | dict[str, str | None] | None:
    return labels[""] if "" in labels else dict(labels)


def _unused(folder: str, records: Mapping[str, Record]) -> str:
    tops = {PurePosixPath(path).parts[0] for path in records}
    return next(name for name in _names(folder) if name not in tops)


def _names(folder: str) -> Iterator[str]:
    yield folder
    yield from (f"{folder}-{number}" for number in range(2, 1_000_000_000))
