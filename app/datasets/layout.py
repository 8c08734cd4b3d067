"""Names of files → which picture belongs to which class and split. Pure: knows names; not bytes, not storage.

Three layouts, each also under one wrapping folder: class folders, split folders with class folders, and pictures
beside a table (`labels.csv`, `metadata.csv`, `metadata.jsonl`). A table may tell several things of each picture, its
tasks: in columns `label:<task>`, or in JSON lines as an object `label`.
"""

import csv
import io
import itertools
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from app.datasets.archive import listed_path, shown
from app.datasets.manifest import Split, Task
from app.errors import ArchiveRefused
from app.names import folded, has_control_characters

MIN_CLASSES = 2
MIN_PICTURES_PER_CLASS = 2  # one to train on, one to validate on
MIN_UNLABELLED_PICTURES = 16  # of which a job makes one batch, the smallest that it may have
MAX_CLASS_NAME_CHARACTERS = 255
MAX_TASKS = 32
# What is made of a table takes up to a hundred times its bytes, so both are bounded. A row may hold outlines too.
MAX_TABLE_ROWS = 1_000_000
MAX_ROW_CHARACTERS = 1024**2
csv.field_size_limit(MAX_ROW_CHARACTERS)  # of the whole process; by itself it is 128 KiB, too little for outlines
TABLE_NAMES = ("labels.csv", "metadata.csv", "metadata.jsonl")

Kind = Literal["labelled", "unlabelled"]

_SPLIT_ALIASES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_JUNK_NAMES = {"__macosx", "thumbs.db", "desktop.ini", "icon\r"}


@dataclass(frozen=True, slots=True)
class File:
    """A file of the archive. why_not: why it is not a picture, None if it looks like one."""

    path: str
    why_not: str | None


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that belongs to a class. split: None where Graft is to choose.

    class_name: of several tasks, the first one's; "" where none is known. class_names: one for each of several tasks.
    """

    path: str
    class_name: str
    split: Split | None
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rejected:
    """A file that is left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Layout:
    """What an archive holds. classes: sorted by name; a class's place in it is its label.

    tasks: all of them where there are several, in the table's order, the first with `classes`; else empty.
    """

    classes: Sequence[str]
    pictures: Sequence[Picture]
    rejected: Sequence[Rejected]
    tasks: Sequence[Task] = ()

    @property
    def has_given_validation(self) -> bool:
        return any(picture.split == "val" for picture in self.pictures)


def is_junk(path: str) -> bool:
    """Whether a file or folder is what operating systems leave about: passed over in silence."""
    return any(part.startswith(".") or part.casefold() in _JUNK_NAMES for part in path.split("/"))


def is_table(path: str) -> bool:
    """Whether a file could be the table of a layout, so that its text is needed."""
    return path.rpartition("/")[2].casefold() in TABLE_NAMES and path.count("/") <= 2 and not is_junk(path)


def is_data(path: str) -> bool:
    """Whether a file is to be told of: a picture, or something that was taken for one."""
    return not is_junk(path) and not is_table(path)


def recognise(
    files: Iterable[File],
    *,
    folders: Iterable[str] = (),
    tables: Mapping[str, bytes] | None = None,
    kind: Kind = "labelled",
) -> Layout:
    """The layout of an archive, with paths as the archive has them. kind: unlabelled takes every picture, whatever
    folder it lies in, as one to train on, and knows no classes.

    folders: those that have an entry of their own. tables: content of each file that `is_table`, by path.
    Raises ArchiveRefused (no-usable-layout, too-few-classes, too-few-images, class-name-collision, no-training-images)
    with a detail that names the class and says what to do.
    """
    if kind == "unlabelled":
        return _without_labels([file for file in files if not is_junk(file.path)])
    tree = _Tree(
        files=[file for file in files if not is_junk(file.path)],
        folders=frozenset(folder for folder in folders if not is_junk(folder)),
        tables=tables or {},
    ).without_wrapping_folder()
    layout = _laid_out(tree)
    check(layout, layout.pictures)
    return layout


def _laid_out(tree: "_Tree") -> Layout:
    try:
        return _by_tables(tree) or _by_folders(tree)
    except _UnusableTables as unusable:
        return _laid_out_despite(tree, unusable.faults)


def _without_labels(files: Sequence[File]) -> Layout:
    pictures = [Picture(file.path, "", "train") for file in files if file.why_not is None]
    rejected = [Rejected(file.path, file.why_not) for file in files if file.why_not is not None]
    check_enough(len(pictures))
    return Layout([], pictures, rejected)


def check_enough(pictures: int) -> None:
    """Whether so many pictures without labels can be learnt from. Asked again when unreadable ones are left out."""
    if pictures < MIN_UNLABELLED_PICTURES:
        raise ArchiveRefused(
            f"The archive holds {pictures or 'no'} readable picture{'' if pictures == 1 else 's'}; to learn from "
            f"pictures without labels, {MIN_UNLABELLED_PICTURES} or more are needed.",
            code="too-few-images",
        )


def _laid_out_despite(tree: "_Tree", faults: Mapping[str, str]) -> Layout:
    """Tables of captions or boxes lie beside class folders too; only if nothing else says the classes, their fault is
    to be told. Folders called like splits do not say them: their pictures had their labels in the table."""
    others = {path: content for path, content in tree.tables.items() if path not in faults}
    told = ArchiveRefused(
        f"The archive's table cannot be used: {next(iter(faults.values()))}.", code="no-usable-layout"
    )
    try:
        layout = _laid_out(replace(tree, tables=others, root="").without_wrapping_folder())
        check(layout, layout.pictures)
    except ArchiveRefused:
        raise told from None
    if all(_split_of(name) for name in layout.classes):
        raise told
    unused = [Rejected(path, f"not used: {fault}") for path, fault in faults.items()]
    return replace(layout, rejected=[*layout.rejected, *unused])


def check(layout: Layout, pictures: Sequence[Picture]) -> None:
    """Whether these pictures can be trained on. Asked again when unreadable ones have been left out."""
    if not layout.tasks:
        _check_classes(layout.classes, pictures)
    for place, task in enumerate(layout.tasks):
        labelled = [replace(p, class_name=p.class_names[place]) for p in pictures if p.class_names[place]]
        try:
            _check_classes(task.classes, labelled)
        except ArchiveRefused as refusal:
            raise ArchiveRefused(f"Of the task {shown(task.name)}: {refusal.detail}", code=refusal.code) from None


def _check_classes(classes: Sequence[str], pictures: Sequence[Picture]) -> None:
    _check_names(classes)
    if len(classes) < MIN_CLASSES:
        found = f"only one, {shown(classes[0])}" if classes else "none"
        raise ArchiveRefused(
            f"A classifier needs at least {MIN_CLASSES} classes, and the archive holds {found}. Put the pictures of "
            "each class into a folder named like the class.",
            code="too-few-classes",
        )
    in_all = Counter(picture.class_name for picture in pictures)
    for name in classes:
        if in_all[name] < MIN_PICTURES_PER_CLASS:
            raise _too_few(name, in_all[name], "readable pictures")
    to_train_on = Counter(picture.class_name for picture in pictures if picture.split in {None, "train"})
    if not to_train_on:
        raise ArchiveRefused(
            "The archive has no pictures to train on: put some into train/<class>/.", code="no-training-images"
        )
    has_validation = any(picture.split == "val" for picture in pictures)
    for name in classes:
        if to_train_on[name] == 0:
            raise _too_few(name, 0, "pictures to train on")
        if not has_validation and to_train_on[name] < MIN_PICTURES_PER_CLASS:
            raise _too_few(name, to_train_on[name], "pictures for training and validation together")


def _too_few(class_name: str, count: int, what: str) -> ArchiveRefused:
    return ArchiveRefused(
        f"The class {shown(class_name)} has too few {what} ({count}): add some, or remove the class. "
        f"Each class needs at least {MIN_PICTURES_PER_CLASS}.",
        code="too-few-images",
    )


def _check_names(classes: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for name in classes:
        if len(name) > MAX_CLASS_NAME_CHARACTERS:
            raise ArchiveRefused(
                f"A class name is longer than {MAX_CLASS_NAME_CHARACTERS} characters.", code="class-name-too-long"
            )
        if (key := folded(name)) in seen:
            raise ArchiveRefused(
                f"The classes {shown(seen[key])} and {shown(name)} differ only in case, accents' encoding or "
                "trailing blanks and dots; give them one name, or two that differ.",
                code="class-name-collision",
            )
        seen[key] = name


# The tree ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tree:
    """The files of an archive, seen from `root`: "", or the wrapping folder with a slash."""

    files: Sequence[File]
    folders: frozenset[str]
    tables: Mapping[str, bytes]
    root: str = ""

    def parts(self, path: str) -> list[str] | None:
        """The path's parts below the root; None for a path outside."""
        return path[len(self.root) :].split("/") if path.startswith(self.root) else None

    @cached_property
    def by_path(self) -> Mapping[str, File]:
        return {file.path: file for file in self.files}

    @cached_property
    def top_folders(self) -> frozenset[str]:
        """Names of the folders at the top, empty ones included."""
        above_files = {parts[0] for file in self.files if (parts := self.parts(file.path)) and len(parts) > 1}
        with_entry = {parts[0] for folder in self.folders if (parts := self.parts(folder))}
        return frozenset(above_files | with_entry - {""})

    @cached_property
    def has_split_folders(self) -> bool:
        """Whether there are folders named like splits, with class folders in them.

        A class may be called "train" too: then pictures lie directly in it, or it is one of several other classes.
        """
        splits = {name for name in self.top_folders if _split_of(name)}
        if len(splits) == 1 and len(self._holding_pictures(depth=0) - splits) > 1:
            return False
        named = splits & self._holding_pictures(depth=1)
        return any(_split_of(name) == "train" for name in named) or (bool(named) and named == self.top_folders)

    def without_wrapping_folder(self) -> "_Tree":
        """Enters a single top folder, unless it is a split: as a class it would be the only one."""
        if len(self.top_folders) != 1 or any("/" not in path for path in self.tables):
            return self
        (top,) = self.top_folders
        holds_table = any(path.count("/") == 1 for path in self.tables)
        is_wrapping = top in self._holding_pictures(depth=1) and not _split_of(top)
        return replace(self, root=f"{top}/") if is_wrapping or holds_table else self

    def _holding_pictures(self, *, depth: int) -> set[str]:
        """Names of the top folders with a picture in them, so many folders below or more."""
        of_pictures = (self.parts(file.path) for file in self.files if file.why_not is None)
        return {parts[0] for parts in of_pictures if parts and len(parts) > depth + 1}


def _split_of(folder: str) -> Split | None:
    return _SPLIT_ALIASES.get(folder.casefold())


# Folders -------------------------------------------------------------------------------------------------------------


def _by_folders(tree: _Tree) -> Layout:
    """Class folders, within split folders where there are some."""
    depth = 1 if tree.has_split_folders else 0  # of the class's name in the path
    classes: set[str] = set()
    pictures: list[Picture] = []
    rejected: list[Rejected] = []
    for folder in tree.folders:
        parts = tree.parts(folder)
        if parts and len(parts) > depth and parts[depth] and (depth == 0 or _split_of(parts[0])):
            classes.add(parts[depth])
    for file in tree.files:
        parts = tree.parts(file.path)
        is_placed = parts is not None and len(parts) > depth + 1 and (depth == 0 or _split_of(parts[0]) is not None)
        if parts is not None and is_placed:
            classes.add(parts[depth])
        if file.why_not is not None:
            rejected.append(Rejected(file.path, file.why_not))
        elif parts is None or not is_placed:
            rejected.append(Rejected(file.path, "not in a class folder"))
        else:
            pictures.append(Picture(file.path, parts[depth], _split_of(parts[0]) if depth else None))
    if not pictures:
        raise ArchiveRefused(f"{_what_lacks(tree)} {_WHAT_TO_SEND}", code="no-usable-layout")
    rejected += [Rejected(path, "not a picture") for path in tree.tables]
    return Layout(sorted(classes), pictures, rejected)


_WHAT_TO_SEND = (
    "Put the pictures of each class into a folder named like the class (with train/ and val/ above, if they are "
    "split already), or beside a labels.csv with the columns filename and label."
)


def _what_lacks(tree: _Tree) -> str:
    if any(file.why_not is None for file in tree.files):
        return (
            "The archive's pictures do not say which class they belong to; if they are to have none, for "
            "self-supervised pretraining, upload it with kind=unlabelled."
        )
    return "The archive holds no pictures that can be read."


# Tables --------------------------------------------------------------------------------------------------------------


class _UnusableTable(Exception):
    """Why a table cannot say which picture belongs to which class."""


class _ForeignTable(_UnusableTable):
    """A table that can be read, and labels no picture of the archive."""


class _UnusableTables(Exception):
    """The tables where they count cannot be used. faults: why not, by path."""

    def __init__(self, faults: Mapping[str, str]) -> None:
        super().__init__(faults)
        self.faults = faults


@dataclass(frozen=True, slots=True)
class _Place:
    """A folder where tables count: at the top, or of a split. tables: in the order in which they are tried."""

    above: str
    split: Split | None
    tables: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of a table: its text as it stands there, None for a column that is not there or a value that is empty.

    labels: by task; the only one's name is "".
    """

    path: str | None
    labels: Mapping[str, str | None]
    split: str | None
    has_split_column: bool


def _by_tables(tree: _Tree) -> Layout | None:
    """The layout by the tables at the top or in split folders, in each folder the first that labels a picture; None
    without tables or pictures. Raises _UnusableTables."""
    places, survey = _places(tree), _Survey(tree)
    if not places or not survey.has_pictures:
        return None
    used: dict[str, _Place] = {}
    faults: dict[str, _UnusableTable] = {}
    tasks: dict[str, None] = {}
    for place in places:
        for table in place.tables:
            try:
                tasks.update(dict.fromkeys(survey.tasks(table, above=place.above)))
            except _UnusableTable as fault:
                faults[table] = fault
            else:
                used[table] = place
                break
        # A slip in the table of a split must not cost the whole split.
        if place.split and not any(table in used or isinstance(faults[table], _ForeignTable) for table in place.tables):
            raise _unusable(places, faults)
    if not used:
        raise _unusable(places, faults)
    try:
        _check_tasks(tasks)
    except _UnusableTable as fault:
        raise _unusable(places, dict.fromkeys(used, fault)) from None
    labelling = _Labelling(tree, list(tasks))
    for table, place in used.items():
        for row in _rows(table, tree.tables[table]):
            labelling.add(row, above=place.above, folder_split=place.split)
    return labelling.layout(tables=used.keys(), unused={table: f"not used: {fault}" for table, fault in faults.items()})


def _unusable(places: Iterable[_Place], faults: Mapping[str, _UnusableTable]) -> _UnusableTables:
    """All tables of these places, those that have no fault of their own by the first one's that has."""
    first = next(iter(faults.values()))
    ordered = [*faults, *(table for place in places for table in place.tables if table not in faults)]
    return _UnusableTables({table: str(faults.get(table, first)) for table in ordered})


def _places(tree: _Tree) -> list[_Place]:
    """Those that hold tables, the top first."""
    here: dict[str, list[str]] = defaultdict(list)
    for path in sorted(tree.tables, key=lambda path: (TABLE_NAMES.index(path.rpartition("/")[2].casefold()), path)):
        here[path.rpartition("/")[0]].append(path)
    folders = {"": None, **{f"{name}/": _split_of(name) for name in sorted(tree.top_folders) if _split_of(name)}}
    found = [(tree.root + folder, split) for folder, split in folders.items()]
    return [_Place(above, split, here[above[:-1]]) for above, split in found if above[:-1] in here]


class _Survey:
    """Reads tables before their rows are used, since all rows at once take ten times what is made of them."""

    def __init__(self, tree: _Tree) -> None:
        self._tables = tree.tables
        self._files = tree.by_path
        self._example = next((file.path for file in tree.files if file.why_not is None), None)
        self._rows = 0  # of all tables together

    @property
    def has_pictures(self) -> bool:
        return self._example is not None

    def tasks(self, table: str, *, above: str) -> Iterable[str]:
        """In the order in which they are first named.

        Raises _UnusableTable, also for more rows than are read, and _ForeignTable.
        """
        found: dict[str, None] = {}
        labelled = 0
        first: str | None = None
        is_of_pictures = False
        for row in _rows(table, self._tables[table]):
            found.update(dict.fromkeys(row.labels))
            self._rows += 1
            if len(found) > MAX_TASKS:
                raise _UnusableTable(f"it names more tasks, and {MAX_TASKS} are the most")
            if self._rows > MAX_TABLE_ROWS:
                raise _UnusableTable(f"it has more than {MAX_TABLE_ROWS} rows")
            if row.path is not None and any(row.labels.values()):
                labelled += 1
                first = first or row.path
                file = self._files.get(_meant(row.path, above=above, files=self._files))
                is_of_pictures = is_of_pictures or (file is not None and file.why_not is None)
        _check_tasks(found)
        if first is None:
            raise _ForeignTable(f"{shown(table)} has no row with a file's name and a label")
        if not is_of_pictures:
            raise _ForeignTable(
                f"{shown(table)} is of other files: none of its {labelled} rows names a picture of the archive, "
                f"such as {shown(self._example or '')}; the first names {shown(first)}"
            )
        return found


def _check_tasks(names: Iterable[str]) -> None:
    """Raises _UnusableTable."""
    names = list(names)
    if "" in names and len(names) > 1:
        raise _UnusableTable("it gives one label to some pictures, and labels of several tasks to others")
    for name in names:
        if has_control_characters(name) or len(name) > MAX_CLASS_NAME_CHARACTERS:
            raise _UnusableTable("a task's name is too long or has control characters")


def _meant(path: str, *, above: str, files: Mapping[str, File]) -> str:
    """Where the file lies that a table in the folder `above` names: below it, or as the whole archive has its path."""
    path = _plain(path)
    return path if path.startswith(above) and path in files and above + path not in files else above + path


class _Labelling:
    """Collects what tables say about the files that are there. tasks: their names; of one alone it does not matter."""

    def __init__(self, tree: _Tree, tasks: Sequence[str]) -> None:
        self._tree = tree
        self._tasks = tasks
        self._files = tree.by_path
        self._classes: list[set[str]] = [set() for _ in tasks]
        self._pictures: dict[str, Picture] = {}
        self._rejected: dict[str, Rejected] = {}

    def add(self, row: _Row, *, above: str, folder_split: Split | None) -> None:
        if row.path is None:
            return
        path = _meant(row.path, above=above, files=self._files)
        try:
            names = self._class_names(row)
            if path in self._rejected:
                return
            picture = self._picture(row, path, names, folder_split)
            self._check(picture)
        except _UnusableRow as reason:
            self._rejected.setdefault(path, Rejected(listed_path(path), str(reason)))
            self._pictures.pop(path, None)
        else:
            self._pictures[path] = picture

    def layout(self, *, tables: Set[str], unused: Mapping[str, str]) -> Layout:
        """tables: those that were added. unused: why others where they count were not, by path."""
        pictures = list(self._pictures.values())
        if any(picture.split for picture in pictures):
            pictures = [replace(picture, split=picture.split or "train") for picture in pictures]
        known = self._pictures.keys() | self._rejected.keys() | tables
        unnamed = [
            Rejected(file.path, file.why_not or "not listed in the table")
            for file in self._tree.files
            if file.path not in known
        ]
        others = [
            Rejected(path, unused.get(path, "another table says the labels"))
            for path in self._tree.tables
            if path not in known
        ]
        rejected = [*self._rejected.values(), *unnamed, *others]
        tasks = [Task(name, sorted(found - {""})) for name, found in zip(self._tasks, self._classes, strict=True)]
        return Layout(tasks[0].classes, pictures, rejected, tasks if len(tasks) > 1 else ())

    def _class_names(self, row: _Row) -> tuple[str, ...]:
        """For each task, "" for none. They are classes, whether or not the row names a picture that can be used: one
        without any is to be refused, not to vanish."""
        names = tuple(self._class_name(row.labels.get(task)) for task in self._tasks)
        for found, name in zip(self._classes, names, strict=True):
            found.add(name)
        return names

    def _picture(self, row: _Row, path: str, names: tuple[str, ...], folder_split: Split | None) -> Picture:
        if not any(names):
            raise _UnusableRow("the table gives it no label")
        return Picture(path, names[0], self._split(row, path, folder_split), names if len(names) > 1 else ())

    @staticmethod
    def _class_name(label: str | None) -> str:
        if label is None:
            return ""
        if has_control_characters(label):
            raise _UnusableRow("its label has control characters")
        return unicodedata.normalize("NFC", label)

    def _split(self, row: _Row, path: str, folder_split: Split | None) -> Split | None:
        if not row.has_split_column:
            parts = self._tree.parts(path) or [path]
            return folder_split or (_split_of(parts[0]) if len(parts) > 1 else None)
        if row.split is None:
            return "train"
        split = _split_of(row.split)
        if split is None:
            raise _UnusableRow(f"the table gives it an unknown split, {shown(row.split)}")
        return split

    def _check(self, picture: Picture) -> None:
        file = self._files.get(picture.path)
        if file is None:
            raise _UnusableRow("in the table, but not in the archive")
        if file.why_not is not None:
            raise _UnusableRow(file.why_not)
        if self._pictures.get(picture.path, picture) != picture:
            raise _UnusableRow("twice in the table, with different labels or splits")


class _UnusableRow(Exception):
    """Why a row of a table names no usable picture."""


def _plain(path: str) -> str:
    parts = unicodedata.normalize("NFC", path).replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in {"", "."})


def _rows(table: str, content: bytes) -> Iterator[_Row]:
    is_jsonl = table.casefold().endswith(".jsonl")
    lines = _Lines(table, content, newline="\n" if is_jsonl else "")
    try:
        yield from _jsonl_rows(table, lines) if is_jsonl else _csv_rows(table, lines)
    except UnicodeDecodeError:
        raise _UnusableTable(f"{shown(table)} is not UTF-8 text") from None


class _Lines:
    """A table's lines, decoded one by one. Raises UnicodeDecodeError, and _UnusableTable for a row that is too long."""

    def __init__(self, table: str, content: bytes, *, newline: str) -> None:
        self._table = table
        self._text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline=newline)
        self._left = MAX_ROW_CHARACTERS

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._text.readline(self._left + 1)
        self._left -= len(line)
        if self._left < 0:
            raise _UnusableTable(f"a row of {shown(self._table)} is longer than {MAX_ROW_CHARACTERS} characters")
        if not line:
            raise StopIteration
        return line

    def end_row(self) -> None:
        """A row may have several lines, where its values hold line breaks."""
        self._left = MAX_ROW_CHARACTERS


def _csv_rows(table: str, lines: _Lines) -> Iterator[_Row]:
    first_line = next(lines, "")
    delimiter = max(",;\t", key=first_line.count)  # the first of equals: a comma
    rows = csv.reader(itertools.chain([first_line], lines), delimiter=delimiter)
    try:
        header = [name.strip().casefold() for name in next(rows, [])]
        path_at = next((header.index(name) for name in ("filename", "file_name") if name in header), None)
        label_at = _label_columns(header)
        if path_at is None or not label_at:
            raise _UnusableTable(f'{shown(table)} does not begin with a line that names "filename" and "label"')
        split_at = header.index("split") if "split" in header else None
        lines.end_row()
        for cells in rows:
            split = _cell(cells, split_at) if split_at is not None else None
            labels = {task: _cell(cells, place) for task, place in label_at.items()}
            yield _Row(_cell(cells, path_at), labels, split, split_at is not None)
            lines.end_row()
    except csv.Error as error:
        raise _UnusableTable(f"line {rows.line_num} of {shown(table)} is no CSV") from error


def _cell(cells: Sequence[str], place: int) -> str | None:
    """None for one that is empty, and in a row that ends before it."""
    return (cells[place].strip() or None) if place < len(cells) else None


def _jsonl_rows(table: str, lines: _Lines) -> Iterator[_Row]:
    for number, line in enumerate(lines, start=1):
        lines.end_row()
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise _UnusableTable(f"line {number} of {shown(table)} is no JSON") from None
        if not isinstance(row, dict) or "label" not in row or not {"file_name", "filename"} & row.keys():
            raise _UnusableTable(f'line {number} of {shown(table)} has no "file_name" and "label"')
        path = _text(row.get("file_name", row.get("filename")))
        labels = row["label"] if isinstance(row["label"], dict) else {"": row["label"]}
        named = {name.strip().casefold(): _text(label) for name, label in labels.items()}
        split = (_text(row.get("split")) or "").strip() or None
        yield _Row(path, named, split, "split" in row)


def _label_columns(header: Sequence[str]) -> dict[str, int]:
    """Places of the columns `label` (task "") and `label:<task>`; of equal names the first."""
    found: dict[str, int] = {}
    for place, name in enumerate(header):
        start, colon, task = (part.strip() for part in name.partition(":"))
        if start == "label" and bool(colon) == bool(task):
            found.setdefault(task, place)
    return found


def _text(value: object) -> str | None:
    """A JSON value as a name: text and whole numbers only. Blanks around it count, as in the name of a folder."""
    return str(value) or None if isinstance(value, str | int) else None
