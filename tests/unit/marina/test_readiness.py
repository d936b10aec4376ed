"""What the supervisor's port answers to whoever asks whether requests may come: a probe, and the gateway."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pytest
import requests

from marina import processes
from marina.client import ManagementClient
from marina.errors import StoreError
from marina.gateway import CONFIG_FILE
from marina.watch import UP_HEADER, Expected, Port, Scaling, State, VersionState, Watch
from support.torchserve import eventually


@dataclass
class Told:
    """What the port tells of."""

    missing: list[str]
    in_vain: bool

    def alive(self) -> bool:
        return True

    def not_ready(self) -> list[str]:
        return self.missing

    def stuck(self) -> bool:
        return self.in_vain

    def draining(self) -> bool:
        return False

    def in_flight(self) -> int | None:
        return None

    def state(self) -> State:
        return State()

    def models(self) -> Sequence[Expected]:
        return ()

    def scaling(self) -> Sequence[Scaling]:
        return ()

    def failures(self) -> Mapping[str, str]:
        return {}

    def request_drain(self) -> None:
        self.missing = ["draining"]


@pytest.fixture
def told() -> Told:
    return Told([], in_vain=False)


@pytest.fixture
def readyz(told: Told) -> Iterator[str]:
    number = processes.free_port()
    port = Port("127.0.0.1", number, told)
    yield f"http://127.0.0.1:{number}/readyz"
    port.close()


@pytest.mark.parametrize(
    ("missing", "in_vain", "up", "status"),
    [
        pytest.param([], False, None, 200, id="a probe, ready"),
        pytest.param(["draining"], False, None, 503, id="a probe, not ready"),
        pytest.param([], False, "2", 200, id="the gateway, ready"),
        pytest.param(["draining"], False, "2", 404, id="nothing new, and finish what there is"),
        pytest.param(["m 1.0: 0 of 1 workers ready"], True, "2", 503, id="ask another replica for what is there"),
        pytest.param(["m 1.0: 0 of 1 workers ready"], True, "1", 404, id="there is no other replica"),
        pytest.param(["m 1.0: 0 of 1 workers ready"], True, "many", 503, id="no number"),
    ],
)
def test_the_gateway_learns_what_to_do_with_what_waits_here(
    told: Told, readyz: str, missing: list[str], in_vain: bool, up: str | None, status: int
) -> None:
    requests.get(readyz, headers={UP_HEADER: "2"}, timeout=20).raise_for_status()
    told.missing, told.in_vain = missing, in_vain
    answer = requests.get(readyz, headers={} if up is None else {UP_HEADER: up}, timeout=20)
    assert answer.status_code == status
    assert answer.json() == {"ready": not missing, "missing": missing}


def test_who_is_out_of_service_is_not_counted(told: Told, readyz: str) -> None:
    """The gateway leaves out of its count who was told to finish: another one is up when it counts one."""

    def told_now() -> int:
        return requests.get(readyz, headers={UP_HEADER: "1"}, timeout=20).status_code

    assert told_now() == 200
    told.missing = ["m 1.0: 1 of 2 workers ready"]
    assert told_now() == 404
    told.in_vain = True
    assert told_now() == 503


def _version(required: int, ready: int) -> VersionState:
    return VersionState(
        name="m", version="1.0", expected=2, required=required, ready=ready, dead=0, pending=0,
        remaining_capacity=1, restarts=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("workers", "stuck"),
    [
        pytest.param([(2, 1)], False, id="one of two is left"),
        pytest.param([(2, 0)], True, id="none is left"),
        pytest.param([(1, 1), (2, 0)], False, id="another model answers"),
        pytest.param([(0, 0), (1, 0)], True, id="the others are asleep"),
        pytest.param([(0, 0)], False, id="asleep"),
        pytest.param([], False, id="not looked yet"),
    ],
)
def test_requests_wait_in_vain_where_no_worker_is_left(workers: list[tuple[int, int]], stuck: bool) -> None:
    assert State(versions=tuple(_version(*one) for one in workers)).stuck is stuck


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        pytest.param(PermissionError(13, "Permission denied", "serving.json"), "'serving.json'", id="system"),
        pytest.param(StoreError("index.json is damaged"), "index.json is damaged", id="store"),
        pytest.param(TypeError("nobody thought of it"), "TypeError: nobody thought of it", id="defect"),
    ],
)
def test_whatever_goes_wrong_at_a_look_is_told_and_the_next_one_comes(trouble: Exception, told: str) -> None:
    troubles = [trouble]

    def expected() -> Sequence[Expected]:
        for one in troubles:
            raise one
        return ()

    watch = Watch(ManagementClient("http://127.0.0.1:1"), expected)
    watch.start(0.01)
    try:
        eventually(lambda: told in watch.state.unanswered, "the reason is told")
        assert watch.state.missing() == [watch.state.unanswered]
        troubles.clear()
        eventually(lambda: not watch.state.missing(), "it looks again")
    finally:
        watch.stop()


def test_the_gateway_asks_with_the_header_that_the_supervisor_reads() -> None:
    assert f'hdr {UP_HEADER} "%[nbsrv(replicas)]"' in CONFIG_FILE.read_text()
