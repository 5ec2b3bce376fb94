"""The real small model, the example adapters and one engine for all tests here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from reft_core.adapter import Adapter, read_adapter
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.loading import DEMO_MODEL, LoadedModel, load_model

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("sentiment", "intent", "json_answer", "emoji")


def adapter_path(name: str) -> Path:
    """The file of an example adapter."""
    return EXAMPLES / name / f"{name}.safetensors"


def test_rows(name: str, count: int) -> list[dict[str, str]]:
    """The first rows of an example's test split, none of which it was trained on."""
    lines = (EXAMPLES / name / "test.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:count]]


test_rows.__test__ = False  # type: ignore[attr-defined]  # not a test, whatever its name


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The model as transformers runs it, touched by no engine; for reference results."""
    return load_model(DEMO_MODEL)


@pytest.fixture(scope="session")
def served() -> LoadedModel:
    """The model that the engine takes over; ``smollm2`` stays untouched for references."""
    return load_model(DEMO_MODEL)


@pytest.fixture(scope="session")
def adapters() -> dict[str, Adapter]:
    """The example adapters, by name."""
    return {name: read_adapter(adapter_path(name)) for name in NAMES}


@pytest.fixture(scope="session")
def engine(served: LoadedModel, adapters: dict[str, Adapter]) -> Iterator[EmbeddedEngine]:
    """A running engine in float32 with every example adapter loaded."""
    engine = EmbeddedEngine(served, EngineConfig(max_model_len=512, max_prefill_tokens=200))
    for adapter in adapters.values():
        engine.load_adapter(adapter)
    engine.start()
    yield engine
    engine.stop()
