"""The worker protocol against TorchServe's own code: the same requests read, the same replies written."""

from __future__ import annotations

import json
import socket
import struct
import threading
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ts.context import Context, RequestProcessor
from ts.protocol import otf_message_handler as stock
from ts.service import Service

from handlerlib import protocol
from handlerlib.protocol import Reader, Writer

text = st.text(max_size=20)
kinds = st.sampled_from(["application/json", "text/plain", "image/jpeg", "", "application/json; charset=utf-8"])
values = st.one_of(
    st.binary(max_size=100),
    st.recursive(st.none() | st.integers() | text, lambda inner: st.lists(inner, max_size=3), max_leaves=5).map(
        lambda value: json.dumps(value).encode()
    ),
    # Around the sizes at which the reader changes its way.
    st.integers(0, 700_000).map(lambda size: bytes(range(256)) * (size // 256) + b"x" * (size % 256)),
)
names = st.sampled_from(["body", "data", "Content-Type", "top_k"]) | text
requests = st.tuples(
    text.filter(bool),
    st.lists(st.tuples(names, text), max_size=6),
    st.lists(st.tuples(names, kinds, values), max_size=3),
)
batches = st.lists(requests, max_size=5)
# Java writes what it has, and the kernel hands it over, in any pieces.
pieces = st.lists(st.integers(1, 300_000), min_size=1, max_size=8)


def counted(value: bytes) -> bytes:
    return struct.pack("!i", len(value)) + value


def message(batch: list[Any]) -> bytes:
    parts = [b"I"]
    for request_id, headers, inputs in batch:
        parts.append(counted(request_id.encode()))
        parts += [counted(name.encode()) + counted(value.encode()) for name, value in headers]
        parts.append(struct.pack("!i", -1))
        parts += [counted(n.encode()) + counted(kind.encode()) + counted(value) for n, kind, value in inputs]
        parts.append(struct.pack("!i", -1))
    return b"".join([*parts, struct.pack("!i", -1)])


class Sending:
    """Sends bytes in pieces of the given sizes, in a thread: more than a socket holds must not block the test."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self.connection, self._far = socket.socketpair()
        self._thread = threading.Thread(target=self._send, args=(data, sizes))
        self._thread.start()

    def _send(self, data: bytes, sizes: list[int]) -> None:
        at, turn = 0, 0
        while at < len(data):
            size = sizes[turn % len(sizes)]
            self._far.sendall(data[at : at + size])
            at, turn = at + size, turn + 1
        self._far.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._thread.join(timeout=30)
        self.connection.close()
        self._far.close()


@given(frames=st.lists(batches, min_size=1, max_size=3), sizes=pieces, decode=st.sampled_from([None, "true", "false"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large])
def test_reads_what_torchserve_reads(
    frames: list[list[Any]], sizes: list[int], decode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if decode is None:
        monkeypatch.delenv("TS_DECODE_INPUT_REQUEST", raising=False)
    else:
        monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", decode)
    whole = b"".join(map(message, frames))
    ours, theirs = Sending(whole, sizes), Sending(whole, [len(whole)])
    reader = Reader(ours.connection)
    try:
        for _ in frames:
            assert reader.recv(1) == stock.PREDICT_MSG
            batch = reader.batch()
            _, expected = stock.retrieve_msg(theirs.connection)
            headers, rows, ids = Service.retrieve_data_for_inference(expected)
            assert batch.ids == ids
            assert batch.rows == rows
            assert [[type(value) for value in row.values()] for row in batch.rows] == [
                [type(value) for value in row.values()] for row in rows
            ]
            assert batch.headers == [processor.get_request_properties() for processor in headers]
        with pytest.raises(SystemExit) as ended:
            reader.batch()
        assert ended.value.code == 0  # java has gone: no failure
    finally:
        ours.close()
        theirs.close()


answers = st.tuples(
    text.filter(bool),
    st.none() | st.integers(100, 599),
    st.none() | text,
    st.dictionaries(st.sampled_from(["content-type", "x-a", "ts_stream_next"]) | text, text, max_size=3),
    st.binary(max_size=200) | st.binary(max_size=20).map(bytearray) | text | st.lists(st.integers(), max_size=3),
)


def answered(given_answers: list[Any]) -> Context:
    context = Context("m", "", {}, 1, None, "0.12.0")
    context.request_processor = []
    for _, status, phrase, headers, _ in given_answers:
        processor = RequestProcessor({})
        processor.report_status(status, phrase)
        for name, value in headers.items():
            processor.add_response_property(name, value)
        context.request_processor.append(processor)
    return context


@given(rows=st.lists(st.lists(answers, max_size=4), min_size=1, max_size=3), code=st.integers(200, 599), note=text)
def test_writes_the_bytes_that_torchserve_writes(rows: list[list[Any]], code: int, note: str) -> None:
    writer = Writer(stock.create_predict_response)
    for batch in rows:  # one writer for all: heads are kept
        ids = {index: one[0] for index, one in enumerate(batch)}
        bodies = [one[4] for one in batch]
        expected = stock.create_predict_response(bodies, ids, note, code, answered(batch))
        assert bytes(writer(bodies, ids, note, code, context=answered(batch))) == bytes(expected)
        assert bytes(writer(None, ids, note, code)) == bytes(stock.create_predict_response(None, ids, note, code))


def test_many_different_heads_do_not_fill_the_memory() -> None:
    writer = Writer(stock.create_predict_response)
    for number in range(3 * protocol._HEADS_KEPT):
        writer([b""], {0: "id"}, "", 200, context=answered([("id", 200, None, {"x-id": str(number)}, b"")]))
    assert len(writer._heads) <= protocol._HEADS_KEPT
