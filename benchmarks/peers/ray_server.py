"""Ray Serve, as its PyTorch tutorial has it (an `async __call__` that reads the body).

documented: `@serve.deployment` without options.
optimised:  replicas, `@serve.batch` and a queue per replica that is deep enough to fill batches.
"""

from __future__ import annotations

import os
import time

import ray
from ray import serve
from starlette.requests import Request

from benchmarks.peers.settings import Settings
from benchmarks.pipeline import Answer

settings = Settings.read()


@serve.deployment
class ImageModel:
    def __init__(self) -> None:
        self.classifier = settings.classifier()

    async def __call__(self, request: Request) -> Answer:
        return self.classifier.classify([self.classifier.decode(await request.body())])[0]


@serve.deployment(
    num_replicas=settings.workers,
    max_ongoing_requests=4 * settings.batch,
    ray_actor_options={"num_cpus": (os.cpu_count() or 1) / (2 * settings.workers)},
)
class BatchedModel:
    def __init__(self) -> None:
        self.classifier = settings.classifier()

    @serve.batch(max_batch_size=settings.batch, batch_wait_timeout_s=0.001)
    async def classify(self, bodies: list[bytes]) -> list[Answer]:
        return self.classifier.classify([self.classifier.decode(body) for body in bodies])

    async def __call__(self, request: Request) -> Answer:
        return await self.classify(await request.body())


if __name__ == "__main__":
    ray.init(include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    serve.start(http_options={"host": "127.0.0.1", "port": settings.port})
    serve.run((BatchedModel if settings.optimised else ImageModel).bind(), route_prefix="/predict")
    while True:
        time.sleep(60)
