"""The forms of one model that a search makes, each in a folder of its own that later runs find again.

A form's folder, `runs/<name>-<version>-compress-<8 hex digits>/<form>/`, is a run folder like that of a training, so
that `marina evaluate` and `marina export` take it too, with `candidate.json` beside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from handlerlib import architectures, engines, imaging, inputs
from handlerlib.engine_spec import ENGINE_FILE, Accuracy, EngineSpec
from handlerlib.engines import Engine
from handlerlib.spec import SPEC_FILE, WEIGHTS_FILE, Architecture, ModelSpec, TextPreprocess, closest
from training import export as exporting
from training import files, html_report
from training.compress import channels, distil, measure, quantise, sparsity, storage, vocabulary
from training.compress.channels import Group, Importance
from training.compress.distil import Teacher
from training.compress.measure import Comparison, Size
from training.compress.storage import Bits
from training.config import Model, Recipe
from training.data import Dataset
from training.errors import RecipeError
from training.evaluate import Evaluation, batch_size, calibrated, evaluate
from training.export import METRICS_FILE, PROVENANCE_FILE
from training.optimize import judge as judging
from training.optimize import rungs
from training.optimize.measure import pixels
from training.optimize.openvino_rungs import CALIBRATION_IMAGES
from training.optimize.rungs import Draft
from training.pipeline import RECIPE_FILE
from training.progress import Report, Step
from training.sources import Split
from training.train import CHECKPOINT, Loss, Weights, fit, start_network

CANDIDATE_FILE = "candidate.json"
PARENT = "parent"
_CALIBRATION_BATCHES = 8


@dataclass(frozen=True, slots=True)
class Bench:
    """What every form is made from and judged with."""

    spec: ModelSpec
    """The parent's."""
    network: nn.Module
    """The parent's, on the CPU, in eval mode."""
    dataset: Dataset
    recipe: Recipe
    """The parent's with the short schedule of fine-tuning."""
    recorded: Recipe
    """The parent's as it is: what the provenance of a form holds, so that a form can be a parent in its turn."""
    folder: Path
    device: torch.device
    threads: int
    report: Report
    target: Path
    """The parent's folder."""
    teacher: Teacher
    """The parent, as distillation takes it."""
    origin: Mapping[str, Any]
    """The parent's provenance."""
    importance: Importance = "taylor"


@dataclass(frozen=True, slots=True)
class Form:
    """One candidate: what was done, and what it is worth on the validation split."""

    name: str
    method: str
    description: str
    """For people, after "made from X: "."""
    base: str
    """The form that it was made from; `parent` for the parent itself."""
    settings: dict[str, Any]
    epochs: int
    """Of training that it took; 0 for none."""
    seconds: float
    """Of this machine's time, all in all."""
    best_epoch: int
    validation: Comparison
    """Against the parent."""
    size: Size
    engine: str | None = None
    """The rung that runs it; None: torch, eager, float32."""
    test: Comparison | None = None
    """Only measured for forms that are within the budget on the validation split."""
    against: str = ""
    """Why it cannot be an artifact, whatever its accuracy; empty when it can."""

    def to_json(self) -> str:
        return exporting.to_json(dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Form | None:
        """None when the folder holds no finished candidate."""
        try:
            values = json.loads((folder / CANDIDATE_FILE).read_text(encoding="utf-8"))
            test = values.pop("test")
            return cls(
                **{key: value for key, value in values.items() if key not in ("validation", "size")},
                validation=Comparison(**values["validation"]),
                size=Size(**values["size"]),
                test=None if test is None else Comparison(**test),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None


# ----------------------------------------------------------------------------------------------------------- the ways


@dataclass(frozen=True, slots=True)
class Made:
    """Float weights of a new form, before it is judged."""

    weights: Weights
    shape: Architecture
    epochs: int = 0
    best_epoch: int = 0
    text: TextPreprocess | None = None
    """Of a text model with other terms than its parent; None: the parent's."""


def pruned(bench: Bench, name: str, base: str, ratio: float, total: float) -> Form:
    """Take `ratio` of the channels of `base` away, `total` of the parent's by then, and fine-tune."""

    def make(bench: Bench, folder: Path) -> Made:
        network, shape = network_of(bench, base), spec_of(bench, base).architecture
        groups = channels.groups(network, shape)
        scores = _scores(bench, network, groups)
        keep = [(group, channels.least_important(score, ratio)) for group, score in zip(groups, scores, strict=True)]
        smaller, narrow = channels.prune(network, shape, keep)
        return _trained(bench, bench.recipe, folder, smaller, narrow)

    settings = {"ratio": total, "step": round(ratio, 6), "importance": bench.importance}
    description = f"{100 * total:g} % of the channels removed ({bench.importance} importance), then fine-tuned"
    return _form(bench, name, "structured pruning", description, base, settings, make)


def sparse(bench: Bench, name: str, base: str, share: float) -> Form:
    """Zero `share` of the weights and fine-tune the rest."""

    def make(bench: Bench, folder: Path) -> Made:
        network = network_of(bench, base)
        with sparsity.held(network, sparsity.global_masks(network, share)):
            return _trained(bench, bench.recipe, folder, network, spec_of(bench, base).architecture)

    description = f"{100 * share:g} % of the weights set to zero by magnitude, the others fine-tuned"
    return _form(bench, name, "magnitude pruning", description, base, {"share": share}, make)


def distilled(bench: Bench, name: str, student: str, recipe: Recipe) -> Form:
    """Train the architecture `student` from the parent's answers by this recipe, its section `distil` included."""
    settings = recipe.distil

    def make(bench: Bench, folder: Path) -> Made:
        shape = dataclasses.replace(bench.spec.architecture, name=student, dropout=None, widths=())
        network = start_network(shape, Model(architecture=student), recipe.seed, report=bench.report)
        learner, loss = distil.prepare(network, shape, bench.spec.preprocess, bench.teacher, settings)
        made = _trained(bench, recipe, folder, learner, shape, loss)
        return dataclasses.replace(made, weights=distil.student_weights(made.weights))

    recorded = {"student": student, "temperature": settings.temperature, "alpha": settings.alpha}
    description = f"{student} taught by its parent (temperature {settings.temperature:g}, alpha {settings.alpha:g})"
    return _form(bench, name, "distillation", description, PARENT, recorded, make)


def quantised(bench: Bench, name: str, base: str, rung: str) -> Form:
    """The same weights run by an engine of lower precision, which for int8 is calibrated on training images."""

    def make(bench: Bench, folder: Path) -> Made:
        return Made(dict(network_of(bench, base).state_dict()), spec_of(bench, base).architecture)

    settings: dict[str, Any] = {"engine": rung}
    if rung.endswith("int8"):
        settings["calibration_images"] = min(CALIBRATION_IMAGES, len(bench.dataset.rows["train"]))
    description = f"run as {rung}" + (", calibrated on training images" if rung.endswith("int8") else "")
    return _form(bench, name, "post-training quantisation", description, base, settings, make, rung=rung)


def stored(bench: Bench, name: str, base: str, bits: Bits) -> Form:
    """The same network with weights of fewer bits in their file; a worker widens them as it loads them."""

    def make(bench: Bench, folder: Path) -> Made:
        spec = spec_of(bench, base)
        return Made(dict(network_of(bench, base).state_dict()), spec.architecture, text=spec.text)

    what = "float16 numbers" if bits == 16 else f"{bits}-bit integers with float scales"
    description = f"weights stored as {what}, computed with as float32"
    return _form(bench, name, "storage", description, base, {"bits": bits}, make, bits=bits)


def fewer_terms(bench: Bench, name: str, share: float) -> Form:
    """The parent without the `share` of its terms that matter least to the training texts."""

    def make(bench: Bench, folder: Path) -> Made:
        network = network_of(bench, PARENT)
        texts = (bench.dataset.terms[row] for row in bench.dataset.rows["train"])
        fewer = vocabulary.without(network, bench.spec, vocabulary.importance(network, texts), share)
        return Made(fewer.weights, fewer.shape, text=fewer.text)

    description = f"{100 * share:g} % of the terms removed, those that matter least to the training texts"
    return _form(bench, name, "structured pruning", description, PARENT, {"share": share}, make)


def trained_quantised(bench: Bench, name: str, base: str, rung: str) -> Form:
    """Fine-tune with weights and activations rounded as in int8, then build the int8 engine from what comes out."""

    def make(bench: Bench, folder: Path) -> Made:
        network = quantise.prepare(network_of(bench, base), calibration_batches(bench))
        made = _trained(bench, bench.recipe, folder, network, spec_of(bench, base).architecture)
        return dataclasses.replace(made, weights=quantise.plain(made.weights))

    description = f"fine-tuned with weights and activations rounded as int8 rounds them, run as {rung}"
    method = "quantisation-aware training"
    return _form(bench, name, method, description, base, {"engine": rung}, make, rung=rung)


def _trained(
    bench: Bench, recipe: Recipe, folder: Path, network: nn.Module, shape: Architecture, loss: Loss | None = None
) -> Made:
    fitted = fit(bench.dataset, recipe, folder, report=bench.report, network=network, loss=loss)
    return Made(fitted.weights, shape, len(fitted.history), fitted.best_epoch)


def _form(
    bench: Bench,
    name: str,
    method: str,
    description: str,
    base: str,
    settings: dict[str, Any],
    make: Callable[[Bench, Path], Made],
    *,
    rung: str | None = None,
    bits: Bits | None = None,
) -> Form:
    """Make and judge one form; or find it finished, or go on where its training was stopped."""
    folder = bench.folder / name
    known = Form.load(folder)
    if known is not None:
        return known
    folder.mkdir(parents=True, exist_ok=True)
    bench = dataclasses.replace(bench, report=_named(bench.report, name))
    began = time.monotonic()
    made = make(bench, folder)
    if bits is None:
        exporting.save_weights(made.weights, folder / WEIGHTS_FILE)
    else:
        content = storage.dump(made.weights, bits)
        files.write(folder / WEIGHTS_FILE, lambda temporary: temporary.write_bytes(content))
    text = made.text or bench.spec.text
    spec = dataclasses.replace(bench.spec, architecture=made.shape, text=text, baseline=None)
    files.write_text(folder / SPEC_FILE, spec.to_json())
    weighed = weighed_files(bench, folder)
    if rung is not None:
        network = network_of(bench, name).to(bench.device)
        # Quantisers draw their own progress on stdout, where --json has its one object.
        with contextlib.redirect_stdout(io.StringIO()):
            draft = rungs.build(rung, network, spec, calibration_images(bench, CALIBRATION_IMAGES), folder)
        weighed = [folder / file.path for file in draft.files] or weighed
        files.write_text(folder / ENGINE_FILE, _provisional(draft).to_json())
    form = Form(
        name=name,
        method=method,
        description=description,
        base=base,
        settings=settings,
        epochs=made.epochs,
        best_epoch=made.best_epoch,
        seconds=0.0,
        validation=compared(bench, PARENT, name, "validation"),
        size=measure.size(network_of(bench, name), made.shape, weighed),
        engine=rung,
    )
    form = dataclasses.replace(form, seconds=round(time.monotonic() - began, 1))
    files.write_text(folder / CANDIDATE_FILE, form.to_json())
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return form


# --------------------------------------------------------------------------------------------- what makes it complete


def complete(bench: Bench, form: Form, budget: float) -> Form:
    """Judge a form on the test split, once, and write what an artifact of it needs; `provenance.json` comes last.

    What comes back has `test`, and `against` where its engine strays too far from the weights beside it.
    """
    folder = bench.folder / form.name
    known = Form.load(folder) or form
    if known.against or (known.test is not None and (folder / PROVENANCE_FILE).exists()):
        return known
    bench = dataclasses.replace(bench, report=_named(bench.report, form.name))
    form = dataclasses.replace(form, test=compared(bench, PARENT, form.name, "test"))
    spec, network, total = spec_of(bench, form.name), network_of(bench, form.name), len(bench.dataset.rows["test"])
    if bench.recorded.evaluate.calibrate:
        # Other weights are sure of other things: the parent's temperature is not theirs.
        spec = calibrated(
            network.to(bench.device),
            spec,
            bench.dataset.samples("validation"),
            total=len(bench.dataset.rows["validation"]),
            threads=bench.threads,
            report=bench.report,
        )
    judged = evaluate(
        network.to(bench.device),
        spec,
        bench.dataset.samples("test"),
        total=total,
        threads=bench.threads,
        report=bench.report,
    )
    exporting.freeze(folder, network.cpu(), spec, bench.dataset.samples("test"), judged)
    if form.engine is not None:
        form = dataclasses.replace(form, against=_settle_engine(bench, form, budget))
    if form.against:
        files.write_text(folder / CANDIDATE_FILE, form.to_json())
        return form
    assert form.test is not None
    record = {
        "parent": bench.teacher.identity() | {"run": bench.origin["run"]},
        "method": form.method,
        "description": form.description,
        "base": form.base,
        "settings": form.settings,
        "engine": form.engine,
        "epochs": form.epochs,
        "learning_rate": bench.recipe.train.learning_rate if form.epochs else None,
        "validation": dataclasses.asdict(form.validation),
        "test": dataclasses.asdict(form.test),
        "size": dataclasses.asdict(form.size),
        "parent_size": dataclasses.asdict(parent_size(bench)),
    }
    origin = exporting.provenance(
        bench.recorded, f"{bench.folder.name}/{form.name}", bench.origin["data_digest"], bench.dataset.sizes(), record
    )
    files.write_text(folder / METRICS_FILE, exporting.to_json(_metrics(form, judged, spec.temperature)))
    about = html_report.describe(
        spec, dataclasses.asdict(origin), threads=bench.threads, device=bench.device.type, notes=[form.description]
    )
    html_report.write(folder / html_report.REPORT_FILE, about, judged, bench.dataset.samples("test"))
    files.write_text(folder / RECIPE_FILE, exporting.to_json(bench.recorded.model_dump(mode="json")))
    files.write_text(folder / CANDIDATE_FILE, form.to_json())
    files.write_text(folder / PROVENANCE_FILE, origin.to_json())
    return form


def weights_loss(bench: Bench, form: Form) -> float:
    """Percentage points that the float weights beside a complete form's engine lose to the parent on the test split."""
    packed = EngineSpec.load(bench.folder / form.name)
    assert packed is not None and packed.accuracy is not None and form.test is not None
    return form.test.before - 100 * packed.accuracy.reference


def parent_size(bench: Bench) -> Size:
    return measure.size(bench.network, bench.spec.architecture, weighed_files(bench, bench.target))


def weighed_files(bench: Bench, folder: Path) -> list[Path]:
    """What a worker loads to run the float form; for texts with the spec, which holds the vocabulary."""
    return [folder / name for name in ((WEIGHTS_FILE,) if bench.spec.text is None else (WEIGHTS_FILE, SPEC_FILE))]


def _metrics(form: Form, judged: Evaluation, temperature: float) -> dict[str, Any]:
    epochs = {"epochs": float(form.epochs), "best_epoch": float(form.best_epoch)} if form.epochs else {}
    return {
        **judged.metrics,
        "temperature": temperature,
        **epochs,
        "validation_accuracy": form.validation.after / 100,
        "per_class": [dataclasses.asdict(row) for row in judged.per_class],
        "confusion_matrix": judged.confusion,
        "labels": judged.labels,
    }


def _provisional(draft: Draft) -> EngineSpec:
    """A draft as `engine.json`, before its accuracy is known."""
    unknown = Accuracy(
        split="none",
        images=1,
        reference=0.0,
        engine=0.0,
        loss_points=0.0,
        interval_points=(0.0, 0.0),
        budget_points=0.0,
    )
    fields = {one.name: getattr(draft, one.name) for one in dataclasses.fields(draft)}
    return EngineSpec(**fields, tolerance=judging.CAPS["int8"], golden_difference=0.0, accuracy=unknown)


def _settle_engine(bench: Bench, form: Form, budget: float) -> str:
    """Give `engine.json` the tolerance and the accuracy that were found; or say why it cannot be served."""
    folder = bench.folder / form.name
    spec, engine = spec_of(bench, form.name), engine_of(bench, form.name)
    packed = EngineSpec.load(folder)
    assert packed is not None
    golden = judging.golden(engine, spec, folder, bench.threads)
    tolerance = judging.tolerance(spec, packed.precision, golden.difference)
    if tolerance is None:
        return (
            f"a golden probability of {form.engine} is {golden.difference:.2f} off the plain weights' own, which answer in"
            f" its place on other machines; at most {judging.CAPS[packed.precision]:g} is taken"
        )
    if judging.strays(golden.spread):
        return f"{form.engine}: {judging.strays(golden.spread)}"
    own = plain_engine(bench, network_of(bench, form.name))
    against = measure.compare(_correct(bench, own, "test"), right(bench, form.name, "test"))
    accuracy = Accuracy(
        split="test",
        images=against.images,
        reference=round(against.before / 100, 6),
        engine=round(against.after / 100, 6),
        loss_points=round(against.loss, 4),
        interval_points=(round(against.low, 4), round(against.high, 4)),
        budget_points=budget,
    )
    settled = dataclasses.replace(
        packed,
        tolerance=tolerance,
        golden_difference=golden.difference,
        own_answers=golden.answers,
        accuracy=accuracy,
    )
    files.write_text(folder / ENGINE_FILE, settled.to_json())
    return ""


# ----------------------------------------------------------------------------------------------------- what forms share


def spec_of(bench: Bench, name: str) -> ModelSpec:
    """The spec of a form; its golden samples and baseline may still be the parent's."""
    return bench.spec if name == PARENT else ModelSpec.load(bench.folder / name)


def network_of(bench: Bench, name: str) -> nn.Module:
    """The float network of a form on the CPU, in eval mode; the caller's own copy."""
    folder = bench.target if name == PARENT else bench.folder / name
    return exporting.load_network(folder, spec_of(bench, name))


def engine_of(bench: Bench, name: str) -> Engine:
    """What a worker would run of a form."""
    folder = bench.folder / name
    packed = None if name == PARENT else EngineSpec.load(folder)
    if packed is None:
        return plain_engine(bench, network_of(bench, name))

    def network() -> nn.Module:
        return network_of(bench, name)

    return engines.open_engine(packed, folder, bench.spec, bench.device, network)


def plain_engine(bench: Bench, network: nn.Module) -> Engine:
    return engines.plain_engine(network.requires_grad_(False).to(bench.device), bench.spec, bench.device)


def compared(bench: Bench, base: str, name: str, split: Split) -> Comparison:
    """Two forms on the images of a split."""
    return measure.compare(right(bench, base, split), right(bench, name, split))


def right(bench: Bench, name: str, split: Split) -> Tensor:
    """Which images of the split a form gets right, bool `[N]`; asked of the network once and kept in its folder."""
    path = bench.folder / name / f"right_{split}.txt"
    wanted = len(bench.dataset.rows[split])
    text = path.read_text(encoding="ascii") if path.exists() else ""
    if len(text) != wanted:
        found = _correct(bench, engine_of(bench, name), split, spec_of(bench, name))
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, "".join("1" if one else "0" for one in found.tolist()))
        return found
    return torch.tensor([digit == "1" for digit in text])


def calibration_images(bench: Bench, count: int) -> Tensor:
    """uint8 `[N, C, H, W]` of the first images of the training split (whose order is random)."""
    return bench.dataset.pixels(torch.tensor(bench.dataset.rows["train"][:count]))


def calibration_batches(bench: Bench) -> Iterator[Tensor]:
    """The same as the network takes them."""
    size = batch_size(bench.spec.preprocess.height, bench.spec.preprocess.width)
    for part in torch.split(calibration_images(bench, _CALIBRATION_BATCHES * size), size):
        yield imaging.normalise(part, bench.spec.preprocess)


def _scores(bench: Bench, network: nn.Module, groups: list[Group]) -> list[Tensor]:
    """Importance per group; with `taylor` the mean over batches of the training split."""
    if bench.importance != "taylor":
        return [channels.importance(network, group, bench.importance) for group in groups]
    rows = torch.tensor(bench.dataset.rows["train"])
    size = batch_size(bench.spec.preprocess.height, bench.spec.preprocess.width)
    total = [torch.zeros(group.channels) for group in groups]
    for part in torch.split(rows[: _CALIBRATION_BATCHES * size], size):
        network.zero_grad(set_to_none=True)
        logits_BK = network(imaging.normalise(bench.dataset.pixels(part), bench.spec.preprocess))
        torch.nn.functional.cross_entropy(logits_BK, bench.dataset.targets_N[part]).backward()  # type: ignore[no-untyped-call]
        for index, group in enumerate(groups):
            total[index] += channels.importance(network, group, "taylor")
    network.zero_grad(set_to_none=True)
    return total


def latency_inputs(bench: Bench, name: str, batch: int) -> Tensor:
    """What a form's engine takes: pixels, or the first texts of the validation split as its own numbers of terms."""
    spec = spec_of(bench, name)
    if spec.text is None:
        return pixels(spec.architecture, batch)
    reading = inputs.of(spec)
    samples = itertools.islice(itertools.cycle(itertools.islice(bench.dataset.samples("validation"), batch)), batch)
    return reading.stack([reading.load(sample.data) for sample in samples])


def _correct(bench: Bench, engine: Engine, split: Split, spec: ModelSpec | None = None) -> Tensor:
    if bench.spec.text is not None:
        return measure.correct_texts(
            engine, spec or bench.spec, bench.dataset, split, threads=bench.threads, report=bench.report
        )
    return measure.correct(engine, bench.dataset, split, threads=bench.threads, report=bench.report)


def _named(report: Report, name: str) -> Report:
    def tell(step: Step) -> None:
        report(dataclasses.replace(step, phase=f"{name} · {step.phase}"))

    return tell


def check_student(name: str) -> None:
    """Raises RecipeError when there is no such architecture."""
    if name not in architectures.names():
        raise RecipeError(
            f"--student {name}: no such architecture{closest(name, architectures.names())}",
            remedy="take one of " + ", ".join(architectures.own_names()) + " or a classification name of torchvision",
        )
