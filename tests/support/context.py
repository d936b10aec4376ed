"""TorchServe's own context and a handler on it, without Java: what a worker process holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ts.context import Context, RequestProcessor

from handlerlib.worker import ModelHandler


@dataclass(frozen=True, slots=True)
class Reply:
    """What one client would get."""

    status: int
    content_type: str | None
    body: bytes


def context(folder: Path, *, batch_size: int = 8, config: Mapping[str, Any] | None = None) -> Context:
    """A context as TorchServe makes it for a CPU worker."""
    return Context("tiny", str(folder), {}, batch_size, None, "0.12.0", True, None, dict(config or {"minWorkers": 1}))


def ask(
    handler: ModelHandler, ctx: Context, rows: Sequence[dict[str, Any]], headers: Mapping[str, str] | None = None
) -> list[Reply]:
    """One batch through `handle`, every request with the same headers."""
    ctx.request_ids = {index: f"request-{index}" for index in range(len(rows))}
    ctx.request_processor = [RequestProcessor(dict(headers or {})) for _ in rows]
    bodies = handler.handle(rows, ctx)
    assert len(bodies) == len(rows)
    return [
        Reply(ctx.get_response_status(index)[0], ctx.get_response_content_type(index), body)
        for index, body in enumerate(bodies)
    ]
