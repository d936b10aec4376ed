"""An encoded image in; out the most probable labels, every label above its threshold, or values, as the model's task is.

Request   the image's bytes; or the form field `data` or `file`; or JSON `{"instances": [{"b64": "..."}], "top_k": 3}`
Answer    `{"model", "version", "predictions": [[{"label", "index", "probability"}, ...]]}`, one list per image;
          of a multi-label model with `"task"` and each label's `"threshold"`, an empty list where no label reaches its own;
          of a regression with `"task"` and `{"target", "index", "value"}` for every target (see `handlerlib.answers`)
Errors    `application/problem+json` with status 400, 413, 415 or 422, for the one request alone
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from handlerlib import imaging, payload
from handlerlib.worker import Headers, ModelHandler


class ImageClassifier(ModelHandler):
    """TorchServe takes the only class of this module."""

    def parse(self, row: Mapping[str, Any], headers: Headers) -> payload.Request:
        """As the base class, and no more pixels in one request than are decoded in good time."""
        request = super().parse(row, headers)
        imaging.check_together(request.instances, self.model.spec.preprocess, self.model.spec.limits)
        return request

    def decode(self, data: bytes | bytearray) -> Tensor:
        """Encoded image -> uint8 `[C, height, width]`. Raises RequestError."""
        spec = self.model.spec
        return imaging.load(data, spec.preprocess, spec.limits)

    def to_batch(self, items: Sequence[Tensor]) -> Tensor:
        """uint8 `[C, H, W]` each -> uint8 `[B, C, H, W]`; the engine normalises."""
        return imaging.stack(items)
