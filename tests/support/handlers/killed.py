import os
import signal


class Killed:
    def initialize(self, context):
        os.kill(os.getpid(), signal.SIGKILL)

    def handle(self, data, context):
        return [b""] * len(data)
