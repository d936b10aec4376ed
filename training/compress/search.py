"""What `marina compress` runs: make the forms that may pay, keep those within the accuracy budget, publish and compare.

Forms are chosen on the validation split. Only what passes there is asked about the test split, once, and is kept when
it is within the budget there too: the test split refuses, it never chooses. Everything lies in one run folder, named
after what decides the forms, so that the same artifact, also with another budget, finds its own work again. Kept forms
become versions of the parent's name, the best one last: a name alone means its newest version.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from pydantic import ValidationError

from handlerlib import cores, engine_spec
from handlerlib.spec import SPEC_FILE, WEIGHTS_FILE, ModelSpec, closest
from training import export as exporting
from training import files, pipeline
from training.compress import channels, chart, distil, forms, measure, vocabulary
from training.compress.channels import Importance
from training.compress.forms import PARENT, Bench, Form
from training.compress.measure import Comparison, Latency, Size
from training.compress.storage import Bits
from training.config import Distil, Recipe
from training.errors import DataError, Interrupted, RecipeError, TargetError
from training.export import COMPRESSION_FILE, PROVENANCE_FILE
from training.optimize import rungs
from training.optimize.ladder import LEAST_GAIN
from training.progress import Report, Step
from training.train import choose_device, choose_threads, reproducible

Method = Literal["prune", "sparse", "int8", "int4", "qat", "bf16", "fp16", "distil"]
METHODS: tuple[Method, ...] = get_args(Method)
REPORT_FILE = "report.json"
TABLE_FILE = "report.md"
CHART_FILE = "frontier.png"
LATENCY_FILE = "latency.json"
BATCHES = (1, 8)

_PIXELS_FILE = "pixels.bin"
_RATIOS = (0.25, 0.5, 0.7, 0.85)
"""Parts of the channels that are gone after each step of structured pruning."""
_SHARES = (0.5, 0.75, 0.9)
"""Parts of the weights that magnitude pruning sets to zero."""
_STORED: Mapping[Method, Bits] = {"fp16": 16, "int8": 8, "int4": 4}
"""How many bits a number takes in the file, where no engine of that precision is meant."""
_NOT_FOR_TEXTS: Mapping[Method, str] = {
    "bf16": "fp16 takes the same bytes and keeps more digits",
    "qat": "rows are rounded one by one, with no ranges of activations that training could adapt",
    "sparse": "a row of zeros still takes its place; prune removes whole terms",
    "distil": "students are networks for images; a smaller text model is trained from its recipe",
}
_ROUNDING = 1e-9
_RECORDED = 1e-4
"""Percentage points by which an accuracy that a file keeps is rounded, at most."""
_INT8 = "openvino-int8"
_TUNING_RATE = 0.25
"""Fine-tuning's peak rate as part of the recipe's: the weights are good already."""
_TUNING_PART = 5
"""Fine-tuning takes the recipe's epochs divided by this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the user may choose."""

    budget: float = 0.5
    """Percentage points of accuracy that may be lost."""
    methods: tuple[Method, ...] = METHODS
    epochs: int | None = None
    """Of each fine-tuning; a fifth of the recipe's when None."""
    student_epochs: int | None = None
    """Of the student's training, which begins from nothing; the recipe's own schedule when None."""
    minutes: float | None = None
    """No new form is begun after this time."""
    student: str | None = None
    """Architecture that distillation trains."""
    distil: Distil = field(default_factory=Distil)
    importance: Importance = "taylor"
    device: Literal["auto", "cpu", "cuda"] | None = None
    """What the forms are trained, timed and served on; the recipe's when None."""

    def __post_init__(self) -> None:
        if not 0 <= self.budget <= 100:
            raise RecipeError(f"the budget is {self.budget:g} points", remedy="give 0 to 100, e.g. --budget 0.5")
        for epochs in (self.epochs, self.student_epochs):
            if epochs is not None and epochs < 1:
                raise RecipeError(f"{epochs} epochs of training", remedy="give at least one, e.g. --epochs 3")
        if self.student is not None:
            forms.check_student(self.student)


def read_options(
    *,
    budget: float,
    methods: str | None,
    student: str | None,
    epochs: int | None,
    student_epochs: int | None,
    minutes: float | None,
    importance: str,
    distil: Mapping[str, Any],
    device: Literal["auto", "cpu", "cuda"] | None = None,
) -> Options:
    """Options from the words of a command line; hints as `STUDENT=TEACHER`. Raises RecipeError naming the wrong one."""
    wanted = METHODS if methods is None else tuple(word.strip() for word in methods.split(",") if word.strip())
    for word in wanted:
        if word not in METHODS:
            raise RecipeError(f"--methods: unknown '{word}'{closest(word, METHODS)}", remedy=", ".join(METHODS))
    if importance not in get_args(Importance):
        known = get_args(Importance)
        raise RecipeError(f"--importance {importance}{closest(importance, known)}", remedy=f"one of {', '.join(known)}")
    if methods is not None and "distil" in wanted and student is None:
        raise RecipeError("--methods distil: no student is named", remedy="add --student ARCHITECTURE")
    pairs = [tuple(hint.split("=")) for hint in distil["hints"]]
    try:
        section = Distil.model_validate(dict(distil) | {"hints": pairs})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise RecipeError(
            f"--{problem['loc'][0]}: {problem['msg']}", remedy="see marina compress --help; hints are STUDENT=TEACHER"
        ) from error
    return Options(
        budget=budget,
        methods=tuple(method for method in METHODS if method in wanted),
        epochs=epochs,
        student_epochs=student_epochs,
        minutes=minutes,
        student=student,
        distil=section,
        importance=cast(Importance, importance),
        device=device,
    )


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result: a form, or a method that could not be tried."""

    name: str
    status: Literal["parent", "kept", "refused", "not tried"]
    reason: str
    """Why it is not kept; empty when it is."""
    form: Form | None
    accuracy: float | None
    """Percent on the test split; None where that was not asked."""
    size: Size | None
    latency: dict[int, Latency]
    """Per batch size."""
    artifact: Path | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """A finished search."""

    folder: Path
    parent: Path
    name: str
    version: str
    """Of the parent."""
    options: Options
    images: dict[str, int]
    """Images, or texts, per split."""
    texts: bool
    threads: int
    device: str
    rows: tuple[Row, ...]

    @property
    def best(self) -> Row | None:
        """The fastest form that is kept, and of forms about as fast the smallest; None when none is kept."""
        return next(reversed(_ranked(self.rows)), None)

    def fields(self) -> dict[str, Any]:
        """As `report.json` and --json show it."""
        return {
            "run": str(self.folder),
            "parent": str(self.parent),
            "name": self.name,
            "version": self.version,
            "budget_points": self.options.budget,
            "images": self.images,
            "texts": self.texts,
            "threads": self.threads,
            "device": self.device,
            "best": self.best.name if self.best else None,
            "forms": [_row_fields(row) for row in self.rows],
        }


def compress(
    target: Path, options: Options, *, runs: Path, artifacts: Path, report: Report, root: str | Path | None = None
) -> Result:
    """Search, keep, publish. `root` says where the data lies now, when not where it was.

    Raises what `pipeline.evaluate` raises, RecipeError for a wrong option, and Interrupted on Ctrl-C.
    """
    spec = pipeline.load_spec(target)
    _require_classes(spec)
    origin = pipeline.read_json(target / PROVENANCE_FILE)
    recorded = pipeline.recorded_recipe(target, origin, root)
    recipe = tuned(on_device(recorded, options), options)
    threads = choose_threads(recipe.train)
    device = choose_device(recipe.train)
    folder = runs / run_id(target, spec, origin, recipe, options, threads, device.type)
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / _PIXELS_FILE
    try:
        with pipeline.only_one(folder), reproducible(threads):
            dataset, _ = pipeline.rebuild(target, root, report, store=store, keep=True)
            bench = Bench(
                spec=spec,
                network=exporting.load_network(target, spec),
                # The statistics are part of the parent's spec; they are the same unless it was made by older code.
                dataset=dataclasses.replace(dataset, preprocess=spec.preprocess),
                recipe=recipe,
                recorded=recorded,
                folder=folder,
                device=device,
                threads=threads,
                report=report,
                target=target,
                teacher=distil.load_teacher(target, spec.labels),
                origin=origin,
                importance=options.importance,
            )
            return _search(bench, options, artifacts)
    except KeyboardInterrupt:
        raise Interrupted("compression stopped; finished forms are kept") from None
    finally:
        store.unlink(missing_ok=True)


def _require_classes(spec: ModelSpec) -> None:
    """Raises TargetError for a task whose loss is no share of right answers."""
    if spec.task != "multi-class":
        raise TargetError(
            f"{spec.name} {spec.version} is a {spec.task} model, and forms are judged by the share of right classes",
            remedy="serve it as it is, or train a smaller one from its recipe",
        )


def on_device(recipe: Recipe, options: Options) -> Recipe:
    """The recipe for the device that the user chose. Raises RecipeError when that is not there."""
    if options.device is None:
        return recipe
    if options.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("the device is cuda, but torch sees no GPU", remedy="--device cpu or auto")
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"device": options.device})})


def tuned(recipe: Recipe, options: Options) -> Recipe:
    """The recipe with a short schedule for weights that are good already."""
    train = recipe.train
    epochs = options.epochs or max(1, round(train.epochs / _TUNING_PART))
    update = {
        "epochs": epochs,
        "stages": (),
        "learning_rate": train.learning_rate * _TUNING_RATE,
        "schedule": "cosine",
        "early_stopping": 0,
    }
    model = recipe.model.model_copy(update={"pretrained": False})
    changes = {"train": train.model_copy(update=update), "model": model, "version": "auto", "distil": Distil()}
    return recipe.model_copy(update=changes)


def run_id(
    target: Path,
    spec: ModelSpec,
    origin: Mapping[str, Any],
    recipe: Recipe,
    options: Options,
    threads: int,
    device: str,
) -> str:
    """`<name>-<version>-compress-<8 hex digits>` of all that decides the forms; budget, time and choice do not."""
    identity = {
        "weights": hashlib.sha256((target / WEIGHTS_FILE).read_bytes()).hexdigest(),
        "spec": (target / SPEC_FILE).read_text(encoding="utf-8"),
        # Without its device: what that comes to is said below.
        "recipe": on_device(recipe, Options(device="auto")).identity(),
        "data": origin.get("data_digest"),
        "importance": options.importance,
        "code": exporting.code_digest(),
        "torch": torch.__version__,
        "packages": {name: engine_spec.installed_version(name) for name in ("openvino", "nncf")},
        "machine": [platform.machine(), sorted(engine_spec.cpu_features())],
        "cores": cores.usable(),
        "device": device,
        "threads": threads,
    }
    return f"{spec.name}-{spec.version}-compress-{hashlib.sha256(exporting.to_json(identity).encode()).hexdigest()[:8]}"


# ------------------------------------------------------------------------------------------------------------ the search


def _search(bench: Bench, options: Options, artifacts: Path) -> Result:
    began = time.monotonic()
    images = len(bench.dataset.rows["validation"])
    if 100 / images > options.budget:
        note = f"one of {images} validation samples is {100 / images:.2f} points: a form within the budget loses none"
        bench.report(Step("compress", 0, 0, note))
    found: list[Form] = []
    skipped: list[Row] = []
    steps = _steps(bench, options, found)
    while True:
        if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
            skipped.append(_not_tried("more", f"the {options.minutes:g} minutes are over"))
            break
        step = next(steps, None)
        if step is None:
            break
        if isinstance(step, Row):
            skipped.append(step)
            bench.report(Step("compress", 0, 0, f"{step.name}: {step.reason}"))
        else:
            bench.report(Step("compress", 0, 0, _progress(step, options.budget)))
    rows = [*_judged(bench, found, options), *skipped]
    result = Result(
        folder=bench.folder,
        parent=bench.target,
        name=bench.spec.name,
        version=bench.spec.version,
        options=options,
        images=bench.dataset.sizes(),
        texts=bench.spec.text is not None,
        threads=bench.threads,
        device=bench.device.type,
        rows=_published(bench, rows, artifacts),
    )
    files.write_text(bench.folder / REPORT_FILE, exporting.to_json(result.fields()))
    files.write_text(bench.folder / TABLE_FILE, chart.table(result.fields()))
    chart.draw(result.fields(), bench.folder / CHART_FILE)
    return result


def _steps(bench: Bench, options: Options, found: list[Form]) -> Iterator[Form | Row]:
    """Make one form after the other; each is in `found` when it comes out. What comes next depends on what passed."""
    if bench.spec.text is not None:
        yield from _text_steps(bench, options, found)
        return
    yield from _lower_precisions(bench, options, found, PARENT)
    bases: list[str] = []
    if "prune" in options.methods:
        yield from _structured(bench, options, found)
        bases += [form.name for form in found if form.method == "structured pruning" and _fits(form, options.budget)][
            -1:
        ]
    if "sparse" in options.methods:
        yield from _magnitude(bench, options, found)
    if options.student is not None and "distil" in options.methods:
        name, student, recipe = _student_name(options), options.student, _student_recipe(bench, options)
        step = _attempt(found, name, lambda: forms.distilled(bench, name, student, recipe))
        bases += [name] if _passed(step, options.budget) else []
        yield step
    for base in bases:
        yield from _lower_precisions(bench, options, found, base)


def _text_steps(bench: Bench, options: Options, found: list[Form]) -> Iterator[Form | Row]:
    """Of a text model: fewer terms, and numbers of fewer bits in the file. What does not apply says why."""
    yield from _stored(bench, options, found, PARENT)
    bases: list[str] = []
    if "prune" in options.methods:
        against = vocabulary.obstacle(bench.spec)
        if against:
            yield _not_tried("prune", against)
        else:
            for step in _fewer_terms(bench, options, found):
                bases += [step.name] if _passed(step, options.budget) else []
                yield step
    # Two, because the test split may refuse the smallest.
    for base in bases[-2:]:
        yield from _stored(bench, options, found, base)
    for method, reason in _NOT_FOR_TEXTS.items():
        if method in options.methods and (method != "distil" or options.student is not None):
            yield _not_tried(method, reason)


def _stored(bench: Bench, options: Options, found: list[Form], base: str) -> Iterator[Form | Row]:
    prefix = "" if base == PARENT else f"{base}+"
    for method, bits in _STORED.items():
        if method in options.methods:
            yield _attempt(found, prefix + method, functools.partial(forms.stored, bench, prefix + method, base, bits))


def _fewer_terms(bench: Bench, options: Options, found: list[Form]) -> Iterator[Form | Row]:
    """As `_structured`; each from the parent, because nothing is trained in between."""
    gone = 0.0
    for total in _RATIOS:
        step = _attempt(found, f"prune-{100 * total:g}", functools.partial(_terms_form, bench, total))
        yield step
        if not _passed(step, options.budget):
            half = (gone + total) / 2
            yield _attempt(found, f"prune-{100 * half:g}", functools.partial(_terms_form, bench, half))
            return
        gone = total


def _terms_form(bench: Bench, share: float) -> Form:
    return forms.fewer_terms(bench, f"prune-{100 * share:g}", share)


def _lower_precisions(bench: Bench, options: Options, found: list[Form], base: str) -> Iterator[Form | Row]:
    """bf16, fp16 and int8 of a form; int8 with training when calibration alone loses too much."""
    prefix = "" if base == PARENT else f"{base}+"
    cuda = bench.device.type == "cuda"
    halves: dict[Method, str] = {"bf16": "torch-bf16", "fp16": "torch-fp16"} if cuda else {"bf16": "openvino-bf16"}
    for method, rung in halves.items():
        if method in options.methods:
            yield _quantised(bench, found, prefix + method, base, rung)
    if not cuda and "fp16" in options.methods:
        yield from _stored(bench, dataclasses.replace(options, methods=("fp16",)), found, base)
    if "int4" in options.methods and base == PARENT:
        yield _not_tried("int4", "only the tables of text models are stored in it, and no engine here computes in it")
    if cuda:
        if {"int8", "qat"} & set(options.methods):
            yield _not_tried(f"{prefix}int8", "there is no int8 engine for a GPU; for CPUs: --device cpu")
        return
    missed = True
    if "int8" in options.methods:
        step = _quantised(bench, found, f"{prefix}int8", base, _INT8)
        yield step
        # A judgement of the test split's accuracy would be a choice by it; whether int8 can be served at all is none.
        missed = isinstance(step, Form) and (
            not _fits(step, options.budget) or bool(forms.complete(bench, step, options.budget).against)
        )
    if missed and "qat" in options.methods:
        yield _quantised(bench, found, f"{prefix}int8-qat", base, _INT8, trained=True)


def _quantised(
    bench: Bench, found: list[Form], name: str, base: str, rung: str, *, trained: bool = False
) -> Form | Row:
    obstacle = rungs.missing(rungs.find(rung), "cuda" if bench.device.type == "cuda" else "cpu", calibration=True)
    if obstacle:
        return _not_tried(name, obstacle)
    make = forms.trained_quantised if trained else forms.quantised
    return _attempt(found, name, lambda: make(bench, name, base, rung))


def _structured(bench: Bench, options: Options, found: list[Form]) -> Iterator[Form | Row]:
    """Fewer and fewer channels, each step from the one before, until one loses too much; then half of that step."""
    if not channels.groups(bench.network, bench.spec.architecture):
        yield _not_tried("prune", f"no channels of {bench.spec.architecture.name} can be taken apart")
        return
    base, gone = PARENT, 0.0
    for total in _RATIOS:
        step = _pruned(bench, found, base, gone, total)
        yield step
        if not _passed(step, options.budget):
            yield _pruned(bench, found, base, gone, (gone + total) / 2)
            return
        base, gone = step.name, total


def _pruned(bench: Bench, found: list[Form], base: str, gone: float, total: float) -> Form | Row:
    name, ratio = f"prune-{100 * total:g}", 1 - (1 - total) / (1 - gone)
    return _attempt(found, name, lambda: forms.pruned(bench, name, base, ratio, total))


def _magnitude(bench: Bench, options: Options, found: list[Form]) -> Iterator[Form | Row]:
    for share in _SHARES:
        step = _sparse(bench, found, f"sparse-{100 * share:g}", share)
        yield step
        if not _passed(step, options.budget):
            break
    yield _not_tried("sparse-2of4", "no engine here computes with sparse tensor cores")


def _sparse(bench: Bench, found: list[Form], name: str, share: float) -> Form | Row:
    return _attempt(found, name, lambda: forms.sparse(bench, name, PARENT, share))


def _attempt(found: list[Form], name: str, make: Callable[[], Form]) -> Form | Row:
    """The form, noted in `found`; a line that says why when it cannot be made: the others may still be worth it."""
    try:
        form = make()
    except (Interrupted, DataError):
        raise
    except Exception as error:  # noqa: BLE001 - converters and quantisers of other packages raise anything
        return _not_tried(
            name, f"it failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
    found.append(form)
    return form


def _passed(step: Form | Row, budget: float) -> bool:
    return isinstance(step, Form) and _fits(step, budget)


def _student_name(options: Options) -> str:
    """With a mark of the settings where they are not the usual ones: others are another form."""
    settings = {"distil": options.distil.model_dump(mode="json"), "epochs": options.student_epochs}
    usual = {"distil": Distil().model_dump(mode="json"), "epochs": None}
    mark = hashlib.sha256(exporting.to_json(settings).encode()).hexdigest()[:4]
    return f"student-{options.student}" + ("" if settings == usual else f"-{mark}")


def _student_recipe(bench: Bench, options: Options) -> Recipe:
    """The parent's own schedule: a student begins from nothing."""
    recipe = on_device(bench.recorded, options)
    shorter = {} if options.student_epochs is None else {"stages": (), "epochs": options.student_epochs}
    train = recipe.train.model_copy(update=shorter)
    model = recipe.model.model_copy(update={"architecture": options.student, "dropout": None, "pretrained": False})
    return recipe.model_copy(update={"train": train, "model": model, "version": "auto", "distil": options.distil})


def _fits(form: Form, budget: float) -> bool:
    return form.validation.loss <= budget + _ROUNDING


def _progress(form: Form, budget: float) -> str:
    found = form.validation
    verdict = "within" if _fits(form, budget) else "over"
    return f"{form.name}: {found.loss:+.2f} points on {found.images} validation samples, {verdict} the budget"


# -------------------------------------------------------------------------------------------------------- the judgement


def _judged(bench: Bench, found: list[Form], options: Options) -> list[Row]:
    """Parent first, then each form with its latency and whether it is kept."""
    done: list[tuple[Form, str]] = [_completed(bench, form, options.budget) for form in found]
    latencies = _latencies(bench, [form for form, _ in done])
    accuracy = 100 * float(forms.right(bench, PARENT, "test").double().mean())
    parent = Row(PARENT, "parent", "", None, accuracy, forms.parent_size(bench), latencies[PARENT])
    return [parent, *(_row(form, against, latencies[form.name]) for form, against in done)]


def _completed(bench: Bench, form: Form, budget: float) -> tuple[Form, str]:
    """A form with all that its artifact needs, and what speaks against keeping it; nothing when it is kept."""
    if not _fits(form, budget):
        return form, f"{form.validation.loss:+.2f} points on the validation split"
    form = forms.complete(bench, form, budget)
    assert form.test is not None
    if form.against:
        return form, form.against
    if form.test.loss > budget + _ROUNDING:
        return form, f"{form.test.loss:+.2f} points on the test split"
    lost = forms.weights_loss(bench, form) if form.engine is not None else 0.0
    if lost > budget + _RECORDED:
        return form, f"its float weights, for machines without its engine: {lost:+.2f} points on the test split"
    return form, ""


def _row(form: Form, against: str, latency: dict[int, Latency]) -> Row:
    accuracy = form.test.after if form.test is not None else None
    return Row(form.name, "refused" if against else "kept", against, form, accuracy, form.size, latency)


def _latencies(bench: Bench, found: list[Form]) -> dict[str, dict[int, Latency]]:
    """Of all forms and the parent, in one run; read back when the same forms were timed before."""
    names = [PARENT, *(form.name for form in found)]
    path = bench.folder / LATENCY_FILE
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        if set(names) <= set(known):
            return {name: {int(batch): Latency(**one) for batch, one in known[name].items()} for name in names}
    engines = {name: forms.engine_of(bench, name) for name in names}
    timed: dict[str, dict[int, Latency]] = {name: {} for name in names}
    for done, batch in enumerate(BATCHES):
        bench.report(Step("time", done, len(BATCHES), f"{len(names)} forms in turns, batch {batch}"))
        batches = {name: forms.latency_inputs(bench, name, batch) for name in names}
        rows = measure.latency(engines, batches, batch=batch, threads=bench.threads)
        for name, latency in rows.items():
            timed[name][batch] = latency
    plain = {name: {str(batch): dataclasses.asdict(one) for batch, one in rows.items()} for name, rows in timed.items()}
    files.write_text(path, exporting.to_json(plain))
    return timed


def _ranked(rows: Sequence[Row]) -> list[Row]:
    """The kept forms from the slowest to the fastest; last the best, the smallest of those about as fast as that."""
    kept = sorted((row for row in rows if row.status == "kept"), key=_gain)
    fast = [row for row in kept if LEAST_GAIN * _gain(row) >= _gain(kept[-1])]
    # The others follow one another by speed still: sorting is stable.
    return sorted(kept, key=lambda row: row is min(fast, key=_bytes))


def _gain(row: Row) -> float:
    """How many times as fast as the parent: the geometric mean over batch sizes."""
    return math.prod(one.speed_up for one in row.latency.values()) ** (1 / len(row.latency))


def _bytes(row: Row) -> int:
    assert row.size is not None
    return row.size.weights_bytes


def _published(bench: Bench, rows: Sequence[Row], artifacts: Path) -> tuple[Row, ...]:
    """Kept forms as the next versions of the parent's name, or the versions that they already have."""
    places = {row.name: _publish(bench, row, artifacts) for row in _ranked(rows)}
    return tuple(dataclasses.replace(row, artifact=places.get(row.name)) for row in rows)


def _publish(bench: Bench, row: Row, artifacts: Path) -> Path:
    folder = bench.folder / row.name
    record = _row_fields(row) | {"parent": bench.teacher.identity(), "threads": bench.threads}
    files.write_text(folder / COMPRESSION_FILE, exporting.to_json(record))
    return exporting.publish(folder, artifacts, "auto")


def _not_tried(name: str, reason: str) -> Row:
    return Row(name, "not tried", reason, None, None, None, {})


def _row_fields(row: Row) -> dict[str, Any]:
    def plain(value: Comparison | Size | Latency | None) -> dict[str, Any] | None:
        return None if value is None else dataclasses.asdict(value)

    form = row.form
    return {
        "name": row.name,
        "status": row.status,
        "reason": row.reason,
        "method": form.method if form else None,
        "description": form.description if form else None,
        "base": form.base if form else None,
        "settings": form.settings if form else None,
        "engine": form.engine if form else None,
        "epochs": form.epochs if form else None,
        "seconds": form.seconds if form else None,
        "validation": plain(form.validation) if form else None,
        "test": plain(form.test) if form else None,
        "test_accuracy": row.accuracy,
        "size": plain(row.size),
        "latency": {str(batch): plain(one) for batch, one in row.latency.items()},
        "artifact": str(row.artifact) if row.artifact else None,
    }
