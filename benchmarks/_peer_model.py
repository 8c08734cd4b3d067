"""The same model behind other servers, for serving.py to compare with: what they all share.

Each framework gets dynamic batches of up to eight, a worker process per core and a torch thread in each, PIL and
torchvision's transforms, and eager torch in single precision, as its own documentation has it.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision import transforms

from app.storage import LocalStorage
from app.vision import artifact
from app.vision.device import usable_cores

PORT = int(os.environ["GRAFT_PORT"])
BATCH, WAIT_SECONDS = 8, 0.005
WORKERS = usable_cores()


class Model:
    """The default model; a picture's bytes to its best five."""

    def __init__(self) -> None:
        storage = LocalStorage(Path(os.environ["GRAFT_DATA_DIR"]))
        (folder,) = storage.path("models").iterdir()
        self._model = artifact.load(folder)
        preprocessing = self._model.preprocessing
        self._prepare = transforms.Compose(
            [
                transforms.Resize(preprocessing.resize),
                transforms.CenterCrop(preprocessing.crop),
                transforms.ToTensor(),
                transforms.Normalize(preprocessing.mean, preprocessing.std),
            ]
        )

    def best(self, pictures: Sequence[bytes]) -> list[dict[str, Any]]:
        images = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures]
        with torch.no_grad():
            scores = self._model.classifier(torch.stack([self._prepare(image) for image in images])).softmax(1)
        best = scores.topk(min(5, scores.shape[1]))
        return [
            {"top": [{"label": self._model.classes[i], "score": score} for i, score in zip(*row, strict=True)]}
            for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
