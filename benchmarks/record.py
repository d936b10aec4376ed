"""The results of one run as one JSON file, written after every measurement, and taken up again by a resumed run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError

SCHEMA = 1
LISTS = ("visits", "limits", "echo", "text", "growth", "done")


class Record:
    """A mapping of what was found. `identity` says which machine, boot, profile, model and photos it belongs to."""

    def __init__(self, path: Path, identity: dict[str, Any], value: dict[str, Any]) -> None:
        self.path = path
        self.identity = identity
        self.value = value

    @classmethod
    def start(cls, path: Path, identity: dict[str, Any]) -> Record:
        """A new, empty one."""
        empty: dict[str, Any] = {name: [] for name in LISTS} | {"unavailable": {}, "layouts": {}, "versions": {}}
        return cls(path, identity, {"schema": SCHEMA, "identity": identity} | empty)

    @classmethod
    def resume(cls, path: Path, identity: dict[str, Any]) -> Record:
        """The one in `path`. Raises BenchmarkError when there is none or it was measured under other conditions."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise BenchmarkError(f"{path} cannot be resumed: {error}", remedy="run without --resume") from error
        for name, wanted in identity.items():
            found = value.get("identity", {}).get(name)
            if found != wanted:
                raise BenchmarkError(
                    f"{path} was measured with another {name} ({found!r}, now {wanted!r}): figures of the two cannot be "
                    "compared",
                    remedy="run without --resume",
                )
        return cls(path, identity, value)

    def done(self, key: str) -> bool:
        """Whether a task was carried out, well or not."""
        return key in self.value["done"]

    def finish(self, key: str) -> None:
        """Note a task as carried out, and save."""
        self.value["done"].append(key)
        self.save()

    def save(self) -> None:
        """Write the file through a temporary one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        partial.write_text(json.dumps(self.value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(self.path)
