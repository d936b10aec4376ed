"""`deploy.toml`: what is refused, what differs, and what the file makes of a state. No server."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from marina import plan
from marina.client import ModelStatus, WorkerStatus
from marina.errors import ConfigError
from marina.serving import ModelServing, Previous, Serving

GOOD = """
[models.digits]
default = "2.0"
versions = { "1.0" = 1, "2.0" = { workers = 3, archive = "dist/digits-2.0.mar" } }

[limits]
workers = 4
"""


def _read(tmp_path: Path, text: str) -> plan.Desired:
    path = tmp_path / plan.PLAN_FILE
    path.write_text(text)
    return plan.read(path)


def _status(version: str, workers: int, *, default: bool = False, ready: int | None = None) -> ModelStatus:
    count = workers if ready is None else ready
    one = [WorkerStatus(id=str(n), pid=n, ready=n < count, started="", gpu=False) for n in range(workers)]
    return ModelStatus(
        name="digits", version=version, archive="x.mar", min_workers=workers, max_workers=workers, batch_size=1,
        max_batch_delay_ms=1, workers=tuple(one), pending=0, remaining_capacity=1, default=default,
    )  # fmt: skip


def test_what_a_file_says(tmp_path: Path) -> None:
    found = _read(tmp_path, GOOD)
    digits = found.models["digits"]
    assert {version: item.workers for version, item in digits.versions.items()} == {"1.0": 1, "2.0": 3}
    assert digits.versions["2.0"].archive == tmp_path / "dist/digits-2.0.mar", "relative to the file"
    assert plan.parse(found.model_dump_json(), "json", tmp_path) == found, "as it travels to another host"


@pytest.mark.parametrize(
    ("text", "message", "remedy"),
    [
        pytest.param(GOOD + "[limit]\nworkers = 1", "limit: unknown key", "did you mean 'limits'?", id="table"),
        pytest.param(GOOD.replace("default", "defualt"), "defualt: unknown key", "did you mean 'default'?", id="key"),
        pytest.param(GOOD.replace("archive", "achive"), "achive: unknown key", "did you mean 'archive'?", id="deep"),
        pytest.param(
            GOOD + "[gates]\nmin_agrement = 1",
            "gates.min_agrement: unknown key",
            "did you mean 'min_agreement'?",
            id="gate",
        ),
        pytest.param(GOOD + '[hosts.a]\nsshh = "x"', "hosts.a.sshh: unknown key", "did you mean 'ssh'?", id="host"),
        pytest.param(
            GOOD.replace('"2.0"\n', '"3.0"\n'), "the default 3.0 is not among the versions 1.0, 2.0", "", id="default"
        ),
        pytest.param(
            GOOD.replace("= 1,", "= 0,"), "models.digits.versions.1.0.workers: Input should be", "", id="workers"
        ),
        pytest.param(
            GOOD.replace("= 1,", "= 2,"), "5 workers are wanted per replica, limits.workers is 4", "", id="limit"
        ),
        pytest.param(GOOD + '[hosts.a]\nmodels = ["x"]', "host a names the model 'x', which is not in", "", id="model"),
        pytest.param(
            GOOD + '[hosts.a]\nssh = "-oProxyCommand=x"', "hosts.a.ssh: String should match", "", id="injection"
        ),
        pytest.param(
            GOOD.replace("models.digits", 'models."digits--tune"'), "names that end in --tune belong to", "", id="trial"
        ),
        pytest.param(GOOD + "[", "Invalid", "correct the file", id="no toml"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        _read(tmp_path, text)
    assert remedy in refused.value.remedy and refused.value.exit_code == 3


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"deploy\.toml cannot be read"):
        plan.read(tmp_path / plan.PLAN_FILE)


def test_the_same_state_differs_in_nothing(tmp_path: Path) -> None:
    digits = _read(tmp_path, GOOD).models["digits"]
    seen = [_status("1.0", 1), _status("2.0", 3, default=True, ready=2)]
    assert plan.differences("a", "digits", digits, seen) == [], "a worker that is down for a moment is no difference"
    grown = [_status("1.0", 1), _status("2.0", 4, default=True, ready=3)]
    assert plan.differences("a", "digits", digits, grown) == [], "nor is a dead entry that was replaced"


def test_another_batch_than_the_archives_is_a_difference(tmp_path: Path) -> None:
    digits = _read(tmp_path, GOOD).models["digits"]
    seen = [_status("1.0", 1), _status("2.0", 3, default=True)]
    assert plan.differences("a", "digits", digits, seen, {"1.0": (1, 1), "2.0": (1, 1)}) == []
    (row,) = plan.differences("a", "digits", digits, seen, {"1.0": (8, 2), "2.0": (1, 1)})
    assert (row.what, row.wanted, row.found) == ("1.0 batch", "8, 2 ms", "1, 1 ms")


def test_a_model_that_nobody_asked_for_is_a_difference(tmp_path: Path) -> None:
    seen = [
        dataclasses.replace(_status("1.0", 1, default=True), name=name)
        for name in ("digits", "stranger", "deployed", "digits--tune")
    ]
    (row,) = plan.not_in_file("a", {"digits"}, {"deployed"}, seen)
    assert (row.model, row.wanted, row.found) == ("stranger", "not served", "served")


def test_every_difference_is_one_row(tmp_path: Path) -> None:
    digits = _read(tmp_path, GOOD).models["digits"]
    seen = [_status("1.0", 2, default=True), _status("9.0", 1)]
    rows = [(row.what, row.wanted, row.found) for row in plan.differences("a", "digits", digits, seen)]
    assert rows == [
        ("default", "2.0", "1.0"),
        ("1.0 workers", "1", "2"),
        ("2.0 workers", "3", "not served"),
        ("9.0 workers", "not served", "1"),
    ]


def test_where_a_rollback_goes(tmp_path: Path) -> None:
    digits = _read(tmp_path, GOOD).models["digits"]
    versions = {"1.0": 1, "2.0": 3}
    assert plan.target(digits, None) == ModelServing(default="2.0", versions=versions)
    left = ModelServing(default="1.0", versions={"1.0": 2})
    assert plan.target(digits, left).previous == Previous(version="1.0", workers=2)
    back = ModelServing(default="2.0", versions=versions, previous=Previous(version="0.9", workers=1))
    assert plan.target(digits, back).previous == Previous(version="0.9", workers=1)


def test_only_a_version_that_was_never_accepted_is_tried(tmp_path: Path) -> None:
    digits = _read(tmp_path, GOOD).models["digits"]
    seen = [_status("1.0", 1, default=True)]

    def tried(known: Serving | None) -> bool:
        return plan.is_new_default("digits", digits, known, seen)

    old = ModelServing(default="1.0", versions={"1.0": 1})
    assert tried(Serving(models={"digits": old}))
    assert not tried(None) and not tried(Serving())
    accepted = ModelServing(default="2.0", versions={"2.0": 3})
    assert not tried(Serving(models={"digits": accepted})), "the server was tampered with"
    before = old.model_copy(update={"previous": Previous(version="2.0", workers=3)})
    assert not tried(Serving(models={"digits": before})), "a way back"
