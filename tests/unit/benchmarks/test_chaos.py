"""The pieces of the chaos harness that judge: they must be able to say no."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import pytest

from benchmarks.chaos import cases, checks, resources
from benchmarks.chaos.__main__ import _joined, _judged, table
from benchmarks.chaos.bench import Finding
from benchmarks.chaos.echoing import Counted, Wish, ask_all

EXPECTED = {"1.0": [[0.9, 0.1], [0.2, 0.8]], "2.0": [[0.6, 0.4], [0.3, 0.7]]}


def answer(version: str, *probabilities: float) -> bytes:
    labels = [{"label": str(index), "index": index, "probability": value} for index, value in enumerate(probabilities)]
    return json.dumps({"model": "m", "version": version, "predictions": [labels]}).encode()


class TestAnswers:
    check = staticmethod(checks.of_its_version({"expected": EXPECTED, "tolerance": 1e-3, "refused": [1]}))

    @pytest.mark.parametrize("version", ["1.0", "2.0"])
    def test_either_version_may_answer(self, version: str) -> None:
        assert self.check(0, answer(version, *EXPECTED[version][0])) == ""

    @pytest.mark.parametrize(
        ("payload", "body"),
        [
            pytest.param(0, answer("2.0", 0.9, 0.1), id="the other version's answer"),
            pytest.param(0, answer("1.0", 0.2, 0.8), id="another image's answer"),
            pytest.param(0, answer("3.0", 0.9, 0.1), id="an unknown version"),
            pytest.param(1, answer("1.0", 0.2, 0.8), id="a damaged image"),
        ],
    )
    def test_anything_else_is_wrong(self, payload: int, body: bytes) -> None:
        assert self.check(payload, body)


def test_every_so_manieth_payload_is_damaged_and_always_the_same_way() -> None:
    images = tuple(random.Random(index).randbytes(200) for index in range(20))
    made = cases.Cases({}, images, EXPECTED, 1e-3)
    damaged = [index for index, item in enumerate(made.payloads(10)) if item.body != images[index]]
    assert damaged == [9, 19] == made.check(10).settings["refused"]
    assert made.payloads(10) == made.payloads(10)
    assert [item.body for item in made.payloads()] == list(images)


class TestSlope:
    def test_of_an_exact_line(self) -> None:
        found = resources.fit(range(10), [3.0 + 2.0 * item for item in range(10)])
        assert found.per_unit == pytest.approx(2.0)
        assert found.low == pytest.approx(2.0) and found.high == pytest.approx(2.0)

    def test_noise_alone_has_zero_inside_its_interval(self) -> None:
        draw = random.Random(1)
        inside = 0
        for _ in range(200):
            found = resources.fit(range(40), [draw.gauss(100.0, 5.0) for _ in range(40)])
            inside += found.low <= 0.0 <= found.high
        assert inside >= 180

    def test_a_leak_in_noise_is_certain(self) -> None:
        draw = random.Random(2)
        assert resources.fit(range(60), [draw.gauss(100.0 + item, 5.0) for item in range(60)]).low > 0


def echo_server(mixing: bool) -> Counted:
    """Ask a server that gives every body back, or now and then the one before."""
    before = [b"somebody else's"]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:-2])
                body = await reader.readexactly(int(fields["Content-Length"]))
                sent = before[0] if mixing and body[-1] % 7 == 0 else body
                before[0] = body
                writer.write(
                    b"HTTP/1.1 200 OK\r\nX-Request-Id: %b\r\nContent-Length: %d\r\n\r\n%b"
                    % (fields["X-Request-Id"].encode(), len(sent), sent)
                )
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def ask() -> Counted:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        wish = Wish(host="127.0.0.1", port=port, path="/", key="k", requests=300, connections=8, cancelled=0.1)
        async with server:
            return await ask_all(wish)

    return asyncio.run(ask())


def test_the_identity_client_sees_mixed_answers() -> None:
    found = echo_server(mixing=True)
    assert found.mixed > 10 and found.examples


def test_the_identity_client_gets_every_answer_in_spite_of_cancels() -> None:
    found = echo_server(mixing=False)
    assert (found.right, found.mixed, found.unanswered) == (300, 0, 0)
    assert found.cancelled > 5


def test_a_row_that_cannot_be_measured_is_not_kept() -> None:
    def broken() -> Finding:
        raise ZeroDivisionError("no capacity")

    found = _judged(broken, {"form": "full"})
    assert found["kept"] is False and "no capacity" in found["measured"]
    assert found["form"] == "full" and found["measured_at"] and len(found["others_busy_cores"]) == 2


def test_single_rows_take_their_place_in_the_results(tmp_path: Path) -> None:
    path = tmp_path / "chaos.json"
    head = {"machine": {"cores": 2}}
    path.write_text(json.dumps({"head": head, "rows": {"poison": {"measured": "p", "kept": True}}}))
    soak = {"soak": {"measured": "s", "kept": False}}
    value = _joined(path, head | {"seconds": 5}, soak)
    assert value["head"]["seconds"] == 5 and set(value["rows"]) == {"poison", "soak"}
    assert table(value).count("\n") == 3 and "| s | no |" in table(value)
    assert set(_joined(path, {"machine": {"cores": 64}}, soak)["rows"]) == {"soak"}
