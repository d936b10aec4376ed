"""A served endpoint scored on labelled samples: requests over HTTP, several at once.

Whatever gets no answer is kept by name and reason beside what was answered; nothing is left out silently. What answers
are worth is for training's own code to say: the command hands it in as a `Judge`.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from handlerlib.spec import ModelSpec
from marina import store
from marina.client import Answer, InferenceClient, Label, read_key
from marina.errors import ArchiveError, ClientError, Refused
from marina.home import Home
from marina.progress import Step

_HOPELESS = 20
"""So many requests that fail one after the other from the start end the scoring: the rest would fail as well."""
_AHEAD = 4
"""Samples read ahead of the answers, per connection."""
_ABOUT_THE_SAMPLE = (400, 413, 415, 422)
"""Statuses that say nothing about another sample."""
_TOP_K = (1000, 100, 10, None)
"""How many labels are asked for where no artifact says how many there are."""
_LEFT_OUT = "answers do not hold every label: those left out share what is left of the probability"
_LEFT_OUT_OF_SEVERAL = (
    "answers do not hold every label: those left out count as not there, and the figures are approximate"
)


class AnswersDiffer(ArchiveError):
    """The endpoint gives other answers than the artifact whose version it names."""


class Sample(Protocol):
    """One labelled input."""

    @property
    def name(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def data(self) -> bytes: ...


class Asked(Protocol):
    """Samples whose labels are known."""

    @property
    def what(self) -> str: ...
    @property
    def total(self) -> int: ...
    @property
    def read(self) -> Callable[[], Iterator[Sample]]: ...


class Figures(Protocol):
    """What answers are worth."""

    @property
    def metrics(self) -> Mapping[str, float]: ...


class Beside(Protocol):
    """A served model's answers beside those of its artifact."""

    @property
    def samples(self) -> int: ...
    @property
    def changed(self) -> int: ...
    @property
    def largest(self) -> float: ...
    @property
    def lost_points(self) -> float: ...
    @property
    def said(self) -> str: ...
    @property
    def allowed(self) -> str: ...
    @property
    def differs(self) -> bool: ...

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


A = TypeVar("A", bound=Asked)
F = TypeVar("F", bound=Figures)
B = TypeVar("B", bound=Beside)
A_co = TypeVar("A_co", bound=Asked, covariant=True)
F_co = TypeVar("F_co", bound=Figures, covariant=True)
B_co = TypeVar("B_co", bound=Beside, covariant=True)


class Judge(Protocol[A, F, B_co]):
    """Training's own code: `training.judge` has it."""

    def labelled(self, data: Path, artifact: Path | None) -> A:
        """Samples of a folder or file, read as the artifact's own were. Raises DataError."""
        ...

    def test_split(self, artifact: Path) -> A:
        """The artifact's own samples. Raises DataError."""
        ...

    def check_labels(self, asked: A, labels: Sequence[str], model: str) -> None:
        """Raises DataError when a sample's label is none of these."""
        ...

    def figures(
        self,
        labels: Sequence[str],
        names: Sequence[str],
        true: Sequence[str],
        answers: Sequence[Mapping[int, float]],
        artifact: Path | None,
    ) -> tuple[F, bool]:
        """What answers by class number are worth, and whether every one of them names every class."""
        ...

    def reference(self, artifact: Path, asked: A, names: Collection[str]) -> F:
        """The artifact's own answers to the samples of these names."""
        ...

    def compare(self, reference: F, served: F, artifact: Path, *, complete: bool) -> B_co:
        """How far the answers to the same samples differ."""
        ...


@dataclass(frozen=True, slots=True)
class Failure:
    """A sample that got no answer."""

    name: str
    reason: str
    status: int | None
    """Of the HTTP answer; None when there was none."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What came back, in the samples' order."""

    names: tuple[str, ...]
    labels: tuple[str, ...]
    """The true ones."""
    predictions: tuple[tuple[Label, ...], ...]
    versions: Mapping[str, int]
    """Answers per model version."""
    failures: tuple[Failure, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How the endpoint is asked."""

    name: str
    version: str | None = None
    """Its default one when None."""
    folder: Path | None = None
    """Labelled samples, or a .csv of them; the artifact's own test split when None."""
    concurrency: int = 8
    """Requests on their way at once."""
    compare: bool = True
    """Put the same samples to the artifact's plain weights here."""
    report: Path | None = None
    """Where a page about it is written."""


@dataclass(frozen=True, slots=True)
class Score(Generic[A_co, F_co, B_co]):
    """An endpoint's figures, and its artifact's where there is one on this machine."""

    model: str
    asked: A_co
    answered: Answered
    evaluation: F_co
    artifact: Path | None
    reference: F_co | None
    comparison: B_co | None
    notes: tuple[str, ...]

    @property
    def version(self) -> str:
        """The version, or all that answered."""
        return ", ".join(sorted(self.answered.versions))


def open_client(url: str, key_file: Path | None = None) -> InferenceClient:
    """A client of the address, with the gateway's key where a file holds one. Raises ConfigError."""
    return InferenceClient(url, key=None if key_file is None else read_key(key_file))


def score(
    client: InferenceClient, options: Options, home: Home, judge: Judge[A, F, B], report: Callable[[Step], None]
) -> Score[A, F, B]:
    """Ask, judge and compare. Raises ClientError when nothing is answered, ArchiveError when the test split of an artifact
    is wanted that is not here, and what reading data raises."""
    given = None if options.folder is None else judge.labelled(options.folder, _newest(home, options))
    probe = _probe(client, options, home, given)
    artifact = _artifact(home, probe)
    spec = None if artifact is None else ModelSpec.load(artifact)
    if spec is None and probe.task != "multi-class":
        raise ArchiveError(
            f"{probe.model} {probe.version} answers for the task {probe.task}, and there is no artifact of it here that says"
            " what its answers are measured by",
            remedy="copy the artifact's folder here: artifacts/NAME/VERSION",
        )
    asked = given if given is not None else judge.test_split(_known(artifact, probe))
    labels = spec.labels if spec is not None else tuple(_labels(probe))
    judge.check_labels(asked, labels, f"{probe.model} {probe.version}")
    top_k = min(len(labels), spec.limits.max_top_k) if spec is not None else len(probe.predictions[0])
    answered = ask(
        client,
        options.name,
        asked.read(),
        total=asked.total,
        version=options.version,
        top_k=top_k,
        concurrency=options.concurrency,
        report=report,
    )
    rows = [{label.index: label.probability for label in one} for one in answered.predictions]
    _check_indices(answered, labels)
    evaluation, complete = judge.figures(labels, answered.names, answered.labels, rows, artifact)
    notes = [] if complete else [_LEFT_OUT if spec is None or spec.task == "multi-class" else _LEFT_OUT_OF_SEVERAL]
    reference, comparison = None, None
    if artifact is None:
        notes.append(f"there is no artifact of {probe.model} {probe.version} here to compare with")
    elif len(answered.versions) > 1:
        notes.append("several versions answered, so that the answers are compared with none: give NAME:VERSION")
    elif options.compare:
        reference = judge.reference(artifact, asked, answered.names)
        comparison = judge.compare(reference, evaluation, artifact, complete=complete)
    return Score(probe.model, asked, answered, evaluation, artifact, reference, comparison, tuple(notes))


def ask(
    client: InferenceClient,
    name: str,
    samples: Iterable[Sample],
    *,
    total: int,
    version: str | None,
    top_k: int | None,
    concurrency: int,
    report: Callable[[Step], None],
) -> Answered:
    """One request per sample, `concurrency` at once, so that the server may batch them; each is repeated as the client's
    retries say. Raises ClientError when none of the first 20, or none at all, is answered."""
    names: list[str] = []
    true: list[str] = []
    predictions: list[tuple[Label, ...]] = []
    versions: Counter[str] = Counter()
    failures: list[Failure] = []
    last: ClientError | None = None
    started = time.monotonic()

    def send(sample: Sample) -> tuple[str, str, Answer | ClientError]:
        try:
            kind = content_type(sample.data)
            return sample.name, sample.label, client.predict(
                name, sample.data, version=version, top_k=top_k, content_type=kind
            )  # fmt: skip
        except ClientError as error:
            return sample.name, sample.label, error

    with ThreadPoolExecutor(concurrency, "ask") as pool:
        for sample, label, answer in _ahead(pool, send, samples, concurrency * _AHEAD):
            if isinstance(answer, ClientError):
                last = answer
                status = answer.status if isinstance(answer, Refused) else None
                failures.append(Failure(sample, str(answer), status))
                if not names and len(failures) >= _HOPELESS:
                    break
            else:
                names.append(sample)
                true.append(label)
                predictions.append(answer.predictions[0])
                versions[answer.version] += 1
            report(_Asked("evaluate", len(names) + len(failures), total, ""))
    if not names:
        if last is None:
            raise ClientError("there is no sample to ask about", remedy="give a folder with samples")
        raise ClientError(
            f"none of {len(failures)} requests was answered, the last: {last}", remedy=last.remedy
        ) from last
    seconds = time.monotonic() - started
    return Answered(tuple(names), tuple(true), tuple(predictions), dict(versions), tuple(failures), seconds)


def content_type(data: bytes) -> str:
    """How a sample is announced: readable UTF-8 is text, everything else is left to the handler."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return "application/octet-stream"
    return "application/octet-stream" if "\0" in text else "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class _Asked:
    phase: str
    done: int
    total: int
    note: str


def _ahead(
    pool: ThreadPoolExecutor,
    send: Callable[[Sample], tuple[str, str, Answer | ClientError]],
    samples: Iterable[Sample],
    most: int,
) -> Iterator[tuple[str, str, Answer | ClientError]]:
    """Results in order, with at most `most` samples read and not yet answered."""
    waiting: deque[Future[tuple[str, str, Answer | ClientError]]] = deque()
    try:
        for sample in samples:
            waiting.append(pool.submit(send, sample))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _probe(client: InferenceClient, options: Options, home: Home, folder: Asked | None) -> Answer:
    """A first answer, to know who answers: to samples of the folder, or to a golden sample of the newest artifact."""
    if folder is not None:
        samples = itertools.islice(folder.read(), _HOPELESS)
        candidates = [sample.data for sample in samples]
    else:
        artifact = store.find_artifact(home.artifacts, _joined(options))
        spec = ModelSpec.load(artifact)
        candidates = [(artifact / sample.file).read_bytes() for sample in spec.golden.samples]
    last: Refused | None = None
    for data in candidates:
        for top_k in _TOP_K:
            try:
                return client.predict(
                    options.name, data, version=options.version, top_k=top_k, content_type=content_type(data)
                )
            except Refused as error:
                last = error
                if error.status != 422 or "top_k" not in str(error):
                    break
        if last is not None and last.status not in _ABOUT_THE_SAMPLE:
            break
    raise last or ClientError("there is no sample to ask about", remedy="give a folder with samples")


def _joined(options: Options) -> str:
    return options.name if options.version is None else f"{options.name}:{options.version}"


def _artifact(home: Home, probe: Answer) -> Path | None:
    """The artifact of the version that answers."""
    try:
        return store.find_artifact(home.artifacts, f"{probe.model}:{probe.version}")
    except ArchiveError:
        return None


def _newest(home: Home, options: Options) -> Path | None:
    """The artifact of the model that is asked for, whatever version answers in the end."""
    try:
        return store.find_artifact(home.artifacts, _joined(options))
    except ArchiveError:
        return None


def _known(artifact: Path | None, probe: Answer) -> Path:
    if artifact is None:
        raise ArchiveError(
            f"{probe.model} {probe.version} is served, and there is no artifact of it here whose test split could be asked",
            remedy="give labelled samples: --data FOLDER, with one folder per class",
        )
    return artifact


def _labels(probe: Answer) -> Iterator[str]:
    """Labels by index, from an answer that holds all of them."""
    named = {label.index: label.label for label in probe.predictions[0]}
    return (named.get(index, f"#{index}") for index in range(max(named) + 1))


def _check_indices(answered: Answered, labels: tuple[str, ...]) -> None:
    """Raises AnswersDiffer when an answer names a class otherwise than the artifact does."""
    for name, prediction in zip(answered.names, answered.predictions, strict=True):
        for label in prediction:
            if not 0 <= label.index < len(labels) or labels[label.index] != label.label:
                raise AnswersDiffer(
                    f"{name}: the endpoint calls class {label.index} '{label.label}', which its artifact does not",
                    remedy="what is served is not what the artifact holds: pack it again and deploy it",
                )
