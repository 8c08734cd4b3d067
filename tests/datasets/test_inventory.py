"""What is kept of an archive while it is looked through: names, and tables where they are read, within one limit."""

import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from builders import class_folders, written, zip_of

from app.datasets.archive import ArchiveLimits
from app.datasets.inventory import inspect, take_inventory
from app.datasets.layout import Kind
from app.errors import TooLarge
from app.settings import MEBIBYTE, Settings
from app.vision.images import ImageLimits

SETTINGS = Settings(_env_file=None)
LIMITS = ArchiveLimits.from_settings(SETTINGS)
IMAGE_LIMITS = ImageLimits.from_settings(SETTINGS)

PICTURES = class_folders(16)


def test_tables_may_be_as_large_together_as_one_member_may_be(tmp_path: Path) -> None:
    member_bytes = max(len(content) for content in PICTURES.values())
    tables = {f"{name}/metadata.csv": bytes(member_bytes // 2) for name in ("cat", "dog")}
    limits = replace(LIMITS, max_member_bytes=member_bytes)
    enough = written(tmp_path / "enough", zip_of({**tables, **PICTURES}))
    too_much = written(tmp_path / "too_much", zip_of({**tables, "labels.csv": b"a,b", **PICTURES}))

    assert inspect(enough, limits=limits, image_limits=IMAGE_LIMITS).classes == ["cat", "dog"]
    with pytest.raises(TooLarge, match=r"tables .* larger together .*GRAFT_MAX_MEMBER_BYTES"):
        inspect(too_much, limits=limits, image_limits=IMAGE_LIMITS)


@pytest.mark.parametrize("kind", ["labelled", "unlabelled", "batch"])
def test_many_tables_take_no_more_memory_than_the_limit(tmp_path: Path, kind: Kind | str) -> None:
    tables = {f"{i}/labels.csv": bytes(4 * MEBIBYTE) for i in range(16)}
    packed = zip_of({**PICTURES, **tables}, compression=zipfile.ZIP_DEFLATED)
    archive = written(tmp_path / "archive", packed)
    limits = replace(LIMITS, max_member_bytes=8 * MEBIBYTE, max_compression_ratio=1e6)
    tracemalloc.start()
    try:
        if kind == "batch":
            found = take_inventory(archive, limits=limits, image_limits=IMAGE_LIMITS)
            assert len(found.files) == len(PICTURES)
        elif kind == "unlabelled":
            layout = inspect(archive, limits=limits, image_limits=IMAGE_LIMITS, kind="unlabelled")
            assert len(layout.pictures) == len(PICTURES)
            assert [rejected.path for rejected in layout.rejected] == list(tables)
        else:
            with pytest.raises(TooLarge):
                inspect(archive, limits=limits, image_limits=IMAGE_LIMITS)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < (24 if kind == "labelled" else 4) * MEBIBYTE
