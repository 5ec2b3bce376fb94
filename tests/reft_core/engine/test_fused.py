"""The faster forward computes what transformers' code computes, edits included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reft_core.batch import EditPlan, Place, RowEdit
from reft_core.edits import Edit
from reft_core.engine import layer as layer_module
from reft_core.engine import runner as runner_module
from reft_core.engine.attention import DecodeBatch, PrefillBatch, Segment
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.fused import FAMILIES, FusedForward
from reft_core.engine.generate import Completion, generate
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.engine.kv import SlotKV
from reft_core.native.build import load_library
from reft_core.native.linear import NativeLinear
from tests.factories import assert_close, random_adapter, random_prompt, tiny_loaded, tiny_model

pytestmark = pytest.mark.skipif(
    not FusedForward.is_for(tiny_model()), reason="this torch has no oneDNN"
)
PARAMS = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=5)


def answers(family: str, forward: str, **options: Any) -> list[Completion]:
    """Prompts of several lengths, in chunks, half of them with a random adapter."""
    loaded = tiny_loaded(family)
    config = {"max_num_seqs": 3, "max_model_len": 64, "max_prefill_tokens": 7}
    engine = EmbeddedEngine(loaded, EngineConfig(forward=forward, **config))  # type: ignore[arg-type]
    assert (engine._runner._fused is not None) == (forward != "transformers")
    adapter = random_adapter(loaded.description, size=2.0, positions="f2+l2", **options)
    engine.load_adapter(adapter)
    choices = ((), (AdapterChoice(adapter.digest),))
    requests = [
        Request(str(i), random_prompt(4 + 5 * i, i), PARAMS, choices[i % 2]) for i in range(6)
    ]
    engine.start()
    try:
        return generate(engine, requests)
    finally:
        engine.stop()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["block_output", "attn_output", "mlp_output"])
@pytest.mark.parametrize("forward", ["auto", "torch"])
def test_equals_transformers(
    family: str, site: str, forward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = answers(family, "transformers", sites=(site,))
    _forbid_transformers_after_the_check(monkeypatch)
    fast = answers(family, forward, sites=(site,))
    for one, other in zip(slow, fast, strict=True):
        assert one.token_ids == other.token_ids
        for left, right in zip(one.tokens, other.tokens, strict=True):
            assert left.logprob == pytest.approx(right.logprob, abs=1e-4)


@pytest.mark.skipif(load_library() is None, reason="no C++ compiler here")
def test_compiled_loops_between_products_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor whose matrix instructions oneDNN uses."""
    expected = answers("qwen3", "transformers")
    monkeypatch.setattr(NativeLinear, "serves", staticmethod(lambda *_args: False))
    assert FusedForward(tiny_model("qwen3"))._at_once is None
    found = answers("qwen3", "auto")
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]


def _forbid_transformers_after_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    real = runner_module.ModelRunner._by_transformers

    def checked(self: Any, *args: Any) -> torch.Tensor:
        assert self._fused is None, "the faster forward was passed by"
        return real(self, *args)

    monkeypatch.setattr(runner_module.ModelRunner, "_by_transformers", checked)


@pytest.mark.parametrize(
    "options",
    [{"sites": ("heads",)}, {"method": "lora", "sites": ("linear:self_attn.v_proj",)}],
)
def test_edits_it_does_not_pass_by_go_through_transformers(options: dict[str, Any]) -> None:
    slow, fast = (answers("llama", forward, **options) for forward in ("transformers", "auto"))
    assert [c.token_ids for c in slow] == [c.token_ids for c in fast]


def test_decode_calls_no_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    real = layer_module.apply_edits

    def spy(hidden: torch.Tensor, x: torch.Tensor, edits: Any) -> None:
        rows.append(len(hidden))
        real(hidden, x, edits)

    monkeypatch.setattr(layer_module, "apply_edits", spy)
    loaded = tiny_loaded()
    engine = EmbeddedEngine(loaded, EngineConfig(max_model_len=64))
    adapter = random_adapter(loaded.description, positions="f2+l2")
    engine.load_adapter(adapter)
    request = Request("r", random_prompt(9), PARAMS, (AdapterChoice(adapter.digest),))
    engine.start()
    try:
        (completion,) = generate(engine, [request])
    finally:
        engine.stop()
    assert len(completion.tokens) == PARAMS.max_tokens
    once_a_layer = [9] * (loaded.description.num_layers - 1) + [1]
    assert rows == once_a_layer, "edits ran in the one prefill and in no decode step"


@pytest.mark.skipif(load_library() is None, reason="no C++ compiler here")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("places", [(), ((0, "attn_output"), (1, "block_output"))])
def test_layers_by_one_call_equal_each_by_itself(
    family: str, dtype: torch.dtype, places: tuple[Place, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, in a prefill of two prompts and a decode step after it."""
    # Also on a processor where oneDNN would multiply in bfloat16.
    monkeypatch.setattr(NativeLinear, "serves", staticmethod(lambda *_args: True))
    loaded = tiny_loaded(family)
    model = loaded.model.to(dtype)
    edit = Edit(shift=torch.randn(loaded.description.hidden_size))
    plan = EditPlan({place: [RowEdit(edit, torch.tensor([0, 1]), 1.0)] for place in places})
    found = []
    for at_once in (True, False):
        forward = FusedForward(model)
        assert forward._at_once is not None
        if not at_once:
            forward._at_once = None
        kv = SlotKV(loaded.description, 2, 16, dtype=dtype, device="cpu")
        segments = [Segment(0, 5, 0, 0), Segment(5, 8, 1, 0)]
        tokens, positions = torch.arange(3, 11), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
        with torch.inference_mode():
            prefilled = forward(tokens[None], positions[None], PrefillBatch(kv, segments), 0, plan)
            after = torch.tensor([5, 3])
            decoded = forward(tokens[:2, None], after[:, None], DecodeBatch(kv, after, 6), 0, plan)
        found.append((prefilled, decoded, *kv.keys, *kv.values))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_goes_on_with_the_rows_that_are_read(family: str, native: bool) -> None:
    """Their logits are those of a forward with all rows, and so are the keys and values kept."""
    loaded = tiny_loaded(family)
    forward = FusedForward(loaded.model, native=native)
    edit = Edit(shift=torch.randn(loaded.description.hidden_size))
    last = loaded.description.num_layers - 1
    sites = ("attn_output", "block_output")

    def plan_of(row: int) -> EditPlan:
        return EditPlan({(last, site): [RowEdit(edit, torch.tensor([row]), 1.0)] for site in sites})

    tokens, positions = torch.arange(3, 11)[None], torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    after = torch.tensor([5, 3])
    found = []
    for rows, row, keep in ((None, 7, [7, 4]), (torch.tensor([4, 7]), 1, [1, 0])):
        kv = SlotKV(loaded.description, 2, 16, dtype=torch.float32, device="cpu")
        batch = PrefillBatch(kv, [Segment(0, 5, 0, 0), Segment(5, 8, 1, 0)])
        with torch.inference_mode():
            prefilled = forward(
                tokens, positions, batch, torch.tensor(keep), plan_of(row), rows=rows
            )
            decode = DecodeBatch(kv, after, 6)
            decoded = forward(tokens[0, :2, None], after[:, None], decode, 0, EditPlan())
        found.append((prefilled, decoded))
    for whole, narrowed in zip(*found, strict=True):
        assert_close(narrowed, whole, tolerance=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox"])
def test_other_families_keep_their_own_code(family: str) -> None:
    assert not FusedForward.is_for(tiny_model(family))


def test_one_that_disagrees_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = FusedForward.__call__
    monkeypatch.setattr(FusedForward, "__call__", lambda *args: real(*args) + 1.0)
    engine = EmbeddedEngine(tiny_loaded(), EngineConfig(max_model_len=64))
    assert engine._runner._fused is None
    assert "the faster forward is not used" in caplog.text
