"""The worker's side of the protocol: JSON requests on stdin, JSON answers on stdout.

Standard library only, as it runs in the environment of every peer.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

Operation = Callable[..., dict[str, Any]]


def serve(operations: Mapping[str, Operation]) -> None:
    """Answer requests with the operation they name, until stdin ends.

    A request is ``{"op": name, ...arguments}``; its answer ``{"ok": true, ...}`` with what the
    operation returned, or ``{"ok": false, "error": text}``. ``{"op": "pin", "cores": [...]}``
    confines the process and whatever threads it starts from then on.
    """
    answers = _private_stdout()
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        name = request.pop("op")
        try:
            answer = _pin(**request) if name == "pin" else operations[name](**request)
            answer = {"ok": True, **answer}
        except Exception as error:
            traceback.print_exc()
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        # Whoever asked has ended or was killed. Processes that an engine started may outlive it,
        # with gigabytes of memory; they are in the group that this process leads.
        os.killpg(os.getpid(), signal.SIGKILL)


def _pin(cores: list[int]) -> dict[str, Any]:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    return {}


def _private_stdout() -> Any:
    """What was stdout, for answers alone: libraries that print now write to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answers
