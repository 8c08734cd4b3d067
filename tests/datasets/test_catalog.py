"""Rows of data sets: made as processing, ended once, listed newest first."""

from dataclasses import replace

import pytest

from app import workspaces
from app.datasets import catalog
from app.datasets.report import IngestReport, merged, warning
from app.db.engine import Database
from app.db.tables import DatasetRow
from app.errors import ArchiveRefused, Conflict, InvalidRequest, NotFound

REPORT = IngestReport(
    num_images=3,
    num_rejected=1,
    splits={"train": 2, "val": 1, "test": 0},
    classes=[{"name": "cat", "train": 2, "val": 1, "test": 0}],
    rejected=[{"path": "x", "reason": "empty file"}],
    warnings=[{"code": "small_validation", "detail": "…", "paths": []}],
)
ERROR = ArchiveRefused("No.", code="too-few-images").as_record()


def created(database: Database, name: str = "flowers") -> str:
    with database.write() as session:
        row = catalog.create(session, name=name, size_bytes=5, sha256="00", options={"val_fraction": 0.2, "seed": 0})
        return row.id


def found(database: Database, dataset_id: str) -> DatasetRow:
    with database.read() as session:
        return catalog.find(session, dataset_id)


def test_long_lists_of_paths_are_cut_and_the_total_is_said(database: Database) -> None:
    dataset_id = created(database)
    leak = warning("duplicate_across_splits", "Copies.", [f"{i}.jpg" for i in range(101)])
    fitting = warning("conflicting_labels", "Contradictions.", leak["paths"][:100])
    with database.write() as session:
        catalog.mark_ready(session, dataset_id, replace(REPORT, warnings=[leak, fitting]))
    stored = found(database, dataset_id).warnings
    assert stored == [
        leak | {"detail": "Copies. (The first 100 of 101 are listed.)", "paths": leak["paths"][:100]},
        fitting,
    ]


def test_warnings_of_one_code_become_one_with_each_path_once() -> None:
    first = [warning("duplicate_across_splits", "Copies.", ["a", "b"]), warning("small_validation", "Few.")]
    more = [warning("duplicate_across_splits", "Mirrored.", ["b", "c"]), warning("suspicious_labels", "Odd.", ["d"])]
    assert merged(first, more) == [
        warning("duplicate_across_splits", "Copies. Mirrored.", ["a", "b", "c"]),
        first[1],
        more[1],
    ]


def test_new_data_set_is_processing_with_nothing_counted(database: Database) -> None:
    row = found(database, created(database))
    assert (row.status, row.num_images, row.splits, row.classes) == (
        "processing",
        0,
        {"train": 0, "val": 0, "test": 0},
        [],
    )
    assert (row.error, row.id[:3]) == (None, "ds_")


def test_ready_data_set_shows_its_report(database: Database) -> None:
    dataset_id = created(database)
    with database.write() as session:
        catalog.mark_ready(session, dataset_id, REPORT)
    row = found(database, dataset_id)
    assert (row.status, row.num_images, row.num_rejected, row.error) == ("ready", 3, 1, None)
    assert (row.splits, row.classes, row.rejected, row.warnings) == (
        REPORT.splits,
        REPORT.classes,
        REPORT.rejected,
        REPORT.warnings,
    )


def test_failed_data_set_keeps_what_is_known(database: Database) -> None:
    with_report, without = created(database), created(database)
    with database.write() as session:
        catalog.state_size(session, with_report, 1000)
        catalog.state_size(session, without, 1000)
        assert workspaces.bytes_used(session) == 2 * (5 + 1000)
        catalog.mark_failed(session, with_report, ERROR, report=REPORT)
        catalog.mark_failed(session, without, ERROR)
    rows = found(database, with_report), found(database, without)
    assert [(row.status, row.error["code"] if row.error else None) for row in rows] == [
        ("failed", "too-few-images")
    ] * 2
    assert [(row.num_images, row.packed_bytes) for row in rows] == [(3, None), (0, None)]
    with database.read() as session:
        assert workspaces.bytes_used(session) == 2 * 5  # the archives


def test_data_set_ends_once(database: Database) -> None:
    dataset_id = created(database)
    with database.write() as session:
        catalog.mark_failed(session, dataset_id, ERROR)
    with pytest.raises(Conflict), database.write() as session:
        catalog.mark_ready(session, dataset_id, REPORT)
    with pytest.raises(Conflict), database.write() as session:
        catalog.mark_failed(session, "ds_none", ERROR)
    assert found(database, dataset_id).status == "failed"


def test_deleted_data_set_is_gone(database: Database) -> None:
    dataset_id = created(database)
    with database.write() as session:
        catalog.delete(session, dataset_id)
    with pytest.raises(NotFound):
        found(database, dataset_id)
    with pytest.raises(NotFound), database.write() as session:
        catalog.delete(session, dataset_id)


def test_pages_are_newest_first_and_meet(database: Database) -> None:
    ids = [created(database, str(i)) for i in range(5)]
    with database.write() as session:
        catalog.mark_ready(session, ids[1], REPORT)
    with database.read() as session:
        first = [row.id for row in catalog.list_datasets(session, limit=3)]
        second = [row.id for row in catalog.list_datasets(session, limit=3, after=first[-1])]
        ready = [row.id for row in catalog.list_datasets(session, limit=3, status="ready")]
        assert (first + second, ready) == (ids[::-1], [ids[1]])
        with pytest.raises(InvalidRequest):
            catalog.list_datasets(session, limit=3, after="ds_none")
