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
_ACCESS = b'","level":"INFO","logger":"access"} '
_ACCESS_AT = slice(20, 80)
"""Where that lies in a line of marina/torchserve/log4j2.xml, behind the time."""
_REQUEST = re.compile(
    # The path without what JSON would escape: such a line is rare, and written by json.dumps.
    rb'^(\{"time":"[^"]*","level":"INFO","logger":"access")\} '
    rb'/?([0-9A-Za-z.:\[\]%-]*) "([A-Z]+) ([!#-\[\]-~]+) ([A-Za-z]+/[0-9.]+)" (\d+) (\d+)$',
    re.MULTILINE,
)
_RECORD = rb'\1,"client":"\2","method":"\3","path":"\4","protocol":"\5","status":\6,"ms":\7}'
_ODD_REQUEST = re.compile(
    r'^\{"time":"(?P<time>[^"]*)".*?\} /?(?P<client>\S*) "(?P<method>\S*) (?P<path>.*) (?P<protocol>\S*)" '
    r"(?P<status>\d+) (?P<ms>\d+)$"
)
_IDS = re.compile(rb'"path":"([^"?]*)\?request_id=([A-Za-z0-9._-]+)&trace_id=([0-9a-f]+)"')
_WITH_IDS = rb'"path":"\1","request_id":"\2","trace_id":"\3"'
_LOOKS = re.compile(rb'"method":"GET","path":"/(?:models|metrics|ping)\b[^"]*","protocol":"[^"]*","status":200,')
"""Looking at the state, which the supervisor does every second, is not worth a line."""
_FINISHED = re.compile(
    rb' "[A-Z]+ /(?:predictions|explanations|models/[^ "/]*/invoke|invocations)\b.*" (?!404 )\d+ \d+$', re.MULTILINE
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
        """`write` gets each line that is worth passing on, of at least `level`, and several at once, with newlines between
        them, when they come at once; `requests`: also one per request.
        """
        self._write = write
        self._least = _LEAST[level]
        self._requests = requests
        self._lock = threading.Lock()
        self._tail: deque[str] = deque(maxlen=_REMEMBERED)
        self._workers: dict[str, _LastWords] = {}
        self._finished = 0

    def feed(self, lines: bytes) -> None:
        """One or more whole lines as java printed them."""
        requests: list[bytes] = []
        for line in lines.rstrip(b"\r\n").split(b"\n"):
            if _ACCESS in line[_ACCESS_AT]:
                requests.append(line)
                continue
            if requests:
                self._answered(requests)
                requests = []
            self._event(line)
        if requests:
            self._answered(requests)

    def _event(self, line: bytes) -> None:
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

    def _answered(self, lines: list[bytes]) -> None:
        """Lines of the access log, one after the other: thousands a second, hence all of them at once."""
        text = b"\n".join(lines)
        self._finished += len(_FINISHED.findall(text))
        if not self._requests:
            return
        records, plain = _REQUEST.subn(_RECORD, text)
        if plain != len(lines):
            records = b"\n".join(_record(line) for line in lines)
        if b'"method":"GET"' in records:
            records = b"\n".join(record for record in records.split(b"\n") if not _LOOKS.search(record))
        if b"?request_id=" in records:
            records = _IDS.sub(_WITH_IDS, records)
        if records:
            self._write(records.decode("utf-8", "replace"))

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


def _record(line: bytes) -> bytes:
    """One line of the access log as a record, whatever its path holds."""
    record, plain = _REQUEST.subn(_RECORD, line)
    if plain:
        return record
    found = _ODD_REQUEST.match(line.decode("utf-8", "replace").rstrip("\r"))
    if found is None:  # whatever it is, a line of the log stays one JSON object
        return json.dumps({"level": "INFO", "logger": "access", "message": line.decode("utf-8", "replace")}).encode()
    fields = found.groupdict()
    head = {"time": fields.pop("time"), "level": "INFO", "logger": "access"}
    whole = {"status": int(fields.pop("status")), "ms": int(fields.pop("ms"))}
    return json.dumps({**head, **fields, **whole}, ensure_ascii=False, separators=(",", ":")).encode()


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
