"""What a check of the doctor says. Standard library only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["fault", "warning"]
"""fault: requests fail, or would after the next start. warning: they are in danger, or slower than they could be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Repair:
    """Something that is safe to do without asking: it loses nothing and stops nothing."""

    what: str
    """In the imperative, e.g. `close secrets/inference.key to other users`."""
    run: Callable[[], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One cause with its remedy."""

    code: str
    """A stable name, one of `CODES`."""
    cause: str
    """What is wrong and where, one sentence."""
    remedy: str
    """What to do about it."""
    evidence: str = ""
    """The line or figure that shows it."""
    severity: Severity = "fault"
    repair: Repair | None = None

    @property
    def exit_code(self) -> int:
        """What a command that met this fault would end with."""
        return CODES[self.code]


CODES: dict[str, int] = {
    "java-missing": 6,
    "java-too-old": 6,
    "torchserve-missing": 6,
    "python-module-missing": 6,
    "shared-library-missing": 6,
    "configuration": 3,
    "public-address": 3,
    "port-taken": 6,
    "disk-full": 6,
    "temp-folder-full": 6,
    "temp-folder-unusable": 6,
    "socket-path-too-long": 6,
    "file-permissions": 6,
    "too-few-file-descriptors": 6,
    "host-memory": 6,
    "java-memory": 6,
    "gpu-memory": 6,
    "gpu-missing": 6,
    "gpu-driver": 6,
    "gpu-visibility": 6,
    "gpu-error": 6,
    "keys": 3,
    "store-empty": 5,
    "model-not-in-store": 5,
    "archive-not-indexed": 5,
    "archive-corrupt": 5,
    "archive-tampered": 5,
    "index-damaged": 5,
    "engine-elsewhere": 5,
    "model-refused": 5,
    "version-clash": 5,
    "workers-min-max": 5,
    "batch-delay": 5,
    "implicit-timeout": 5,
    "queue-too-small": 5,
    "model-configuration": 5,
    "handler-import": 5,
    "handler-error": 5,
    "load-timeout": 6,
    "answer-timeout": 6,
    "response-too-large": 6,
    "request-too-large": 7,
    "tokens": 7,
    "queue-full": 7,
    "worker-killed": 6,
    "worker-dead": 6,
    "server-down": 7,
    "server-not-ready": 7,
    "gateway-down": 7,
    "trial-left": 7,
    "log-partly-read": 3,
    "check-failed": 6,
}
"""Code -> exit code, by the meaning that exit codes have everywhere in Marina."""
