"""Two trees: errors of one request, each with the HTTP status its client gets, and errors of one command or worker,
each with its exit code and a remedy. Standard library only.

RequestError                     what the client did, or what this request ran into
├── MalformedRequest     400     empty body, broken JSON, unknown field, bad base64
├── PayloadTooLarge      413     more bytes or more instances than the spec allows
├── UnsupportedMedia     415     not an image of a supported format
├── UnprocessableInput   422     truncated, undecodable, too many pixels, bad top_k
├── InferenceFailed      500     the model failed on this input alone
└── OutOfMemory          503     one input alone does not fit the device's free memory

MarinaError                      a command or a worker cannot go on; `marina.errors` and `training.errors` hang theirs here
└── SpecError              5     model_spec.json is wrong, or does not fit the weights
"""

from __future__ import annotations

import json
from typing import ClassVar


class RequestError(Exception):
    """One request cannot be answered. The message reaches the client: no paths, no stack, no host names."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "request-error"
    title: ClassVar[str] = "Request error"

    def problem(self, instance: str) -> bytes:
        """The body of an RFC 9457 `application/problem+json` answer; `instance` is the request id."""
        return json.dumps(
            {
                "type": f"urn:marina:problem:{self.code}",
                "title": self.title,
                "status": self.status,
                "detail": str(self),
                "instance": instance,
            },
            ensure_ascii=False,
            separators=(",", ":"),
        ).encode()


class MalformedRequest(RequestError):
    status = 400
    code = "malformed-request"
    title = "Malformed request"


class PayloadTooLarge(RequestError):
    status = 413
    code = "payload-too-large"
    title = "Payload too large"


class UnsupportedMedia(RequestError):
    status = 415
    code = "unsupported-media-type"
    title = "Unsupported media type"


class UnprocessableInput(RequestError):
    status = 422
    code = "unprocessable-input"
    title = "Unprocessable input"


class InferenceFailed(RequestError):
    status = 500
    code = "inference-failed"
    title = "Inference failed"


class OutOfMemory(RequestError):
    status = 503
    code = "out-of-memory"
    title = "Out of memory"


class MarinaError(Exception):
    """What failed and where; `remedy` says what to do about it; `exit_code` is what the command line ends with."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


class SpecError(MarinaError):
    """`model_spec.json` is missing, malformed or of another schema; the message names the field."""

    exit_code = 5
