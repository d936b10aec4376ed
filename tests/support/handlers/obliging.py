"""Does what the body says: `sleep S`, `exit N`, `raise`, `problem N`, `environment`; else counts the bytes."""

import json
import os
import time


class Obliging:
    def initialize(self, context):
        self.version = context.manifest["model"]["modelVersion"]
        self.name = context.model_name

    def handle(self, data, context):
        return [self.one(bytes(row["body"]).decode(), index, context) for index, row in enumerate(data)]

    def one(self, body, index, context):
        word, _, argument = body.partition(" ")
        if word == "sleep":
            time.sleep(float(argument))
        if word == "exit":
            os._exit(int(argument))
        if word == "raise":
            raise ValueError("asked to")
        if word == "problem":
            context.set_response_status(int(argument), "Problem", index)
            context.set_response_content_type(index, "application/problem+json")
            return json.dumps({"title": "Asked for", "status": int(argument), "detail": "as told", "instance": "id-1"})
        label = json.dumps(dict(os.environ)) if word == "environment" else str(len(body))
        answer = {"label": label, "index": 0, "probability": 1.0}
        return json.dumps({"model": self.name, "version": self.version, "predictions": [[answer]]})
