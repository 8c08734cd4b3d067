"""A model saved and loaded is the same model; one that is damaged is never served."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from app.errors import JobFailed, ModelUnavailable
from app.vision import artifact
from app.vision.artifact import MODEL_FILE, REFERENCE_FILE, WEIGHTS_FILE, Artifact
from app.vision.backbones import BACKBONES
from app.vision.classifier import Classifier
from app.vision.reference import Reference, unit

CLASSES = ["daisy", "Rose/red", "千日紅"]


def trained(*, feature_layer: str | None = None) -> Artifact:
    """A small network whose batch-norm statistics have moved, as training leaves them."""
    classifier = Classifier.new("mobilenet_v3_small", len(CLASSES), seed=0, feature_layer=feature_layer).train()
    with torch.no_grad():
        classifier(images())
    return Artifact(
        classifier=classifier,
        classes=CLASSES,
        preprocessing=BACKBONES["mobilenet_v3_small"].preprocessing.with_image_size(96),
        temperature=1.7,
        metadata={"method": "fine_tuning", "job": "job_1", "metrics": {"val_accuracy": 0.9}},
    )


def images() -> torch.Tensor:
    return torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("feature_layer", [None, "stage2", "all"])
def test_a_saved_model_comes_back_with_the_same_answers(tmp_path: Path, feature_layer: str | None) -> None:
    saved = trained(feature_layer=feature_layer)

    artifact.save(tmp_path / "model", saved)
    loaded = artifact.load(tmp_path / "model")

    with torch.inference_mode():
        assert torch.equal(loaded.classifier(images()), saved.classifier.eval()(images()))
    assert not loaded.classifier.training
    assert loaded.classifier.stage_names == saved.classifier.stage_names
    assert (loaded.classes, loaded.preprocessing) == (CLASSES, saved.preprocessing)
    assert (loaded.temperature, loaded.metadata) == (1.7, saved.metadata)


def test_a_model_that_reads_all_layers_of_one_that_was_cut_comes_back(tmp_path: Path) -> None:
    cut = trained(feature_layer="stage2")
    classifier = Classifier.from_earlier(cut.classifier, len(CLASSES), feature_layer="all", seed=1).eval()

    artifact.save(tmp_path / "model", replace(cut, classifier=classifier))
    loaded = artifact.load(tmp_path / "model").classifier

    assert (loaded.stage_names, loaded.feature_layer) == (("stem", "stage1", "stage2"), "all")
    with torch.inference_mode():
        assert torch.equal(loaded(images()), classifier(images()))


def test_saving_tells_size_and_digest_of_the_weights(tmp_path: Path) -> None:
    size_bytes, sha256 = artifact.save(tmp_path, trained())

    encoded = (tmp_path / WEIGHTS_FILE).read_bytes()
    assert size_bytes == len(encoded)
    assert sha256 == hashlib.sha256(encoded).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == [MODEL_FILE, WEIGHTS_FILE]


def test_weights_are_float32_whatever_they_were_trained_in(tmp_path: Path) -> None:
    model = trained()
    model.classifier.to(torch.bfloat16, memory_format=torch.channels_last)

    artifact.save(tmp_path, model)

    kinds = {t.dtype for t in safetensors.torch.load_file(tmp_path / WEIGHTS_FILE).values()}
    assert kinds == {torch.float32, torch.int64}
    assert artifact.load(tmp_path).classifier.head.weight.dtype == torch.float32


def test_a_loaded_model_can_be_trained_on(tmp_path: Path) -> None:
    artifact.save(tmp_path, trained())
    classifier = artifact.load(tmp_path).classifier.train()

    classifier(images()).sum().backward()

    assert all(p.grad is not None for p in classifier.parameters())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_diverged_model_is_not_saved(tmp_path: Path, poison: float) -> None:
    model = trained()
    with torch.no_grad():
        model.classifier.head.weight[0, 0] = poison

    with pytest.raises(JobFailed) as failure:
        artifact.save(tmp_path / "model", model)

    assert failure.value.code == "diverged"
    assert not (tmp_path / "model").exists()


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()


def without_description(folder: Path) -> None:
    (folder / MODEL_FILE).unlink()


def with_a_flipped_bit(folder: Path) -> None:
    encoded = bytearray((folder / WEIGHTS_FILE).read_bytes())
    encoded[-1] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(encoded)


def with_half_the_weights(folder: Path) -> None:
    encoded = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(encoded[: len(encoded) // 2])


def with_half_the_description(folder: Path) -> None:
    encoded = (folder / MODEL_FILE).read_bytes()
    (folder / MODEL_FILE).write_bytes(encoded[: len(encoded) // 2])


def edit_description(folder: Path, **changes: object) -> None:
    record = json.loads((folder / MODEL_FILE).read_text(encoding="utf-8"))
    (folder / MODEL_FILE).write_text(json.dumps(record | changes), encoding="utf-8")


def rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Other tensors, with the digest that fits them."""
    tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE)
    encoded = (folder / WEIGHTS_FILE).read_bytes()
    edit_description(folder, weights={"sha256": hashlib.sha256(encoded).hexdigest(), "size_bytes": len(encoded)})


def of_another_backbone(folder: Path) -> None:
    edit_description(folder, backbone="mobilenet_v3_large")


def of_an_unknown_backbone(folder: Path) -> None:
    edit_description(folder, backbone="resnet19")


def with_a_class_more(folder: Path) -> None:
    edit_description(folder, classes=[*CLASSES, "one more"])


def with_impossible_preprocessing(folder: Path) -> None:
    edit_description(folder, preprocessing={"resize": "x"})


def with_no_temperature(folder: Path) -> None:
    edit_description(folder, temperature=0)


def without_a_tensor(folder: Path) -> None:
    rewrite_weights(folder, lambda tensors: tensors.pop("head.bias"))


def with_a_strange_tensor(folder: Path) -> None:
    rewrite_weights(folder, lambda tensors: tensors.update(strange=torch.zeros(1)))


def in_half_precision(folder: Path) -> None:
    rewrite_weights(folder, lambda tensors: tensors.update({"head.bias": torch.zeros(3, dtype=torch.float16)}))


def with_nan(folder: Path) -> None:
    rewrite_weights(folder, lambda tensors: tensors.update({"head.bias": torch.full((3,), torch.nan)}))


@pytest.mark.parametrize(
    "damage",
    [
        without_weights,
        without_description,
        with_a_flipped_bit,
        with_half_the_weights,
        with_half_the_description,
        of_another_backbone,
        of_an_unknown_backbone,
        with_a_class_more,
        with_impossible_preprocessing,
        with_no_temperature,
        without_a_tensor,
        with_a_strange_tensor,
        in_half_precision,
        with_nan,
    ],
)
def test_a_damaged_model_is_unavailable(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    artifact.save(tmp_path, trained())
    damage(tmp_path)

    with pytest.raises(ModelUnavailable, match="This model cannot be loaded") as refusal:
        artifact.load(tmp_path)

    assert (refusal.value.status, refusal.value.code) == (503, "model-unavailable")
    assert str(tmp_path) not in refusal.value.detail


def test_a_model_of_a_later_format_says_so(tmp_path: Path) -> None:
    artifact.save(tmp_path, trained())
    edit_description(tmp_path, format_version=2)

    with pytest.raises(ModelUnavailable, match="later version of Graft"):
        artifact.load(tmp_path)


def with_reference(*, width: int = 1024) -> Artifact:
    random = np.random.default_rng(0)
    model = trained()
    model.reference = Reference.fit(
        random.random((5, width)),
        np.array([0, 1, 2, 0, 1]),
        [("img_0", "Rose/red/0.jpg"), None, *[(f"img_{i}", f"千日紅/{i}.jpg") for i in range(2, 5)]],
        held_out=random.random((30, width)),
        probability_of_true=[random.random(30)],
    )
    return model


def test_what_answers_are_held_against_comes_back_to_the_bit(tmp_path: Path) -> None:
    saved = with_reference()

    artifact.save(tmp_path, saved)
    loaded = artifact.load(tmp_path)

    before, after = saved.reference, loaded.reference
    assert before is not None
    assert after is not None
    assert np.array_equal(before.codes, after.codes)
    assert np.array_equal(before.labels, after.labels)
    assert before.lengths is not None
    assert np.array_equal(before.lengths, after.lengths)
    assert (before.novelty, list(before.images)) == (after.novelty, list(after.images))
    assert [errors.tolist() for errors in before.errors] == [errors.tolist() for errors in after.errors]
    record = json.loads((tmp_path / MODEL_FILE).read_bytes())["reference"]
    encoded = (tmp_path / REFERENCE_FILE).read_bytes()
    assert (record["size_bytes"], record["sha256"]) == (len(encoded), hashlib.sha256(encoded).hexdigest())


def test_a_model_of_an_earlier_version_has_none(tmp_path: Path) -> None:
    artifact.save(tmp_path, trained())
    record = json.loads((tmp_path / MODEL_FILE).read_bytes())
    del record["reference"]
    (tmp_path / MODEL_FILE).write_text(json.dumps(record))

    assert artifact.load(tmp_path).reference is None


def test_what_answers_are_held_against_stays_in_its_file(tmp_path: Path) -> None:
    """Mapped, so that many models take no more memory than there is."""
    artifact.save(tmp_path, with_reference())

    loaded = artifact.load(tmp_path).reference

    assert loaded is not None
    address = loaded.codes.__array_interface__["data"][0]
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    ends = {tuple(int(end, 16) for end in entry[0].split("-")): entry[-1] for entry in maps}
    (mapped,) = [path for (start, end), path in ends.items() if start <= address < end]
    assert mapped == str(tmp_path / REFERENCE_FILE)


def test_a_reference_of_an_earlier_version_has_its_features_in_half_precision(tmp_path: Path) -> None:
    saved = with_reference()
    artifact.save(tmp_path, saved)
    assert saved.reference is not None
    tensors = safetensors.torch.load_file(tmp_path / REFERENCE_FILE)
    features = unit(tensors.pop("codes").float().numpy())
    safetensors.torch.save_file(tensors | {"features": torch.from_numpy(features).half()}, tmp_path / REFERENCE_FILE)
    edit_description(tmp_path, reference=_as_it_is(tmp_path))

    loaded = artifact.load(tmp_path).reference

    assert loaded is not None
    assert loaded.similarities(features[3]) == pytest.approx(saved.reference.similarities(features[3]), abs=1e-3)


def _as_it_is(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / MODEL_FILE).read_bytes())["reference"]
    encoded = (folder / REFERENCE_FILE).read_bytes()
    return record | {"size_bytes": len(encoded), "sha256": hashlib.sha256(encoded).hexdigest()}


def test_a_reference_of_an_earlier_version_has_no_lengths(tmp_path: Path) -> None:
    model = with_reference()
    assert model.reference is not None
    model.reference = replace(model.reference, lengths=None)
    artifact.save(tmp_path, model)

    loaded = artifact.load(tmp_path).reference

    assert loaded is not None
    assert loaded.lengths is None


def without_the_file(folder: Path) -> None:
    (folder / REFERENCE_FILE).unlink()


def with_the_file_changed(folder: Path) -> None:
    encoded = bytearray((folder / REFERENCE_FILE).read_bytes())
    encoded[-1] ^= 1
    (folder / REFERENCE_FILE).write_bytes(encoded)


def of_fewer_images(folder: Path) -> None:
    record = json.loads((folder / MODEL_FILE).read_bytes())
    record["reference"]["images"].pop()
    (folder / MODEL_FILE).write_text(json.dumps(record))


@pytest.mark.parametrize("damage", [without_the_file, with_the_file_changed, of_fewer_images])
def test_a_model_with_a_damaged_reference_is_unavailable(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    artifact.save(tmp_path, with_reference())
    damage(tmp_path)

    with pytest.raises(ModelUnavailable, match="what its answers are held against"):
        artifact.load(tmp_path)


def test_a_reference_of_another_width_is_not_believed(tmp_path: Path) -> None:
    artifact.save(tmp_path, with_reference(width=512))

    with pytest.raises(ModelUnavailable, match="belongs to another model"):
        artifact.load(tmp_path)
