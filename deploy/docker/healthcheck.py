"""Exits with 0 if this container's server answers ``/healthz``, or the path given, by 200."""

import http.client
import os
import sys

try:
    connection = http.client.HTTPConnection(
        "127.0.0.1", int(os.environ.get("REFT_PORT", "8000")), timeout=4
    )
    connection.request("GET", sys.argv[1] if len(sys.argv) > 1 else "/healthz")
    status = connection.getresponse().status
except OSError as error:
    sys.exit(f"no answer: {error}")
sys.exit(None if status == 200 else f"status {status}")
