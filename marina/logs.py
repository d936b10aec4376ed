"""What java and its workers print: passed on line by line, remembered, and searched for why a model did not load."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

LOAD_FAILED = "MARINA_LOAD_FAILED"
"""Starts the line by which a worker of ours says why it cannot serve (handlerlib.telemetry)."""

Level = Literal["debug", "info", "warning", "error"]

_RANKS = {"TRACE": 0, "DEBUG": 0, "INFO": 1, "WARN": 2, "ERROR": 3, "FATAL": 3}
_LEAST = {"debug": 0, "info": 1, "warning": 2, "error": 3}
_REMEMBERED = 400
_QUIET_SECONDS = 0.3
"""After a worker's last words: a chained traceback comes in several parts."""
_HARMLESS = (
    "WARNING: sun.reflect.Reflection.getCallerClass",  # log4j 2.17 on any java since 9
    "nvidia-smi not available or failed",  # TorchServe looks for GPUs on every machine
    "xpu-smi not available or failed",
    "Model server started.",
    "Torchserve stopped.",
)
_FINISHED = re.compile(
    rb'"path":"/(?:predictions|explanations|models/[^"/]*/invoke|invocations)\b[^"]*".*"status":(\d+)'
)
_WORKER = re.compile(r"W-\d+-(?P<label>.+)-std(?:out|err)$|W-\d+-(?P<own>.+)$")
_ERROR_LINE = re.compile(r"[A-Za-z_][\w.]*(: .*)?$")
_HIDES_THE_CAUSE = (
    "No module named 'ts.torch_handler.",  # TorchServe's second try after any ImportError of the handler
    "RuntimeError: 500 - Unknown exception",
    "RuntimeError: 507 - System out of memory",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadFailure:
    """Why one model's worker did not load."""

    label: str
    """TorchServe's name of the worker's model: `NAME_VERSION`."""
    cause: str
    """The worker's own words: its error's type and message."""


@dataclass(slots=True)
class _LastWords:
    """What one worker has said so far that may explain its death."""

    errors: list[str] = field(default_factory=list)
    stderr: deque[str] = field(default_factory=lambda: deque(maxlen=3))
    in_traceback: bool = False
    died: bool = False
    said: str | None = None
    last_line: float = 0.0


class ServerLog:
    """The reading end of java's output. One thread feeds it lines; any thread may ask."""

    def __init__(self, write: Callable[[str], None], *, level: Level, requests: bool) -> None:
        """`write` gets each line that is worth passing on, of at least `level`; `requests`: also one per request."""
        self._write = write
        self._least = _LEAST[level]
        self._requests = requests
        self._lock = threading.Lock()
        self._tail: deque[str] = deque(maxlen=_REMEMBERED)
        self._workers: dict[str, _LastWords] = {}
        self._finished = 0

    def feed(self, line: bytes) -> None:
        """One line as java printed it."""
        if b'"logger":"access"' in line[:100]:
            self._request(line)
            return
        text = line.decode("utf-8", "replace").rstrip()
        record = _parse(text)
        if record is None:
            self._bare(text)
            return
        with self._lock:
            self._tail.append(f"{record['level']:5} {record.get('thread', '')} {record['message']}".rstrip())
            self._learn(record["logger"], record["level"], record.get("thread", ""), record["message"])
        if _RANKS.get(record["level"], 1) >= self._least and not record["message"].startswith(LOAD_FAILED):
            self._write(text)

    def note(self, message: str, *, level: str = "INFO") -> None:
        """A line of the supervisor's own, in the same form."""
        self._emit(level, "marina", message)

    def tail(self, count: int = 20) -> str:
        """The last lines, oldest first, requests left out."""
        with self._lock:
            return "\n".join(list(self._tail)[-count:])

    def failure(self) -> LoadFailure | None:
        """The first worker that said or showed that it cannot load, once its words are complete."""
        return next(iter(self.failures()), None)

    def failures(self) -> list[LoadFailure]:
        """Every worker of which that is so."""
        now = time.monotonic()
        found = []
        with self._lock:
            for label, words in self._workers.items():
                if words.said is not None:
                    found.append(LoadFailure(label=label, cause=words.said))
                elif words.died and now - words.last_line > _QUIET_SECONDS:
                    found.append(LoadFailure(label=label, cause=_cause(words)))
        return found

    def forget_failures(self) -> None:
        """From here on only new words count."""
        with self._lock:
            self._workers.clear()

    @property
    def finished(self) -> int:
        """Predictions answered so far, those for unknown models left out: TorchServe does not count them as accepted."""
        return self._finished

    def _request(self, line: bytes) -> None:
        found = _FINISHED.search(line)
        if found is not None and found.group(1) != b"404":
            self._finished += 1
        if self._requests:
            self._write(line.decode("utf-8", "replace").rstrip())

    def _bare(self, text: str) -> None:
        """java itself speaks: before its log is set up, or when it breaks."""
        if not text or text.startswith(_HARMLESS):
            return
        with self._lock:
            self._tail.append(text)
        self._emit("WARN", "java", text)

    def _emit(self, level: str, logger: str, message: str) -> None:
        if _RANKS[level] >= self._least:
            time_text = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            record = {"time": time_text, "level": level, "logger": logger, "message": message}
            self._write(json.dumps(record, ensure_ascii=False, separators=(",", ":")))

    def _learn(self, logger: str, level: str, thread: str, message: str) -> None:
        if logger.endswith("SnapshotManager") and level == "ERROR":
            self._workers["the model store"] = _LastWords(said=message)
            return
        found = _WORKER.match(thread)
        if found is None:
            return
        words = self._workers.setdefault(found["label"] or found["own"], _LastWords())
        words.last_line = time.monotonic()
        if logger != "MODEL_LOG":
            words.died = words.died or message.startswith(("Load model failed", "Backend worker monitoring thread"))
        elif message.startswith(LOAD_FAILED):
            words.said = _announced(message)
        else:
            _follow(words, message, stderr=level == "WARN")


def _follow(words: _LastWords, message: str, *, stderr: bool) -> None:
    """One printed line: the last line of a traceback is the first that is neither indented nor empty."""
    if message.startswith("Traceback (most recent call last)"):
        words.in_traceback = True
    elif words.in_traceback and message and not message.startswith(" "):
        words.in_traceback = False
        if _ERROR_LINE.match(message):
            words.errors.append(message)
    elif message.startswith("Backend worker process died"):
        words.died = True
    elif stderr and not words.in_traceback and message:
        words.stderr.append(message)


def _cause(words: _LastWords) -> str:
    telling = [error for error in words.errors if not any(hidden in error for hidden in _HIDES_THE_CAUSE)]
    if telling:
        return telling[-1]
    if words.errors:
        return words.errors[-1]
    if words.stderr:
        return f"the worker ended without a Python error; its last words: {' | '.join(words.stderr)}"
    return "the worker ended without a word: killed, for want of memory perhaps, or not loaded in time"


def _announced(message: str) -> str:
    try:
        value = json.loads(message.removeprefix(LOAD_FAILED))
        return f"{value['type']}: {value['error']}"
    except (ValueError, KeyError, TypeError):
        return message.removeprefix(LOAD_FAILED).strip()


def _parse(text: str) -> dict[str, str] | None:
    if not text.startswith('{"time":'):
        return None
    try:
        record = json.loads(text)
    except ValueError:
        return None
    return record if {"level", "logger", "message"} <= set(record) else None
