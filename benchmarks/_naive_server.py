"""The prediction endpoint that tutorials show, for serving.py to compare with: one picture, one forward pass."""

import io
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import uvicorn
from fastapi import Body, FastAPI
from PIL import Image
from torchvision import transforms

from app.storage import LocalStorage
from app.vision import artifact

storage = LocalStorage(Path(os.environ["GRAFT_DATA_DIR"]))
(folder,) = storage.path("models").iterdir()
model = artifact.load(folder)
preprocessing = model.preprocessing
prepare = transforms.Compose(
    [
        transforms.Resize(preprocessing.resize),
        transforms.CenterCrop(preprocessing.crop),
        transforms.ToTensor(),
        transforms.Normalize(preprocessing.mean, preprocessing.std),
    ]
)
app = FastAPI()


@app.post("/predict")
def predict(picture: Annotated[bytes, Body(media_type="image/jpeg")]) -> dict[str, Any]:
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    with torch.no_grad():
        scores = model.classifier(prepare(image)[None]).softmax(1)[0]
    best = scores.topk(5)
    return {
        "top": [
            {"label": model.classes[i], "score": score}
            for i, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
    }


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ["GRAFT_PORT"]), log_level="warning")
