"""Bounds in deploy.toml and serving.json: what is refused, what counts as different, and who waits for whom."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
import threading
from pathlib import Path

import pytest

from marina import plan, rollout, serving
from marina.autoscale import Autoscale
from marina.client import HOLDING, ModelStatus, WorkerStatus
from marina.errors import ConfigError
from marina.server import ServedModel, Server
from marina.serving import ModelServing, NotServed, Serving
from marina.settings import ServeSettings

GOOD = """
[models.digits]
default = "2.0"
versions = { "1.0" = 1, "2.0" = 2 }
autoscale = { min = 0, max = 4 }
"""
BOUNDS = Autoscale(min=0, max=4)


def _read(tmp_path: Path, text: str) -> plan.ModelPlan:
    path = tmp_path / plan.PLAN_FILE
    path.write_text(text)
    return plan.read(path).models["digits"]


def _seen(version: str, workers: int, *, default: bool = False) -> ModelStatus:
    one = tuple(WorkerStatus(id=str(n), pid=n, ready=True, started="", gpu=False) for n in range(workers))
    return ModelStatus(
        name="digits", version=version, archive="", min_workers=workers or HOLDING, max_workers=workers, batch_size=1,
        max_batch_delay_ms=1, workers=one, pending=0, remaining_capacity=1, default=default,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message", "remedy"),
    [
        (("max = 4", "mox = 4"), "models.digits.autoscale.mox: unknown key", "did you mean 'max'?"),
        (("min = 0", "min = 5"), "models.digits.autoscale: min 5 is above max 4", ""),
        (("max = 4", "max = 1"), "version 2.0 begins with 2 workers, autoscale allows 0 to 1", ""),
        (("min = 0, ", ""), "models.digits.autoscale.min: Field required", ""),
        (
            ("[models", "[limits]\nworkers = 7\n[models"),
            "8 workers are wanted at most per replica, limits.workers is 7",
            "",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: tuple[str, str], message: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        _read(tmp_path, GOOD.replace(*change))
    assert remedy in refused.value.remedy


def test_any_number_within_the_bounds_is_as_it_is_meant(tmp_path: Path) -> None:
    digits = _read(tmp_path, GOOD)
    for workers in (0, 1, 4):
        seen = [_seen("1.0", 3), _seen("2.0", workers, default=True)]
        assert plan.differences("a", "digits", digits, seen) == []
    rows = plan.differences("a", "digits", digits, [_seen("1.0", 1), _seen("2.0", 5, default=True)])
    assert [(row.what, row.wanted, row.found) for row in rows] == [("2.0 workers", "0 to 4", "5")]
    taken_away = dataclasses.replace(_seen("2.0", 0, default=True), min_workers=0)
    assert len(plan.differences("a", "digits", digits, [_seen("1.0", 1), taken_away])) == 1, "nobody would wake it"


def test_the_numbers_that_servers_have_come_to_are_kept(tmp_path: Path) -> None:
    digits = _read(tmp_path, GOOD)
    first = plan.target(digits, None)
    assert first == ModelServing(default="2.0", versions={"1.0": 1, "2.0": 2}, autoscale=BOUNDS)
    grown = serving.adopted(Serving(models={"digits": first}), [_seen("1.0", 1), _seen("2.0", 3, default=True)])
    assert grown.models["digits"].versions == {"1.0": 1, "2.0": 3}
    assert plan.target(digits, grown.models["digits"]) == grown.models["digits"], "a second apply changes nothing"
    asleep = serving.adopted(grown, [_seen("1.0", 1), _seen("2.0", 0, default=True)])
    assert asleep == grown, "a default version that sleeps is served all the same"
    assert plan.target(digits.model_copy(update={"autoscale": None}), grown.models["digits"]).versions["2.0"] == 2


def test_bounds_reach_the_supervisor_and_come_back_from_the_file(tmp_path: Path) -> None:
    state = Serving(models={"digits": ModelServing(default="2.0", versions={"2.0": 1}, autoscale=BOUNDS)})
    serving.write(tmp_path, state)
    assert serving.read(tmp_path) == state
    assert state.with_version("digits", "3.0", 2).with_default("digits", "3.0").models["digits"].autoscale == BOUNDS
    item = ServedModel(
        name="digits", version="2.0", archive_file=tmp_path / "x.mar", default=False, config={"minWorkers": 9}
    )
    meant = serving._as_meant(item, state.models["digits"])
    assert meant.autoscale == BOUNDS and meant.default and meant.workers == meant.required == 1
    scaled = dataclasses.replace(meant, scaled=0, scaled_required=0)
    assert (scaled.workers, scaled.required) == (0, 0)


def test_a_switch_leaves_numbers_as_they_are(tmp_path: Path) -> None:
    model = ServedModel(
        name="digits", version="2.0", archive_file=tmp_path / "x.mar", default=True, config={"minWorkers": 9},
        autoscale=BOUNDS,
    )  # fmt: skip
    (bounded,) = Server([model], ServeSettings()).expected()
    assert (bounded.autoscale, bounded.workers) == (BOUNDS, 4)
    (as_it_is,) = Server([model], ServeSettings(autoscale=False)).expected()
    assert (as_it_is.autoscale, as_it_is.workers) == (None, 9)


def test_workers_of_an_autoscaled_version() -> None:
    assert rollout.has_workers(_seen("1.0", 3), 1, BOUNDS) and rollout.has_workers(_seen("1.0", 0), 1, BOUNDS)
    assert not rollout.has_workers(_seen("1.0", 5), 1, BOUNDS) and not rollout.has_workers(None, 1, BOUNDS)


def test_a_rollout_waits_for_a_server_that_scales_and_no_server_scales_during_one(tmp_path: Path) -> None:
    with serving.scaling(tmp_path) as alone:
        assert alone, "no rollout has ever been here"
    began, let_go = threading.Event(), threading.Event()

    def scale() -> None:
        with serving.scaling(tmp_path) as alone:
            assert alone
            began.set()
            let_go.wait(30)

    with serving.rollout_lock(tmp_path), serving.scaling(tmp_path) as alone:
        assert not alone
    thread = threading.Thread(target=scale)
    thread.start()
    assert began.wait(30)
    descriptor = os.open(tmp_path / serving.LOCK_FILE, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)
    threading.Timer(0.2, let_go.set).start()
    with serving.rollout_lock(tmp_path), pytest.raises(NotServed), serving.rollout_lock(tmp_path):
        pass
    thread.join()
