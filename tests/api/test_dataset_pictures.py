"""A model's own data set, as the server looks at it: in the size that the model was trained on."""

from pathlib import Path

import builders
import numpy as np
import pytest

from app.api.dataset_pictures import training_pictures, validation_of
from app.datasets.ingest import IngestLimits, IngestOptions, ensure_packed, ingest, manifest_key, packed_key
from app.datasets.manifest import Manifest
from app.settings import Settings
from app.storage import LocalStorage
from app.vision import artifact
from app.vision.artifact import Artifact
from app.vision.classifier import Classifier
from app.vision.preprocessing import Preprocessing

DATASET, MODEL = "ds_1", "mdl_1"
LARGE = Preprocessing(320, 288, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bilinear")
LIMITS = IngestLimits.from_settings(Settings(_env_file=None))


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    """A data set of pictures of 500 by 450 pixels, and a model that was trained on them with short sides of 320."""
    storage = LocalStorage(tmp_path / "data")
    files = {
        f"{name}/{i}.jpg": builders.jpeg(seed + i, size=(500, 450))
        for seed, name in ((0, "a"), (50, "b"))
        for i in range(8)
    }
    archive = tmp_path / "archive.zip"
    archive.write_bytes(builders.zip_of(files))
    with storage.staging() as staged:
        staged.write_bytes(archive.read_bytes())
        storage.publish(staged, f"datasets/{DATASET}/archive")
    report = ingest(
        archive,
        storage=storage,
        dataset_id=DATASET,
        options=IngestOptions(val_fraction=0.5, seed=0),
        limits=LIMITS,
        tick=lambda _share: None,
    )
    assert report.error is None
    keep_model(storage)
    ensure_packed(storage, DATASET, LARGE.side, tick=lambda _share: None)
    return storage


def keep_model(storage: LocalStorage, model_id: str = MODEL, **metadata: object) -> None:
    classifier = Classifier.new("squeezenet1_1", 2, seed=0).eval()
    made = Artifact(classifier, ["a", "b"], LARGE, temperature=1.0, metadata={"dataset": DATASET, **metadata})
    with storage.staging() as staged:
        artifact.save(staged, made)
        storage.publish(staged, f"models/{model_id}")


def test_pictures_are_as_large_as_the_model_was_trained_on_and_serves(storage: LocalStorage) -> None:
    found = validation_of(MODEL, storage)
    assert found is not None
    assert LARGE.side == 384
    assert {min(picture.shape[:2]) for picture in found.pictures} == {384}
    manifest = Manifest.read(storage.path(manifest_key(DATASET)))
    wanted = [manifest.records[i].image_id for i in manifest.indices("train").tolist()]
    for picture in training_pictures(DATASET, wanted, storage, side=LARGE.side):
        assert picture is not None
        assert min(picture.shape[:2]) == 384


def test_where_the_large_ones_are_gone_those_of_ingest_are_looked_at(storage: LocalStorage) -> None:
    storage.delete(packed_key(DATASET, LARGE.side))
    found = validation_of(MODEL, storage)
    assert found is not None
    assert {min(picture.shape[:2]) for picture in found.pictures} == {256}


def test_what_a_model_has_learnt_since_is_not_held_out_any_more(storage: LocalStorage) -> None:
    manifest = Manifest.read(storage.path(manifest_key(DATASET)))
    held_out = manifest.indices("val").tolist()
    digests = [manifest.records[i].digest for i in held_out]
    keep_model(storage, "mdl_2", shots=digests[:3])

    found = validation_of("mdl_2", storage, without=digests[3:4])
    assert found is not None
    assert [image for image, _ in found.images] == [manifest.records[i].image_id for i in held_out[4:]]
    assert np.array_equal(found.labels.reshape(-1), manifest.labels[held_out[4:]])
    assert validation_of("mdl_2", storage, without=digests) is None
