"""The sending half of the load generator, run as a process of its own: sockets, a schedule, counts, nothing else.

    python -S load_engine.py          (started by marina.loadgen, which speaks to it over standard input and output)

It shares the machine with the server it measures, so it is written for few instructions per request: raw non-blocking
sockets under epoll, requests prepared as bytes, an answer parsed no further than its length, one dictionary increment per
sample. It imports the standard library only, to start in milliseconds.

Latency is counted from the moment a request was *planned* for, not from the moment it could be sent: when a stalled
server holds all connections, the requests that should have been sent meanwhile carry the wait in their latency. Counting
from the sending would leave them out ("coordinated omission": Gil Tene, How NOT to Measure Latency, 2013; wrk2). In a closed
loop each connection plans its next request for the moment its last answer arrived.

Times are nanoseconds of CLOCK_MONOTONIC, the same clock in every process of a machine.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import re
import resource
import select
import socket
import ssl
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

SUB_BUCKETS = 1024
"""Buckets per factor of two: a bucket is at most 1/1024 of its value wide."""
_SUB_BITS = SUB_BUCKETS.bit_length() - 1
MOST_WINDOWS = 128
"""When so many windows are full, neighbours are merged and windows are twice as long from then on: memory stays flat."""
FIRST_WINDOW_NS = 125_000_000
REPORT_NS = 500_000_000
MOST_FAILURES = 100
"""Failures that are kept one by one; all are counted."""
_MOST_ANSWERS = 256
"""Different answers of one payload whose verdict is remembered; further ones are checked each time."""
_DETAIL_BYTES = 200
_BACK_OFF_NS = 100_000_000
_SWEEP_NS = 50_000_000
_MOST_HEAD = 65536
_RECEIVE = 65536
_RECEIVE_FIRST = 4096
"""Enough for most answers as a whole; the large buffer costs a microsecond."""

_IN = select.POLLIN
_OUT = select.POLLOUT
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)[ \t]*\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[^\r\n]*chunked[ \t]*\r\n", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection:[^\r\n]*close", re.IGNORECASE)
_KEEP_ALIVE = re.compile(rb"\r\nconnection:[^\r\n]*keep-alive", re.IGNORECASE)
_REQUEST_ID = re.compile(rb"\r\nx-request-id:[ \t]*([^\r\n]*)", re.IGNORECASE)

Histogram = dict[int, int]
"""Bucket -> samples in it."""


def bucket(microseconds: int) -> int:
    """The bucket of a latency: whole microseconds below 2 ms, then 1024 buckets to each factor of two.

    The layout of HdrHistogram (Gil Tene, hdrhistogram.org), as sparse counts.
    """
    if microseconds < 2 * SUB_BUCKETS:
        return microseconds
    shift = microseconds.bit_length() - _SUB_BITS - 1
    return (shift << _SUB_BITS) + (microseconds >> shift)


def bucket_value(index: int) -> float:
    """Microseconds in the middle of a bucket."""
    if index < 2 * SUB_BUCKETS:
        return float(index)
    shift = (index >> _SUB_BITS) - 1
    return (((index & (SUB_BUCKETS - 1)) | SUB_BUCKETS) << shift) + ((1 << shift) - 1) / 2


class Windows:
    """What was measured, by the time for which it was planned: at most MOST_WINDOWS windows, however long it takes."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.length = FIRST_WINDOW_NS
        self.latency: list[Histogram] = []
        self.planned: list[int] = []
        self.failed: list[int] = []
        self.good: list[int] = []
        """Good answers by the time of their arrival: what throughput is made of."""

    def _at(self, moment: int) -> int:
        index = (moment - self.start) // self.length
        while index >= MOST_WINDOWS:
            self._merge()
            index = (moment - self.start) // self.length
        while index >= len(self.planned):
            self.latency.append({})
            self.planned.append(0)
            self.failed.append(0)
            self.good.append(0)
        return index

    def plan(self, planned: int) -> None:
        """Count a request."""
        index = (planned - self.start) // self.length
        if index >= len(self.planned):
            index = self._at(planned)
        self.planned[index] += 1

    def answer(self, planned: int, arrived: int, slot: int) -> None:
        """Count a good answer whose latency falls into bucket `slot`."""
        last = (arrived - self.start) // self.length
        if last >= len(self.good):
            last = self._at(arrived)
        self.good[last] += 1
        counts = self.latency[(planned - self.start) // self.length]  # planned before it arrived: the window exists
        counts[slot] = counts.get(slot, 0) + 1

    def fail(self, planned: int) -> None:
        """Count a request without a good answer."""
        self.failed[self._at(planned)] += 1

    def _merge(self) -> None:
        self.length *= 2
        self.planned = _paired(self.planned)
        self.failed = _paired(self.failed)
        self.good = _paired(self.good)
        merged = self.latency[::2]
        for target, other in zip(merged, self.latency[1::2], strict=False):
            for slot, count in other.items():
                target[slot] = target.get(slot, 0) + count
        self.latency = merged

    def as_json(self) -> dict[str, Any]:
        return {
            "start": self.start,
            "length": self.length,
            "planned": self.planned,
            "failed": self.failed,
            "good": self.good,
            "latency": [list(item.items()) for item in self.latency],
        }


def _paired(values: list[int]) -> list[int]:
    return [sum(values[index : index + 2]) for index in range(0, len(values), 2)]


class _Connection:
    __slots__ = (
        "fd",
        "missing",
        "out",
        "payload",
        "planned",
        "raw",
        "received",
        "sent",
        "sock",
        "state",
        "wake",
        "watches_out",
    )

    def __init__(self) -> None:
        self.sock: socket.socket | None = None
        self.fd = -1
        self.raw = True
        """No TLS: bytes of the socket are bytes of the answer."""
        self.state = _CLOSED
        self.planned = 0
        """0: nothing is asked for."""
        self.sent = 0
        self.payload = 0
        self.out: memoryview | None = None
        self.received = bytearray()
        self.missing = 0
        """Bytes that an answer in pieces still lacks; 0: not known."""
        self.wake = 0
        self.watches_out = False


_CLOSED, _CONNECTING, _SHAKING, _OPEN = range(4)


class Engine:
    """One process's share of a scenario. `plan` is what marina.loadgen wrote, `requests` the bytes to send in turn."""

    def __init__(self, plan: Mapping[str, Any], requests: Sequence[bytes], control: BinaryIO, report: BinaryIO) -> None:
        self.requests = list(requests)
        self.control = control
        self.report = report
        self.address = (int(plan["family"]), tuple(plan["address"]))
        self.tls = _tls(plan)
        self.server_name = str(plan["host"])
        self.no_body = plan["method"] == "HEAD"
        self.timeout = int(plan["timeout"] * 1e9)
        self.limit = int(plan["connections"])
        self.check = _check(plan)
        self.verdicts: list[dict[bytes, str]] = [{} for _ in self.requests]
        self.schedule = _schedule(plan)
        self.next_planned = 0
        self.turn = int(plan["share"]) % len(self.requests)
        self.step = 1
        self.poller: Any = select.epoll() if hasattr(select, "epoll") else select.poll()
        self.seconds_per_poll_unit = 1.0 if hasattr(select, "epoll") else 1e-3
        self.by_fd: dict[int, _Connection] = {}
        self.busy: set[_Connection] = set()
        self.idle: list[_Connection] = []
        self.sleeping: list[_Connection] = []
        self.count = 0
        """Connections that exist, whatever their state."""
        self.waiting: deque[int] = deque()
        """Open loop: planned times of requests for which no connection was free."""
        self.windows: Windows | None = None
        self.start = 0
        self.end = 0
        self.drain_until = 0
        self.service: Histogram = {}
        self.outcomes: dict[str, Histogram] = {}
        self.failures: list[dict[str, Any]] = []
        self.behind: Histogram = {}
        self.connects = 0
        self.requests_sent = 0
        self.longest = 0
        self.sum_us = 0
        self.good = self.bad = self.good_us = 0
        """Since the last report."""
        self.stopping = False
        self.orphaned = False

    # ---- the loop

    def run(self) -> dict[str, Any]:
        """Send until told to stop or the end is reached and the last answers are in; the counts."""
        now = time.monotonic_ns()
        self.poller.register(self.control.fileno(), _IN)
        if self.schedule is None:
            for _ in range(self.limit):
                self.count += 1
                self._begin(_Connection(), now)
        else:
            self.next_planned = now + self.schedule()
        next_report, next_sweep = now + REPORT_NS, now + _SWEEP_NS
        poll, clock = self.poller.poll, time.monotonic_ns
        fine = self.schedule is not None and hasattr(select, "epoll")
        while not self._finished(now):
            wait = min(next_report, next_sweep) - now
            if self.schedule is not None and not self._closing(self.next_planned):
                wait = min(wait, self.next_planned - now)
            if fine and wait > 0:
                # epoll counts in milliseconds; a plan needs better than that
                select.select([self.poller], [], [], wait / 1e9)
                events = poll(0)
            else:
                events = poll(max(0.0, wait / 1e9) / self.seconds_per_poll_unit)
            for fd, event in events:
                connection = self.by_fd.get(fd)
                if connection is None:
                    if fd == self.control.fileno():
                        self._listen()
                    continue
                if event & _OUT and connection.watches_out:
                    self._writable(connection)
                else:
                    self._readable(connection)
            now = clock()
            while self.waiting and self.count < self.limit:
                self.count += 1
                self._connect(_Connection(), self.waiting.popleft(), now)
            if self.schedule is not None and self.next_planned <= now:
                self._send_planned(now)
            if now >= next_sweep:
                self._sweep(now)
                next_sweep = now + _SWEEP_NS
            if now >= next_report:
                self._tell(now)
                next_report = now + REPORT_NS
        return self._result(now)

    def _finished(self, now: int) -> bool:
        if self.orphaned:
            return True
        if not self._closing(now):
            return False
        return (not self.busy and not self.waiting) or (0 < self.drain_until <= now)

    def _closing(self, moment: int) -> bool:
        """Whether no request is planned for that moment any more."""
        return self.stopping or (self.end > 0 and moment >= self.end)

    def _send_planned(self, now: int) -> None:
        assert self.schedule is not None
        while self.next_planned <= now and not self._closing(self.next_planned):
            planned = self.next_planned
            self.next_planned += self.schedule()
            self._count_planned(planned)
            if self.idle:
                self._count_behind(planned)
                self._request(self.idle.pop(), planned, time.monotonic_ns())
            elif self.count < self.limit:
                self.count += 1
                self._count_behind(planned)
                connection = _Connection()
                self._connect(connection, planned, now)
            else:
                self.waiting.append(planned)

    def _begin(self, connection: _Connection, now: int) -> None:
        """Closed loop: the connection's next request, planned for now."""
        if self._closing(now):
            self.idle.append(connection)
            return
        self._count_planned(now)
        if connection.state == _OPEN:
            self._request(connection, now, now)
        else:
            self._connect(connection, now, now)

    def _next(self, connection: _Connection, now: int) -> None:
        """What a connection does that has no request in hand."""
        if self.schedule is None:
            self._begin(connection, now)
        elif connection.state != _OPEN:
            self.count -= 1
        elif self.waiting:
            self._request(connection, self.waiting.popleft(), now)
        else:
            self.idle.append(connection)

    # ---- one connection

    def _connect(self, connection: _Connection, planned: int, now: int) -> None:
        """`planned` then is sent as soon as the connection stands."""
        connection.planned = planned
        connection.payload = self._turn()
        connection.sent = now
        self.busy.add(connection)
        family, address = self.address
        try:
            sock = socket.socket(family, socket.SOCK_STREAM | getattr(socket, "SOCK_CLOEXEC", 0))
        except OSError as error:  # no file descriptor left: our limit, not the server's
            self._fail(connection, "connect", f"no socket: {error.strerror}")
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Room for a whole photo: one call per request instead of several with waiting in between.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 262144)
        connection.sock, connection.fd, connection.state = sock, sock.fileno(), _CONNECTING
        self.by_fd[connection.fd] = connection
        connection.watches_out = True
        self.poller.register(connection.fd, _IN | _OUT)
        self.connects += 1
        try:
            sock.connect(address)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(connection, "connect", error.strerror or str(error))

    def _writable(self, connection: _Connection) -> None:
        if connection.state == _CONNECTING:
            assert connection.sock is not None
            error = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                self._fail(connection, "connect", os.strerror(error))
                return
            if self.tls is not None:
                connection.sock = self.tls.wrap_socket(
                    connection.sock, server_hostname=self.server_name, do_handshake_on_connect=False
                )
                connection.raw, connection.state = False, _SHAKING
            else:
                connection.state = _OPEN
        if connection.state == _SHAKING:
            self._shake(connection)
        elif connection.out is not None:
            self._send(connection, connection.out)
        elif connection.state == _OPEN:
            self._send(connection, self.requests[connection.payload])

    def _shake(self, connection: _Connection) -> None:
        assert isinstance(connection.sock, ssl.SSLSocket)
        try:
            connection.sock.do_handshake()
        except ssl.SSLWantReadError:
            self._watch_out(connection, False)
        except ssl.SSLWantWriteError:
            self._watch_out(connection, True)
        except OSError as error:
            self._fail(connection, "connect", str(error))
        else:
            connection.state = _OPEN
            self._send(connection, self.requests[connection.payload])

    def _request(self, connection: _Connection, planned: int, now: int) -> None:
        connection.planned = planned
        connection.payload = self._turn()
        connection.sent = now
        self.busy.add(connection)
        self._send(connection, self.requests[connection.payload])

    def _send(self, connection: _Connection, data: bytes | memoryview) -> None:
        assert connection.sock is not None
        if connection.out is None:
            connection.sent = time.monotonic_ns()
            self.requests_sent += 1
        try:
            count = connection.sock.send(data)
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            count = 0
        except OSError as error:
            # An answer may wait behind it: a server that refuses a body answers before it closes.
            if not self._rescue(connection):
                self._fail(connection, "reset", error.strerror or str(error))
            return
        if count == len(data):
            connection.out = None
            if connection.watches_out:
                self._watch_out(connection, False)
        else:
            connection.out = memoryview(data)[count:]
            if not connection.watches_out:
                self._watch_out(connection, True)

    def _rescue(self, connection: _Connection) -> bool:
        assert connection.sock is not None
        with contextlib.suppress(OSError):
            data = connection.sock.recv(_RECEIVE)
            if data:
                connection.out = None
                connection.received += data
                self._parse(connection, bytes(connection.received), ended=True)
                return True
        return False

    def _watch_out(self, connection: _Connection, wanted: bool) -> None:
        connection.watches_out = wanted
        self.poller.modify(connection.fd, _IN | _OUT if wanted else _IN)

    def _readable(self, connection: _Connection) -> None:
        if connection.state != _OPEN:
            if connection.state == _SHAKING:
                self._shake(connection)
            elif connection.state == _CONNECTING:
                self._writable(connection)
            return
        assert connection.sock is not None
        while True:
            try:
                data = connection.sock.recv(_RECEIVE if connection.received else _RECEIVE_FIRST)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            except OSError as error:
                self._lost(connection, error.strerror or str(error))
                return
            if not data:
                self._ended(connection)
                return
            if not connection.planned:
                self._close(connection)  # bytes that nobody asked for
                self._drop(connection)
                return
            if connection.received:
                connection.received += data
                if len(connection.received) >= connection.missing:
                    self._parse(connection, bytes(connection.received), ended=False)
            else:
                self._parse(connection, data, ended=False)
            if connection.raw or connection.sock is None or not connection.sock.pending():  # type: ignore[attr-defined]
                return

    def _ended(self, connection: _Connection) -> None:
        """The server closed: the end of an answer without a length, of an idle connection, or a broken answer."""
        if connection.planned and connection.received:
            self._parse(connection, bytes(connection.received), ended=True)
        else:
            self._lost(connection, "closed before the answer")

    def _lost(self, connection: _Connection, why: str) -> None:
        if connection.planned:
            self._fail(connection, "reset", why)
        else:
            self._close(connection)
            self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        """An idle connection is no more."""
        with contextlib.suppress(ValueError):
            self.idle.remove(connection)
            self.count -= 1

    def _close(self, connection: _Connection) -> None:
        if connection.sock is not None:
            with contextlib.suppress(OSError, KeyError, ValueError):
                self.poller.unregister(connection.fd)
            self.by_fd.pop(connection.fd, None)
            with contextlib.suppress(OSError):
                connection.sock.close()
        connection.sock, connection.fd, connection.state = None, -1, _CLOSED
        connection.raw, connection.out, connection.watches_out = True, None, False
        connection.received = bytearray()
        connection.missing = 0

    # ---- one answer

    def _parse(self, connection: _Connection, data: bytes, *, ended: bool) -> None:
        """All that came for the request in hand -> an answer, or wait for more."""
        head = data.find(b"\r\n\r\n")
        if head < 0:
            if ended or len(data) > _MOST_HEAD or not b"HTTP/".startswith(data[:5]):
                self._fail(connection, "protocol" if not ended else "reset", "no HTTP answer")
            else:
                self._wait_for(connection, data, 0)
            return
        if data[:7] != b"HTTP/1." or not data[9:12].isdigit():
            self._fail(connection, "protocol", "no HTTP/1 answer")
            return
        status = int(data[9:12])
        if status < 200 and status != 101:
            rest = data[head + 4 :]
            connection.received = bytearray(rest)
            connection.missing = 0
            if rest:
                self._parse(connection, rest, ended=ended)
            elif ended:
                self._fail(connection, "reset", "closed before the answer")
            return
        begin = head + 4
        closes = ended or _says_close(data, head)
        at = data.find(b"ength: ", 0, head)  # content-length as nearly everybody writes it
        found = None
        if self.no_body or status in (204, 304):  # whatever length they name
            length = 0
        elif at > 8 and data[at - 9 : at].lower() == b"\ncontent-l":
            length = int(data[at + 7 : data.find(b"\r\n", at)])
        elif (found := _LENGTH.search(data, 0, head + 2)) is not None:
            length = int(found[1])
        elif _CHUNKED.search(data, 0, head + 2):
            self._parse_chunks(connection, data, begin, status, ended=ended, closes=closes)
            return
        else:
            if ended:
                self._done(connection, status, data[begin:], data[:head], closes=True)
            else:
                self._wait_for(connection, data, 0)
            return
        missing = begin + length - len(data)
        if missing == 0:
            self._done(connection, status, data[begin:], data[:head], closes=closes)
        elif missing > 0:
            if ended:
                self._fail(connection, "reset", f"closed {missing} bytes before the end of the answer")
            else:
                self._wait_for(connection, data, begin + length)
        else:
            self._fail(connection, "protocol", f"{-missing} bytes after the end of the answer")

    def _parse_chunks(
        self, connection: _Connection, data: bytes, begin: int, status: int, *, ended: bool, closes: bool
    ) -> None:
        parts: list[bytes] = []
        at = begin
        while True:
            line = data.find(b"\r\n", at)
            if line < 0:
                break
            try:
                size = int(data[at:line].split(b";", 1)[0], 16)
            except ValueError:
                self._fail(connection, "protocol", "a chunk without a size")
                return
            if size == 0:
                # Trailers end with an empty line; without any it follows at once.
                if data[line : line + 4] == b"\r\n\r\n" or data.find(b"\r\n\r\n", line) >= 0:
                    self._done(connection, status, b"".join(parts), data[: begin - 4], closes=closes)
                    return
                break
            if line + 2 + size + 2 > len(data):
                break
            parts.append(data[line + 2 : line + 2 + size])
            at = line + 2 + size + 2
        if ended:
            self._fail(connection, "reset", "closed inside a chunked answer")
        else:
            self._wait_for(connection, data, 0)

    def _wait_for(self, connection: _Connection, data: bytes, total: int) -> None:
        if len(connection.received) != len(data):
            connection.received = bytearray(data)
        connection.missing = total

    def _done(self, connection: _Connection, status: int, body: bytes, head: bytes, *, closes: bool) -> None:
        now = time.monotonic_ns()
        planned, payload = connection.planned, connection.payload
        connection.planned = 0
        if connection.received:
            connection.received = bytearray()
        connection.missing = 0
        self.busy.discard(connection)
        if status < 400:
            wrong = self._verdict(payload, body) if self.check is not None else ""
            if wrong:
                self._count_failure(planned, now, "wrong answer", wrong, payload, head)
            else:
                self._count_answer(planned, connection.sent, now)
        else:
            detail = body[:_DETAIL_BYTES].decode("utf-8", "replace")
            self._count_failure(planned, now, f"HTTP {status}", detail, payload, head)
        if closes or connection.out is not None:
            self._close(connection)
        self._next(connection, now)

    def _verdict(self, payload: int, body: bytes) -> str:
        assert self.check is not None
        known = self.verdicts[payload]
        verdict = known.get(body)
        if verdict is None:
            try:
                verdict = self.check(payload, body)
            except Exception as error:  # noqa: BLE001 - an answer that a check cannot read is a wrong one
                verdict = f"{type(error).__name__}: {error}"
            if len(known) < _MOST_ANSWERS:
                known[body] = verdict
        return verdict

    def _fail(self, connection: _Connection, outcome: str, detail: str) -> None:
        now = time.monotonic_ns()
        planned, payload = connection.planned, connection.payload
        connection.planned = 0
        self.busy.discard(connection)
        self._close(connection)
        self._count_failure(planned, now, outcome, detail, payload, b"")
        if outcome == "connect" and self.schedule is None:
            connection.wake = now + _BACK_OFF_NS
            self.sleeping.append(connection)
        else:
            self._next(connection, now)

    def _sweep(self, now: int) -> None:
        """Requests that waited too long, and connections that waited to try again."""
        oldest = now - self.timeout
        for connection in [item for item in self.busy if item.planned <= oldest]:
            self._fail(connection, "timeout", f"no answer within {self.timeout / 1e9:g} s")
        while self.waiting and self.waiting[0] <= oldest:
            self._count_failure(self.waiting.popleft(), now, "timeout", "no connection was free", 0, b"")
        ready = [item for item in self.sleeping if item.wake <= now]
        if ready:
            self.sleeping = [item for item in self.sleeping if item.wake > now]
            for connection in ready:
                self._begin(connection, now)

    # ---- counting

    def _turn(self) -> int:
        payload = self.turn
        self.turn = (payload + self.step) % len(self.requests)
        return payload

    def _measured(self, planned: int) -> bool:
        return self.windows is not None and planned >= self.start and (self.end == 0 or planned < self.end)

    def _count_planned(self, planned: int) -> None:
        if self.windows is not None and self._measured(planned):
            self.windows.plan(planned)

    def _count_behind(self, planned: int) -> None:
        """How late we are ourselves, where a connection could be had: more than a little and the client is the limit."""
        if self._measured(planned):
            slot = bucket(max(0, time.monotonic_ns() - planned) // 1000)
            self.behind[slot] = self.behind.get(slot, 0) + 1

    def _count_answer(self, planned: int, sent: int, now: int) -> None:
        microseconds = (now - planned) // 1000
        self.good += 1
        self.good_us += microseconds
        if self.windows is not None and planned >= self.start and (self.end == 0 or planned < self.end):
            self.windows.answer(planned, now, bucket(microseconds))
            slot = bucket((now - sent) // 1000)
            self.service[slot] = self.service.get(slot, 0) + 1
            self.sum_us += microseconds
            if microseconds > self.longest:
                self.longest = microseconds

    def _count_failure(self, planned: int, now: int, outcome: str, detail: str, payload: int, head: bytes) -> None:
        self.bad += 1
        if self.windows is None or not self._measured(planned):
            return
        self.windows.fail(planned)
        counts = self.outcomes.setdefault(outcome, {})
        slot = bucket((now - planned) // 1000)
        counts[slot] = counts.get(slot, 0) + 1
        if len(self.failures) < MOST_FAILURES:
            found = _REQUEST_ID.search(head)
            self.failures.append(
                {
                    "at": planned,
                    "outcome": outcome,
                    "detail": detail,
                    "payload": payload,
                    "request_id": found[1].decode("ascii", "replace") if found else "",
                }
            )

    # ---- the parent

    def _listen(self) -> None:
        line = self.control.readline()
        if not line:
            self.orphaned = True
            return
        order = json.loads(line)
        if order["do"] == "measure":
            self.start, self.end = order["start"], order["end"]
            self.windows = Windows(self.start)
        elif order["do"] == "end":
            now = time.monotonic_ns()
            self.end = min(self.end or now, now)
            self.stopping = True
            self.drain_until = now + int(order["drain"] * 1e9)
        if self.stopping:
            for connection in self.sleeping:
                self._close(connection)
            self.sleeping = []

    def _tell(self, now: int) -> None:
        self._write({"at": now, "good": self.good, "bad": self.bad, "us": self.good_us})
        self.good = self.bad = self.good_us = 0

    def _result(self, now: int) -> dict[str, Any]:
        for connection in list(self.busy):
            self._count_failure(connection.planned, now, "unfinished", "the run was stopped", connection.payload, b"")
        for planned in self.waiting:
            self._count_failure(planned, now, "unfinished", "the run was stopped", 0, b"")
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "result": {
                "windows": self.windows.as_json() if self.windows is not None else None,
                "start": self.start,
                "end": self.end or now,
                "service": list(self.service.items()),
                "outcomes": {name: list(counts.items()) for name, counts in self.outcomes.items()},
                "behind": list(self.behind.items()),
                "failures": self.failures,
                "longest_us": self.longest,
                "sum_us": self.sum_us,
                "cpu_seconds": used.ru_utime + used.ru_stime,
                "requests_sent": self.requests_sent,
                "connects": self.connects,
            }
        }

    def _write(self, value: Mapping[str, Any]) -> None:
        self.report.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")
        self.report.flush()


def _says_close(data: bytes, head: int) -> bool:
    if data[7:8] == b"0":
        return _KEEP_ALIVE.search(data, 0, head) is None
    return data.find(b"lose", 0, head) >= 0 and _CLOSE.search(data, 0, head) is not None


def _schedule(plan: Mapping[str, Any]) -> Callable[[], int] | None:
    """Nanoseconds to the next planned request; None in a closed loop."""
    rate = plan["rate"]
    if rate is None:
        return None
    if plan["arrivals"] == "poisson":
        draw = random.Random(f"{plan['seed']}/{plan['share']}").expovariate
        per_nanosecond = rate / 1e9
        return lambda: int(draw(per_nanosecond))
    gap = 1e9 / rate
    state = [0, 0]

    def constant() -> int:
        """Rounded so that no error adds up."""
        state[0] += 1
        moment = int(state[0] * gap)
        step, state[1] = moment - state[1], moment
        return step

    return constant


def _tls(plan: Mapping[str, Any]) -> ssl.SSLContext | None:
    if not plan["tls"]:
        return None
    context = ssl.create_default_context(cafile=plan["ca_file"])
    if plan["insecure"]:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _check(plan: Mapping[str, Any]) -> Callable[[int, bytes], str] | None:
    if plan["check"] is None:
        return None
    sys.path[:] = plan["path"]
    module, _, factory = plan["check"].partition(":")
    made: Callable[[int, bytes], str] = getattr(importlib.import_module(module), factory)(plan["check_settings"])
    return made


def main() -> None:
    """Read the plan and the requests, say that it is ready, run, write the result."""
    control = sys.stdin.buffer
    # The kernel may wake a sleeper 50 microseconds late to save power; a plan is worth more here.
    with contextlib.suppress(OSError), open("/proc/self/timerslack_ns", "w") as slack:  # noqa: PTH123 - pathlib costs 5 ms
        slack.write("1")
    raw = open(control.fileno(), "rb", buffering=0, closefd=False)  # noqa: SIM115 - epoll sees no bytes in a buffer
    size, count = struct.unpack("!II", _exactly(raw, 8))
    plan = json.loads(_exactly(raw, size))
    lengths = struct.unpack(f"!{count}I", _exactly(raw, 4 * count))
    requests = [_exactly(raw, length) for length in lengths]
    report = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a check prints must not disturb the report
    try:
        engine = Engine(plan, requests, raw, report)
    except Exception as error:  # noqa: BLE001 - a check that cannot be imported, a certificate that cannot be read
        report.write(json.dumps({"refused": f"{type(error).__name__}: {error}"}).encode() + b"\n")
        report.flush()
        return
    engine._write({"ready": True})
    if _exactly(raw, 1) != b"g":
        return
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
    engine._write(engine.run())


def _exactly(stream: BinaryIO, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = stream.read(size - len(parts))
        if not part:
            sys.exit(1)
        parts += part
    return bytes(parts)


if __name__ == "__main__":
    main()
