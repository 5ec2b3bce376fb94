"""What vLLM needs of the process that starts it in tests."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

HAS_VLLM = importlib.util.find_spec("vllm") is not None

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}


def prepare() -> None:
    """Set vLLM's variables, but for those that are set."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Workers are started anew and import our packages from where these were imported.
    root = str(Path(__file__).parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *sys.path[1:2]])
