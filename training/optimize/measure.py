"""How long an engine takes per image, measured in turns with the reference so that both see the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from handlerlib import cores
from handlerlib.engine_spec import Measurement
from handlerlib.engines import Engine
from handlerlib.spec import Architecture, ModelSpec

_FEWEST_TURNS = 3


def loads(at_once: int) -> tuple[tuple[int, int], ...]:
    """(batch, threads) that a worker will see: a lone request on all cores; queues of 4, 8 and as many images as it takes
    `at_once` on one."""
    batches = [batch for batch in (1, 4, 8) if batch < at_once] + [at_once]
    return tuple(dict.fromkeys([(1, cores.usable()), *((batch, 1) for batch in batches)]))


def times(
    engine: Engine, reference: Engine, spec: ModelSpec, pairs: Sequence[tuple[int, int]], *, seconds: float
) -> tuple[Measurement, ...]:
    """One measurement per (batch, threads), each in about `seconds`, three turns at least, on random pixels.

    A turn is a few calls of the engine, then of the reference; the figure is the median over turns of the mean call.
    """
    return tuple(_measure(engine, reference, spec, batch, threads, seconds) for batch, threads in pairs)


def _measure(
    engine: Engine, reference: Engine, spec: ModelSpec, batch: int, threads: int, seconds: float
) -> Measurement:
    x_BCHW = pixels(spec.architecture, batch)
    sides = (engine, reference)
    took: tuple[list[float], list[float]] = ([], [])
    calls = []
    for side in sides:
        side(x_BCHW, threads)  # the first call of a shape pays for what later ones reuse
        once = _seconds_per_call(side, x_BCHW, threads, 1)
        calls.append(max(1, round(seconds / 12 / max(once, 1e-6))))
    deadline = time.perf_counter() + seconds
    while len(took[0]) < _FEWEST_TURNS or time.perf_counter() < deadline:
        for side, count, seen in zip(sides, calls, took, strict=True):
            seen.append(_seconds_per_call(side, x_BCHW, threads, count))
    mine, theirs = (round(statistics.median(seen) / batch * 1e3, 4) for seen in took)
    return Measurement(batch=batch, threads=threads, milliseconds=mine, reference_milliseconds=theirs)


def pixels(shape: Architecture, batch: int) -> Tensor:
    """uint8 `[batch, C, H, W]`, random and always the same, laid out as decoders leave them: channels side by side."""
    draw = torch.Generator().manual_seed(0)
    x_BHWC = torch.randint(
        0, 256, (batch, shape.height, shape.width, shape.channels), dtype=torch.uint8, generator=draw
    )
    return x_BHWC.permute(0, 3, 1, 2)


def _seconds_per_call(engine: Engine, x_BCHW: Tensor, threads: int, calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        engine(x_BCHW, threads)
    return (time.perf_counter() - started) / calls
