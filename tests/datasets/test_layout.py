"""Each layout of the contract, also under a wrapping folder; what is left out is listed, what cannot be is refused."""

import json
import tracemalloc
from collections.abc import Sequence

import pytest

from app.datasets.layout import File, Layout, Picture, recognise
from app.errors import ArchiveRefused
from app.settings import MEBIBYTE

NO_PICTURE = "not a picture: JPEG, PNG and WebP are read"


def found(*paths: str, folders: Sequence[str] = (), root: str = "", **tables: str) -> Layout:
    """The layout of an archive of these files; those whose name ends in .txt are no pictures.

    tables: content by name, with "__" for "." and "_in_" for "/" before it.
    """
    named = {root + _table_path(name): text.encode() for name, text in tables.items()}
    files = [File(root + path, NO_PICTURE if path.endswith(".txt") else None) for path in paths]
    return recognise(files, folders=[root + folder for folder in folders], tables=named)


def _table_path(name: str) -> str:
    name, _, folder = name.partition("_in_")
    return f"{folder}/" * bool(folder) + name.replace("__", ".")


def placed(layout: Layout, *, root: str = "") -> dict[str, tuple[str, str | None]]:
    """Class and split by path."""
    return {p.path.removeprefix(root): (p.class_name, p.split) for p in layout.pictures}


def left_out(layout: Layout) -> dict[str, str]:
    return {rejected.path: rejected.reason for rejected in layout.rejected}


def refusal(*paths: str, folders: Sequence[str] = (), **tables: str) -> ArchiveRefused:
    with pytest.raises(ArchiveRefused) as refused:
        found(*paths, folders=folders, **tables)
    return refused.value


CLASSES = ("cat/1.jpg", "cat/2.JPG", "dog/1.jpg", "dog/2.jpg")
ROOTS = pytest.mark.parametrize("root", ["", "flowers/", "my set (1)/"])


@ROOTS
def test_class_folders(root: str) -> None:
    layout = found(*CLASSES, root=root, folders=["", "cat", "dog"] if root else ["cat", "dog"])
    assert placed(layout, root=root) == {
        "cat/1.jpg": ("cat", None),
        "cat/2.JPG": ("cat", None),
        "dog/1.jpg": ("dog", None),
        "dog/2.jpg": ("dog", None),
    }
    assert (layout.classes, layout.rejected) == (["cat", "dog"], [])


@ROOTS
@pytest.mark.parametrize("train", ["train", "Training", "TRAIN"])
@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
@pytest.mark.parametrize("test", ["test", "Testing"])
def test_split_folders_under_any_of_their_names(root: str, train: str, val: str, test: str) -> None:
    layout = found(*(f"{split}/{path}" for split in (train, val, test) for path in CLASSES), root=root)
    assert {split for _, split in placed(layout).values()} == {"train", "val", "test"}
    assert placed(layout, root=root)[f"{val}/dog/1.jpg"] == ("dog", "val")
    assert layout.classes == ["cat", "dog"]
    assert layout.has_given_validation


@ROOTS
def test_only_train_and_test_leaves_validation_to_graft(root: str) -> None:
    layout = found(*(f"{split}/{path}" for split in ("train", "test") for path in CLASSES), root=root)
    assert {split for _, split in placed(layout).values()} == {"train", "test"}
    assert not layout.has_given_validation


def test_train_folder_alone_is_a_split_and_no_wrapping_folder() -> None:
    assert placed(found(*(f"train/{path}" for path in CLASSES)))["train/cat/1.jpg"] == ("cat", "train")


def test_class_may_be_called_like_a_split() -> None:
    layout = found("train/1.jpg", "train/2.jpg", "plane/1.jpg", "plane/2.jpg")
    assert layout.classes == ["plane", "train"]
    assert placed(layout)["train/1.jpg"] == ("train", None)


@ROOTS
@pytest.mark.parametrize("name", ["train", "Test", "val"])
def test_class_called_like_a_split_is_one_of_several_with_folders_in_them(root: str, name: str) -> None:
    paths = [f"{folder}/s{i}/{i}.jpg" for folder in ("car", name, "plane") for i in range(2)]
    layout = found(*paths, root=root)
    assert (layout.classes, layout.rejected) == (sorted(["car", name, "plane"]), [])
    assert placed(layout, root=root)[f"{name}/s0/0.jpg"] == (name, None)


def test_folders_beside_two_splits_or_without_pictures_are_no_classes() -> None:
    splits = [f"{split}/{path}" for split in ("train", "val") for path in CLASSES]
    assert found(*splits, "a/1.jpg", "b/1.jpg").classes == ["cat", "dog"]
    assert found(*(f"train/{path}" for path in CLASSES), "a/1.txt", "b/1.txt", "c/1.jpg").classes == ["cat", "dog"]


def test_everything_below_a_class_folder_belongs_to_the_class() -> None:
    layout = found("cat/2019/a/1.jpg", "cat/2.jpg", "dog/x/1.jpg", "dog/y/1.jpg")
    assert placed(layout)["cat/2019/a/1.jpg"] == ("cat", None)
    assert layout.classes == ["cat", "dog"]


def test_classes_are_sorted_by_name_as_text() -> None:
    assert found(*(f"{name}/{i}.jpg" for name in ("10", "9", "a", "B") for i in range(2))).classes == [
        "10",
        "9",
        "B",
        "a",
    ]


def test_junk_is_passed_over_in_silence() -> None:
    layout = found(
        *CLASSES,
        "__MACOSX/cat/._1.jpg",
        "__MACOSX/._cat",
        ".DS_Store",
        "cat/.DS_Store",
        "cat/Thumbs.db",
        "dog/desktop.ini",
        "dog/Icon\r",
        ".git/config",
        "cat/.thumbnails/1.jpg",
        folders=["__MACOSX", "__MACOSX/cat", ".git", "cat"],
    )
    assert (layout.classes, len(layout.pictures), layout.rejected) == (["cat", "dog"], 4, [])


def test_junk_beside_a_wrapping_folder_does_not_hide_it() -> None:
    layout = found(*(f"set/{path}" for path in CLASSES), "__MACOSX/set/cat/._1.jpg", ".DS_Store", folders=["__MACOSX"])
    assert layout.classes == ["cat", "dog"]


def test_other_files_are_listed() -> None:
    layout = found(*CLASSES, "README.txt", "cat/notes.txt", "stray.jpg")
    assert left_out(layout) == {
        "README.txt": NO_PICTURE,
        "cat/notes.txt": NO_PICTURE,
        "stray.jpg": "not in a class folder",
    }


def test_files_beside_a_wrapping_folder_are_listed() -> None:
    layout = found(*(f"set/{path}" for path in CLASSES), "README.txt", "cover.jpg", "set/cover.jpg")
    assert layout.classes == ["cat", "dog"]
    assert left_out(layout) == {
        "README.txt": NO_PICTURE,
        "cover.jpg": "not in a class folder",
        "set/cover.jpg": "not in a class folder",
    }


def test_pictures_beside_class_folders_of_a_split_are_listed() -> None:
    layout = found(*(f"train/{path}" for path in CLASSES), "train/loose.jpg", "extra/1.jpg")
    assert left_out(layout) == {"train/loose.jpg": "not in a class folder", "extra/1.jpg": "not in a class folder"}


# Tables

IMAGES = ("1.jpg", "2.jpg", "3.jpg", "4.jpg")
LABELS = "filename,label\n1.jpg,cat\n2.jpg,cat\n3.jpg,dog\n4.jpg,dog\n"
LABELLED = {"1.jpg": ("cat", None), "2.jpg": ("cat", None), "3.jpg": ("dog", None), "4.jpg": ("dog", None)}


@ROOTS
def test_labels_csv(root: str) -> None:
    layout = found(*IMAGES, root=root, labels__csv=LABELS)
    assert (placed(layout, root=root), layout.classes, layout.rejected) == (LABELLED, ["cat", "dog"], [])


@ROOTS
def test_metadata_csv(root: str) -> None:
    rows = [f"me,{image},{label}" for image, (label, _) in LABELLED.items()]
    layout = found(*IMAGES, root=root, metadata__csv="\n".join(["author,file_name,label", *rows]))
    assert placed(layout, root=root) == LABELLED


@ROOTS
def test_metadata_jsonl(root: str) -> None:
    labels = {"1.jpg": 0, "2.jpg": 0, "3.jpg": 1, "4.jpg": 1}
    rows = [json.dumps({"file_name": image, "label": label, "text": "x"}) for image, label in labels.items()]
    layout = found(*IMAGES, root=root, metadata__jsonl="\n".join(rows))
    assert placed(layout, root=root) == {image: (str(label), None) for image, label in labels.items()}


def test_table_with_splits() -> None:
    table = "Filename,Label,Split\n1.jpg,cat,train\n2.jpg,cat,Valid\n3.jpg,dog,\n4.jpg,dog,test\n"
    assert [split for _, split in placed(found(*IMAGES, labels__csv=table)).values()] == [
        "train",
        "val",
        "train",
        "test",
    ]


def test_table_in_each_split_folder_as_hugging_face_has_them() -> None:
    table = LABELS.replace("filename", "file_name")
    layout = found(
        *(f"{split}/{image}" for split in ("train", "test") for image in IMAGES),
        metadata__csv_in_train=table,
        metadata__csv_in_test=table,
    )
    assert placed(layout)["train/1.jpg"] == ("cat", "train")
    assert placed(layout)["test/4.jpg"] == ("dog", "test")


def test_split_may_be_told_by_the_paths_in_a_table() -> None:
    rows = [f"{split}/{i}.jpg,{label}" for split in ("train", "val") for i, label in ((1, "cat"), (2, "dog"))]
    layout = found(
        "train/1.jpg", "train/2.jpg", "val/1.jpg", "val/2.jpg", labels__csv="filename,label\n" + "\n".join(rows)
    )
    assert placed(layout)["val/2.jpg"] == ("dog", "val")


@pytest.mark.parametrize(
    "table",
    [
        "\ufeff" + LABELS,
        LABELS.replace("\n", "\r\n"),
        LABELS.replace(",", ";"),
        LABELS.replace(",", "\t"),
        LABELS.replace("1.jpg", "./1.jpg").replace("2.jpg", '"2.jpg"').replace(",dog", ", dog "),
        "label,id,filename\n" + "".join(f"{'cat' if i < 3 else 'dog'},7,{i}.jpg\n" for i in range(1, 5)),
    ],
)
def test_table_as_spreadsheets_write_it(table: str) -> None:
    assert placed(found(*IMAGES, labels__csv=table)) == LABELLED


def test_rows_and_pictures_that_do_not_meet_are_listed() -> None:
    table = LABELS + "5.jpg,cat\nnotes.txt,cat\n6.jpg,\n7.jpg,cat\n7.jpg,dog\n8.jpg,cat,\n"
    layout = found(*IMAGES, "6.jpg", "7.jpg", "9.jpg", "notes.txt", "other.txt", labels__csv=table)
    assert placed(layout) == LABELLED
    assert left_out(layout) == {
        "5.jpg": "in the table, but not in the archive",
        "notes.txt": NO_PICTURE,
        "6.jpg": "the table gives it no label",
        "7.jpg": "twice in the table, with different labels or splits",
        "8.jpg": "in the table, but not in the archive",
        "9.jpg": "not listed in the table",
        "other.txt": NO_PICTURE,
    }


def test_paths_that_no_member_can_have_are_listed_short_and_escaped() -> None:
    long = [f"{i}{'x' * 900_000}.jpg" for i in range(3)]
    rows = [{"file_name": path, "label": "cat"} for path in ("\ud800.jpg", "a\u2028b.jpg", "é" * 513, *long)]
    rows += [{"file_name": image, "label": label} for image, (label, _) in LABELLED.items()]
    layout = found(*IMAGES, metadata__jsonl="\n".join(map(json.dumps, rows)))
    assert list(left_out(layout)) == [
        '"\\ud800.jpg"',
        '"a\\u2028b.jpg"',
        f'"{"é" * 60}…{"é" * 59}"',
        *(f'"{i}{"x" * 59}…{"x" * 55}.jpg"' for i in range(3)),
    ]


@pytest.mark.parametrize(
    "rows",
    [
        "5.jpg,tulip\n6.jpg,tulip\n",
        "animation.txt,tulip\n",
        "7.jpg,tulip\n7.jpg,cat\n",
        "5.jpg,dog\n5.jpg,cat\n5.jpg,tulip\n",
    ],
)
def test_class_that_a_table_names_and_that_has_no_picture_is_refused(rows: str) -> None:
    error = refusal(*IMAGES, "7.jpg", "animation.txt", labels__csv=LABELS + rows)
    assert error.code == "too-few-images"
    assert error.detail.startswith('The class "tulip" has too few readable pictures (0)')


def test_class_without_a_picture_is_refused_with_its_task() -> None:
    table = "filename,label:kind,label:light\n" + "".join(f"{i}.jpg,{'ab'[i % 2]},{'cd'[i % 2]}\n" for i in range(4))
    error = refusal(*(f"{i}.jpg" for i in range(4)), labels__csv=table + "9.jpg,a,dusk\n")
    assert error.detail.startswith('Of the task "light": The class "dusk" has too few readable pictures (0)')


TWO_TASKS = [
    {"labels__csv": "filename,label:colour,label:shape\n1.jpg,red,\n2.jpg,red,round\n3.jpg,blue,flat\n"
     "4.jpg,blue,round\n5.jpg,,flat\n6.jpg,,\n"},
    {"metadata__jsonl": "\n".join(
        json.dumps({"file_name": f"{i}.jpg", "label": label})
        for i, label in enumerate(
            [{"colour": "red"}, {"shape": "round", "colour": "red"}, {"colour": "blue", "shape": "flat"},
             {"colour": "blue", "shape": "round"}, {"shape": "flat", "colour": None}, {}], start=1)
    )},
]  # fmt: skip


@pytest.mark.parametrize("table", TWO_TASKS, ids=["csv", "jsonl"])
def test_table_with_several_label_columns_names_several_tasks_and_labels_may_lack(table: dict[str, str]) -> None:
    layout = found(*(f"{i}.jpg" for i in range(1, 7)), **table)

    assert [(task.name, task.classes) for task in layout.tasks] == [
        ("colour", ["blue", "red"]),
        ("shape", ["flat", "round"]),
    ]
    assert layout.classes == ["blue", "red"]
    assert {p.path: (p.class_name, p.class_names) for p in layout.pictures} == {
        "1.jpg": ("red", ("red", "")),
        "2.jpg": ("red", ("red", "round")),
        "3.jpg": ("blue", ("blue", "flat")),
        "4.jpg": ("blue", ("blue", "round")),
        "5.jpg": ("", ("", "flat")),
    }
    assert left_out(layout) == {"6.jpg": "the table gives it no label"}


ODD_BLANKS = ("à\u00a0la carte", "桜\u3000", "می\u200cخواهم", "👩\u200d🌾")


@pytest.mark.parametrize("label", ODD_BLANKS)
def test_labels_and_tasks_may_hold_blanks_and_joiners_of_every_script(label: str) -> None:
    labels = (label, label, "dog", "dog")
    rows = "".join(f"{image},{name},{name}\n" for image, name in zip(IMAGES, labels, strict=True))
    layout = found(*IMAGES, labels__csv=f"filename,label:{label},label:b\n{rows}")
    assert [task.name for task in layout.tasks] == [label.strip(), "b"]
    assert layout.classes == sorted([label.strip(), "dog"])


@pytest.mark.parametrize("label", ["a\x00b", "a\x85b", "a\u2028b", "a\ud800b"])
def test_labels_and_tasks_with_control_characters_are_told(label: str) -> None:
    rows = [{"file_name": image, "label": name} for image, (name, _) in LABELLED.items()]
    layout = found(*IMAGES, "5.jpg", metadata__jsonl="\n".join(map(json.dumps, [*rows, row(label)])))
    assert left_out(layout) == {"5.jpg": "its label has control characters"}
    error = refusal(*IMAGES, "5.jpg", metadata__jsonl=json.dumps(row({label: "a", "b": "c"})))
    assert "a task's name is too long or has control characters" in error.detail


def row(label: object) -> dict[str, object]:
    return {"file_name": "5.jpg", "label": label}


@pytest.mark.parametrize("blank", [" ", "\u00a0", "\u3000"])
def test_blanks_around_a_text_count_in_json_and_not_in_csv(blank: str) -> None:
    labels = {"1.jpg": f"cat{blank}", f"2.jpg{blank}": f"cat{blank}", "3.jpg": blank, "4.jpg": blank}
    rows = [json.dumps({"file_name": path, "label": label}, ensure_ascii=False) for path, label in labels.items()]
    in_json = found(*labels, metadata__jsonl="\n".join(rows))
    assert {path: name for path, (name, _) in placed(in_json).items()} == labels
    assert placed(found(*IMAGES, labels__csv=LABELS.replace(",cat", f",{blank}cat{blank}"))) == LABELLED


def test_one_named_task_alone_is_a_plain_label() -> None:
    table = "filename,label:kind,label_id\n1.jpg,a,0\n2.jpg,a,0\n3.jpg,b,1\n4.jpg,b,1\n"
    layout = found("1.jpg", "2.jpg", "3.jpg", "4.jpg", labels__csv=table)
    assert (layout.tasks, layout.classes) == ((), ["a", "b"])
    assert {p.class_names for p in layout.pictures} == {()}


def test_class_with_too_few_pictures_is_named_with_its_task() -> None:
    table = "filename,label:colour,label:shape\n1.jpg,red,round\n2.jpg,red,flat\n3.jpg,blue,flat\n4.jpg,blue,flat\n"
    error = refusal("1.jpg", "2.jpg", "3.jpg", "4.jpg", labels__csv=table)
    assert error.code == "too-few-images"
    assert error.detail.startswith('Of the task "shape": The class "round" has too few')


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("filename,label,label:shape\n1.jpg,a,b\n", "labels of several tasks to others"),
        ("filename," + ",".join(f"label:{i}" for i in range(33)) + "\n1.jpg" + ",a" * 33, "32 are the most"),
        (f"filename,label:{'x' * 256},label:b\n1.jpg,a,b\n", "too long"),
    ],
)
def test_tasks_that_cannot_be_used_are_told(table: str, says: str) -> None:
    assert says in refusal("1.jpg", labels__csv=table).detail


def test_unknown_split_in_a_table_is_listed() -> None:
    table = (
        "filename,label,split\n1.jpg,cat,train\n2.jpg,cat,train\n3.jpg,dog,train\n4.jpg,dog,train\n5.jpg,dog,fold 3\n"
    )
    assert left_out(found(*IMAGES, "5.jpg", labels__csv=table)) == {
        "5.jpg": 'the table gives it an unknown split, "fold 3"'
    }


def test_cell_may_be_as_long_as_a_row() -> None:
    outlines = "filename,outline,label\n" + "".join(
        f'{image},"{"1 2," * 260_000}",{name}\n' for image, (name, _) in LABELLED.items()
    )
    assert placed(found(*IMAGES, labels__csv=outlines)) == LABELLED


def test_table_of_captions_does_not_hide_class_folders() -> None:
    layout = found(*CLASSES, metadata__csv="file_name,text\ncat/1.jpg,a cat\n")
    assert layout.classes == ["cat", "dog"]
    assert [rejected.path for rejected in layout.rejected] == ["metadata.csv"]
    assert 'does not begin with a line that names "filename" and "label"' in layout.rejected[0].reason


def test_tables_that_say_nothing_are_listed() -> None:
    table = "filename,label\n1.jpg,cat\n2.jpg,dog\n3.jpg,cat\n4.jpg,dog\n"
    assert left_out(found(*CLASSES, labels__csv_in_cat=table)) == {"cat/labels.csv": "not a picture"}
    beside = found(*IMAGES, labels__csv=table, metadata__csv="id,text\n")
    assert left_out(beside) == {"metadata.csv": "another table says the labels"}


WRONG = LABELS.replace(".jpg", "")


@ROOTS
@pytest.mark.parametrize("table", [WRONG, LABELS.replace("jpg", "JPG"), "filename,label\nimages/1.jpg,cat\n"])
def test_table_of_other_files_says_what_it_names_and_what_there_is(root: str, table: str) -> None:
    with pytest.raises(ArchiveRefused) as refused:
        found(*IMAGES, root=root, labels__csv=table)
    rows, first = table.count("\n") - 1, table.splitlines()[1].partition(",")[0]
    assert (refused.value.code, refused.value.detail) == (
        "no-usable-layout",
        f'The archive\'s table cannot be used: "{root}labels.csv" is of other files: none of its {rows} rows names a '
        f'picture of the archive, such as "{root}1.jpg"; the first names "{first}".',
    )


@pytest.mark.parametrize("root", ["flowers/", "my set (1)/"])
def test_table_may_name_files_as_the_whole_archive_has_them(root: str) -> None:
    whole = LABELS.replace("1.jpg", f"{root}1.jpg").replace("4.jpg", f"./{root}4.jpg")
    assert placed(found(*IMAGES, root=root, labels__csv=whole), root=root) == LABELLED


def test_own_files_of_a_split_go_before_those_that_the_archive_has_by_the_same_path() -> None:
    twice = [f"train/{image}" for image in IMAGES] + ["train/train/1.jpg"]
    layout = found(*twice, labels__csv_in_train=LABELS.replace("1.jpg", "train/1.jpg"))
    assert "train/train/1.jpg" in placed(layout)
    assert left_out(layout) == {"train/1.jpg": "not listed in the table"}


@ROOTS
@pytest.mark.parametrize("table", [WRONG, "filename,label\n", "filename,label\ncat/1.jpg,\n", "", "id,text\n1,a cat\n"])
@pytest.mark.parametrize("split", ["", "train/"])
def test_table_that_labels_no_picture_does_not_hide_class_folders(root: str, table: str, split: str) -> None:
    layout = found(*(split + path for path in CLASSES), root=root, labels__csv=table)
    assert (layout.classes, len(layout.pictures)) == (["cat", "dog"], 4)
    [(path, reason)] = left_out(layout).items()
    assert (path, reason.startswith(f'not used: "{root}labels.csv" ')) == (f"{root}labels.csv", True)


@ROOTS
@pytest.mark.parametrize("table", ["file_name,text\n1.jpg,a cat\n", "filename,label\n", WRONG])
def test_table_that_cannot_be_used_does_not_hide_another_beside_it(root: str, table: str) -> None:
    layout = found(*IMAGES, root=root, labels__csv=table, metadata__csv=LABELS, metadata__jsonl="")
    assert placed(layout, root=root) == LABELLED
    assert sorted(left_out(layout)) == [f"{root}labels.csv", f"{root}metadata.jsonl"]
    assert left_out(layout)[f"{root}labels.csv"].startswith("not used: ")


def test_table_that_cannot_be_used_does_not_hide_those_of_the_splits() -> None:
    paths = [f"{split}/{image}" for split in ("train", "test") for image in IMAGES]
    captions = "file_name,text\n1.jpg,a cat\n"
    layout = found(*paths, labels__csv=captions, metadata__csv_in_train=LABELS, metadata__csv_in_test=LABELS)
    assert (len(layout.pictures), sorted(left_out(layout))) == (8, ["labels.csv"])


@pytest.mark.parametrize("slip", ["file_name,text\n1.jpg,a cat\n", "", "{"])
def test_slip_in_the_table_of_a_split_does_not_cost_the_split(slip: str) -> None:
    paths = [f"{split}/{image}" for split in ("train", "val") for image in IMAGES]
    error = refusal(*paths, metadata__csv_in_train=LABELS, metadata__csv_in_val=slip)
    assert (error.code, '"val/metadata.csv"' in error.detail) == ("no-usable-layout", True)


@pytest.mark.parametrize("empty", ["", "README.txt"])
@pytest.mark.parametrize("inner", [{}, {"labels__csv_in_set": "cat/1.jpg,a"}])
def test_table_of_captions_does_not_hide_a_wrapping_folder(empty: str, inner: dict[str, str]) -> None:
    paths = [f"set/{path}" for path in CLASSES] + [empty] * bool(empty)
    layout = found(*paths, metadata__csv="file_name,text\nset/cat/1.jpg,a cat\n", **inner)
    assert layout.classes == ["cat", "dog"]
    assert left_out(layout)["metadata.csv"].startswith('not used: "metadata.csv" does not begin with')
    wrapped = found(*(f"set/{image}" for image in IMAGES), metadata__csv="id\n", labels__csv_in_set=LABELS)
    assert placed(wrapped, root="set/") == LABELLED


def test_folders_called_like_splits_are_no_classes_where_a_table_was_to_say_them() -> None:
    error = refusal(*(f"{split}/{image}" for split in ("train", "test") for image in IMAGES), labels__csv=WRONG)
    assert '"labels.csv" is of other files' in error.detail


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("1.jpg,cat\n2.jpg,dog\n", 'does not begin with a line that names "filename" and "label"'),
        ("", 'does not begin with a line that names "filename" and "label"'),
    ],
)
def test_table_that_cannot_be_used_is_named(table: str, reason: str) -> None:
    error = refusal(*IMAGES, labels__csv=table)
    assert error.code == "no-usable-layout"
    assert reason in error.detail
    assert "labels.csv" in error.detail


@pytest.mark.parametrize("line", ["{", "[]", '{"file_name": "1.jpg"}', "[" * 100_000])
def test_line_of_jsonl_that_cannot_be_used_is_named(line: str) -> None:
    good = "".join(json.dumps({"file_name": f"{i}.jpg", "label": "cat"}) + "\n" for i in range(1, 3))
    error = refusal(*IMAGES, metadata__jsonl=good + line)
    assert (error.code, 'line 3 of "metadata.jsonl"' in error.detail) == ("no-usable-layout", True)


@pytest.mark.parametrize(
    ("table", "text", "says"),
    [
        ("labels__csv", "filename,label" + "," * 8_000_000, "a row of"),
        ("labels__csv", "filename,label\n1.jpg,cat" + ',"\n"' * 2_000_000, "a row of"),
        ("labels__csv", "filename," + ",".join(f"label:{i:x}" for i in range(90_000)) + "\n" + "\n" * 9000, "tasks"),
        ("metadata__jsonl", '{"file_name": "1.jpg", "label": "cat", "x": [' + "[]," * 2_000_000, "a row of"),
    ],
    ids=["columns", "lines in a row", "tasks", "json"],
)
def test_table_that_would_take_many_times_its_bytes_is_refused(table: str, text: str, says: str) -> None:
    tracemalloc.start()
    try:
        error = refusal("1.jpg", **{table: text})
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (error.code, says in error.detail) == ("no-usable-layout", True)
    assert peak_bytes < len(text) + 32 * MEBIBYTE


def test_table_of_more_than_a_million_rows_is_refused() -> None:
    error = refusal("1.jpg", labels__csv="filename,label\n" + "1,b\n" * 1_000_001)
    assert (error.code, "more than 1000000 rows" in error.detail) == ("no-usable-layout", True)


def test_table_that_is_no_utf8_is_refused() -> None:
    with pytest.raises(ArchiveRefused, match="is not UTF-8 text"):
        recognise([File("1.jpg", None)], tables={"labels.csv": b"\xff\xfe\x00"})


# Refusals


@pytest.mark.parametrize(
    ("paths", "code"),
    [
        ((), "no-usable-layout"),
        (("a.jpg", "b.jpg"), "no-usable-layout"),
        (("README.txt",), "no-usable-layout"),
        (("docs/a.txt", "docs/b.txt", "x/c.txt"), "no-usable-layout"),
        (("set/a.jpg", "set/b.jpg"), "too-few-classes"),
        (("cat/1.jpg", "cat/more/2.jpg"), "too-few-classes"),
        (("train/cat/1.jpg", "train/cat/2.jpg", "val/cat/1.jpg"), "too-few-classes"),
        (("val/cat/1.jpg", "val/cat/2.jpg", "val/dog/1.jpg", "val/dog/2.jpg"), "no-training-images"),
    ],
)
def test_archive_without_classes_to_train_on_is_refused(paths: tuple[str, ...], code: str) -> None:
    assert refusal(*paths).code == code


@pytest.mark.parametrize(
    ("paths", "says"),
    [
        ((*CLASSES, "emu/1.jpg"), 'The class "emu" has too few readable pictures (1)'),
        ((*CLASSES, "emu/1.txt", "emu/2.txt"), 'The class "emu" has too few readable pictures (0)'),
        (
            (*(f"{split}/{path}" for split in ("train", "val") for path in CLASSES), "val/emu/1.jpg", "val/emu/2.jpg"),
            'The class "emu" has too few pictures to train on (0)',
        ),
        (
            (
                *(f"{split}/{path}" for split in ("train", "test") for path in CLASSES),
                "train/emu/1.jpg",
                "test/emu/1.jpg",
            ),
            'The class "emu" has too few pictures for training and validation together (1)',
        ),
    ],
)
def test_class_with_too_few_pictures_is_named(paths: tuple[str, ...], says: str) -> None:
    error = refusal(*paths)
    assert error.code == "too-few-images"
    assert error.detail.startswith(says)


def test_empty_class_folder_is_named() -> None:
    error = refusal(*CLASSES, folders=["cat", "dog", "emu"])
    assert (error.code, '"emu"' in error.detail) == ("too-few-images", True)


def test_empty_folder_beside_one_class_is_a_class_and_no_wrapping() -> None:
    error = refusal("cat/a/1.jpg", "cat/b/2.jpg", "cat/a/3.jpg", "cat/b/4.jpg", folders=["dog"])
    assert (error.code, '"dog"' in error.detail) == ("too-few-images", True)


@pytest.mark.parametrize(
    ("one", "other"), [("cat", "Cat"), ("cat", "cat "), ("cat", "cat."), ("straße", "STRASSE"), ("cat", "cat . ")]
)
def test_classes_that_a_file_system_could_take_for_one_are_refused(one: str, other: str) -> None:
    error = refusal(*(f"{name}/{i}.jpg" for name in (one, other, "dog") for i in range(2)))
    assert error.code == "class-name-collision"


def test_class_spelt_differently_in_two_splits_is_refused() -> None:
    paths = [f"train/{name}/{i}.jpg" for name in ("cat", "dog") for i in range(2)] + ["val/Cat/1.jpg", "val/dog/1.jpg"]
    assert refusal(*paths).code == "class-name-collision"


def test_picture_is_a_record() -> None:
    assert found(*CLASSES).pictures[0] == Picture("cat/1.jpg", "cat", None)
