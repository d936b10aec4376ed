"""A text in; out the most probable labels, every label above its threshold, or values, as the model's task is.

Request   the text as the body, `text/plain` with a `charset` or in UTF-8; or the form field `data` or `file`, in UTF-8;
          or JSON `{"instances": ["...", {"text": "..."}, {"b64": "..."}], "top_k": 3}`
Answer    `{"model", "version", "predictions": [[{"label", "index", "probability"}, ...]]}`, one list per text;
          of a multi-label model or a regression as `image_classifier` has it (see `handlerlib.answers`)
Errors    `application/problem+json` with status 400, 413, 415 or 422, for the one request alone
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from handlerlib import inputs, payload, text
from handlerlib.text_payload import TEXT
from handlerlib.worker import Headers, ModelHandler


class TextClassifier(ModelHandler):
    """TorchServe takes the only class of this module."""

    decodes_in_threads = False

    def parse(self, row: Mapping[str, Any], headers: Headers) -> payload.Request:
        """As the base class, for texts."""
        return payload.parse(row, headers, self.model.spec.limits, TEXT)

    def decode(self, data: bytes | bytearray) -> Tensor:
        """UTF-8 -> the numbers of its terms, int32 `[terms]`. Raises RequestError."""
        return self._inputs.load(data)

    def to_batch(self, items: Sequence[Tensor]) -> Tensor:
        """int32 `[terms]` each -> int32 `[B, terms of the longest]`, filled up with 0."""
        return text.stack(items)

    @cached_property
    def _inputs(self) -> inputs.Inputs:
        return inputs.of(self.model.spec)
