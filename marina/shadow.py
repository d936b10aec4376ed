"""The same inputs to the old and to the new version, before any client is served by the new one.

The inputs are the archives' golden samples, recorded ones from files, and live ones: workers of the old version set aside
a few of what they are asked at this moment (`handlerlib.recorder`). That works at the worker because only there an input
has the form that the model sees, with or without a gateway in front, and because no proxy here can copy bodies.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from marina.client import NO_RETRIES, Answer, InferenceClient, Timeout
from marina.errors import ClientError, ConfigError, Refused
from marina.gates import Arm

MOST_INPUTS = 1000
MOST_BYTES = 64 << 20
"""Of recorded inputs; what is beyond is left out."""
ASKED = "record-"
"""Starts the folder's name in the workers' temp folder, followed by NAME-VERSION (`handlerlib.recorder`)."""
_PARTIAL = "."
_PAIRS = 60
_LONGEST_SECONDS = 15.0
"""Inputs are sent again until there are so many pairs of latencies, or for so long, but each of them once at least."""
_ANSWER_SECONDS = 60.0
_ALIKE_DEVIATIONS = 0.25
"""By which values may differ and still count as the same: an R² of the new answers on the old ones of about 0.94."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shadow:
    """What the two versions did with the same inputs."""

    old: Arm
    new: Arm
    alike: int
    """Inputs with the same first label; see `alike`."""
    compared: int
    """Inputs that both versions answered."""
    golden: int
    recorded: int
    live: int
    """Inputs by source."""


@dataclass(slots=True)
class _Side:
    """One version while it is asked."""

    ask: Callable[[bytes], Answer]
    answers: int = 0
    errors: int = 0
    latencies_ms: list[float] = field(default_factory=list)

    def send(self, data: bytes) -> Answer | ClientError:
        """The answer, or what went wrong."""
        began = time.perf_counter()
        try:
            answer = self.ask(data)
        except ClientError as error:
            return error
        self.latencies_ms.append((time.perf_counter() - began) * 1e3)
        return answer

    def arm(self) -> Arm:
        return Arm(answers=self.answers, errors=self.errors, latencies_ms=tuple(self.latencies_ms))


def compare(
    url: str,
    name: str,
    old: str,
    new: str,
    *,
    golden: Sequence[bytes],
    recorded: Sequence[bytes],
    live: Sequence[bytes],
) -> Shadow:
    """Send every input to both versions at `url`, in turns, one request at a time.

    A failure is no answer, a status of 500 or more, or a refusal of what the other version answers.
    """
    inputs = [*golden, *recorded, *live]
    if not inputs:
        nothing = Arm(answers=0, errors=0, latencies_ms=())
        return Shadow(old=nothing, new=nothing, alike=0, compared=0, golden=0, recorded=0, live=0)
    pairs: list[tuple[Answer, Answer]] = []
    with InferenceClient(url, retries=NO_RETRIES, timeout=Timeout(read=_ANSWER_SECONDS)) as client:
        sides = _side(client, name, old), _side(client, name, new)
        for _ in range(2):  # what a first request pays is not what is compared
            for side in sides:
                side.send(inputs[0])
                side.latencies_ms.clear()
        for turn, data in enumerate(_rounds(inputs)):
            first, second = sides if turn % 2 == 0 else sides[::-1]
            found = {id(first): first.send(data), id(second): second.send(data)}
            one, other = (found[id(side)] for side in sides)
            _count(sides, (one, other))
            if turn < len(inputs) and isinstance(one, Answer) and isinstance(other, Answer):
                pairs.append((one, other))
    return Shadow(
        old=sides[0].arm(), new=sides[1].arm(), alike=alike(pairs), compared=len(pairs),
        golden=len(golden), recorded=len(recorded), live=len(live),
    )  # fmt: skip


def _side(client: InferenceClient, name: str, version: str) -> _Side:
    # How many labels are wanted is left to the model: one for several labels then answers those above their thresholds.
    return _Side(lambda data: client.predict(name, data, version=version))


def alike(pairs: Sequence[tuple[Answer, Answer]]) -> int:
    """How many old and new answers say the same: the first label; of several labels, all that are given; of values, each
    target within a quarter of the standard deviation that the old version's answers have over these inputs."""
    values = [[label.probability for label in old.predictions[0]] for old, _ in pairs if old.task == "regression"]
    allowed = [_ALIKE_DEVIATIONS * statistics.pstdev(target) for target in zip(*values, strict=True)]
    return sum(_says_the_same(old, new, allowed) for old, new in pairs)


def _says_the_same(old: Answer, new: Answer, allowed: Sequence[float]) -> bool:
    ours, theirs = old.predictions[0], new.predictions[0]
    if old.task != new.task:
        return False
    if old.task == "multi-label":
        return {label.label for label in ours} == {label.label for label in theirs}
    if old.task == "multi-class":
        return ours[0].label == theirs[0].label
    if [label.label for label in ours] != [label.label for label in theirs]:
        return False
    values = zip(ours, theirs, allowed, strict=True)
    return all(abs(one.probability - other.probability) <= limit for one, other, limit in values)


def _rounds(inputs: Sequence[bytes]) -> Iterator[bytes]:
    ends = time.monotonic() + _LONGEST_SECONDS
    sent = 0
    while sent < _PAIRS:
        for data in inputs:
            if sent >= len(inputs) and (sent >= _PAIRS or time.monotonic() > ends):
                return
            yield data
            sent += 1


def _count(sides: tuple[_Side, _Side], found: Sequence[Answer | ClientError]) -> None:
    answered = [isinstance(item, Answer) for item in found]
    for number, side in enumerate(sides):
        item = found[number]
        side.answers += 1
        if isinstance(item, ClientError):
            clients_fault = isinstance(item, Refused) and item.status < 500
            side.errors += not clients_fault or answered[1 - number]


# ------------------------------------------------------------------------------------------------------------- inputs


def read_recorded(paths: Iterable[Path]) -> list[bytes]:
    """Inputs from folders (every file one input), `.jsonl` files (`{"b64": ...}` or `{"file": ...}` per line, the path
    relative to the file), or single files. Raises ConfigError naming the first that cannot be used."""
    found: list[bytes] = []
    size = 0
    for path in paths:
        for data in _inputs_of(path):
            size += len(data)
            if len(found) >= MOST_INPUTS or size > MOST_BYTES:
                return found
            found.append(data)
    return found


def _inputs_of(path: Path) -> Iterator[bytes]:
    try:
        if path.is_dir():
            files = sorted(item for item in path.rglob("*") if item.is_file() and not item.name.startswith("."))
            if not files:
                raise ConfigError(f"{path} holds no recorded inputs", remedy="put image files there")
            yield from (item.read_bytes() for item in files)
        elif path.suffix == ".jsonl":
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                if line.strip():
                    yield _from_line(path, number, line)
        else:
            yield path.read_bytes()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"recorded inputs cannot be read: {error}", remedy="correct the path given to --shadow"
        ) from error


def _from_line(path: Path, number: int, line: str) -> bytes:
    try:
        entry = json.loads(line)
        if set(entry) == {"b64"}:
            return base64.b64decode(entry["b64"], validate=True)
        if set(entry) == {"file"}:
            return (path.parent / str(entry["file"])).read_bytes()
    except (ValueError, TypeError, binascii.Error):
        pass
    raise ConfigError(
        f'{path}, line {number}: must be {{"b64": "..."}} or {{"file": "..."}}', remedy="correct or remove the line"
    )


def to_lines(inputs: Iterable[bytes]) -> str:
    """As `.jsonl`: how inputs get into a container."""
    return "".join(json.dumps({"b64": base64.b64encode(data).decode("ascii")}) + "\n" for data in inputs)


def from_lines(text: str) -> list[bytes]:
    """What `to_lines` wrote."""
    return [base64.b64decode(json.loads(line)["b64"]) for line in text.splitlines()]


@contextlib.contextmanager
def asked_for(temp: Path, name: str, version: str) -> Iterator[Path]:
    """The folder that has workers of this version set inputs aside; removed at the end with what lies in it."""
    folder = temp / f"{ASKED}{name}-{version}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sample(temp: Path, name: str, version: str, *, inputs: int, seconds: float) -> list[bytes]:
    """Inputs that clients send to this version now: at most about so many, for at most so long."""
    ends = time.monotonic() + seconds
    with asked_for(temp, name, version) as folder:
        while time.monotonic() < ends and len(list(folder.iterdir())) < inputs:
            time.sleep(0.1)
        return [path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(_PARTIAL)]
