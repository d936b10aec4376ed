"""The order of a rollout over several replicas, and the way back from each step that can fail. No server: a replica that
keeps a list stands for one, because what is tested is what is asked of it, and when."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from marina import canary, journal, rollout, serving, store
from marina.archive import Archive, sha256_of
from marina.client import ModelStatus, WorkerStatus
from marina.errors import ClientError, StoreError, Unreachable
from marina.gates import Arm, GateFailed
from marina.journal import Journal
from marina.processes import interruptible
from marina.rollout import Rollout, Step
from marina.serving import ModelServing, NotServed, Previous, Serving
from marina.shadow import Shadow


@dataclass
class Listed:
    """A server in a dictionary, with a list of everything asked of it; one action can be told to fail."""

    name: str
    asked: list[str]
    default: str = "2.0"
    versions: dict[str, int] = field(default_factory=lambda: {"2.0": 1})
    batches: dict[str, int] = field(default_factory=dict)
    """Version -> batch size, where it is not 1."""
    alike: int = 30
    """Of 30 inputs in a shadow."""
    fails: str = ""
    error: BaseException = field(default_factory=lambda: Unreachable("the connection broke"))

    def status(self) -> tuple[ModelStatus, ...]:
        return tuple(
            dataclasses.replace(
                _status(version, count, version == self.default), batch_size=self.batches.get(version, 1)
            )
            for version, count in self.versions.items()
        )

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
        version = key.partition(":")[2]
        assert version != self.default or len(self.versions) == 1, "TorchServe refuses to let the default go first"
        self.versions.pop(version, None)

    def shadow(self, name: str, old: str, new: str, recorded: Sequence[bytes], sample_seconds: float) -> Shadow:
        self._note(f"shadow {name} {old} {new}")
        arm = Arm(answers=30, errors=0, latencies_ms=(5.0,) * 30)
        return Shadow(old=arm, new=arm, alike=self.alike, compared=30, golden=30, recorded=0, live=0)

    def drained(self, key: str) -> bool:
        self._note(f"drained {key}")
        return True

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
    outcome = _rollout(replicas, folder).rollback("m", retire=True)
    assert asked == [
        "a register m:1.0 3", "a prove m:1.0", "b register m:1.0 3", "b prove m:1.0",
        "a default m:1.0", "b default m:1.0", "a drained m:2.0", "b drained m:2.0", "a retire m:2.0", "b retire m:2.0",
    ]  # fmt: skip
    assert (outcome.default, outcome.previous, outcome.versions) == ("1.0", "2.0", {"1.0": 3})
    assert serving.read(folder) == Serving(
        models={"m": ModelServing(default="1.0", versions={"1.0": 3}, previous=Previous(version="2.0", workers=1))}
    )


def test_the_version_that_is_left_is_kept(replicas: list[Listed], folder: Path, asked: list[str]) -> None:
    outcome = _rollout(replicas, folder).rollback("m")
    assert not any("retire" in line for line in asked)
    assert outcome.versions == {"2.0": 1, "1.0": 3}


@pytest.fixture
def deployable(folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive of version 3.0 outside the store, which counts as verified."""
    path = tmp_path_factory.mktemp("outside") / "m-3.0.mar"
    path.write_text("3.0")
    verified = Archive(path, "m", "3.0", sha256_of(path), 3)
    monkeypatch.setattr(Rollout, "_verify", lambda self, given: verified)
    return path


def test_a_deploy_tries_before_it_switches_and_keeps_one_version(
    replicas: list[Listed], folder: Path, asked: list[str], deployable: Path
) -> None:
    for item in replicas:
        item.versions["1.0"] = 3  # kept since the deploy of 2.0
    outcome = _rollout(replicas, folder).deploy(deployable)
    assert asked == [
        "a register m:3.0 1", "a prove m:3.0", "b register m:3.0 1", "b prove m:3.0", "a shadow m 2.0 3.0",
        "a default m:3.0", "b default m:3.0", "a drained m:2.0", "b drained m:2.0", "a retire m:1.0", "b retire m:1.0",
    ]  # fmt: skip
    assert (outcome.default, outcome.previous, outcome.versions) == ("3.0", "2.0", {"2.0": 1, "3.0": 1})
    assert _rollout(replicas, folder).rollback("m").default == "2.0"


def test_a_deploy_can_retire_what_it_replaces_and_keep_what_it_is_told_to(
    replicas: list[Listed], folder: Path, deployable: Path
) -> None:
    for item in replicas:
        item.versions["1.0"] = 3
    outcome = _rollout(replicas, folder).deploy(deployable, retire=True, keep=["1.0"])
    assert outcome.versions == {"1.0": 3, "3.0": 1}


def test_a_failed_gate_reverts_and_says_which_and_by_how_much(
    replicas: list[Listed], folder: Path, deployable: Path
) -> None:
    before = serving.read(folder)
    replicas[0].alike = 11
    rollout = _rollout(replicas, folder)
    with pytest.raises(GateFailed) as failed:
        rollout.deploy(deployable)
    assert "m 3.0 failed the gate 'agreement' at shadow: 11 of 30 inputs got the old version's answer" in str(
        failed.value
    )
    assert "(36.7%), at least 80.0% must (reverted, m 2.0 is served as before)" in str(failed.value)
    assert [item.versions for item in replicas] == [{"2.0": 1}] * 2 and serving.read(folder) == before
    assert not (folder / "m-3.0.mar").exists()
    assert [item.key for item in store.archives(folder)] == ["m:1.0", "m:2.0"]
    assert set(store.read_index(folder)["archives"]) == {"m-1.0.mar", "m-2.0.mar"}, "nor does the index know it"
    assert [verdict.passed for verdict in rollout.verdicts] == [True, True, False]


class Killed(BaseException):
    """The process is gone: nothing after this point runs, not even an except block's repair."""


def _kill_at(monkeypatch: pytest.MonkeyPatch, point: int, *, written: bool) -> list[str]:
    """Die at the journal's line number `point`, before or after it is `written`; returns the lines so far."""
    lines: list[str] = []
    real = Journal._append

    def append(self: Journal, event: str, **fields: Any) -> None:
        lines.append(event)
        if len(lines) > point:
            raise Killed
        if len(lines) < point or written:
            real(self, event, **fields)  # type: ignore[arg-type]
        if len(lines) == point:
            raise Killed

    monkeypatch.setattr(Journal, "_append", append)
    return lines


@pytest.mark.parametrize("written", [True, False], ids=["after the line", "before the line"])
@pytest.mark.parametrize("action", ["deploy", "rollback", "retire", "scale"])
def test_a_kill_anywhere_is_settled_by_the_next_command(
    folder: Path, deployable: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, action: str, written: bool
) -> None:
    """At every line of the journal, on two replicas: all is as before, or all is as it was meant, and the file says so."""
    outcomes = set()
    for point in range(1, 200):
        store_folder = tmp_path / f"{action}-{point}"
        shutil.copytree(folder, store_folder, ignore=shutil.ignore_patterns(f"{action}-*"))
        versions = {"2.0": 1, "1.0": 3}
        replicas = [Listed(name, [], versions=dict(versions)) for name in "ab"]
        with monkeypatch.context() as patched:
            _kill_at(patched, point, written=written)
            try:
                _act(_rollout(replicas, store_folder), action, deployable)
            except Killed:
                finished = False
            else:
                finished = True
        _rollout(replicas, store_folder).recover()
        assert Journal(store_folder).unfinished() is None
        states = {(item.default, tuple(sorted(item.versions.items()))) for item in replicas}
        assert len(states) == 1, (point, states)
        ((default, found),) = states
        held = serving.read(store_folder)
        assert held is not None
        assert (held.models["m"].default, tuple(sorted(held.models["m"].versions.items()))) in {
            (default, found),
            ("2.0", (("2.0", 1),)),  # what the file said before the rollout looked at the servers
        }
        assert (store_folder / "m-3.0.mar").exists() == ("3.0" in dict(found))
        outcomes.add((default, found))
        if finished:
            break
    assert finished
    before = ("2.0", (("1.0", 3), ("2.0", 1)))
    goals = {
        "deploy": ("3.0", (("2.0", 1), ("3.0", 1))),
        "rollback": ("1.0", (("1.0", 3), ("2.0", 1))),
        "retire": ("2.0", (("2.0", 1),)),
        "scale": ("2.0", (("1.0", 3), ("2.0", 5))),
    }
    between = {("3.0", (("1.0", 3), ("2.0", 1), ("3.0", 1)))} if action == "deploy" else set()
    assert {before, goals[action]} <= outcomes <= {before, goals[action]} | between


def _act(rollout: Rollout, action: str, archive: Path) -> None:
    if action == "deploy":
        rollout.deploy(archive)
    elif action == "rollback":
        rollout.rollback("m")
    elif action == "retire":
        rollout.retire("m", "1.0")
    else:
        rollout.scale("m", 5)


def test_the_next_command_settles_before_it_acts(
    replicas: list[Listed], folder: Path, deployable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        _kill_at(patched, 6, written=True)
        with pytest.raises(Killed):
            _rollout(replicas, folder).deploy(deployable)
    assert "3.0" in replicas[0].versions
    told: list[Step] = []
    outcome = Rollout(replicas, folder, python="python3", report=told.append).scale("m", 2)
    assert outcome.versions == {"2.0": 2} and [item.versions for item in replicas] == [{"2.0": 2}] * 2
    assert told[0].what.startswith("a killed deploy of m (at: ") and told[0].what.endswith("is taken back")


def test_a_copy_that_was_killed_is_removed(
    replicas: list[Listed], folder: Path, deployable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(source: Path, target: Path) -> None:
        target.with_name(f".{target.name}.123").write_text("half")
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(rollout, "_copy", die)
        patched.setattr(Rollout, "_fail", lambda self, begun, error: None)
        with pytest.raises(Killed):
            _rollout(replicas, folder).deploy(deployable)
    assert _rollout(replicas, folder).recover().startswith("deploy of m (at: publish m-3.0.mar)")
    assert not list(folder.glob("*3.0*")) + list(folder.glob(".m-*"))


def test_a_killed_rollout_can_be_left_as_it_is(
    replicas: list[Listed], folder: Path, deployable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        _kill_at(patched, 10, written=True)
        with pytest.raises(Killed):
            _rollout(replicas, folder).deploy(deployable)
    seen = dict(replicas[0].versions)
    assert "left as it is" in _rollout(replicas, folder).recover(as_it_is=True)
    held = serving.read(folder)
    assert held is not None and held.models["m"].versions == seen
    assert _rollout(replicas, folder).recover() == ""


def test_a_replica_that_cannot_be_settled_keeps_the_journal_open(
    replicas: list[Listed], folder: Path, deployable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        _kill_at(patched, 6, written=True)
        with pytest.raises(Killed):
            _rollout(replicas, folder).deploy(deployable)
    replicas[0].fails = "retire"
    with pytest.raises(ClientError, match=r"could not be settled: .*retire m:3\.0 a: the connection broke"):
        _rollout(replicas, folder).scale("m", 2)
    assert Journal(folder).unfinished() is not None
    assert _rollout(replicas, folder).scale("m", 2).versions == {"2.0": 2}


def test_a_first_version_that_fails_leaves_nothing(folder: Path, deployable: Path) -> None:
    serving.write(folder, Serving())
    empty = Listed("a", [], default="", versions={}, fails="prove")
    with pytest.raises(Unreachable, match=r"\(reverted, m is not served\)"):
        _rollout([empty], folder).deploy(deployable, workers=1)
    assert empty.versions == {} and serving.read(folder) == Serving()


def test_bringing_a_model_to_a_state_loads_before_it_switches_and_retires_last(
    replicas: list[Listed], folder: Path, asked: list[str]
) -> None:
    replicas[1].versions["9.0"] = 1
    target = ModelServing(default="1.0", versions={"1.0": 2})
    _rollout(replicas, folder).bring("m", target)
    assert asked == [
        "a register m:1.0 2", "a prove m:1.0", "a default m:1.0",
        "b register m:1.0 2", "b prove m:1.0", "b default m:1.0",
        "a retire m:2.0", "b retire m:2.0", "b retire m:9.0",
    ]  # fmt: skip
    assert serving.read(folder) == Serving(models={"m": target})


def test_a_version_with_another_batch_is_registered_again_while_another_one_answers(
    replicas: list[Listed], folder: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "batching", lambda folder, name: {"1.0": (1, 1), "2.0": (8, 1)})
    replicas[1].batches["2.0"] = 8
    target = ModelServing(default="2.0", versions={"1.0": 3, "2.0": 1})
    _rollout(replicas, folder).bring("m", target)
    assert asked == [
        "a register m:1.0 3", "a prove m:1.0", "a default m:1.0",
        "b register m:1.0 3", "b prove m:1.0", "b default m:1.0",
        "a retire m:2.0", "a register m:2.0 1", "a prove m:2.0", "a default m:2.0", "b default m:2.0",
    ]  # fmt: skip
    assert serving.read(folder) == Serving(models={"m": target})


def test_the_only_version_is_never_taken_away_for_its_batch(
    replicas: list[Listed], folder: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "batching", lambda folder, name: {"2.0": (8, 1)})
    _rollout(replicas, folder).bring("m", ModelServing(default="2.0", versions={"2.0": 1}))
    assert asked == []


def test_only_a_model_that_no_rollout_has_brought_is_removed(
    replicas: list[Listed], folder: Path, asked: list[str]
) -> None:
    assert not _rollout(replicas, folder).remove("m") and asked == []
    serving.write(folder, Serving())
    replicas[0].versions["1.0"] = 1
    assert _rollout(replicas, folder).remove("m")
    assert asked == ["a retire m:1.0", "a retire m:2.0", "b retire m:2.0"]


def test_a_first_rollout_that_fails_forgets_no_other_model(replicas: list[Listed], folder: Path) -> None:
    """Before there is a file, what a server was started with counts."""

    class Several(Listed):
        def status(self) -> tuple[ModelStatus, ...]:
            return (*super().status(), dataclasses.replace(_status("7.0", 1, True), name="n"))

    (folder / serving.SERVING_FILE).unlink()
    with pytest.raises(Unreachable):
        _rollout([Several("a", [], fails="scale")], folder).scale("m", 2)
    held = serving.read(folder)
    assert held is not None and {name: model.default for name, model in held.models.items()} == {"m": "2.0", "n": "7.0"}


def test_what_goes_is_not_expected_any_more(replicas: list[Listed], folder: Path, asked: list[str]) -> None:
    class Seeing(Listed):
        def retire(self, key: str) -> None:
            assert serving.read(folder) == Serving(models={"m": target}), (
                "or no replica would be ready until it is gone"
            )
            super().retire(key)

    target = ModelServing(default="1.0", versions={"1.0": 2})
    _rollout([Seeing("a", asked)], folder).bring("m", target)
    assert asked[-1] == "a retire m:2.0"


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
    with pytest.raises(Unreachable, match=r"could not be reverted: retire m:1.0 b: it hangs"):
        _rollout([replicas[0], stuck], folder).rollback("m")
    assert replicas[0].versions == {"2.0": 1}


def test_an_interruption_is_reverted_and_said(replicas: list[Listed], folder: Path) -> None:
    told: list[Step] = []
    replicas[1].fails, replicas[1].error = "prove", KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        Rollout(replicas, folder, python="python3", report=told.append).rollback("m")
    assert told[-1].what == "interrupted; reverted, m 2.0 is served as before"
    assert replicas[0].versions == replicas[1].versions == {"2.0": 1}


@pytest.mark.parametrize(
    "gone", [BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output error"), SystemExit(1)], ids=repr
)
@pytest.mark.parametrize("fails", ["", "prove"])
def test_nobody_has_to_listen(replicas: list[Listed], folder: Path, gone: BaseException, fails: str) -> None:
    """`marina rollback m | head -1`, and a terminal that is closed: forwards and back."""

    def report(step: Step) -> None:
        raise gone

    replicas[1].fails = fails
    with contextlib.nullcontext() if not fails else pytest.raises(Unreachable):
        Rollout(replicas, folder, python="python3", report=report).rollback("m")
    goal = {"2.0": 1} if fails else {"2.0": 1, "1.0": 3}
    assert [item.versions for item in replicas] == [goal] * 2 and Journal(folder).unfinished() is None


def test_a_lost_terminal_that_is_told_twice_is_reverted_once(folder: Path) -> None:
    """The shell and the kernel each send SIGHUP."""

    class Hanging(Listed):
        def prove(self, key: str) -> None:
            super().prove(key)
            os.kill(os.getpid(), signal.SIGHUP)

        def retire(self, key: str) -> None:
            os.kill(os.getpid(), signal.SIGHUP)
            super().retire(key)

    replica = Hanging("a", [])
    with pytest.raises(KeyboardInterrupt), interruptible():
        _rollout([replica], folder).rollback("m")
    assert replica.versions == {"2.0": 1} and Journal(folder).unfinished() is None


def test_whatever_ends_it_is_reverted(replicas: list[Listed], folder: Path) -> None:
    replicas[1].fails, replicas[1].error = "prove", SystemExit(1)
    with pytest.raises(SystemExit):
        _rollout(replicas, folder).rollback("m")
    assert [item.versions for item in replicas] == [{"2.0": 1}] * 2 and Journal(folder).unfinished() is None


@pytest.mark.parametrize("again", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("event", ["begin", "start", "done", "commit", "end"])
def test_a_full_disk_is_an_error_with_a_remedy(
    replicas: list[Listed], folder: Path, monkeypatch: pytest.MonkeyPatch, event: str, again: bool
) -> None:
    """At each kind of line of the journal: what has begun goes back, and what cannot be settled is settled later."""
    full: list[bytes] = []
    real = journal._append_line

    def append(path: Path, line: bytes) -> None:
        if (full and again) or (not full and json.loads(line)["event"] == event):
            full.append(line)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, line)

    with monkeypatch.context() as patched:
        patched.setattr(journal, "_append_line", append)
        expected = pytest.raises(StoreError, match=r"rollouts\.jsonl cannot be written: No space left on device")
        with expected if event != "done" or again else contextlib.nullcontext():
            _rollout(replicas, folder).rollback("m")
    assert full
    forwards = event == "end" or (event == "done" and not again)
    goal = ("1.0", {"2.0": 1, "1.0": 3}) if forwards else ("2.0", {"2.0": 1})
    assert [(item.default, item.versions) for item in replicas] == [goal] * 2
    _rollout(replicas, folder).recover()
    assert Journal(folder).unfinished() is None
    assert [(item.default, item.versions) for item in replicas] == [goal] * 2


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
    with pytest.raises(Unreachable, match=r"reverted, m 2\.0 is served as before"):
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


class Unreadable:
    """An access log that cannot be followed: the canary has begun, and is taken back."""

    def lines(self) -> list[str]:
        raise ClientError("the log cannot be followed", remedy="")

    def close(self) -> None:
        pass


def test_a_canary_that_is_taken_back_waits_for_what_the_gateway_holds(
    replicas: list[Listed], folder: Path, deployable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "SETTLE_SECONDS", 0.1)
    front = canary.Front(splits=folder / "splits", open_log=Unreadable, queue_seconds=0.4)
    rollout = Rollout(replicas, folder, python="python3", front=front)
    with pytest.raises(ClientError, match="cannot be followed"):
        rollout.deploy(deployable)
    (waited,) = (step.seconds for step in rollout.steps if step.what == "revert: canary of m")
    assert waited >= 0.5 and front.splits.read_text() == ""
    canary.set_split(front.splits, "m", "2.0", 100)
    began = time.monotonic()
    patient = dataclasses.replace(front, queue_seconds=60.0)
    Rollout(replicas, folder, python="python3", front=patient).rollback("m")
    assert front.splits.read_text() == ""
    assert time.monotonic() - began < 30, "nothing is taken away, so there is nothing to wait for"


def test_a_killed_canary_is_ended_without_being_told_of_the_gateway(
    replicas: list[Listed], folder: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`recover`, `rollback` and `retire` do not know the gateway of this machine; the journal does."""
    monkeypatch.setattr(canary, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(canary, "QUEUE_SECONDS", 0.0)
    before = serving.read(folder)
    assert before is not None
    splits = folder / "gateway" / "splits"
    splits.parent.mkdir()
    front = canary.Front(splits=splits, open_log=Unreadable)
    after = before.with_version("m", "3.0", 1).with_default("m", "3.0")
    with (
        contextlib.suppress(Killed),
        Rollout(replicas, folder, python="python3", front=front)._journaled("deploy", "m", before, after),
    ):
        for item in replicas:
            item.versions["3.0"] = 1
        canary.set_split(splits, "m", "3.0", 50)
        monkeypatch.setattr(Rollout, "_fail", lambda self, begun, error: None)
        raise Killed
    _rollout(replicas, folder).recover()
    assert splits.read_text() == "" and [line for line in asked if "retire" in line] == [
        "a retire m:3.0",
        "b retire m:3.0",
    ]
    assert serving.read(folder) == before and _rollout(replicas, folder).recover() == ""
