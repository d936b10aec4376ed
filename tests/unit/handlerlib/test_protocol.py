"""Where the fast protocol keeps away; what it does is compared in tests/property and in tests/contract."""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import ts.model_service_worker
from ts.protocol import otf_message_handler
from ts.service import Service

from handlerlib import protocol


def test_outside_a_worker_nothing_is_changed() -> None:
    before = Service.retrieve_data_for_inference, otf_message_handler.retrieve_msg
    assert not protocol.speed_up(None)
    assert (Service.retrieve_data_for_inference, otf_message_handler.retrieve_msg) == before


@pytest.mark.parametrize(
    ("variable", "value"), [("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")], ids=["not the first rank", "torchrun"]
)
def test_a_model_in_several_processes_is_left_alone(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    assert not protocol.speed_up(None, main=ts.model_service_worker)


def test_another_torchserve_is_left_alone_with_a_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    other: Any = ModuleType("__main__")
    other.__file__ = str(tmp_path / "ts" / "model_service_worker.py")
    Path(other.__file__).parent.mkdir()
    source = Path(ts.model_service_worker.__file__ or "").read_text()
    Path(other.__file__).write_text(source + "# a distributor's patch\n")
    with caplog.at_level(logging.WARNING):
        assert not protocol.speed_up(None, main=other)
    assert caplog.messages == ["the worker protocol stays TorchServe's own: ts.model_service_worker differ from 0.12.0"]
