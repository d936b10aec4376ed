"""Golden samples on a served model: the images and the tolerance of export, through the whole way of a request."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from handlerlib.engine_spec import ENGINE_FILE, EngineSpec
from handlerlib.spec import SPEC_FILE, GoldenSample, ModelSpec
from marina.client import InferenceClient
from marina.errors import ArchiveError
from marina.server import ServedModel


def mismatch(spec: ModelSpec, sample: GoldenSample, got: Mapping[int, float], tolerance: float) -> str:
    """What is wrong with the probabilities by index that a model gave for a sample; empty when they are the stored ones."""
    if not got:
        return "the answer holds no labels"
    if not all(0 <= index < len(spec.labels) for index in got):
        return f"the answer names an index outside 0 to {len(spec.labels) - 1}"
    worst = max(got, key=lambda index: abs(got[index] - sample.probabilities[index]))
    expected = sample.probabilities[worst]
    # Written so that a NaN is a mismatch too.
    if abs(got[worst] - expected) <= tolerance:
        return ""
    return (
        f"probability of '{spec.labels[worst]}' expected {expected:.6f}, got {got[worst]:.6f}, tolerance {tolerance:g}"
    )


def prove(model: ServedModel, client: InferenceClient) -> None:
    """Send every golden sample of the archive over HTTP. Raises ArchiveError for the first that is answered otherwise.

    Where the archive brings an engine, its tolerance holds: the worker itself has tested whichever of the two answers
    with that one's own.
    """
    allowed = tolerance(model.archive_file)
    for spec, sample, data in _samples(model.archive_file):
        top_k = min(len(spec.labels), spec.limits.max_top_k)
        (labels,) = client.predict(model.name, data, version=model.version, top_k=top_k).predictions
        difference = mismatch(spec, sample, {label.index: label.probability for label in labels}, allowed)
        if difference:
            raise ArchiveError(f"{sample.file}: {difference}", remedy="verify the archive: marina verify MAR")


def inputs(archives: Iterable[Path]) -> list[bytes]:
    """The golden samples' files of several archives, each once."""
    return list(dict.fromkeys(data for path in archives for _, _, data in _samples(path)))


def tolerance(path: Path) -> float:
    """How far the golden answers of an archive's worker may be off: the engine's tolerance where it brings one."""
    with zipfile.ZipFile(path) as packed:
        spec = ModelSpec.from_json(packed.read(SPEC_FILE).decode())
        if ENGINE_FILE not in packed.namelist():
            return spec.golden.tolerance
        return max(spec.golden.tolerance, EngineSpec.from_json(packed.read(ENGINE_FILE).decode()).tolerance)


def _samples(path: Path) -> list[tuple[ModelSpec, GoldenSample, bytes]]:
    with zipfile.ZipFile(path) as packed:
        spec = ModelSpec.from_json(packed.read(SPEC_FILE).decode())
        return [(spec, sample, packed.read(sample.file)) for sample in spec.golden.samples]
