"""`apply` model by model: one that fails keeps no other one waiting, and a refused version is not tried on clients again and
again. No server: a dictionary stands for one, because what is tested is what is asked of it."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from marina import plan, plan_cli, serving, store
from marina.archive import Archive, sha256_of
from marina.client import ModelStatus, WorkerStatus
from marina.errors import ClientError
from marina.gates import Arm
from marina.journal import Journal
from marina.reach import Reached
from marina.rollout import Rollout
from marina.screen import Screen
from marina.serving import ModelServing, Serving
from marina.shadow import Shadow

FILE = """
[models.a]
default = "2.0"
versions = {{ "1.0" = 1, "2.0" = {{ workers = 1, archive = "{archive}" }} }}
[models.b]
default = "1.0"
versions = {{ "1.0" = 1 }}
"""


@dataclass
class Served:
    """A server of several models; `alike` of 30 inputs agree in a shadow."""

    name: str = "local"
    models: dict[str, dict[str, int]] = field(default_factory=lambda: {"a": {"1.0": 1}, "b": {"1.0": 1}})
    defaults: dict[str, str] = field(default_factory=lambda: {"a": "1.0", "b": "1.0"})
    alike: int = 0
    during_trial: Callable[[], None] = lambda: None
    trials: int = 0

    def status(self) -> tuple[ModelStatus, ...]:
        worker = WorkerStatus(id="9000", pid=1, ready=True, started="", gpu=False)
        return tuple(
            ModelStatus(
                name=name, version=version, archive=f"{name}-{version}.mar", min_workers=count, max_workers=count,
                batch_size=1, max_batch_delay_ms=1, workers=(worker,) * count, pending=0, remaining_capacity=1,
                default=version == self.defaults[name],
            )
            for name, versions in self.models.items() for version, count in versions.items()
        )  # fmt: skip

    def register(self, key: str, workers: int) -> None:
        name, version = key.split(":")
        self.models.setdefault(name, {})[version] = workers

    scale = register

    def prove(self, key: str) -> None:
        pass

    def set_default(self, key: str) -> None:
        name, version = key.split(":")
        self.defaults[name] = version

    def retire(self, key: str) -> None:
        name, version = key.split(":")
        self.models[name].pop(version, None)

    def shadow(self, name: str, old: str, new: str, recorded: Sequence[bytes], sample_seconds: float) -> Shadow:
        self.trials += 1
        self.during_trial()
        arm = Arm(answers=30, errors=0, latencies_ms=(5.0,) * 30)
        return Shadow(old=arm, new=arm, alike=self.alike, compared=30, golden=30, recorded=0, live=0)

    def drained(self, key: str) -> bool:
        return True

    def drain(self) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    """It serves version 1.0 of `a` and of `b`, which is in its store `model_store`."""
    folder = tmp_path / "model_store"
    folder.mkdir()
    for name in ("a", "b"):
        path = folder / f"{name}-1.0.mar"
        path.write_text(name)
        store.publish(folder, Archive(path, name, "1.0", sha256_of(path), 1))
    model = ModelServing(default="1.0", versions={"1.0": 1})
    serving.write(folder, Serving(models={"a": model, "b": model}))
    server = Served()
    monkeypatch.setattr(plan_cli, "reach", lambda *given, **options: Reached([server], folder, None))
    monkeypatch.setattr(Rollout, "_verify", lambda self, path: Archive(path, "a", "2.0", sha256_of(path), 1))
    return server


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "a-2.0.mar").write_text("a new one")
    path = tmp_path / "deploy.toml"
    path.write_text(FILE.format(archive="a-2.0.mar"))
    return path


def _look(watched: plan_cli._Watched, file: Path) -> dict[str, Any]:
    watched.due = 0.0
    screen = Screen(as_json=True)
    found = watched.look(lambda: plan_cli._repair(screen, plan.read(file), "python3", watched), None, 2.0)
    return dict(found)


def test_a_refused_version_is_tried_once_and_all_else_is_still_repaired(served: Served, file: Path) -> None:
    watched = plan_cli._Watched()
    served.models["b"]["1.0"] = 2
    found = _look(watched, file)
    assert "a 2.0 failed the gate 'agreement'" in found["error"] and found["exit_code"] == 5
    assert served.models == {"a": {"1.0": 1}, "b": {"1.0": 1}}, "b was repaired all the same"
    served.models |= {"a": {"1.0": 3}, "b": {}}
    found = _look(watched, file)
    assert served.models == {"a": {"1.0": 1}, "b": {"1.0": 1}} and served.defaults["a"] == "1.0"
    (left,) = found["left"]
    assert left.startswith("a:2.0 failed a gate and is not tried again until the file or its archive changes; 1.0")
    assert "error" not in found and watched.failures == 0, "the next look is not put off"
    assert _look(watched, file)["actions"] == [] and served.trials == 1


@pytest.mark.parametrize("what", ["file", "archive"])
def test_what_changed_is_tried_again(served: Served, file: Path, what: str) -> None:
    watched = plan_cli._Watched()
    _look(watched, file)
    if what == "file":
        file.write_text(file.read_text() + "[gates]\nmin_agreement = 0\n")
    else:
        (file.parent / "a-2.0.mar").write_text("a better one")
        served.alike = 30
    assert "error" not in _look(watched, file)
    assert served.trials == 2 and served.defaults["a"] == "2.0"


def test_a_full_disk_is_an_error_of_that_model(served: Served, file: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/gateway/splits")

    served.during_trial = full
    served.models["b"]["1.0"] = 2
    watched = plan_cli._Watched()
    assert _look(watched, file)["error"].startswith("/gateway/splits: No space left on device")
    assert served.models["b"] == {"1.0": 1} and watched.refused == {}
    served.during_trial, served.alike = lambda: None, 30
    assert "error" not in _look(watched, file) and served.defaults["a"] == "2.0"


def test_a_second_failure_is_told_too(
    served: Served, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(rollout: Rollout, reached: Reached, name: str, *given: Any, tried: bool) -> None:
        raise ClientError(f"{name} is stuck", remedy="")

    served.models["b"]["1.0"] = 2
    monkeypatch.setattr(plan_cli, "_apply_model", refuse)
    found = plan_cli._apply(Screen(as_json=False), plan.read(file), "python3")
    assert found[""]["error"] == "b is stuck", "what needs no trial comes first"
    assert "a is stuck" in capsys.readouterr().err


@pytest.mark.parametrize("watch", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_end_of_its_terminal_or_service_reverts_as_ctrl_c_does(
    served: Served, file: Path, number: signal.Signals, watch: bool
) -> None:
    served.during_trial = lambda: signal.raise_signal(number)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        plan_cli.apply(file, watch=watch, every=2.0, as_json=True)
    assert served.models["a"] == {"1.0": 1} and served.defaults["a"] == "1.0"
    assert Journal(file.parent / "model_store").unfinished() is None
    assert signal.getsignal(number) == before


def test_another_host_says_what_it_refused_and_is_told_what_not_to_try(file: Path) -> None:
    script = file.parent / "far.sh"
    answers = file.parent / "answer"
    script.write_text(f"echo \"$@\" >> '{file.parent}/asked'; cat > /dev/null; cat '{answers}'\n")
    file.write_text(file.read_text() + f'[hosts.far]\nprogram = ["/bin/sh", "{script}"]\n')
    answers.write_text('{"hosts": {"far": {"error": "it failed a gate", "remedy": "", "refused": ["a"]}}}')
    watched = plan_cli._Watched()
    assert _look(watched, file)["error"] == "far: it failed a gate"
    answers.write_text('{"hosts": {"far": {"actions": [], "left": ["a:2.0 failed a gate"]}}}')
    assert _look(watched, file)["left"] == ["a:2.0 failed a gate"]
    assert [line.partition("--json")[2] for line in (file.parent / "asked").read_text().splitlines()] == [
        "",
        " --left a",
    ]
