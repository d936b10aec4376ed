"""Climb the ladder: build each rung, try it, judge it, and make an artifact version of the fastest that passes.

A run folder, `runs/optimize-<name>-<8 hex digits>/`, is named after model, machine and settings: a finished one is
reused, an interrupted one goes on with the rungs that have no result yet.

    ladder.json   every figure and reason        ladder.png    time per image against the plain weights
    <rung>/       draft, engine files, log, answers on the test images
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from handlerlib import cores, engine_spec, engines
from handlerlib.engine_spec import Accuracy, Dropped, EngineSpec
from handlerlib.loading import PLAIN
from handlerlib.spec import SPEC_FILE, WEIGHTS_FILE, ModelSpec
from handlerlib.worker import rows_at_once
from training import files, pipeline
from training.errors import DataError, Interrupted, RecipeError, TargetError
from training.export import METRICS_FILE, PROVENANCE_FILE, require_images, to_json
from training.optimize import judge, measure, plots, publish, rungs, trial
from training.optimize.rungs import Draft, Rung
from training.optimize.trial import ChildFailed, Job, Trial
from training.progress import Report, Step

Objective = Literal["throughput", "latency", "both"]

LADDER_FILE = "ladder.json"
PLOT_FILE = "ladder.png"
LEAST_GAIN = 1.05
"""How much faster than the plain weights, and a lossy rung than the best lossless one, it must be: less is noise."""
_DATA_FILE = "data.safetensors"
_TARGETS_FILE = "targets.safetensors"
_FAILED_FILE = "dropped.txt"
_NO_SHARE = "what a model of values loses is no share of right answers"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What `marina optimize` was asked for."""

    device: Literal["cpu", "cuda"] = "cpu"
    budget: float = 0.5
    """Percentage points of accuracy that may be lost on the test images."""
    objective: Objective = "both"
    limit: int = 2000
    """Test images to judge on; 0: all."""
    seconds: float = 2.0
    """Per measurement."""
    batch_size: int = 32
    """The largest batch that the handler's configuration allows."""
    rungs: tuple[str, ...] = ()
    """Only these; empty: all of the device."""
    root: Path | None = None
    """Where the images lie, if not where they were in training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One rung's way through the ladder."""

    rung: str
    reason: str
    """Why it was dropped; empty when it passed."""
    trial: Trial | None = None
    accuracy: Accuracy | None = None
    tolerance: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What the ladder found."""

    run: Path
    outcomes: tuple[Outcome, ...]
    """The reference first, then in the ladder's order."""
    chosen: str | None
    """The rung that was taken; None when nothing beats the plain weights."""
    artifact: Path | None
    """The new version; None when nothing was taken."""
    notes: tuple[str, ...]
    """What a person should know: why only lossless rungs were allowed, how sure the accuracy is."""
    reused: bool
    """True when every figure comes from an earlier run."""


def run(
    artifact: Path, settings: Settings, *, runs: Path, artifacts: Path, report: Report, again: bool = False
) -> Result:
    """Climb. `again` forgets an earlier run's figures.

    Raises TargetError when `artifact` is none, RecipeError when the device or a rung does not exist, ChildFailed when
    not even the plain weights can be tried, RunBusy when another process climbs the same ladder, and Interrupted on Ctrl-C.
    """
    spec = _read(artifact)
    wanted = _wanted(settings)
    folder = runs / _run_name(artifact, spec, settings, wanted)
    folder.mkdir(parents=True, exist_ok=True)
    with pipeline.only_one(folder):
        if again:
            pipeline.empty(folder)
        return _run(artifact, spec, settings, wanted, folder, artifacts, report)


def _run(
    artifact: Path,
    spec: ModelSpec,
    settings: Settings,
    wanted: Sequence[Rung],
    folder: Path,
    artifacts: Path,
    report: Report,
) -> Result:
    try:
        notes = () if (folder / _TARGETS_FILE).exists() else _provide_data(artifact, spec, settings, folder, report)
        reused = (folder / LADDER_FILE).exists()
        outcomes = _climb(artifact, spec, settings, wanted, folder, report)
    except KeyboardInterrupt:
        raise Interrupted("stopped; the rungs that are done are kept") from None
    chosen = choose(outcomes, settings.objective)
    target = None
    if chosen is not None:
        engine = _engine(chosen, outcomes, trial.read_draft(folder / chosen.rung))
        target = publish.with_engine(artifact, engine, folder / chosen.rung, artifacts, run=folder.name)
    notes = (*notes, *_remarks(outcomes, chosen, settings))
    _record(folder, spec, settings, outcomes, chosen, notes)
    plots.ladder(outcomes, chosen, folder / PLOT_FILE, title=f"{spec.name} on {settings.device}")
    (folder / _DATA_FILE).unlink(missing_ok=True)
    return Result(
        run=folder,
        outcomes=outcomes,
        chosen=chosen.rung if chosen else None,
        artifact=target,
        notes=notes,
        reused=reused,
    )


def choose(outcomes: Sequence[Outcome], objective: Objective) -> Outcome | None:
    """The fastest that passed. A lossless one is taken unless a lossy one is clearly faster; None: stay with plain."""
    passed = [
        outcome for outcome in outcomes if not outcome.reason and outcome.trial is not None and outcome.rung != PLAIN
    ]
    fast = [outcome for outcome in passed if gain(outcome, objective) >= LEAST_GAIN]
    lossless = [outcome for outcome in fast if rungs.find(outcome.rung).lossless]
    best = max(fast, key=lambda outcome: gain(outcome, objective), default=None)
    safe = max(lossless, key=lambda outcome: gain(outcome, objective), default=None)
    if best is None or safe is None or best is safe:
        return best
    return best if gain(best, objective) >= LEAST_GAIN * gain(safe, objective) else safe


def gain(outcome: Outcome, objective: Objective) -> float:
    """How many times faster than the plain weights, measured in turns with them.

    latency: one image on all cores. throughput: the largest batch that goes through a worker at once, on one thread, as
    a busy worker has it. both: the geometric mean of the two.
    """
    assert outcome.trial is not None
    figures = outcome.trial.measurements
    alone = next(one for one in figures if one.batch == 1)
    busy = max((one for one in figures if one.threads == 1), key=lambda one: one.batch)
    latency, throughput = (one.reference_milliseconds / one.milliseconds for one in (alone, busy))
    return {"latency": latency, "throughput": throughput, "both": math.sqrt(latency * throughput)}[objective]


# ------------------------------------------------------------------------------------------------------------ before


def _read(artifact: Path) -> ModelSpec:
    for name in (SPEC_FILE, WEIGHTS_FILE, METRICS_FILE, PROVENANCE_FILE):
        if not (artifact / name).is_file():
            raise TargetError(f"{artifact} is no artifact: it lacks {name}", remedy="give artifacts/NAME/VERSION")
    spec = ModelSpec.load(artifact)
    require_images(spec)
    return spec


def _wanted(settings: Settings) -> tuple[Rung, ...]:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("the device is cuda, but torch sees no GPU", remedy="--device cpu, or run it on a GPU worker")
    offered = rungs.for_device(settings.device)
    if not settings.rungs:
        return offered
    for name in settings.rungs:
        if rungs.find(name) not in offered:
            raise RecipeError(f"rung '{name}' is none for {settings.device}", remedy="see the table without --rung")
    return tuple(rung for rung in offered if rung.name == PLAIN or rung.name in settings.rungs)


def _run_name(artifact: Path, spec: ModelSpec, settings: Settings, wanted: Sequence[Rung]) -> str:
    identity = {
        "weights": engine_spec.sha256_of(artifact / WEIGHTS_FILE),
        # The version is no part of it: the same weights under another number are the same model.
        "spec": dataclasses.replace(spec, version="0").to_json(),
        "provenance": json.loads((artifact / PROVENANCE_FILE).read_text(encoding="utf-8")).get("data_digest"),
        "machine": [platform.machine(), platform.processor(), sorted(engine_spec.cpu_features())],
        "cores": cores.usable(),
        "packages": {name: engine_spec.installed_version(name) for name in ("torch", "openvino", "nncf")},
        "device": settings.device,
        "measured": [settings.limit, settings.seconds, _at_once(spec, settings), [rung.name for rung in wanted]],
        "code": _code_digest(),
    }
    return f"optimize-{spec.name}-{hashlib.sha256(to_json(identity).encode()).hexdigest()[:8]}"


def _code_digest() -> str:
    """Of what builds, measures and runs engines."""
    paths = (*Path(__file__).parent.glob("*.py"), Path(engines.__file__))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(paths))).hexdigest()


def _provide_data(artifact: Path, spec: ModelSpec, settings: Settings, folder: Path, report: Report) -> tuple[str, ...]:
    """Real images for the children, in one file; or a note why there are none."""
    if spec.task == "regression":
        return (f"only lossless rungs are allowed: {_NO_SHARE}",)
    path = folder / _DATA_FILE
    if path.exists():
        return ()
    try:
        found = judge.data(artifact, root=settings.root, limit=settings.limit, report=report)
    except (DataError, RecipeError, TargetError, KeyError) as error:
        reason = f"a record of its origin is missing: {error}" if isinstance(error, KeyError) else str(error)
        return (f"only lossless rungs are allowed, because there are no test images: {reason}",)
    tensors = {"test": found.x_test_NCHW, "targets": found.targets_N, "calibration": found.x_calibration_NCHW}
    pipeline.empty(folder)  # of a run that had no images
    files.write(path, lambda temporary: safetensors.torch.save_file(tensors, temporary))
    return ()


# ------------------------------------------------------------------------------------------------------------- climbing


def _climb(
    artifact: Path, spec: ModelSpec, settings: Settings, wanted: Sequence[Rung], folder: Path, report: Report
) -> tuple[Outcome, ...]:
    data = folder / _DATA_FILE
    targets = _targets(folder, data)
    reference: Tensor | None = None
    outcomes = []
    for number, rung in enumerate(wanted):
        report(Step("optimize", number, len(wanted), rung.name))
        outcome = _climb_one(artifact, spec, settings, rung, folder / rung.name, data if data.exists() else None)
        if rung.name == PLAIN and outcome.trial is None:
            raise ChildFailed(f"the plain weights cannot be tried: {outcome.reason}", remedy=f"see {folder / PLAIN}")
        if outcome.trial is not None and targets is not None:
            answers = _answers(folder / rung.name)
            reference = answers if reference is None else reference
            outcome = _judged(outcome, rung, judge.compare(reference, answers, targets, spec.thresholds), settings)
        outcomes.append(outcome)
    report(Step("optimize", len(wanted), len(wanted), ""))
    return tuple(outcomes)


def _climb_one(
    artifact: Path, spec: ModelSpec, settings: Settings, rung: Rung, folder: Path, data: Path | None
) -> Outcome:
    """Build and try one rung, unless its result is there; the gate of the golden samples."""
    failed = folder / _FAILED_FILE
    if not (folder / trial.TRIAL_FILE).exists():
        if not failed.exists():
            reason = _attempt(artifact, spec, settings, rung, folder, data)
            if reason:
                folder.mkdir(exist_ok=True)
                files.write_text(failed, reason)
        if failed.exists():
            return Outcome(rung=rung.name, reason=failed.read_text(encoding="utf-8"))
    found = trial.read_trial(folder)
    allowed = judge.tolerance(spec, rung.precision, found.golden.difference)
    reason = judge.strays(found.golden.spread) if rung.packed else "it compiles at each start; aoti is its packed form"
    if allowed is None:
        cap = judge.CAPS.get(rung.precision, spec.golden.tolerance)
        reason = f"a golden {_answer(spec)} differs by {found.golden.difference:.2g}, {cap:g} is allowed"
    return Outcome(rung=rung.name, reason=reason, trial=found, tolerance=allowed)


def _answer(spec: ModelSpec) -> str:
    return "value, as a part of its target's scale," if spec.task == "regression" else "probability"


def _attempt(artifact: Path, spec: ModelSpec, settings: Settings, rung: Rung, folder: Path, data: Path | None) -> str:
    """Build and try; why it could not be done, or nothing."""
    if not rung.lossless and spec.task == "regression":
        return _NO_SHARE
    reason = rungs.missing(rung, settings.device, calibration=data is not None)
    if reason:
        return reason
    if not rung.lossless and data is None:
        return "its accuracy cannot be judged without test images"
    shutil.rmtree(folder, ignore_errors=True)
    stages: tuple[Literal["build", "trial"], ...] = ("build", "trial")
    try:
        for what in stages:
            try:
                trial.run(_job(what, rung, artifact, spec, folder, data, settings))
            except ChildFailed as error:
                return f"{what}: {error}"
    finally:
        shutil.rmtree(folder / "inductor", ignore_errors=True)
    return ""


def _at_once(spec: ModelSpec, settings: Settings) -> int:
    return rows_at_once(settings.batch_size, spec.architecture, torch.device(settings.device))


def _job(
    what: Literal["build", "trial"],
    rung: Rung,
    artifact: Path,
    spec: ModelSpec,
    folder: Path,
    data: Path | None,
    settings: Settings,
) -> Job:
    return Job(
        what=what,
        rung=rung.name,
        artifact=artifact.resolve(),
        folder=folder.resolve(),
        data=data.resolve() if data else None,
        device=settings.device,
        pairs=measure.loads(_at_once(spec, settings)),
        seconds=settings.seconds,
    )


def _judged(outcome: Outcome, rung: Rung, compared: judge.Comparison, settings: Settings) -> Outcome:
    """The gate of the accuracy budget."""
    record = compared.record(settings.budget)
    reason = outcome.reason
    if not reason and compared.loss_points > settings.budget:
        low, high = compared.interval
        reason = (
            f"it loses {compared.loss_points:.2f} points of accuracy on {compared.images} test images"
            f" (95 % interval {low:.2f} to {high:.2f}), {settings.budget:g} are allowed"
        )
    return dataclasses.replace(outcome, reason=reason, accuracy=None if rung.name == PLAIN else record)


def _targets(folder: Path, data: Path) -> Tensor | None:
    """True classes of the test images; kept beside the results, because the images are removed at the end."""
    kept = folder / _TARGETS_FILE
    if data.exists() and not kept.exists():
        with safetensors.safe_open(data, framework="pt") as opened:
            targets = opened.get_tensor("targets")
        files.write(kept, lambda path: safetensors.torch.save_file({"targets": targets}, path))
    return safetensors.torch.load_file(kept)["targets"] if kept.exists() else None


def _answers(folder: Path) -> Tensor:
    return safetensors.torch.load_file(folder / trial.ANSWERS_FILE)["answers"]


# --------------------------------------------------------------------------------------------------------------- after


def _engine(chosen: Outcome, outcomes: Sequence[Outcome], draft: Draft) -> EngineSpec:
    assert chosen.trial is not None and chosen.tolerance is not None
    others = (outcome for outcome in outcomes if outcome.rung not in (chosen.rung, PLAIN))
    return EngineSpec(
        rung=draft.rung,
        engine=draft.engine,
        precision=draft.precision,
        options=draft.options,
        files=draft.files,
        built_for=draft.built_for,
        tolerance=chosen.tolerance,
        golden_difference=round(chosen.trial.golden.difference, 8),
        own_answers=chosen.trial.golden.answers,
        accuracy=chosen.accuracy,
        measurements=chosen.trial.measurements,
        dropped=tuple(Dropped(rung=outcome.rung, reason=outcome.reason or "slower") for outcome in others),
    )


def _remarks(outcomes: Sequence[Outcome], chosen: Outcome | None, settings: Settings) -> tuple[str, ...]:
    if chosen is None:
        return ("nothing that passed is clearly faster than the plain weights: the artifact stays as it is",)
    found = chosen.accuracy
    if found is None or found.interval_points[1] <= settings.budget:
        return ()
    return (
        f"{found.images} test images do not prove that {chosen.rung} stays within {settings.budget:g} points: it lost"
        f" {found.loss_points:.2f}, the 95 % interval reaches {found.interval_points[1]:.2f}"
        + ("; more images: --limit 0" if found.images == settings.limit else ""),
    )


def _record(
    folder: Path,
    spec: ModelSpec,
    settings: Settings,
    outcomes: Sequence[Outcome],
    chosen: Outcome | None,
    notes: Sequence[str],
) -> None:
    value: Mapping[str, Any] = {
        "name": spec.name,
        "settings": json.loads(json.dumps(dataclasses.asdict(settings), default=str)),
        "machine": {"cores": cores.usable(), "machine": platform.machine()},
        "chosen": chosen.rung if chosen else None,
        "notes": list(notes),
        "rungs": [row(outcome) for outcome in outcomes],
    }
    files.write_text(folder / LADDER_FILE, to_json(value))


def row(outcome: Outcome) -> dict[str, Any]:
    """One rung as JSON shows it."""
    found: dict[str, Any] = {"rung": outcome.rung, "dropped": outcome.reason or None, "tolerance": outcome.tolerance}
    found["accuracy"] = dataclasses.asdict(outcome.accuracy) if outcome.accuracy else None
    if outcome.trial is not None:
        found |= dataclasses.asdict(outcome.trial)
        found |= {"golden_difference": found.pop("golden")["difference"]}
        found["gain"] = {kind: round(gain(outcome, kind), 3) for kind in ("latency", "throughput", "both")}
    return found
