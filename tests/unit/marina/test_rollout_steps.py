"""The order of a rollout over several replicas, and the way back from each step that can fail. No server: a replica that
keeps a list stands for one, because what is tested is what is asked of it, and when."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from marina import serving, store
from marina.archive import Archive, sha256_of
from marina.client import ModelStatus, WorkerStatus
from marina.errors import ClientError, StoreError, Unreachable
from marina.rollout import Rollout, Step
from marina.serving import ModelServing, NotServed, Previous, Serving


@dataclass
class Listed:
    """A server in a dictionary, with a list of everything asked of it; one action can be told to fail."""

    name: str
    asked: list[str]
    default: str = "2.0"
    versions: dict[str, int] = field(default_factory=lambda: {"2.0": 1})
    fails: str = ""
    error: BaseException = field(default_factory=lambda: Unreachable("the connection broke"))

    def status(self) -> tuple[ModelStatus, ...]:
        return tuple(_status(version, count, version == self.default) for version, count in self.versions.items())

    def register(self, key: str, workers: int) -> None:
        self._note(f"register {key} {workers}")
        self.versions[key.partition(":")[2]] = workers

    def prove(self, key: str) -> None:
        self._note(f"prove {key}")

    def set_default(self, key: str) -> None:
        self._note(f"default {key}")
        self.default = key.partition(":")[2]

    def scale(self, key: str, workers: int) -> None:
        self._note(f"scale {key} {workers}")
        self.versions[key.partition(":")[2]] = workers

    def retire(self, key: str) -> None:
        self._note(f"retire {key}")
        self.versions.pop(key.partition(":")[2], None)

    def drain(self) -> None:
        self._note("drain")

    def _note(self, what: str) -> None:
        self.asked.append(f"{self.name} {what}")
        if self.fails and what.startswith(self.fails):
            self.fails = ""
            raise self.error


def _status(version: str, workers: int, default: bool) -> ModelStatus:
    worker = WorkerStatus(id="9000", pid=1, ready=True, started="", gpu=False)
    return ModelStatus(
        name="m", version=version, archive=f"m-{version}.mar", min_workers=workers, max_workers=workers, batch_size=1,
        max_batch_delay_ms=1, workers=(worker,) * workers, pending=0, remaining_capacity=1, default=default,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with two versions; 2.0 is served, 1.0 was before it with three workers."""
    for version in ("1.0", "2.0"):
        path = tmp_path / f"m-{version}.mar"
        path.write_text(version)
        store.publish(tmp_path, Archive(path, "m", version, sha256_of(path), 3))
    model = ModelServing(default="2.0", versions={"2.0": 1}, previous=Previous(version="1.0", workers=3))
    serving.write(tmp_path, Serving(models={"m": model}))
    return tmp_path


@pytest.fixture
def asked() -> list[str]:
    return []


@pytest.fixture
def replicas(asked: list[str]) -> list[Listed]:
    return [Listed("a", asked), Listed("b", asked)]


def _rollout(replicas: list[Listed], folder: Path) -> Rollout:
    return Rollout(replicas, folder, python="python3")


def test_all_hold_and_proved_it_before_one_switches_and_all_switched_before_one_retires(
    replicas: list[Listed], folder: Path, asked: list[str]
) -> None:
    outcome = _rollout(replicas, folder).rollback("m")
    assert asked == [
        "a register m:1.0 3", "a prove m:1.0", "b register m:1.0 3", "b prove m:1.0",
        "a default m:1.0", "b default m:1.0", "a retire m:2.0", "b retire m:2.0",
    ]  # fmt: skip
    assert (outcome.default, outcome.previous, outcome.versions) == ("1.0", "2.0", {"1.0": 3})
    assert serving.read(folder) == Serving(
        models={"m": ModelServing(default="1.0", versions={"1.0": 3}, previous=Previous(version="2.0", workers=1))}
    )


def test_kept_means_not_retired(replicas: list[Listed], folder: Path, asked: list[str]) -> None:
    outcome = _rollout(replicas, folder).rollback("m", keep=True)
    assert not any("retire" in line for line in asked)
    assert outcome.versions == {"2.0": 1, "1.0": 3}


@pytest.mark.parametrize("fails", ["register", "prove", "default m:1.0"])
@pytest.mark.parametrize("replica", [0, 1])
def test_a_failed_step_leaves_everything_as_before(
    replicas: list[Listed], folder: Path, fails: str, replica: int
) -> None:
    before = serving.read(folder)
    replicas[replica].fails = fails
    with pytest.raises(Unreachable, match=r"the connection broke \(reverted, m 2.0 is served as before\)"):
        _rollout(replicas, folder).rollback("m")
    assert [(item.default, item.versions) for item in replicas] == [("2.0", {"2.0": 1})] * 2
    assert serving.read(folder) == before


def test_a_way_back_that_fails_too_is_said_and_does_not_stop_the_others(
    replicas: list[Listed], folder: Path, asked: list[str]
) -> None:
    class Stuck(Listed):
        def retire(self, key: str) -> None:
            raise ClientError("it hangs")

    stuck = Stuck("b", asked, fails="prove")
    with pytest.raises(Unreachable, match=r"could not be reverted: revert: unregister m:1.0 b: it hangs"):
        _rollout([replicas[0], stuck], folder).rollback("m")
    assert replicas[0].versions == {"2.0": 1}


def test_an_interruption_is_reverted_and_said(replicas: list[Listed], folder: Path) -> None:
    told: list[Step] = []
    replicas[1].fails, replicas[1].error = "prove", KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        Rollout(replicas, folder, python="python3", report=told.append).rollback("m")
    assert told[-1].what == "interrupted; reverted, m 2.0 is served as before"
    assert replicas[0].versions == replicas[1].versions == {"2.0": 1}


def test_scaling_up_promises_after_and_down_before(replicas: list[Listed], folder: Path) -> None:
    promised: list[int] = []

    class Looking(Listed):
        def scale(self, key: str, workers: int) -> None:
            found = serving.read(folder)
            assert found is not None
            promised.append(found.models["m"].versions["2.0"])
            super().scale(key, workers)

    rollout = _rollout([Looking("a", [])], folder)
    assert rollout.scale("m", 3).versions == {"2.0": 3}
    assert rollout.scale("m", 2).versions == {"2.0": 2}
    assert promised == [1, 2]


def test_a_failed_scaling_goes_back_everywhere(replicas: list[Listed], folder: Path) -> None:
    replicas[1].fails = "scale"
    with pytest.raises(Unreachable, match="has 1 workers as before"):
        _rollout(replicas, folder).scale("m", 4)
    assert [item.versions for item in replicas] == [{"2.0": 1}] * 2


def test_what_cannot_be_done_touches_nothing(replicas: list[Listed], folder: Path, asked: list[str]) -> None:
    rollout = _rollout(replicas, folder)
    with pytest.raises(NotServed, match=r"m 2\.0 is the default version"):
        rollout.retire("m", "2.0")
    with pytest.raises(NotServed, match=r"m 1\.0 is not served; served: 2\.0"):
        rollout.retire("m", "1.0")
    with pytest.raises(NotServed, match="model 'x' is not served; served: m"):
        rollout.scale("x", 2)
    with pytest.raises(NotServed, match="m 9 is not served"):
        rollout.scale("m", 2, "9")
    (folder / "m-1.0.mar").unlink()
    with pytest.raises(StoreError, match=r"'m:1\.0' is not in"):
        rollout.rollback("m")
    assert asked == []


def test_without_a_previous_version_there_is_no_way_back(replicas: list[Listed], folder: Path) -> None:
    serving.write(folder, Serving())
    with pytest.raises(NotServed, match=r"m 2\.0 has no version before it"):
        _rollout(replicas, folder).rollback("m")


def test_one_rollout_at_a_time(replicas: list[Listed], folder: Path) -> None:
    with serving.rollout_lock(folder), pytest.raises(NotServed, match="another rollout"):
        _rollout(replicas, folder).rollback("m")
    assert _rollout(replicas, folder).rollback("m").default == "1.0"


def test_no_replica_is_an_error(folder: Path) -> None:
    with pytest.raises(NotServed, match="no server"):
        _rollout([], folder)
