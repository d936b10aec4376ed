"""The commands: `train`, `evaluate`, `export` and `test_samples`, each from recipe or folder to result.

A run folder, `runs/<name>-<8 hex digits>/`, is named after everything that decides its result, so the same command
finds its own work again: finished, it is reused; interrupted, it goes on.

    recipe.json        the resolved recipe           history.jsonl         one line per epoch
    data_report.json   splits and what was left out  curves.png, confusion_matrix.png (labels.png, values.png)
    checkpoint.pt      position, while training      metrics.json          figures, per class, confusion matrix
    report.html        all of it on one page
    weights.safetensors, model_spec.json, golden/, provenance.json         what `artifacts/` gets a copy of
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import platform
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from handlerlib.errors import SpecError
from handlerlib.spec import SPEC_FILE, WEIGHTS_FILE, ModelSpec
from training import data, distributed, files, html_report, labelled, plots, scoring, truth
from training import export as exporting
from training.compress import distil
from training.compress.distil import Teacher
from training.config import Recipe, Train, parse
from training.data import Dataset, Sample, Survey
from training.distributed import ALONE, Group
from training.errors import DataError, Interrupted, RecipeError, RunBusy, TargetError
from training.evaluate import Evaluation, calibrated, with_thresholds
from training.evaluate import evaluate as judge
from training.export import METRICS_FILE, PROVENANCE_FILE
from training.progress import Report, Step, silent
from training.scoring import Questions
from training.sources import Skipped
from training.train import (
    CHECKPOINT,
    HISTORY,
    Fitted,
    Judged,
    architecture,
    choose_device,
    choose_threads,
    fit,
    reproducible,
    start_network,
)

__all__ = ["Evaluation", "Sample", "Step", "Trained", "evaluate", "export", "test_samples", "train"]

RECIPE_FILE = "recipe.json"
DATA_REPORT_FILE = "data_report.json"
_PIXELS_FILE = "pixels.bin"
_LOCK_FILE = ".lock"


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished run and the artifact made of it."""

    run: Path
    artifact: Path
    metrics: dict[str, float]
    """Flat: test_*, validation_* of the best epoch, best_epoch, epochs, and data_* counts."""
    reused: bool
    """True when nothing had to be trained."""


def train(recipe: Recipe, *, runs: Path, artifacts: Path, report: Report, again: bool = False) -> Trained:
    """Train, judge on the test split and export; or reuse or resume the same run from before.

    `again` forgets an earlier run. Started by torchrun, all processes train the same run and return the same. Raises
    RecipeError, DataError, NumericFailure, or Interrupted on Ctrl-C.
    """
    threads = choose_threads(recipe.train)
    try:
        with distributed.joined(recipe.train) as group, reproducible(threads), contextlib.ExitStack() as held:
            report = report if group.leads else silent
            surveyed = data.survey(recipe, threads=threads, report=report)
            teacher = load_teacher(recipe, surveyed)
            run = runs / run_id(recipe, surveyed, threads, teacher, group.size)
            reused = group.first_does(lambda: _open(recipe, run, artifacts, again, held))
            if not reused:
                _run(recipe, surveyed, run, threads, report, teacher, group)
            artifact = group.first_does(lambda: exporting.publish(run, artifacts, recipe.version))
            return Trained(run, artifact, _flat(read_json(run / METRICS_FILE)), reused)
    except KeyboardInterrupt:
        raise Interrupted("stopped; what was saved is kept") from None


def _open(recipe: Recipe, run: Path, artifacts: Path, again: bool, held: contextlib.ExitStack) -> bool:
    """Make the run folder this process's own until `held` ends; whether the run is finished."""
    # Asked before any work: a version that is taken must not cost a training.
    exporting.choose_version(artifacts, recipe.name, recipe.version, run.name)
    run.mkdir(parents=True, exist_ok=True)
    held.enter_context(only_one(run))
    # What a group that was started again finds is its own.
    if again and not distributed.restarted():
        empty(run)
    files.write_text(run / RECIPE_FILE, exporting.to_json(recipe.model_dump(mode="json")))
    return (run / PROVENANCE_FILE).exists()


def evaluate(target: Path, *, report: Report = silent, root: str | Path | None = None) -> Evaluation:
    """Judge a finished run or an artifact on its own test split, rebuilt from the recorded recipe.

    `root` says where the data lies now, when not where it was. Raises TargetError for another kind of folder and
    DataError when the data is not what the model was trained on.
    """
    return evaluate_on(target, questions(target, report=report, root=root), report=report)


def questions(
    target: Path, *, report: Report = silent, root: str | Path | None = None, folder: Path | None = None
) -> Questions:
    """The test split of a run or an artifact, or what lies in `folder` by class or in a .csv. Raises as `evaluate`."""
    if folder is not None:
        asked = labelled.labelled(folder, target)
        scoring.check_labels(asked, load_spec(target).labels, str(target))
        return asked
    dataset, _ = rebuild(target, root, report)
    return Questions("test split", len(dataset.rows["test"]), lambda: dataset.samples("test"), dataset.classes)


def evaluate_on(target: Path, asked: Questions, *, report: Report = silent) -> Evaluation:
    """Judge a finished run or an artifact on any samples of its classes. Raises TargetError, and DataError for a
    sample that cannot be read where they are not such as may be left out."""
    spec = load_spec(target)
    train = _recorded_train(target)
    threads = choose_threads(train)
    try:
        with reproducible(threads):
            network = exporting.load_network(target, spec).to(choose_device(train))
            how = {"total": asked.total, "threads": threads}
            return judge(network, spec, asked.read(), **how, report=report, leave_out=asked.leave_out)
    except KeyboardInterrupt:
        raise Interrupted("evaluation stopped") from None


def subject(target: Path, asked: Questions, left_out: Sequence[Skipped] = ()) -> html_report.Subject:
    """What a report about a run or an artifact says beside its figures; `left_out` are samples without an answer."""
    train = _recorded_train(target)
    history = target / HISTORY
    lines = [json.loads(line) for line in history.read_text().splitlines()] if history.exists() else []
    best = int(read_json(target / METRICS_FILE).get("best_epoch", 0))
    training = html_report.Training(history=lines, best_epoch=best) if 0 < best <= len(lines) else None
    return html_report.describe(
        load_spec(target),
        read_json(target / PROVENANCE_FILE),
        threads=choose_threads(train),
        device=choose_device(train).type,
        training=training,
        notes=[
            f"judged on {asked.total - len(left_out)} samples: {asked.what}",
            *(f"left out: {one.name}: {one.reason}" for one in left_out),
        ],
    )


def export(run: Path, *, artifacts: Path, version: str | None = None) -> Path:
    """Publish a finished run (again), by default under the version its recipe asks for."""
    if not (run / PROVENANCE_FILE).exists() or not (run / RECIPE_FILE).exists():
        raise TargetError(f"{run} is not a finished run", remedy="train it first; runs lie in runs/")
    recipe = parse(read_json(run / RECIPE_FILE), where=f"{run / RECIPE_FILE}")
    return exporting.publish(run, artifacts, version or recipe.version)


def test_samples(target: Path, *, root: str | Path | None = None) -> Iterator[Sample]:
    """The test split of a finished run or artifact, as encoded images in evaluation's order. Raises as `evaluate`."""
    return splits(target, root=root).samples("test")


def splits(target: Path, *, root: str | Path | None = None, report: Report = silent) -> Dataset:
    """How a finished run's or artifact's images were divided, without their pixels. Raises as `evaluate`."""
    return rebuild(target, root, report)[0]


def run_id(recipe: Recipe, surveyed: Survey, threads: int, teacher: Teacher | None = None, processes: int = 1) -> str:
    """`<name>-<8 hex digits>` of all that decides the result."""
    identity = {
        **({"teacher": teacher.digest} if teacher else {}),
        **({"processes": processes} if processes > 1 else {}),
        "recipe": recipe.identity(),
        "data": surveyed.digest,
        "code": exporting.code_digest(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": choose_device(recipe.train).type,
        "threads": threads,
    }
    return f"{recipe.name}-{hashlib.sha256(exporting.to_json(identity).encode()).hexdigest()[:8]}"


# ------------------------------------------------------------------------------------------------------------- one run


def load_teacher(recipe: Recipe, surveyed: Survey) -> Teacher | None:
    """Who the recipe wants to be taught by. Raises RecipeError when that one knows other classes."""
    return distil.load_teacher(Path(recipe.distil.teacher), surveyed.classes) if recipe.distil.teacher else None


def _run(
    recipe: Recipe,
    surveyed: Survey,
    run: Path,
    threads: int,
    report: Report,
    teacher: Teacher | None = None,
    group: Group = ALONE,
) -> None:
    """Everything between an empty (or interrupted) run folder and a finished one."""
    store = run / (_PIXELS_FILE if group.leads else f"{group.rank}-{_PIXELS_FILE}")
    try:
        dataset = data.prepare(surveyed, recipe, threads=threads, report=report, store=store)
        for line in dataset.notes.lines():
            report(Step("decode", 0, 0, line))
        if group.leads:
            files.write_text(run / DATA_REPORT_FILE, exporting.to_json(_data_report(dataset, surveyed)))
        fitted = learn(dataset, recipe, run, report, teacher, group)
    finally:
        store.unlink(missing_ok=True)
    group.first_does(lambda: _finish(recipe, dataset, surveyed, fitted, run, threads, report, teacher))


def learn(
    dataset: Dataset,
    recipe: Recipe,
    run: Path,
    report: Report,
    teacher: Teacher | None = None,
    group: Group = ALONE,
    judged: Judged | None = None,
) -> Fitted:
    """Train on the labels, or with a teacher on its answers too; otherwise as `fit`."""
    if teacher is None:
        return fit(dataset, recipe, run, report=report, group=group, judged=judged)
    if group.size > 1 and recipe.distil.hints:
        raise RecipeError("distil.hints need one process", remedy="leave them out, or train without --processes")
    shape = architecture(dataset, recipe)
    student = start_network(shape, recipe.model, recipe.seed, report=report)
    learner, loss = distil.prepare(student, shape, dataset.preprocess, teacher, recipe.distil)
    fitted = fit(dataset, recipe, run, report=report, network=learner, loss=loss, group=group, judged=judged)
    return dataclasses.replace(fitted, weights=distil.student_weights(fitted.weights))


def _finish(
    recipe: Recipe,
    dataset: Dataset,
    surveyed: Survey,
    fitted: Fitted,
    run: Path,
    threads: int,
    report: Report,
    teacher: Teacher | None = None,
) -> None:
    """Judge the best epoch and write what the artifact is made of; `provenance.json` comes last and means done."""
    shape = architecture(dataset, recipe)
    spec = exporting.draft_spec(recipe, shape, dataset.preprocess, dataset.classes, dataset.text, dataset.scaling)
    exporting.save_weights(fitted.weights, run / WEIGHTS_FILE)
    network = exporting.load_network(run, spec).to(choose_device(recipe.train))
    held_out, size = dataset.samples("validation"), len(dataset.rows["validation"])
    if recipe.task == "multi-label":
        spec = with_thresholds(network, spec, held_out, total=size, threads=threads, report=report)
    elif recipe.task == "multi-class" and recipe.evaluate.calibrate:
        spec = calibrated(network, spec, held_out, total=size, threads=threads, report=report)
    total = len(dataset.rows["test"])
    judged = judge(network, spec, dataset.samples("test"), total=total, threads=threads, report=report)
    report(Step("export", 0, 1, ""))
    exporting.freeze(run, network.cpu(), spec, dataset.samples("test"), judged)
    title = f"{recipe.name} ({recipe.model.architecture})"
    plots.curves(fitted.history, fitted.best_epoch, run / "curves.png", title=title)
    plots.judged(judged, run, title=f"{title}: {judged.summary} of {total} test {recipe.thing}s")
    files.write_text(run / METRICS_FILE, exporting.to_json(_metrics(judged, fitted, dataset, spec.temperature)))
    taught = None if teacher is None else {"method": "distillation", "teacher": teacher.identity()}
    origin = exporting.provenance(recipe, run.name, surveyed.digest, dataset.sizes(), taught)
    about = html_report.describe(
        spec,
        dataclasses.asdict(origin),
        threads=threads,
        device=choose_device(recipe.train).type,
        training=html_report.Training(history=fitted.history, best_epoch=fitted.best_epoch),
        notes=list(dataset.notes.lines()),
    )
    html_report.write(run / html_report.REPORT_FILE, about, judged, dataset.samples("test"))
    files.write_text(run / PROVENANCE_FILE, origin.to_json())
    (run / CHECKPOINT).unlink(missing_ok=True)
    report(Step("export", 1, 1, ""))


def _metrics(judged: Evaluation, fitted: Fitted, dataset: Dataset, temperature: float) -> dict[str, Any]:
    best = fitted.history[fitted.best_epoch - 1]
    tables: dict[str, Any] = {"labels": judged.labels}
    if judged.task == "multi-class":
        tables |= {"temperature": temperature, "confusion_matrix": judged.confusion}
    of = {"multi-class": "per_class", "multi-label": "per_label", "regression": "per_target"}[judged.task]
    return {
        **judged.metrics,
        **tables,
        **{key: value for key, value in best.items() if key.startswith("validation_")},
        **dataset.notes.counts(),
        "best_epoch": float(fitted.best_epoch),
        "epochs": float(len(fitted.history)),
        of: [dataclasses.asdict(row) for row in judged.rows],
    }


def _data_report(dataset: Dataset, surveyed: Survey) -> dict[str, Any]:
    return {
        "data_digest": surveyed.digest,
        "splits": dataset.sizes(),
        **({"targets": _target_ranges(dataset)} if dataset.scaling else {"classes": _class_sizes(dataset)}),
        **dataclasses.asdict(dataset.notes),
    }


def _class_sizes(dataset: Dataset) -> dict[str, dict[str, int]]:
    """Images of each class, or with each label, per split."""
    labels = [one.entry.label for one in dataset.images]
    several = dataset.targets_N.ndim > 1
    counts = {split: Counter[str]() for split in data.SPLITS}
    for split in data.SPLITS:
        for row in dataset.rows[split]:
            counts[split].update(truth.parts(labels[row]) if several else [labels[row]])
    return {label: {split: counts[split][label] for split in data.SPLITS} for label in dataset.classes}


def _target_ranges(dataset: Dataset) -> dict[str, dict[str, float]]:
    """Of each target: mean and standard deviation of the training split, lowest and highest value of all."""
    values_NK = truth.rows([one.entry.label for one in dataset.images], dataset.classes, "regression")
    return {
        name: {**dataclasses.asdict(scaling), "lowest": float(values_K.min()), "highest": float(values_K.max())}
        for name, scaling, values_K in zip(dataset.classes, dataset.scaling, values_NK.T, strict=True)
    }


def _flat(metrics: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if isinstance(value, float)}


# -------------------------------------------------------------------------------------------------- folders of results


def load_spec(target: Path) -> ModelSpec:
    """The spec of a finished run or an artifact. Raises TargetError for any other folder."""
    if not (target / PROVENANCE_FILE).exists() or not (target / SPEC_FILE).exists():
        raise TargetError(
            f"{target} is neither a finished run nor an artifact",
            remedy="give a folder such as runs/digits-3f2a9c1b or artifacts/digits/1.0",
        )
    try:
        return ModelSpec.load(target)
    except SpecError as error:
        raise TargetError(f"{target}: {error}", remedy="train or export again") from error


def rebuild(
    target: Path, root: str | Path | None, report: Report, *, store: Path | None = None, keep: bool = False
) -> tuple[Dataset, Recipe]:
    """The splits that a run or artifact was trained on, and its recipe; with `keep` the pixels too (see `prepare`).

    Raises TargetError and DataError as `evaluate` does.
    """
    load_spec(target)
    origin = read_json(target / PROVENANCE_FILE)
    recipe = recorded_recipe(target, origin, root)
    threads = choose_threads(recipe.train)
    with reproducible(threads):
        surveyed = data.survey(recipe, threads=threads, report=report)
        if surveyed.digest != origin.get("data_digest"):
            raise DataError(
                f"the {recipe.thing}s in {recipe.data.root or recipe.data.source} are not those that {target} was trained"
                f" on: their digest is {surveyed.digest[:16]}, recorded is {str(origin.get('data_digest'))[:16]}",
                remedy="restore the data, point to the right folder, or train again",
            )
        return data.prepare(surveyed, recipe, threads=threads, report=report, store=store, keep=keep), recipe


def recorded_recipe(target: Path, origin: dict[str, Any], root: str | Path | None) -> Recipe:
    """The recipe of a run or artifact, with the place of the data as given, or as the run beside it knows it."""
    if not origin.get("recipe"):
        raise TargetError(
            f"{target} records no recipe, so that its data is not known",
            remedy="evaluate it with --data and samples of your own; train one anew for what else needs its data",
        )
    values: dict[str, Any] = dict(origin["recipe"])
    if root is None:
        # An artifact may lie anywhere, also right below the file system's root.
        above = target.resolve().parents[2:3]
        places = (target, *(one / "runs" / str(origin.get("run")) for one in above))
        for path in (place / RECIPE_FILE for place in places):
            if path.exists():
                root = read_json(path)["data"]["root"]
                break
    values["data"] = dict(values["data"]) | {"root": None if root is None else str(root)}
    return parse(values, where=f"{target / PROVENANCE_FILE}")


def _recorded_train(target: Path) -> Train:
    """The recipe's section of a run or artifact; the usual one when it records no recipe."""
    origin = read_json(target / PROVENANCE_FILE)
    return recorded_recipe(target, origin, None).train if origin.get("recipe") else Train()


def read_json(path: Path) -> dict[str, Any]:
    """A file that a run wrote. Raises TargetError when it is missing or damaged."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TargetError(f"{path} cannot be read: {error}", remedy="train again, with --again") from error
    return value


@contextlib.contextmanager
def only_one(run: Path) -> Iterator[None]:
    """Hold the run folder for this process; the lock goes with the process, however it ends."""
    with (run / _LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunBusy(f"another process is at work in {run}", remedy="wait for it, or stop it") from error
        yield


def empty(run: Path) -> None:
    """Remove all but the lock, which this process holds."""
    for path in run.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK_FILE:
            path.unlink()
