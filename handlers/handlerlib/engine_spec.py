"""`engine.json`: the faster form of a model that an artifact carries beside its plain weights. Standard library only.

`training.optimize` writes it on the hardware that it was measured on. A worker uses the engine where machine and
packages are those that it was built for (`obstacle`), proves it against the golden samples with the engine's own
tolerance, and otherwise answers with the plain weights. An unknown key, a missing key or a wrong type is a `SpecError`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from handlerlib.errors import SpecError
from handlerlib.spec import Golden, parse, require

SCHEMA_VERSION = 1
ENGINE_FILE = "engine.json"
ENGINE_FOLDER = "engine"

OWN_TOLERANCE = 0.03
"""How far a probability of an engine may be from its own when it was judged: other sizes of batches and processors sum
in another order. The tolerance against the plain weights is wider, and would let pass what was never judged."""

Kind = Literal["torch", "openvino", "aoti"]
"""torch: eager, from the plain weights. openvino: OpenVINO's IR. aoti: a package of torch's AOTInductor."""
Precision = Literal["fp32", "bf16", "fp16", "int8"]
Device = Literal["cpu", "cuda"]
Reason = Literal[
    "switched-off", "spec", "device", "machine", "cpu-feature", "gpu-capability",
    "package-missing", "package-version", "files", "load", "self-test",
]  # fmt: skip
"""Why the plain weights answer instead: the label `reason` of `marina_engine_fallback`."""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why an engine cannot serve here."""

    reason: Reason
    detail: str
    """One sentence for the log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFile:
    """One file that the engine is made of."""

    path: str
    """Below the artifact's folder: `engine/NAME`."""
    sha256: str

    def __post_init__(self) -> None:
        parts = PurePosixPath(self.path).parts
        inside = len(parts) == 2 and parts[0] == ENGINE_FOLDER and ".." not in parts and "\\" not in self.path
        require(inside, "files.path", f"'{ENGINE_FOLDER}/NAME'", self.path)
        require(bool(re.fullmatch(r"[0-9a-f]{64}", self.sha256)), "files.sha256", "64 hex digits", self.sha256)


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """Versions of one Python package with which the engine's numbers hold."""

    name: str
    at_least: str
    """The oldest version, e.g. `2026.4`."""
    below: str
    """The first version that is too new."""

    def __post_init__(self) -> None:
        for where, text in (("at_least", self.at_least), ("below", self.below)):
            require(bool(_release(text)), f"built_for.packages.{where}", "a version number", text)
        ordered = _release(self.at_least) < _release(self.below)
        require(ordered, f"built_for.packages.{self.name}", "a range that holds a version", (self.at_least, self.below))


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltFor:
    """What a machine must have for the engine to be used there."""

    device: Device
    machine: str
    """`platform.machine()`, e.g. `x86_64`."""
    cpu_features: tuple[str, ...] = ()
    """Names as in /proc/cpuinfo, e.g. `avx512_vnni`; without them the numbers would differ or the gain be lost."""
    gpu_capability: str | None = None
    """Compute capability, e.g. `9.0`; an exact match is needed."""
    packages: tuple[Package, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchOptions:
    """How the kind `torch` runs the plain weights."""

    channels_last: bool = False
    fold: bool = False
    """Batch normalisation folded into the convolutions before it."""
    autocast: bool = False
    """Weights stay float32 and torch picks the operations that run in the lower precision."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """The engine against the plain weights on the same images."""

    split: str
    """The split that the images are from; `test`."""
    images: int
    reference: float
    """Share of images that the plain weights get right."""
    engine: float
    """Share of images that the engine gets right."""
    loss_points: float
    """(reference - engine) x 100: percentage points lost; negative when it gained."""
    interval_points: tuple[float, ...]
    """95 % confidence interval of `loss_points` (paired proportions, Agresti and Min 2005)."""
    budget_points: float
    """What was allowed to be lost."""

    def __post_init__(self) -> None:
        require(self.images >= 1, "accuracy.images", "at least 1", self.images)
        require(len(self.interval_points) == 2, "accuracy.interval_points", "two numbers", self.interval_points)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """How fast one batch size is on the machine that the engine was built on."""

    batch: int
    threads: int
    milliseconds: float
    """Per image: median over repeats that alternate with the reference's."""
    reference_milliseconds: float
    """Per image, of the plain weights, measured in the same minutes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropped:
    """A rung of the ladder that was tried and not taken."""

    rung: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """One engine. Written by `training.optimize`, read by the worker, by verification and by the golden proof."""

    schema: int = SCHEMA_VERSION
    rung: str
    """Its name on the ladder, in logs and in metrics, e.g. `openvino-int8`."""
    engine: Kind
    precision: Precision
    options: TorchOptions = dataclasses.field(default_factory=TorchOptions)
    """Of the kind `torch`."""
    files: tuple[EngineFile, ...] = ()
    built_for: BuiltFor
    tolerance: float
    """Largest absolute difference of any probability from the stored golden ones, which are the plain weights' own; of
    a value as part of the target's scale."""
    golden_difference: float
    """The largest one seen when the engine was built."""
    own_answers: tuple[tuple[float, ...], ...] = ()
    """Its own probabilities or values per golden sample, asked alone, when it was judged. What they may have changed since
    is a matter of `OWN_TOLERANCE`. Left out of the file when empty: older code kept none."""
    accuracy: Accuracy | None = None
    """Null: not measured, only allowed for fp32."""
    measurements: tuple[Measurement, ...] = ()
    dropped: tuple[Dropped, ...] = ()

    def __post_init__(self) -> None:
        require(self.schema == SCHEMA_VERSION, "schema", f"{SCHEMA_VERSION} (the one this code reads)", self.schema)
        require(bool(re.fullmatch(r"[a-z0-9][a-z0-9-]*", self.rung)), "rung", "lower case with dashes", self.rung)
        require(0 < self.tolerance < 1, "tolerance", "in (0, 1)", self.tolerance)
        paths = [file.path for file in self.files]
        require(len(set(paths)) == len(paths), "files", "distinct", paths)
        require(self.engine == "torch" or bool(paths), "files", "at least one for this kind of engine", paths)
        judged = self.accuracy is not None or self.precision == "fp32"
        require(judged, "accuracy", f"measured for the precision {self.precision}", None)

    def to_json(self) -> str:
        """Canonical text: sorted keys, two-space indent, one trailing newline. Same value, same bytes."""
        fields = dataclasses.asdict(self)
        if not self.own_answers:
            del fields["own_answers"]
        return json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> EngineSpec:
        """Parse and check. Raises SpecError naming the field."""
        return parse(cls, text, ENGINE_FILE)

    @classmethod
    def load(cls, folder: Path) -> EngineSpec | None:
        """Read `engine.json` in `folder`; None when there is none. Raises SpecError when it is wrong."""
        try:
            text = (folder / ENGINE_FILE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"{ENGINE_FILE} cannot be read: {error}") from error
        return cls.from_json(text)


def obstacle(spec: EngineSpec, device: str) -> Obstacle | None:
    """Why the engine cannot serve on `device` (`cpu` or `cuda`) of this machine; None when nothing stands against it.

    The capability of a GPU is not looked at: that needs torch.
    """
    wanted = spec.built_for
    if wanted.device != device:
        return Obstacle("device", f"it was built for {wanted.device} and this worker is on {device}")
    if wanted.machine != platform.machine():
        return Obstacle("machine", f"it was built for {wanted.machine} and this machine is {platform.machine()}")
    missing = sorted(set(wanted.cpu_features) - cpu_features()) if wanted.cpu_features else []
    if missing:
        return Obstacle("cpu-feature", f"this processor lacks {', '.join(missing)}")
    found = (_package_obstacle(package) for package in wanted.packages)
    return next((one for one in found if one is not None), None)


def files_obstacle(spec: EngineSpec, folder: Path) -> Obstacle | None:
    """The first file that is missing or is not the one that was built."""
    for file in spec.files:
        try:
            digest = sha256_of(folder / file.path)
        except OSError as error:
            return Obstacle("files", f"{file.path} cannot be read: {error.strerror or error}")
        if digest != file.sha256:
            return Obstacle("files", f"{file.path} is not the file that was built: its SHA-256 differs")
    return None


def own_golden(golden: Golden, own_answers: Sequence[tuple[float, ...]]) -> Golden | None:
    """The same samples with the engine's own answers and the tolerance that holds for them; None when it kept none.

    Raises SpecError when they do not belong to these samples.
    """
    if not own_answers:
        return None
    expected = [len(sample.outputs) for sample in golden.samples]
    require([len(row) for row in own_answers] == expected, "own_answers", f"rows of {expected} numbers", own_answers)
    samples = (sample.answering(row) for sample, row in zip(golden.samples, own_answers, strict=True))
    return Golden(tolerance=OWN_TOLERANCE, samples=tuple(samples))


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cpu_features(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the first processor says that it can do; empty where the system does not tell."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def installed_version(package: str) -> str | None:
    """The version of a Python package, without importing it; None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package_obstacle(wanted: Package, version_of: Callable[[str], str | None] = installed_version) -> Obstacle | None:
    version = version_of(wanted.name)
    if version is None:
        return Obstacle("package-missing", f"the package {wanted.name} is not installed")
    # 2.14.0 is no older than 2.14.
    if not _release(wanted.at_least) <= _release(version) < _release(wanted.below):
        return Obstacle(
            "package-version",
            f"{wanted.name} is {version}, it was built for at least {wanted.at_least} and below {wanted.below}",
        )
    return None


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers, without zeros at the end: `2.14.1+cpu` -> (2, 14, 1)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    kept = list(itertools.dropwhile(lambda part: part == 0, reversed(numbers)))
    return tuple(reversed(kept)) if kept or not numbers else (0,)
