"""Is this archive safe to unpack, exactly what was packed, and does it still give the answers it was exported with?

A list of independent checks, each a function from the archive to findings; a finding says what, where and the remedy.
The checks that would run the archive's code are skipped while one that guards it (zip safety, digests, names) fails.
"""

from __future__ import annotations

import dataclasses
import filecmp
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from handlerlib import engine_spec
from handlerlib.engine_spec import ENGINE_FILE, ENGINE_FOLDER, EngineSpec
from handlerlib.errors import SpecError
from handlerlib.spec import SPEC_FILE, ModelSpec
from marina import archive, model_config
from marina.archive import BUILD_FILE, CARD_FILE, MANIFEST_FILE, Archive
from marina.errors import ArchiveError
from marina.golden import mismatch, misses_labels

REPLAY_SECONDS = 600.0
"""How long loading and answering the golden samples may take."""
MAX_FILES = 10_000
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
_OPTIMISED = "optimise the artifact again: marina optimize ARTIFACT"
_DAMAGED = ("spec", "files", "load", "self-test")
"""Reasons of a fallback that lie in the archive and not in the machine."""
_ARCHIVED = "pack the artifact again: marina pack ARTIFACT"


@dataclass(frozen=True, slots=True)
class Finding:
    """One reason not to serve an archive."""

    message: str
    where: str
    """File inside the archive, or the archive itself."""
    remedy: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one check found, and how long it took."""

    check: str
    findings: tuple[Finding, ...]
    seconds: float
    skipped: bool = False
    notes: tuple[str, ...] = ()
    """What is worth knowing and no reason to refuse the archive."""


@dataclass(frozen=True, slots=True)
class Report:
    """All checks of one archive; it may be served when `passed`."""

    path: Path
    sha256: str
    outcomes: tuple[Outcome, ...]

    @property
    def passed(self) -> bool:
        return not any(outcome.findings or outcome.skipped for outcome in self.outcomes)

    @property
    def findings(self) -> tuple[Finding, ...]:
        return tuple(finding for outcome in self.outcomes for finding in outcome.findings)


class Subject:
    """The archive under test; what several checks need is read once. Raises ArchiveError when it is no zip at all."""

    def __init__(self, path: Path, scratch: Path, python: str) -> None:
        self.path = path
        self.python = python
        self._scratch = scratch
        try:
            with zipfile.ZipFile(path) as packed:
                self.entries = packed.infolist()
        except FileNotFoundError:
            raise ArchiveError(f"there is no archive {path}", remedy="pack one: marina pack ARTIFACT") from None
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise ArchiveError(f"{path} is not a readable archive: {error}", remedy=_ARCHIVED) from error

    @cached_property
    def root(self) -> Path:
        """The unpacked archive. Only read after zip safety passed."""
        root = self._scratch / "unpacked"
        try:
            with zipfile.ZipFile(self.path) as packed:
                packed.extractall(root)
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError, ValueError) as error:
            raise ArchiveError(f"{self.path} cannot be unpacked: {error}", remedy=_ARCHIVED) from error
        return root

    @cached_property
    def build(self) -> dict[str, Any]:
        """The build record. Raises ArchiveError when it is absent or not the one text it can be."""
        try:
            raw = (self.root / BUILD_FILE).read_bytes()
            record: dict[str, Any] = json.loads(raw)
            whole = archive.encode_build_record(record) == raw
        except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
            raise ArchiveError(f"{BUILD_FILE} is missing or damaged", remedy=_ARCHIVED) from error
        if not whole:
            raise ArchiveError(f"{BUILD_FILE} was changed: its own digest does not match", remedy=_ARCHIVED)
        files = record.get("files")
        if not isinstance(files, dict) or not all(isinstance(one, dict) for one in files.values()):
            raise ArchiveError(f"{BUILD_FILE} does not list the files of the archive", remedy=_ARCHIVED)
        return record

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What TorchServe reads of the model. Raises ArchiveError when it is absent or damaged."""
        try:
            model = json.loads((self.root / MANIFEST_FILE).read_text(encoding="utf-8"))["model"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArchiveError(f"{MANIFEST_FILE} is missing or damaged", remedy=_ARCHIVED) from error
        if not isinstance(model, dict):
            raise ArchiveError(f"{MANIFEST_FILE} is damaged: its model is no object", remedy=_ARCHIVED)
        return model

    @cached_property
    def spec(self) -> ModelSpec:
        return ModelSpec.load(self.root)

    @cached_property
    def config(self) -> dict[str, Any]:
        return model_config.read((self.root / model_config.CONFIG_FILE).read_text(encoding="utf-8"))

    @cached_property
    def engine(self) -> EngineSpec | None:
        """What the archive brings beside its plain weights."""
        return EngineSpec.load(self.root)

    @cached_property
    def replayed(self) -> dict[str, Any]:
        """The report of `replay.py` on the plain weights, run once for the checks that read it."""
        return _run_replay(self.python, self.root, self._scratch, self.config["batchSize"], engine="plain")

    @cached_property
    def replayed_engine(self) -> dict[str, Any]:
        """The same with the engine where it fits this machine."""
        return _run_replay(self.python, self.root, self._scratch, self.config["batchSize"], engine="auto")


@dataclass(frozen=True, slots=True)
class Check:
    """A name to show, and the function that looks. A guard stops the checks after it from running foreign code."""

    name: str
    run: Callable[[Subject], Iterator[Finding | str]]
    """A string is a note."""
    guard: bool = False


def verify(path: Path, *, python: str = sys.executable) -> Report:
    """Run every check. `python` is the interpreter that would serve. Raises ArchiveError when `path` is no archive."""
    with tempfile.TemporaryDirectory(prefix="marina-verify-") as scratch:
        subject = Subject(path, Path(scratch), python)
        outcomes: list[Outcome] = []
        guarded = True
        for check in CHECKS:
            outcome = _run(check, subject) if guarded else Outcome(check.name, (), 0.0, skipped=True)
            outcomes.append(outcome)
            guarded = guarded and not (check.guard and outcome.findings)
    return Report(path, archive.sha256_of(path), tuple(outcomes))


def inspect(path: Path) -> dict[str, Any]:
    """What is inside, from the file alone: nothing is unpacked to disk or run. Raises ArchiveError."""
    try:
        with zipfile.ZipFile(path) as packed:
            record = _object(packed, BUILD_FILE, "metrics", "provenance", "built_with")
            manifest = _object(packed, MANIFEST_FILE)
            spec = ModelSpec.from_json(packed.read(SPEC_FILE).decode())
            config = packed.read(model_config.CONFIG_FILE).decode()
            card = packed.read(CARD_FILE).decode()
            engine = None
            if ENGINE_FILE in packed.namelist():
                engine = json.loads(EngineSpec.from_json(packed.read(ENGINE_FILE).decode()).to_json())
            files = {info.filename: info.file_size for info in packed.infolist()}
    except FileNotFoundError:
        raise ArchiveError(f"there is no archive {path}", remedy="pack one: marina pack ARTIFACT") from None
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, KeyError, ValueError, RuntimeError, SpecError) as error:
        raise ArchiveError(f"{path} is not an archive of Marina's: {error}", remedy=_ARCHIVED) from error
    return {
        "archive": str(path),
        "sha256": archive.sha256_of(path),
        "bytes": path.stat().st_size,
        "build": record,
        "manifest": manifest,
        "spec": json.loads(spec.to_json()),
        "engine": engine,
        "config": config,
        "card": card,
        "files": files,
    }


def _object(packed: zipfile.ZipFile, name: str, *keys: str) -> dict[str, Any]:
    """A JSON object with at least `keys`. Raises ValueError."""
    found = json.loads(packed.read(name))
    if not isinstance(found, dict) or not set(keys) <= found.keys():
        raise ValueError(f"{name} is not an object" + (f" with {', '.join(keys)}" if keys else ""))
    return found


def identify(path: Path, report: Report) -> Archive:
    """What a verified file is, for the store's index."""
    found = inspect(path)
    return Archive(path, found["spec"]["name"], found["spec"]["version"], report.sha256, found["bytes"])


def _run(check: Check, subject: Subject) -> Outcome:
    started = time.perf_counter()
    try:
        said = tuple(check.run(subject))
    except (ArchiveError, SpecError) as error:
        said = (Finding(str(error), subject.path.name, error.remedy or _ARCHIVED),)
    except Exception as error:  # noqa: BLE001 - whatever a stranger's file brings about speaks against the file
        said = (Finding(f"the check failed with {type(error).__name__}: {error}", subject.path.name, _ARCHIVED),)
    findings = tuple(one for one in said if isinstance(one, Finding))
    notes = tuple(one for one in said if isinstance(one, str))
    return Outcome(check.name, findings, time.perf_counter() - started, notes=notes)


def zip_safety(subject: Subject) -> Iterator[Finding]:
    """No entry leaves the folder, links, hides behind another, is encrypted or unpacks to more than it is."""
    seen: set[str] = set()
    remedy = "do not use this file; " + _ARCHIVED
    if len(subject.entries) > MAX_FILES:
        yield Finding(f"{len(subject.entries)} files, at most {MAX_FILES} are accepted", subject.path.name, remedy)
        return
    for info in subject.entries:
        name = info.filename
        parts = PurePosixPath(name).parts
        if name.startswith("/") or "\\" in name or ".." in parts or ":" in name or "\0" in info.orig_filename:
            yield Finding("the name leads out of the archive's folder", name, remedy)
        elif info.external_attr >> 16 & 0o170000 not in (0, 0o100000) or info.is_dir():
            yield Finding("not a plain file", name, remedy)
        elif name in seen:
            yield Finding("two entries of the same name", name, remedy)
        elif info.flag_bits & 0x1:
            yield Finding("the entry is encrypted", name, remedy)
        elif info.compress_type != zipfile.ZIP_STORED:
            yield Finding("the entry is compressed; Marina stores archives uncompressed", name, remedy)
        elif info.compress_size != info.file_size:
            yield Finding("the entry has two sizes; what is stored has one", name, remedy)
        seen.add(name)
    size, unpacked = subject.path.stat().st_size, sum(info.file_size for info in subject.entries)
    if unpacked > size:
        yield Finding(f"{size} bytes unpack to {unpacked}: entries overlap", subject.path.name, remedy)


def digests(subject: Subject) -> Iterator[Finding]:
    """Every file is the one that was packed, none is missing or added, and the zip around them is canonical."""
    recorded: dict[str, dict[str, Any]] = subject.build["files"]
    present = set(archive.file_names(subject.root)) - {BUILD_FILE}
    for name in sorted(recorded.keys() - present):
        yield Finding("the file is in the build record and missing in the archive", name, _ARCHIVED)
    for name in sorted(present - recorded.keys()):
        yield Finding("the file is not in the build record", name, _ARCHIVED)
    for name in sorted(present & recorded.keys()):
        if archive.sha256_of(subject.root / name) != recorded[name].get("sha256"):
            yield Finding("the file was changed after packing: its SHA-256 differs", name, _ARCHIVED)
    again = subject.root.parent / "canonical.mar"
    archive.write_canonical(subject.root, again)
    if not filecmp.cmp(subject.path, again, shallow=False):
        yield Finding("the zip's own structure was changed after packing", subject.path.name, _ARCHIVED)
    again.unlink()


def names(subject: Subject) -> Iterator[Finding]:
    """Nothing that TorchServe's modules would hide, nothing unpickled, nothing installed at start; a name and a version
    that a store can hold."""
    tops = {PurePosixPath(name).parts[0] for name in archive.file_names(subject.root)}
    for top in sorted(tops):
        if top.removesuffix(".py") in archive.RESERVED_NAMES:
            yield Finding("a worker would import TorchServe's module of this name instead", top, "rename the file")
    for name in archive.file_names(subject.root):
        if name.endswith(_PICKLES):
            yield Finding("a format that runs code when it is read", name, "store weights as safetensors")
    model = subject.manifest
    if "requirementsFile" in model:
        where = str(model["requirementsFile"])
        yield Finding("packages would be installed at start", where, "bake packages into the image")
    try:
        archive.require_key(subject.spec.name, subject.spec.version)
    except ArchiveError as error:
        yield Finding(str(error), SPEC_FILE, error.remedy)
    if (model.get("modelName"), model.get("modelVersion")) != (subject.spec.name, subject.spec.version):
        yield Finding(f"manifest and {SPEC_FILE} disagree on name or version", MANIFEST_FILE, _ARCHIVED)


def configuration(subject: Subject) -> Iterator[Finding]:
    """The keys and traps of `model-config.yaml`."""
    try:
        text = (subject.root / model_config.CONFIG_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        yield Finding("the file is missing or not text", model_config.CONFIG_FILE, _ARCHIVED)
        return
    for finding in model_config.check(text):
        yield Finding(finding.message, model_config.CONFIG_FILE, finding.remedy)


def loads(subject: Subject) -> Iterator[Finding]:
    """TorchServe's own loader takes the archive in a process of its own: import, weights, self-test, warm-up."""
    if subject.replayed["stage"] == "import":
        yield Finding(
            subject.replayed["error"], subject.spec.handler + ".py", "run the handler's tests, mend it, pack again"
        )


def golden(subject: Subject) -> Iterator[Finding]:
    """Each golden sample alone, and a full batch with a poison in it, answer as at export: the plain weights."""
    if subject.replayed["stage"] != "import":
        yield from _answered(subject.replayed, subject.spec, subject.spec.golden.tolerance)


def engine(subject: Subject) -> Iterator[Finding | str]:
    """The same with the engine that the archive brings, within its own tolerance and near its own answers; a note where
    it cannot run here."""
    if subject.engine is None:
        return
    damaged = tuple(_engine_files(subject.engine, subject.root))
    if damaged:
        yield from damaged
        return
    rung, report = subject.engine.rung, subject.replayed_engine
    if report["stage"] == "import":
        yield Finding(f"with the engine {rung}: {report['error']}", ENGINE_FILE, _OPTIMISED)
    elif report.get("engine") == rung or "error" in report:
        found = tuple(_answered(report, subject.spec, subject.engine.tolerance, f"engine {rung}, "))
        own = engine_spec.own_golden(subject.spec.golden, subject.engine.own_answers)
        if not found and own is not None:
            judged = dataclasses.replace(subject.spec, golden=own)
            found = tuple(_answered(report, judged, own.tolerance, f"engine {rung} beside its own answers, "))
        yield from found
    elif report["reason"] in _DAMAGED:
        yield Finding(f"the engine {rung} cannot serve where it fits: {report['fallback']}", ENGINE_FILE, _OPTIMISED)
    else:
        yield f"engine {rung} not tried on this machine, plain weights answer: {report['fallback']}"


def _engine_files(engine: EngineSpec, root: Path) -> Iterator[Finding]:
    """Every file below `engine/` is one that engine.json names, and is the one that was built."""
    named = {file.path for file in engine.files}
    for name in archive.file_names(root):
        if name.startswith(f"{ENGINE_FOLDER}/") and name not in named:
            yield Finding(f"{ENGINE_FILE} does not name this file", name, _OPTIMISED)
    damaged = engine_spec.files_obstacle(engine, root)
    if damaged is not None:
        yield Finding(damaged.detail, ENGINE_FILE, _OPTIMISED)


def _answered(report: dict[str, Any], spec: ModelSpec, tolerance: float, who: str = "") -> Iterator[Finding]:
    """What is wrong with the golden answers of one replay."""
    if "error" in report:
        yield Finding(report["error"], spec.handler + ".py", "mend the handler and pack again")
        return
    for index, (sample, answer) in enumerate(zip(spec.golden.samples, report["alone"], strict=True)):
        yield from _compare(answer, spec, index, f"{who}{sample.file}, alone", tolerance)
    for index, answer in enumerate(report["unasked"]):
        yield from _compare(answer, spec, index, f"{who}{spec.golden.samples[index].file}", tolerance, unasked=True)
    for position, (index, answer) in enumerate(zip(report["order"], report["batch"], strict=True)):
        where = f"{position} of a batch of {len(report['order'])}"
        if position == report["poison_at"]:
            yield from _refused(answer, f"{who}the poison at {where}")
        else:
            yield from _compare(answer, spec, index, f"{who}{spec.golden.samples[index].file}, at {where}", tolerance)


CHECKS = (
    Check("zip safety", zip_safety, guard=True),
    Check("digests", digests, guard=True),
    Check("names", names, guard=True),
    Check("configuration", configuration, guard=True),
    Check("loads in TorchServe", loads),
    Check("golden samples", golden),
    Check("engine", engine),
)
"""To add a check: write its function above, add it here, and a test that plants its fault."""


def _compare(
    answer: dict[str, Any], spec: ModelSpec, index: int, where: str, tolerance: float, *, unasked: bool = False
) -> Iterator[Finding]:
    """`unasked`: the answer holds the labels above their thresholds, otherwise all outputs."""
    sample = spec.golden.samples[index]
    remedy = "serve with the versions in build.json, or export and pack again"
    if answer["status"] != 200:
        yield Finding(f"expected 200, got {answer['status']}: {answer['body'][:200]}", where, remedy)
        return
    try:
        rows = json.loads(answer["body"])["predictions"][0]
        got = {row["index"]: float(row["value" if spec.task == "regression" else "probability"]) for row in rows}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        yield Finding(f"the answer is not a prediction: {error!r}", where, "mend the handler and pack again")
        return
    difference = misses_labels(spec, sample, got, tolerance) if unasked else mismatch(spec, sample, got, tolerance)
    if difference:
        yield Finding(difference, where, remedy)


def _refused(answer: dict[str, Any], where: str) -> Iterator[Finding]:
    if not 400 <= answer["status"] < 500 or answer["content_type"] != "application/problem+json":
        yield Finding(
            f"expected a 4xx as application/problem+json, got {answer['status']} as {answer['content_type']}",
            where,
            "the handler must refuse a bad input alone",
        )


def _run_replay(python: str, root: Path, scratch: Path, batch_size: int, *, engine: str) -> dict[str, Any]:
    """A worker's environment and no more of ours than it would have."""
    kept = {
        key: os.environ[key]
        for key in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
        if key in os.environ
    }
    environment = {**kept, "PYTHONPATH": str(root), "TMPDIR": str(scratch), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["MARINA_ENGINE"] = engine
    # Threads that wait for their next share of the work would spin on cores that the workers of this machine need.
    environment["OMP_WAIT_POLICY"] = "PASSIVE"
    command = [python, str(Path(__file__).with_name("replay.py")), str(root), str(batch_size)]
    try:
        done = subprocess.run(
            command,
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=REPLAY_SECONDS,
            check=False,
            start_new_session=True,  # of which replay.py lowers the priority
        )
    except subprocess.TimeoutExpired:
        return {"stage": "import", "error": f"no answer within {REPLAY_SECONDS:.0f} s"}
    except OSError as error:
        raise ArchiveError(
            f"{python} cannot be run: {error}", remedy="give the serving interpreter with --python"
        ) from error
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        return {"stage": "import", "error": f"the process ended with exit code {done.returncode}: {last}"}
    return report
