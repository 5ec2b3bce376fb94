"""Slot attention equals one query at a time; models it cannot serve are refused at start."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reft_core.engine import attention
from reft_core.engine.attention import (
    DecodeBatch,
    NewTokens,
    PrefillBatch,
    Segment,
    slot_attention,
)
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.kv import SlotKV
from reft_core.errors import UnsupportedModel
from tests.factories import assert_close, tiny_description, tiny_loaded

KEY_HEADS, GROUP, WIDTH, LENGTH = 2, 3, 4, 10
HEADS = KEY_HEADS * GROUP
SCALE = 0.37


def attend_one(
    q: Tensor, keys: Tensor, values: Tensor, at: int, window: int | None, softcap: float | None
) -> Tensor:
    """Output (H, D) of the query (H, D) at position ``at`` over keys (KH, L, D)."""
    start = 0 if window is None else max(0, at - window + 1)
    out = []
    for head in range(HEADS):
        kv_head = head // GROUP
        scores = SCALE * keys[kv_head, start : at + 1] @ q[head]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out.append(torch.softmax(scores, dim=0) @ values[kv_head, start : at + 1])
    return torch.stack(out)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("cuts", [(0, 7), (0, 1, 4, 7), (0, 6, 7)])
def test_chunked_prefill_then_decode_is_attention_over_the_past(
    cuts: tuple[int, ...], window: int | None, softcap: float | None
) -> None:
    """Two sequences: in slot 0 seven tokens in chunks, in slot 1 five in one; then one each.

    Slot 1's memory holds rubbish beyond its own tokens, as after a longer predecessor.
    """
    model = replace(tiny_description(), num_layers=1, num_kv_heads=KEY_HEADS, head_dim=WIDTH)
    kv = SlotKV(model, 3, LENGTH, dtype=torch.float32, device="cpu")
    kv.keys[0].normal_()
    kv.values[0].normal_()
    q = torch.randn(2, HEADS, 8, WIDTH)
    k, v = torch.randn(2, 2, KEY_HEADS, 8, WIDTH)
    lengths = (7, 5)

    found: list[list[Tensor]] = [[], []]
    for step, (start, end) in enumerate(itertools.pairwise(cuts)):
        parts = [(0, start, end)] + ([(1, 0, lengths[1])] if step == 0 else [])
        segments, row = [], 0
        for slot, first, last in parts:
            segments.append(Segment(row, row + last - first, slot, first))
            row += last - first
        packed_q, packed_k, packed_v = (
            torch.cat([tensor[slot, :, first:last] for slot, first, last in parts], dim=1)[None]
            for tensor in (q, k, v)
        )
        batch = PrefillBatch(kv, segments)
        out = batch.attend(NewTokens(0, packed_q, packed_k, packed_v, SCALE, window, softcap))
        for segment in segments:
            found[segment.slot] += list(out[0, segment.start : segment.end])
    decode = DecodeBatch(kv, torch.tensor(lengths), max(lengths) + 1)
    rows = torch.arange(2)
    new_q, new_k, new_v = (
        tensor[rows, :, torch.tensor(lengths)].unsqueeze(2) for tensor in (q, k, v)
    )
    out = decode.attend(NewTokens(0, new_q, new_k, new_v, SCALE, window, softcap))
    for slot in (0, 1):
        found[slot].append(out[slot, 0])

    for slot, length in enumerate(lengths):
        assert len(found[slot]) == length + 1
        expected = [
            attend_one(q[slot, :, at], k[slot], v[slot], at, window, softcap)
            for at in range(length + 1)
        ]
        assert_close(torch.stack(found[slot]), torch.stack(expected))
        assert_close(kv.keys[0][slot, :, : length + 1], k[slot, :, : length + 1], tolerance=0)
        assert_close(kv.values[0][slot, :, : length + 1], v[slot, :, : length + 1], tolerance=0)


class Recording:
    """A batch that notes what slot_attention hands it."""

    def __init__(self) -> None:
        self.called: dict[str, Any] = {}

    def attend(self, new: NewTokens) -> Tensor:
        names = ("layer", "scale", "window", "softcap")
        self.called = {name: getattr(new, name) for name in names}
        return new.query


class AttentionModule(nn.Module):
    layer_idx = 5


def call(**kwargs: Any) -> dict[str, Any]:
    batch = Recording()
    qkv = torch.zeros(1, 1, 1, 16)
    slot_attention(AttentionModule(), qkv, qkv, qkv, None, reft_batch=batch, **kwargs)
    return batch.called


@pytest.mark.parametrize(
    ("kwargs", "scale", "window", "softcap"),
    [
        ({}, 1 / math.sqrt(16), None, None),
        ({"scaling": 0.5, "dropout": 0.0, "is_causal": True}, 0.5, None, None),
        ({"sliding_window": 7, "softcap": 50.0, "position_bias": None}, 0.25, 7, 50.0),
    ],
)
def test_the_models_arguments_reach_the_batch(
    kwargs: dict[str, Any], scale: float, window: int | None, softcap: float | None
) -> None:
    expected = {"layer": 5, "scale": scale, "window": window, "softcap": softcap}
    assert call(**kwargs) == expected


@pytest.mark.parametrize("name", ["s_aux", "position_bias", "alibi", "head_mask"])
def test_attention_it_does_not_compute_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"AttentionModule: attention with '{name}'"):
        call(**{name: torch.zeros(1)})


def test_an_engine_refuses_a_model_it_does_not_reproduce(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here because its attention is made wrong."""
    original = attention._attention

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        return original(*args, **kwargs) * 1.1

    monkeypatch.setattr(attention, "_attention", wrong)
    with pytest.raises(UnsupportedModel) as caught:
        EmbeddedEngine(tiny_loaded(), EngineConfig(max_model_len=64))
    message = str(caught.value)
    assert message.startswith("LlamaForCausalLM: the engine's logits differ from the model's own")
    assert "expected at most 0.001; the architecture is not supported" in message
