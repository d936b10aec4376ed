"""Processes that publish runs of one name at the same time."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.synchronize
import shutil
from pathlib import Path

from support.artifacts import write_artifact
from training import export

RUNS = 4


def _finished(like: Path, number: int) -> Path:
    """A run folder that differs from the others in its name."""
    run = like.with_name(f"run-{number}")
    shutil.copytree(like, run)
    figures = ("best_epoch", "test_accuracy", "test_macro_precision", "test_macro_recall", "test_macro_f1", "test_loss")
    metrics = dict.fromkeys(figures, 1.0) | {"per_class": [], "confusion_matrix": []}
    (run / export.METRICS_FILE).write_text(json.dumps(metrics))
    came_from = export.Provenance(
        recipe={"data": {"source": "folder"}, "seed": 0},
        run=f"run-{number}",
        data_digest="0" * 64,
        git_revision="unknown",
        versions=export.versions(),
        splits={"train": 1, "validation": 1, "test": 1},
    )
    (run / export.PROVENANCE_FILE).write_text(came_from.to_json())
    return run


def _publish(barrier: multiprocessing.synchronize.Barrier, run: Path, artifacts: Path) -> None:
    barrier.wait(60)
    export.publish(run, artifacts, "auto")


def test_each_gets_a_version_of_its_own(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")  # to import torch in each takes longer than the test
    barrier = fork.Barrier(RUNS)
    like = write_artifact(tmp_path)
    runs = [_finished(like, number) for number in range(RUNS)]
    workers = [fork.Process(target=_publish, args=(barrier, run, tmp_path / "artifacts"), daemon=True) for run in runs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    published = sorted((tmp_path / "artifacts" / "tiny").iterdir())
    assert [path.name for path in published] == [f"1.{number}" for number in range(RUNS)]
    assert {json.loads((path / export.PROVENANCE_FILE).read_text())["run"] for path in published} == {
        f"run-{number}" for number in range(RUNS)
    }
