"""Answers with the size of the batch; `wait FILE` says so in FILE.started and is answered when FILE is there."""

import time
from pathlib import Path


class Batches:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        bodies = [bytes(row["body"]) for row in data]
        for body in bodies:
            if body.startswith(b"wait "):
                self.wait(Path(body[5:].decode()))
        return [str(len(bodies)).encode() for _ in bodies]

    def wait(self, gate):
        gate.with_suffix(".started").touch()
        deadline = time.monotonic() + 30.0
        while not gate.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
