"""MLServer: a custom runtime, started with `mlserver start FOLDER` on the two settings files that `settings_files` makes.

documented: base64 in V2's JSON, no batching, the default of one parallel worker.
optimised:  adaptive batching in front of as many parallel workers as asked for (0 workers: in the server's own process).
"""

from __future__ import annotations

import base64
import json
from typing import Any

from mlserver import MLModel
from mlserver.codecs import StringCodec
from mlserver.types import InferenceRequest, InferenceResponse

from benchmarks.peers.settings import Settings


class Classifier(MLModel):
    """One input `image` of base64 strings, one output `answer` of JSON strings."""

    async def load(self) -> bool:
        self.classifier = Settings.read().classifier()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        # Adaptive batching joins the requests' inputs along the first axis, and splits the outputs the same way.
        encoded = [item for tensor in payload.inputs for item in _items(tensor.data)]
        answers = self.classifier.classify([self.classifier.decode(base64.b64decode(item)) for item in encoded])
        output = StringCodec.encode_output("answer", [json.dumps(answer) for answer in answers])
        return InferenceResponse(model_name=self.name, outputs=[output])


def _items(data: Any) -> list[Any]:
    found = getattr(data, "root", data)
    return list(found) if isinstance(found, list | tuple) else [found]
