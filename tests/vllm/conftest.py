"""Tests inside vLLM: they need an environment with vLLM in it, which is apart from the others'.

vLLM reads its settings from the process's environment, and keeps parts of them for good; so the
files here are run one process each (``make test-vllm``).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm.environment import HAS_VLLM, prepare
from tests.vllm.tiny import TinyWorld, make_world


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in this folder, and skip it where there is no vLLM."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("vllm")
            # vLLM's and its dependencies' own; they are not ours to heed.
            item.add_marker(pytest.mark.filterwarnings("default"))
            if not HAS_VLLM:
                item.add_marker(pytest.mark.skip(reason="needs vLLM: make test-vllm"))


@pytest.fixture(scope="session", autouse=True)
def _environment() -> None:
    prepare()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """A tiny model in a folder, and adapters for it."""
    return make_world(tmp_path_factory.mktemp("tiny"))
