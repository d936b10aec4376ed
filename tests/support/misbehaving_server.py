"""A program that answers like one TorchServe with its supervisor, and misbehaves when a request asks for it.

    python misbehaving_server.py NAME HOST PORT CONTROL_PORT     (0: the system chooses; both are printed as JSON)

The request header `X-Mode` says how a prediction is answered; support/gateway.py lists the values. The control port
has GET /readyz, POST /ready/200 (or 404 or 503: what /readyz answers from then on) and POST /served.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NAME, HOST = sys.argv[1], sys.argv[2]
readiness = [200]
served: list[str] = []


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is nothing to report."""


class Prediction(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        # As TorchServe does: what is unsent when the connection is closed is thrown away.
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        super().setup()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        served.append(self.path)
        mode, _, only = self.headers.get("X-Mode", "").partition("@")
        meant = only in ("", NAME) or (only.startswith("/") and self.path.partition("?")[0].endswith(only))
        word, _, rest = mode.partition(":") if meant else ("", "", "")
        if word == "sleep":
            time.sleep(float(rest))
        if word == "drop":
            self.close_connection = True
        elif word == "status":
            code, _, text = rest.partition(":")
            self._error(int(code), "application/json", {"code": int(code), "type": text, "message": text})
        elif word == "problem":
            self._error(int(rest), "application/problem+json", {"own": int(rest)})
        else:
            seen = {"name": NAME, "path": self.path, "bytes": len(body), "headers": dict(self.headers.items())}
            self._answer(200, "application/json", json.dumps(seen).encode())

    def do_GET(self) -> None:
        """Whatever the gateway should have refused is counted and answered, so that a test sees it."""
        self.do_POST()

    def do_DELETE(self) -> None:
        self.do_POST()

    def _error(self, status: int, kind: str, content: object) -> None:
        self.close_connection = True
        self._answer(status, kind, json.dumps(content).encode())
        # The answer must leave before the connection is reset; TorchServe closes after its write is complete.
        self.request.shutdown(socket.SHUT_WR)
        self.request.settimeout(5)
        while self.request.recv(65536):
            pass

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("x-request-id", "made-by-torchserve")
        self.send_header("Server", "netty")
        if self.close_connection:
            self.send_header("Connection", "close")
        # In one write, as TorchServe does: a kill between head and body would lose an answer that nobody could ask for
        # again, and no TorchServe loses it there.
        head = self._headers_buffer  # type: ignore[attr-defined]
        self._headers_buffer = []
        self.wfile.write(b"".join([*head, b"\r\n", body]))

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


class Control(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer(readiness[0] if self.path == "/readyz" else 503, self.headers.get("X-Marina-Up"))

    def do_POST(self) -> None:
        if self.path.startswith("/ready/"):
            readiness[0] = int(self.path.rpartition("/")[2])
        self._answer(200, len(served))

    def _answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


def main() -> None:
    prediction = Server((HOST, int(sys.argv[3])), Prediction)
    control = Server((HOST, int(sys.argv[4])), Control)
    threading.Thread(target=control.serve_forever, daemon=True).start()
    sys.stdout.write(json.dumps([prediction.server_port, control.server_port]) + "\n")
    sys.stdout.flush()
    prediction.serve_forever()


if __name__ == "__main__":
    main()
