"""The example adapters do what they say, on prompts they were not trained on."""

from __future__ import annotations

import json

import pytest

from reft_core.adapter import Adapter
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.generate import generate
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.loading import LoadedModel
from reft_core.templates import encode_chat
from tests.end_to_end.conftest import NAMES, test_rows
from tests.reference.slow import reference_generate, reference_logits
from trainer.evaluation.scoring import METRICS

NUM_ROWS = 30
NUM_BASE_ROWS = 10
MAX_TOKENS = 24


def prompt_of(loaded: LoadedModel, text: str) -> tuple[int, ...]:
    """A chat prompt with one user message."""
    return tuple(encode_chat(loaded.tokenizer, [{"role": "user", "content": text}]))


def answers(
    engine: EmbeddedEngine, loaded: LoadedModel, texts: list[str], adapter: Adapter | None
) -> list[str]:
    """Greedy answers to ``texts``, all in one batch."""
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
    chosen = (AdapterChoice(adapter.digest),) if adapter else ()
    requests = [
        Request(f"{adapter and adapter.spec.name}-{i}", prompt_of(loaded, text), params, chosen)
        for i, text in enumerate(texts)
    ]
    found = generate(engine, requests)
    return [
        loaded.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        for completion in found
    ]


@pytest.mark.smollm2
@pytest.mark.parametrize(
    ("name", "metric", "least"),
    [
        ("sentiment", "exact_match", 0.7),
        ("intent", "exact_match", 0.75),
        ("json_answer", "valid_json", 0.9),
        ("emoji", "emoji_only", 0.9),
    ],
)
def test_adapter_changes_behaviour_and_the_base_does_not_have_it(
    name: str,
    metric: str,
    least: float,
    engine: EmbeddedEngine,
    served: LoadedModel,
    adapters: dict[str, Adapter],
) -> None:
    rows = test_rows(name, NUM_ROWS)
    texts = [row["instruction"] for row in rows]
    expected = [row["completion"] for row in rows]
    score = METRICS[metric]

    def rate(found: list[str]) -> float:
        return sum(map(score, found, expected)) / len(found)

    adapted = rate(answers(engine, served, texts, adapters[name]))
    base = rate(answers(engine, served, texts[:NUM_BASE_ROWS], None))
    assert adapted >= least, f"{metric} {adapted:.2f} with the adapter"
    assert base <= 0.1, f"{metric} {base:.2f} without it"


@pytest.mark.smollm2
@pytest.mark.parametrize("name", NAMES)
def test_adapter_file_says_how_it_was_made(name: str, adapters: dict[str, Adapter]) -> None:
    training = adapters[name].spec.training
    assert training.command.startswith("reft train")
    assert training.metrics
    assert training.seed is not None
    assert adapters[name].spec.licence
    json.loads(adapters[name].spec.to_json())


@pytest.mark.smollm2
def test_mixed_batch_equals_each_request_alone(
    engine: EmbeddedEngine,
    served: LoadedModel,
    smollm2: LoadedModel,
    adapters: dict[str, Adapter],
) -> None:
    """Base and all adapters in one batch; the reference recomputes everything per token."""
    texts = ["The lamp broke on the first day."]
    params = SamplingParams(max_tokens=6, temperature=0, logprobs=5)
    cases = [(text, adapter) for text in texts for adapter in (None, *adapters.values())]
    requests = [
        Request(
            f"mixed-{i}",
            prompt_of(served, text),
            params,
            (AdapterChoice(adapter.digest),) if adapter else (),
        )
        for i, (text, adapter) in enumerate(cases)
    ]
    for (_, adapter), request, completion in zip(
        cases, requests, generate(engine, requests), strict=True
    ):
        alone = reference_generate(
            smollm2.model, request.prompt, len(completion.token_ids), adapter
        )
        assert completion.token_ids == alone
        logits = reference_logits(smollm2.model, list(request.prompt), len(request.prompt), adapter)
        expected = logits[-1].log_softmax(dim=-1)
        worst = max(
            abs(entry.logprob - float(expected[entry.token_id]))
            for entry in completion.tokens[0].top_logprobs
        )
        assert worst < 1e-3, f"largest difference {worst}"
