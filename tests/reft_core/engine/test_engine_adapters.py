"""What adapters do in a running engine: in decode, in stacks, with prefixes, at the last layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from transformers import PreTrainedModel

import reft_core.batch as batch_module
import reft_core.kernels as kernels_module
from reft_core.adapter import Adapter, EditKey, decode_adapter, encode_adapter
from reft_core.engine.attention import DecodeBatch
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.engine.runner import ModelRunner
from reft_core.errors import (
    InvalidRequest,
)
from tests.factories import (
    Recorder,
    make_spec,
    random_adapter,
    random_prefix_adapter,
    random_prompt,
    tiny_description,
)
from tests.reference.slow import Stack, reference_generate
from tests.reft_core.engine.engines import (
    GREEDY,
    KEYS,
    LONG,
    SHORT,
    VALUES,
    assert_idle,
    everywhere,
    expected,
    greedy,
    make_engine,
    mam,
    mild_adapter,
    prefix,
    reference_model,
    submit,
    voiced,
)
from tests.reft_core.engine.stepping import finish, step_until


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_unloading_does_not_disturb_who_runs(steps: int) -> None:
    """Waiting, in the middle of its prefill, and decoding."""
    adapter = mild_adapter()
    engine = make_engine(adapter, max_prefill_tokens=4)
    recorder = submit(engine, "r", LONG[:9], GREEDY, adapter)
    for _ in range(steps):
        engine.step()
    engine.unload_adapter(adapter.digest)
    engine.unload_adapter(adapter.digest)
    assert not engine.has_adapter(adapter.digest)
    assert engine.stats().num_resident_adapters == 0
    with pytest.raises(InvalidRequest, match="expected a loaded digest"):
        submit(engine, "late", SHORT, GREEDY, adapter)
    finish(engine, recorder)
    assert recorder.token_ids == expected(LONG[:9], GREEDY, adapter)
    assert recorder.token_ids != expected(LONG[:9]), "the adapter must matter"
    engine.load_adapter(adapter)
    engine.load_adapter(adapter)
    assert engine.has_adapter(adapter.digest)
    assert engine.stats().num_resident_adapters == 1


def test_decode_runs_no_edit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hook on any module and no call of apply_edits; while prefill has both."""
    apply_edits, forward = kernels_module.apply_edits, ModelRunner._by_transformers
    hooks: dict[str, list[int]] = {"prefill": [], "decode": []}
    applied: list[str] = []
    phase = ""

    def spy_apply(*args: Any) -> None:
        applied.append(phase)
        apply_edits(*args)

    def spy_forward(self: ModelRunner, *args: Any) -> torch.Tensor:
        nonlocal phase
        phase = "decode" if isinstance(args[2], DecodeBatch) else "prefill"
        modules = list(self._model.modules())
        hooks[phase].append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules))
        return forward(self, *args)

    engine = make_engine(mild_adapter(), forward="transformers", max_prefill_tokens=8)
    monkeypatch.setattr(kernels_module, "apply_edits", spy_apply)
    monkeypatch.setattr(ModelRunner, "_by_transformers", spy_forward)
    recorders = [submit(engine, f"r{i}", LONG[: 5 + i], GREEDY, mild_adapter()) for i in range(3)]
    finish(engine, *recorders)
    assert hooks["decode"], "there was a decode"
    assert set(hooks["decode"]) == {0}
    assert max(hooks["prefill"]) == 4, "a hook a layer"
    assert set(applied) == {"prefill"}


def count_hooks(model: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_decode_has_hooks_only_while_an_adapter_asks_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that edits generated tokens, for a while, beside one that does not; its rows alone
    are edited.
    """
    engine = make_engine(everywhere(), mild_adapter(), forward="transformers", max_prefill_tokens=8)
    forward, apply_edits = ModelRunner._by_transformers, kernels_module.apply_edits
    decodes: list[tuple[int, set[int]]] = []
    """Hooks of each decode, and rows it edits."""
    rows: set[int] | None = None

    def spy_apply(hidden: Any, x: Any, edits: Any) -> None:
        if rows is not None:
            for edit in edits:
                rows.update(edit.rows.tolist())
        apply_edits(hidden, x, edits)

    def spy_forward(self: ModelRunner, *args: Any) -> torch.Tensor:
        nonlocal rows
        rows = set() if isinstance(args[2], DecodeBatch) else None
        logits = forward(self, *args)
        if rows is not None:
            decodes.append((count_hooks(self._model), rows))
        return logits

    monkeypatch.setattr(kernels_module, "apply_edits", spy_apply)
    monkeypatch.setattr(ModelRunner, "_by_transformers", spy_forward)
    prompt = LONG[:5]
    quiet = submit(engine, "prompt only", prompt, greedy(12), mild_adapter())
    step_until(engine, lambda: len(quiet.tokens) >= 3)
    assert decodes
    assert set(decodes_of(decodes)) == {0}
    decodes.clear()
    before = engine.stats().edits_applied_total
    loud = submit(engine, "all", prompt, greedy(4), everywhere())
    off = submit(engine, "off", prompt, greedy(4), everywhere(), 0.0)
    finish(engine, loud, off)
    edited, rest = decodes[:3], decodes[3:]
    assert edited == [(4, {1})] * 3, "a hook a layer, and its row alone"
    assert set(decodes_of(rest)) <= {0}, "it has ended, and the one at strength 0 has not"
    applied = engine.stats().edits_applied_total - before
    assert applied == 4 * 5 + 4 * 3, "in four layers: five prompt tokens and three generated"
    decodes.clear()
    finish(engine, quiet)
    assert decodes
    assert set(decodes_of(decodes)) == {0}
    assert quiet.token_ids == expected(prompt, greedy(12), mild_adapter())
    assert loud.token_ids == expected(prompt, greedy(4), everywhere())
    assert off.token_ids == expected(prompt, greedy(4))
    site = everywhere().spec.sites[VALUES].model_copy(update={"phase": "prompt"})
    spec = everywhere().spec.model_copy(update={"sites": {VALUES: site}})
    prompt_only = replace(everywhere(), spec=spec)
    assert loud.token_ids != expected(prompt, greedy(4), prompt_only), "the phase must matter"


def decodes_of(decodes: list[tuple[int, set[int]]]) -> list[int]:
    """Their numbers of hooks."""
    return [hooks for hooks, _ in decodes]


def test_an_idle_row_gets_no_decode_edit() -> None:
    """Half prefilled, it moves into a slot before one that decodes, so it is in their batch."""
    engine = make_engine(everywhere(), max_prefill_tokens=4, max_num_seqs=3)
    lengths = (4, 20)
    ready = [submit(engine, f"r{n}", LONG[n : n + 2], greedy(n), everywhere()) for n in lengths]
    step_until(engine, lambda: all(recorder.tokens for recorder in ready))
    long = submit(engine, "long", LONG, greedy(6), everywhere())
    finish(engine, ready[0])
    assert long.tokens == []
    assert [s.request.request_id for s in engine._scheduler.running] == ["long", "r20"]
    finish(engine, long, *ready)
    assert long.token_ids == expected(LONG, greedy(6), everywhere())
    for recorder, n in zip(ready, lengths, strict=True):
        assert recorder.token_ids == expected(LONG[n : n + 2], greedy(n), everywhere())
    # Four layers, each prompt token, and each generated one but the last.
    assert engine.stats().edits_applied_total == 4 * (24 + 5) + 4 * (2 + 3) + 4 * (2 + 19)


# Which edits are left out -----------------------------------------------------------------


def last_layer_adapter(method: str, site: str) -> Adapter:
    return random_adapter(
        tiny_description(),
        method=method,
        sites=(site,),
        rank=8,
        layers=[3],
        positions="prompt",
        phase="prompt",
        size=5.0,
    )


RESIDUAL = ["block_output", "attn_output", "mlp_output", "heads"]


def answer_of(adapter: Adapter) -> tuple[list[int], int]:
    """Greedy tokens of LONG under the adapter, and the number of edits."""
    engine = make_engine(adapter)
    recorder = Recorder()
    ticket = engine.submit(
        Request("r", LONG, greedy(12), (AdapterChoice(adapter.digest),)), recorder
    )
    finish(engine, recorder)
    return recorder.token_ids, ticket.num_edits


@pytest.mark.parametrize("site", RESIDUAL)
def test_dead_edits_of_the_last_layer_are_left_out_unseen(
    monkeypatch: pytest.MonkeyPatch, site: str
) -> None:
    """One edit gives what all of them give; the reference makes them all."""
    adapter = last_layer_adapter("loreft", site)
    wanted = expected(LONG, greedy(12), adapter)
    assert wanted != expected(LONG, greedy(12)), "the live one must matter"
    assert answer_of(adapter) == (wanted, 1)
    monkeypatch.setattr(batch_module, "_READ_BY_LOGITS_ONLY", ())
    assert answer_of(adapter) == (wanted, len(LONG))


@pytest.mark.parametrize("site", [KEYS, VALUES])
def test_keys_and_values_of_the_last_layer_are_read_by_later_tokens(
    monkeypatch: pytest.MonkeyPatch, site: str
) -> None:
    """None of their edits is dead; were they left out, the answer would change."""
    adapter = last_layer_adapter("lora", site)
    wanted = expected(LONG, greedy(12), adapter)
    assert answer_of(adapter) == (wanted, len(LONG))
    monkeypatch.setattr(batch_module, "_READ_BY_LOGITS_ONLY", (*RESIDUAL, site))
    pruned, num_edits = answer_of(adapter)
    assert num_edits == 1
    assert pruned != wanted


# Stacks, subspaces, prefixes --------------------------------------------------------------


def expected_of(stack: Stack, prompt: Sequence[int], params: SamplingParams = GREEDY) -> list[int]:
    return reference_generate(reference_model(), tuple(prompt), params.max_tokens, stack=stack)


def submit_stack(
    engine: EmbeddedEngine,
    name: str,
    stack: Stack,
    prompt: Sequence[int],
    params: SamplingParams = GREEDY,
) -> Recorder:
    recorder = Recorder()
    choices = tuple(AdapterChoice(adapter.digest, strength) for adapter, strength in stack)
    engine.submit(Request(name, tuple(prompt), params, choices), recorder)
    return recorder


@pytest.mark.parametrize("max_prefill_tokens", [512, 5])
def test_a_stack_acts_in_its_order(max_prefill_tokens: int) -> None:
    """[A, B] and [B, A], which do not commute, in one batch with both alone and A twice; and
    [C, A], whose second was second before its first was first.
    """
    one, two, three = (
        random_adapter(tiny_description(), seed=seed, rank=8, positions="prompt", size=2.0)
        for seed in (1, 2, 3)
    )
    stacks: dict[str, Stack] = {
        "ab": [(one, 1.0), (two, 1.0)],
        "ba": [(two, 1.0), (one, 1.0)],
        "ca": [(three, 1.0), (one, 1.0)],
        "a": [(one, 1.0)],
        "b": [(two, 1.0)],
        "aa": [(one, 1.0), (one, 1.0)],
        "a0b": [(one, 0.0), (two, 1.0)],
        "": [],
    }
    engine = make_engine(one, two, three, max_num_seqs=8, max_prefill_tokens=max_prefill_tokens)
    recorders = {
        name: submit_stack(engine, name, stack, LONG[:9]) for name, stack in stacks.items()
    }
    finish(engine, *recorders.values())
    answers = {name: recorder.token_ids for name, recorder in recorders.items()}
    for name, stack in stacks.items():
        assert answers[name] == expected_of(stack, LONG[:9]), name
    assert answers["a0b"] == answers["b"]
    different = [tuple(answers[name]) for name in ("ab", "ba", "ca", "a", "b", "aa", "")]
    assert len(set(different)) == len(different), "the order must matter"


def test_subspaces_leave_only_the_chosen_ranks() -> None:
    """Beside requests of the same adapter that choose otherwise; the file's up-rows, scaled by
    hand, tell what is right.
    """

    def by_hand(factors: list[float]) -> Adapter:
        edits = {}
        for key, edit in voiced().edits.items():
            assert edit.up is not None
            edits[key] = replace(edit, up=edit.up * torch.tensor(factors).unsqueeze(1))
        return replace(voiced(), edits=edits)

    cases: list[tuple[dict[str, float], list[float]]] = [
        ({}, [1, 1, 1, 1]),
        ({"tone": 1, "topic": 1}, [1, 1, 1, 1]),
        ({"tone": 1}, [1, 0, 1, 0]),
        ({"topic": 1}, [0, 1, 0, 1]),
        ({"topic": -2, "tone": 0.5}, [0.5, -2, 0.5, -2]),
        ({"tone": 0}, [0, 0, 0, 0]),
    ]
    engine = make_engine(voiced(), max_num_seqs=len(cases))
    recorders = []
    for index, (chosen, _) in enumerate(cases):
        recorder = Recorder()
        choice = AdapterChoice(voiced().digest, subspaces=chosen)
        engine.submit(Request(f"r{index}", LONG[:9], GREEDY, (choice,)), recorder)
        recorders.append(recorder)
    finish(engine, *recorders)
    answers = [recorder.token_ids for recorder in recorders]
    for answer, (chosen, factors) in zip(answers, cases, strict=True):
        assert answer == expected(LONG[:9], GREEDY, by_hand(factors)), chosen
    assert answers[0] == answers[1]
    assert answers[5] == expected(LONG[:9])
    assert len({tuple(answer) for answer in answers}) == 5, "each choice must matter"


@pytest.mark.parametrize("name", ["kv", "embedding", "mam"])
def test_a_prefix_at_strength_0_is_exactly_the_base(name: str) -> None:
    """Also beside the same adapter at strength 1, and in a stack with another prefix."""
    adapter = mam() if name == "mam" else prefix(name)  # type: ignore[arg-type]
    other = random_prefix_adapter(tiny_description(), "kv", length=2, seed=1)
    engine = make_engine(adapter, other, everywhere())
    stacks: list[Stack] = [
        [(adapter, 0.0)],
        [(adapter, 1.0)],
        [(other, 1.0), (adapter, 0.0)],
        [(adapter, 0.0), (everywhere(), 1.0)],
    ]
    recorders = [submit_stack(engine, f"r{i}", stack, LONG[:9]) for i, stack in enumerate(stacks)]
    ticket = engine.submit(
        Request("long", (5,) * 58, greedy(6), (AdapterChoice(adapter.digest, 0.0),)), Recorder()
    )
    finish(engine, *recorders)
    assert ticket.num_edits == 0, "and its tokens take no room"
    answers = [recorder.token_ids for recorder in recorders]
    assert answers[0] == expected(LONG[:9])
    assert answers[1] == expected(LONG[:9], GREEDY, adapter) != answers[0]
    assert answers[2] == expected(LONG[:9], GREEDY, other)
    assert answers[3] == expected(LONG[:9], GREEDY, everywhere())


@pytest.mark.parametrize("kind", ["kv", "embedding"])
@pytest.mark.parametrize("prompt_len", [1, 60])
def test_a_prefixed_request_may_fill_its_slot_to_the_last_token(
    kind: Literal["kv", "embedding"], prompt_len: int
) -> None:
    """Three virtual tokens, the prompt and the answer make 64. The ticket counts the prompt."""
    engine = make_engine(prefix(kind), max_prefill_tokens=16)
    prompt, params = random_prompt(prompt_len), greedy(61 - prompt_len)
    recorder = Recorder()
    choice = AdapterChoice(prefix(kind).digest)
    ticket = engine.submit(Request("r", prompt, params, (choice,)), recorder)
    assert (ticket.num_prompt_tokens, ticket.num_edits) == (prompt_len, 0)
    finish(engine, recorder)
    assert recorder.token_ids == expected(prompt, params, prefix(kind))
    if prompt_len == 1:
        assert recorder.token_ids != expected(prompt, params), "the prefix must matter"
    assert_idle(engine)


@pytest.mark.parametrize("kind", ["kv", "embedding"])
@pytest.mark.parametrize("max_prefill_tokens", [512, 2])
def test_one_adapter_may_bring_both_a_prefix_and_edits(
    kind: Literal["kv", "embedding"], max_prefill_tokens: int
) -> None:
    """As mix-and-match adapters do; also stacked with another's edits."""
    edits = random_adapter(tiny_description(), rank=4, positions="f2+l2", size=2.0)
    spec = make_spec(tiny_description(), rank=4, positions="f2+l2", prefix=prefix(kind).spec.prefix)
    both = decode_adapter(encode_adapter(spec, edits.edits, prefix(kind).prefix))
    engine = make_engine(both, mild_adapter(), max_prefill_tokens=max_prefill_tokens)
    stacks: list[Stack] = [
        [(both, 1.0)],
        [(mild_adapter(), 0.5), (both, 1.0)],
        [(both, 1.0), (mild_adapter(), -1.0)],
        [(mild_adapter(), 1.0)],
    ]
    recorders = [
        submit_stack(engine, f"r{i}", stack, LONG[: 7 + i]) for i, stack in enumerate(stacks)
    ]
    finish(engine, *recorders)
    for i, (stack, recorder) in enumerate(zip(stacks, recorders, strict=True)):
        assert recorder.token_ids == expected_of(stack, LONG[: 7 + i])
    assert recorders[0].token_ids != expected(LONG[:7], GREEDY, prefix(kind))


@pytest.mark.parametrize("kind", ["kv", "embedding"])
def test_a_repetition_penalty_ignores_virtual_tokens(kind: Literal["kv", "embedding"]) -> None:
    """Their places hold token 0, which this model is made to answer."""
    params = replace(greedy(1), logit_bias={0: 100}, repetition_penalty=10, logprobs=0)
    engine = make_engine(prefix(kind))
    virtual, seen = (
        submit(engine, name, prompt, params, prefix(kind))
        for name, prompt in [("virtual", (5, 6)), ("seen", (0, 6))]
    )
    finish(engine, virtual, seen)
    assert virtual.token_ids == [0]
    assert seen.token_ids == [0], "a tenth of 100 is still the most"
    params = replace(params, logit_bias={0: 100, 1: 50})
    virtual, seen = (
        submit(engine, name, prompt, params, prefix(kind))
        for name, prompt in [("virtual", (5, 6)), ("seen", (0, 6))]
    )
    finish(engine, virtual, seen)
    assert virtual.token_ids == [0]
    assert seen.token_ids == [1]


def test_loading_folds_what_decoding_left() -> None:
    """A file may hold a scale and a skip; the form that serves has neither."""
    adapter = mild_adapter()
    halves = {
        key: replace(edit, scale=2.0, up=edit.up / 2)
        for key, edit in adapter.edits.items()
        if edit.up is not None
    }
    site = adapter.spec.sites["block_output"].model_copy(update={"scale": 2.0})
    spec = adapter.spec.model_copy(update={"sites": {"block_output": site}})
    scaled = decode_adapter(encode_adapter(spec, halves))
    assert scaled.edits[EditKey(0, "block_output", 0)].scale == 2.0
    engine = make_engine(scaled)
    assert {edit.scale for edit in engine._adapters[scaled.digest].edits.values()} == {1.0}
    recorder = submit(engine, "r", LONG[:9], GREEDY, scaled)
    finish(engine, recorder)
    assert recorder.token_ids == expected(LONG[:9], GREEDY, adapter)


# Starting, draining, stopping, dying ------------------------------------------------------
