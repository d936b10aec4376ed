"""A folder with spec, weights and perhaps an engine -> what answers, proved against its golden samples and warmed up.

The engine that an artifact brings (`engine.json`) is used where machine and packages are those that it was built for.
Whatever stands against it, the plain weights answer instead, and one line of the log and a metric say so.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from handlerlib import architectures, engine_spec, engines, inputs, stored
from handlerlib.calibration import soften
from handlerlib.engine_spec import EngineSpec, Obstacle, Reason
from handlerlib.engines import Engine, PlainEngine
from handlerlib.errors import MarinaError, SpecError
from handlerlib.spec import SPEC_FILE, WEIGHTS_FILE, Golden, ModelSpec

__all__ = ["Engine", "LoadedModel", "PlainEngine", "SelfTestFailed", "Serving", "load", "self_test", "warm_up"]

logger = logging.getLogger(__name__)

WARM_UP_SECONDS = 20.0
"""Budget of the warm-up; the sizes that did not fit into it are named in the log."""
PLAIN = "plain"
"""Name of the engine that every artifact has: eager float32 torch."""
ENGINE_SWITCH = "MARINA_ENGINE"
"""`auto` (also when unset): the packed engine where it fits; `plain`: never."""


class SelfTestFailed(MarinaError):
    """The model in this process does not give the answers that it gave when it was exported."""

    exit_code = 5


class BadSwitch(MarinaError):
    """MARINA_ENGINE holds something else than auto or plain."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Serving:
    """Which engine answers, and why not the packed one when it does not."""

    engine: str = PLAIN
    """The rung's name, e.g. `openvino-int8`, or `plain`."""
    tolerance: float | None = None
    """Of the engine against the golden probabilities; None: the spec's own."""
    packed: str | None = None
    """The rung that the artifact brings; None when it brings none."""
    fallback: Reason | None = None
    """Why the plain weights answer instead of `packed`; None when they do not."""
    detail: str = ""
    """The same as a sentence."""
    own_answers: tuple[tuple[float, ...], ...] = ()
    """Of `engine`, per golden sample, when it was judged; empty when they were not kept."""


@dataclass(slots=True)
class LoadedModel:
    """A model ready to answer, with its spec and the device it lives on.

    The engine may change once, in `self_test`: call `probabilities` and keep no reference to `engine`.
    """

    spec: ModelSpec
    engine: Engine
    device: torch.device
    serving: Serving = Serving()

    def probabilities(self, x_BCHW: Tensor, threads: int = 0) -> Tensor:
        """uint8 `[B, C, height, width]` -> probabilities, float32 `[B, classes]` on the CPU; 0 threads: as they are. A
        regression gives values, float32 `[B, targets]`.

        The only place where the spec's temperature comes in: engines know nothing of it.
        """
        return soften(self.engine(x_BCHW, threads or torch.get_num_threads()), self.spec.temperature)


def load(folder: Path, device: torch.device) -> LoadedModel:
    """Read spec, and engine or weights (safetensors only), from `folder`.

    Raises SpecError when the spec is wrong or the weights do not belong to its architecture, and BadSwitch.
    """
    switch = _switch()
    engines.use_float32(device)
    spec = ModelSpec.load(folder)
    try:
        engine = EngineSpec.load(folder)
    except SpecError as error:
        return _plain(spec, folder, device, "unreadable", Obstacle("spec", str(error)))
    if engine is None:
        return _plain(spec, folder, device)
    against = (
        Obstacle("switched-off", f"{ENGINE_SWITCH} is {PLAIN}") if switch == PLAIN else _against(engine, folder, device)
    )
    if against is not None:
        return _plain(spec, folder, device, engine.rung, against)
    try:
        opened = engines.open_engine(engine, folder, spec, device, lambda: read_network(folder, spec))
    except Exception as error:  # noqa: BLE001 - runtimes raise anything; the plain weights can always answer
        return _plain(spec, folder, device, engine.rung, Obstacle("load", f"{type(error).__name__}: {error}"))
    serving = Serving(
        engine=engine.rung, tolerance=engine.tolerance, packed=engine.rung, own_answers=engine.own_answers
    )
    return LoadedModel(spec, opened, device, serving)


def read_network(folder: Path, spec: ModelSpec) -> nn.Module:
    """The plain network of `folder`, on the CPU, in eval mode and without gradients. Raises SpecError."""
    return _assemble(spec, _read_weights(folder / WEIGHTS_FILE)).eval().requires_grad_(False)


def self_test(
    model: LoadedModel,
    answer: Callable[[bytes], Tensor],
    folder: Path,
    *,
    batch: int = 1,
    prepare: Callable[[], object] = lambda: None,
) -> float:
    """Run every golden sample through `answer` (encoded bytes -> probabilities `[classes]`), which asks `model`.

    An engine must also answer them in batches of `batch`, stay near its own answers where `engine.json` holds them, and
    get through `prepare`, which warms up what was proved. One that fails at any of it is replaced by the plain weights,
    which are then tested with the spec's tolerance and prepared. Returns the largest difference from the golden samples.
    Raises SelfTestFailed naming the sample, what was expected and what came, and for the plain weights what `prepare`
    raises.
    """
    serving, golden = model.serving, model.spec.golden
    if serving.engine != PLAIN:
        try:
            worst = _prove_engine(model, answer, folder, batch)
            prepare()
        except Exception as error:  # noqa: BLE001 - as in `load`
            _fall_back(
                model, folder, str(error) if isinstance(error, MarinaError) else f"{type(error).__name__}: {error}"
            )
        else:
            logger.info("%s %s is served by its engine %s", model.spec.name, model.spec.version, serving.engine)
            return worst
    worst = _largest_difference(model.spec, _alone(golden, answer, folder), golden)
    prepare()
    return worst


def warm_up(
    model: LoadedModel, sizes: Iterable[int], budget: float = WARM_UP_SECONDS, threads: Sequence[int] = (0,)
) -> tuple[int, ...]:
    """One forward pass of an empty batch per size and number of threads, in order, until `budget` seconds are spent.

    Kernels and buffers are chosen per shape, so the first request of a size would otherwise pay for it. Returns the
    sizes that were run.
    """
    shape = model.spec.architecture
    deadline = time.monotonic() + budget
    done: list[int] = []
    pending = list(sizes)
    for size in pending:
        if time.monotonic() > deadline:
            logger.warning("warm-up stopped after %.0f s, batch sizes not run: %s", budget, pending[len(done) :])
            break
        # In memory as `imaging.stack` lays a batch out: kernels are chosen by that too.
        x_BCHW = torch.zeros(size, shape.height, shape.width, shape.channels, dtype=torch.uint8).permute(0, 3, 1, 2)
        for count in threads:
            model.probabilities(x_BCHW, count)
        done.append(size)
    return tuple(done)


def _switch() -> str:
    given = os.environ.get(ENGINE_SWITCH, "auto")
    if given not in ("auto", PLAIN):
        raise BadSwitch(f"{ENGINE_SWITCH} is '{given}'", remedy=f"set it to auto or {PLAIN}, or unset it")
    return given


def _against(engine: EngineSpec, folder: Path, device: torch.device) -> Obstacle | None:
    found = engine_spec.obstacle(engine, device.type)
    wanted = engine.built_for.gpu_capability
    if found is None and wanted is not None:
        here = ".".join(map(str, torch.cuda.get_device_capability(device)))
        if here != wanted:
            found = Obstacle("gpu-capability", f"it was built for compute capability {wanted} and this GPU has {here}")
    return found or engine_spec.files_obstacle(engine, folder)


def _plain(
    spec: ModelSpec, folder: Path, device: torch.device, packed: str | None = None, against: Obstacle | None = None
) -> LoadedModel:
    plain = engines.plain_engine(read_network(folder, spec).to(device), spec, device)
    if against is None:
        return LoadedModel(spec, plain, device)
    level = logging.INFO if against.reason == "switched-off" else logging.WARNING
    logger.log(
        level, "%s %s: the plain weights answer instead of the engine %s: %s (%s)",
        spec.name, spec.version, packed, against.detail, against.reason,
    )  # fmt: skip
    return LoadedModel(spec, plain, device, Serving(packed=packed, fallback=against.reason, detail=against.detail))


def _fall_back(model: LoadedModel, folder: Path, detail: str) -> None:
    against = Obstacle("self-test", detail)
    plain = _plain(model.spec, folder, model.device, model.serving.packed, against)
    model.engine, model.serving = plain.engine, plain.serving


def _prove_engine(model: LoadedModel, answer: Callable[[bytes], Tensor], folder: Path, batch: int) -> float:
    """Alone and in a batch, against the plain weights' golden answers and against its own."""
    spec, serving = model.spec, model.serving
    answers = _alone(spec.golden, answer, folder)
    if batch > 1:
        answers = itertools.chain(answers, _together(model, folder, batch))
    rows = list(answers)
    golden = dataclasses.replace(spec.golden, tolerance=serving.tolerance or spec.golden.tolerance)
    worst = _largest_difference(spec, rows, golden)
    own = engine_spec.own_golden(spec.golden, serving.own_answers)
    if own is not None:
        _largest_difference(spec, rows, own, "of the engine's own answers, ")
    elif golden.tolerance > engine_spec.OWN_TOLERANCE:
        logger.info(
            "%s %s: the engine %s brings no answers of its own, and is held to %g of the plain weights' alone",
            spec.name, spec.version, serving.engine, golden.tolerance,
        )  # fmt: skip
    return worst


def _alone(golden: Golden, answer: Callable[[bytes], Tensor], folder: Path) -> Iterator[tuple[int, Tensor]]:
    """Number of the sample and its answer, one at a time."""
    for index, sample in enumerate(golden.samples):
        yield index, answer(_read_golden(folder / sample.file, sample.file))


def _together(model: LoadedModel, folder: Path, batch: int) -> Iterator[tuple[int, Tensor]]:
    """The same from whole batches, in which samples come again until each is full."""
    samples, reading = model.spec.golden.samples, inputs.of(model.spec)
    items = [reading.load(_read_golden(folder / sample.file, sample.file)) for sample in samples]
    for start in range(0, len(items), batch):
        indices = [index % len(items) for index in range(start, start + batch)]
        yield from zip(indices, model.probabilities(reading.stack([items[index] for index in indices])), strict=True)


def _largest_difference(
    spec: ModelSpec, answers: Iterable[tuple[int, Tensor]], golden: Golden, which: str = ""
) -> float:
    worst = 0.0
    what = "value" if spec.task == "regression" else "probability"
    units, tolerance = torch.tensor(spec.units), golden.tolerance
    for number, got in answers:
        sample = golden.samples[number]
        expected = torch.tensor(sample.outputs)
        difference = (got - expected).abs() / units
        index = int(difference.argmax())
        # Written so that a NaN fails too.
        if not float(difference.max()) <= tolerance:
            label = spec.labels[index]
            raise SelfTestFailed(
                f"golden sample {sample.file}: {which}{what} of '{label}' expected {float(expected[index]):.6f}, "
                f"got {float(got[index]):.6f}, tolerance {tolerance:g}",
                remedy="serve with the torch version and device that the archive was built for, or export and pack again",
            )
        worst = max(worst, float(difference.max()))
    return worst


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return stored.widen(safetensors.torch.load_file(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise SpecError(f"{path.name} cannot be read: {error}", remedy="export and pack the model again") from error


def _assemble(spec: ModelSpec, weights: dict[str, Tensor]) -> nn.Module:
    # On the meta device building costs no memory and no random numbers: the weights are assigned, not copied.
    with torch.device("meta"):
        network = architectures.build(spec.architecture)
    try:
        architectures.load_weights(network, weights, assign=True)
    except RuntimeError as error:
        raise SpecError(
            f"{WEIGHTS_FILE} does not fit architecture '{spec.architecture.name}' of {SPEC_FILE}: {error}",
            remedy="spec and weights must come from the same export",
        ) from error
    if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
        # Buffers that are no part of the state dict exist only after a real construction.
        network = architectures.build(spec.architecture)
        architectures.load_weights(network, weights)
    return network


def _read_golden(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SpecError(f"golden sample {name} cannot be read: {error}", remedy="pack the model again") from error
