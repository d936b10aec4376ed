"""Progress of long work: a bar with the time left on a terminal, a plain line now and then elsewhere; always on stderr."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_LINE_SECONDS = 5.0
"""At most one plain line in this many seconds, except where a phase starts or ends."""


class Step(Protocol):
    """What the training package reports; `total` 0 makes the note a message that must be seen, not a state."""

    @property
    def phase(self) -> str: ...
    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def note(self) -> str: ...


class ProgressReporter:
    """Callable with each step; use as a context manager so that the terminal is left in order."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = _bar(console) if console.is_terminal else None
        self._phase = ""
        self._task: TaskID | None = None
        self._started = self._printed = 0.0

    def __enter__(self) -> ProgressReporter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, step: Step) -> None:
        """Show one step."""
        if step.total == 0 and step.note:
            self._console.print(f"{step.phase} · {step.note}", highlight=False, markup=False)
            return
        starts = step.phase != self._phase
        if starts:
            self._phase, self._started = step.phase, time.monotonic()
        if self._bar is None:
            self._print_plain(step, starts)
            return
        if starts or self._task is None:
            self._task = self._bar.add_task(step.phase, total=step.total or None, note="")
        self._bar.update(self._task, completed=step.done, total=step.total or None, note=step.note)

    def _print_plain(self, step: Step, starts: bool) -> None:
        now = time.monotonic()
        ends = step.total > 0 and step.done >= step.total
        if not (starts or ends or now - self._printed >= PLAIN_LINE_SECONDS):
            return
        self._printed = now
        parts = [step.phase, f"{step.done}/{step.total}" if step.total else "", step.note, self._left(step, now)]
        self._console.print(" · ".join(part for part in parts if part), highlight=False, markup=False)

    def _left(self, step: Step, now: float) -> str:
        if not 0 < step.done < step.total:
            return ""
        seconds = round((now - self._started) / step.done * (step.total - step.done))
        return f"about {seconds // 60}:{seconds % 60:02d} left"


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
    )
