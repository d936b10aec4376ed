"""`marina compare`: train variants of a recipe on the same data and set them side by side.

A variant is trained in the run folder that `marina train` would give it, so that neither trains again what the other
has done. Variants are compared on the validation split; the test split stays unseen until one of them is chosen and
trained.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from handlerlib.errors import MarinaError
from handlerlib.spec import WEIGHTS_FILE
from training import compare_plot, data, files, pipeline
from training import export as exporting
from training.config import Recipe, load_recipe
from training.data import Dataset, Survey
from training.errors import Interrupted, RecipeError
from training.export import METRICS_FILE, PROVENANCE_FILE
from training.progress import Report, Step
from training.train import HISTORY, choose_threads, reproducible

FITTED_FILE = "fitted.json"
"""In a run folder: the training is done, and how it ended."""
REPORT_FILE = "comparison.json"
TABLE_FILE = "comparison.md"
CHART_FILE = "comparison.png"
COLUMNS = ("recipe", "changed", "best epoch", "loss", "accuracy or R²", "training loss", "seconds", "weights", "error")


@dataclass(frozen=True, slots=True)
class Variant:
    """One training of a comparison."""

    name: str
    recipe: Recipe
    changes: Mapping[str, str]
    """What differs from its recipe's file, by key."""


@dataclass(frozen=True, slots=True)
class Row:
    """How a variant did. Figures are those of its best epoch, on the validation split but for `training_loss`."""

    variant: Variant
    run: Path | None
    history: tuple[Mapping[str, float], ...] = ()
    best_epoch: int = 0
    weights: int = 0
    """Numbers in the network that training may change, and its statistics."""
    error: str = ""
    reused: bool = False
    failure: MarinaError | None = None
    """The error itself, where it is one of ours."""

    @property
    def seconds(self) -> float:
        """Of training and judging its epochs, without reading the data."""
        return sum(line["seconds"] for line in self.history)

    def best(self, key: str) -> float | None:
        return self.history[self.best_epoch - 1].get(key) if self.best_epoch else None

    @property
    def score(self) -> float | None:
        """What is better when it is higher: accuracy, of a regression R²; None when no epoch was kept."""
        return self.best("validation_r2" if self.variant.recipe.task == "regression" else "validation_accuracy")

    def fields(self) -> dict[str, Any]:
        """As `comparison.json` and --json show it."""
        return {
            "name": self.variant.name,
            "changes": dict(self.variant.changes),
            "run": str(self.run) if self.run else None,
            "error": self.error or None,
            "reused": self.reused,
            "best_epoch": self.best_epoch or None,
            "epochs": len(self.history),
            "validation_loss": self.best("validation_loss"),
            "validation_accuracy": self.best("validation_accuracy"),
            **({"validation_r2": self.score} if self.variant.recipe.task == "regression" else {}),
            "train_loss": self.best("train_loss"),
            "seconds": round(self.seconds, 3),
            "weights": self.weights or None,
            "history": [dict(line) for line in self.history],
        }

    def cells(self) -> list[str]:
        """As the table shows it, in the order of COLUMNS."""
        figures = [self.best("validation_loss"), self.score, self.best("train_loss")]
        return [
            self.variant.recipe.name,
            ", ".join(f"{key}={value}" for key, value in self.variant.changes.items()),
            str(self.best_epoch or ""),
            *("" if figure is None else f"{figure:.4f}" for figure in figures),
            f"{self.seconds:.1f}",
            f"{self.weights:,}" if self.weights else "",
            self.error,
        ]


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows, in the order asked for."""

    folder: Path
    rows: tuple[Row, ...]
    failure: MarinaError | None = None
    """Set when no variant was trained: the first one's error."""

    def fields(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "chart": str(self.folder / CHART_FILE),
            "variants": [row.fields() for row in self.rows],
        }


def read_variants(
    recipes: Sequence[str], *, overrides: Sequence[str] = (), vary: Sequence[str] = (), sets: Sequence[str] = ()
) -> tuple[Variant, ...]:
    """The variants of a command line: every recipe with every combination of `vary` (`KEY=VALUE,VALUE`), and with each
    of `sets` (`KEY=VALUE KEY=VALUE`); `overrides` are for all.

    Raises RecipeError for anything that cannot be trained, and for fewer than two variants.
    """
    products = [_values(one) for one in vary]
    combinations = [list(one) for one in itertools.product(*products)] if vary or not sets else []
    changes = [*combinations, *(shlex.split(one) for one in sets)]
    found: list[Variant] = []
    for name in recipes:
        for change in changes:
            recipe = load_recipe(name, [*overrides, *change])
            pairs = {key.strip(): value.strip() for key, _, value in (one.partition("=") for one in change)}
            found.append(Variant(_name(name, pairs, len(recipes) > 1), recipe, pairs))
    seen: dict[str, str] = {}
    for variant in found:
        same = seen.setdefault(_digest(variant.recipe), variant.name)
        if same != variant.name or [one.name for one in found].count(variant.name) > 1:
            raise RecipeError(f"'{variant.name}' and '{same}' are the same training", remedy="leave one of them out")
    tasks = sorted({variant.recipe.task for variant in found})
    if len(tasks) > 1:
        raise RecipeError(
            f"the variants learn different tasks, {' and '.join(tasks)}: their losses are not of one kind",
            remedy="compare recipes of one task",
        )
    if len({variant.recipe.train.loss for variant in found}) > 1 and any(
        variant.recipe.train.monitor == "loss" for variant in found
    ):
        raise RecipeError(
            "the variants have different train.loss, and an epoch is chosen by it: losses of two kinds cannot be ranked",
            remedy="--set train.monitor=r2",
        )
    if len(found) < 2:
        raise RecipeError(
            "there is one variant, and nothing to compare it with",
            remedy="give more recipes, or e.g. --vary train.optimizer=sgd,adam,adamw",
        )
    return tuple(found)


def compare(variants: Sequence[Variant], *, runs: Path, report: Report) -> Comparison:
    """Train what is not trained yet, one variant after the other, and draw them all.

    A variant that fails is a row with its error. Raises Interrupted on Ctrl-C: what is done is kept.
    """
    identity = hashlib.sha256("".join(_digest(one.recipe) for one in variants).encode()).hexdigest()
    folder = runs / f"{variants[0].recipe.name}-compare-{identity[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    try:
        with Material(folder) as material:
            for number, variant in enumerate(variants, start=1):
                rows.append(_trained(variant, runs, material, _labelled(report, variant.name)))
                report(Step("compare", 0, 0, f"{number}/{len(variants)} {_sentence(rows[-1])}"))
    except KeyboardInterrupt:
        raise Interrupted("comparison stopped; finished variants are kept") from None
    failures = [row.failure for row in rows if row.failure is not None]
    comparison = Comparison(folder, tuple(rows), failures[0] if len(failures) == len(rows) else None)
    files.write_text(folder / REPORT_FILE, exporting.to_json(comparison.fields()))
    files.write_text(folder / TABLE_FILE, table(comparison))
    compare_plot.draw([(row.variant.name, row.history, row.best_epoch) for row in rows], folder / CHART_FILE)
    return comparison


def table(comparison: Comparison) -> str:
    """Markdown."""
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *(row.cells() for row in comparison.rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


class Material:
    """Decoded data, kept for the next variant as long as that divides the same data alike."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ""
        self._held: tuple[Survey, Dataset] | None = None
        self._store: Path | None = None

    def __enter__(self) -> Material:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drop()

    def of(self, recipe: Recipe, threads: int, report: Report) -> tuple[Survey, Dataset]:
        """Raises DataError when the data cannot be used."""
        key = json.dumps(recipe.model_dump(mode="json", include={"data", "text", "seed", "serve"}), sort_keys=True)
        if self._held is None or key != self._key:
            self._drop()
            self._store = self._folder / f"pixels-{hashlib.sha256(key.encode()).hexdigest()[:8]}-{id(self):x}.bin"
            surveyed = data.survey(recipe, threads=threads, report=report)
            dataset = data.prepare(surveyed, recipe, threads=threads, report=report, store=self._store)
            self._key, self._held = key, (surveyed, dataset)
        return self._held

    def _drop(self) -> None:
        self._held = None
        if self._store is not None:
            self._store.unlink(missing_ok=True)


def _trained(variant: Variant, runs: Path, material: Material, report: Report) -> Row:
    """The variant's row: read, resumed or trained."""
    run: Path | None = None
    try:
        threads = choose_threads(variant.recipe.train)
        with reproducible(threads):
            surveyed, dataset = material.of(variant.recipe, threads, report)
            teacher = pipeline.load_teacher(variant.recipe, surveyed)
            run = runs / pipeline.run_id(variant.recipe, surveyed, threads, teacher)
            run.mkdir(parents=True, exist_ok=True)
            with pipeline.only_one(run):
                done = _finished(run)
                if done is None:
                    recipe = exporting.to_json(variant.recipe.model_dump(mode="json"))
                    files.write_text(run / pipeline.RECIPE_FILE, recipe)
                    fitted = pipeline.learn(dataset, variant.recipe, run, report, teacher)
                    weights = sum(value.numel() for value in fitted.weights.values() if value.is_floating_point())
                    ended = {"best_epoch": fitted.best_epoch, "weights": weights}
                    files.write_text(run / FITTED_FILE, exporting.to_json(ended))
                    return Row(variant, run, fitted.history, fitted.best_epoch, weights)
                return Row(variant, run, tuple(history(run)), done["best_epoch"], done["weights"], reused=True)
    except Interrupted:
        raise
    except (MarinaError, RuntimeError, MemoryError) as error:
        lines = tuple(history(run)) if run is not None else ()
        failure = error if isinstance(error, MarinaError) else None
        return Row(variant, run, lines, error=f"{type(error).__name__}: {error}", failure=failure)


def history(run: Path) -> Iterator[dict[str, float]]:
    """The lines of a run's history, none when there is none."""
    path = run / HISTORY
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def _finished(run: Path) -> dict[str, int] | None:
    """How a training ended that is done: by an earlier comparison, or by `marina train`."""
    if (run / FITTED_FILE).exists():
        read = pipeline.read_json(run / FITTED_FILE)
        return {"best_epoch": int(read["best_epoch"]), "weights": int(read["weights"])}
    if not (run / PROVENANCE_FILE).exists():
        return None
    from safetensors.torch import load_file

    weights = load_file(run / WEIGHTS_FILE)
    count = sum(value.numel() for value in weights.values() if value.is_floating_point())
    return {"best_epoch": int(pipeline.read_json(run / METRICS_FILE)["best_epoch"]), "weights": count}


def _values(text: str) -> list[str]:
    """`KEY=A,B` -> `KEY=A` and `KEY=B`; a comma within brackets, braces or quotes divides nothing."""
    key, equals, rest = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--vary {text}: not of the form KEY=VALUE,VALUE", remedy="e.g. --vary train.epochs=5,10")
    values = split(rest)
    if len(values) < 2 or not all(values):
        raise RecipeError(f"--vary {text}: two values at least", remedy="e.g. --vary train.optimizer=sgd,adam")
    return [f"{key}={value}" for value in values]


def split(text: str) -> list[str]:
    """Divided at commas outside brackets, braces and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    return [part.strip() for part in parts]


def _name(recipe: str, changes: Mapping[str, str], several: bool) -> str:
    short = ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in changes.items())
    stem = Path(recipe).stem
    return f"{stem} {short}".strip() if several or not short else short


def _digest(recipe: Recipe) -> str:
    values = recipe.identity() | {"root": recipe.data.root}
    return hashlib.sha256(exporting.to_json(values).encode()).hexdigest()


def _labelled(report: Report, name: str) -> Report:
    def tell(step: Step) -> None:
        report(dataclasses.replace(step, note=f"{name}  {step.note}"))

    return tell


def _sentence(row: Row) -> str:
    if row.error:
        return f"{row.variant.name}: failed, {row.error}"
    what = "R²" if row.variant.recipe.task == "regression" else "accuracy"
    told = f"{row.variant.name}: loss {row.best('validation_loss'):.4f}, {what} {row.score:.4f}"
    return f"{told}{' (trained earlier)' if row.reused else f' in {row.seconds:.1f} s'}"
