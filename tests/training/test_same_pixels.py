"""Training without augmentation, validation and serving see the same bytes of the same encoded pictures."""

import asyncio
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from builders import class_folders, encoded, jpeg, picture, written, zip_of
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from app.datasets.ingest import IngestLimits, IngestOptions, archive_key, ensure_packed, ingest, manifest_key
from app.datasets.manifest import Manifest
from app.serving.engines import TorchEngine
from app.serving.predictor import Predictor
from app.settings import Settings
from app.storage import LocalStorage
from app.vision import artifact
from app.vision.artifact import Artifact
from app.vision.classifier import Classifier
from app.vision.decoding import Decoders
from app.vision.preprocessing import Preprocessing, eval_pixels, normalise
from worker.training.loop import predict_logits
from worker.training.pixels import CPU, PixelSource, Split, training_batches

LIMITS = IngestLimits.from_settings(Settings(_env_file=None))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def rotated_jpeg(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(orientation, size=(700, 420)), "JPEG", exif=exif.tobytes())


def deep_png() -> bytes:
    ramp: NDArray[np.uint16] = (np.arange(90 * 300).reshape(90, 300) * 2).astype(np.uint16)
    return encoded(Image.fromarray(ramp))


def see_through() -> Image.Image:
    alpha = Image.fromarray(np.tile(np.arange(300) * 255 // 299, (280, 1)).astype(np.uint8))
    image = Image.fromarray(picture(40, size=(300, 280)))
    image.putalpha(alpha)
    return image


def palette() -> Image.Image:
    return Image.fromarray(picture(50, size=(520, 300))).quantize(32)


FILES = class_folders(2) | {
    **{f"cat/turned-{orientation}.jpg": rotated_jpeg(orientation) for orientation in range(1, 9)},
    "cat/large.jpg": jpeg(60, size=(1600, 1100)),
    "cat/point.png": encoded(picture(61, size=(1, 1))),
    "dog/16-bit.png": deep_png(),
    "dog/palette.png": encoded(palette()),
    "dog/palette-see-through.png": encoded(palette(), transparency=3),
    "dog/alpha.png": encoded(see_through()),
    "dog/alpha.webp": encoded(see_through(), "WEBP", lossless=True),
    "dog/grey.png": encoded(Image.fromarray(picture(62, size=(333, 270))).convert("L")),
    "dog/ink.jpg": encoded(Image.fromarray(picture(63, size=(333, 270))).convert("CMYK"), "JPEG"),
}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (40, 32), (342, 300)])
def test_training_validation_and_serving_see_the_same_bytes(
    storage: LocalStorage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    resize: int,
    crop: int,
    interpolation: Literal["bilinear", "bicubic"],
) -> None:
    preprocessing = Preprocessing(resize, crop, MEAN, STD, interpolation)
    report = ingest(
        written(storage.path(archive_key("ds")), zip_of(FILES)),
        storage=storage,
        dataset_id="ds",
        options=IngestOptions(val_fraction=0.2, seed=0),
        limits=LIMITS,
        tick=lambda _fraction: None,
    )
    assert report.num_rejected == 0
    manifest = Manifest.read(storage.path(manifest_key("ds")))
    images = ensure_packed(storage, "ds", preprocessing.side, tick=lambda _fraction: None)
    every = Split(images, np.arange(len(images)), np.arange(len(images), dtype=np.int64))
    paths = [record.path for record in manifest.records]

    trained = trained_on(every, preprocessing)
    validated = validated_on(every, preprocessing)
    served = served_on([FILES[path] for path in paths], preprocessing, tmp_path, monkeypatch)

    for path, first, second, third in zip(paths, trained, validated, served, strict=True):
        assert first.shape == (3, crop, crop), path
        assert torch.equal(first, second), path
        assert torch.equal(first, third), path


def trained_on(split: Split, preprocessing: Preprocessing) -> list[Tensor]:
    """Each picture as an epoch without augmentation trains on it; labels are the places in the split."""
    seen: dict[int, Tensor] = {}
    source = PixelSource(split, None, lambda pixels: eval_pixels(pixels, preprocessing))
    for batch in training_batches(source, batch_size=4, seed=0, epoch=0, first_step=0):
        seen |= dict(zip(batch.labels.tolist(), batch.inputs, strict=True))
    return [seen[i] for i in range(len(split))]


def validated_on(split: Split, preprocessing: Preprocessing) -> list[Tensor]:
    seen: list[Tensor] = []

    def noted(batch: Tensor) -> Tensor:
        seen.extend(batch.clone())
        return normalise(batch, preprocessing)

    predict_logits(
        torch.nn.Flatten(),
        PixelSource(split, None, lambda pixels: eval_pixels(pixels, preprocessing)),
        normalise=noted,
        device=CPU,
    )
    return seen


def served_on(
    pictures: list[bytes], preprocessing: Preprocessing, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Tensor]:
    classifier = Classifier.new("squeezenet1_1", 2, seed=0).eval()
    storage = LocalStorage(folder)
    artifact.save(storage.path("models/model"), Artifact(classifier, ["x", "y"], preprocessing, temperature=1.0))
    seen: list[Tensor] = []

    features = TorchEngine.features

    def noting(network: TorchEngine, pixels: Tensor) -> Tensor:
        seen.extend(pixels.clone())
        return features(network, pixels)

    async def story() -> None:
        predictor = Predictor(
            storage=storage,
            device=CPU,
            decoders=Decoders.trusting(LIMITS.images),
            max_loaded_bytes=10**9,
            max_pending=100,
            timeout_seconds=60,
            engine_policy="torch",
        )
        try:
            model = await predictor.predict(
                await predictor.load("model"), pictures[:1]
            )  # its warm-up passes through `features` too
            assert len(model) == 1
            monkeypatch.setattr(TorchEngine, "features", noting)
            for picture in pictures:  # one after the other: of one request, those go first that are decoded first
                await predictor.predict(await predictor.load("model"), [picture])
        finally:
            predictor.close()

    asyncio.run(story())
    return seen
