"""BentoML, started with `bentoml serve benchmarks.peers.bentoml_server:Classifier`.

documented: a service whose API takes a `PIL.Image.Image`.
optimised:  workers, and an adaptively batched API over raw files with Marina's model.
"""

from __future__ import annotations

from pathlib import Path

import bentoml
from PIL.Image import Image

from benchmarks.peers.settings import Settings
from benchmarks.pipeline import Answer

settings = Settings.read()

if settings.optimised:

    @bentoml.service(workers=settings.workers, traffic={"timeout": 60})
    class Classifier:
        def __init__(self) -> None:
            self.classifier = settings.classifier()

        @bentoml.api(batchable=True, max_batch_size=settings.batch, max_latency_ms=60_000)
        def classify(self, images: list[Path]) -> list[Answer]:
            return self.classifier.classify([self.classifier.decode(image.read_bytes()) for image in images])

else:

    @bentoml.service
    class Classifier:
        def __init__(self) -> None:
            self.classifier = settings.classifier()

        @bentoml.api
        def classify(self, image: Image) -> Answer:
            # BentoML has opened the file; the rest is the tutorial's: transform, stack, forward, softmax.
            tensor = self.classifier.transform(image.convert("RGB"))
            return self.classifier.classify([tensor])[0]
