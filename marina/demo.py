"""The whole way of one image on this machine: train, pack, verify, serve, and ask for every test image over HTTP."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from marina import archive, processes, store
from marina import verify as verification
from marina.archive import Archive
from marina.client import InferenceClient
from marina.errors import ArchiveError, MarinaError
from marina.golden import prove
from marina.home import Home
from marina.progress import Step
from marina.server import Server
from marina.settings import ServeSettings

RECIPE = "digits"
SHOWN = 8


class DemoFailed(MarinaError):
    """The served answers are not the ones of training's evaluation."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One test image with the served answer."""

    image: str
    true: str
    predicted: str
    probability: float
    seconds: float
    """From sending to the parsed answer."""


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demonstration found."""

    archive: Archive
    test_accuracy: float
    """As training's evaluation counted it."""
    http_accuracy: float
    """The same images, sent as PNG to the served archive."""
    answers: tuple[Answered, ...]
    seconds: dict[str, float]
    """Per phase."""

    @property
    def sample(self) -> list[Answered]:
        """A few answers to show: the first wrong ones, then others, the same at each run."""
        wrong = [answer for answer in self.answers if answer.true != answer.predicted]
        right = [answer for answer in self.answers if answer.true == answer.predicted]
        return [*wrong[:3], *random.Random(0).sample(right, min(len(right), SHOWN - len(wrong[:3])))]

    @property
    def latency(self) -> tuple[float, float]:
        """Seconds of the very first request, and the median of all others."""
        first, *rest = (answer.seconds for answer in self.answers)
        return first, statistics.median(rest)


def run(home: Home, report: Callable[[Step], None], announce: Callable[[str], None]) -> Demo:
    """Do it all and leave nothing running. Raises DemoFailed when HTTP and training disagree on any image."""
    from training import config, pipeline

    seconds: dict[str, float] = {}
    with _timed(seconds, "train, evaluate, export", announce):
        trained = pipeline.train(
            config.load_recipe(RECIPE, []), runs=home.runs, artifacts=home.artifacts, report=report
        )
    with _timed(seconds, "pack", announce):
        packed = archive.pack(trained.artifact, handlers=home.handlers, destination=home.store)
        store.publish(home.store, packed)
    with _timed(seconds, "verify", announce):
        verified = verification.verify(packed.path)
        if not verified.passed:
            raise ArchiveError(f"{packed.path}: {verified.findings[0].message}", remedy=verified.findings[0].remedy)
    expected = pipeline.evaluate(trained.artifact, report=report)
    server = Server(store.to_serve([packed]), _free_ports(), prove=prove)
    try:
        with _timed(seconds, "start TorchServe", announce):
            server.start()
        with (
            _timed(seconds, "send every test image over HTTP", announce),
            InferenceClient(server.inference_url) as client,
        ):
            answers = tuple(_ask(client, packed, pipeline.test_samples(trained.artifact)))
    finally:
        with _timed(seconds, "stop", announce):
            server.stop()
    found = Demo(packed, trained.metrics["test_accuracy"], _accuracy(answers), answers, seconds)
    _compare(found, [prediction.predicted for prediction in expected.predictions])
    return found


class _Sample(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def data(self) -> bytes: ...


def _ask(client: InferenceClient, packed: Archive, samples: Iterable[_Sample]) -> Iterator[Answered]:
    for sample in samples:
        started = time.perf_counter()
        answer = client.predict(packed.name, sample.data, version=packed.version, top_k=1)
        elapsed = time.perf_counter() - started
        best = answer.predictions[0][0]
        yield Answered(sample.name, sample.label, best.label, best.probability, elapsed)


def _accuracy(answers: tuple[Answered, ...]) -> float:
    return sum(answer.true == answer.predicted for answer in answers) / len(answers)


def _compare(found: Demo, expected: list[str]) -> None:
    """Image by image, not only in the mean."""
    for answer, label in zip(found.answers, expected, strict=True):
        if answer.predicted != label:
            raise DemoFailed(
                f"{answer.image}: training's evaluation says '{label}', the served archive '{answer.predicted}'",
                remedy="this is a defect of Marina: please report it with the output of marina inspect",
            )
    if found.http_accuracy != found.test_accuracy:
        raise DemoFailed(f"accuracy is {found.http_accuracy} over HTTP and {found.test_accuracy} in training")


def _free_ports() -> ServeSettings:
    """A demonstration must not disturb, nor be disturbed by, a server that already runs here."""
    inference, management, metrics, supervisor = processes.free_ports(4)
    return ServeSettings(
        inference_port=inference,
        management_port=management,
        metrics_port=metrics,
        supervisor_port=supervisor,
        log_requests=False,
    )


@contextmanager
def _timed(seconds: dict[str, float], phase: str, announce: Callable[[str], None]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - started
    announce(f"{phase}: {seconds[phase]:.1f} s")
