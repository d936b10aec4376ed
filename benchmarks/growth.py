"""How cost grows: with image size, batch size, workers and model size.

Sizes, batches and models are measured in the process itself with Marina's engine (`python -m benchmarks.growth ...` prints
one JSON object), workers on a server. Every point has throughput, latency and memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import load, machine, measure, photos, schedule, systems
from benchmarks.measure import Plan
from benchmarks.systems import Layout, Place, Setup

EDGES = (250, 500, 1000, 2000, 4000)
"""Longer sides of the photos, in pixels."""
BATCHES = (1, 2, 4, 8, 16, 32)
WORKERS = {"cpu": (1, 2, 3, 4), "cuda": (1, 2, 4, 8)}
MODELS = ("squeezenet1_1", "mobilenet_v3_large", "resnet18", "resnet34", "resnet50", "resnet101")
_PHOTOS = 8
_POINT_SECONDS = 120.0


def curves(place: Place, rung: str, generator: load.Generator, seconds: float) -> dict[str, list[dict[str, Any]]]:
    """All four curves."""
    from benchmarks.run import program

    def point(*arguments: object) -> dict[str, Any]:
        environment = systems.clean_environment(PYTHONPATH=systems.python_path(), **systems.worker_environment(1))
        given = [str(place.models[rung]), str(seconds), *map(str, arguments), "--device", place.device]
        found: dict[str, Any] = program("benchmarks.growth", given, environment, place.scratch, _POINT_SECONDS)
        return found

    return {
        "image": [point("image", edge) for edge in EDGES],
        "batch": [point("batch", size) for size in BATCHES],
        "model": [point("model", name) for name in MODELS],
        "workers": [_workers(place, rung, generator, count, seconds) for count in WORKERS[place.device]],
    }


def main(arguments: Sequence[str]) -> None:
    """One point in a fresh process, so that its memory is its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("curve", choices=("image", "batch", "model"))
    parser.add_argument("value")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    curves: Mapping[str, Callable[[Path, str, float, str], dict[str, Any]]] = {
        "image": _image,
        "batch": _batch,
        "model": _model,
    }
    json.dump(curves[given.curve](given.model, given.value, given.seconds, given.device), sys.stdout)


def _image(model: Path, value: str, seconds: float, device: str) -> dict[str, Any]:
    """Decode and resize of photos whose longer side is `value` pixels, one thread; the network's input stays as it is."""
    from benchmarks.pipeline import Optimised

    edge = int(value)
    bodies = [photo.data for photo in photos.resized(photos.standard()[:_PHOTOS], edge, edge * 3 // 4)]
    pipeline = Optimised.load(model, 1, device)
    found = _timed(lambda index: pipeline.answer([pipeline.decode(bodies[index % len(bodies)])]), seconds)
    decoding = _timed(lambda index: pipeline.decode(bodies[index % len(bodies)]), seconds / 2)
    mean = statistics.fmean(map(len, bodies))
    return found | {"value": edge, "bytes": round(mean), "decode_ms": decoding["p50_ms"]}


def _batch(model: Path, value: str, seconds: float, device: str) -> dict[str, Any]:
    """Photos as they are, `value` of them in one batch, one thread."""
    from benchmarks.pipeline import Optimised

    size = int(value)
    bodies = [photo.data for photo in photos.standard()[:size]]
    pipeline = Optimised.load(model, 1, device)
    pipeline.warm_up([size])
    found = _timed(lambda _: pipeline.answer([pipeline.decode(body) for body in bodies]), seconds)
    return found | {"value": size, "images_per_second": size * found["images_per_second"]}


def _model(model: Path, value: str, seconds: float, device: str) -> dict[str, Any]:
    """Another architecture in place of the artifact's, untrained, plain float32, one thread."""
    import torch

    from benchmarks.pipeline import Optimised
    from handlerlib import architectures, engines
    from handlerlib.loading import LoadedModel
    from handlerlib.spec import ModelSpec

    spec = ModelSpec.load(model)
    spec = dataclasses.replace(spec, architecture=dataclasses.replace(spec.architecture, name=value))
    network = architectures.build(spec.architecture).eval().requires_grad_(False)
    parameters = sum(tensor.numel() for tensor in network.parameters())
    there = torch.device(device)
    engines.use_float32(there)
    pipeline = Optimised(LoadedModel(spec, engines.plain_engine(network.to(there), spec, there), there), 1)
    body = photos.standard()[0].data
    pipeline.warm_up([1])
    found = _timed(lambda _: pipeline.answer([pipeline.decode(body)]), seconds)
    return found | {"value": value, "parameters": parameters}


def _workers(place: Place, rung: str, generator: load.Generator, count: int, seconds: float) -> dict[str, Any]:
    """A server with `count` workers at 32 connections."""
    batch = schedule.default_layout(machine.cores(), place.device).batch
    layout = Layout(workers=count, threads=max(1, machine.cores() // count), batch=batch)
    launch = systems.launch(Setup("marina", "marina", rung), layout, place)
    bodies = [photo.data for photo in photos.standard()]
    with tempfile.TemporaryDirectory(prefix="marina-bench-") as scratch:
        plan = Plan((1, 32), max(2.0, seconds), max(2.0, seconds), warm_up_connections=8)
        found = measure.visit(launch, bodies, plan, generator, Path(scratch) / "server.log")
    lone, busy = found.rows
    return {
        "value": count,
        "images_per_second": busy.requests_per_second,
        "p50_ms": lone.p50_ms,
        "p50_busy_ms": busy.p50_ms,
        "memory_mib": busy.pss_mib,
        "ready_seconds": found.ready_seconds,
    }


def _timed(work: Callable[[int], object], seconds: float) -> dict[str, Any]:
    """Calls per second, the median time of one, and the largest memory that this process ever had."""
    work(0)
    times: list[float] = []
    ends = time.perf_counter() + seconds
    while not times or time.perf_counter() < ends:
        began = time.perf_counter()
        work(len(times))
        times.append(time.perf_counter() - began)
    return {
        "images_per_second": len(times) / sum(times),
        "p50_ms": 1e3 * statistics.median(times),
        "memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
