"""What a batch leaves behind: parts while it runs, and the two files that its caller gets at the end.

Each run writes parts below its own fence, and begins where the parts of those before it end. Knows rows; not models.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.storage import LocalStorage

Row = Mapping[str, Any]

JSONL_NAME, CSV_NAME = "results.jsonl", "results.csv"

# What spreadsheets take for the beginning of a formula (OWASP, "CSV Injection"), the wide forms included.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")


@dataclass(frozen=True, order=True)
class Part:
    """Rows `start` to `end` of a batch, of which so many say an error."""

    start: int
    end: int
    rejected: int
    path: Path

    @classmethod
    def of(cls, path: Path) -> "Part":
        start, end, rejected = map(int, path.stem.split("-"))
        return cls(start, end, rejected, path)


class Parts:
    """The rows of one batch that are on disk, without a gap from the first; added to by the run that holds `fence`."""

    def __init__(self, storage: LocalStorage, *, job_id: str, fence: int) -> None:
        self._storage = storage
        self._key = f"jobs/{job_id}"
        self._fence = fence
        self.parts = self._found()

    @property
    def rows(self) -> int:
        return self.parts[-1].end if self.parts else 0

    @property
    def rejected(self) -> int:
        return sum(part.rejected for part in self.parts)

    def add(self, rows: Sequence[Row]) -> None:
        """Publishes the next rows, durably. Raises StorageFull."""
        self._storage.check_room()
        start, end, rejected = self.rows, self.rows + len(rows), sum("error" in row for row in rows)
        key = f"{self._key}/{self._fence}/{start}-{end}-{rejected}.jsonl"
        with self._storage.staging() as staged:
            staged.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
            self._storage.publish(staged, key)
        self.parts.append(Part.of(self._storage.path(key)))

    def _found(self) -> list[Part]:
        """Parts of this run and of those before it, each beginning where another ends; of several the longest."""
        root = self._storage.path(self._key)
        folders = [path for path in root.glob("*") if path.name.isdecimal() and int(path.name) <= self._fence]
        by_start: dict[int, Part] = {}
        for part in sorted(Part.of(path) for folder in folders for path in folder.glob("*.jsonl")):
            by_start[part.start] = part
        chain: list[Part] = []
        while (part_ahead := by_start.get(chain[-1].end if chain else 0)) is not None:
            chain.append(part_ahead)
        return chain


def write_results(folder: Path, parts: Sequence[Part], *, tasks: Sequence[str]) -> None:
    """All rows as JSON lines, and as a table for spreadsheets. tasks: names of several."""
    folder.mkdir()
    with (
        (folder / JSONL_NAME).open("w", encoding="utf-8") as lines,
        (folder / CSV_NAME).open("w", encoding="utf-8", newline="") as table,
    ):
        columns = [
            "path",
            "label",
            "score",
            "error",
            *(f"{what}:{task}" for task in tasks for what in ("label", "score")),
        ]
        csv.writer(table).writerow(map(_not_a_formula, columns))
        # Texts in quotes, whatever is in them: some spreadsheets divide at semicolons.
        writer = csv.writer(table, quoting=csv.QUOTE_NONNUMERIC)
        for line in _lines(parts):
            lines.write(line)
            writer.writerow([_not_a_formula(cell) for cell in _cells(json.loads(line), tasks)])


def _lines(parts: Sequence[Part]) -> Iterator[str]:
    for part in parts:
        with part.path.open(encoding="utf-8", newline="\n") as file:
            yield from file


def _cells(row: Row, tasks: Sequence[str]) -> list[Any]:
    of_tasks = row.get("tasks", {})
    told = [of_tasks.get(task, {}).get(what, "") for task in tasks for what in ("label", "score")]
    return [row["path"], row.get("label", ""), row.get("score", ""), row.get("error", {}).get("detail", ""), *told]


def _not_a_formula(cell: Any) -> Any:
    """With an apostrophe before what a spreadsheet would calculate; results.jsonl has every text as it is."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA_STARTS) else cell
