"""How the comparison tells a peer's server what to run: environment variables, read in every process of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from benchmarks.pipeline import Classifier, Documented, Optimised

_PREFIX = "BENCH_"


@dataclass(frozen=True, slots=True)
class Settings:
    """One server's layout. `documented` ignores workers, threads and batch: there each system's own defaults hold."""

    model: Path
    form: str
    """`documented` or `optimised`."""
    port: int
    workers: int
    threads: int
    batch: int
    device: str

    @classmethod
    def read(cls) -> Self:
        """From BENCH_* variables."""
        value = {name: os.environ[_PREFIX + name.upper()] for name in cls.__slots__}
        return cls(
            model=Path(value["model"]),
            form=value["form"],
            port=int(value["port"]),
            workers=int(value["workers"]),
            threads=int(value["threads"]),
            batch=int(value["batch"]),
            device=value["device"],
        )

    def environment(self) -> dict[str, str]:
        """What `read` reads."""
        return {_PREFIX + name.upper(): str(getattr(self, name)) for name in self.__slots__}

    @property
    def optimised(self) -> bool:
        return self.form == "optimised"

    def classifier(self) -> Classifier:
        """The model in this form, warmed up where the documented form would not be."""
        if not self.optimised:
            return Documented(self.model, self.device)
        found = Optimised.load(self.model, self.threads, self.device)
        found.warm_up([*range(1, self.batch + 1)])
        return found
