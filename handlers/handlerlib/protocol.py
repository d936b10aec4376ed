"""TorchServe's worker protocol, read and written with few system calls and few copies.

TorchServe 0.12 reads every length, name and value of a request with a `recv` of its own (some 50 for one request), prints
two lines per batch, and grows the reply by many small appends. `speed_up` puts this module's reader and writer in their
place, inside the running worker and only when its four modules are, byte for byte, those of TorchServe 0.12.0; with any
other version the worker stays as it is. What a handler sees is the same, and so is every byte that java reads; the one
thing left out is TorchServe's `PredictionTime` line per batch (`marina_handle_seconds` says the same, added up).

The frames, big-endian, as `ts.protocol.otf_message_handler` has them; TEXT is an int32 length and that many bytes:

    request batch   "I", then per request: TEXT id, per header (TEXT name, TEXT value), int32 -1,
                    per input (TEXT name, TEXT content type, TEXT value), int32 -1; then int32 -1
    reply           int32 code, TEXT message, then per request: TEXT id, TEXT content type, int32 status, TEXT phrase,
                    int32 number of headers, per header (TEXT name, TEXT value), TEXT body; then int32 -1
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import socket
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

KNOWN_MODULES: Mapping[str, str] = {
    "ts.context": "57eee89d1f8bf8a21fd89c62a322077a31c7aa01df8e0fc28a7c0dc6327bcf08",
    "ts.model_service_worker": "3640d5ae3d03e229cc1980f8bfbb3642865cb49f9ead1769bf41a30aa4e75343",
    "ts.protocol.otf_message_handler": "83e82dc62b4a95a362efe4518786c6b389b895b85acaf37721aaff042ec9989a",
    "ts.service": "f18259269551299d25f4e9d2bdc916c8308c10233501df08196cc7cfa2d0d291",
}
"""Source files of TorchServe 0.12.0 that this module knows, with their sha256."""

_WORKER_FILE = "ts/model_service_worker.py"
_PREDICTION_TIME = "PredictionTime"
_BUFFER_BYTES = 256 * 1024
"""Above what a Unix socket holds at once, so that one system call takes all there is."""
_HEADS_KEPT = 256

_int = struct.Struct("!i")
_two_ints = struct.Struct("!ii")

Inputs = dict[str, Any]
"""One request's inputs by name: what a handler gets as a row."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch of requests, as `Service.retrieve_data_for_inference` would hand it to the handler."""

    headers: list[dict[str, Any]]
    """Per request: its headers, and for each input a dict with its content type."""
    rows: list[Inputs]
    ids: dict[int, str]
    """TorchServe's request id by position."""


class Reader:
    """Buffered reading of one connection. Stands in for the socket wherever TorchServe wants to `recv`."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        decode = os.environ.get("TS_DECODE_INPUT_REQUEST")
        self._decodes_inputs = decode is None or decode == "true"

    def recv(self, count: int) -> bytes:
        """At most `count` bytes; none when the other side has gone, as of a socket."""
        if self._start == self._end:
            self._start, self._end = 0, self.connection.recv_into(self._view)
        taken = self._view[self._start : min(self._start + count, self._end)].tobytes()
        self._start += len(taken)
        return taken

    def batch(self) -> Batch:
        """The rest of a frame whose command byte has been read. Exits with 0 when java has gone."""
        batch = Batch([], [], {})
        while (length := self._int()) != -1:
            batch.ids[len(batch.rows)] = self._text(length)
            sent = {}
            while (length := self._int()) != -1:
                name = self._text(length)
                sent[name] = self._text(self._int())
            headers: dict[str, Any] = {}
            row: Inputs = {}
            while (length := self._int()) != -1:
                name = self._text(length)
                kind = self._text(self._int())
                row[name] = self._input(self._value(self._int()), kind)
                headers[name] = {"content-type": kind}
            # A header of an input's name takes its place, as in TorchServe.
            headers.update(sent)
            batch.headers.append(headers)
            batch.rows.append(row)
        return batch

    def _int(self) -> int:
        start = self._start
        if self._end - start < 4:
            start = self._fetch(4)
        self._start = start + 4
        found: int = _int.unpack_from(self._buffer, start)[0]
        return found

    def _text(self, length: int) -> str:
        start = self._start
        end = start + length
        if end > self._end:
            if length > _BUFFER_BYTES:
                return self._value(length).decode()
            start = self._fetch(length)
            end = start + length
        self._start = end
        return str(self._view[start:end], "utf-8")

    def _value(self, length: int) -> bytearray:
        """Copied once: out of the buffer as far as it is there, from the socket to its place beyond that."""
        start = self._start
        end = start + length
        if end <= self._end:
            self._start = end
            return self._buffer[start:end]
        have = self._end - start
        value = bytearray(length)
        value[:have] = self._view[start : self._end]
        self._start = self._end = 0
        with memoryview(value) as rest:
            while have < length:
                # What follows a small rest belongs to the next request: better read together with it.
                if length - have < _BUFFER_BYTES // 4:
                    rest[have:] = self._view[(at := self._fetch(length - have)) : at + length - have]
                    self._start = at + length - have
                    break
                have += self._received(self.connection.recv_into(rest[have:]))
        return value

    def _fetch(self, length: int) -> int:
        """Have at least `length` bytes in the buffer, at most its size; returns where they start."""
        have = self._end - self._start
        if self._start + length > len(self._buffer) or not have:
            self._buffer[:have] = self._view[self._start : self._end].tobytes()
            self._start, self._end = 0, have
        while self._end - self._start < length:
            self._end += self._received(self.connection.recv_into(self._view[self._end :]))
        return self._start

    @staticmethod
    def _received(count: int) -> int:
        if count == 0:
            logging.info("Frontend disconnected.")
            sys.exit(0)
        return count

    def _input(self, value: bytearray, kind: str) -> Any:
        """As TorchServe decodes it: JSON and text, unless its setting `decode_input_request` is false."""
        if not self._decodes_inputs:
            return value
        if kind == "application/json":
            try:
                return json.loads(value.decode("utf-8"))
            except Exception:
                logging.warning("Failed json decoding of input data. Forwarding encoded payload", exc_info=True)
        elif kind.startswith("text"):
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError:
                logging.warning("Failed utf-8 decoding of input data. Forwarding encoded payload", exc_info=True)
        return value


class Writer:
    """Replies of one worker. Anything unusual is left to TorchServe's own function, given as `fallback`."""

    def __init__(self, fallback: Callable[..., Any]) -> None:
        self._fallback = fallback
        self._heads: dict[tuple[Any, ...], bytes] = {}

    def __call__(
        self,
        ret: Sequence[Any] | None,
        req_id_map: Mapping[int, str],
        message: str,
        code: int,
        context: Any = None,
        ts_stream_next: bool = False,
    ) -> Any:
        """The same bytes as `ts.protocol.otf_message_handler.create_predict_response`, whose arguments these are."""
        if context is None or ret is None or ts_stream_next or context.stopping_criteria:
            return self._fallback(ret, req_id_map, message, code, context, ts_stream_next)
        text = message.encode()
        parts: list[bytes | bytearray] = [_two_ints.pack(code, len(text)), text]
        add = parts.append
        pack = _int.pack
        for index, request_id in req_id_map.items():
            body = ret[index]
            if isinstance(body, str):
                body = body.encode()
            processor = context.request_processor[index]
            headers = processor.get_response_headers()
            if not isinstance(body, bytes | bytearray) or "ts_stream_next" in headers:
                return self._fallback(ret, req_id_map, message, code, context, ts_stream_next)
            name = request_id.encode()
            add(pack(len(name)))
            add(name)
            add(self._head(processor.get_response_status_code(), processor.get_response_status_phrase(), headers))
            add(pack(len(body)))
            add(body)
        add(pack(-1))
        return b"".join(parts)

    def _head(self, status: int | None, phrase: str | None, headers: Mapping[str, str]) -> bytes:
        """Content type, status and headers of one answer; most answers share a few."""
        key = (status, phrase, *headers.items())
        head = self._heads.get(key)
        if head is None:
            if len(self._heads) >= _HEADS_KEPT:
                self._heads.clear()
            head = self._heads[key] = _encode_head(status, phrase, headers)
        return head


def _encode_head(status: int | None, phrase: str | None, headers: Mapping[str, str]) -> bytes:
    # Content type and phrase are counted in characters, not bytes: so does TorchServe.
    kind, reason = headers.get("content-type") or "", phrase if phrase is not None else ""
    parts = [_int.pack(len(kind)), kind.encode()]
    parts += [_two_ints.pack(200 if status is None else status, len(reason)), reason.encode(), _int.pack(len(headers))]
    for pair in headers.items():
        for text in pair:
            encoded = text.encode()
            parts += [_int.pack(len(encoded)), encoded]
    return b"".join(parts)


def in_worker(main: ModuleType | None = None) -> bool:
    """Whether this process is TorchServe's worker program."""
    return str(getattr(main or sys.modules["__main__"], "__file__", "")).endswith(_WORKER_FILE)


def speed_up(context: Any, main: ModuleType | None = None) -> bool:
    """Replace the protocol of the TorchServe worker that this process is; called while the model is being loaded.

    `context` is TorchServe's; `main` the worker's main module, for tests. Returns whether it was done. Not done: outside
    a worker, in one of several processes of a model (torchrun), and for any other source than `KNOWN_MODULES`.
    """
    main = main or sys.modules["__main__"]
    if not in_worker(main):
        return False
    if os.environ.get("LOCAL_RANK", "0") != "0" or os.environ.get("WORLD_SIZE", "0") not in ("0", "1"):
        return False
    different = _different_modules(main)
    if different:
        logger.warning("the worker protocol stays TorchServe's own: %s differ from 0.12.0", ", ".join(different))
        return False
    handler: Any = importlib.import_module("ts.protocol.otf_message_handler")
    service: Any = importlib.import_module("ts.service")
    processor = importlib.import_module("ts.context").RequestProcessor
    stock_message, stock_data = handler.retrieve_msg, service.Service.retrieve_data_for_inference
    readers: dict[int, Reader] = {}

    def retrieve_message(connection: socket.socket) -> tuple[bytes, Any]:
        reader = readers.get(id(connection))
        if reader is None or reader.connection is not connection:
            readers.clear()
            reader = readers[id(connection)] = Reader(connection)
        command = reader.recv(1)
        if command == handler.PREDICT_MSG:
            return command, reader.batch()
        # Loading, disconnection and whatever is unknown: byte by byte, by TorchServe.
        found: tuple[bytes, Any] = stock_message(_Replay(command, reader))
        return found

    def data_for_inference(batch: Any) -> tuple[list[Any], list[Inputs], dict[int, str]]:
        if not isinstance(batch, Batch):
            found: tuple[list[Any], list[Inputs], dict[int, str]] = stock_data(batch)
            return found
        return [processor(headers) for headers in batch.headers], batch.rows, batch.ids

    # The names that the running loop and `Service.predict` look up at each batch.
    vars(main)["retrieve_msg"] = retrieve_message
    service.Service.retrieve_data_for_inference = staticmethod(data_for_inference)
    service.create_predict_response = Writer(service.create_predict_response)
    if context.metrics is not None:
        _leave_out_prediction_time(context.metrics)
    return True


@dataclass(slots=True)
class _Replay:
    """A reader with its last byte put back, for TorchServe's own functions."""

    first: bytes
    reader: Reader

    def recv(self, count: int) -> bytes:
        first, self.first = self.first, b""
        return first or self.reader.recv(count)


def _different_modules(main: ModuleType) -> list[str]:
    different = []
    for name, digest in KNOWN_MODULES.items():
        module = main if name == "ts.model_service_worker" else importlib.import_module(name)
        file = getattr(module, "__file__", None)
        if file is None or hashlib.sha256(Path(file).read_bytes()).hexdigest() != digest:
            different.append(name)
    return different


def _leave_out_prediction_time(metrics: Any) -> None:
    stock = metrics.add_time

    def add_time(name: str, *arguments: Any, **options: Any) -> None:
        if name != _PREDICTION_TIME:
            stock(name, *arguments, **options)

    metrics.add_time = add_time
