"""What the machine can do without any server: decode, resize, batch, engine and JSON of Marina's own code in a loop.

`python -m benchmarks.inprocess limit|lone|answers MODEL PHOTOS ...` prints one JSON object. `limit`: several processes,
each with its threads and its share of the photos, images per second together. `lone`: one image after the other on all
cores, the time of each. `answers`: the five most probable labels of every photo.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from queue import Queue
from typing import Any

import torch

from benchmarks.pipeline import Documented, Optimised

_JOIN_SECONDS = 120.0


def main(arguments: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("limit", "lone", "answers"))
    parser.add_argument("model", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--documented", action="store_true")
    given = parser.parse_args(arguments)
    photos = [path.read_bytes() for path in sorted(given.photos.iterdir())]
    if given.what == "limit":
        found: Any = limit(given.model, photos, given.workers, given.threads, given.batch, given.seconds, given.device)
    elif given.what == "lone":
        found = lone(given.model, photos, given.threads, given.seconds, given.device)
    else:
        found = answers(given.model, photos, documented=given.documented, device=given.device)
    json.dump(found, sys.stdout)


def limit(
    model: Path, photos: list[bytes], workers: int, threads: int, batch: int, seconds: float, device: str = "cpu"
) -> dict[str, float]:
    """Images per second of `workers` processes together, and CPU milliseconds per image."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(workers), context.Queue()
    started = [
        context.Process(
            target=_work,
            args=(model, photos[index::workers] or photos, threads, batch, seconds, device, barrier, results),
            daemon=True,
        )
        for index in range(workers)
    ]
    for process in started:
        process.start()
    found = [results.get(timeout=seconds + _JOIN_SECONDS) for _ in started]
    for process in started:
        process.join(_JOIN_SECONDS)
    images = sum(count for count, _, _ in found)
    return {
        "images_per_second": sum(count / took for count, took, _ in found),
        "cpu_ms_per_image": 1e3 * sum(cpu for _, _, cpu in found) / images,
        "images": images,
        "seconds": max(took for _, took, _ in found),
    }


def lone(model: Path, photos: list[bytes], threads: int, seconds: float, device: str = "cpu") -> dict[str, float]:
    """One image after the other, from its bytes to the answer's JSON, on `threads` threads (0: all cores)."""
    pipeline = Optimised.load(model, threads, device)
    pipeline.warm_up([1] * 5)
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    for photo in itertools.cycle(photos):
        began = time.perf_counter()
        pipeline.answer([pipeline.decode(photo)])
        ended = time.perf_counter()
        times.append(ended - began)
        if ended >= deadline:
            break
    return {
        "p50_ms": 1e3 * statistics.median(times),
        "mean_ms": 1e3 * statistics.fmean(times),
        "images": len(times),
        "threads": pipeline.threads,
    }


def answers(
    model: Path, photos: list[bytes], *, documented: bool = False, device: str = "cpu"
) -> list[dict[str, float]]:
    """One answer per photo, alone in its batch."""
    pipeline = Documented(model, device) if documented else Optimised.load(model, device=device)
    return [pipeline.classify([pipeline.decode(photo)])[0] for photo in photos]


def _work(
    model: Path,
    photos: list[bytes],
    threads: int,
    batch: int,
    seconds: float,
    device: str,
    barrier: Barrier,
    results: Queue[tuple[int, float, float]],
) -> None:
    torch.set_num_threads(max(1, threads))
    pipeline = Optimised.load(model, threads, device)
    pipeline.warm_up([batch, batch])
    source = itertools.cycle(photos)
    for _ in range(2):
        pipeline.answer([pipeline.decode(next(source)) for _ in range(batch)])
    barrier.wait(_JOIN_SECONDS)
    count, began, cpu = 0, time.perf_counter(), time.process_time()
    while (ended := time.perf_counter()) - began < seconds:
        pipeline.answer([pipeline.decode(next(source)) for _ in range(batch)])
        count += batch
    results.put((count, ended - began, time.process_time() - cpu))


if __name__ == "__main__":
    main(sys.argv[1:])
