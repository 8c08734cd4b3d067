"""Ray Serve."""

import signal
import threading
from typing import Any

import ray
import torch
from _peer_model import BATCH, PORT, WAIT_SECONDS, WORKERS, Model
from ray import serve
from starlette.requests import Request


@serve.deployment(num_replicas=WORKERS, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.5})
class Peer:
    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model = Model()

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=WAIT_SECONDS)
    async def best(self, pictures: list[bytes]) -> list[dict[str, Any]]:
        return self.model.best(pictures)

    async def __call__(self, request: Request) -> dict[str, Any]:
        answer: dict[str, Any] = await self.best(await request.body())
        return answer


if __name__ == "__main__":
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, logging_level="error")
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(Peer.bind(), route_prefix="/predict")
    stopped.wait()
    ray.shutdown()
