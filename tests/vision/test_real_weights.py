"""Real weights on real pictures: a wrong class order, colour order or normalisation would show at once."""

import zipfile
from pathlib import Path

import pytest
import torch
import torchvision.models

from app.settings import Settings
from app.vision import images
from app.vision.images import ImageLimits
from app.vision.preprocessing import eval_pixels, normalise
from app.vision.weights import WeightStore


@pytest.mark.parametrize(
    ("name", "top1"), [("mobilenet_v2", 0.80), ("mobilenet_v3_small", 0.70), ("squeezenet1_1", 0.54)]
)
def test_imagenet_pictures_are_recognised_as_often_as_was_measured(
    shared_data: Path, shared_weights: Path, tmp_path: Path, name: str, top1: float
) -> None:
    settings = Settings(weights_dir=shared_weights, data_dir=tmp_path, allow_downloads=False)
    store = WeightStore.from_settings(settings)
    found = store.obtain(name)
    network = torchvision.models.get_model(name, weights=None).eval()
    network.load_state_dict(store.load(found))
    preprocessing = found.weights.preprocessing
    limits = ImageLimits.from_settings(settings)
    pixels, labels = [], []
    with zipfile.ZipFile(shared_data / "imagenet_check.zip") as archive:
        for member in (m for m in archive.namelist() if not m.endswith("/")):
            decoded = images.decode(archive.read(member), side=preprocessing.side, limits=limits)
            pixels.append(eval_pixels(decoded, preprocessing))
            labels.append(int(member.split("/")[-2].split("_")[0]))

    with torch.inference_mode():
        predicted = torch.cat([network(normalise(b, preprocessing)).argmax(1) for b in torch.stack(pixels).split(25)])

    accuracy = (predicted == torch.tensor(labels)).float().mean().item()
    assert len(labels) == 100
    assert accuracy == pytest.approx(top1, abs=0.03)
