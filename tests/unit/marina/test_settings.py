"""Where a setting of `marina serve` comes from, and which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from marina.errors import ConfigError
from marina.settings import ServeSettings

FILE = "inference_address=http://127.0.0.1:7000\nmanagement_address=http://127.0.0.1:7001\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.properties"
    path.write_text(FILE)
    return path


def test_options_win_over_variables_over_the_file_over_defaults(file: Path) -> None:
    found = ServeSettings.load(
        {"config": file, "inference_port": 9000, "drain_seconds": None},
        {"MARINA_INFERENCE_PORT": "9001", "MARINA_DRAIN_SECONDS": "7", "HOME": "/x"},
    )
    assert (found.inference_port, found.management_port, found.metrics_port) == (9000, 7001, 8082)
    assert found.drain_seconds == 7.0


@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        (
            {},
            {"MARINA_INFERENCE_PROT": "1"},
            "unknown variable MARINA_INFERENCE_PROT, did you mean 'MARINA_INFERENCE_PORT'",
        ),
        ({"inference_prot": 1}, {}, "unknown setting 'inference_prot', did you mean 'inference_port'"),
        ({"inference_port": 70000}, {}, "inference_port: .*65535, got 70000"),
        ({}, {"MARINA_DEVICE": "tpu"}, "MARINA_DEVICE: .*'tpu'"),
        ({"metrics_port": 7000}, {}, "port 7000 is given to 2 interfaces"),
        ({"management_host": "0.0.0.0"}, {}, "management_host 0.0.0.0 is not loopback"),
        ({"inference_host": "here"}, {}, "inference_host: .*'here'"),
        ({"config": "/nowhere"}, {}, "/nowhere cannot be read"),
    ],
)
def test_refused(file: Path, options: dict[str, Any], environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        ServeSettings.load({"config": file, **options}, environment)
    assert caught.value.remedy


def test_variables_of_other_parts_are_let_through(file: Path) -> None:
    ServeSettings.load({"config": file}, {"MARINA_HOME": "/x"}, other_variables=["MARINA_HOME"])


def test_a_private_network_may_be_named(file: Path) -> None:
    found = ServeSettings.load({"config": file, "inference_host": "0.0.0.0"}, {"MARINA_EXPOSE": "inference, metrics"})
    assert found.url("inference") == "http://127.0.0.1:7000"


def test_the_supervisor_port_can_be_switched_off(file: Path) -> None:
    assert "supervisor" not in ServeSettings.load({"config": file, "supervisor_port": 0}, {}).kinds()
