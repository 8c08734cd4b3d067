"""Jobs of every method on a GPU: to their end, given back and gone on with, and as on a CPU within rounding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_jobs import DATASET, Job, act_after_steps, write_dataset

from app.datasets.ingest import ensure_packed, manifest_key
from app.datasets.manifest import Manifest
from app.db.engine import Database
from app.settings import Settings
from app.storage import LocalStorage
from app.vision import artifact
from app.vision.preprocessing import eval_pixels, normalise
from app.vision.weights import WeightStore
from worker.reporter import ShuttingDown

START = {"backbone": "graft_small", "recipe": "modern"}


@pytest.fixture
def job(database: Database, storage: LocalStorage, tmp_path: Path, cuda: torch.device) -> Callable[..., Job]:
    write_dataset(storage, val=27)

    def make(*, device: str = cuda.type, **body: Any) -> Job:
        settings = Settings(data_dir=tmp_path / "storage", device=device, allow_downloads=False)
        weights = {"graft_small": WeightStore.from_settings(settings).expected("graft_small").name}
        return Job(database, storage, settings, weights=weights, promote="never", **(START | body))

    return make


@pytest.mark.parametrize(
    ("method", "body"),
    [
        ("from_scratch", {"recipe": "classic"}),
        ("from_scratch", {}),
        ("feature_extraction", {"recipe": "classic"}),
        ("fine_tuning", {"hyperparameters": {"epochs": 9}}),
        ("full_fine_tuning", {"hyperparameters": {"epochs": 9, "augmentation": "strong", "mixup": 0.2}}),
        ("self_supervised", {"hyperparameters": {"epochs": 9, "batch_size": 16}}),
        ("auto", {"hyperparameters": {"epochs": 4}}),
    ],
)
def test_a_job_of_each_method_ends_with_a_model(
    job: Callable[..., Job], storage: LocalStorage, method: str, body: dict[str, Any]
) -> None:
    done = job(method=method, **body)
    done.run()
    assert done.row.status == "succeeded", done.messages
    assert not any("cannot be recorded" in message for message in done.messages)
    if method == "self_supervised":
        return
    if method != "auto":  # its winner may be a head that was solved for
        assert any("; cuda, bf16." in message for message in done.messages), done.messages
    assert done.row.metrics is not None
    told = done.row.metrics["val_accuracy"]
    assert told == pytest.approx(accuracy_on_cpu(storage, str(done.row.model_id)), abs=1.01 / 27)  # bf16
    assert method == "from_scratch" or body.get("recipe") == "classic" or told > 0.9


def accuracy_on_cpu(storage: LocalStorage, model_id: str) -> float:
    """Of the model that was saved, on the validation pictures."""
    loaded = artifact.load(storage.path(f"models/{model_id}"))
    manifest = Manifest.read(storage.path(manifest_key(DATASET)))
    images = ensure_packed(storage, DATASET, 256, tick=lambda _share: None)
    indices = manifest.indices("val")
    pixels = torch.stack([eval_pixels(images[int(i)], loaded.preprocessing) for i in indices])
    with torch.inference_mode():
        predicted = loaded.classifier.eval()(normalise(pixels, loaded.preprocessing)).argmax(1).numpy()
    return float((predicted == manifest.labels[indices]).mean())


def test_a_job_given_back_within_an_epoch_ends_as_one_that_was_not(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.training.loop.TICK_SECONDS", 0.0)
    monkeypatch.setattr("worker.reporter.WRITE_INTERVAL_SECONDS", 0.0)
    body = {"method": "full_fine_tuning", "hyperparameters": {"epochs": 8}}
    undisturbed = job(**body)
    undisturbed.run()
    disturbed = job(**body)
    with monkeypatch.context() as once:
        act_after_steps(once, 14, disturbed.shutdown.set)
        with pytest.raises(ShuttingDown):
            disturbed.run()
    disturbed.give_back()
    disturbed.run()
    assert any("Going on from epoch 4, step 2." in message for message in disturbed.messages), disturbed.messages
    ours, theirs = disturbed.weights(), undisturbed.weights()
    for name, tensor in theirs.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(ours[name], tensor, rtol=0.05, atol=0.02)


def test_a_head_on_frozen_features_is_the_one_that_a_cpu_finds(job: Callable[..., Job]) -> None:
    found = {}
    for device in ("cuda", "cpu"):
        done = job(method="feature_extraction", device=device)
        done.run()
        assert done.row.metrics is not None
        found[device] = done.row.metrics["val_accuracy"], done.row.metrics["val_loss"]
    assert found["cuda"] == pytest.approx(found["cpu"], abs=0.05)
