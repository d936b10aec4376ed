"""The load generator against a server whose behaviour is known. What is asserted are counts and plans, not speed."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from marina import loadgen
from marina.errors import ConfigError, MarinaError, Unreachable
from marina.loadgen import Check, Closed, Open, Payload, Result, Scenario
from support.odd_server import OddServer, odd_server, refusing_port

RIGHT = Check("marina.load_checks:exact", {"answers": ["right"]})


@pytest.fixture(scope="module")
def server() -> Iterator[OddServer]:
    with odd_server() as found:
        yield found


def load(odd: OddServer, path: str, **values: Any) -> Result:
    """A short run without warm-up; the answers are checked."""
    chosen: dict[str, Any] = {
        "loop": Closed(connections=2),
        "duration": 0.3,
        "warm_up": 0.0,
        "timeout": 10.0,
        "check": RIGHT,
        "server": None,
    }
    return loadgen.run(Scenario(url=odd.url(path), **{**chosen, **values}))


@pytest.mark.parametrize("path", ["/ok", "/chunked", "/until-close", "/close", "/drip", "/early"])
def test_every_form_of_a_right_answer_is_read(server: OddServer, path: str) -> None:
    result = load(server, path, loop=Open(rate=50, connections=4), duration=0.4)
    assert result.errors == {}
    assert result.good == result.planned in (19, 20, 21)


@pytest.mark.parametrize(
    ("path", "outcome"),
    [
        ("/status/503", "HTTP 503"),
        ("/status/429", "HTTP 429"),
        ("/status/404", "HTTP 404"),
        ("/reset", "reset"),
        ("/half", "reset"),
        ("/nonsense", "protocol"),
    ],
)
def test_a_failure_has_its_class_and_is_not_repeated(server: OddServer, path: str, outcome: str) -> None:
    before = server.requests[path]
    result = load(server, path, loop=Open(rate=50, connections=8), duration=0.4)
    assert result.good == 0 and result.latency is None
    assert result.errors == {outcome: result.planned}
    assert server.requests[path] - before <= result.planned + 5, "requests were repeated"
    assert {failure.outcome for failure in result.failures} == {outcome}
    assert result.by_outcome[outcome].count == result.planned


class _Files(SimpleHTTPRequestHandler):
    """To HEAD it answers with the length that the body would have."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass


def test_head_is_answered_without_a_body(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("body")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, directory=str(tmp_path))) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{files.server_port}/file"
        try:
            scenario = Scenario(
                url=url, method="HEAD", duration=0.3, warm_up=0.0, timeout=5.0, server=None, loop=Closed(connections=2)
            )
            result = loadgen.run(scenario)
        finally:
            files.shutdown()
    assert result.errors == {} and result.good > result.connects == 2, "answers are read, connections kept"


def test_the_failure_tells_its_request_id_and_the_servers_words(server: OddServer) -> None:
    failure = load(server, "/status/503").failures[0]
    assert (failure.request_id, failure.detail) == ("id-1", "busy")


def test_some_failures_leave_the_others_good(server: OddServer) -> None:
    result = load(server, "/every/5/reset", loop=Open(rate=200, connections=1), duration=1.0)
    assert result.planned in (200, 201)
    assert set(result.errors) == {"reset"}
    assert result.good + result.failed == result.planned
    assert result.failed == pytest.approx(result.planned / 5, abs=3)


def test_a_hanging_request_ends_as_a_timeout(server: OddServer) -> None:
    result = load(server, "/hang", timeout=0.3, loop=Open(rate=20, connections=4), duration=0.5)
    assert result.errors == {"timeout": result.planned}
    assert result.by_outcome["timeout"].p50.value >= 300


def test_nobody_listening_is_counted_as_connect() -> None:
    for loop in (Closed(connections=2), Open(rate=40, connections=4)):
        url = f"http://127.0.0.1:{refusing_port()}/"
        result = loadgen.run(Scenario(url=url, loop=loop, duration=0.4, warm_up=0.0, server=None))
        assert set(result.errors) == {"connect"} and result.failed == result.planned > 0
        assert result.planned < 100, "connections were tried in a tight loop"


def test_wrong_answers_are_found(server: OddServer) -> None:
    payloads = [Payload(body=b"right"), Payload(body=b"wrong"), Payload(body=b"right")]
    result = load(server, "/echo", payloads=payloads, loop=Closed(connections=1), duration=0.5)
    assert set(result.errors) == {"wrong answer"}
    assert result.failed == pytest.approx(result.planned / 3, abs=1)
    assert {failure.payload for failure in result.failures} == {1}
    assert "wrong" in result.failures[0].detail


def test_a_check_that_raises_is_a_wrong_answer(server: OddServer) -> None:
    check = Check("marina.load_checks:probabilities", {"expected": [[1.0]], "tolerance": 0.1})
    result = load(server, "/ok", check=check)
    assert set(result.errors) == {"wrong answer"} and "JSONDecodeError" in result.failures[0].detail


def own_check(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Check:
    """A check of the user's whose function does `body`."""
    name = f"check_{os.urandom(4).hex()}"
    lines = ("import os, sys, time", "def make(settings):", "    def check(payload, answer):", f"        {body}")
    (folder / f"{name}.py").write_text("\n".join((*lines, "        return ''", "    return check", "")))
    monkeypatch.syspath_prepend(folder)
    return Check(f"{name}:make")


def test_a_check_may_print_much(server: OddServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = own_check(tmp_path, monkeypatch, "print('x' * 500_000); print('y' * 500_000, file=sys.stderr)")
    scenario = Scenario(url=server.url("/ok"), duration=0.3, warm_up=0.0, server=None, check=check)
    with loadgen.start(scenario) as under_way:
        under_way.wait_seconds(60.0)  # until it has ended, at most
        assert under_way.result().good > 0


def test_a_client_that_dies_leaves_its_last_words(
    server: OddServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = own_check(tmp_path, monkeypatch, r"sys.stderr.write('x\n' * 99_999 + 'I give up\n'); os._exit(3)")
    with pytest.raises(MarinaError, match=r"client process 0 .* died: I give up$"):
        load(server, "/ok", check=check)


def test_a_check_that_never_ends_is_named_when_the_load_is_stopped(
    server: OddServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loadgen, "_END_SECONDS", 0.2)
    begun = tmp_path / "begun"
    check = own_check(tmp_path, monkeypatch, f"open({str(begun)!r}, 'w').close(); time.sleep(3600)")
    with loadgen.start(Scenario(url=server.url("/ok"), warm_up=0.0, server=None, check=check)) as under_way:
        ends = time.monotonic() + 30.0
        while not begun.exists() and time.monotonic() < ends:
            under_way.wait_seconds(0.05)
        under_way.stop(drain=0.0)
        with pytest.raises(MarinaError, match=r"client process 0 .* was told to stop and does not"):
            under_way.result()


def test_payloads_go_in_turn_whole_and_with_their_headers(server: OddServer) -> None:
    large = os.urandom(1 << 20)
    server.bodies.clear()
    server.headers.clear()
    payloads = [Payload(body=b"right", content_type="text/plain"), Payload(body=large, content_type="image/jpeg")]
    result = load(server, "/ok", payloads=payloads, headers={"X-Top-K": "3"}, loop=Closed(connections=1))
    assert result.errors == {} and set(server.bodies) == {b"right", large}
    assert abs(server.bodies[b"right"] - server.bodies[large]) <= 1
    assert b"X-Top-K: 3\r\n" in server.headers[0] and b"Content-Type: text/plain" in server.headers[0]
    assert b"Content-Type: image/jpeg" in server.headers[1]


def test_connections_are_kept(server: OddServer) -> None:
    before = server.connections
    result = load(server, "/ok", loop=Closed(connections=3))
    assert server.connections - before == result.connects == 3


class TestOpenLoop:
    def test_every_planned_request_is_planned_whatever_the_server_does(self, server: OddServer) -> None:
        for path in ("/ok", "/stall"):
            server.stall(0.3)
            result = load(server, path, loop=Open(rate=100, connections=4), duration=1.5)
            assert result.planned in (149, 150, 151)
            assert result.good == result.planned

    def test_random_arrivals_have_the_rate_and_are_random(self, server: OddServer) -> None:
        result = load(server, "/ok", loop=Open(rate=300, arrivals="poisson", seed=3), duration=1.5)
        assert result.planned == pytest.approx(450, abs=5 * 450**0.5)
        counts = [span.planned for span in result.timeline]
        assert len(set(counts)) > 1

    def test_a_stall_shows_in_every_request_that_was_due_meanwhile(self, server: OddServer) -> None:
        """No coordinated omission: 100 requests fall due in the second in which 4 connections are stuck."""
        scenario = Scenario(
            url=server.url("/stall"), loop=Open(rate=100, connections=4), duration=3.0, warm_up=0.0, server=None
        )
        with loadgen.start(scenario) as under_way:
            under_way.wait_measuring()
            under_way.wait_seconds(0.5)
            server.stall(1.0)
            under_way.wait()
            result = under_way.result()
        assert result.good == result.planned and result.planned in (299, 300, 301)
        assert result.latency is not None and result.service is not None
        # A third of all waits between 0 and 1 s, so a tenth of all waits at least 0.7 s.
        assert result.latency.p90.value >= 600
        assert result.latency.max_ms >= 900
        # Only the 4 that were out saw the stall between sending and answer.
        assert result.service.p90.value < result.latency.p90.value / 3
        assert result.service.max_ms >= 500

    def test_what_finds_no_connection_in_time_is_a_timeout(self, server: OddServer) -> None:
        result = load(server, "/hang", timeout=0.4, loop=Open(rate=50, connections=1), duration=1.0)
        assert result.errors == {"timeout": result.planned}
        assert any("no connection was free" in failure.detail for failure in result.failures)


def test_several_client_processes_share_one_plan(server: OddServer) -> None:
    result = load(server, "/ok", loop=Open(rate=100, connections=4), duration=1.0, processes=2)
    assert result.planned in (99, 100, 101, 102) and result.good == result.planned
    assert sum(span.planned for span in result.timeline) == result.planned


def test_stopping_gives_what_there_is(server: OddServer) -> None:
    scenario = Scenario(url=server.url("/ok"), duration=None, warm_up=0.0, server=None)
    with loadgen.start(scenario) as under_way:
        under_way.wait_measuring()
        under_way.wait_seconds(0.3)
        under_way.stop()
        result = under_way.result()
    assert result.good == result.planned > 0 and 0.2 < result.seconds < 30


def test_stopping_while_warming_up_gives_an_empty_result(server: OddServer) -> None:
    with loadgen.start(Scenario(url=server.url("/ok"), warm_up=60.0, server=None)) as under_way:
        under_way.stop()
        result = under_way.result()
    assert result.planned == 0 and result.latency is None and not result.steady
    assert result.as_dict()["throughput"]["value"] == 0


def test_ctrl_c_gives_what_there_is(server: OddServer) -> None:
    code = (
        "import sys; from marina import loadgen; from marina.loadgen import Scenario\n"
        "def tell(progress):\n"
        "    if progress.measuring: print('measuring', flush=True)\n"
        f"r = loadgen.run(Scenario(url={server.url('/ok')!r}, duration=60, warm_up=0.0, server=None), on_progress=tell)\n"
        "print(r.interrupted, r.good == r.planned > 0)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "measuring\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read().splitlines()[-1] == "True True"
    assert process.returncode == 0


def test_warm_up_is_not_measured(server: OddServer) -> None:
    before = server.requests["/ok"]
    result = load(server, "/ok", loop=Open(rate=50), warm_up=1.0, duration=1.0)
    assert result.planned in (49, 50, 51) and result.warm_up_seconds == pytest.approx(1.0, abs=0.3)
    assert server.requests["/ok"] - before >= 95


def test_a_server_that_never_gets_steady_is_measured_at_the_limit(server: OddServer) -> None:
    result = load(server, "/status/503", warm_up="auto", warm_up_limit=1.0)
    assert not result.steady and result.warm_up_seconds >= 1.0


def test_the_servers_own_use_is_measured(server: OddServer) -> None:
    result = load(server, "/ok", server=os.getpid())
    assert result.server is not None and os.getpid() in result.server.pids
    assert result.server.cpu_seconds > 0 and result.server.rss_mib > 10
    found = load(server, "/ok", server="auto").server
    assert found is not None and os.getpid() in found.pids


def test_memory_stays_flat_in_a_long_run() -> None:
    """An hour of windows by a virtual clock."""
    from marina.load_engine import MOST_WINDOWS, Windows

    windows = Windows(start=0)
    for second in range(3600):
        for part in range(4):
            moment = second * 1_000_000_000 + part * 250_000_000
            windows.plan(moment)
            windows.answer(moment, moment + 2_000_000, 2000)
    assert len(windows.planned) <= MOST_WINDOWS and len(windows.latency) <= MOST_WINDOWS
    assert sum(windows.planned) == sum(windows.good) == 4 * 3600
    assert windows.length >= 3600e9 / MOST_WINDOWS


def test_tls_is_spoken_and_checked(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    # fmt: off
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate),
        ],
        check=True, capture_output=True,
    )
    # fmt: on
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with odd_server(context) as server:
        body = os.urandom(300_000)
        good = load(server, "/ok", ca_file=certificate, payloads=[Payload(body=body)])
        assert good.errors == {} and good.good > 0 and server.bodies[body] > 0
        assert load(server, "/chunked", insecure=True).errors == {}
        untrusted = load(server, "/ok", loop=Open(rate=20), duration=0.5)
        assert set(untrusted.errors) == {"connect"} and "certificate" in untrusted.failures[0].detail


def test_nothing_is_left_running(server: OddServer) -> None:
    import psutil

    with pytest.raises(RuntimeError), loadgen.start(Scenario(url=server.url("/ok"), duration=None, server=None)):
        raise RuntimeError
    mine = psutil.Process().children(recursive=True)
    assert not [child for child in mine if "load_engine" in " ".join(child.cmdline())]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load-report")]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"url": "ftp://x"}, "is not an address"),
        ({"url": "http://127.0.0.1:99999/"}, "is not an address"),
        ({"duration": 0.0}, "duration"),
        ({"loop": Open(rate=0.0)}, "rate"),
        ({"loop": Closed(connections=0)}, "connections"),
        ({"payloads": ()}, "payload"),
        ({"headers": {"X": "a\r\nb"}}, "not a header"),
        ({"check": Check("nothing")}, "module:factory"),
        ({"check": Check("marina.nothing:here")}, "ModuleNotFoundError"),
        ({"server": 2**22 + 1}, "cannot be measured"),
    ],
)
def test_a_scenario_that_makes_no_sense_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        loadgen.run(Scenario(**{"url": "http://127.0.0.1:9/", "warm_up": 0.0, "server": None, **values}))


def test_a_host_without_an_address_is_unreachable() -> None:
    with pytest.raises(Unreachable, match="no address"):
        loadgen.run(Scenario(url="http://host.invalid/"))
