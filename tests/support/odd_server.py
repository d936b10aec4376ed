"""A small HTTP server inside the test that answers as its paths say, and counts what it saw.

/ok                 200 with the body `right`                /chunked        the same, in chunks with a trailer
/echo               the request's body                       /until-close    the same, without a length, then closed
/close              200 and `Connection: close`              /drip           the same, a few bytes at a time
/status/503         that status                              /early          100, then 200
/reset              the connection is cut without an answer  /half           cut in the middle of the answer
/hang               no answer at all                         /nonsense       no HTTP
/stall              all answers wait while `stall` is running
/every/N/PATH       every Nth request as PATH, the others as /ok
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

RIGHT = b"right"


@dataclass(slots=True)
class OddServer:
    """Its address, and what it saw."""

    port: int = 0
    scheme: str = "http"
    requests: Counter[str] = field(default_factory=Counter)
    bodies: Counter[bytes] = field(default_factory=Counter)
    headers: list[bytes] = field(default_factory=list)
    connections: int = 0
    stalled_until: float = 0.0
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def url(self, path: str) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}{path}"

    def stall(self, seconds: float) -> None:
        """From now on no answer leaves, for so long."""
        self._loop.call_soon_threadsafe(self._stall, seconds)

    def _stall(self, seconds: float) -> None:
        self.stalled_until = self._loop.time() + seconds

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, TimeoutError, ssl.SSLError):
                while await self._one(reader, writer):
                    pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays."""
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split(b" ", 2)[1].decode()
        length = next(
            (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length")), 0
        )
        body = await reader.readexactly(length)
        self.requests[path] += 1
        self.bodies[body] += 1
        if len(self.headers) < 10:
            self.headers.append(head)
        if path.startswith("/every/"):
            every, _, rest = path.removeprefix("/every/").partition("/")
            path = f"/{rest}" if self.requests.total() % int(every) == 0 else "/ok"
        return await self._answer(path, body, writer)

    async def _answer(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> bool:
        kind = path.strip("/").partition("/")[0]
        if kind == "reset":
            writer.transport.abort()
            return False
        if kind == "hang":
            await asyncio.sleep(3600)
        if kind == "stall" and (left := self.stalled_until - self._loop.time()) > 0:
            await asyncio.sleep(left)
        pieces = list(_pieces(kind, path, body))
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            if len(pieces) > 1:
                await asyncio.sleep(0.002)
        if kind == "half":
            writer.transport.abort()
        return kind not in ("half", "close", "until-close", "nonsense")


def _pieces(kind: str, path: str, body: bytes) -> Iterator[bytes]:
    """The answer, cut where the connection shall be cut."""
    whole = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\ncontent-length: 5\r\nx-request-id: abc\r\n\r\n" + RIGHT
    if kind == "status":
        status = path.rsplit("/", 1)[1].encode()
        yield b"HTTP/1.1 %b Odd\r\nx-request-id: id-1\r\nContent-Length: 4\r\n\r\nbusy" % status
    elif kind == "chunked":
        yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nri\r\n"
        yield b"3;x=y\r\nght\r\n"
        yield b"0\r\nX-Trailer: 1\r\n\r\n"
    elif kind == "until-close":
        yield b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nri"
        yield b"ght"
    elif kind == "drip":
        yield from (whole[index : index + 7] for index in range(0, len(whole), 7))
    elif kind == "close":
        yield whole.replace(b"x-request-id: abc", b"Connection: Close")
    elif kind == "half":
        yield whole[:-2]
    elif kind == "early":
        yield b"HTTP/1.1 100 Continue\r\n\r\n"
        yield whole
    elif kind == "nonsense":
        yield b"220 mail.example.org ESMTP\r\n\r\n"
    elif kind == "echo":
        yield b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    else:
        yield whole


@contextlib.contextmanager
def odd_server(context: ssl.SSLContext | None = None) -> Iterator[OddServer]:
    """The server, in a thread of its own."""
    found = OddServer(scheme="https" if context is not None else "http")
    started = threading.Event()

    async def main() -> None:
        listener = await asyncio.start_server(found._serve, "127.0.0.1", 0, ssl=context, limit=1 << 24)
        found.port = listener.sockets[0].getsockname()[1]
        started.set()
        await stop.wait()
        listener.close()
        for writer in list(found._writers):
            writer.transport.abort()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0.05)  # the transports close their sockets in rounds of the loop that follow

    stop = asyncio.Event()

    def run() -> None:
        found._loop.run_until_complete(main())
        found._loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(10), "the server did not start"
    try:
        yield found
    finally:
        found._loop.call_soon_threadsafe(stop.set)
        thread.join(10)


def refusing_port() -> int:
    """A port at which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
