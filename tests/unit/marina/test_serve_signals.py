"""Which signals stop `marina serve`."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from marina.server import Server


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("found", "event"),
    [
        pytest.param(signal.SIG_IGN, None, id="nohup"),
        pytest.param(signal.SIG_DFL, "SIGTERM", id="terminal"),
    ],
)
def test_a_lost_terminal_stops_the_server_unless_it_was_started_to_outlive_it(
    found: signal.Handlers, event: str | None
) -> None:
    signal.signal(signal.SIGHUP, found)
    server = Server(())
    with server._signals():
        signal.raise_signal(signal.SIGHUP)
        assert server._next_event(0.0) == event
    assert signal.getsignal(signal.SIGHUP) == found
