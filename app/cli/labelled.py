"""A few pictures of a folder, and what each of them is: by the folders that they lie in, or by a table beside them."""

import csv
import io
from pathlib import Path

import typer

LABELS_FILE = "labels.csv"
TASK = "label:"

Label = str | dict[str, str]  # a class, or classes by task


def labelled_pictures(folder: Path) -> list[tuple[Label, Path]]:
    """By name, or in the order of the table's rows. Raises typer.BadParameter for a folder that says too little."""
    return _by_table(folder) if (folder / LABELS_FILE).is_file() else _by_folders(folder)


def _by_folders(folder: Path) -> list[tuple[Label, Path]]:
    files = sorted(path for path in folder.glob("*/*") if path.is_file() and not path.name.startswith("."))
    if not files:
        raise typer.BadParameter(f"it has no folders with pictures in them, and no {LABELS_FILE}", param_hint="folder")
    return [(path.parent.name, path) for path in files]


def _by_table(folder: Path) -> list[tuple[Label, Path]]:
    try:
        text = (folder / LABELS_FILE).read_text("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text), restval="", strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise _unusable(f"cannot be read: {error}") from None
    if not rows:
        raise _unusable("has no rows")
    return [_labelled(folder, row) for row in rows]


def _labelled(folder: Path, row: dict[str, str]) -> tuple[Label, Path]:
    name = row.get("filename", "")
    if not (folder / name).is_file():
        raise _unusable(f"has a row for {name!r}, and its filename is no picture beside it")
    of_tasks = {key.removeprefix(TASK): said for key, said in row.items() if key and key.startswith(TASK) and said}
    label = of_tasks or row.get("label")
    if not label:
        raise _unusable(f"does not say what {name} is: it needs a column label, or label:<task> for each task")
    return label, folder / name


def _unusable(why: str) -> typer.BadParameter:
    return typer.BadParameter(f"its {LABELS_FILE} {why}", param_hint="folder")
