"""`marina search`: hyperparameters by Optuna, chosen on the validation split.

Values are proposed by the tree-structured Parzen estimator (Bergstra et al., "Algorithms for Hyper-Parameter
Optimization", 2011), the first ones by the recipe itself and at random; a trial is pruned when after an epoch its best
value so far is below the median of the others at that epoch (Optuna's median pruner). The study lies in a SQLite file in
a folder named after what decides its trials, so that the same command, also with more trials, goes on with it.

Several processes may work on one study. Each holds a lock on the folder of its trial; the lock goes with the process,
however that ends, so a trial that the study believes running and nobody holds has lost its process: it is marked as
failed and its values are tried again, from its last checkpoint. The test split is never touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

import handlerlib
from handlerlib.errors import MarinaError
from handlerlib.spec import closest
from training import data, files, lifeline, pipeline, relay, search_plot, seeds, toml
from training import export as exporting
from training.compare import Material, split
from training.config import Range, Recipe, changed, parse
from training.errors import Interrupted, NumericFailure, ProcessDied, RecipeError, RunBusy
from training.progress import Report, Step, silent
from training.train import choose_device, choose_threads, reproducible

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

STUDY_FILE = "study.db"
BEST_FILE = "best.toml"
REPORT_FILE = "search.json"
CHART_FILE = "search.png"

_JOB_FILE = "job.json"
_FOLDER = "folder"
_INSTEAD = "instead_of"
"""Number of the trial that lost its process and is tried again as this one."""
_TRIES = "tries"
_ERROR = "error"
_EPOCH = "best_epoch"
_LOSS = "validation_loss"
"""Of the best epoch."""
_MOST_TRIES = 4
"""A trial that lost its process as often is not tried again: it may be what kills them."""
_MOST_DEATHS = 12
"""Processes that are replaced, in all."""
_STARTUP = 5
"""Complete trials before anything is pruned."""
_FEW = 4
"""Trials with a value before anything is said about importance."""
_POLL_SECONDS = 0.5
_STOP_SECONDS = 60.0
_LOG_FILE = "log.txt"


@dataclass(frozen=True, slots=True)
class Found:
    """A search so far."""

    folder: Path
    best: Path | None
    """The best recipe's file; None when no trial was finished."""
    values: Mapping[str, Any]
    """What the best trial chose, by key."""
    value: float | None
    """The best trial's `monitor` on the validation split."""
    monitor: str
    importance: Mapping[str, float]
    """Part of the variation of the value that each key explains, the most important first; empty when too few trials
    were finished to tell."""
    trials: tuple[Mapping[str, Any], ...]

    def fields(self) -> dict[str, Any]:
        """As `search.json` and --json show it."""
        return {
            "folder": str(self.folder),
            "best": str(self.best) if self.best else None,
            "values": dict(self.values),
            "value": self.value,
            "monitor": self.monitor,
            "importance": dict(self.importance),
            "chart": str(self.folder / CHART_FILE),
            "trials": [dict(one) for one in self.trials],
        }


def read_space(recipe: Recipe, given: Sequence[str]) -> Recipe:
    """The recipe with ranges of a command line added: `KEY=LOW..HIGH`, with `,log` or `,step=S`, or `KEY=A,B,C`.

    Raises RecipeError for a range that is none, an unknown key, and when there is nothing to search.
    """
    ranges: dict[str, object] = dict(recipe.search)
    for text in given:
        key, equals, rest = text.partition("=")
        if not equals or not rest:
            raise RecipeError(f"--space {text}: not of the form KEY=RANGE", remedy=_EXAMPLE)
        ranges[key.strip()] = _range(text, split(rest))
    if not ranges:
        raise RecipeError(f"recipe {recipe.name} has nothing to search", remedy=_EXAMPLE)
    return parse(recipe.model_dump() | {"search": ranges}, where="--space") if given else recipe


_EXAMPLE = "e.g. --space train.learning_rate=1e-4..1e-1,log --space train.optimizer=sgd,adamw, or a table [search]"


def search(recipe: Recipe, *, trials: int, runs: Path, report: Report, jobs: int = 1, prune: bool = True) -> Found:
    """Bring the study to `trials` trials, in `jobs` processes, and say what it found.

    Raises RecipeError, DataError, Interrupted on Ctrl-C (the study stays) and ProcessDied when processes keep dying.
    """
    _optuna()
    if trials < 1 or jobs < 1:
        raise RecipeError(f"{trials} trials in {jobs} processes", remedy="give at least one of each")
    if not recipe.search:
        raise RecipeError(f"recipe {recipe.name} has nothing to search", remedy=_EXAMPLE)
    if "train.loss" in recipe.search and recipe.train.monitor == "loss":
        raise RecipeError(
            "train.loss is searched and train.monitor is loss: losses of two kinds cannot be ranked",
            remedy="--set train.monitor=r2",
        )
    try:
        folder = runs / f"{recipe.name}-search-{_identity(recipe, prune, report)}"
        folder.mkdir(parents=True, exist_ok=True)
        if jobs == 1:
            work(folder, recipe, trials, prune, report)
        else:
            _in_processes(folder, recipe, trials, prune, jobs, report)
    except KeyboardInterrupt:
        raise Interrupted("search stopped; finished trials are kept") from None
    return conclude(folder, recipe)


def conclude(folder: Path, recipe: Recipe) -> Found:
    """Write what a study found so far: report, figure and the best recipe."""
    with _study(folder, recipe, prune=True) as study:
        every = study.get_trials(deepcopy=False)
        complete = [one for one in every if one.state.name == "COMPLETE"]
        best = min(complete, key=lambda one: _rank(one, recipe), default=None)
    path = None
    if best is not None:
        path = folder / BEST_FILE
        value = f"{recipe.train.monitor.replace('_', ' ')} {best.value:.4f} on the validation split"
        chosen = changed(recipe, best.params, where=f"trial {best.number}")
        note = f"Found by marina search: trial {best.number} of {len(every)}, {value}."
        files.write_text(path, toml.comment(note) + toml.write(chosen.model_dump(mode="json", exclude_defaults=True)))
    found = Found(
        folder=folder,
        best=path,
        values=best.params if best else {},
        value=best.value if best else None,
        monitor=recipe.train.monitor,
        importance=_importance(every, recipe),
        trials=tuple(_fields(one, recipe) for one in every if one.state.name != "WAITING"),
    )
    files.write_text(folder / REPORT_FILE, exporting.to_json(found.fields()))
    search_plot.draw(
        found.fields(), folder / CHART_FILE, logarithmic=[k for k, one in recipe.search.items() if one.log]
    )
    return found


# -------------------------------------------------------------------------------------------------------- one process


def work(folder: Path, recipe: Recipe, trials: int, prune: bool, report: Report) -> None:
    """Run trials until the study has as many, beside other processes that may do the same."""
    optuna = _optuna()
    with Material(folder) as material, _study(folder, recipe, prune) as study:
        while True:
            with contextlib.ExitStack() as held:
                trial = _ask(study, folder, recipe, trials, held)
                if trial is None:
                    return
                place = folder / str(trial.user_attrs[_FOLDER])
                try:
                    value, epoch, loss = _run(trial, recipe, place, material, report)
                except optuna.TrialPruned:
                    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                except NumericFailure as error:
                    # Pruned and not failed: the sampler passes over failed trials, and would come here again.
                    trial.set_user_attr(_ERROR, str(error))
                    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                except Interrupted:
                    raise
                except (MarinaError, RuntimeError, MemoryError) as error:
                    trial.set_user_attr(_ERROR, f"{type(error).__name__}: {error}")
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                else:
                    trial.set_user_attr(_EPOCH, epoch)
                    trial.set_user_attr(_LOSS, loss)
                    study.tell(trial, value)
                shutil.rmtree(place, ignore_errors=True)
            report(Step("search", 0, 0, _sentence(study, trial.number, recipe)))


def _ask(study: Study, folder: Path, recipe: Recipe, trials: int, held: contextlib.ExitStack) -> Trial | None:
    """The next trial, its folder locked until `held` ends; None when the study has enough."""
    with _lock(folder):
        _revive(study, folder)
        every = study.get_trials(deepcopy=False)
        waiting = [one for one in every if one.state.name == "WAITING"]
        begun = _counted(every)
        if not waiting and begun >= trials:
            return None
        if not every and (own := _own_values(recipe)):
            study.enqueue_trial(own)
        # A sampler of its own for each trial: what is drawn depends on the study, not on who asks or how often it was
        # stopped.
        study.sampler = _sampler(seeds.derive(recipe.seed, "search", begun))
        trial = study.ask({key: _distribution(choice) for key, choice in recipe.search.items()})
        if _FOLDER not in trial.user_attrs:
            trial.set_user_attr(_FOLDER, f"trial-{trial.number:04}")
        place = folder / str(trial.user_attrs[_FOLDER])
        place.mkdir(exist_ok=True)
        held.enter_context(pipeline.only_one(place))
        return trial


def _counted(every: Sequence[FrozenTrial]) -> int:
    """Trials that began, each once however often it lost its process."""
    again = {one.user_attrs.get(_INSTEAD) for one in every}
    return sum(one.state.name != "WAITING" and one.number not in again for one in every)


def _revive(study: Study, folder: Path) -> None:
    """Fail the trials that have lost their process, and put their values first in the line."""
    optuna = _optuna()
    for one in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        place = folder / str(one.user_attrs.get(_FOLDER, f"trial-{one.number:04}"))
        place.mkdir(exist_ok=True)
        if not _free(place):
            continue
        tries = int(one.user_attrs.get(_TRIES, 1))
        if tries < _MOST_TRIES:
            again = {_FOLDER: place.name, _INSTEAD: one.number, _TRIES: tries + 1}
            study.enqueue_trial(one.params, user_attrs=again)
        study.tell(one.number, state=optuna.trial.TrialState.FAIL)


def _run(trial: Trial, recipe: Recipe, place: Path, material: Material, report: Report) -> tuple[float, int, float]:
    """Train with the trial's values, from its checkpoint when there is one; the best epoch's value, number and loss."""
    optuna = _optuna()
    chosen = changed(recipe, trial.params, where=f"trial {trial.number}")
    key = f"validation_{recipe.train.monitor}"
    told: int | None = None

    def judged(history: Sequence[dict[str, float]]) -> None:
        nonlocal told
        for line in history[told or 0 :]:
            trial.report(line[key], int(line["epoch"]))
        # What an earlier process of this trial went through was no reason to stop then.
        resumed, told = told is None, len(history)
        if not resumed and told < chosen.train.epochs and trial.should_prune():
            raise optuna.TrialPruned

    def tell(step: Step) -> None:
        report(dataclasses.replace(step, note=f"trial {trial.number}  {step.note}"))

    threads = choose_threads(chosen.train)
    with reproducible(threads):
        surveyed, dataset = material.of(chosen, threads, tell)
        teacher = pipeline.load_teacher(chosen, surveyed)
        fitted = pipeline.learn(dataset, chosen, place, tell, teacher, judged=judged)
    best = fitted.history[fitted.best_epoch - 1]
    return best[key], fitted.best_epoch, best["validation_loss"]


# --------------------------------------------------------------------------------------------------- several processes


def _in_processes(folder: Path, recipe: Recipe, trials: int, prune: bool, jobs: int, report: Report) -> None:
    """Work in `jobs` processes, and tell of each trial that ends. A process that dies is replaced."""
    if not recipe.train.threads:
        threads = max(1, choose_threads(recipe.train) // jobs)
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"threads": threads})})
    job = {"recipe": recipe.model_dump(mode="json"), "trials": trials, "prune": prune}
    with _study(folder, recipe, prune) as study, tempfile.TemporaryDirectory(prefix="marina-") as name:
        place = Path(name)
        (place / _JOB_FILE).write_text(json.dumps(job), encoding="utf-8")
        told = {one.number for one in study.get_trials(deepcopy=False) if one.state.is_finished()}
        workers = {number: _worker(folder, place, number) for number in range(jobs)}
        deaths = 0
        try:
            while workers:
                time.sleep(_POLL_SECONDS)
                for one in study.get_trials(deepcopy=False):
                    if one.state.is_finished() and one.number not in told:
                        told.add(one.number)
                        report(Step("search", 0, 0, _sentence(study, one.number, recipe)))
                report(Step("search", min(len(told), trials), trials, ""))
                ended = {number: one for number, one in workers.items() if one.poll() is not None}
                for number, worker in ended.items():
                    del workers[number]
                    _stop(worker)
                for path in sorted(place.glob("error-*.json")):
                    raise relay.error_of(json.loads(path.read_text(encoding="utf-8")))
                died = [number for number, one in ended.items() if one.returncode != 0]
                deaths += len(died)
                if deaths > _MOST_DEATHS:
                    raise ProcessDied(_MOST_DEATHS, (place / _LOG_FILE).read_text(encoding="utf-8", errors="replace"))
                workers |= {number: _worker(folder, place, number) for number in died}
        finally:
            # The end of its input stops a worker as Ctrl-C does.
            for worker in workers.values():
                _stop(worker)
            for worker in workers.values():
                _end(worker)


def one_gpu(number: int, count: int, visible: str | None) -> dict[str, str]:
    """The environment in which process `number` sees one of `count` GPUs, each in its turn; empty with fewer than two.

    `visible` is CUDA_VISIBLE_DEVICES here, whose names, numbers or UUIDs, are passed on.
    """
    if count < 2:
        return {}
    names = visible.split(",")[:count] if visible else [str(one) for one in range(count)]
    return {"CUDA_VISIBLE_DEVICES": names[number % len(names)].strip()}


def _worker(folder: Path, place: Path, number: int) -> subprocess.Popen[bytes]:
    paths = [str(Path(package.__file__ or "").parents[1]) for package in (handlerlib, data)]
    environment = {
        **os.environ,
        **one_gpu(number, torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")),
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    with (place / _LOG_FILE).open("ab") as log:
        # A session of its own: Ctrl-C is passed on from here, once. Its standard input ends when this process does.
        return subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder), str(place)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _stop(worker: subprocess.Popen[bytes]) -> None:
    if worker.stdin is not None:
        worker.stdin.close()


def _end(worker: subprocess.Popen[bytes]) -> None:
    try:
        worker.wait(timeout=_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()


def _main(folder: Path, place: Path) -> int:
    """One of several processes."""
    lifeline.follow()
    job = json.loads((place / _JOB_FILE).read_text(encoding="utf-8"))
    try:
        work(folder, parse(job["recipe"], where="the recipe"), job["trials"], job["prune"], silent)
    except (Interrupted, KeyboardInterrupt):
        return Interrupted.exit_code
    except MarinaError as error:
        relay.save(place / f"error-{os.getpid()}.json", error)
        return error.exit_code
    return 0


# ----------------------------------------------------------------------------------------------------------- the study


def _optuna() -> ModuleType:
    """Raises RecipeError when it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise RecipeError(
            "marina search needs the package optuna, which is not installed (extra 'search')",
            remedy="pip install 'marina[search]'",
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@contextlib.contextmanager
def _study(folder: Path, recipe: Recipe, prune: bool) -> Iterator[Study]:
    optuna = _optuna()
    from sqlalchemy import URL

    address = URL.create("sqlite", database=str((folder / STUDY_FILE).resolve())).render_as_string()
    with _lock(folder):
        # Tables are made by the one that comes first.
        storage = optuna.storages.RDBStorage(address, engine_kwargs={"connect_args": {"timeout": 60}})
        study: Study = optuna.create_study(
            storage=storage,
            study_name=folder.name,
            direction="minimize" if recipe.train.monitor == "loss" else "maximize",
            pruner=_pruner(recipe) if prune else optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
    try:
        yield study
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _pruner(recipe: Recipe) -> BasePruner:
    """Begins after a quarter of the epochs: before, a schedule may still be warming up."""
    optuna = _optuna()
    pruner: BasePruner = optuna.pruners.MedianPruner(
        n_startup_trials=_STARTUP, n_warmup_steps=1 + recipe.train.epochs // 4
    )
    return pruner


def _sampler(seed: int) -> BaseSampler:
    optuna = _optuna()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # Running trials count as poor ones, so that processes do not all go to the same place.
        sampler: BaseSampler = optuna.samplers.TPESampler(seed=seed % 2**32, multivariate=True, constant_liar=True)
    return sampler


def _distribution(choice: Range) -> BaseDistribution:
    distributions = _optuna().distributions
    made: BaseDistribution
    if choice.choices:
        made = distributions.CategoricalDistribution(choice.choices)
    elif choice.whole:
        made = distributions.IntDistribution(choice.low, choice.high, log=choice.log, step=choice.step or 1)
    else:
        made = distributions.FloatDistribution(
            float(choice.low or 0), float(choice.high or 0), log=choice.log, step=choice.step
        )
    return made


def _own_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe's own values where the ranges hold them: the first trial, so that the best is no worse."""
    values: dict[str, Any] = {}
    for key, choice in recipe.search.items():
        value: Any = recipe
        for part in key.split("."):
            value = getattr(value, part)
        if choice.holds(value):
            values[key] = value
    return values


def _importance(every: Sequence[FrozenTrial], recipe: Recipe) -> dict[str, float]:
    """fANOVA's: the part of the value's variance over the space that each key explains in a random forest fitted to the
    trials (Hutter et al., "An Efficient Approach for Assessing Hyperparameter Importance", 2014).

    Pruned trials count too, with the best value they came to: what was bad enough to be pruned everywhere would not
    matter otherwise.
    """
    optuna = _optuna()
    valued = [(one, _value(one, recipe)) for one in every if one.state.name in ("COMPLETE", "PRUNED")]
    known = [(one, value) for one, value in valued if value is not None]
    if len(known) < _FEW or len({value for _, value in known}) < 2:
        return {}
    judged = optuna.create_study()
    for one, value in known:
        judged.add_trial(optuna.trial.create_trial(params=one.params, distributions=one.distributions, value=value))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=recipe.seed % 2**32)
    found = optuna.importance.get_param_importances(judged, evaluator=evaluator)
    return {key: float(value) for key, value in found.items()}


def _rank(one: FrozenTrial, recipe: Recipe) -> tuple[float, float, int]:
    """Of complete trials the lowest is the best: by value, then by loss, then the earlier."""
    value = one.value if one.value is not None else math.inf
    return value if recipe.train.monitor == "loss" else -value, one.user_attrs.get(_LOSS, math.inf), one.number


def _value(one: FrozenTrial, recipe: Recipe) -> float | None:
    """A trial's value, or the best that it came to."""
    if one.value is not None:
        return one.value
    better = min if recipe.train.monitor == "loss" else max
    return better(one.intermediate_values.values(), default=None)


def _fields(one: FrozenTrial, recipe: Recipe) -> dict[str, Any]:
    state = one.state.name.lower()
    error = one.user_attrs.get(_ERROR)
    if state == "fail" and error is None:
        error = "its process died"
    return {
        "number": one.number,
        "state": {"fail": "failed"}.get(state, state),
        "value": _value(one, recipe),
        "best_epoch": one.user_attrs.get(_EPOCH),
        "validation_loss": one.user_attrs.get(_LOSS),
        "epochs": len(one.intermediate_values),
        "seconds": round(one.duration.total_seconds(), 3) if one.duration else None,
        "values": dict(one.params),
        "error": error,
    }


def _sentence(study: Study, number: int, recipe: Recipe) -> str:
    one = _fields(study.get_trials(deepcopy=False)[number], recipe)
    values = ", ".join(f"{key}={_short(value)}" for key, value in one["values"].items())
    result = one["error"] or (f"{recipe.train.monitor} {one['value']:.4f}" if one["value"] is not None else "")
    return f"trial {number} {one['state']}: {result} ({values})"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _identity(recipe: Recipe, prune: bool, report: Report) -> str:
    """8 hex digits of what decides the trials. Threads and processes do not: any of them may go on with a study."""
    surveyed = data.survey(recipe, threads=choose_threads(recipe.train), report=report)
    identity = {
        "recipe": recipe.identity(),
        "search": {key: one.model_dump(mode="json") for key, one in recipe.search.items()},
        "data": surveyed.digest,
        "prune": prune,
        "code": exporting.code_digest(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": choose_device(recipe.train).type,
    }
    return hashlib.sha256(exporting.to_json(identity).encode()).hexdigest()[:8]


def _range(text: str, words: Sequence[str]) -> dict[str, Any]:
    low, dots, high = words[0].partition("..")
    if not dots:
        return {"choices": [_scalar(word) for word in words]}
    found: dict[str, Any] = {"low": _scalar(low), "high": _scalar(high)}
    for word in words[1:]:
        name, _, value = word.partition("=")
        if name not in ("log", "step"):
            raise RecipeError(f"--space {text}: '{word}'{closest(name, ('log', 'step'))}", remedy=_EXAMPLE)
        found[name] = True if name == "log" else _scalar(value)
    return found


def _scalar(word: str) -> object:
    try:
        return tomllib.loads(f"value = {word}")["value"]
    except tomllib.TOMLDecodeError:
        return word


def _free(place: Path) -> bool:
    """Whether no process works in the folder."""
    try:
        with pipeline.only_one(place):
            return True
    except RunBusy:
        return False


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process after the other; the lock goes with the process."""
    with (folder / ".study.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), Path(sys.argv[2])))
