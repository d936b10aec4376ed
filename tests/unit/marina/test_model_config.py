from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from marina import model_config
from marina.errors import ArchiveError

GOOD = {
    "minWorkers": 1,
    "maxWorkers": 2,
    "batchSize": 8,
    "maxBatchDelay": 1,
    "responseTimeout": 60,
    "startupTimeout": 120,
    "jobQueueSize": 100,
    "maxRetryTimeoutInSec": 86400,
}


def messages(**changes: object) -> list[str]:
    values = {key: value for key, value in (GOOD | changes).items() if value is not ...}
    return [finding.message for finding in model_config.check(yaml.safe_dump(values))]


def test_every_shipped_configuration_is_clean(handlers: Path) -> None:
    files = sorted(handlers.glob("*.yaml"))
    assert files
    for path in files:
        assert model_config.read(path.read_text())["maxBatchDelay"] >= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batchSise": 8}, "unknown key 'batchSise', did you mean 'batchSize'"),
        ({"maxWorkers": ...}, "maxWorkers is missing: minWorkers alone is ignored"),
        ({"responseTimeout": ...}, "responseTimeout is missing: a config file without it sets 120 s"),
        ({"maxBatchDelay": 0}, "maxBatchDelay must be a whole number of at least 1, got 0; 0 means 'unset'"),
        ({"batchSize": "8"}, "batchSize must be a whole number of at least 1, got '8'"),
        ({"batchSize": 8.0}, "batchSize must be a whole number of at least 1, got 8.0"),
        ({"batchSize": True}, "batchSize must be a whole number of at least 1, got True"),
        ({"minWorkers": 3}, "maxWorkers 2 is below minWorkers 3"),
        ({"clientTimeoutInMills": 100}, "clientTimeoutInMills is refused: an expired request is dropped"),
        ({"useJobTicket": True}, "useJobTicket is refused"),
        ({"asyncCommunication": True}, "asyncCommunication is refused"),
        ({"deviceType": "neuron"}, "deviceType must be cpu or gpu, got 'neuron'"),
        ({"deviceIds": [0, "1"]}, "deviceIds must be a list of GPU numbers"),
    ],
)
def test_traps(changes: dict[str, object], message: str) -> None:
    found = messages(**changes)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "a: b: c",
        "minWorkers: 1\nminWorkers: 2\n",
        "!!python/object:os.system {}",
        "[a]: 1",
        "minWorkers: 2020-13-45",
        "a: " + "[" * 1500,
        "minWorkers: " + "1" * 5000,
        "deviceIds: [" + "0x" + "f" * 5000 + ", a]",
    ],
)
def test_what_is_no_mapping(text: str) -> None:
    with pytest.raises(ArchiveError, match=r"model-config\.yaml"):
        model_config.read(text)


def test_a_list_that_aliases_made_endless_is_not_printed() -> None:
    levels = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    text = "\n".join([*levels, "deviceIds: *a11", "deviceType: *a11"])
    assert sum(len(finding.message) for finding in model_config.check(text)) < 10_000
