"""A share of the requests for a new version: a real HAProxy splits them, and its own log says how both versions do."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from marina import canary
from marina.canary import Canary, FileLog, Stages
from marina.errors import ClientError
from marina.gates import Gates, Verdict
from marina.replica import LocalReplica
from marina.rollout import Rollout
from support.gateway import Backend, Front, Load, backends, front, require_haproxy, wait_until

_NOBODY = LocalReplica(store=Path(), inference_url="", management_url="http://127.0.0.1:9", supervisor_url="")
STAGES = Stages(seconds=0.5, requests=20, longest_seconds=10)


@pytest.fixture(scope="module", autouse=True)
def haproxy() -> None:
    require_haproxy()


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    with (
        backends("a", "b") as replicas,
        front(tmp_path_factory.mktemp("gateway"), [backend.replica for backend in replicas]) as found,
    ):
        yield found


@pytest.fixture
def splits(gate: Front) -> Iterator[Path]:
    """The file that the gateway reads; no canary runs before and after."""
    path = gate.clients.parent / "splits"
    path.unlink(missing_ok=True)
    time.sleep(canary.SETTLE_SECONDS)
    yield path
    path.unlink(missing_ok=True)


def _asked_for(gate: Front, count: int, path: str = "/predictions/m") -> Counter[str]:
    """Paths that reached the servers."""
    return Counter(gate.ask(path).json["path"].partition("?")[0] for _ in range(count))


def _settled(gate: Front, share: float) -> bool:
    return abs(_asked_for(gate, 20)["/predictions/m/2.0"] / 20 - share) < 0.1


def test_exactly_the_share_of_requests_without_a_version(gate: Front, splits: Path) -> None:
    assert _asked_for(gate, 20) == {"/predictions/m": 20}
    canary.set_split(splits, "m", "2.0", 25)
    wait_until(lambda: _settled(gate, 0.25), "the split")
    found = _asked_for(gate, 200)
    assert found["/predictions/m/2.0"] == pytest.approx(50, abs=2) and found.total() == 200
    assert set(found) == {"/predictions/m", "/predictions/m/2.0"}
    assert _asked_for(gate, 20, "/predictions/m/1.0") == {"/predictions/m/1.0": 20}
    assert _asked_for(gate, 20, "/predictions/other") == {"/predictions/other": 20}
    logged = [line for line in gate.log_lines() if line["canary"] == "2.0"]
    assert {(line["model"], line["path"]) for line in logged} == {("m", "/predictions/m")}
    assert canary.clear_split(splits, "m") and not canary.clear_split(splits, "m")
    time.sleep(canary.SETTLE_SECONDS)
    assert _asked_for(gate, 40) == {"/predictions/m": 40}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        pytest.param("m 2.0 100 {past}", "expired", id="expired"),
        pytest.param("m 2.0 100", "no expiry", id="incomplete"),
        pytest.param("m 2.0 101 {future}", "too much", id="more than all"),
        pytest.param("m ../x 100 {future}", "no version", id="not a version"),
    ],
)
def test_what_is_not_a_valid_canary_is_none(gate: Front, splits: Path, text: str, what: str) -> None:
    now = int(time.time())
    splits.write_text(text.format(past=now - 1, future=now + 100) + "\n")
    time.sleep(canary.SETTLE_SECONDS)
    assert _asked_for(gate, 20) == {"/predictions/m": 20}, what


def test_several_models_and_a_changed_share(gate: Front, splits: Path) -> None:
    canary.set_split(splits, "m", "2.0", 100)
    canary.set_split(splits, "n", "3.1", 100)
    canary.set_split(splits, "m", "2.0", 0)
    assert [line.split()[:3] for line in splits.read_text().splitlines()] == [["n", "3.1", "100"], ["m", "2.0", "0"]]
    wait_until(lambda: _asked_for(gate, 1, "/predictions/n") == {"/predictions/n/3.1": 1}, "the other model's canary")
    assert _asked_for(gate, 20) == {"/predictions/m": 20}


def _stage(gate: Front, splits: Path, percent: float, mode: str, gates: Gates | None = None) -> dict[str, Verdict]:
    access = canary.Front(splits=splits, open_log=lambda: FileLog(gate.running.log))
    headers = {"X-Mode": mode} if mode else {}
    with (
        Load(gate, headers=headers) as load,
        Canary(access, "m", "2.0", gates=gates or Gates(), stages=STAGES) as running,
    ):
        load.wait_for(20)
        verdicts = running.stage(percent)
    return {verdict.gate: verdict for verdict in verdicts}


def test_a_good_version_passes(gate: Front, splits: Path) -> None:
    found = _stage(gate, splits, 25, "", Gates(max_p99_ratio=1000))
    assert all(verdict.passed for verdict in found.values()) and set(found) == {"error rate", "p99"}
    assert found["error rate"].measured == 0


def test_a_failing_version_is_found_by_the_clients_own_answers(gate: Front, splits: Path) -> None:
    began = time.monotonic()
    verdict = _stage(gate, splits, 5, "problem:500@/2.0")["error rate"]
    assert not verdict.passed and verdict.measured == 1.0 and "at most 1.00% may" in verdict.text
    assert time.monotonic() - began < STAGES.longest_seconds, "certain failures are not waited for"


def test_a_version_that_refuses_requests_is_found(gate: Front, splits: Path) -> None:
    """TorchServe's 503 for a full queue or no worker reaches clients as 429, like the gateway's own refusals."""
    verdict = _stage(gate, splits, 25, "status:503:ServiceUnavailableException@/2.0")["error rate"]
    assert not verdict.passed and verdict.measured == 1.0


def test_a_slow_version_is_found(gate: Front, splits: Path) -> None:
    found = _stage(gate, splits, 25, "sleep:0.4@/2.0")
    assert found["error rate"].passed and not found["p99"].passed
    assert "at most 2 times (+10 ms) may be" in found["p99"].text


def test_errors_of_both_versions_alike_are_not_the_new_ones_fault(gate: Front, splits: Path) -> None:
    assert _stage(gate, splits, 25, "problem:500")["error rate"].passed


def test_without_traffic_a_stage_does_not_wait_long(gate: Front, splits: Path) -> None:
    access = canary.Front(splits=splits, open_log=lambda: FileLog(gate.running.log))
    began = time.monotonic()
    with Canary(access, "m", "2.0", gates=Gates(), stages=STAGES) as running:
        (verdict,) = running.stage(1)
    assert verdict.passed and time.monotonic() - began < STAGES.longest_seconds


def test_a_log_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match=r"the gateway's log .*nothing cannot be read"):
        FileLog(tmp_path / "nothing")


def test_a_retried_request_stays_with_its_version(splits: Path, tmp_path: Path) -> None:
    """A worker of one replica dies at the canary's requests: they are answered by the same version of the other one."""
    with backends("a", "b") as replicas, front(tmp_path, [item.replica for item in replicas]) as gate:
        canary.set_split(gate.clients.parent / "splits", "m", "2.0", 100)
        wait_until(lambda: _settled(gate, 1.0), "the split")
        found = _retried(gate, replicas)
    assert found == {("b", "/predictions/m/2.0"): 30}


def _retried(gate: Front, replicas: list[Backend]) -> Counter[tuple[str, str]]:
    answers = [gate.ask(x_mode=f"status:507:killed@{replicas[0].name}").json for _ in range(30)]
    return Counter((answer["name"], answer["path"].partition("?")[0]) for answer in answers)


def test_a_version_goes_only_when_no_request_for_it_waits_in_the_gateway(tmp_path: Path) -> None:
    """A request has its version before it waits for a free place: retired meanwhile, that version would answer 404."""
    held, patience = 1.7, 2.5
    with (
        backends("a") as replicas,
        front(
            tmp_path, [item.replica for item in replicas], max_inflight=1, queue_timeout_ms=int(1000 * patience)
        ) as gate,
        ThreadPoolExecutor() as pool,
    ):
        file = gate.clients.parent / "splits"
        canary.set_split(file, "m", "2.0", 100)
        wait_until(lambda: _settled(gate, 1.0), "the split")
        before = replicas[0].served()
        first = pool.submit(gate.ask, x_mode=f"sleep:{held}")
        wait_until(lambda: replicas[0].served() == before + 1, "the request that holds the only place")
        second = pool.submit(gate.ask)
        wait_until(lambda: _waiting(gate) == 1, "a request in the queue")
        access = canary.Front(splits=file, open_log=lambda: FileLog(gate.running.log), queue_seconds=patience)
        Rollout([_NOBODY], tmp_path, python="", front=access)._end_canary("m", retiring=True)
        assert first.done() and second.done()
        assert second.result().json["path"].startswith("/predictions/m/2.0")


def _waiting(gate: Front) -> int:
    text = gate.ask("/metrics", method="GET", body=None, key=None, port=gate.metrics_port).body.decode()
    queues = ('haproxy_backend_current_queue{proxy="predictions"}', 'haproxy_server_current_queue{proxy="predictions"')
    return sum(int(float(line.rpartition(" ")[2])) for line in text.splitlines() if line.startswith(queues))
