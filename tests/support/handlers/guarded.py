"""Does what the body says to a worker, behind a real `handlerlib.quarantine.Guard`: `kill`, `hang`, `spin`, `gpu`,
`grow MB`; else it answers with its process id. It does not load while the file that BROKEN_WHILE names is there."""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, os.environ["HANDLERLIB"])

from handlerlib import parking, quarantine
from handlerlib.errors import InferenceFailed, RequestError


class Guarded:
    def initialize(self, context):
        if Path(os.environ.get("BROKEN_WHILE", "/nowhere")).exists():
            raise OSError("no room in here")
        self.guard = quarantine.guard()
        self.kept = []

    def handle(self, data, context):
        if parking.is_describe(data, context.get_all_request_header(0)):
            return [parking.describe()]
        outputs = self.guard.run([bytes(row["body"]) for row in data], lambda inputs: [*map(self.one, inputs)])
        return [self.answer(output, index, context) for index, output in enumerate(outputs)]

    def one(self, body):
        word, _, argument = body.decode().partition(" ")
        if word == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "hang":
            time.sleep(1000)
        while word == "spin":
            pass
        if word == "gpu":
            error = InferenceFailed("the model failed on this input")
            error.__cause__ = RuntimeError("CUDA error: device-side assert triggered\nand more lines")
            return error
        if word == "grow":
            self.kept.append(b"x" * (int(argument) << 20))
        return json.dumps({"pid": os.getpid()})

    def answer(self, output, index, context):
        if not isinstance(output, RequestError):
            return output
        context.set_response_status(output.status, output.title, index)
        context.set_response_content_type(index, "application/problem+json")
        return output.problem("id")
