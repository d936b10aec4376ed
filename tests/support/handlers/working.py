"""Takes LOADS megabytes and LOADING seconds to load; each request sleeps for as many milliseconds as its body says. Behind
a real `handlerlib.quarantine.Guard`; can be parked."""

import json
import os
import sys
import time

sys.path.insert(0, os.environ["HANDLERLIB"])

from handlerlib import parking, quarantine


class Working:
    def initialize(self, context):
        self.guard = quarantine.guard()
        self.kept = os.urandom(1 << 20) * int(os.environ.get("LOADS", "0"))
        time.sleep(float(os.environ.get("LOADING", "0")))

    def handle(self, data, context):
        if parking.is_describe(data, context.get_all_request_header(0)):
            return [parking.describe()]
        return self.guard.run([bytes(row["body"]) for row in data], lambda inputs: [*map(self.one, inputs)])

    def one(self, body):
        time.sleep(float(body) / 1e3)
        return json.dumps({"pid": os.getpid()})
