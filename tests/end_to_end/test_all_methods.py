"""The real model: every method, prefix and stack in one batch equals each request alone."""

from __future__ import annotations

import pytest

from reft_core.engine.engine import EmbeddedEngine
from reft_core.loading import LoadedModel
from tests.reft_core.engine.test_every_method_in_one_batch import cases
from tests.reft_core.engine.truth import Case, alone, assert_as_alone, run_together

MAX_TOKENS = 2
SIZE = 0.2
"""How far the adapters are from their start: enough to change answers, not to end in noise."""


@pytest.mark.smollm2
def test_every_method_in_one_batch(smollm2: LoadedModel, engine: EmbeddedEngine) -> None:
    mixed = cases(engine.model, SIZE)
    try:
        answers = run_together(engine, mixed, MAX_TOKENS)
    finally:
        for digest in {use.adapter.digest for case in mixed for use in case.stack}:
            engine.unload_adapter(digest)
    num_changed = 0
    for case, answer in zip(mixed, answers, strict=True):
        assert_as_alone(smollm2.model, case, answer)
        plain = alone(smollm2.model, Case(case.prompt), answer.token_ids[:1])
        num_changed += bool((plain[0] - answer.logits[0]).abs().max() > 0.1)
    assert num_changed >= len(mixed) / 2, "the adapters of this test must matter"
