"""The prediction endpoint that tutorials show, for serving.py to compare with: one picture, one forward pass."""

from typing import Annotated, Any

import uvicorn
from _peer_model import PORT, Model
from fastapi import Body, FastAPI

model = Model()
app = FastAPI()


@app.post("/predict")
def predict(picture: Annotated[bytes, Body(media_type="image/jpeg")]) -> dict[str, Any]:
    (answer,) = model.best([picture])
    return answer


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=PORT, log_level="warning")
