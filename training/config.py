"""Recipes: what to train, on which data and how, as one frozen value.

A recipe is a TOML file that holds only what differs from the defaults below. `load_recipe` reads it, applies
`--set a.b=c` overrides and checks everything, so that the functions below it never see a wrong value.
"""

from __future__ import annotations

import itertools
import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from handlerlib.spec import Limits, Task, TextPreprocess, closest
from training.errors import RecipeError

RECIPES = Path(__file__).parent / "recipes"

Source = Literal["digits", "folder", "mnist", "fashion_mnist", "cifar10", "image_csv", "digit_pairs", "texts", "csv"]
TEXT_SOURCES: tuple[Source, ...] = ("texts", "csv")
TABLES: tuple[Source, ...] = ("csv", "image_csv")
"""Sources whose labels stand in the columns of a file."""
PAIR_TARGETS = ("sum", "difference")
"""Of `digit_pairs`: left digit plus right one, and left one minus right one."""
Precision = Literal["fp32", "bf16", "fp16"]
Optimizer = Literal["gradient_descent", "sgd", "muon", "adam", "adamw", "rmsprop", "adagrad"]
Schedule = Literal["constant", "linear", "step", "inverse_time", "exponential", "cosine", "one_cycle", "plateau"]
Kind = Literal["head", "bias", "norm"]
_LIMITS = Limits()
_TEXT = TextPreprocess(buckets=1)
# Keys that one kind of recipe has and the other refuses, so that a setting without effect is never taken for one with.
_IMAGE_KEYS: dict[str, frozenset[str]] = {
    "data": frozenset(["image_size", "max_side", "channels", "crop_fraction", "memory_mib"]),
    "model": frozenset(["pretrained", "whiten", "views"]),
    "train": frozenset(["channels_last"]),
    "serve": frozenset(["max_pixels"]),
    "": frozenset(["augment", "distil"]),
}
_TABLE_KEYS = frozenset(
    [
        "encoding",
        "delimiter",
        "columns",
        "label_column",
        "class_names",
        "train_rows",
        "validation_rows",
        "test_rows",
    ]
)
_CSV_KEYS = _TABLE_KEYS - {"encoding"} | {"text_columns"}
# Keys of some tasks only, which the others refuse.
_TASK_KEYS: dict[Task, dict[str, frozenset[str]]] = {
    "multi-class": {
        "data": frozenset(["label_columns", "label_separator", "target_columns"]),
        "train": frozenset(["loss"]),
    },
    "multi-label": {
        "data": frozenset(["class_names", "target_columns"]),
        "train": frozenset(["loss", "label_smoothing"]),
        "model": frozenset(["naive_bayes"]),
        "": frozenset(["distil", "evaluate"]),
    },
    "regression": {
        "data": frozenset(["class_names", "label_column", "label_columns", "label_separator"]),
        "train": frozenset(["class_weights", "label_smoothing"]),
        "model": frozenset(["naive_bayes"]),
        "": frozenset(["distil", "evaluate"]),
    },
}
_MONITORS: dict[Task, tuple[str, ...]] = {
    "multi-class": ("accuracy", "loss", "macro_f1"),
    "multi-label": ("loss", "accuracy", "macro_f1"),
    "regression": ("loss", "r2"),
}
_TEXT_KEYS: dict[str, frozenset[str]] = {
    "data": _CSV_KEYS | {"encoding", "empty"},
    "model": frozenset(["width", "pooling", "idf", "filters", "lengths", "naive_bayes"]),
    "": frozenset(["text"]),
}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Data(_Section):
    """Where the images or texts come from and how they are divided."""

    source: Source
    root: str | None = None
    """Folder (or .zip) of the images or of the .txt files, needed by `folder` and `texts`; the file, or the folder with
    train.csv and test.csv, needed by `csv` and `image_csv`; where the torchvision sets are kept, `data` by default."""
    image_size: Literal["auto"] | Annotated[int, Field(ge=4, le=1024)] = "auto"
    """Side of the network's input in pixels. auto: the images' common size when they share one of at most
    `max_side` a side, otherwise `max_side`."""
    max_side: int = Field(default=64, ge=4, le=1024)
    """Largest side that `image_size = "auto"` may choose, in pixels."""
    channels: Literal["auto", 1, 3] = "auto"
    """auto: 1 when every image is grey, otherwise 3."""
    crop_fraction: float = Field(default=1.0, gt=0, le=1)
    """When the images differ in size: the part of the shorter side that the network sees."""
    validation: float = Field(default=0.1, gt=0, lt=0.5)
    """Part of all images (of the training images where the data has its own test set) held out to choose the best epoch."""
    test: float = Field(default=0.2, gt=0, lt=0.5)
    """Part of all images held out for the final figures; unused where the data has its own test set."""
    max_images: int | None = Field(default=None, ge=4)
    """Use at most this many images, evenly over splits and classes. For trials."""
    memory_mib: int = Field(default=1024, ge=0)
    """Decoded images beyond this many MiB lie in a memory-mapped file in the run folder while training."""
    encoding: str = "utf-8"
    """Of the texts' files, and of a file with a table."""
    empty: Literal["refuse", "leave_out"] = "refuse"
    """What becomes of texts of which normalisation leaves nothing."""
    delimiter: str = Field(default=",", min_length=1, max_length=1)
    """Between the columns of `csv` or `image_csv`."""
    columns: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """Names of the columns of a `csv` whose first row is data; left out, the first row holds the names."""
    label_column: str = "label"
    """The class of a row of `csv` or `image_csv`; of a multi-label recipe with a `label_separator`, all its labels."""
    label_separator: str = ""
    """Multi-label: between the labels in `label_column`, e.g. ";"; an empty column is a row without any."""
    label_columns: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Multi-label: one column per label instead, of its name, with 1 where the row has the label and 0 where not."""
    target_columns: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Regression: the columns with numbers that the model learns to give; of `digit_pairs`, some of sum and difference."""
    path_column: str = "image"
    """Of `image_csv`: the image's file, relative to the file with the table."""
    text_columns: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = ("text",)
    """One or more, joined by a line break."""
    class_names: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """For a `csv` that numbers its classes from 1: their names."""
    train_rows: int = Field(default=0, ge=0)
    """The first rows of `csv` train, the next `validation_rows` choose the epoch, the last `test_rows` are for the final
    figures and what lies between is not used; 0 in all three: Marina divides."""
    validation_rows: int = Field(default=0, ge=0)
    test_rows: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _rows(self) -> Self:
        given = (self.train_rows, self.validation_rows, self.test_rows)
        if any(given) and not all(given):
            raise ValueError("train_rows, validation_rows and test_rows go together: give all three or none")
        return self


class Text(_Section):
    """How texts become numbers; ends in `model_spec.json` (see `handlerlib.spec.TextPreprocess` for each key)."""

    html: bool = _TEXT.html
    unicode: Literal["NFKC", "NFC", "none"] = _TEXT.unicode
    case: Literal["fold", "lower", "keep"] = _TEXT.case
    punctuation: Literal["space", "remove", "keep"] = _TEXT.punctuation
    digits: Literal["keep", "zero", "remove"] = _TEXT.digits
    stop_words: Literal["none", "english"] | Annotated[tuple[str, ...], Field(strict=False)] = "none"
    """english: scikit-learn's list. A list of words: these."""
    word_ngrams: Annotated[tuple[Annotated[int, Field(ge=1, le=8)], ...], Field(strict=False)] = _TEXT.word_ngrams
    char_ngrams: Annotated[tuple[Annotated[int, Field(ge=1, le=16)], ...], Field(strict=False)] = ()
    repeats: Literal["once", "all"] = _TEXT.repeats
    buckets: int = Field(default=0, ge=0, le=1 << 24)
    """0: a vocabulary of the training texts' terms instead of hashing."""
    vocabulary_size: int = Field(default=200_000, ge=1)
    """The most frequent terms, those in more texts first."""
    least_texts: int = Field(default=2, ge=1)
    """A term belongs to the vocabulary when it is in as many training texts."""
    most_terms: int = Field(default=_TEXT.most_terms, ge=1)
    most_characters: int = Field(default=_TEXT.most_characters, ge=1)

    @model_validator(mode="after")
    def _some_terms(self) -> Self:
        for name in ("word_ngrams", "char_ngrams"):
            lengths = getattr(self, name)
            if list(lengths) != sorted(set(lengths)):
                raise ValueError(f"{name} must be ascending: {sorted(set(lengths))}")
        if not self.word_ngrams and not self.char_ngrams:
            raise ValueError("word_ngrams and char_ngrams are both empty: give one length at least")
        return self


class Model(_Section):
    """Which network."""

    architecture: str
    """A name of `handlerlib.architectures.names()`, of `text_names()` for texts."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Probability of every dropout layer; the architecture's own when left out."""
    pretrained: bool = False
    """Start from torchvision's DEFAULT weights (downloaded) wherever the shapes match."""
    whiten: bool = False
    """Start with a first convolution that whitens the training images' patches; best frozen (see `train.freeze`)."""
    views: Literal[1, 2, 6] = 1
    """For airbench: views of an image that an answer is the mean of, by the evaluation and the worker alike. Each view costs
    as much as one answer without them."""
    width: int = Field(default=64, ge=0, le=4096)
    """Numbers per term of a text. 0, for embedding_bag only: one per class, so that the network is linear."""
    pooling: Literal["mean", "length", "sum"] = "mean"
    """For embedding_bag: a text's weights of terms are divided by their sum, by their Euclidean length, or not."""
    idf: bool = False
    """For embedding_bag: a term weighs ln((1 + texts) / (1 + texts with it)) + 1, of the training texts."""
    filters: int = Field(default=128, ge=1, le=4096)
    """For text_cnn: patterns of each length."""
    lengths: Annotated[tuple[Annotated[int, Field(ge=1, le=16)], ...], Field(strict=False, min_length=1)] = (2, 3, 4)
    """For text_cnn: terms in a row that a pattern covers."""
    naive_bayes: float = Field(default=0.0, ge=0)
    """For embedding_bag of width 0: start as the naive Bayes classifier of the training texts with this smoothing; for
    text_cnn: start with what that one says of each term (see `training.text_start`). 0 starts at random."""


class Stage(_Section):
    """Some epochs of a training that differ from the rest: smaller images, other layers, another rate."""

    epochs: int = Field(default=1, ge=1)
    image_size: int | None = Field(default=None, ge=4, le=1024)
    """Longer side of the images in this stage, in pixels; the network's own input size when left out."""
    part: float = Field(default=1.0, gt=0, le=1)
    """Part of the training split that an epoch sees, drawn anew for each."""
    batch_size: int | None = Field(default=None, ge=2)
    """`train.batch_size` when left out."""
    learning_rate: float = Field(default=1.0, gt=0)
    """Factor on the rate that the schedule gives."""
    schedule: Schedule | None = None
    """A schedule over this stage alone; left out, the stage goes on along `train.schedule`, which spans all stages."""
    freeze: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """As `train.freeze`, for this stage, in addition to it."""


class Train(_Section):
    """The optimisation."""

    epochs: int = Field(default=20, ge=1)
    """With stages: the sum of theirs, and best left out."""
    stages: Annotated[tuple[Stage, ...], Field(strict=False)] = ()
    """One after the other, instead of `epochs` equal ones. The best epoch is one of the last stage, which therefore
    has the network's own image size."""
    batch_size: int = Field(default=64, ge=2)
    freeze: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Names of modules, such as "layer1", that keep the weights and statistics that they start with."""
    accumulate: int = Field(default=1, ge=1)
    """Batches whose gradients make one update: batch_size x accumulate images at the memory of batch_size."""
    optimizer: Optimizer = "adamw"
    """See `training.optimisers`. gradient_descent makes one update an epoch, with the gradient of all its images."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """The peak of the schedule."""
    rates: dict[Kind, Annotated[float, Field(ge=0)]] = {}
    """Factors on the rate of some weights: of the last linear layer's (head), of biases, of the scales of norms; 1 for
    those not named, and 0 leaves them as they start. They do not change how fast a weight decays."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """For sgd and muon."""
    nesterov: bool = True
    """Momentum in Nesterov's form."""
    weight_decay: float = Field(default=0.01, ge=0)
    """As the optimiser applies it, on weights of two or more dimensions; biases and norms are left alone."""
    decay_biases: bool = False
    """Weight decay on biases and the scales of norms too."""
    l1: float = Field(default=0.0, ge=0)
    """Penalty l1 * sum |w| on the same weights; it makes many of them nearly zero."""
    l2: float = Field(default=0.0, ge=0)
    """Penalty l2 / 2 * sum w^2 on the same weights. With sgd it is what weight_decay is; adamw's decay is another."""
    clip: float = Field(default=0.0, ge=0)
    """Longest gradient of all weights together, as a Euclidean norm; 0 is off."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Judge and keep the moving average of the weights that forgets 1 - ema with each update; 0 is off."""
    schedule: Schedule = "cosine"
    """See `training.schedules` for the formulas."""
    decay: float | None = Field(default=None, gt=0)
    """The factor of step, exponential and plateau (0.1, 0.9 and 0.1 when left out), the slope of inverse_time (1)."""
    decay_epochs: int | None = Field(default=None, ge=1)
    """Epochs between the steps of step (10 when left out), patience of plateau (3)."""
    warmup: float = Field(default=0.0, ge=0)
    """Epochs over which the rate rises to the schedule's first, in a line; the schedule begins after them."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    class_weights: Literal["none", "balanced"] | dict[str, Annotated[float, Field(gt=0)]] = "none"
    """Weight of each class in the loss, 1 for those not named. balanced: images / (classes x images of the class). Of a
    multi-label recipe the weight of images that have the label beside those that have not; balanced: images without /
    images with it."""
    early_stopping: int = Field(default=0, ge=0)
    """Stop after this many epochs without a better `monitor`; 0 trains all epochs."""
    monitor: Literal["accuracy", "loss", "macro_f1", "r2"] = "accuracy"
    """What the best epoch is chosen by, on the validation split; ties go to the lower loss. Multi-label and regression
    take the loss when it is left out; there accuracy is the share of images whose labels are all right at a threshold of
    one half, and r2 the mean of the targets' coefficients of determination."""
    loss: Literal["mean_squared_error", "mean_absolute_error"] = "mean_squared_error"
    """Of a regression, of standardised targets. Absolute errors take less notice of outliers."""
    checkpoint_minutes: float = Field(default=5.0, gt=0)
    """Longest time of training that a power cut can cost."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0 takes all that this process may use. Part of the run's identity: sums depend on it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "fp32"
    """Of activations and products; weights and their sums stay float32. fp16 scales the loss and needs a GPU."""
    compile: bool = False
    """Let torch.compile make one program of the network: slow to start, faster steps after. It needs a compiler, and
    draws other random numbers for dropout than the network without it."""
    channels_last: bool = False
    """Keep each pixel's channels side by side in memory: faster convolutions on most hardware."""
    validation_images: int = Field(default=0, ge=0)
    """Judge epochs on this many images of the validation split only; 0 takes all."""

    @model_validator(mode="before")
    @classmethod
    def _count_epochs(cls, values: Any) -> Any:
        stages = values.get("stages") if isinstance(values, dict) else None
        if not isinstance(stages, list | tuple) or not all(isinstance(stage, dict) for stage in stages) or not stages:
            return values
        total = sum(stage.get("epochs", 1) for stage in stages if isinstance(stage.get("epochs", 1), int))
        if values.get("epochs", total) != total:
            raise ValueError(f"epochs is {values['epochs']} but the stages have {total}: leave epochs out")
        return values | {"epochs": total}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.optimizer == "gradient_descent" and self.accumulate > 1:
            raise ValueError("gradient_descent takes all images for an update: leave accumulate out")
        if self.schedule != "inverse_time" and self.decay is not None and self.decay > 1:
            raise ValueError(f"a decay of {self.decay:g} would raise the rate: {self.schedule} takes a factor up to 1")
        if self.warmup >= self._warmable:
            before = " before a stage has a schedule of its own" if self._warmable < self.epochs else ""
            raise ValueError(
                f"a warm-up of {self.warmup:g} epochs leaves nothing of {self._warmable}{before}: shorten warmup"
            )
        if self.schedule == "plateau" and sum(stage.schedule is None for stage in self.stages) > 1:
            raise ValueError(
                "schedule plateau judges the epochs of one stage by each other: give the stages a schedule of their own"
                ' (schedule = "plateau" begins anew in each), or take another for all'
            )
        if self.stages and self.stages[-1].image_size is not None:
            raise ValueError("the last stage trains at the network's own size: leave its image_size out")
        return self

    @property
    def _warmable(self) -> int:
        """Epochs of the schedule that a warm-up begins."""
        if not self.stages or self.stages[0].schedule is not None:
            return self.stages[0].epochs if self.stages else self.epochs
        return sum(stage.epochs for stage in itertools.takewhile(lambda one: one.schedule is None, self.stages))


class Augment(_Section):
    """Random changes to training images, drawn anew for each image and epoch. Zero is off."""

    shift: float = Field(default=0.0, ge=0, le=0.5)
    """Largest shift, as part of the side; edges are repeated."""
    flip: bool | Literal["alternating"] = False
    """Mirror every second image left to right. alternating: an image that was mirrored in one epoch is not in the next,
    so that two epochs show both sides of every image."""
    rotation: float = Field(default=0.0, ge=0, le=180)
    """Largest angle in degrees, both ways."""
    scale: float = Field(default=0.0, ge=0, lt=1)
    """Largest relative change of size, both ways."""
    contrast: float = Field(default=0.0, ge=0, lt=1)
    """Largest relative change of contrast, both ways."""
    brightness: float = Field(default=0.0, ge=0, le=2)
    """Largest shift of brightness in standard deviations of the data, both ways."""
    cutout: float = Field(default=0.0, ge=0, lt=1)
    """Side of one square blanked per image, as part of the image's side."""


class Distil(_Section):
    """Learn from the answers of a trained network too (see `training.compress.distil`); off without a teacher."""

    teacher: str | None = None
    """Folder of an artifact that was trained on the same classes, e.g. `artifacts/digits/1.0`."""
    temperature: float = Field(default=4.0, gt=0)
    """Divides the logits of both: higher shows more of what the teacher thinks of the wrong classes."""
    alpha: float = Field(default=0.9, ge=0, le=1)
    """Weight of the teacher's answers; the labels have the rest."""
    hints: Annotated[tuple[Annotated[tuple[str, str], Field(strict=False)], ...], Field(strict=False)] = ()
    """Pairs of layers, [student's, teacher's], whose features are drawn together through a learned projection."""
    hint_weight: float = Field(default=1.0, ge=0)


class Evaluate(_Section):
    """How the trained network is judged."""

    calibrate: bool = True
    """Fit the temperature of `model_spec.json` on the validation split (see `training.calibrate`)."""


class Serve(_Section):
    """What the served model accepts; ends in `model_spec.json`."""

    max_bytes: int = Field(default=_LIMITS.max_bytes, ge=1)
    max_pixels: int = Field(default=_LIMITS.max_pixels, ge=1)
    max_instances: int = Field(default=_LIMITS.max_instances, ge=1)
    top_k: int = Field(default=_LIMITS.top_k, ge=1)
    max_top_k: int = Field(default=_LIMITS.max_top_k, ge=1)
    tolerance: float = Field(default=1e-4, gt=0, lt=1)
    """Largest difference of a golden probability between training's export and a worker."""

    @property
    def limits(self) -> Limits:
        return Limits(**self.model_dump(exclude={"tolerance"}))


class Range(_Section):
    """The values that `marina search` may give one key: from `low` to `high`, or one of `choices`."""

    low: int | float | None = None
    """Whole numbers when both ends are whole."""
    high: int | float | None = None
    log: bool = False
    """Draw evenly over orders of magnitude."""
    step: int | float | None = None
    """Only low, low + step, low + 2 step, ..."""
    choices: Annotated[tuple[bool | int | float | str, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.choices:
            if (self.low, self.high, self.step, self.log) != (None, None, None, False):
                raise ValueError("choices stand alone: leave low, high, log and step out")
            if len(set(map(repr, self.choices))) < max(2, len(self.choices)):
                raise ValueError("choices need two different values at least, each once")
        elif self.low is None or self.high is None or not self.low < self.high:
            raise ValueError("give low and high, low being the smaller, or choices")
        elif self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs a low above 0 and no step")
        elif self.step is not None and not 0 < self.step <= self.high - self.low:
            raise ValueError("step must be above 0 and fit between low and high")
        return self

    @property
    def whole(self) -> bool:
        """Whether its values are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int) and not isinstance(self.step, float)

    def holds(self, value: object) -> bool:
        """Whether a search may choose this value."""
        if self.choices:
            return value in self.choices
        if isinstance(value, bool) or not isinstance(value, int | float) or self.low is None or self.high is None:
            return False
        steps = (value - self.low) / (self.step or (1 if self.whole else math.inf))
        return self.low <= value <= self.high and math.isclose(steps, round(steps), abs_tol=1e-9)

    @property
    def extremes(self) -> tuple[bool | int | float | str, ...]:
        """Values that are all allowed when the recipe allows the range."""
        ends = tuple(end for end in (self.low, self.high) if end is not None)
        return self.choices or (ends if self.whole else tuple(map(float, ends)))


class Recipe(_Section):
    """One training, complete. Two equal recipes on the same data, code and machine give the same weights."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Model name: the folder under `artifacts/` and the name in URLs."""
    version: str = Field(default="auto", pattern=r"^(auto|\d+(\.\d+)*)$")
    """auto: the next free 1.N under `artifacts/<name>/`."""
    seed: int = Field(default=0, ge=0)
    task: Task = "multi-class"
    """What is learned: one class of several, any number of labels, or values (see `handlerlib.tasks`)."""
    data: Data
    text: Text = Text()
    """Of recipes for texts."""
    model: Model
    train: Train = Train()
    augment: Augment = Augment()
    distil: Distil = Distil()
    evaluate: Evaluate = Evaluate()
    serve: Serve = Serve()
    search: dict[str, Range] = {}
    """What `marina search` varies, by key: `train.learning_rate = {low = 1e-4, high = 1e-1, log = true}`."""

    @model_validator(mode="before")
    @classmethod
    def _flatten_search(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("search"), dict):
            return values | {"search": {key: _range(key, value) for key, value in _ranges(values["search"])}}
        return values

    @model_validator(mode="before")
    @classmethod
    def _choose_monitor(cls, values: Any) -> Any:
        """Accuracy is for classes."""
        train = values.get("train", {}) if isinstance(values, dict) else None
        if not isinstance(train, dict) or values.get("task") not in ("multi-label", "regression"):
            return values
        return values | {"train": {"monitor": "loss"} | train}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.data.source in ("digits", "digit_pairs") and self.data.root is not None:
            raise ValueError("data.root: the digits come with scikit-learn, leave root out")
        for foreign, of in ((self._foreign(), f"source '{self.data.source}'"), (_TASK_KEYS[self.task], self._for_task)):
            for section, keys in foreign.items():
                part = getattr(self, section) if section else self
                for key in sorted(part.model_fields_set & keys):
                    usual = type(part).model_fields[key].default
                    if getattr(part, key) != usual:
                        name = f"{section}.{key}" if section else key
                        raise ValueError(f"{name} is not for the {of}: leave it out{_or_usual(name, usual)}")
        self._check_task()
        if self.of_texts:
            self._check_texts()
        return self

    @property
    def _for_task(self) -> str:
        return f"task '{self.task}'"

    def _check_task(self) -> None:
        if self.train.monitor not in _MONITORS[self.task]:
            known = ", ".join(_MONITORS[self.task])
            raise ValueError(f"train.monitor: the {self._for_task} has no {self.train.monitor}, take one of {known}")
        data, source = self.data, self.data.source
        if self.task == "multi-class":
            if source == "digit_pairs":
                raise ValueError('data.source: digit_pairs have no one class, set task = "multi-label" or "regression"')
            return
        if source not in (*TABLES, "digit_pairs"):
            raise ValueError(
                f"data.source: the {self._for_task} reads a table, csv (of texts) or image_csv, or digit_pairs"
            )
        if self.task == "multi-label" and source in TABLES and bool(data.label_columns) == bool(data.label_separator):
            raise ValueError(
                "data.label_columns: give the labels' columns, or label_separator where one column holds all; not both"
            )
        for key, columns in (("label_columns", data.label_columns), ("target_columns", data.target_columns)):
            if len(set(columns)) < len(columns):
                raise ValueError(f"data.{key}: a column is named twice")
        if self.task == "regression":
            self._check_targets()

    def _check_targets(self) -> None:
        targets = self.data.target_columns
        if self.data.source != "digit_pairs":
            if not targets:
                raise ValueError("data.target_columns: name the columns with the numbers to be learned")
        elif unknown := [name for name in targets if name not in PAIR_TARGETS]:
            known = ", ".join(PAIR_TARGETS)
            raise ValueError(f"data.target_columns: digit_pairs have no '{unknown[0]}', they have {known}")

    def _check_texts(self) -> None:
        if any(stage.image_size is not None for stage in self.train.stages):
            raise ValueError(f"train.stages.image_size is not for the source '{self.data.source}': leave it out")
        if self.model.naive_bayes and self.model.architecture != "text_cnn" and self.model.width:
            raise ValueError('model.naive_bayes needs architecture = "embedding_bag" and width = 0, or "text_cnn"')
        if self.model.architecture == "text_cnn" and not self.model.width:
            raise ValueError("model.width: text_cnn needs at least 1")

    @property
    def of_texts(self) -> bool:
        """Whether it trains on texts; on images otherwise."""
        return self.data.source in TEXT_SOURCES

    @property
    def thing(self) -> str:
        """What messages call one of its samples."""
        return "text" if self.of_texts else "image"

    def _foreign(self) -> dict[str, frozenset[str]]:
        """Keys by section that a recipe for this source does not have."""
        source = self.data.source
        known = _TEXT_KEYS if not self.of_texts else _IMAGE_KEYS
        keys = known["data"]
        if source == "image_csv":
            keys -= _TABLE_KEYS
        elif source == "texts":
            keys |= _CSV_KEYS
        if source != "image_csv":
            keys |= {"path_column"}
        if source not in TABLES:
            keys |= {"label_columns", "label_separator"}
        if source not in (*TABLES, "digit_pairs"):
            keys |= {"target_columns"}
        return known | {"data": keys}

    @model_serializer(mode="wrap")
    def _own_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        for section, keys in (*self._foreign().items(), *_TASK_KEYS[self.task].items()):
            part = values.get(section) if section else values
            if isinstance(part, dict):
                for key in keys:
                    part.pop(key, None)
        return values

    def identity(self) -> dict[str, Any]:
        """What decides the result: all but the version number, where images and teacher lie (their digests count),
        where pixels are kept meanwhile and how often a checkpoint is written."""
        aside: dict[str, bool | set[str]] = {
            "version": True,
            "data": {"root", "memory_mib"},
            "train": {"checkpoint_minutes"},
            "distil": {"teacher"} if self.distil.teacher else True,
            "search": True,
        }
        return self.model_dump(mode="json", exclude=aside)


def _or_usual(name: str, usual: object) -> str:
    """How a key of a recipe that is not one's own is taken back."""
    if usual is None or isinstance(usual, BaseModel):
        return ""
    return f", or --set {name}={usual if isinstance(usual, str) else json.dumps(usual)}"


def recipe_names() -> tuple[str, ...]:
    """The recipes that come with Marina."""
    return tuple(sorted(path.stem for path in RECIPES.glob("*.toml")))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that short name or TOML path, with `section.key=value` overrides applied.

    Raises RecipeError for an unknown recipe, unknown key (with the nearest known one) or a value out of range.
    """
    path = _find(name_or_path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}", remedy="check the path") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe {path} is not TOML: {error}", remedy="correct that line") from error
    for override in overrides:
        _override(values, override)
    return parse(values, where=f"recipe {path.stem}")


def parse(values: Mapping[str, Any], *, where: str) -> Recipe:
    """Check raw values. Raises RecipeError, `where` opening its message."""
    try:
        recipe = Recipe.model_validate(dict(values))
    except ValidationError as error:
        problems = "; ".join(_explain(error))
        raise RecipeError(f"{where}: {problems}", remedy="correct the recipe or the --set option") from error
    _check_architecture(recipe)
    _check_search(recipe, where)
    return recipe


def changed(recipe: Recipe, changes: Mapping[str, object], *, where: str) -> Recipe:
    """The recipe with these values at these dotted keys, and nothing to search. Raises RecipeError as `parse`."""
    values = recipe.model_dump(mode="json", exclude={"search": True}, exclude_defaults=True)
    for key, value in changes.items():
        *sections, name = key.split(".")
        table = values
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
    return parse(values, where=where)


def _find(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.is_file():
        if path.is_file():
            return path
        raise RecipeError(f"recipe file {path} does not exist", remedy=f"known recipes: {', '.join(recipe_names())}")
    if name_or_path in recipe_names():
        return RECIPES / f"{name_or_path}.toml"
    raise RecipeError(
        f"unknown recipe '{name_or_path}'{closest(name_or_path, recipe_names())}",
        remedy=f"known recipes: {', '.join(recipe_names())}; or give the path of a .toml file",
    )


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise RecipeError(f"--set {override}: not of the form key=value", remedy="e.g. --set train.epochs=5")
    table = values
    for depth, part in enumerate(path[:-1], start=1):
        inner = table.setdefault(part, {})
        if isinstance(inner, list) and depth < len(path) - 1:
            inner = _items(inner, ".".join(path[:depth]), override)
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {override}: '{part}' is a value, not a section", remedy="drop what follows it")
        table = inner
    table[path[-1]] = _value(path, text.strip())
    if path[:2] == ["train", "stages"]:
        # The recipe's own number of epochs was for its own stages.
        values["train"].pop("epochs", None)


def _items(items: list[Any], key: str, override: str) -> dict[str, Any]:
    """A list's items by number, so that one of them can be reached like a section."""
    numbered = {str(number): item for number, item in enumerate(items)}
    number = override.removeprefix(f"{key}.").partition(".")[0]
    if number not in numbered:
        raise RecipeError(
            f"--set {override}: there is no {key}.{number}", remedy=f"{key} has {len(items)} items, counted from 0"
        )
    return numbered


def _value(path: list[str], text: str) -> object:
    """As TOML would read it; where the recipe wants text, `1.10` and `2024` stay text."""
    try:
        value: object = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if _wants_text(path) and not isinstance(value, str) else value


def _wants_text(path: list[str]) -> bool:
    kind: Any = Recipe
    for part in path:
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)) or part not in kind.model_fields:
            return False
        kind = kind.model_fields[part].annotation
    return kind is str or set(get_args(kind)) == {str, type(None)}


def _keys(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterable[str]:
    """Every key of a recipe; N stands for an item's number."""
    for name, field in section.model_fields.items():
        yield prefix + name
        inner, number = field.annotation, ""
        if get_origin(inner) is tuple:
            inner, number = get_args(inner)[0], "N."
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _keys(inner, f"{prefix}{name}.{number}")


def _explain(error: ValidationError) -> list[str]:
    """One line per key; the arms of a union are joined by "or"."""
    known = list(_keys())
    lines: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False):
        parts = [str(part) for part in problem["loc"]]
        key = ".".join(parts)
        if problem["type"] == "extra_forbidden":
            lines[f"unknown key '{key}'{_suggest(key, known)}"] = []
            continue
        while key and _unnumbered(key) not in known:
            key = key.rpartition(".")[0]
        text = problem["msg"].removeprefix("Value error, ")
        whole = problem["type"] == "missing" or isinstance(problem["input"], dict)
        lines.setdefault(key, []).append(text if whole else f"{text} (got {problem['input']!r})")
        if not key:
            lines[text] = lines.pop(key)[:0]
    return [f"{key}: {' or '.join(texts)}" if texts else key for key, texts in lines.items()]


def _unnumbered(key: str) -> str:
    return ".".join("N" if part.isdigit() else part for part in key.split("."))


def _suggest(key: str, known: list[str]) -> str:
    section, _, word = key.rpartition(".")
    beside = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == _unnumbered(section)]
    near = closest(word, beside)
    if near:
        return near.replace("'", f"'{section}.", 1) if section else near
    elsewhere = {name.rpartition(".")[2]: name for name in reversed(known)}
    if word in elsewhere:
        return f", did you mean '{elsewhere[word]}'?"
    return f"; known here: {', '.join(beside)}" if beside else closest(key, known)


SEARCHED = ("text", "model", "train", "augment", "distil")
"""Sections that a search may vary. The data is what the variants are compared on."""


def _ranges(tables: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Nested tables as dotted keys; what holds no table is a range."""
    for name, value in tables.items():
        if isinstance(value, dict) and value and all(isinstance(inner, dict) for inner in value.values()):
            yield from _ranges(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _range(key: str, value: object) -> Range:
    """Raises ValueError naming the key: the ranges have no fixed place in a recipe to name."""
    if isinstance(value, Range):
        return value
    try:
        return Range.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, ("search", key, *problem["loc"][:1])))
        text = problem["msg"].removeprefix("Value error, ")
        if problem["type"] in ("extra_forbidden", "model_type"):
            text = f"a range is a table of {', '.join(Range.model_fields)}"
        raise ValueError(f"{where}: {text}") from None


def _check_search(recipe: Recipe, where: str) -> None:
    """Every range is of a key that may vary, and every value in it one that the recipe takes."""
    known = [key for key in _keys() if key.partition(".")[0] in SEARCHED and "." in key and ".N." not in key]
    for key, choice in recipe.search.items():
        if key not in known:
            raise RecipeError(
                f"{where}: search has no key '{key}'{_suggest(key, known)}",
                remedy=f"it varies single keys of {', '.join(SEARCHED)}",
            )
        for value in choice.extremes:
            changed(recipe, {key: value}, where=f"{where}: search {key} = {value}")


def _check_architecture(recipe: Recipe) -> None:
    # Imported here: reading a recipe's text needs no torch, checking its architecture does.
    from handlerlib import architectures

    model = recipe.model
    if recipe.of_texts or model.architecture in architectures.text_names():
        known = architectures.text_names()
        if not recipe.of_texts or model.architecture not in known:
            kind = "texts" if recipe.of_texts else "images"
            raise RecipeError(
                f"architecture '{model.architecture}' is not for {kind}{closest(model.architecture, known)}",
                remedy=f"take one of {', '.join(known)}" if recipe.of_texts else "take one such as resnet9 or resnet18",
            )
        return
    if model.architecture not in architectures.names():
        own = ", ".join(architectures.own_names())
        raise RecipeError(
            f"unknown architecture '{model.architecture}'{closest(model.architecture, architectures.names())}",
            remedy=f"take one of {own}, or a classification name of torchvision such as resnet18",
        )
