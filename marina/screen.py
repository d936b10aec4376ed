"""What a command shows: tables and sentences for people, or with --json one object for programs, never both on stdout."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TextIO

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from handlerlib.errors import MarinaError

LOG_LINES = 15
PLAIN_WIDTH = 160


@dataclass(frozen=True, slots=True)
class Screen:
    """stdout for results, stderr for progress and errors."""

    as_json: bool
    out: Console = field(default_factory=lambda: _console(sys.stdout))
    err: Console = field(default_factory=lambda: _console(sys.stderr))

    def result(self, value: Mapping[str, Any]) -> None:
        """The one object of --json; nothing otherwise."""
        if self.as_json:
            print(json.dumps(value, ensure_ascii=False), flush=True)

    def say(self, line: str) -> None:
        """A sentence for a person; silent with --json."""
        if not self.as_json:
            self.out.print(line, markup=False, highlight=False)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
        """Cells that are numbers are set right; silent with --json."""
        if self.as_json:
            return
        rows = [list(row) for row in rows]
        table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
        for index, name in enumerate(columns):
            numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
            table.add_column(name, justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(_cell(cell)) for cell in row))
        self.out.print(table)

    def failure(self, error: MarinaError) -> None:
        """A command that has no result: the error takes its place."""
        self.result(
            {"error": str(error), "kind": type(error).__name__, "exit_code": error.exit_code, "remedy": error.remedy}
        )
        self.explain(error)

    def note(self, line: str) -> None:
        """Something worth knowing that is no error, on standard error."""
        self.err.print(f"note: {line}", markup=False, highlight=False)

    def end_with(self, error: MarinaError) -> NoReturn:
        """Fail after the result was shown: --json prints one object only, and it already holds what failed."""
        self.explain(error)
        raise typer.Exit(error.exit_code)

    def explain(self, error: MarinaError) -> None:
        """What failed, where, and what to do, on standard error."""
        tail = getattr(error, "log_tail", "")
        if tail:
            self.err.print(Text("last lines of the log:\n" + "\n".join(tail.splitlines()[-LOG_LINES:]), style="dim"))
        self.err.print(Text.assemble(("error: ", "bold red"), str(error)))
        if error.remedy:
            self.err.print(Text.assemble(("  fix: ", "bold"), error.remedy))


def _console(stream: TextIO) -> Console:
    """As wide as the terminal; where there is none, wide enough that no cell of ours is broken."""
    if stream.isatty() or "COLUMNS" in os.environ:
        return Console(file=stream)
    return Console(file=stream, width=PLAIN_WIDTH, soft_wrap=True)


def shown(path: Path) -> Path:
    """Relative to where the user stands, when the path lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
