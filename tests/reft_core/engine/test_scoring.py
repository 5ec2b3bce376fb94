"""A request whose completion is given: its tokens' log-probabilities, and nothing sampled."""

from __future__ import annotations

import pytest
import torch

from reft_core.adapter import Adapter
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.errors import InvalidRequest, PromptTooLong
from tests.factories import Recorder
from tests.reference.slow import reference_logits
from tests.reft_core.engine.engines import (
    LONG,
    everywhere,
    make_engine,
    mild_adapter,
    reference_model,
    submit,
)
from tests.reft_core.engine.stepping import finish

PROMPT = tuple(LONG[:9])
COMPLETION = (3, 5, 3, 7)


def score(engine: EmbeddedEngine, adapter: Adapter | None, params: SamplingParams) -> Recorder:
    recorder = Recorder()
    choices = (AdapterChoice(adapter.digest),) if adapter else ()
    name = f"scored-{adapter.digest if adapter else 'base'}"
    engine.submit(Request(name, PROMPT, params, choices, COMPLETION), recorder)
    return recorder


def test_scores_are_the_models_whatever_the_sampling_says() -> None:
    adapters = [None, mild_adapter(), everywhere()]
    engine = make_engine(*adapters[1:])
    odd = SamplingParams(
        max_tokens=1, temperature=2, seed=3, top_k=1, stop_token_ids=frozenset(COMPLETION)
    )
    recorders = [score(engine, adapter, odd) for adapter in adapters]
    finish(engine, *recorders, submit(engine, "sampled", PROMPT))
    for adapter, recorder in zip(adapters, recorders, strict=True):
        tokens = [*PROMPT, *COMPLETION]
        logits = reference_logits(reference_model(), tokens, len(PROMPT), adapter)
        rows = torch.log_softmax(logits[len(PROMPT) - 1 : -1], dim=-1)
        expected = [float(row[token]) for row, token in zip(rows, COMPLETION, strict=True)]
        assert recorder.token_ids == list(COMPLETION)
        assert recorder.finish_reason == "length"
        found = [output.token.logprob for output in recorder.outputs if output.token]
        assert found == pytest.approx(expected, abs=1e-3)


def test_a_completion_is_checked() -> None:
    engine = make_engine(max_model_len=10)
    with pytest.raises(InvalidRequest, match="completion: got 999999"):
        engine.submit(Request("r", PROMPT, completion=(999999,)), Recorder())
    with pytest.raises(PromptTooLong):
        engine.submit(Request("r", PROMPT, completion=COMPLETION), Recorder())
