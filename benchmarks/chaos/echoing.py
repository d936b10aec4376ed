"""The identity client: unique bodies, answers that must be the very same, cancels and retries in between.

    python -m benchmarks.chaos.echoing SETTINGS      (JSON; a process of its own; prints one JSON object)

Each connection sends a body that nobody else ever sends, and expects it back, with the request id that it has sent.
Some requests are cancelled (the connection is closed at a random moment, before, while or after the body is sent), and a
request that is refused or lost is sent again, on a new connection. An answer with somebody else's body is the one
thing that must never happen.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_REQUEST_ID = re.compile(rb"\r\nx-request-id:[ \t]*([^\r\n]*)", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection:[^\r\n]*close", re.IGNORECASE)
_MOST_TRIES = 30
_PAUSE_SECONDS = 0.05
_ANSWER_SECONDS = 20.0
_CANCEL_WITHIN = 0.02
"""Seconds after sending: some answers are on their way by then, others still wait in a queue."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What to send where."""

    host: str
    port: int
    path: str
    key: str
    requests: int
    connections: int = 96
    cancelled: float = 0.02
    """Share of the requests that are cancelled, and then sent again."""
    largest: int = 1500
    """Bytes of a body, at most."""
    within: float | None = None
    """Seconds after which no further request begins; None: all are sent."""
    name: str = "0"
    """Part of every body: several clients at once never send the same."""


@dataclass(slots=True)
class Counted:
    """What came back."""

    right: int = 0
    mixed: int = 0
    """Answers with another body than was sent, or with another request's id."""
    unanswered: int = 0
    """Requests given up after all their tries."""
    cancelled: int = 0
    retried: Counter[str] = field(default_factory=Counter)
    """By reason."""
    examples: list[str] = field(default_factory=list)


class _Connection(asyncio.Protocol):
    """One HTTP connection with one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.received = bytearray()
        self.answer: asyncio.Future[tuple[int, bytes, bytes]] | None = None
        self.closes = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        head = self.received.find(b"\r\n\r\n")
        if head < 0:
            return
        found = _LENGTH.search(self.received, 0, head)
        size = int(found[1]) if found else 0
        if len(self.received) < head + 4 + size:
            return
        named = _REQUEST_ID.search(self.received, 0, head)
        self.closes = _CLOSE.search(self.received, 0, head) is not None
        answer = int(self.received[9:12]), named[1] if named else b"", bytes(self.received[head + 4 : head + 4 + size])
        extra = len(self.received) - head - 4 - size
        self.received.clear()
        if self.answer is not None and not self.answer.done():
            if extra:
                self.answer.set_exception(ConnectionError("bytes that nobody asked for"))
            else:
                self.answer.set_result(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closes = True
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(ConnectionError(str(exc or "closed")))


class _Client:
    """One of the connections and the one after it."""

    def __init__(self, wish: Wish, number: int, counted: Counted, numbers: list[int]) -> None:
        self.wish, self.number, self.counted, self.numbers = wish, number, counted, numbers
        self.draw = random.Random(f"{wish.name}/{number}")
        self.connection: _Connection | None = None

    async def run(self) -> None:
        """Until every number is taken, or the time is over."""
        within = self.wish.within
        ends = math.inf if within is None else time.monotonic() + within
        while self.numbers and time.monotonic() < ends:
            await self._one(self.numbers.pop())
        self._close()

    async def _one(self, number: int) -> None:
        name = f"{self.wish.name}-{number}"
        body = f"{name}:".encode() + self.draw.randbytes(self.draw.randrange(self.wish.largest))
        for attempt in range(_MOST_TRIES):
            identity = f"{name}.{attempt}"
            if attempt == 0 and self.draw.random() < self.wish.cancelled:
                await self._cancelled(identity, body)
                self.counted.cancelled += 1
                continue
            try:
                status, named, answer = await asyncio.wait_for(self._ask(identity, body), _ANSWER_SECONDS)
            except OSError as error:  # TimeoutError is one
                self._again(type(error).__name__)
            else:
                if status == 200:
                    self._judge(body, answer, identity, named)
                    return
                self._again(f"HTTP {status}")
            await asyncio.sleep(_PAUSE_SECONDS * min(attempt + 1, 10))
        self.counted.unanswered += 1

    def _again(self, reason: str) -> None:
        self.counted.retried[reason] += 1
        self._close()

    def _judge(self, body: bytes, answer: bytes, identity: str, named: bytes) -> None:
        if answer == body and named == identity.encode():
            self.counted.right += 1
            return
        self.counted.mixed += 1
        if len(self.counted.examples) < 10:
            self.counted.examples.append(f"sent {identity} {body[:40]!r}, got {named!r} {answer[:40]!r}")

    async def _ask(self, identity: str, body: bytes) -> tuple[int, bytes, bytes]:
        connection = await self._connected()
        connection.answer = asyncio.get_running_loop().create_future()
        assert connection.transport is not None
        connection.transport.write(self._request(identity, body))
        answer = await connection.answer
        if connection.closes:
            self._close()
        return answer

    async def _cancelled(self, identity: str, body: bytes) -> None:
        """Close the connection with the request somewhere on its way."""
        with contextlib.suppress(OSError):
            connection = await self._connected()
            connection.answer = None  # an answer that comes all the same is nobody's
            request = self._request(identity, body)
            assert connection.transport is not None
            cut = self.draw.randrange(1, len(request)) if self.draw.random() < 0.2 else len(request)
            connection.transport.write(request[:cut])
            await asyncio.sleep(self.draw.random() * _CANCEL_WITHIN)
        self._close()

    def _request(self, identity: str, body: bytes) -> bytes:
        return (
            f"POST {self.wish.path} HTTP/1.1\r\nHost: {self.wish.host}\r\nAuthorization: Bearer {self.wish.key}\r\n"
            f"Content-Type: application/octet-stream\r\nX-Request-Id: {identity}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode() + body

    async def _connected(self) -> _Connection:
        if self.connection is not None and not self.connection.closes:
            return self.connection
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, self.wish.host, self.wish.port)
        self.connection = connection
        return connection

    def _close(self) -> None:
        if self.connection is not None and self.connection.transport is not None:
            self.connection.transport.abort()
        self.connection = None


async def ask_all(wish: Wish) -> Counted:
    """Every request, until each has its answer or is given up."""
    counted = Counted()
    numbers = list(range(wish.requests))
    await asyncio.gather(*(_Client(wish, number, counted, numbers).run() for number in range(wish.connections)))
    return counted


def as_dict(counted: Counted) -> dict[str, Any]:
    """As JSON shows it."""
    return dataclasses.asdict(counted) | {"retried": dict(counted.retried)}


def main(arguments: Sequence[str]) -> None:
    """`arguments[0]` holds a Wish."""
    counted = asyncio.run(ask_all(Wish(**json.loads(arguments[0]))))
    sys.stdout.write(json.dumps(as_dict(counted)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
