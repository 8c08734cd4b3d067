"""LitServe. It reads forms and JSON, no plain bodies."""

from typing import Any

import litserve
import torch
from _peer_model import BATCH, PORT, WAIT_SECONDS, WORKERS, Model
from fastapi import Request


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        self.model = Model()

    def decode_request(self, request: Request) -> bytes:
        content: bytes = request["file"].file.read()
        return content

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        return inputs

    def predict(self, batch: list[bytes]) -> list[dict[str, Any]]:
        return self.model.best(batch)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    api = Api(max_batch_size=BATCH, batch_timeout=WAIT_SECONDS)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=WORKERS)
    server.run(host="127.0.0.1", port=PORT, log_level="warning", generate_client_file=False)
