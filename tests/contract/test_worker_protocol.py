"""The fast protocol inside TorchServe's real worker program, beside the same program without it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from benchmarks.worker_protocol import Worker, batch_message

FRAMES = [
    batch_message([b"one"]),
    batch_message([os.urandom(784)] * 16),
    batch_message([os.urandom(size) for size in (0, 1, 300_000, 116_000, 5)]),
]


def test_the_worker_answers_the_same_bytes_and_prints_less(tmp_path: Path) -> None:
    answers: dict[str, list[bytes]] = {}
    printed: dict[str, str] = {}
    for name in ("stock", "ours"):
        worker = Worker(tmp_path / name, fast=name == "ours")
        lengths = [worker.length_of_answer(frame) for frame in FRAMES]
        answers[name] = [worker.ask(frame, length) for frame, length in zip(FRAMES, lengths, strict=True)]
        assert worker.close() == 0  # java going away is the end of a worker, not a failure
        printed[name] = worker.log.read_text()
    assert answers["ours"] == answers["stock"]
    assert "Frontend disconnected" in printed["ours"]
    for per_batch in ("Backend received inference at", "PredictionTime"):
        assert len(re.findall(per_batch, printed["stock"])) == 2 * len(FRAMES)
        assert per_batch not in printed["ours"]
