"""Where the project's folders are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from marina.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Home:
    """The project folder; everything that commands read or write by default lies below it."""

    root: Path

    @property
    def handlers(self) -> Path:
        return self.root / "handlers"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def store(self) -> Path:
        return self.root / "model_store"

    @property
    def config(self) -> Path:
        return self.root / "config.properties"


def find_home() -> Home:
    """MARINA_HOME when set, else the working directory when it is a Marina project, else the project this code is in.

    Raises ConfigError when MARINA_HOME is no project folder.
    """
    given = os.environ.get("MARINA_HOME")
    if given:
        root = Path(given).resolve()
        if not _is_project(root):
            raise ConfigError(
                f"MARINA_HOME is {root}, which holds no config.properties and handlers/",
                remedy="correct or unset MARINA_HOME",
            )
        return Home(root)
    here = Path.cwd()
    return Home(here if _is_project(here) else Path(__file__).resolve().parents[1])


def _is_project(root: Path) -> bool:
    return (root / "config.properties").is_file() and (root / "handlers" / "handlerlib").is_dir()
