"""Each test here is run on both engines; on vLLM's where vLLM is installed (``pytest -m vllm``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conformance.lab import KINDS, Lab, make_lab
from tests.vllm.environment import HAS_VLLM, prepare
from tests.vllm.tiny import TinyWorld, make_world

_PARAMS = [
    # vLLM's and its dependencies' warnings are not ours to heed.
    pytest.param(kind, marks=[pytest.mark.vllm, pytest.mark.filterwarnings("default")])
    if kind == "vllm"
    else kind
    for kind in KINDS
]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """A tiny model in a folder, and adapters for it."""
    return make_world(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=_PARAMS)
def lab(request: Any, world: TinyWorld) -> Iterator[Lab]:
    """A started engine, which the tests of a module share."""
    yield from _lab(request.param, world, starts=True)


@pytest.fixture(params=_PARAMS)
def idle_lab(request: Any, world: TinyWorld) -> Iterator[Lab]:
    """An engine that is not started, for one test alone."""
    yield from _lab(request.param, world, starts=False)


def _lab(kind: str, world: TinyWorld, *, starts: bool) -> Iterator[Lab]:
    if kind == "vllm":
        if not HAS_VLLM:
            pytest.skip("needs vLLM: make test-vllm")
        prepare()
    lab = make_lab(kind, world)
    try:
        if starts:
            lab.engine.start()
        yield lab
    finally:
        lab.engine.stop()
