"""PyTriton: an inference callable bound to a Triton Inference Server, encoded photos as bytes.

documented: `triton.bind` with `@batch` and the default ModelConfig.
optimised:  several instances of the callable, batches of the given size.
"""

from __future__ import annotations

import json

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from benchmarks.peers.settings import Settings

settings = Settings.read()


class Instance:
    """One copy of the model; each is called from a thread of its own."""

    def __init__(self) -> None:
        self.classifier = settings.classifier()

    @batch
    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        answers = self.classifier.classify([self.classifier.decode(row[0]) for row in image])
        return {"answer": np.array([[json.dumps(answer).encode()] for answer in answers], dtype=object)}


if __name__ == "__main__":
    found = TritonConfig(
        http_port=settings.port,
        http_address="127.0.0.1",
        allow_grpc=False,
        allow_metrics=False,
    )
    with Triton(config=found) as triton:
        triton.bind(
            model_name="classifier",
            infer_func=[Instance() for _ in range(settings.workers)] if settings.optimised else Instance(),
            inputs=[Tensor(name="image", dtype=np.bytes_, shape=(1,))],
            outputs=[Tensor(name="answer", dtype=np.bytes_, shape=(1,))],
            config=ModelConfig(max_batch_size=settings.batch, batcher=DynamicBatcher(max_queue_delay_microseconds=1000))
            if settings.optimised
            else ModelConfig(),
        )
        triton.serve()
