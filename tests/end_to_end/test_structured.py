"""The demo model under a schema, a regex and a choice; base and adapters in one batch."""

from __future__ import annotations

import json
import re

import pytest
import torch

from reft_core.adapter import Adapter
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.generate import generate
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.grammar import GrammarCompiler, GrammarSpec
from reft_core.loading import LoadedModel
from reft_core.templates import encode_chat
from tests.reference.slow import reference_logits

pytestmark = pytest.mark.smollm2

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "country": {"enum": ["France", "Italy", "Japan"]},
        "visited": {"type": "boolean"},
        "stars": {"type": "integer", "minimum": 1, "maximum": 5},
    },
    "required": ["city", "country", "visited", "stars"],
    "additionalProperties": False,
}
QUESTION = "Describe one city that you would like to visit, as JSON."


@pytest.fixture(scope="module")
def compiler(smollm2: LoadedModel) -> GrammarCompiler:
    return GrammarCompiler(smollm2)


def prompt(loaded: LoadedModel, text: str, adapter: Adapter | None = None) -> tuple[int, ...]:
    template = adapter.spec.template if adapter else None
    return tuple(encode_chat(loaded.tokenizer, [{"role": "user", "content": text}], template))


def test_base_and_adapters_follow_their_own_forms_in_one_batch(
    engine: EmbeddedEngine,
    smollm2: LoadedModel,
    adapters: dict[str, Adapter],
    compiler: GrammarCompiler,
) -> None:
    """Greedy and sampled, beside an adapter that is free to answer as it always does."""
    schema = compiler.compile(GrammarSpec("json_schema", json.dumps(SCHEMA)))
    date = compiler.compile(GrammarSpec("regex", r"[0-9]{4}-[01][0-9]-[0-3][0-9]"))
    mood = compiler.compile(GrammarSpec("choice", '["delighted", "indifferent", "furious"]'))
    greedy = SamplingParams(max_tokens=120, temperature=0)
    sampled = SamplingParams(max_tokens=120, seed=3, top_p=0.9)
    soup = "The soup was cold and the waiter shrugged."
    requests = []
    for name in (None, "json_answer", "emoji"):
        adapter = adapters[name] if name else None
        chosen = (AdapterChoice(adapter.digest),) if adapter else ()
        for kind, params in (("greedy", greedy), ("sampled", sampled)):
            tokens = prompt(smollm2, QUESTION, adapter)
            label = f"schema-{name}-{kind}"
            requests.append(Request(label, tokens, params, chosen, constraint=schema.start()))
    sentiment = adapters["sentiment"]
    chosen = (AdapterChoice(sentiment.digest),)
    tokens = prompt(smollm2, soup, sentiment)
    requests += [
        Request("date", prompt(smollm2, "What day is it?"), greedy, constraint=date.start()),
        Request("mood", tokens, greedy, chosen, constraint=mood.start()),
        Request("free", tokens, greedy, chosen),
    ]
    completions = generate(engine, requests)
    texts = {
        request.request_id: smollm2.tokenizer.decode(c.token_ids, skip_special_tokens=True)
        for request, c in zip(requests, completions, strict=True)
    }
    assert {completion.finish_reason for completion in completions} == {"stop"}
    answers = {text for name, text in texts.items() if name.startswith("schema")}
    for text in answers:
        found = json.loads(text)
        assert set(found) == set(SCHEMA["properties"])  # type: ignore[call-overload]
        assert found["country"] in ("France", "Italy", "Japan")
        assert found["stars"] in range(1, 6)
        assert len(found["city"]) <= 20
    assert len(answers) > 2, "they are the models' own answers"
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", texts["date"])
    assert texts["mood"] in ("delighted", "indifferent", "furious")
    assert texts["free"] == "negative"


def test_the_prompts_log_probabilities_are_the_references(
    engine: EmbeddedEngine, smollm2: LoadedModel, adapters: dict[str, Adapter]
) -> None:
    """With an adapter and without, in one batch, cut into chunks."""
    text = "The capital of France is Paris, and the capital of Italy is Rome. " * 16
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    requests, used = [], []
    for name in (None, "sentiment"):
        adapter = adapters[name] if name else None
        chosen = (AdapterChoice(adapter.digest),) if adapter else ()
        tokens = prompt(smollm2, text, adapter)
        requests.append(Request(f"scored-{name}", tokens, params, chosen))
        used.append(adapter)
    assert len(requests[0].prompt) > 200, "more than one chunk"
    for request, adapter, completion in zip(
        requests, used, generate(engine, requests), strict=True
    ):
        tokens = list(request.prompt)
        logits = reference_logits(smollm2.model, tokens, len(tokens), adapter)
        expected = torch.log_softmax(logits[:-1], dim=-1)
        first, *others = completion.prompt_logprobs
        assert first is None
        found = torch.tensor([token.logprob for token in others if token is not None])
        own = expected.gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).squeeze(1)
        assert (found - own).abs().max() < 2e-3
