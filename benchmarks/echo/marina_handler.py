"""The same echo behind the worker protocol that Marina's own handlers use."""

from __future__ import annotations

from typing import Any

from handlerlib import protocol


class Echo:
    """TorchServe's handler interface and nothing else."""

    def initialize(self, context: Any) -> None:
        """Nothing to load."""
        protocol.speed_up(context)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """One answer per request, in order."""
        return [bytes(row["body"]) for row in data]
