"""The image's health check: status 0 when the supervisor says that every model is ready. No curl in the image."""

import http.client
import os
import sys

port = int(os.environ.get("MARINA_SUPERVISOR_PORT", "8083"))
try:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    connection.request("GET", "/readyz")
    answer = connection.getresponse()
    sys.stdout.write(answer.read(1000).decode(errors="replace"))
except OSError as error:
    sys.exit(f"no supervisor on port {port}: {error}")
sys.exit(answer.status != 200)
