"""A worker for the protocol's tests."""

import os
import sys
import time

from benchmarks.peers.loop import serve


def run(
    prompts: list[list[int]], output_tokens: int, settings: dict[str, float]
) -> dict[str, object]:
    """Answers that count up, noisily and as slowly as the settings say."""
    print("a library that prints to stdout")
    time.sleep(settings.get("sleep_s", 0))
    seconds = settings.get("seconds", 1.0)
    return {"seconds": seconds, "tokens": [[*range(output_tokens)] for _ in prompts]}


def fail(text: str) -> dict[str, object]:
    """An error that the caller is told."""
    raise ValueError(text)


def leave() -> dict[str, object]:
    """An end without an answer."""
    print("out of memory", file=sys.stderr, flush=True)
    os._exit(3)


if __name__ == "__main__":
    serve({"run": run, "fail": fail, "leave": leave})
