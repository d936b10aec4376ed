"""CPU time that TorchServe's Python worker spends on the protocol alone: stock against `handlerlib.protocol`.

    python benchmarks/worker_protocol.py [--seconds 2] [--json]

Starts TorchServe's own worker program twice, with an echo handler that does or does not call `protocol.speed_up`, plays
java to both in turn over a Unix socket, and reads the worker's CPU time from the kernel (Linux). The headers are those of
`wrk`. Both workers are measured alternately within one run, so that the ratio holds where the absolute figures do not.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METRICS_CONFIG = ROOT / "marina" / "torchserve" / "metrics.yaml"
HANDLER = """
from handlerlib import protocol

class Echo:
    def initialize(self, context):
        if {fast}:
            assert protocol.speed_up(context), "this TorchServe is not the one that handlerlib.protocol knows"

    def handle(self, data, context):
        return [row["body"] for row in data]
"""
CASES = ((784, 1), (784, 16), (784, 64), (116_000, 1), (116_000, 8))
"""(bytes of a body, requests in a batch)."""
HEADERS = {"Host": "127.0.0.1:8080", "Content-Length": "784", "Content-Type": "application/octet-stream"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One case: CPU time of the worker per request, median over the rounds."""

    body_bytes: int
    batch: int
    stock_us: float
    ours_us: float
    ratio: float
    """stock / ours."""


class Worker:
    """One worker program of TorchServe with the echo handler loaded. Close it."""

    def __init__(self, folder: Path, *, fast: bool) -> None:
        folder.mkdir()
        (folder / "echo.py").write_text(HANDLER.format(fast=fast), encoding="ascii")
        spec = find_spec("ts.model_service_worker")
        assert spec is not None and spec.origin is not None, "torchserve is not installed"
        name = folder / "socket.1"
        command = [sys.executable, spec.origin, "--sock-type", "unix", "--sock-name", str(name)]
        self.log = folder / "log"
        environment = dict(os.environ) | {
            "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT / "handlers"))),
            "TS_DECODE_INPUT_REQUEST": "false",
            "PYTHONUNBUFFERED": "1",
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--metrics-config", str(METRICS_CONFIG)],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.connection = _connect(name, self.process)
        self.connection.sendall(_load_message(folder))
        code, length = struct.unpack("!ii", self._exactly(8))
        self._exactly(length + 4)
        assert code == 200, self.log.read_text()

    def ask(self, frame: bytes, answer_bytes: int) -> bytes:
        """One batch and its whole answer."""
        self.connection.sendall(frame)
        return self._exactly(answer_bytes)

    def length_of_answer(self, frame: bytes) -> int:
        """Send one batch and wait until no more of the answer comes."""
        self.connection.sendall(frame)
        self.connection.settimeout(0.5)
        count = 0
        try:
            while True:
                count += len(self.connection.recv(1 << 20))
        except TimeoutError:
            self.connection.settimeout(None)
            return count

    def cpu_seconds(self) -> float:
        """User and system time of the worker's main thread."""
        return int(Path(f"/proc/{self.process.pid}/schedstat").read_text().split()[0]) / 1e9

    def close(self) -> int:
        """The worker ends by itself when java goes; returns its exit status."""
        self.connection.close()
        return self.process.wait(timeout=30)

    def _exactly(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = self.connection.recv(min(1 << 20, count - len(parts)))
            assert part, "the worker has gone"
            parts += part
        return bytes(parts)


def batch_message(bodies: Sequence[bytes]) -> bytes:
    """A batch as java sends it."""
    message = bytearray(b"I")
    for body in bodies:
        message += _text(str(uuid.uuid4()).encode())
        for name, value in HEADERS.items():
            message += _text(name.encode()) + _text(value.encode())
        message += struct.pack("!i", -1)
        message += _text(b"body") + _text(b"application/octet-stream") + _text(body)
        message += struct.pack("!i", -1)
    return bytes(message + struct.pack("!i", -1))


def measure(seconds: float) -> list[Row]:
    """Every case, stock and ours in turn, five rounds of `seconds` / 5 each."""
    with tempfile.TemporaryDirectory() as folder:
        workers = [Worker(Path(folder) / name, fast=name == "ours") for name in ("stock", "ours")]
        try:
            return [_case(workers, *case, seconds / 5) for case in CASES]
        finally:
            for worker in workers:
                worker.close()


def _case(workers: Sequence[Worker], body_bytes: int, batch: int, seconds: float) -> Row:
    frame = batch_message([os.urandom(body_bytes)] * batch)
    lengths = [worker.length_of_answer(frame) for worker in workers]
    assert lengths[0] == lengths[1], f"answers differ in length: {lengths}"
    found: list[list[float]] = [[], []]
    for _ in range(5):
        for worker, per_request in zip(workers, found, strict=True):
            used, count, until = worker.cpu_seconds(), 0, time.monotonic() + seconds
            while time.monotonic() < until:
                worker.ask(frame, lengths[0])
                count += batch
            per_request.append((worker.cpu_seconds() - used) / count * 1e6)
    stock, ours = map(statistics.median, found)
    return Row(body_bytes=body_bytes, batch=batch, stock_us=stock, ours_us=ours, ratio=stock / ours)


def _connect(name: Path, process: subprocess.Popen[bytes]) -> socket.socket:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(name))
        except OSError:
            connection.close()
            assert process.poll() is None, "the worker ended before it listened"
            time.sleep(0.05)
        else:
            return connection
    raise TimeoutError("the worker does not listen")


def _load_message(folder: Path) -> bytes:
    name, handler = _text(b"echo"), _text(b"echo.py")
    return b"L" + name + _text(str(folder).encode()) + struct.pack("!i", 64) + handler + struct.pack("!iib", -1, 0, 1)


def _text(value: bytes) -> bytes:
    return struct.pack("!i", len(value)) + value


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="per case and side")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options.seconds)
    lines = [
        f"{row.body_bytes:10}  {row.batch:5}  {row.stock_us:16.1f}  {row.ours_us:15.1f}  {row.ratio:12.1f}"
        for row in rows
    ]
    table = "\n".join(["body bytes  batch  stock us/request  ours us/request  stock / ours", *lines])
    sys.stdout.write((json.dumps([asdict(row) for row in rows]) if options.json else table) + "\n")


if __name__ == "__main__":
    main()
