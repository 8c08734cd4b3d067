"""From an archive to pixels, split and report; broken pictures are listed, and nothing half done stays behind."""

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from builders import class_folders, encoded, jpeg, picture, tar_of, two_tasks, written, zip_of
from PIL import Image

from app.datasets.ingest import (
    IngestLimits,
    IngestOptions,
    archive_key,
    ensure_packed,
    ingest,
    manifest_key,
    packed_key,
)
from app.datasets.manifest import Manifest, Record
from app.datasets.packed import PackedPixels
from app.datasets.quality import THUMBNAIL_SIDE
from app.datasets.report import IngestReport
from app.errors import ArchiveRefused, StorageFull
from app.settings import Settings
from app.storage import LocalStorage
from app.vision.images import decode

LIMITS = IngestLimits.from_settings(Settings(_env_file=None))
DATASET = "ds_test"

Ingested = Callable[..., IngestReport]


@pytest.fixture
def ingested(storage: LocalStorage) -> Ingested:
    """Ingests an archive of these files."""

    def run(
        files: Mapping[str, bytes],
        *,
        val_fraction: float = 0.2,
        seed: int = 0,
        make: Callable[[Mapping[str, bytes]], bytes] = zip_of,
        tick: Callable[[float], None] = lambda _fraction: None,
        state_size: Callable[[int], None] = lambda _packed_bytes: None,
    ) -> IngestReport:
        return ingest(
            written(storage.path(archive_key(DATASET)), make(files)),
            storage=storage,
            dataset_id=DATASET,
            options=IngestOptions(val_fraction=val_fraction, seed=seed),
            limits=LIMITS,
            tick=tick,
            state_size=state_size,
        )

    return run


def manifest(storage: LocalStorage) -> Manifest:
    return Manifest.read(storage.path(manifest_key(DATASET)))


def published(storage: LocalStorage) -> set[str]:
    return {str(path.relative_to(storage.root)) for path in storage.root.rglob("*") if path.is_file()}


WHOLE = {
    f"datasets/{DATASET}/{name}"
    for name in ("archive", "manifest.jsonl", "packed-256/pixels.bin", "packed-256/index.npy")
}


def test_pixels_are_those_of_the_decoder_in_the_order_of_the_manifest(
    ingested: Ingested, storage: LocalStorage
) -> None:
    files = class_folders(4) | {"cat/large.png": encoded(picture(99, size=(700, 600)))}
    ingested(files)
    pixels = PackedPixels(storage.path(packed_key(DATASET, 256)))
    records = manifest(storage).records
    assert [record.path for record in records] == sorted(files)
    assert len(pixels) == len(records)
    for i, record in enumerate(records):
        np.testing.assert_array_equal(pixels[i], decode(files[record.path], side=256, limits=LIMITS.images))
        assert (record.height, record.width) == tuple(pixels.sizes[i])
        assert record.digest == hashlib.sha256(files[record.path]).hexdigest()
    assert published(storage) == WHOLE


def test_report_counts_each_class_exactly(ingested: Ingested) -> None:
    report = ingested(class_folders(150, classes=("daisy", "rose")))
    assert (report.num_images, report.num_rejected, report.error) == (300, 0, None)
    assert report.splits == {"train": 240, "val": 60, "test": 0}
    assert report.classes == [
        {"name": "daisy", "train": 120, "val": 30, "test": 0},
        {"name": "rose", "train": 120, "val": 30, "test": 0},
    ]
    assert report.warnings == []


def test_given_splits_are_kept(ingested: Ingested, storage: LocalStorage) -> None:
    files = {
        **class_folders(5, root="set/Train/"),
        **class_folders(3, root="set/valid/", first_seed=100),
        **class_folders(2, root="set/test/", first_seed=200),
    }
    assert ingested(files).splits == {"train": 10, "val": 6, "test": 4}
    assert {record.path: record.split for record in manifest(storage).records}["set/valid/dog/0.jpg"] == "val"


def test_validation_is_taken_from_train_where_only_test_is_given(ingested: Ingested, storage: LocalStorage) -> None:
    files = class_folders(10, root="train/") | class_folders(3, root="test/", first_seed=100)
    assert ingested(files).splits == {"train": 16, "val": 4, "test": 6}
    assert {r.split for r in manifest(storage).records if r.path.startswith("test/")} == {"test"}


def test_tar_and_another_order_give_the_same_split(ingested: Ingested, storage: LocalStorage) -> None:
    files = class_folders(10)
    ingested(files)
    before = manifest(storage).records
    ingested(dict(reversed(files.items())), make=lambda files: tar_of(files, mode="w:gz"))
    assert manifest(storage).records == before


def test_split_is_a_function_of_content_not_of_names(ingested: Ingested, storage: LocalStorage) -> None:
    files = class_folders(10)
    ingested(files)
    before = {record.digest: record.split for record in manifest(storage).records}
    ingested({f"{path.split('/')[0]}/z{hash(path)}.jpg": content for path, content in files.items()})
    assert {record.digest: record.split for record in manifest(storage).records} == before


def test_seed_and_fraction_are_applied(ingested: Ingested, storage: LocalStorage) -> None:
    files = class_folders(10)
    splits = []
    for seed in (0, 1):
        assert ingested(files, val_fraction=0.5, seed=seed).splits == {"train": 10, "val": 10, "test": 0}
        splits.append([record.split for record in manifest(storage).records])
    assert splits[0] != splits[1]


# Broken pictures


def test_broken_pictures_are_left_out_with_a_reason_each(ingested: Ingested, storage: LocalStorage) -> None:
    files = class_folders(4) | {
        "cat/broken.jpg": jpeg(50)[:-100],
        "dog/text.jpg": b"this is no picture",
        "dog/empty.png": b"",
        "dog/strip.png": encoded(Image.new("RGB", (1, 300))),
        "notes.txt": b"hello",
    }
    report = ingested(files)
    assert (report.num_images, report.num_rejected) == (8, 5)
    assert sorted((each["path"], each["reason"]) for each in report.rejected) == [
        ("cat/broken.jpg", "truncated JPEG"),
        ("dog/empty.png", "empty file"),
        ("dog/strip.png", "1×300 pixels, a longer strip than 100 to 1"),
        ("dog/text.jpg", "not a picture: JPEG, PNG and WebP are read"),
        ("notes.txt", "not a picture: JPEG, PNG and WebP are read"),
    ]
    assert not {record.path for record in manifest(storage).records} & {each["path"] for each in report.rejected}


def test_report_can_be_sent_whatever_a_table_names(ingested: Ingested) -> None:
    files = class_folders(4)
    rows = [{"file_name": path, "label": path[:3]} for path in files]
    rows.append({"file_name": "\ud800.jpg", "label": "cat"})
    report = ingested(files | {"metadata.jsonl": "\n".join(map(json.dumps, rows)).encode()})
    assert report.rejected == [{"path": '"\\ud800.jpg"', "reason": "in the table, but not in the archive"}]
    assert json.dumps(asdict(report), ensure_ascii=False).encode()


@pytest.mark.parametrize("readable", [0, 1])
def test_class_that_loses_its_pictures_fails_with_its_name_and_a_whole_report(
    ingested: Ingested, storage: LocalStorage, readable: int
) -> None:
    files = class_folders(4, classes=("cat", "dog")) | {f"emu/{i}.jpg": jpeg(60 + i)[:-100] for i in range(3)}
    files |= {f"emu/ok{i}.jpg": jpeg(70 + i) for i in range(readable)}
    report = ingested(files)
    assert report.error is not None
    assert (report.error.code, '"emu"' in report.error.detail) == ("too-few-images", True)
    assert (report.num_images, report.num_rejected) == (8 + readable, 3)
    assert report.classes[2] == {"name": "emu", "train": readable, "val": 0, "test": 0}
    assert published(storage) == {f"datasets/{DATASET}/archive"}


def test_all_pictures_broken_fails(ingested: Ingested) -> None:
    report = ingested({path: content[:-100] for path, content in class_folders(3).items()})
    assert report.error is not None
    assert (report.error.code, report.num_images, report.num_rejected) == ("too-few-images", 0, 6)


def test_one_broken_picture_among_many_is_only_listed(ingested: Ingested) -> None:
    report = ingested(class_folders(40) | {"cat/broken.jpg": jpeg(1)[:-9]})
    assert (report.error, report.num_images, report.num_rejected) == (None, 80, 1)


def test_damaged_archive_raises_and_publishes_nothing(ingested: Ingested, storage: LocalStorage) -> None:
    with pytest.raises(ArchiveRefused):
        ingested(class_folders(3), make=lambda files: zip_of(files)[:-30])
    assert published(storage) == {f"datasets/{DATASET}/archive"}


# Copies


def codes(report: IngestReport) -> list[str]:
    return [warning["code"] for warning in report.warnings]


def test_near_copies_never_lie_on_both_sides_of_our_split(ingested: Ingested, storage: LocalStorage) -> None:
    files = class_folders(10)
    originals = {
        path: np.asarray(Image.fromarray(picture(7000 + i, size=(160, 120))))
        for i, path in enumerate(("cat/a", "dog/b"))
    }
    for path, pixels in originals.items():
        for quality in (95, 70, 50):
            files[f"{path}-{quality}.jpg"] = encoded(pixels, "JPEG", quality=quality)
        files[f"{path}-small.png"] = encoded(Image.fromarray(pixels).resize((96, 72)))
    for seed in range(8):
        report = ingested(files, seed=seed, val_fraction=0.3)
        assert report.splits == {"train": 20, "val": 8, "test": 0}
        for path in originals:
            assert len({r.split for r in manifest(storage).records if r.path.startswith(f"{path}-")}) == 1
        assert "duplicate_across_splits" not in codes(report)


def test_copies_across_given_splits_are_warned_of(ingested: Ingested) -> None:
    files = class_folders(20, root="train/") | class_folders(20, root="val/", first_seed=100)
    files["val/cat/copy.png"] = encoded(decode(files["train/cat/3.jpg"], side=256, limits=LIMITS.images))
    report = ingested(files)
    assert codes(report) == ["duplicate_across_splits"]
    assert sorted(report.warnings[0]["paths"]) == ["train/cat/3.jpg", "val/cat/copy.png"]


def test_same_picture_under_two_classes_is_warned_of(ingested: Ingested) -> None:
    files = class_folders(100) | {"cat/x.jpg": jpeg(900), "dog/x.jpg": jpeg(900)}
    report = ingested(files)
    assert codes(report) == ["conflicting_labels"]
    assert report.warnings[0]["paths"] == ["cat/x.jpg", "dog/x.jpg"]


def test_classes_of_equal_pictures_fail_since_nothing_can_be_kept_back(ingested: Ingested) -> None:
    report = ingested({f"{name}/{i}.jpg": jpeg(ord(name[0])) for name in ("cat", "dog") for i in range(5)})
    assert report.error is not None
    assert (report.error.code, '"cat", "dog"' in report.error.detail) == ("no-validation-possible", True)


def test_pictures_that_all_lie_in_both_classes_fail_and_it_is_said_so(ingested: Ingested) -> None:
    report = ingested({f"{name}/{i}.jpg": jpeg(i) for name in ("cat", "dog") for i in range(5)})
    assert report.error is not None
    assert report.error.code == "no-validation-possible"
    assert "or each of them lies in another class as well" in report.error.detail
    assert "conflicting_labels" in codes(report)


def test_one_class_of_equal_pictures_is_trained_on_and_warned_of(ingested: Ingested) -> None:
    report = ingested(class_folders(150, classes=("cat",)) | {f"dog/{i}.jpg": jpeg(5000) for i in range(150)})
    assert report.classes[1] == {"name": "dog", "train": 150, "val": 0, "test": 0}
    assert codes(report) == ["class_without_validation"]


def test_small_and_unequal_sets_are_warned_of(ingested: Ingested) -> None:
    report = ingested(class_folders(40, classes=("cat",)) | {f"dog/{i}.jpg": jpeg(5000 + i) for i in range(2)})
    assert codes(report) == ["small_validation", "class_imbalance"]
    assert '"cat" has 32' in report.warnings[1]["detail"]


# Runs that do not go through


def test_several_tasks_are_counted_split_and_kept(ingested: Ingested, storage: LocalStorage) -> None:
    files = two_tasks(20, without={3: "colour", 8: "light"})
    report = ingested(files, val_fraction=0.25)

    assert report.splits == {"train": 15, "val": 5, "test": 0}
    found = manifest(storage)
    assert [(task.name, task.classes) for task in found.tasks] == [
        ("colour", ["blue", "red"]),
        ("light", ["bright", "dark"]),
    ]
    lacking = {record.path: list(record.labels) for record in found.records if -1 in record.labels}
    assert lacking == {"3.jpg": [-1, 1], "8.jpg": [1, -1]}
    assert [record.label for record in found.records] == [record.labels[0] for record in found.records]
    assert found.targets.shape == (20, 2)
    # Each class of each task lies on both sides, and the counts are those of the manifest.
    for place, task in enumerate(report.tasks):
        for label, row in enumerate(task["classes"]):
            counts = {split: int(found.counts(split, task=place)[label]) for split in ("train", "val", "test")}
            assert row == {"name": found.tasks[place].classes[label], **counts}
            assert row["train"] > 0 and row["val"] > 0
    assert report.classes == report.tasks[0]["classes"]
    assert sum(row["train"] + row["val"] for row in report.classes) == 19


def test_small_class_of_any_task_is_on_both_sides(ingested: Ingested) -> None:
    files = two_tasks(40)
    lines = files["labels.csv"].decode().splitlines()
    rare = {2, 7}
    lines[1:] = [f"{line},{'rare' if i in rare else 'usual'}" for i, line in enumerate(lines[1:])]
    files["labels.csv"] = "\n".join([f"{lines[0]},label:kind", *lines[1:]]).encode()

    report = ingested(files)

    assert report.tasks[2]["classes"][0] == {"name": "rare", "train": 1, "val": 1, "test": 0}


def test_copies_contradict_each_other_in_any_task_and_a_lacking_label_contradicts_nothing(ingested: Ingested) -> None:
    files = two_tasks(20, without={0: "light", 1: "colour"})
    files["4.jpg"] = files["6.jpg"] = files["0.jpg"]  # red and bright twice, and once red and dark
    report = ingested(files)
    (conflict,) = [each for each in report.warnings if each["code"] == "conflicting_labels"]
    assert conflict["paths"] == ["0.jpg", "4.jpg", "6.jpg"]

    files = two_tasks(20, without={0: "light"})
    files["4.jpg"] = files["0.jpg"]
    assert "conflicting_labels" not in codes(ingested(files))


def test_running_again_gives_the_same_and_leaves_no_strays(ingested: Ingested, storage: LocalStorage) -> None:
    files = class_folders(5)
    first = ingested(files)
    again = ingested(files)
    assert asdict(first) == asdict(again)
    assert published(storage) == WHOLE


@pytest.mark.parametrize("after", [0.0, 0.05, 0.3, 0.94])
def test_stop_leaves_nothing_behind(ingested: Ingested, storage: LocalStorage, after: float) -> None:
    class Stop(Exception):
        pass

    def tick(fraction: float) -> None:
        if fraction >= after:
            raise Stop

    with pytest.raises(Stop):
        ingested(class_folders(20), tick=tick)
    assert published(storage) == {f"datasets/{DATASET}/archive"}
    assert list((storage.root / "staging").iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_ticks_grow_to_the_end(ingested: Ingested) -> None:
    ticks: list[float] = []
    ingested(class_folders(20), tick=ticks.append)
    assert ticks == sorted(ticks)
    assert (ticks[0], ticks[-1]) == (0.0, 0.95)


def test_full_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "full", min_free_bytes=2**62)
    archive = written(tmp_path / "archive", zip_of(class_folders(3)))
    with pytest.raises(StorageFull):
        ingest(
            archive,
            storage=storage,
            dataset_id=DATASET,
            options=IngestOptions(val_fraction=0.2, seed=0),
            limits=LIMITS,
            tick=lambda _fraction: None,
        )
    assert published(storage) == set()


def test_size_is_stated_exactly_before_the_first_pixel_is_written(ingested: Ingested, storage: LocalStorage) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    sizes = [(300, 700), (700, 300), (257, 391), (391, 257), (1, 1), (3, 200), (256, 256), (1500, 1100), (40, 48)]
    files = class_folders(3)
    for i, size in enumerate(sizes):
        files[f"cat/{i}.png"] = encoded(picture(50 + i, size=size))
        files[f"dog/{i}.jpg"] = encoded(picture(90 + i, size=size), "JPEG", exif=turned.tobytes())
        files[f"dog/{i}.webp"] = encoded(picture(130 + i, size=size), "WEBP")
    stated: list[tuple[int, set[str]]] = []
    report = ingested(files, state_size=lambda packed_bytes: stated.append((packed_bytes, published(storage))))
    folder = storage.path(packed_key(DATASET, 256))
    assert report.num_rejected == 0
    assert stated == [
        (sum(path.stat().st_size for path in folder.iterdir()), {f"datasets/{DATASET}/archive"}),
    ]


def test_size_leaves_out_what_headers_refuse_and_counts_what_only_decoding_does(
    ingested: Ingested, storage: LocalStorage
) -> None:
    stated: list[int] = []
    ingested(
        class_folders(4)
        | {
            "cat/long.png": encoded(picture(7, size=(2000, 2))),
            "cat/cut.jpg": jpeg(8)[:-50],
            "cat/notes.txt": b"not a picture",
        },
        state_size=stated.append,
    )
    written_bytes = sum(path.stat().st_size for path in storage.path(packed_key(DATASET, 256)).iterdir())
    assert stated == [written_bytes + 48 * 40 * 3 + 24]


def test_data_set_that_does_not_fit_is_refused_before_its_size_is_stated(
    storage: LocalStorage, ingested: Ingested, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def check_room(incoming_bytes: int = 0) -> None:
        asked.append(incoming_bytes)
        raise StorageFull("full")

    monkeypatch.setattr(storage, "check_room", check_room)
    stated: list[int] = []
    with pytest.raises(StorageFull):
        ingested(class_folders(3), state_size=stated.append)
    # Six pictures: pixels, an index of 128 bytes and three numbers each, and thumbnails.
    assert asked == [6 * 48 * 40 * 3 + 128 + 6 * 24 + 6 * THUMBNAIL_SIDE**2 * 3]
    assert stated == []


# Larger pixels


def test_larger_pixels_are_made_from_the_archive_when_they_are_needed(
    ingested: Ingested, storage: LocalStorage
) -> None:
    files = {
        f"{name}/{i}.png": encoded(picture(i + ord(name[0]), size=(600, 500)))
        for name in ("cat", "dog")
        for i in range(3)
    }
    ingested(
        files | {"cat/broken.png": encoded(picture(9))[:-20]}, make=lambda files: zip_of(dict(reversed(files.items())))
    )
    for _ in range(2):
        pixels = ensure_packed(storage, DATASET, 384, tick=lambda _fraction: None)
        for i, record in enumerate(manifest(storage).records):
            np.testing.assert_array_equal(pixels[i], decode(files[record.path], side=384, limits=LIMITS.images))
    assert len(pixels) == 6


# Manifest and pixels


def test_manifest_comes_back_as_it_was(tmp_path: Path) -> None:
    records = [Record("img_1", "ä/1.jpg", 1, "val", "00", 3, 2), Record("img_2", "b", 0, "train", "01", 4, 4)]
    Manifest(["a", "ä"], records).write(tmp_path / "manifest")
    found = Manifest.read(tmp_path / "manifest")
    assert (list(found.classes), list(found.records)) == (["a", "ä"], records)
    assert (found.labels.tolist(), found.indices("val").tolist(), found.counts("train").tolist()) == (
        [1, 0],
        [0],
        [1, 0],
    )


def test_manifest_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    Manifest(["a"], [Record("img_1", "a", 0, "val", "00", 3, 2)] * 3).write(tmp_path / "manifest")
    lines = (tmp_path / "manifest").read_text().splitlines(keepends=True)
    (tmp_path / "manifest").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="2 of 3"):
        Manifest.read(tmp_path / "manifest")


def test_packed_pixels_are_read_only_and_survive_their_deletion(ingested: Ingested, storage: LocalStorage) -> None:
    ingested(class_folders(3))
    pixels = PackedPixels(storage.path(packed_key(DATASET, 256)))
    first = pixels[0].copy()
    storage.delete(f"datasets/{DATASET}")
    np.testing.assert_array_equal(pixels[0], first)
    assert not pixels[0].flags.writeable


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("two_trees", {"train": 12, "val": 8, "test": 0}),
        ("surface_defects", {"train": 600, "val": 300, "test": 0}),
    ],
)
def test_real_data_sets_are_read_whole(
    shared_data: Path, storage: LocalStorage, name: str, splits: dict[str, int]
) -> None:
    report = ingest(
        shared_data / f"{name}.zip",
        storage=storage,
        dataset_id=DATASET,
        options=IngestOptions(val_fraction=0.2, seed=0),
        limits=LIMITS,
        tick=lambda _fraction: None,
    )
    assert (report.splits, report.num_rejected, report.error) == (splits, 0, None)
