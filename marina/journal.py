"""`model_store/rollouts.jsonl`: what a rollout means to do, written before it does it, so that a killed one can be settled.

One line per event, each on disk (fsync) before the next thing happens. Only the holder of the store's rollout lock writes.
A rollout begins with the state before and the state after; what is interrupted before its `commit` goes back to the first,
after it on to the second. So a reader needs the last rollout's lines only; older ones are a record for people.
"""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from marina.errors import StoreError

JOURNAL_FILE = "rollouts.jsonl"
OLDER_FILE = "rollouts.1.jsonl"
MOST_BYTES = 1 << 20
"""Beyond it the file becomes `OLDER_FILE` when the next rollout begins."""

Outcome = Literal["done", "reverted", "accepted"]
Event = Literal["begin", "start", "done", "failed", "commit", "end"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """A rollout of one model that has begun and not ended."""

    rollout: str
    action: str
    """`deploy`, `rollback`, `retire`, `scale`, `apply`."""
    name: str
    before: Mapping[str, Any] | None
    """What `serving.json` said of the model; None: it was not served."""
    after: Mapping[str, Any] | None
    """What it will say; None: it will not be served."""
    published: str | None
    """File name of an archive that the rollout itself puts into the store."""
    splits: str | None
    """The file from which the gateway in front reads its canaries; None: no gateway was known."""
    committed: bool
    """Whether it is to be finished; else it is to be taken back."""
    last: str
    """The step that it was at."""

    @property
    def words(self) -> str:
        """For people: `deploy of digits (at: load digits:2.0)`."""
        return f"{self.action} of {self.name}" + (f" (at: {self.last})" if self.last else "")


class Journal:
    """The file of one store. Its writer holds `serving.rollout_lock`; anybody may ask for what is unfinished."""

    def __init__(self, store: Path) -> None:
        self._path = store / JOURNAL_FILE
        self._rollout = ""

    def begin(
        self,
        action: str,
        name: str,
        *,
        before: Mapping[str, Any] | None,
        after: Mapping[str, Any] | None,
        published: str | None = None,
        splits: str | None = None,
    ) -> Begun:
        """From here on a kill leaves something `unfinished`. This and every line after it raise StoreError when it cannot be
        written."""
        self._make_room()
        self._rollout = uuid.uuid4().hex[:12]
        self._append("begin", action=action, name=name, before=before, after=after, published=published, splits=splits)
        return Begun(
            rollout=self._rollout, action=action, name=name, before=before, after=after, published=published,
            splits=splits, committed=False, last="",
        )  # fmt: skip

    def start(self, what: str, where: str) -> None:
        """A step begins. Nothing is written outside a rollout."""
        self._note("start", what=what, where=where)

    def done(self, what: str, where: str, seconds: float, error: str) -> None:
        """A step has ended, with an error or without."""
        extra = {"error": error} if error else {}
        self._note("failed" if error else "done", what=what, where=where, seconds=seconds, **extra)

    def commit(self) -> None:
        """From here on an interrupted rollout is finished instead of taken back."""
        self._append("commit")

    def end(self, outcome: Outcome) -> None:
        """Nothing is left to settle."""
        self._append("end", outcome=outcome)
        self._rollout = ""

    def go_on(self, begun: Begun) -> None:
        """The next lines belong to a rollout that another process has begun."""
        self._rollout = begun.rollout

    def unfinished(self) -> Begun | None:
        """The rollout that was begun last, when it has not ended. Raises StoreError for a file that is not a journal."""
        events = self._read()
        start = max((number for number, event in enumerate(events) if event["event"] == "begin"), default=None)
        if start is None or any(event["event"] == "end" for event in events[start:]):
            return None
        first, later = events[start], events[start + 1 :]
        steps = [f"{event['what']} {event['where']}".strip() for event in later if event["event"] == "start"]
        return Begun(
            rollout=first["rollout"],
            action=first["action"],
            name=first["name"],
            before=first["before"],
            after=first["after"],
            published=first["published"],
            splits=first.get("splits"),
            committed=any(event["event"] == "commit" for event in later),
            last=steps[-1] if steps else "",
        )

    def _note(self, event: Event, **fields: Any) -> None:
        if self._rollout:
            self._append(event, **fields)

    def _append(self, event: Event, **fields: Any) -> None:
        at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = json.dumps({"at": at, "rollout": self._rollout, "event": event, **fields}, ensure_ascii=False)
        try:
            _append_line(self._path, line.encode() + b"\n")
        except OSError as error:
            raise StoreError(
                f"{self._path} cannot be written: {error.strerror}",
                remedy="make room on its disk, or allow it; then: marina recover",
            ) from error

    def _read(self) -> list[dict[str, Any]]:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"{self._path} cannot be read: {error}", remedy="check its permissions") from error
        whole = data[: data.rfind(b"\n") + 1]  # a line without an end was never acted on
        events: list[dict[str, Any]] = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                event = json.loads(line)
                event["event"], event["rollout"]
                if event["event"] == "begin":
                    event["action"], event["name"], event["before"], event["after"], event["published"]
                if event["event"] == "start":
                    event["what"], event["where"]
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(
                    f"{self._path} is damaged in line {number}: {error!r}",
                    remedy="look at what is served (marina status), then remove the file",
                ) from error
            events.append(event)
        return events

    def _make_room(self) -> None:
        """Only before a rollout: what is moved away is all finished."""
        if self._path.exists() and self._path.stat().st_size > MOST_BYTES:
            self._path.replace(self._path.with_name(OLDER_FILE))


def _append_line(path: Path, line: bytes) -> None:
    created = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _drop_torn_line(descriptor)
        if os.write(descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if created:
        sync_folder(path.parent)


def _drop_torn_line(descriptor: int) -> None:
    """What a killed writer left after the last end of line."""
    size = os.fstat(descriptor).st_size
    kept = size
    while kept and os.pread(descriptor, 1, kept - 1) != b"\n":
        kept -= 1
    if kept != size:
        os.ftruncate(descriptor, kept)


def sync_folder(folder: Path) -> None:
    """What was created or renamed in it is still there after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
