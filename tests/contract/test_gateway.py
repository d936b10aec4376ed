"""The gateway's promises, kept by a real HAProxy in front of real servers that misbehave on demand."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import ssl
import struct
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path

import pytest

from marina import gateway
from marina.errors import PortBusy, ServerError
from marina.gateway import GatewayConfig, Replica
from support.gateway import Answer, Backend, Front, Load, backends, free_port, front, require_haproxy, wait_until

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module", autouse=True)
def haproxy() -> None:
    require_haproxy()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Front, list[Backend]]]:
    """Two replicas behind one gateway, for the tests that leave both as they found them."""
    with (
        backends("a", "b") as replicas,
        front(
            tmp_path_factory.mktemp("gateway"),
            [backend.replica for backend in replicas],
            max_body_bytes=300_000,
            buffer_bytes=256 * 1024,
            max_chunked_bytes=64 * 1024,
            request_timeout_ms=700,
            deadline_ms=3000,
            max_deadline_ms=3000,
        ) as gate,
    ):
        yield gate, replicas


@pytest.fixture
def gate(pair: tuple[Front, list[Backend]]) -> Front:
    return pair[0]


@pytest.fixture
def replicas(pair: tuple[Front, list[Backend]]) -> list[Backend]:
    return pair[1]


# ------------------------------------------------------------------------------------------------------------------ keys


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({}, id="no key"),
        pytest.param({"Authorization": "Bearer wrong"}, id="wrong key"),
        pytest.param({"Authorization": "Bearer "}, id="empty key"),
        pytest.param({"Authorization": "Basic d3Jvbmc6a2V5"}, id="other scheme"),
        pytest.param({"X_API_Key": "wrong"}, id="wrong X-API-Key"),
    ],
)
def test_without_a_valid_key_the_answer_is_401(gate: Front, headers: dict[str, str]) -> None:
    answer = gate.ask(key=None, **headers)
    assert answer.status == 401
    assert answer.problem() == "unauthorised"
    assert answer.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_a_key_is_accepted_in_either_header_and_never_passed_on_or_logged(gate: Front, scheme: str) -> None:
    for answer in (gate.ask(key=None, Authorization=f"{scheme} {gate.key}"), gate.ask(key=None, X_API_Key=gate.key)):
        assert answer.status == 200
        assert gate.key not in answer.body.decode()
        assert not {"authorization", "x-api-key"} & {name.lower() for name in answer.json["headers"]}
        assert gate.log_of(answer.headers["x-request-id"])["client"] == "first"
    assert gate.key not in gate.running.log.read_text()
    assert gate.key not in gate.clients.read_text()


def test_the_digest_is_not_a_key(gate: Front) -> None:
    assert gate.ask(key=gateway.read_clients(gate.clients)[0].digest).status == 401


def test_keys_rotate_under_load_without_a_failed_request(tmp_path: Path) -> None:
    with backends("a") as replicas, front(tmp_path, [replicas[0].replica]) as gate:
        current = [gate.key]
        with Load(gate, key_of=lambda: current[0]) as load:
            for _ in range(2):
                load.wait_for(50)
                new = gateway.add_key(gate.clients, "first")
                wait_until(lambda new=new: gate.ask(key=new).status == 200, "the new key works")  # type: ignore[misc]
                old, current[0] = current[0], new
                load.wait_for(50)
                assert gateway.revoke_keys(gate.clients, "first", keep=new) == 1
                wait_until(lambda old=old: gate.ask(key=old).status == 401, "the old key is refused")  # type: ignore[misc]
        assert load.failures() == []
        assert len(load.answers) > 200


def test_a_broken_clients_file_keeps_the_last_good_keys(tmp_path: Path) -> None:
    with backends("a") as replicas, front(tmp_path, [replicas[0].replica]) as gate:
        good = gate.clients.read_text()
        gate.clients.write_text("not a line")
        wait_until(lambda: "clients file refused" in gate.running.log.read_text(), "the file is refused")
        assert b"marina_gateway_clients_file_refused 1" in credentials(gate).body
        assert gate.ask().status == 200
        gate.clients.write_text(good)
        wait_until(lambda: b"marina_gateway_clients_file_refused 0" in credentials(gate).body, "the file is accepted")


def test_an_expired_key_stops_working(tmp_path: Path) -> None:
    with backends("a") as replicas, front(tmp_path, [replicas[0].replica]) as gate:
        expiry = int(time.time()) + 3
        key = gateway.add_key(gate.clients, "brief", expires_at=expiry)
        wait_until(lambda: gate.ask(key=key).status == 200, "the key works")
        assert f'expiry_timestamp_seconds{{client="brief"}} {expiry}'.encode() in credentials(gate).body
        wait_until(lambda: gate.ask(key=key).status == 401, "the key has expired")
        assert gate.ask().status == 200


def test_of_a_clients_keys_the_soonest_expiry_is_told(tmp_path: Path) -> None:
    """Two samples with the same labels: Prometheus keeps either, and the alert may never come."""
    nowhere = Replica(address=f"127.0.0.1:{free_port()}", health_port=free_port())
    with front(tmp_path, [nowhere], wait=0) as gate:
        now = int(time.time())
        for expiry in (now + 9000, now + 1000, now + 5000):
            gateway.add_key(gate.clients, "first", expires_at=expiry)
        wait_until(lambda: b"marina_gateway_clients 4" in credentials(gate).body, "the keys are read")
        told = [line for line in credentials(gate).body.decode().splitlines() if line.startswith("marina_gateway_key")]
        assert told == [f'marina_gateway_key_expiry_timestamp_seconds{{client="first"}} {now + 1000}']


def test_each_client_has_its_own_rate_limit(tmp_path: Path) -> None:
    with backends("a") as replicas, front(tmp_path, [replicas[0].replica], rate_limit=20) as gate:
        other = gateway.add_key(gate.clients, "other")
        wait_until(lambda: gate.ask("/predictions/m", method="GET", key=other).status == 405, "the gateway answers")
        answers = [gate.ask() for _ in range(30)]
        assert [answer.status for answer in answers[:20]] == [200] * 20
        refused = answers[-1]
        assert refused.status == 429
        assert refused.problem() == "rate-limited"
        assert int(refused.headers["retry-after"]) >= 1
        wait_until(lambda: gate.ask(key=other).status == 200, "the other client is served")


# ------------------------------------------------------------------------------------------------------ what is reachable

MANAGEMENT = [
    "/models",
    "/models/m",
    "/models?url=file:///x.mar",
    "/models/m/1.0/set-default",
    "/models/m/invoke",
    "/workflows",
    "/workflows?url=x.war",
    "/wfpredict/w",
    "/metrics",
    "/credentials",
    "/api-description",
    "/token?type=management",
    "/ping",
    "/readyz",
    "/",
    "/invocations",
    "/v1/models/m:predict",
    "/v2/models/m/infer",
    "/v2",
    "/m/predict",
    "/explanations/m",
    "/predictions",
    "/predictions/",
    "//models",
    "/predictions//m",
    "/predictions/../models",
    "/predictions/m/../../models",
    "/predictions/..",
    "/predictions/m/..",
    "/predictions/./m",
    "/predictions/%2e%2e/models",
    "/predictions/m/%2e%2e/%2e%2e/models",
    "/predictions/m%2f..%2f..%2fmodels",
    "/predictions/..%2fmodels",
    "/predictions/..;/models",
    "/predictions/m;/../models",
    "/predictions\\..\\models",
    "/predictions/m/1.0/url_path",
    "/%70redictions/m",
    "/PREDICTIONS/m",
    "/./models",
    "/.%00/models",
    "/predictions/m#/../models",
]


def status_of(raw: bytes) -> int:
    match = re.match(rb"HTTP/1\.1 (\d{3}) ", raw)
    assert match, raw
    return int(match[1])


@pytest.mark.parametrize("path", MANAGEMENT)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_but_predictions_is_reachable(gate: Front, replicas: list[Backend], method: str, path: str) -> None:
    before = [backend.served() for backend in replicas]
    line = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gate.key}\r\n"
    answer = gate.raw(f"{line}Connection: close\r\nContent-Length: 0\r\n\r\n".encode())
    # A raw '#' is no HTTP at all: HAProxy's parser refuses it before any rule of ours, with its own page.
    assert status_of(answer) == (400 if "#" in path else 404)
    assert b"application/problem+json" in answer or "#" in path
    assert [backend.served() for backend in replicas] == before


@pytest.mark.parametrize(
    "target",
    ["http://x/models", "http://127.0.0.1:8081/models", "x:8081", "*", "http://x/predictions/../models"],
)
def test_absolute_and_authority_targets_do_not_escape(gate: Front, replicas: list[Backend], target: str) -> None:
    before = [backend.served() for backend in replicas]
    for method in ("GET", "POST", "CONNECT", "OPTIONS"):
        request = f"{method} {target} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gate.key}\r\n"
        answer = gate.raw(f"{request}Connection: close\r\nContent-Length: 0\r\n\r\n".encode())
        assert status_of(answer) in (400, 404)
    assert [backend.served() for backend in replicas] == before


def test_an_absolute_prediction_arrives_as_a_bare_path(gate: Front) -> None:
    request = f"POST http://x/predictions/m?url=http://y HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gate.key}\r\n"
    answer = gate.raw(f"{request}Connection: close\r\nContent-Length: 1\r\n\r\nx".encode())
    assert status_of(answer) == 200
    assert re.search(rb'"path": "/predictions/m\?request_id=[0-9a-f-]+&trace_id=[0-9a-f]{32}"', answer)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nPOST /models HTTP/1.1\r\nHost: x\r\n\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nxxxxxx",
        b"Content-Length: -1\r\n\r\n",
        b"Content-Length: 18446744073709551615\r\n\r\n",
        b"Transfer-Encoding: xchunked\r\n\r\n",
        b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    ],
    ids=["both lengths", "two lengths", "negative", "huge", "unknown encoding", "space before colon"],
)
def test_smuggling_finds_no_second_request(gate: Front, replicas: list[Backend], request_bytes: bytes) -> None:
    head = f"POST /predictions/m HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gate.key}\r\n".encode()
    answer = gate.raw(head + request_bytes)
    # No answer at all: the connection was reset over the bytes that the parser refused to read.
    assert answer == b"" or status_of(answer) in (200, 400, 408, 413, 422, 501)
    assert b'"path": "/models"' not in answer
    assert answer.count(b"HTTP/1.1 2") <= 1


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD"])
def test_other_methods_are_405(gate: Front, method: str) -> None:
    answer = gate.ask(method=method, body=None)
    assert answer.status == 405
    assert answer.headers["allow"] == "POST"


def test_predictions_pass_through_untouched(gate: Front) -> None:
    answer = gate.ask("/predictions/m/1.0", body=b"12345", Content_Type="image/png")
    assert answer.status == 200
    assert (answer.json["path"].partition("?")[0], answer.json["bytes"]) == ("/predictions/m/1.0", 5)
    assert answer.json["headers"]["content-type"] == "image/png"
    assert "server" not in answer.headers
    assert not any(name.startswith("x-marina") for name in answer.headers)


def test_headers_that_torchserve_gives_to_handlers_cannot_be_sent(gate: Front) -> None:
    answer = gate.ask(
        explain="True",
        X_Marina_Replica="torchserve2",
        X_Marina_Own="503",
        X_Deadline_Unix_Ms="1",
    )
    sent = gate.raw(
        f"POST /predictions/m HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gate.key}\r\nurl_path: x\r\n"
        "ts_request_sequence_id: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode()
    )
    assert answer.status == 200
    passed = {name.lower() for name in answer.json["headers"]}
    assert not passed & {"explain", "x-marina-replica", "x-marina-own"}
    assert int(answer.json["headers"]["x-deadline-unix-ms"]) > 1
    assert b"url_path" not in sent
    assert b"ts_request" not in sent


def test_the_worker_learns_id_and_arrival_of_the_request(gate: Front) -> None:
    answer = gate.ask(X_Request_Id="abc-1", X_Marina_Request_Id="forged", X_Request_Start="t=1")
    passed = {name.lower(): value for name, value in answer.json["headers"].items()}
    assert passed["x-marina-request-id"] == answer.headers["x-request-id"] == "abc-1"
    arrived = int(passed["x-request-start"].removeprefix("t=")) / 1e6
    assert abs(time.time() - arrived) < 30


@pytest.mark.parametrize("sent", ["application/x-www-form-urlencoded", "Application/X-WWW-Form-URLEncoded; charset=x"])
def test_the_form_content_type_becomes_octet_stream(gate: Front, sent: str) -> None:
    assert gate.ask(Content_Type=sent).json["headers"]["content-type"] == "application/octet-stream"


def test_healthz_follows_the_replicas_and_needs_no_key(tmp_path: Path) -> None:
    with backends("a") as [backend], front(tmp_path, [backend.replica]) as gate:
        assert gate.ask("/healthz", method="GET", body=None, key=None).status == 200
        backend.set_ready(False)
        wait_until(lambda: gate.ask("/healthz", method="GET", body=None, key=None).status == 503, "not healthy")
        assert gate.ask("/healthz", method="GET", body=None, key=None).problem() == "no-replica"


def credentials(gate: Front) -> Answer:
    return gate.ask("/credentials", method="GET", body=None, key=None, port=gate.metrics_port)


def test_metrics_answer_on_their_own_port_only(gate: Front) -> None:
    inside = gate.ask("/metrics", method="GET", body=None, key=None, port=gate.metrics_port)
    assert inside.status == 200
    assert b'haproxy_server_status{proxy="predictions",server="torchserve1",state="UP"} 1' in inside.body
    assert b"marina_gateway_clients 1" in credentials(gate).body
    assert gate.ask("/metrics", method="GET", body=None).status == 404
    assert gate.ask("/predictions/m", port=gate.metrics_port).status == 404


# ---------------------------------------------------------------------------------------------------------------- limits


def head(gate: Front, *lines: str) -> bytes:
    return "\r\n".join(
        ["POST /predictions/m HTTP/1.1", "Host: x", f"Authorization: Bearer {gate.key}", *lines, "", ""]
    ).encode()


def test_a_body_that_announces_too_much_is_refused_before_it_is_sent(gate: Front) -> None:
    answer = gate.raw(head(gate, "Content-Length: 300001", "Expect: 100-continue"))
    assert status_of(answer) == 413
    assert b"payload-too-large" in answer
    assert gate.ask(body=b"x" * 300_000).json["bytes"] == 300_000


def test_a_client_that_sends_too_much_at_once_still_reads_413(gate: Front) -> None:
    assert gate.ask(body=b"x" * 400_000).problem() == "payload-too-large"


@pytest.mark.parametrize(
    "chunk", [b"10000\r\n" + b"x" * 0x10000 + b"\r\n", b"1\r\nx\r\n" * 0x10000], ids=["64K", "1 B"]
)
def test_a_chunked_body_has_a_limit_too(gate: Front, replicas: list[Backend], chunk: bytes) -> None:
    before = [backend.served() for backend in replicas]
    answer = gate.raw(head(gate, "Transfer-Encoding: chunked") + chunk * 3)
    assert status_of(answer) == 413
    assert [backend.served() for backend in replicas] == before


def test_a_small_chunked_body_is_served(gate: Front) -> None:
    answer = gate.raw(head(gate, "Transfer-Encoding: chunked", "Connection: close") + b"3\r\nabc\r\n0\r\n\r\n")
    assert status_of(answer) == 200


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param([f"X-{number}: x" for number in range(100)], id="many headers"),
        pytest.param([f"X-Long: {'x' * 400_000}"], id="header beyond the buffer"),
    ],
)
def test_headers_that_haproxys_parser_refuses(gate: Front, lines: list[str]) -> None:
    answer = gate.raw(head(gate, *lines, "Connection: close", "Content-Length: 0"))
    assert status_of(answer) in (400, 431)  # 431 since HAProxy 3.1


def test_headers_have_a_limit_together(gate: Front) -> None:
    answer = gate.ask(X_A="x" * 9_000, X_B="x" * 9_000)
    assert answer.status == 431
    assert answer.problem() == "headers-too-large"


def test_the_url_has_a_limit(gate: Front) -> None:
    assert gate.ask("/predictions/m?" + "x" * 3000).problem() == "uri-too-long"


def test_garbage_is_400(gate: Front) -> None:
    answer = gate.raw(b"\x16\x03\x01 hello\r\n\r\n")
    assert status_of(answer) == 400
    assert "<BADREQ>" in {line["method"] for line in gate.log_lines()}


@pytest.mark.parametrize("part", ["headers", "body"])
def test_a_slow_client_is_cut_off_with_408(gate: Front, part: str) -> None:
    began = time.monotonic()
    sent = head(gate, "Content-Length: 10")
    answer = gate.raw(sent[:30] if part == "headers" else sent + b"x")
    assert status_of(answer) == 408
    assert (b"urn:marina:problem:request-timeout" in answer) == (part == "body")
    assert 0.5 < time.monotonic() - began < 3


@contextlib.contextmanager
def slow_upload(gate: Front, size: int, *lines: str, sent: int) -> Iterator[socket.socket]:
    """A connection on which `sent` of `size` bytes have been sent."""
    with socket.create_connection(("127.0.0.1", gate.port), timeout=20) as connection:
        connection.sendall(head(gate, f"Content-Length: {size}", "Connection: close", *lines) + b"x" * sent)
        yield connection


def test_slow_uploads_of_one_client_leave_places_free(tmp_path: Path) -> None:
    small = {"buffer_bytes": 65536, "max_chunked_bytes": 32768, "max_body_bytes": 400_000}
    with backends("a") as [backend], front(tmp_path, [backend.replica], max_inflight=2, **small) as gate:
        other = gateway.add_key(gate.clients, "other")
        wait_until(lambda: gate.ask(key=other).status == 200, "the other key works")
        with slow_upload(gate, 200_000, sent=199_999) as connection:
            wait_until(lambda: gauge(gate, "current_sessions") == 1, "the replica's place is taken")
            refused = gate.ask(body=b"x" * 200_000)
            assert (refused.status, refused.problem()) == (429, "overloaded")
            assert refused.headers["retry-after"] == "1"
            assert gate.ask(body=b"x" * 20_000).status == 200
            assert gate.ask(body=b"x" * 200_000, key=other).status == 200
            connection.sendall(b"x")
            assert status_of(connection.recv(65536)) == 200
        wait_until(lambda: gate.ask(body=b"x" * 200_000).status == 200, "the client's share is free again")
        with Load(gate, clients=1, size=200_000) as kept:
            kept.wait_for(5)
        assert kept.failures() == []


def test_the_deadline_ends_a_slow_upload(gate: Front) -> None:
    """HAProxy 3 does not, which deploy/gateway/README.md says."""
    version = subprocess.run([gateway.haproxy_program(), "-v"], capture_output=True, text=True, check=True).stdout
    if "version 2." not in version:
        pytest.skip(version.splitlines()[0])
    began = time.monotonic()
    with slow_upload(gate, 300_000, "X-Deadline-Ms: 1000", sent=290_000) as connection:
        connection.settimeout(0.1)
        answer = b""
        while not answer and time.monotonic() - began < 10:
            with contextlib.suppress(TimeoutError):
                connection.sendall(b"x")
                answer = connection.recv(65536)
    assert status_of(answer) == 504
    assert 0.9 < time.monotonic() - began < 3
    wait_until(lambda: gauge(gate, "current_sessions") == 0, "its place is free")


def test_a_slow_answer_outlives_the_clients_timeout(gate: Front) -> None:
    assert gate.ask(x_mode="sleep:1.2").status == 200


# ------------------------------------------------------------------------------------------------------------- overload


def in_parallel(gate: Front, number: int, **headers: str) -> list[tuple[Answer, float]]:
    found: list[tuple[Answer, float]] = []

    def one() -> None:
        began = time.monotonic()
        answer = gate.ask(**headers)  # type: ignore[arg-type]
        found.append((answer, time.monotonic() - began))

    threads = [threading.Thread(target=one) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_a_full_queue_is_429_at_once(tmp_path: Path) -> None:
    with backends("a") as [backend], front(tmp_path, [backend.replica], max_inflight=2, max_queue=2) as gate:
        answers = in_parallel(gate, 12, x_mode="sleep:2")
        served = [answer for answer, _ in answers if answer.status == 200]
        refused = [(answer, took) for answer, took in answers if answer.status == 429]
        assert len(served) + len(refused) == 12
        assert 4 <= len(served) <= 6
        for answer, took in refused:
            assert answer.problem() == "overloaded"
            assert answer.headers["retry-after"] == "1"
            assert took < 1.5


def test_waiting_too_long_in_the_queue_is_429(tmp_path: Path) -> None:
    with (
        backends("a") as [backend],
        front(tmp_path, [backend.replica], max_inflight=1, queue_timeout_ms=300) as gate,
    ):
        answers = [answer for answer, _ in in_parallel(gate, 4, x_mode="sleep:3")]
        assert sorted(answer.status for answer in answers) == [200, 429, 429, 429]
        refused = next(answer for answer in answers if answer.status == 429)
        assert refused.problem() == "overloaded"
        assert refused.headers["retry-after"] == "1"
        assert gate.log_of(refused.headers["x-request-id"])["termination"] == "sQ"


def test_who_cannot_be_answered_in_time_is_told_at_once(tmp_path: Path) -> None:
    with (
        backends("a") as [backend],
        front(tmp_path, [backend.replica], max_inflight=2, max_queue=200, queue_timeout_ms=20000) as gate,
    ):
        in_parallel(gate, 2, x_mode="sleep:0.1")
        crowd = threading.Thread(target=in_parallel, args=(gate, 198), kwargs={"x_mode": "sleep:0.1"})
        crowd.start()  # ten seconds of work
        wait_until(lambda: waiting(gate) >= 60, "three seconds of it wait")
        began = time.monotonic()
        hurried = threading.Thread(target=gate.ask, kwargs={"x_mode": "sleep:0.1", "X_Deadline_Ms": "500"})
        hurried.start()
        wait_until(lambda: time.monotonic() - began > 1.1, "the second in which the pace is measured")
        assert hurried.is_alive(), "nobody knew the pace of a crowd so new"
        began = time.monotonic()
        hasty = gate.ask(x_mode="sleep:0.1", X_Deadline_Ms="500")
        took = time.monotonic() - began
        assert (hasty.status, hasty.problem()) == (429, "overloaded")
        assert took < 0.45, "it was told before its time was over"
        assert gate.ask(x_mode="sleep:0.1").status == 200, "who has time waits"
        crowd.join(60)
        hurried.join(60)


def waiting(gate: Front) -> int:
    return gauge(gate, "current_queue")


def gauge(gate: Front, name: str) -> int:
    text = gate.ask("/metrics", method="GET", body=None, key=None, port=gate.metrics_port).body.decode()
    name = f'haproxy_backend_{name}{{proxy="predictions"}}'
    return int(next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name)))


def test_torchserves_full_queue_is_429_when_every_replica_says_so(gate: Front) -> None:
    answer = gate.ask(x_mode="status:503:ServiceUnavailableException")
    assert answer.status == 429
    assert answer.problem() == "overloaded"
    assert answer.headers["retry-after"] == "1"


def test_no_replica_is_503(tmp_path: Path) -> None:
    nowhere = Replica(address=f"127.0.0.1:{free_port()}", health_port=free_port())
    with front(tmp_path, [nowhere], wait=0) as gate:
        answer = gate.ask()
        assert answer.status == 503
        assert answer.problem() == "no-replica"
        assert answer.headers["retry-after"] == "1"


# ------------------------------------------------------------------------------------------------------------- deadlines


def test_a_deadline_is_kept(gate: Front) -> None:
    began = time.monotonic()
    answer = gate.ask(x_mode="sleep:2", X_Deadline_Ms="300")
    assert answer.status == 504
    assert answer.problem() == "deadline-exceeded"
    assert 0.25 < time.monotonic() - began < 1
    assert gate.log_of(answer.headers["x-request-id"])["deadline_ms"] == "300"


def test_the_largest_deadline_cannot_be_exceeded(gate: Front) -> None:
    answer = gate.ask(X_Deadline_Ms="999999999")
    assert answer.status == 200
    assert int(answer.json["headers"]["x-deadline-unix-ms"]) / 1000 - time.time() < 3.1


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "abc", "1e3", "9999999999"])
def test_a_malformed_deadline_is_400(gate: Front, value: str) -> None:
    assert gate.ask(X_Deadline_Ms=value).problem() == "malformed-deadline"


@pytest.mark.parametrize("value", ["-5", "0", "abc", "99999999999999999999"])
def test_a_second_deadline_is_checked_too(gate: Front, value: str) -> None:
    answer = gate.raw(head(gate, "X-Deadline-Ms: 100", f"X-Deadline-Ms: {value}", "Connection: close"))
    assert status_of(answer) == 400
    assert b"malformed-deadline" in answer


def test_a_second_deadline_has_the_same_maximum(gate: Front) -> None:
    twice = ("X-Deadline-Ms: 100", "X-Deadline-Ms: 999999999")
    answer = gate.raw(head(gate, *twice, "Connection: close", "Content-Length: 0"))
    match = re.search(rb'"x-deadline-unix-ms": "(\d+)"', answer)
    assert match, answer
    assert int(match[1]) / 1000 - time.time() < 3.1


def test_time_in_the_queue_counts_against_the_deadline(tmp_path: Path) -> None:
    with backends("a") as [backend], front(tmp_path, [backend.replica], max_inflight=1) as gate:
        slow = threading.Thread(target=gate.ask, kwargs={"x_mode": "sleep:0.8"})
        slow.start()
        wait_until(lambda: backend.served() == 1, "the slow request is being served")
        began = time.monotonic()
        answer = gate.ask(X_Deadline_Ms="400")
        slow.join()
        assert answer.problem() == "deadline-exceeded"
        assert time.monotonic() - began < 1.2
        assert backend.served() == 1


# -------------------------------------------------------------------------------------------------- identity and logging


def test_a_request_id_is_carried_everywhere(gate: Front) -> None:
    answer = gate.ask("/predictions/m/2.0", X_Request_Id="Abc-1.2_3")
    assert answer.headers["x-request-id"] == "Abc-1.2_3"
    assert answer.json["headers"]["x-request-id"] == "Abc-1.2_3"
    assert gate.ask("/models", X_Request_Id="mine").json["instance"] == "mine"
    line = gate.log_of("Abc-1.2_3")
    assert (line["model"], line["version"], line["status"]) == ("m", "2.0", 200)


@pytest.mark.parametrize("value", ['"quoted"', "white space", "x" * 129, "../x", "<script>", ""])
def test_an_unsafe_request_id_is_replaced(gate: Front, value: str) -> None:
    answer = gate.ask(X_Request_Id=value)
    assert re.fullmatch(r"[0-9a-f-]{36}", answer.headers["x-request-id"])
    assert answer.json["headers"]["x-request-id"] == answer.headers["x-request-id"]


FORGED = 'e","client":"ceo","status":500,"canary":"2.0'


@pytest.mark.parametrize("key", [True, False])
def test_a_second_request_id_is_checked_too(gate: Front, key: bool) -> None:
    request = head(gate, "X-Request-Id: good", f"X-Request-Id: {FORGED}", "Connection: close", "Content-Length: 0")
    answer = gate.raw(request if key else request.replace(b"Authorization", b"X-Other"))
    match = re.search(rb"x-request-id: ([0-9a-f-]{36})\r\n", answer)
    assert match, answer
    assert gate.log_of(match[1].decode())["client"] == ("first" if key else "-")


def test_request_ids_differ_on_a_kept_connection(gate: Front) -> None:
    connection = HTTPConnection("127.0.0.1", gate.port, timeout=10)
    with contextlib.closing(connection):
        seen = set()
        for _ in range(3):
            connection.request("POST", "/predictions/m", b"x", {"Authorization": f"Bearer {gate.key}"})
            seen.add(Answer.read(connection).headers["x-request-id"])
    assert len(seen) == 3


def test_traceparent_is_kept_or_made(gate: Front) -> None:
    own = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    kept = gate.ask(traceparent=own)
    assert kept.json["headers"]["traceparent"] == own
    assert gate.log_of(kept.headers["x-request-id"])["traceparent"] == own
    for bad in ("00-" + "0" * 32 + "-b7ad6b7169203331-01", "00-" + "a" * 32 + "-" + "0" * 16 + "-01", "x"):
        made = gate.ask(traceparent=bad).json["headers"]["traceparent"]
        assert made != bad
        assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-00", made)


@pytest.mark.parametrize("second", ["00-" + "a" * 32 + "-" + "b" * 16 + "-00", f"x{FORGED}"])
def test_of_two_traceparents_none_is_kept(gate: Front, second: str) -> None:
    first = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    twice = (f"traceparent: {first}", f"traceparent: {second}")
    answer = gate.raw(head(gate, *twice, "X-Request-Id: traced-twice", "Connection: close", "Content-Length: 0"))
    match = re.search(rb'"traceparent": "(00-[0-9a-f]{32}-[0-9a-f]{16}-00)"', answer)
    assert match, answer
    assert match[1].decode() not in (first, second)
    assert gate.log_lines()[-1]["traceparent"] not in (first, second)


@pytest.mark.parametrize("path", ['/predictions/"', "/predictions/m/", "////", "/predictions/m?"])
@pytest.mark.parametrize("method", ["POST", "P" * 20_000])
def test_a_long_request_is_one_json_line_too(gate: Front, method: str, path: str) -> None:
    request_id = uuid.uuid4().hex * 4
    target = path + path[-1] * 9_000
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    request = head(gate, f"X-Request-Id: {request_id}", f"traceparent: {trace}", "Connection: close")
    gate.raw(request.replace(b"POST /predictions/m", f"{method} {target}".encode()))
    line = gate.log_of(request_id)
    assert line["traceparent"] == trace
    assert line["path"] == target.partition("?")[0][:2048]
    assert line["method"] in (method, "<BADREQ>")


def test_every_request_is_one_json_line(gate: Front) -> None:
    gate.raw(head(gate, "X-A: b", "Connection: close", "Content-Length: 0").replace(b"/predictions/m", b'/a"\\b'))
    gate.raw(b"garbage\r\n\r\n")
    gate.ask(key=None)
    line = gate.log_of(gate.ask(body=b"123", X_Request_Id="whole-line").headers["x-request-id"])
    assert line == {
        **line,
        "event": "request",
        "client": "first",
        "method": "POST",
        "path": "/predictions/m",
        "status": 200,
        "retries": "0",
        "termination": "--",
        "deadline_ms": "3000",
        "source": "127.0.0.1",
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert line["server"] in ("torchserve1", "torchserve2")
    assert re.fullmatch(r"127\.0\.0\.1:\d+", line["replica"])
    for name in ("bytes_in", "bytes_out", "request_ms", "queue_ms", "connect_ms", "response_ms", "total_ms"):
        assert isinstance(line[name], int)
    # log_lines() parses every line: a quote in a path or a request that was no HTTP must not break one.
    assert {400, 401, 404} <= {one["status"] for one in gate.log_lines()}


# --------------------------------------------------------------------------------------------------- retries and replicas


@pytest.mark.parametrize(
    "mode",
    ["status:507:x", "status:500:Worker died.", "status:503:ServiceUnavailableException", "drop"],
    ids=["507 of a killed worker", "500 Worker died", "503 no worker", "connection closed"],
)
def test_what_one_replica_cannot_do_the_other_does(gate: Front, mode: str) -> None:
    names = {gate.ask(x_mode=f"{mode}@{broken}").json["name"] for broken in ("a", "b") for _ in range(4)}
    assert names == {"a", "b"}


@pytest.mark.parametrize(
    ("mode", "status", "code"),
    [
        ("status:507:x", 502, "replica-lost"),
        ("status:500:Worker died.", 502, "replica-lost"),
        ("drop", 502, "replica-lost"),
        ("status:503:Prediction failed", 500, "prediction-failed"),
    ],
)
def test_retries_are_bounded(gate: Front, replicas: list[Backend], mode: str, status: int, code: str) -> None:
    before = sum(backend.served() for backend in replicas)
    answer = gate.ask(x_mode=mode)
    assert (answer.status, answer.problem()) == (status, code)
    assert sum(backend.served() for backend in replicas) - before == 1 + gate.running.config.retries


@pytest.mark.parametrize("status", [400, 422, 500, 503])
def test_a_handlers_own_error_passes_and_is_not_retried(gate: Front, replicas: list[Backend], status: int) -> None:
    before = sum(backend.served() for backend in replicas)
    answer = gate.ask(x_mode=f"problem:{status}")
    assert (answer.status, answer.json) == (status, {"own": status})
    assert answer.headers["content-type"] == "application/problem+json"
    assert sum(backend.served() for backend in replicas) - before == 1


@pytest.mark.parametrize(
    ("mode", "status", "code"),
    [
        ("status:404:ModelNotFoundException", 404, "model-not-found"),
        ("status:413:x", 413, "payload-too-large"),
        ("status:500:ErrorDataDecoderException", 500, "prediction-failed"),
    ],
)
def test_torchserves_own_errors_become_problems(gate: Front, mode: str, status: int, code: str) -> None:
    answer = gate.ask(x_mode=mode)
    assert (answer.status, answer.problem()) == (status, code)


def test_errors_that_close_connections_do_not_disturb_others(gate: Front) -> None:
    with Load(gate, clients=3) as good, Load(gate, clients=3, headers={"X-Mode": "problem:422"}) as bad:
        good.wait_for(200)
        bad.wait_for(100)
    assert good.failures() == []
    assert {status for status, _ in bad.answers} == {422}


def test_killing_a_replica_under_load_fails_no_request(tmp_path: Path) -> None:
    with backends("a", "b") as [first, second], front(tmp_path, [first.replica, second.replica]) as gate:
        with Load(gate, headers={"X-Mode": "sleep:0.01"}) as load:
            load.wait_for(50)
            first.process.send_signal(signal.SIGKILL)
            gate.wait_ready(1)
            load.wait_for(100)
        assert load.failures() == []
        assert max(took for _, took in load.answers) < 2


def test_a_replica_that_is_not_ready_leaves_within_a_second(tmp_path: Path) -> None:
    with backends("a", "b") as [first, second], front(tmp_path, [first.replica, second.replica]) as gate:
        with Load(gate, headers={"X-Mode": "sleep:0.05"}) as load:
            load.wait_for(50)
            first.set_ready(False)
            wait_until(lambda: gate.ready_replicas() == 1, "out of service", within_s=1.0, log=gate.running.log)
            wait_until(lambda: (n := first.served()) == settle(first, n), "no request arrives there any more")
            resting = first.served()
            load.wait_for(50)
            assert first.served() == resting
            first.set_ready(True)
            gate.wait_ready(2)
            load.wait_for(50)
            wait_until(lambda: first.served() > resting, "requests arrive there again")
        assert load.failures() == []


def test_what_waits_in_vain_at_one_replica_is_asked_of_the_other(tmp_path: Path) -> None:
    with backends("a", "b") as [first, second], front(tmp_path, [first.replica, second.replica]) as gate:
        answers: list[Answer] = []
        waiting = [
            threading.Thread(target=lambda: answers.append(gate.ask(x_mode="sleep:15@a", X_Deadline_Ms="20000")))
            for _ in range(4)
        ]
        for thread in waiting:
            thread.start()
        wait_until(lambda: first.served() + second.served() == 4, "all are at a replica")
        assert first.served() > 0
        began = time.monotonic()
        first.set_stuck()
        for thread in waiting:
            thread.join(30)
        assert [(answer.status, answer.json["name"]) for answer in answers] == [(200, "b")] * 4
        assert time.monotonic() - began < 8


def test_a_replica_that_drains_finishes_what_it_has(tmp_path: Path) -> None:
    with backends("a") as [first], front(tmp_path, [first.replica]) as gate:
        answers: list[Answer] = []
        slow = threading.Thread(target=lambda: answers.append(gate.ask(x_mode="sleep:2")))
        slow.start()
        wait_until(lambda: first.served() == 1, "the slow request is being served")
        first.set_ready(False)
        slow.join(30)
        assert [answer.status for answer in answers] == [200]
        wait_until(lambda: gate.ask().status == 503, "nothing new goes there")


def settle(backend: Backend, before: int) -> int:
    """The number served a moment later: equal to `before` when nothing is on its way any more."""
    time.sleep(0.1)
    return before if backend.served() == before else -1


def test_a_client_that_goes_away_frees_its_place(tmp_path: Path) -> None:
    with backends("a") as [backend], front(tmp_path, [backend.replica], max_inflight=1) as gate:
        connection = HTTPConnection("127.0.0.1", gate.port, timeout=10)
        connection.request("POST", "/predictions/m", b"x", {"Authorization": f"Bearer {gate.key}", "X-Mode": "sleep:3"})
        wait_until(lambda: backend.served() == 1, "the request is being served")
        connection.close()
        began = time.monotonic()
        assert gate.ask().status == 200
        assert time.monotonic() - began < 1.5


# -------------------------------------------------------------------------------------------------------- TLS, DNS, starting


def test_tls_with_a_generated_certificate(tmp_path: Path) -> None:
    pem = gateway.create_certificate(tmp_path / "secrets", ["localhost", "127.0.0.1"])
    port = free_port()
    with (
        backends("a") as [backend],
        front(tmp_path, [backend.replica], tls_bind=f"127.0.0.1:{port}", certificate=pem) as gate,
    ):
        trust = ssl.create_default_context(cafile=pem.with_suffix(".crt"))
        connection = HTTPSConnection("127.0.0.1", port, context=trust, timeout=10)
        with contextlib.closing(connection):
            connection.request("POST", "/predictions/m", b"x", {"Authorization": f"Bearer {gate.key}"})
            assert Answer.read(connection).status == 200
        assert b"marina_gateway_certificate_expiry_timestamp_seconds" in credentials(gate).body


def test_replicas_are_found_by_name(tmp_path: Path) -> None:
    hosts = ["127.0.0.11", "127.0.0.12"]
    port, control_port = free_port(), free_port()
    addresses = list(hosts)
    with (
        backends("a", "b", hosts=hosts, port=port, control_port=control_port) as found,
        name_server(addresses) as resolver,
        front(tmp_path, (), wait=2, service=f"torchserve:{port}", health_port=control_port, resolver=resolver) as gate,
        Load(gate) as load,
    ):
        load.wait_for(50)
        assert all(backend.served() > 0 for backend in found)
        addresses.remove(hosts[1])
        gate.wait_ready(1)
        load.wait_for(50)
    assert load.failures() == []


@contextlib.contextmanager
def name_server(addresses: list[str]) -> Iterator[str]:
    """A DNS server that answers every A question with `addresses`, which the test may change."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(0.1)
        ended = threading.Event()

        def answer() -> None:
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    query, asker = server.recvfrom(4096)
                    server.sendto(_dns_answer(query, addresses), asker)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            ended.set()
            thread.join()


def _dns_answer(query: bytes, addresses: list[str]) -> bytes:
    end = query.index(b"\0", 12) + 5
    wanted = addresses if struct.unpack("!H", query[end - 4 : end - 2])[0] == 1 else []
    records = b"".join(b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 1, 4) + socket.inet_aton(host) for host in wanted)
    return query[:2] + struct.pack("!HHHHH", 0x8180, 1, len(wanted), 0, 0) + query[12:end] + records


def test_a_taken_port_is_one_clear_error(gate: Front, tmp_path: Path) -> None:
    config = gate.running.config.model_copy(update={"metrics_bind": f"127.0.0.1:{free_port()}"})
    with pytest.raises(PortBusy, match=f"cannot listen on 127.0.0.1:{gate.port}") as caught:
        gateway.start_gateway(config, tmp_path / "log")
    assert caught.value.exit_code == 6


def test_a_missing_clients_file_is_one_clear_error(tmp_path: Path) -> None:
    config = GatewayConfig(service="torchserve:8080", clients=tmp_path / "none", bind=f"127.0.0.1:{free_port()}",
                           metrics_bind=f"127.0.0.1:{free_port()}")  # fmt: skip
    with pytest.raises(ServerError, match=f"{tmp_path}/none: No such file") as caught:
        gateway.start_gateway(config, tmp_path / "log")
    assert caught.value.remedy


def test_stop_answers_what_is_in_flight(tmp_path: Path) -> None:
    with backends("a") as [backend], front(tmp_path, [backend.replica]) as gate:
        answers: list[Answer] = []
        asking = threading.Thread(target=lambda: answers.append(gate.ask(x_mode="sleep:0.5")))
        asking.start()
        wait_until(lambda: backend.served() == 1, "the request is being served")
        assert gate.running.stop(drain_s=5) == 0
        asking.join()
        assert answers[0].status == 200
