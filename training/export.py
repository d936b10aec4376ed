"""A trained network -> the files that archives are made of.

`freeze` writes what a run found into the run folder; `publish` copies it to `artifacts/<name>/<version>/`. Publishing
needs neither the data nor the network, and the same run always gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from torch import nn

from handlerlib import architectures, drift, imaging, inputs, stored, tasks
from handlerlib.calibration import soften
from handlerlib.engine_spec import ENGINE_FILE, ENGINE_FOLDER
from handlerlib.spec import (
    GOLDEN_FOLDER,
    SPEC_FILE,
    WEIGHTS_FILE,
    Architecture,
    Golden,
    GoldenSample,
    ModelSpec,
    Preprocess,
    Scaling,
    TextPreprocess,
)
from training import files, multilabel, task_card, truth
from training.config import Recipe
from training.data import Sample
from training.errors import RecipeError, TargetError
from training.evaluate import Evaluation, Prediction
from training.html_report import REPORT_FILE
from training.train import Weights

HANDLER = "image_classifier"
TEXT_HANDLER = "text_classifier"
METRICS_FILE = "metrics.json"
PROVENANCE_FILE = "provenance.json"
CARD_FILE = "MODEL_CARD.md"
COMPRESSION_FILE = "compression.json"
"""Of an artifact that was made from another one: all figures, with latencies, of the machine that made it."""

_MOST_GOLDEN = 16
_GOLDEN_VALUES = 8
_UNPUBLISHED = "0"


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where weights come from; no paths and no times, so that equal runs give equal bytes."""

    recipe: dict[str, Any]
    run: str
    data_digest: str
    git_revision: str
    versions: dict[str, str]
    splits: dict[str, int]
    compression: dict[str, Any] | None = None
    """What the weights were made from beside data and recipe: a parent that was compressed, or a teacher."""

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        if self.compression is None:
            del fields["compression"]
        return to_json(fields)


# ------------------------------------------------------------------------------------------------ into the run folder


def save_weights(weights: Weights, path: Path) -> None:
    """State dict -> safetensors, each tensor contiguous and with its own memory, floats as float32."""
    plain = {
        key: (value.float() if value.is_floating_point() else value).detach().cpu().contiguous().clone()
        for key, value in weights.items()
    }
    files.write(path, lambda temporary: temporary.write_bytes(safetensors.torch.save(plain)))


def require_images(spec: ModelSpec) -> None:
    """Raises TargetError for a model of texts: no faster form of it is made."""
    if spec.text is not None:
        raise TargetError(
            f"{spec.name} {spec.version} reads texts, whose network takes microseconds, and only models of images are made"
            " faster",
            remedy=f"serve it as it is; marina compress {spec.name}:{spec.version} makes it smaller",
        )


def load_network(folder: Path, spec: ModelSpec) -> nn.Module:
    """The network of a run or artifact folder, on the CPU, in eval mode. Raises TargetError when the weights do not fit."""
    network = architectures.build(spec.architecture)
    try:
        architectures.load_weights(network, stored.widen(safetensors.torch.load_file(folder / WEIGHTS_FILE)))
    except Exception as error:
        raise TargetError(
            f"{folder / WEIGHTS_FILE} does not hold the weights of {SPEC_FILE}: {error}", remedy="train again"
        ) from error
    return network.eval()


def draft_spec(
    recipe: Recipe,
    shape: Architecture,
    preprocess: Preprocess,
    labels: Sequence[str],
    text: TextPreprocess | None = None,
    scaling: Sequence[Scaling] = (),
) -> ModelSpec:
    """The spec of a run that has not been judged yet: its one golden sample, and thresholds, are placeholders."""
    zeros = (0.0,) * len(labels)
    valued, labelled = recipe.task == "regression", recipe.task == "multi-label"
    placeholder = GoldenSample(
        file="", label=labels[0], probabilities=() if valued else zeros, values=zeros if valued else ()
    )
    return ModelSpec(
        name=recipe.name,
        version=_UNPUBLISHED,
        handler=HANDLER if text is None else TEXT_HANDLER,
        architecture=shape,
        preprocess=preprocess,
        text=text,
        task=recipe.task,
        labels=tuple(labels),
        thresholds=(multilabel.DEFAULT_THRESHOLD,) * len(labels) if labelled else (),
        scaling=tuple(scaling),
        limits=recipe.serve.limits,
        golden=Golden(tolerance=recipe.serve.tolerance, samples=(placeholder,)),
    )


def freeze(
    folder: Path, network: nn.Module, spec: ModelSpec, samples: Iterable[Sample], evaluation: Evaluation
) -> None:
    """Write `golden/` and the complete `model_spec.json`, with the baseline that drift is measured against.

    `network` is on the CPU, `samples` and `evaluation` are the test split's.
    """
    wanted = _choose_golden(spec, evaluation.predictions)
    chosen = {sample.name: sample for sample in samples if sample.name in wanted}
    staged = [chosen[name] for name in wanted]
    named = [
        (f"{GOLDEN_FOLDER}/{index}.{_extension(sample.data) if spec.text is None else 'txt'}", sample)
        for index, sample in enumerate(staged)
    ]

    def fill(golden: Path) -> None:
        for name, sample in named:
            (golden / Path(name).name).write_bytes(sample.data)

    files.publish(folder / GOLDEN_FOLDER, fill)
    kind = "values" if spec.task == "regression" else "probabilities"
    golden = tuple(
        GoldenSample(file=name, label=sample.label, **{kind: _answer(network, spec, sample)}) for name, sample in named
    )
    complete = dataclasses.replace(
        spec,
        golden=dataclasses.replace(spec.golden, samples=golden),
        baseline=drift.measure(_counted(spec, evaluation), len(spec.labels)),
    )
    files.write_text(folder / SPEC_FILE, complete.to_json())


def _counted(spec: ModelSpec, evaluation: Evaluation) -> list[tuple[int, float]]:
    """What a worker counts of each answer of the evaluation: `handlerlib.answers.Renderer.first`."""
    if spec.task == "regression":
        return [(0, drift.position(value, spec.scaling[0])) for value in evaluation.outputs_NK[:, 0].tolist()]
    if spec.task == "multi-label":
        return [(int(row.argmax()), float(row.max())) for row in evaluation.outputs_NK]
    numbers = {label: number for number, label in enumerate(spec.labels)}
    return [(numbers[one.predicted], one.probability) for one in evaluation.predictions]


def provenance(
    recipe: Recipe, run: str, data_digest: str, splits: Mapping[str, int], compression: dict[str, Any] | None = None
) -> Provenance:
    """Everything that led to these weights; the root of the data is left out, its digest is in."""
    return Provenance(
        recipe=recipe.identity() | {"version": recipe.version},
        run=run,
        data_digest=data_digest,
        git_revision=git_revision(),
        versions=versions(),
        splits=dict(splits),
        compression=compression,
    )


def _choose_golden(spec: ModelSpec, predictions: Sequence[Prediction]) -> list[str]:
    """Names of test images: one per class or label, at most 16 evenly picked, a right answer where there is one; of a
    regression eight, evenly over the first target's values."""
    labels = spec.labels
    if spec.task == "regression":
        ordered = sorted(predictions, key=lambda one: (json.loads(one.label)[0], one.name))
        last = len(ordered) - 1
        places = {round(number * last / (_GOLDEN_VALUES - 1)) for number in range(_GOLDEN_VALUES)}
        return [ordered[place].name for place in sorted(places)]
    step = max(1.0, len(labels) / _MOST_GOLDEN)
    picked = [labels[int(number * step)] for number in range(min(len(labels), _MOST_GOLDEN))]
    names: list[str] = []
    for label in picked:
        if spec.task == "multi-label":
            mine = [one for one in predictions if label in truth.parts(one.label) and one.name not in names]
        else:
            mine = [one for one in predictions if one.label == label]
        right = [one for one in mine if one.predicted == one.label]
        names += [one.name for one in (right or mine)[:1]]
    return names or [one.name for one in predictions[:1]]


@torch.no_grad()
def _answer(network: nn.Module, spec: ModelSpec, sample: Sample) -> tuple[float, ...]:
    reading = inputs.of(spec)
    batch = reading.stack([reading.load(sample.data)])
    logits_1K = network.eval()(reading.network(batch, torch.device("cpu")))
    return tuple(float(value) for value in soften(tasks.finish(spec)(logits_1K), spec.temperature)[0])


def _extension(data: bytes) -> str:
    announced = imaging.sniff(data) or "bin"
    return {"JPEG": "jpg", "TIFF": "tif"}.get(announced, announced.lower())


# --------------------------------------------------------------------------------------------------- into artifacts/


def choose_version(artifacts: Path, name: str, wanted: str, run: str) -> str:
    """The version under which the run is published.

    `auto` is the version that already holds this run, otherwise the one after the newest. Raises RecipeError when the
    wanted version holds another run: what may already be served is never replaced silently.
    """
    taken = {version: _run_of(artifacts / name / version) for version in published(artifacts / name)}
    if wanted == "auto":
        mine = (version for version, holder in taken.items() if holder == run)
        return next(mine, following(artifacts / name))
    if taken.get(wanted, run) != run:
        raise RecipeError(
            f"{artifacts / name / wanted} already holds the run {taken[wanted]}",
            remedy="give another version, leave version out for the next free one, or remove that folder",
        )
    return wanted


def published(folder: Path) -> list[str]:
    """The versions in the folder of one name, oldest first."""
    names = (path.name for path in folder.glob("[0-9]*") if re.fullmatch(r"\d+(\.\d+)*", path.name))
    return sorted(names, key=lambda version: tuple(map(int, version.split("."))))


def following(folder: Path) -> str:
    """The version after the newest in the folder of one name; a name alone means its newest."""
    known = published(folder)
    if not known:
        return "1.0"
    head, _, last = known[-1].rpartition(".")
    return f"{head}.{int(last) + 1}" if head else f"{last}.1"


def publish(run_folder: Path, artifacts: Path, version: str) -> Path:
    """Copy a finished run to `artifacts/<name>/<version>/`, atomically; of several processes one after the other.

    Raises TargetError when the run lacks a file, and RecipeError as `choose_version` does.
    """
    draft = ModelSpec.load(run_folder)
    try:
        metrics = json.loads((run_folder / METRICS_FILE).read_text(encoding="utf-8"))
        came_from = Provenance(**json.loads((run_folder / PROVENANCE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise TargetError(
            f"{run_folder} is not a finished run: {error}", remedy="train it with the same recipe"
        ) from error
    with files.locked(artifacts / draft.name):
        chosen = choose_version(artifacts, draft.name, version, came_from.run)
        return _publish(run_folder, artifacts, dataclasses.replace(draft, version=chosen), metrics, came_from)


def _publish(
    run_folder: Path, artifacts: Path, spec: ModelSpec, metrics: Mapping[str, Any], came_from: Provenance
) -> Path:
    flat = {key: value for key, value in metrics.items() if isinstance(value, float)}
    target = artifacts / spec.name / spec.version

    def fill(folder: Path) -> None:
        shutil.copyfile(run_folder / WEIGHTS_FILE, folder / WEIGHTS_FILE)
        (folder / GOLDEN_FOLDER).mkdir()
        for sample in spec.golden.samples:
            shutil.copyfile(run_folder / sample.file, folder / sample.file)
        texts = {
            SPEC_FILE: spec.to_json(),
            METRICS_FILE: to_json(flat),
            PROVENANCE_FILE: came_from.to_json(),
            CARD_FILE: _card(spec, metrics, came_from),
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
        for name in (COMPRESSION_FILE, ENGINE_FILE, REPORT_FILE):
            if (run_folder / name).exists():
                shutil.copyfile(run_folder / name, folder / name)
        if (run_folder / ENGINE_FILE).exists():
            shutil.copytree(run_folder / ENGINE_FOLDER, folder / ENGINE_FOLDER)

    try:
        files.publish(target, fill)
    except FileNotFoundError as error:
        raise TargetError(f"{run_folder} lacks {error.filename}", remedy="train again, with --again") from error
    return target


def to_json(value: object) -> str:
    """Canonical text: sorted keys, two-space indent, one trailing newline."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _run_of(artifact: Path) -> str | None:
    try:
        origin = json.loads((artifact / PROVENANCE_FILE).read_text(encoding="utf-8"))
        # An optimised copy names the run of its weights too, and apart from that what made it.
        return str(origin.get("parent", origin)["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


# -------------------------------------------------------------------------------------------------------- model card


def _card(spec: ModelSpec, metrics: Mapping[str, Any], came_from: Provenance) -> str:
    recipe, sizes = came_from.recipe, came_from.splits
    thing = "image" if spec.text is None else "text"
    count = sum(sizes.values())
    lines = [
        f"# {spec.name} {spec.version}",
        "",
        f"{task_card.what(spec, thing)} Architecture: {spec.architecture.name}, input {_input(spec)}.",
        "",
        "## Data",
        "",
        f"Source `{recipe['data']['source']}`, {count} {thing}s: {sizes['train']} trained on, {sizes['validation']} used"
        f" to choose {_chosen(metrics)}, {sizes['test']} held out for the figures below. No {thing} is on two"
        " sides, copies included.",
        "",
        "## Figures on the test split",
        "",
        *(_classes(spec, metrics, thing) if spec.task == "multi-class" else task_card.figures(spec, metrics, thing)),
        *_ancestry(came_from.compression, thing),
        "## What it takes",
        "",
        *(_takes_images(spec) if spec.text is None else _takes_texts(spec, spec.text)),
        "",
        "## Limits",
        "",
        f"{task_card.limits(spec, thing)} The figures hold for {thing}s"
        f" like those of the test split; near-copies that differ in a {'pixel' if thing == 'image' else 'word'} count as"
        f" different {thing}s.",
        "",
        "## Origin",
        "",
        f"Run `{came_from.run}`, seed {recipe['seed']}, data `{came_from.data_digest[:16]}`, code"
        f" `{came_from.git_revision}`, torch {came_from.versions['torch']}. All of it is in `{PROVENANCE_FILE}`.",
    ]
    return "\n".join(lines) + "\n"


def _classes(spec: ModelSpec, metrics: Mapping[str, Any], thing: str) -> list[str]:
    return [
        "| metric | value |",
        "|---|---|",
        f"| accuracy | {metrics['test_accuracy']:.4f} |",
        f"| macro precision | {metrics['test_macro_precision']:.4f} |",
        f"| macro recall | {metrics['test_macro_recall']:.4f} |",
        f"| macro F1 | {metrics['test_macro_f1']:.4f} |",
        f"| loss (nats) | {metrics['test_loss']:.4f} |",
        *_confidence(spec, metrics),
        "",
        f"| class | precision | recall | F1 | {thing}s |",
        "|---|---|---|---|---|",
        *(
            f"| {_cell(row['label'])} | {row['precision']:.3f} | {row['recall']:.3f} | {row['f1']:.3f} | {row['images']} |"
            for row in metrics["per_class"]
        ),
        "",
        *_confusions(spec.labels, metrics["confusion_matrix"]),
    ]


def _confidence(spec: ModelSpec, metrics: Mapping[str, Any]) -> list[str]:
    """How far probabilities may be trusted; nothing for a run that was judged before this was measured."""
    if "test_ece" not in metrics:
        return []
    before = metrics.get("test_ece_uncalibrated")
    scaled = "" if before is None else f" ({before:.4f} without the temperature {spec.temperature:g})"
    return [f"| expected calibration error | {metrics['test_ece']:.4f}{scaled} |"]


def _input(spec: ModelSpec) -> str:
    if spec.text is not None:
        return f"{spec.text.rows - 1:,} {'hashed terms' if spec.text.buckets else 'known terms'}"
    return f"{_colours(spec)} {spec.preprocess.width}x{spec.preprocess.height}"


def _colours(spec: ModelSpec) -> str:
    return "grey" if spec.preprocess.channels == 1 else "RGB"


def _takes_images(spec: ModelSpec) -> list[str]:
    shape = spec.preprocess
    return [
        f"{', '.join(imaging.FORMATS)}; at most {spec.limits.max_bytes} bytes and {spec.limits.max_pixels} pixels"
        f" per image, {spec.limits.max_instances} images per JSON request. Images become {_colours(spec)}, are"
        f" {_resizing(shape)} to {shape.width}x{shape.height} and normalised with mean {_numbers(shape.mean)} and"
        f" deviation {_numbers(shape.std)}.",
        "",
        "```",
        f"curl -X POST -T image.jpg http://127.0.0.1:8080/predictions/{spec.name}",
        "```",
    ]


def _takes_texts(spec: ModelSpec, text: TextPreprocess) -> list[str]:
    kinds = [
        f"{unit} in runs of {', '.join(map(str, lengths))}"
        for unit, lengths in (("words", text.word_ngrams), ("characters", text.char_ngrams))
        if lengths
    ]
    return [
        f"Plain text in UTF-8, or in another charset that Content-Type names; at most {spec.limits.max_bytes} bytes per"
        f" text, {spec.limits.max_instances} texts per JSON request. It looks at {' and '.join(kinds)}, the first"
        f" {text.most_terms} of them{' without HTML' if text.html else ''}.",
        "",
        "```",
        f"curl -X POST -H 'Content-Type: text/plain' -T text.txt http://127.0.0.1:8080/predictions/{spec.name}",
        "```",
    ]


def _confusions(labels: Sequence[str], matrix: Sequence[Sequence[int]]) -> list[str]:
    """The five most frequent mistakes, as a paragraph."""
    mistakes = sorted(
        (
            (-count, row, column)
            for row, line in enumerate(matrix)
            for column, count in enumerate(line)
            if row != column
        ),
    )
    worst = [f"{labels[row]} taken for {labels[column]} ({-count})" for count, row, column in mistakes[:5] if count]
    return [f"Most frequent mistakes: {', '.join(worst)}.", ""] if worst else []


def _chosen(metrics: Mapping[str, Any]) -> str:
    return f"epoch {metrics['best_epoch']:.0f}" if "best_epoch" in metrics else "the form"


def _ancestry(compression: Mapping[str, Any] | None, thing: str) -> list[str]:
    """What this model was made from, when it was not trained on the labels alone."""
    if compression is None:
        return []
    if "parent" not in compression:
        teacher = compression["teacher"]
        return ["## Teacher", "", f"It learned from the answers of {teacher['name']} {teacher['version']} too.", ""]
    parent, size, whole = compression["parent"], compression["size"], compression["parent_size"]
    test = compression["test"]
    return [
        "## Compression",
        "",
        f"Made from {parent['name']} {parent['version']}: {compression['description']}. On {test['images']} test {thing}s"
        f" {test['before']:.2f} % of the answers were right before and {test['after']:.2f} % are now: a loss of"
        f" {test['loss']:+.2f} points (95 % interval {test['low']:+.2f} to {test['high']:+.2f}).",
        "",
        "| | parent | this |",
        "|---|---|---|",
        *(
            f"| {label} | {whole[key]:,} | {size[key]:,} |"
            for key, label in (
                ("weights_bytes", "weights (bytes)"),
                ("compressed_bytes", "weights, deflated (bytes)"),
                ("parameters", "parameters"),
                ("nonzero", "parameters that are not 0"),
                ("multiply_adds", f"multiply-adds per {thing}"),
            )
        ),
        "",
    ]


def _resizing(shape: Preprocess) -> str:
    return "stretched" if shape.resize == "stretch" else "resized and cropped at the centre"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# ---------------------------------------------------------------------------------------------------- what code this is


@functools.cache
def code_digest() -> str:
    """SHA-256 over the code that decides weights and figures: this package and handlerlib."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).parent, Path(imaging.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{folder.name}/{path.relative_to(folder).as_posix()}\n".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def versions() -> dict[str, str]:
    try:
        marina = importlib.metadata.version("marina")
    except importlib.metadata.PackageNotFoundError:
        marina = "unknown"
    return {
        "marina": marina,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def git_revision() -> str:
    """Commit of this code, `+dirty` when tracked files differ from it; `unknown` outside a repository."""

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(Path(__file__).parent), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        revision = git("rev-parse", "--verify", "HEAD")
        return revision + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
