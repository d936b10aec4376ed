"""`model_spec.json`: everything a worker must know beside the weights, as frozen values. Standard library only.

Training's export writes it, the archive carries it, and evaluation, verification and the worker read it, so that
one image becomes the same numbers everywhere. An unknown key, a missing key or a wrong type is a `SpecError`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from handlerlib.errors import SpecError

SCHEMA_VERSION = 1
SPEC_FILE = "model_spec.json"
WEIGHTS_FILE = "weights.safetensors"
GOLDEN_FOLDER = "golden"
TEMPERATURES = (0.2, 5.0)
"""What `temperature` may be: a probability that float32 cannot tell from 0 stays below 3e-8 at the highest."""
MOST_BUCKETS = 1 << 28
"""Numbers of terms are int32."""
Task = Literal["multi-class", "multi-label", "regression"]
"""What the outputs are: probabilities of classes of which one is right (softmax), of labels that each are there or not
(sigmoid), or values of named targets."""
_T = typing.TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Width:
    """One layer of a pruned network that is narrower than the architecture's own."""

    module: str
    """Its dotted name, e.g. `layer1.0.conv1`."""
    inputs: int
    """Channels (or features) that it takes."""
    outputs: int
    """Channels (or features) that it gives."""

    def __post_init__(self) -> None:
        where = f"architecture.widths of '{self.module}'"
        require(self.inputs >= 1 and self.outputs >= 1, where, "at least 1 each way", (self.inputs, self.outputs))


@dataclass(frozen=True, kw_only=True, slots=True)
class TermTable:
    """The part of a text network that has a row for each term."""

    rows: int
    """One per term and one, the first, for no term."""
    width: int = 0
    """Numbers per term. 0, for `embedding_bag` only: one per class, with no layer behind them."""
    pooling: Literal["mean", "length", "sum"] = "mean"
    """For `embedding_bag`: a text's weights of terms are divided by their sum, by their Euclidean length, or not."""
    filters: int = 128
    """For `text_cnn`: patterns of each length."""
    lengths: tuple[int, ...] = (2, 3, 4)
    """For `text_cnn`: how many terms in a row a pattern covers."""

    def __post_init__(self) -> None:
        require(self.rows >= 2, "architecture.terms.rows", "at least 2", self.rows)
        require(self.width >= 0, "architecture.terms.width", "at least 0", self.width)
        require(self.filters >= 1, "architecture.terms.filters", "at least 1", self.filters)
        require(_ascending(self.lengths), "architecture.terms.lengths", "ascending from 1 or more", self.lengths)


VIEWS = (1, 2, 6)
"""The image; with its mirror image; both also a pixel up and left, and a pixel down and right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Which network the weights belong to; `handlerlib.architectures.build` turns it into a module."""

    name: str
    """A name of `handlerlib.architectures.names()` or `text_names()`."""
    channels: int
    """Input channels: 1 (grey) or 3 (RGB); 1 for a text."""
    height: int
    """Input height in pixels; 1 for a text."""
    width: int
    """Input width in pixels; for a text, the most terms that it may have."""
    classes: int
    """Number of outputs."""
    dropout: float | None = None
    """Probability in each dropout layer, the architecture's own when null; no effect when serving."""
    widths: tuple[Width, ...] = ()
    """The layers from which pruning took channels; left out of the file when there are none."""
    terms: TermTable | None = None
    """For a text network, and left out of the file for others."""
    views: int = 1
    """How many views of an image an answer is the mean of (`handlerlib.architectures.airbench`); left out of the file when
    it is one."""

    def __post_init__(self) -> None:
        modules = [width.module for width in self.widths]
        require(len(set(modules)) == len(modules), "architecture.widths", "one entry per module", modules)
        require(self.channels in (1, 3), "architecture.channels", "1 or 3", self.channels)
        require(self.height > 0 and self.width > 0, "architecture.height/width", "positive", (self.height, self.width))
        require(self.views in VIEWS, "architecture.views", f"one of {VIEWS}", self.views)
        require(self.classes >= 1, "architecture.classes", "at least 1", self.classes)
        require(self.dropout is None or 0 <= self.dropout < 1, "architecture.dropout", "in [0, 1)", self.dropout)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """How the bytes of an image become the network's input; `handlerlib.imaging` is the only reader."""

    channels: int
    """1: converted to grey (ITU-R 601-2 luma); 3: converted to RGB."""
    height: int
    """Output height in pixels."""
    width: int
    """Output width in pixels."""
    resize: Literal["stretch", "cover"] = "stretch"
    """stretch: resize to exactly height x width. cover: resize, keeping proportions, until `crop_fraction` of the
    shorter side covers the output, then cut out the centre."""
    crop_fraction: float = 1.0
    """For `cover`: output size / resized size, e.g. 0.875 = 224/256. In (0, 1]."""
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    antialias: bool = True
    background: int = 255
    """Grey level, 0 to 255, that shows through transparent pixels."""
    mean: tuple[float, ...]
    """Per channel, of values scaled to [0, 1]."""
    std: tuple[float, ...]
    """Per channel, of values scaled to [0, 1]; positive."""

    def __post_init__(self) -> None:
        require(self.channels in (1, 3), "preprocess.channels", "1 or 3", self.channels)
        require(self.height > 0 and self.width > 0, "preprocess.height/width", "positive", (self.height, self.width))
        require(0 < self.crop_fraction <= 1, "preprocess.crop_fraction", "in (0, 1]", self.crop_fraction)
        require(0 <= self.background <= 255, "preprocess.background", "0 to 255", self.background)
        require(len(self.mean) == self.channels, "preprocess.mean", "one value per channel", self.mean)
        require(len(self.std) == self.channels, "preprocess.std", "one value per channel", self.std)
        require(all(value > 0 for value in self.std), "preprocess.std", "positive", self.std)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPreprocess:
    """How the bytes of a text become the numbers of its terms; `handlerlib.text` is the only reader and gives the rules."""

    html: bool = True
    """Tags, comments, scripts and styles are removed and entities decoded; a `<`, `>` or `&` that is left is a space."""
    unicode: Literal["NFKC", "NFC", "none"] = "NFKC"
    """Normal form (Unicode Standard Annex #15). NFKC also makes one of full-width and other compatible forms."""
    case: Literal["fold", "lower", "keep"] = "fold"
    """fold: as Unicode compares without case, which makes `ss` of `ß`."""
    punctuation: Literal["space", "remove", "keep"] = "space"
    """Of the categories P and S. keep: each mark is a word."""
    digits: Literal["keep", "zero", "remove"] = "keep"
    """zero: each digit becomes 0."""
    stop_words: tuple[str, ...] = ()
    """Words that are left out before n-grams are made."""
    word_ngrams: tuple[int, ...] = (1, 2)
    """Lengths in words, ascending; none: no words."""
    char_ngrams: tuple[int, ...] = ()
    """Lengths in characters, ascending, within words; for languages without spaces. None: no characters."""
    repeats: Literal["once", "all"] = "once"
    """once: a text has or has not a term. all: terms in the order of their places, as often as they come."""
    buckets: int = 0
    """Terms are numbered by their hash modulo this; 0: by `vocabulary`."""
    vocabulary: tuple[str, ...] = ()
    """Known terms; all others are left out."""
    most_terms: int = 2048
    """What a text has beyond as many is not looked at."""
    most_characters: int = 100_000
    """The same, before anything is done to the text: it bounds the time that one takes, whatever is in it."""

    def __post_init__(self) -> None:
        for name in ("word_ngrams", "char_ngrams"):
            lengths = getattr(self, name)
            require(_ascending(lengths), f"text.{name}", "ascending from 1 or more", lengths)
        require(bool(self.word_ngrams or self.char_ngrams), "text.word_ngrams/char_ngrams", "one length at least", ())
        require((self.buckets > 0) != bool(self.vocabulary), "text.buckets", "given, or a vocabulary", self.buckets)
        require(0 <= self.buckets <= MOST_BUCKETS, "text.buckets", f"at most {MOST_BUCKETS}", self.buckets)
        require(len(set(self.vocabulary)) == len(self.vocabulary), "text.vocabulary", "distinct terms", "repeated ones")
        for name in ("most_terms", "most_characters"):
            require(getattr(self, name) >= 1, f"text.{name}", "at least 1", getattr(self, name))

    @property
    def rows(self) -> int:
        """Rows that a network's table of terms needs, the one for no term included."""
        return 1 + (self.buckets or len(self.vocabulary))


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one request may hold; beyond it the request alone is refused."""

    max_bytes: int = 10 * 1024 * 1024
    """Encoded bytes of one image or text (413)."""
    max_pixels: int = 50_000_000
    """Width x height from the image's header, checked before decoding (422)."""
    max_instances: int = 64
    """Images or texts in one JSON request (413)."""
    top_k: int = 5
    """Labels per input when the request does not say; at most `max_top_k` and the class count."""
    max_top_k: int = 1000
    """The largest `top_k` a request may ask for (422 above it)."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            require(getattr(self, field.name) >= 1, f"limits.{field.name}", "at least 1", getattr(self, field.name))


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenSample:
    """One image with the answer that this model must give for it."""

    file: str
    """Relative to the spec's folder, e.g. `golden/0.png`."""
    label: str
    """The truth, from the data set: the label; for people, all labels or the targets' values where it is no class."""
    probabilities: tuple[float, ...] = ()
    """Of all classes or labels, as computed by training's export at batch size 1, at the spec's temperature."""
    values: tuple[float, ...] = ()
    """Of all targets, in their own units; of a regression, which has no probabilities."""

    @property
    def outputs(self) -> tuple[float, ...]:
        """What the model must give, per output index."""
        return self.values or self.probabilities

    def answering(self, outputs: tuple[float, ...]) -> GoldenSample:
        """The same sample with other answers."""
        if self.values:
            return dataclasses.replace(self, values=outputs)
        return dataclasses.replace(self, probabilities=outputs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Golden:
    """The samples a model is proved against: at packing, at verification and at each start of a worker."""

    tolerance: float
    """Largest absolute difference of any probability; of a value, in units of its target's scale."""
    samples: tuple[GoldenSample, ...]

    def __post_init__(self) -> None:
        require(0 < self.tolerance < 1, "golden.tolerance", "in (0, 1)", self.tolerance)
        require(len(self.samples) >= 1, "golden.samples", "at least one sample", len(self.samples))


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """What the network answered for the test split, in counts of images; live answers are compared with it.

    What is the probability of the first label here is, of a regression, `handlerlib.drift.position` of the first value.
    """

    confidence_edges: tuple[float, ...]
    """Inner edges of the bins of `confidence`, ascending, in (0, 1); a value on an edge belongs to the bin above it."""
    confidence: tuple[int, ...]
    """Per bin of the first label's probability."""
    classes: tuple[int, ...]
    """Per output index, how often it was the first label."""

    def __post_init__(self) -> None:
        edges, where = self.confidence_edges, "baseline.confidence_edges"
        ascending = all(low < high for low, high in zip((0.0, *edges), (*edges, 1.0), strict=True))
        require(ascending, where, "ascending within (0, 1)", edges)
        require(len(self.confidence) == len(edges) + 1, "baseline.confidence", "one count per bin", self.confidence)
        counts = (*self.confidence, *self.classes)
        require(all(count >= 0 for count in counts), "baseline", "counts of at least 0", counts)
        require(sum(self.confidence) == sum(self.classes), "baseline", "two counts of the same images", counts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """How one target was standardised: the network gives z, the answer is mean + scale * z."""

    mean: float
    """Of the training split."""
    scale: float
    """Standard deviation of the training split; positive."""

    def __post_init__(self) -> None:
        require(self.scale > 0, "scaling.scale", "positive", self.scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """One servable model version. Written by `training.export`, read by everything after it."""

    schema: int = SCHEMA_VERSION
    name: str
    """Model name in URLs: a letter or digit, then letters, digits, `_`, `-` and `.`."""
    version: str
    """Dotted number, e.g. `1.0`; TorchServe shows it in URLs."""
    handler: str
    """Archive entry in `handlers/` without `.py`, e.g. `image_classifier`."""
    architecture: Architecture
    # Typed as if it were always there: who reads it works on images, and reaches no text model.
    preprocess: Preprocess = None  # type: ignore[assignment]
    """Of an image model. A text model has none; the file then leaves it out."""
    text: TextPreprocess | None = None
    """Of a text model; left out of the file for others."""
    task: Task = "multi-class"
    """Left out of the file when it is multi-class."""
    labels: tuple[str, ...]
    """Label of each output index; of a regression, the targets' names."""
    thresholds: tuple[float, ...] = ()
    """Of a multi-label model: per label, the probability from which on it is answered; left out of the file for others."""
    scaling: tuple[Scaling, ...] = ()
    """Of a regression: per target; left out of the file for others."""
    limits: Limits = dataclasses.field(default_factory=Limits)
    golden: Golden
    baseline: Baseline | None = None
    """Null: drift cannot be measured."""
    temperature: float = 1.0
    """Divides the logits before softmax (`handlerlib.calibration`); left out of the file when it is 1."""

    def __post_init__(self) -> None:
        require(self.schema == SCHEMA_VERSION, "schema", f"{SCHEMA_VERSION} (the one this code reads)", self.schema)
        forms = [name for name in ("preprocess", "text") if getattr(self, name) is not None]
        require(len(forms) == 1, SPEC_FILE, "of an image (preprocess) or of a text (text)", forms)
        table = self.architecture.terms.rows if self.architecture.terms is not None else None
        wanted = self.text.rows if self.text is not None else None
        require(table == wanted, "architecture.terms.rows", f"{wanted}, as text has it", table)
        require(len(self.labels) == self.architecture.classes, "labels", "one per class", len(self.labels))
        require(len(set(self.labels)) == len(self.labels), "labels", "distinct", self.labels)
        low, high = TEMPERATURES
        require(low <= self.temperature <= high, "temperature", f"from {low:g} to {high:g}", self.temperature)
        if self.baseline is not None:
            require(len(self.baseline.classes) == len(self.labels), "baseline.classes", "one per label", self.baseline)
        self._check_task()
        for sample in self.golden.samples:
            where = f"golden sample {sample.file}"
            given, other = sample.probabilities, sample.values
            if self.task == "regression":
                require(len(other) == len(self.labels) and not given, where, "one value per target", sample)
                continue
            require(len(given) == len(self.labels) and not other, where, "one probability per label", sample)
            if self.task == "multi-class":
                require(sample.label in self.labels, where, "a label of this model", sample.label)

    def _check_task(self) -> None:
        labelled, valued = self.task == "multi-label", self.task == "regression"
        wanted = len(self.labels) if labelled else 0
        require(len(self.thresholds) == wanted, "thresholds", f"{wanted} for the task {self.task}", self.thresholds)
        require(all(0 < one < 1 for one in self.thresholds), "thresholds", "in (0, 1)", self.thresholds)
        wanted = len(self.labels) if valued else 0
        require(len(self.scaling) == wanted, "scaling", f"{wanted} for the task {self.task}", self.scaling)
        plain = self.task == "multi-class" or self.temperature == 1.0
        require(plain, "temperature", f"1 for the task {self.task}", self.temperature)

    @property
    def units(self) -> tuple[float, ...]:
        """Per output, what a tolerance of 1 stands for: 1 of a probability, the target's scale of a value."""
        return tuple(one.scale for one in self.scaling) or (1.0,) * len(self.labels)

    def to_json(self) -> str:
        """Canonical text: sorted keys, two-space indent, one trailing newline. Same value, same bytes."""
        fields = dataclasses.asdict(self)
        if not self.architecture.widths:
            del fields["architecture"]["widths"]
        if self.architecture.views == 1:
            del fields["architecture"]["views"]
        if self.architecture.terms is None:
            del fields["architecture"]["terms"]
        fields = {
            name: value for name, value in fields.items() if value is not None or name not in ("preprocess", "text")
        }
        if self.temperature == 1.0:
            del fields["temperature"]
        if self.task == "multi-class":
            del fields["task"]
        for name in ("thresholds", "scaling"):
            if not fields[name]:
                del fields[name]
        for sample in fields["golden"]["samples"]:
            del sample["probabilities" if self.task == "regression" else "values"]
        return json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """Parse and check. Raises SpecError naming the field."""
        return parse(cls, text, SPEC_FILE)

    @classmethod
    def load(cls, folder: Path) -> ModelSpec:
        """Read `model_spec.json` in `folder`. Raises SpecError when it is missing or wrong."""
        try:
            text = (folder / SPEC_FILE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"{SPEC_FILE} cannot be read: {error}") from error
        return cls.from_json(text)


def closest(word: str, known: typing.Iterable[str]) -> str:
    """A trailing ", did you mean 'x'?" for messages about unknown names; empty when nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean '{near[0]}'?" if near else ""


def parse(kind: type[_T], text: str, file: str) -> _T:
    """The text of `file` -> the frozen dataclass `kind`: nothing unknown, nothing missing. Raises SpecError."""
    try:
        return typing.cast(_T, _build(kind, json.loads(text), "", file))
    # A number of thousands of digits and a thousand brackets are JSON, and more than Python reads.
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{file} is not JSON: {error}") from error


def require(condition: bool, where: str, expected: str, got: object) -> None:
    """Raise SpecError "`where` must be `expected`" unless `condition` holds."""
    if not condition:
        raise SpecError(f"{where} must be {expected}, got {got!r}")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


def _ascending(lengths: tuple[int, ...]) -> bool:
    return all(low < high for low, high in zip((0, *lengths), lengths, strict=False))


def _build(kind: Any, value: Any, where: str, file: str) -> Any:
    """`value` as JSON gave it -> an instance of the annotation `kind`; SpecError names the dotted `where`."""
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(typing.cast(type, kind), value, where, file)
    origin = typing.get_origin(kind)
    if origin is tuple:
        require(isinstance(value, list), where, "a list", value)
        element = typing.get_args(kind)[0]
        if element is str and all(type(item) is str for item in value):
            return tuple(value)  # a vocabulary has tens of thousands
        return tuple(_build(element, item, f"{where}[{index}]", file) for index, item in enumerate(value))
    if origin is Literal:
        require(value in typing.get_args(kind), where, f"one of {list(typing.get_args(kind))}", value)
        return value
    if origin in (typing.Union, types.UnionType):
        inner = next(arm for arm in typing.get_args(kind) if arm is not type(None))
        return None if value is None else _build(inner, value, where, file)
    if kind is float:
        require(isinstance(value, int | float) and not isinstance(value, bool), where, "a number", value)
        require(_is_finite(value), where, "finite", value)
        return float(value)
    require(type(value) is kind, where, f"of type {kind.__name__}", value)
    return value


def _build_dataclass(kind: type, value: Any, where: str, file: str) -> Any:
    require(isinstance(value, dict), where or file, "an object", value)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    for key in value:
        if key not in fields:
            raise SpecError(f"unknown key '{prefix}{key}' in {file}{closest(key, fields)}")
    for name, field in fields.items():
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in value and not optional:
            raise SpecError(f"{file} lacks the key '{prefix}{name}'")
    arguments = {name: _build(hints[name], item, f"{prefix}{name}", file) for name, item in value.items()}
    return kind(**arguments)
