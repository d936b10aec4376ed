"""Answers each request with its own body: what is left is TorchServe's front end and its worker protocol."""

from __future__ import annotations

from typing import Any


class Echo:
    """TorchServe's handler interface and nothing else."""

    def initialize(self, context: Any) -> None:
        """Nothing to load."""

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """One answer per request, in order."""
        return [bytes(row["body"]) for row in data]
