"""Golden samples on a served model: the images and the tolerance of export, through the whole way of a request."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from handlerlib.engine_spec import ENGINE_FILE, EngineSpec
from handlerlib.spec import SPEC_FILE, GoldenSample, ModelSpec
from marina.client import InferenceClient
from marina.errors import ArchiveError
from marina.server import ServedModel


def mismatch(spec: ModelSpec, sample: GoldenSample, got: Mapping[int, float], tolerance: float) -> str:
    """What is wrong with the probabilities (or values) by index that a model gave for a sample; empty when they are the
    stored ones."""
    if not got:
        return "the answer holds no labels"
    if not all(0 <= index < len(spec.labels) for index in got):
        return f"the answer names an index outside 0 to {len(spec.labels) - 1}"
    units, outputs = spec.units, sample.outputs
    worst = max(got, key=lambda index: abs(got[index] - outputs[index]) / units[index])
    expected, allowed = outputs[worst], tolerance * units[worst]
    # Written so that a NaN is a mismatch too.
    if abs(got[worst] - expected) <= allowed:
        return ""
    what = "value" if spec.task == "regression" else "probability"
    return f"{what} of '{spec.labels[worst]}' expected {expected:.6f}, got {got[worst]:.6f}, tolerance {allowed:g}"


def misses_labels(spec: ModelSpec, sample: GoldenSample, got: Collection[int], tolerance: float) -> str:
    """What is wrong with the labels, by index, that a multi-label model gave unasked: each must be there whose probability
    reaches its threshold. Empty when they are right; within the tolerance of a threshold both are."""
    for index, (probability, threshold) in enumerate(zip(sample.outputs, spec.thresholds, strict=True)):
        if (index in got) != (probability >= threshold) and abs(probability - threshold) > tolerance:
            there = "is given" if index in got else "is not given"
            return (
                f"label '{spec.labels[index]}' {there} with a probability of {probability:.6f}, the threshold is"
                f" {threshold:.6f}"
            )
    return ""


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
        if not difference and spec.task == "multi-label":
            (labels,) = client.predict(model.name, data, version=model.version).predictions
            difference = misses_labels(spec, sample, {label.index for label in labels}, allowed)
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
