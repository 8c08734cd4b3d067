"""BentoML. What is batched comes in lists, of one picture here."""

from pathlib import Path
from typing import Annotated, Any

import bentoml
import torch
from _peer_model import BATCH, PORT, WORKERS, Model
from bentoml.validators import ContentType


@bentoml.service(workers=WORKERS, traffic={"timeout": 60, "max_concurrency": 1000})
class Peer:
    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model = Model()

    @bentoml.api(batchable=True, max_batch_size=BATCH, max_latency_ms=60_000, route="/predict")
    def predict(self, file: list[Annotated[Path, ContentType("image/jpeg")]]) -> list[dict[str, Any]]:
        return self.model.best([each.read_bytes() for each in file])


if __name__ == "__main__":
    Peer.serve_http(host="127.0.0.1", port=PORT)
