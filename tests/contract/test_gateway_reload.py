"""A reload of the gateway, under load and beside connections that rest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest

from marina.errors import ServerError
from support.gateway import Answer, Front, Load, backends, front, wait_until

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("gateway")
    with backends("a", "b") as replicas, front(folder, [backend.replica for backend in replicas]) as found:
        yield found


def test_a_reload_under_load_fails_no_request(gate: Front) -> None:
    before = gate.running.pids()
    with Load(gate, clients=32, size=200_000) as load:
        load.wait_for(100)
        for _ in range(8):
            gate.running.reload()
            load.wait_for(100)
    assert load.failures() == []
    assert gate.running.pids()[0] == before[0] == gate.running.process.pid
    assert before[1] not in gate.running.pids()[1:] or len(gate.running.pids()) > len(before)


def test_a_connection_that_rests_is_answered_once_more_by_the_old_process(gate: Front) -> None:
    """A client cannot know of the reload: what it sends next on a kept connection must not meet a closed one."""
    connection = HTTPConnection("127.0.0.1", gate.port, timeout=20)
    with contextlib.closing(connection):
        assert _asked(connection, gate).status == 200
        assert connection.sock is not None, "the connection is kept"
        old = set(gate.running.pids())
        gate.running.reload()
        wait_until(lambda: set(gate.running.pids()) - old != set(), "a new process")
        connection.auto_open = 0  # a new connection would hide a lost one
        assert _asked(connection, gate).status == 200


def _asked(connection: HTTPConnection, gate: Front) -> Answer:
    connection.request("POST", "/predictions/m", b"x", {"Authorization": f"Bearer {gate.key}"})
    return Answer.read(connection)


def test_a_configuration_that_is_refused_leaves_the_old_one_serving(gate: Front) -> None:
    clients = Path(gate.running.config.clients)
    text = clients.read_text()
    clients.write_text("not a key\n")
    try:
        with pytest.raises(ServerError, match="clients file"):
            gate.running.reload()
    finally:
        clients.write_text(text)
    assert gate.ask().status == 200
