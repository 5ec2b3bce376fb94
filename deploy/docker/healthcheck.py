"""Exit status 0 if the server in this container answers ``/healthz`` with 200."""

import http.client
import os
import sys

try:
    connection = http.client.HTTPConnection(
        "127.0.0.1", int(os.environ.get("REFT_PORT", "8000")), timeout=4
    )
    connection.request("GET", "/healthz")
    status = connection.getresponse().status
except OSError as error:
    sys.exit(f"no answer: {error}")
sys.exit(None if status == 200 else f"status {status}")
