"""After an upload a pretrained network tells changed copies and wrong labels, and never keeps a data set from ready."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import queue_builders
from builders import class_folders, encoded, written, zip_of
from PIL import Image
from structlog.testing import capture_logs

from app.datasets import catalog
from app.datasets.ingest import archive_key, manifest_key
from app.db.engine import Database
from app.db.tables import DatasetRow
from app.errors import Conflict
from app.jobs import queue
from app.jobs.queue import Cancelled, Claim
from app.jobs.request import parse_request
from app.jobs.spec import DatasetFacts, resolve
from app.jobs.states import JobKind
from app.settings import Settings
from app.storage import LocalStorage
from worker.reporter import Reporter
from worker.run_ingest import run_ingest
from worker.run_job import run_training
from worker.wakeup import Wakeup

# Enough of each class for a probe to be sure of.
PER_SPLIT = {"train": 24, "val": 8}
BACKBONE = "mobilenet_v3_small"


@pytest.fixture(autouse=True)
def no_other_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Torch's own cache, which this machine may or may not have, is looked into as well."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture
def weights_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    return folder


@pytest.fixture
def real_weights(weights_dir: Path, shared_weights: Path) -> Path:
    (weights_dir / f"{BACKBONE}.safetensors").symlink_to(shared_weights / f"{BACKBONE}.safetensors")
    return weights_dir


@pytest.fixture
def settings(storage: LocalStorage, weights_dir: Path) -> Callable[..., Settings]:
    def make(**changes: Any) -> Settings:
        here = {"data_dir": storage.root, "weights_dir": weights_dir, "device": "cpu", "allow_downloads": False}
        return Settings(_env_file=None, **(here | changes))

    return make


def drawn(kind: str, seed: int) -> Image.Image:
    """A bright disc, or bars, on blotches; no symmetry."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:96, :128]
    blotches = Image.fromarray(random.integers(0, 140, (6, 8, 3)).astype(np.uint8)).resize((128, 96))
    colour = random.integers(150, 255, 3)
    left, top, size = random.integers(25, 100), random.integers(30, 66), random.integers(14, 26)
    if kind == "disc":
        shape = (x - left) ** 2 + (y - top) ** 2 < size**2
    else:
        slope = random.uniform(0.2, 0.9)
        shape = np.sin((x + slope * y + 9 * left) * 2 * np.pi / random.integers(8, 14)) > 0.2
    return Image.fromarray(np.where(shape[:, :, None], colour, np.asarray(blotches)).astype(np.uint8))


def photos() -> dict[str, Image.Image]:
    return {
        f"{split}/{kind}/{i}.png": drawn(kind, seed=10_000 * k + 1_000 * s + i)
        for k, kind in enumerate(("bars", "disc"))
        for s, (split, count) in enumerate(PER_SPLIT.items())
        for i in range(count)
    }


def archive(pictures: dict[str, Image.Image]) -> bytes:
    return zip_of({path: encoded(image) for path, image in pictures.items()})


def uploaded(database: Database, storage: LocalStorage, content: bytes) -> Claim:
    with database.write() as session:
        row = catalog.create(session, name="x", size_bytes=1, sha256="00", options={"val_fraction": 0.25, "seed": 0})
    written(storage.path(archive_key(row.id)), content)
    queue_builders.submit(database, kind=JobKind.ingest, dataset_id=row.id)
    claim = queue_builders.claim_next(database, kind=JobKind.ingest)
    assert claim is not None
    return claim


def ingested(
    database: Database, storage: LocalStorage, settings: Settings, claim: Claim
) -> tuple[DatasetRow, list[Any]]:
    """The data set, which is ready, and what the log says of not looking at it."""
    reporter = Reporter(database, claim, shutdown=Wakeup())
    with capture_logs() as logs:
        run_ingest(claim, settings=settings, database=database, storage=storage, reporter=reporter)
    with database.read() as session:
        row = catalog.find(session, claim.dataset_id)
    assert row.status == "ready"
    return row, [entry for entry in logs if entry["event"] == "quality_skipped"]


def by_code(row: DatasetRow) -> dict[str, dict[str, Any]]:
    found = {warning["code"]: warning for warning in row.warnings}
    assert len(found) == len(row.warnings)
    return found


def kept_features(storage: LocalStorage, dataset_id: str) -> dict[str, tuple[int, int]]:
    """Key → what changes when they are computed anew: the file, and when it was written."""
    found = {path: path.stat() for path in storage.path(f"datasets/{dataset_id}/features").glob("*/values.bin")}
    return {path.parent.name: (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}


def test_changed_copies_and_wrong_labels_are_told(
    real_weights: Path, settings: Callable[..., Settings], database: Database, storage: LocalStorage
) -> None:
    pictures = photos()
    pictures["val/disc/mirrored.png"] = pictures["train/disc/3.png"].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pictures["train/bars/wrong.png"] = drawn("disc", seed=77)
    pictures["train/disc/same.png"] = pictures["val/disc/2.png"]

    row, skipped = ingested(database, storage, settings(), uploaded(database, storage, archive(pictures)))

    found = by_code(row)
    assert (skipped, sorted(found)) == ([], ["duplicate_across_splits", "small_validation", "suspicious_labels"])
    assert sorted(found["duplicate_across_splits"]["paths"][:2]) == ["train/disc/same.png", "val/disc/2.png"]
    assert sorted(found["duplicate_across_splits"]["paths"][2:]) == ["train/disc/3.png", "val/disc/mirrored.png"]
    assert found["suspicious_labels"]["paths"] == ["train/bars/wrong.png"]


@pytest.mark.parametrize("recipe", ["modern", "classic"])
def test_a_job_finds_the_features_that_ingest_computed(
    real_weights: Path, settings: Callable[..., Settings], database: Database, storage: LocalStorage, recipe: str
) -> None:
    row, skipped = ingested(database, storage, settings(), uploaded(database, storage, archive(photos())))
    computed = kept_features(storage, row.id)
    request: dict[str, Any] = {"dataset": row.id, "method": "feature_extraction", "recipe": recipe}
    if recipe == "classic":
        request["hyperparameters"] = {"epochs": 1, "augmentation": "none"}
    spec = resolve(
        parse_request(request),
        dataset=DatasetFacts.from_counts(row.classes),
        weights={BACKBONE: "IMAGENET1K_V1"},
        device_type="cpu",
    )
    with database.write() as session:
        queue.submit(session, kind=JobKind.training, dataset_id=row.id, spec=spec.model_dump(mode="json"))
    claim = queue_builders.claim_next(database)
    assert claim is not None
    reporter = Reporter(database, claim, shutdown=Wakeup())
    run_training(claim, settings=settings(), database=database, storage=storage, reporter=reporter)

    assert (skipped, len(computed)) == ([], 1)
    assert kept_features(storage, row.id) == computed


def test_without_weights_the_data_set_is_ready_with_the_warnings_of_pixels(
    settings: Callable[..., Settings], database: Database, storage: LocalStorage
) -> None:
    row, skipped = ingested(database, storage, settings(), uploaded(database, storage, zip_of(class_folders(8))))
    assert list(by_code(row)) == ["small_validation"]
    assert [entry["reason"] for entry in skipped] == ["no_weights_here"]


@pytest.mark.parametrize("content", [b"", b"damaged" * 100])
def test_damaged_weights_are_logged_and_the_data_set_is_ready(
    weights_dir: Path, settings: Callable[..., Settings], database: Database, storage: LocalStorage, content: bytes
) -> None:
    (weights_dir / f"{BACKBONE}.safetensors").write_bytes(content)
    row, skipped = ingested(database, storage, settings(), uploaded(database, storage, zip_of(class_folders(8))))
    assert list(by_code(row)) == ["small_validation"]
    assert [(entry["log_level"], entry["reason"]) for entry in skipped] == [("warning", "WeightsUnavailable")]
    assert "is damaged" in skipped[0]["detail"]


def test_without_room_for_features_the_data_set_is_ready(
    real_weights: Path, settings: Callable[..., Settings], database: Database, storage: LocalStorage
) -> None:
    claim = uploaded(database, storage, zip_of(class_folders(8)))
    _row, skipped = ingested(database, storage, settings(feature_cache_bytes=1000), claim)
    assert [entry["reason"] for entry in skipped] == ["StorageFull"]


def test_device_that_is_not_there_is_logged(
    settings: Callable[..., Settings], database: Database, storage: LocalStorage
) -> None:
    claim = uploaded(database, storage, zip_of(class_folders(8)))
    _row, skipped = ingested(database, storage, settings(device="cuda:99"), claim)
    assert [entry["reason"] for entry in skipped] == ["DeviceUnavailable"]


@pytest.mark.parametrize(
    ("per_class", "limit", "attempt", "reason"),
    [
        (8, 0, 1, "turned_off"),
        (8, 15, 1, "too_many_images"),
        (3, 16, 1, "too_few_images"),
        (8, 16, 2, "earlier_attempt_died"),
        (8, 16, 1, "WeightsUnavailable"),  # the file was read
    ],
)
def test_what_is_not_looked_at(
    weights_dir: Path,
    settings: Callable[..., Settings],
    database: Database,
    storage: LocalStorage,
    per_class: int,
    limit: int,
    attempt: int,
    reason: str,
) -> None:
    (weights_dir / f"{BACKBONE}.safetensors").write_bytes(b"read by nobody")
    claim = replace(uploaded(database, storage, zip_of(class_folders(per_class))), attempt=attempt)
    _row, skipped = ingested(database, storage, settings(quality_max_images=limit), claim)
    assert [entry["reason"] for entry in skipped] == [reason]


def test_weights_for_larger_pixels_than_were_packed_are_left_alone(
    weights_dir: Path, settings: Callable[..., Settings], database: Database, storage: LocalStorage
) -> None:
    (weights_dir / "efficientnet_v2_s.safetensors").write_bytes(b"read by nobody")
    _row, skipped = ingested(database, storage, settings(), uploaded(database, storage, zip_of(class_folders(8))))
    assert [entry["reason"] for entry in skipped] == ["other_image_size"]


def test_cancel_is_heard_while_looking(
    real_weights: Path, settings: Callable[..., Settings], database: Database, storage: LocalStorage
) -> None:
    claim = uploaded(database, storage, zip_of(class_folders(8)))

    def cancel() -> None:
        with database.write() as session:
            queue.cancel_ingest(session, claim.dataset_id)

    reporter = Reporter(database, claim, shutdown=Wakeup(), monotonic=once_published(storage, claim, cancel))
    with pytest.raises(Cancelled):
        run_ingest(claim, settings=settings(), database=database, storage=storage, reporter=reporter)
    assert kept_features(storage, claim.dataset_id) == {}


def test_data_set_deleted_while_looking_leaves_no_files(
    real_weights: Path, settings: Callable[..., Settings], database: Database, storage: LocalStorage
) -> None:
    claim = uploaded(database, storage, zip_of(class_folders(8)))

    def delete() -> None:
        with database.write() as session:
            catalog.delete(session, claim.dataset_id)
        storage.delete(f"datasets/{claim.dataset_id}")

    reporter = Reporter(database, claim, shutdown=Wakeup(), monotonic=once_published(storage, claim, delete))
    with pytest.raises(Conflict):
        run_ingest(claim, settings=settings(), database=database, storage=storage, reporter=reporter)
    assert not storage.exists(f"datasets/{claim.dataset_id}")


def once_published(storage: LocalStorage, claim: Claim, act: Callable[[], None]) -> Callable[[], float]:
    """A clock by which every report is due, and which acts at the first one after the manifest is there."""
    readings = 0
    has_acted = False

    def clock() -> float:
        nonlocal readings, has_acted
        readings += 1
        if not has_acted and storage.exists(manifest_key(claim.dataset_id)):
            has_acted = True
            act()
        return 10.0 * readings

    return clock
