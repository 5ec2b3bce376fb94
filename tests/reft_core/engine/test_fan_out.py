"""One prompt under many adapters: every answer is the reference's, and what they have in common
is computed once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from reft_core.adapter import Adapter
from reft_core.engine.attention import PrefillBatch
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.fused import FusedForward
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.engine.kv import SlotKV
from reft_core.engine.provenance import BLOCK_TOKENS
from reft_core.engine.runner import ModelRunner
from reft_core.engine.sharing import Chunk
from tests.factories import (
    FAMILIES,
    Recorder,
    random_adapter,
    random_prefix_adapter,
    random_prompt,
    shift_adapter,
    tiny_description,
    tiny_loaded,
    tiny_model,
)
from tests.reference.slow import reference_generate
from tests.reft_core.engine.stepping import finish
from tests.reft_core.engine.test_batch_properties import Drawn, as_used, one_prefix, uses
from tests.reft_core.engine.truth import Answer, Case, assert_as_alone, recorded_logits

needs_fused = pytest.mark.skipif(
    not FusedForward.is_for(tiny_model()), reason="this torch has no oneDNN"
)
MAX_TOKENS = 5
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
PROMPT = random_prompt(45, seed=1)
NUM_LAYERS = 4
Used = tuple[Adapter, ...]


def adapter(seed: int, **options: Any) -> Adapter:
    """One whose edits, all large, change the answer."""
    defaults: dict[str, Any] = {"name": f"a{seed}", "rank": 2, "size": 3.0, "positions": "l7"}
    return random_adapter(tiny_description(), seed=seed, **(defaults | options))


@cache
def suffix_only(count: int) -> list[Used]:
    return [(adapter(seed),) for seed in range(count)]


@cache
def mixed() -> list[Used]:
    """Several lowest layers, sites and positions, the base, stacks, and some of them twice."""
    high = adapter(30, positions="f3+l3", layers=[2, 3])
    suffix = adapter(31)
    found: list[Used] = [
        (high,),
        (),
        (suffix,),
        (adapter(32, positions="f2+l2", layers=[1, 2]),),
        (adapter(33, positions="prompt", layers=[2], size=2.0),),
        (
            adapter(
                34, positions="f9", layers=[2, 3], sites=("attn_output", "mlp_output"), size=9.0
            ),
        ),
        (adapter(38, positions="l2", layers=[3], size=8.0),),
        (high,),
        (high, suffix),
        (),
        (adapter(37, positions="f3+l3", tied=False, layers=[3], size=8.0),),
    ]
    return found


@cache
def unlike() -> list[Used]:
    """With those that the fused forward does not take, and those with virtual tokens."""
    lora = {"method": "lora", "positions": "prompt", "sites": ("linear:self_attn.v_proj",)}
    return [
        (),
        (adapter(40, layers=[2, 3], positions="f3+l3"),),
        (adapter(41, phase="all", size=1.0, **lora),),
        (random_prefix_adapter(tiny_description(), "kv", length=3),),
        (adapter(42, positions="l3", method="lora", sites=("linear:self_attn.k_proj",)),),
        (random_prefix_adapter(tiny_description(), "embedding", length=3),),
        (adapter(41, phase="all", size=1.0, **lora),),
        (random_prefix_adapter(tiny_description(), "kv", length=3), adapter(43)),
    ]


def make_engine(cache_blocks: int = 64, family: str = "llama", **config: Any) -> EmbeddedEngine:
    options = {"max_num_seqs": 16, "max_model_len": 128, "max_prefill_tokens": 512} | config
    loaded = tiny_loaded(family)
    kv = SlotKV(loaded.description, 1, 1, dtype=torch.float32, device="cpu")
    bytes_held = cache_blocks * kv.bytes_of(BLOCK_TOKENS)
    return EmbeddedEngine(loaded, EngineConfig(prefix_cache_bytes=bytes_held, **options))


def submit(
    engine: EmbeddedEngine,
    name: str,
    used: Used,
    prompt: tuple[int, ...] = PROMPT,
    params: SamplingParams = GREEDY,
) -> Recorder:
    for one in used:
        engine.load_adapter(one)
    recorder = Recorder()
    choices = tuple(AdapterChoice(one.digest) for one in used)
    engine.submit(Request(name, prompt, params, choices), recorder)
    return recorder


_known: dict[object, list[int]] = {}


def expected(used: Used, family: str = "llama", max_tokens: int = MAX_TOKENS) -> list[int]:
    """What the slow reference answers."""
    name = (*(one.digest for one in used), family, max_tokens)
    if name not in _known:
        stack = [(one, 1.0) for one in used]
        model = tiny_model(family)
        _known[name] = reference_generate(model, PROMPT, max_tokens, stack=stack)
    return _known[name]


def answers(engine: EmbeddedEngine, many: list[Used]) -> list[list[int]]:
    recorders = [submit(engine, str(i), used) for i, used in enumerate(many)]
    finish(engine, *recorders)
    return [recorder.token_ids for recorder in recorders]


def test_the_adapters_matter() -> None:
    """Answers that were all alike could not be mixed up."""
    assert len({tuple(expected(used)) for used in (*mixed(), *unlike())}) >= 14
    assert len({tuple(expected(used)) for used in suffix_only(16)}) >= 8


@pytest.mark.parametrize("max_prefill_tokens", [512, 100, 47, 41, 16, 7])
@pytest.mark.parametrize("cache_blocks", [64, 2, 0])
@pytest.mark.parametrize("many", [lambda: suffix_only(16), mixed, unlike])
def test_every_answer_is_the_reference(
    many: Callable[[], list[Used]], cache_blocks: int, max_prefill_tokens: int
) -> None:
    """Chunks end before, in and after the suffixes; the cache holds all, a part or nothing."""
    engine = make_engine(cache_blocks, max_prefill_tokens=max_prefill_tokens)
    assert answers(engine, many()) == [expected(used) for used in many()]
    assert engine.stats().kv_tokens_used == 0


@pytest.mark.parametrize("forward", ["auto", "torch", "transformers"])
def test_under_every_forward(forward: str) -> None:
    engine = make_engine(forward=forward, max_prefill_tokens=100)
    assert answers(engine, mixed()) == [expected(used) for used in mixed()]


@pytest.mark.parametrize("family", FAMILIES)
def test_in_every_family(family: str) -> None:
    """Sliding windows and soft caps included; most have no forward that can branch."""
    model = tiny_loaded(family).description
    many: list[Used] = [
        (random_adapter(model, seed=seed, size=3.0, positions=rule, layers=layers),)
        for seed, (rule, layers) in enumerate(
            [("l7", None), ("l7", [1, 2]), ("f2+l2", [2, 3]), ("f2+l2", [2, 3]), ("l3", None)]
        )
    ]
    many += [(), many[0]]
    engine = make_engine(0, family, max_prefill_tokens=64)
    found = answers(engine, many)
    assert found == [expected(used, family) for used in many]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Rows that the layers of the fused forward compute, one list for each prefill forward."""
    forwards: list[list[int]] = []
    real = FusedForward._through

    def counted(
        self: Any, first: int, last: int, h: Any, shape: Any, angles: Any, batch: Any, *rest: Any
    ) -> Any:
        if isinstance(batch, PrefillBatch):
            if first == 0:
                forwards.append([])
            forwards[-1].extend([len(h)] * (last - first))
        return real(self, first, last, h, shape, angles, batch, *rest)

    monkeypatch.setattr(FusedForward, "_through", counted)
    return forwards


def counted_answers(
    engine: EmbeddedEngine, rows: list[list[int]], many: list[Used]
) -> list[list[int]]:
    """Answers the requests and forgets the rows of what came before."""
    rows.clear()
    found = answers(engine, many)
    assert found == [expected(used) for used in many]
    return found


@needs_fused
@pytest.mark.parametrize("cache_blocks", [64, 1, 0])
def test_what_comes_before_the_suffix_is_computed_once(
    rows: list[list[int]], cache_blocks: int
) -> None:
    """45 tokens of which 7 are edited, 16 times; the edits begin after layer 0."""
    engine = make_engine(cache_blocks)
    counted_answers(engine, rows, suffix_only(16))
    assert rows == [[45, 45 + 15 * 7, 45 + 15 * 7, 45 + 15 * 7]]
    assert engine.stats().prompt_tokens_total == 45 + 15 * 7
    assert engine.stats().cached_tokens_total == 15 * 38


@needs_fused
@pytest.mark.parametrize("cache_blocks", [64, 1, 0])
def test_remainders_go_into_one_forward(rows: list[list[int]], cache_blocks: int) -> None:
    """Where they do not fit beside the prompt, they make one forward of their own."""
    engine = make_engine(cache_blocks, max_prefill_tokens=20)
    counted_answers(engine, rows, suffix_only(3))
    assert [forward[-1] for forward in rows] == [20, 20, 5 + 2 * 7]


@needs_fused
@pytest.mark.parametrize(
    ("max_prefill_tokens", "num_adapters", "forwards"),
    [
        # In rows times four layers, three of which a remainder has of its own:
        (60, 6, [45 + 5 * 7]),  # 285 of at most 300
        (52, 6, [45 + 3 * 7, 2 * 7]),  # 243 of at most 260, and one more would be 264
        (45, 7, [45 + 2 * 7, 4 * 7]),
    ],
)
def test_remainders_may_take_a_step_a_quarter_beyond_its_budget(
    rows: list[list[int]], max_prefill_tokens: int, num_adapters: int, forwards: list[int]
) -> None:
    engine = make_engine(64, max_prefill_tokens=max_prefill_tokens)
    counted_answers(engine, rows, suffix_only(num_adapters))
    assert [forward[-1] for forward in rows] == forwards


@needs_fused
@pytest.mark.parametrize("cache_blocks", [64, 0])
@pytest.mark.parametrize("max_prefill_tokens", [512, 60, 40])
@pytest.mark.parametrize(
    ("options", "trunk"),
    [
        ({"layers": [2, 3]}, 3),
        ({"layers": [2, 3], "sites": ("mlp_output",)}, 2),
        ({"layers": [1, 3], "sites": ("attn_output",)}, 1),
        ({"layers": [0, 3]}, 1),
    ],
)
def test_layers_below_the_lowest_edit_are_computed_once(
    rows: list[list[int]],
    options: dict[str, Any],
    trunk: int,
    max_prefill_tokens: int,
    cache_blocks: int,
) -> None:
    many = [(adapter(50 + seed, positions="f7+l7", **options),) for seed in range(4)]
    engine = make_engine(cache_blocks, max_prefill_tokens=max_prefill_tokens)
    counted_answers(engine, rows, many)
    per_layer = [sum(layer) for layer in zip(*rows, strict=True)]
    assert per_layer == [45] * trunk + [4 * 45] * (NUM_LAYERS - trunk)
    assert all(sum(forward) <= max_prefill_tokens * NUM_LAYERS for forward in rows)


@needs_fused
def test_each_leaves_the_trunk_at_its_own_layer(rows: list[list[int]]) -> None:
    many = [
        (adapter(60, positions="f1", layers=[0]),),
        (adapter(61, positions="f1", layers=[2]),),
        (),
        (adapter(62, positions="f1", layers=[1]),),
        (adapter(61, positions="f1", layers=[2]),),
    ]
    engine = make_engine(0)
    counted_answers(engine, rows, many)
    assert rows == [[45, 2 * 45, 3 * 45, 4 * 45]]


@needs_fused
def test_twins_are_computed_once(rows: list[list[int]]) -> None:
    many = [(adapter(70, positions="prompt", size=0.5),)] * 5
    counted_answers(make_engine(0), rows, many)
    assert rows == [[45] * NUM_LAYERS]


def test_one_whose_edits_need_hooks_ends_the_sharing_of_layers_not_of_positions() -> None:
    many = [(adapter(50 + seed, positions="f7+l7", layers=[2, 3]),) for seed in range(3)]
    many += suffix_only(2) + unlike()[4:5]
    engine = make_engine(0)
    assert answers(engine, many) == [expected(used) for used in many]
    assert engine.stats().prompt_tokens_total == 3 * 45 + 45 + 7 + 7


@pytest.mark.parametrize("cache_blocks", [64, 0])
def test_one_that_comes_later_takes_what_is_in_a_slot(cache_blocks: int) -> None:
    engine = make_engine(cache_blocks, max_prefill_tokens=20)
    first = submit(engine, "first", suffix_only(1)[0])
    engine.step()
    second = submit(engine, "second", suffix_only(2)[1])
    finish(engine, first, second)
    assert [first.token_ids, second.token_ids] == [expected(used) for used in suffix_only(2)]
    assert engine.stats().prompt_tokens_total == 45 + 7
    assert second.outputs[-1].num_cached_tokens == 38
    assert first.outputs[-1].num_cached_tokens == 0


@pytest.mark.parametrize("cache_blocks", [64, 0])
def test_one_that_comes_while_another_decodes_takes_its_slot_too(cache_blocks: int) -> None:
    engine = make_engine(cache_blocks)
    long = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    first = submit(engine, "first", (), PROMPT[:20], long)
    engine.step()
    assert len(first.tokens) == 2
    second = submit(engine, "second", ())
    finish(engine, second)
    assert second.token_ids == expected(())
    assert second.outputs[-1].num_cached_tokens == 20


@pytest.mark.parametrize("gone", range(4))
@pytest.mark.parametrize("many", [lambda: suffix_only(4), lambda: mixed()[:4]])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_one_of_them_is_cancelled(many: Callable[[], list[Used]], gone: int, steps: int) -> None:
    engine = make_engine(0, max_prefill_tokens=20)
    recorders = [submit(engine, str(i), used) for i, used in enumerate(many())]
    for _ in range(steps):
        engine.step()
    engine.cancel(str(gone))
    finish(engine, *recorders)
    for i, (recorder, used) in enumerate(zip(recorders, many(), strict=True)):
        if i != gone:
            assert recorder.token_ids == expected(used)
    assert recorders[gone].finish_reason in ("cancelled", "length")


@pytest.mark.parametrize("cache_blocks", [64, 0])
@pytest.mark.parametrize("many", [lambda: suffix_only(5), mixed])
def test_they_lose_their_slots(many: Callable[[], list[Used]], cache_blocks: int) -> None:
    engine = make_engine(cache_blocks, kv_tokens=200, max_prefill_tokens=30)
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    recorders = [submit(engine, str(i), used, params=params) for i, used in enumerate(many())]
    finish(engine, *recorders)
    assert engine.stats().preemptions_total > 0
    for recorder, used in zip(recorders, many(), strict=True):
        assert recorder.token_ids == expected(used, max_tokens=40)


def test_more_than_there_are_slots_for() -> None:
    engine = make_engine(0, max_num_seqs=3, max_prefill_tokens=50)
    assert answers(engine, mixed()) == [expected(used) for used in mixed()]


@pytest.mark.parametrize("forward", ["auto", "torch", "transformers"])
@pytest.mark.parametrize("max_prefill_tokens", [512, 44, 40])
@pytest.mark.parametrize("where", [0, 2])
def test_one_that_overflows_takes_nobody_with_it(
    where: int, max_prefill_tokens: int, forward: str
) -> None:
    """Although the others take their beginning from it, and masked NaNs may have spoilt that."""
    many = list(suffix_only(4))
    many.insert(where, (shift_adapter(tiny_description(), shift=3e38, gain=3e38, positions="l2"),))
    engine = make_engine(forward=forward, max_prefill_tokens=max_prefill_tokens)
    recorders = [submit(engine, str(i), used) for i, used in enumerate(many)]
    finish(engine, *recorders)
    for i, (recorder, used) in enumerate(zip(recorders, many, strict=True)):
        if i == where:
            assert recorder.finish_reason == "error"
        else:
            assert recorder.token_ids == expected(used)


@pytest.mark.parametrize("guilty", [0, 1, 3])
def test_one_whose_prefill_raises_takes_nobody_with_it(
    monkeypatch: pytest.MonkeyPatch, guilty: int
) -> None:
    real = ModelRunner.prefill

    def fragile(self: ModelRunner, chunks: list[Chunk]) -> Any:
        if any(chunk.sequence.request.request_id == str(guilty) for chunk in chunks):
            raise RuntimeError("broken")
        return real(self, chunks)

    monkeypatch.setattr(ModelRunner, "prefill", fragile)
    many = mixed()[:5]
    engine = make_engine(max_prefill_tokens=100)
    recorders = [submit(engine, str(i), used) for i, used in enumerate(many)]
    finish(engine, *recorders)
    for i, (recorder, used) in enumerate(zip(recorders, many, strict=True)):
        if i == guilty:
            assert recorder.finish_reason == "error"
        else:
            assert recorder.token_ids == expected(used)


def test_log_probabilities_and_samples_are_those_of_one_alone() -> None:
    params = SamplingParams(max_tokens=8, seed=5, ignore_eos=True, logprobs=3)
    together, alone = make_engine(), make_engine(0)
    recorders = [submit(together, str(i), used, params=params) for i, used in enumerate(mixed())]
    finish(together, *recorders)
    for recorder, used in zip(recorders, mixed(), strict=True):
        single = submit(alone, "alone", used, params=params)
        finish(alone, single)
        assert recorder.token_ids == single.token_ids
        for left, right in zip(recorder.tokens, single.tokens, strict=True):
            assert left.logprob == pytest.approx(right.logprob, abs=1e-3)


@pytest.fixture(
    scope="module",
    params=[
        ("llama", 64, 512),
        ("llama", 0, 40),
        ("llama", 2, 17),
        ("qwen3", 0, 60),
        ("gpt2", 0, 30),
    ],
    ids=str,
)
def drawn_engine(request: pytest.FixtureRequest) -> tuple[str, EmbeddedEngine]:
    family, cache_blocks, max_prefill_tokens = request.param
    engine = make_engine(
        cache_blocks, family, max_num_seqs=5, max_prefill_tokens=max_prefill_tokens
    )
    return family, engine


_LENGTHS = st.sampled_from([1, 2, 8, 16, 17, 20])
_asks = st.tuples(_LENGTHS, st.booleans(), st.lists(uses(), max_size=2).map(one_prefix))
"""Prompt length, whether it ends in its own way, stack."""


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(batch=st.lists(_asks, min_size=2, max_size=8), steps=st.lists(st.integers(0, 2), max_size=8))
def test_prompts_with_one_beginning_under_drawn_adapters(
    drawn_engine: tuple[str, EmbeddedEngine],
    batch: list[tuple[int, bool, list[Drawn]]],
    steps: list[int],
) -> None:
    """They arrive a drawn number of steps one after the other."""
    family, engine = drawn_engine
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    asked: list[tuple[Case, Recorder]] = []
    with recorded_logits() as seen:
        for i, (length, own_end, drawn) in enumerate(batch):
            prompt = PROMPT[:length]
            if own_end:
                prompt = (*prompt[: length // 2], *random_prompt(length - length // 2, seed=i))
            case = Case(prompt, tuple(as_used(engine.model, use, length) for use in drawn))
            for use in case.stack:
                engine.load_adapter(use.adapter)
            asked.append((case, Recorder()))
            choices = tuple(use.choice for use in case.stack)
            engine.submit(Request(str(i), prompt, params, choices), asked[-1][1])
            for _ in range(steps[i] if i < len(steps) else 0):
                engine.step()
        finish(engine, *(recorder for _, recorder in asked))
    for i, (case, recorder) in enumerate(asked):
        assert recorder.error is None
        assert_as_alone(tiny(family), case, Answer(recorder.token_ids, torch.stack(seen[str(i)])))


@cache
def tiny(family: str) -> PreTrainedModel:
    """The family's model as no engine has touched it."""
    return tiny_model(family)
