from __future__ import annotations

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.roofline import Shape, decode_floor_s

SMALL = Shape(
    layer_parameters=1000,
    head_parameters=100,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)


def test_decode_counts_by_hand() -> None:
    # 2 operations a parameter and row; 4 a pair, layer and dimension of all heads.
    assert SMALL.decode_flops(batch=3, context=5) == 2 * 3 * 1100 + 4 * 2 * 32 * 15
    # weights once; a key and a value for each layer, row and position
    assert SMALL.decode_bytes(batch=3, context=5, itemsize=2) == 2 * (1100 + 2 * 2 * 16 * 15)


def test_prefill_reads_logits_of_one_token() -> None:
    pairs = 1 + 2 + 3
    assert SMALL.prefill_flops(3) == 2 * (3 * 1000 + 100) + 4 * 2 * 32 * pairs


def test_floor_is_the_larger_of_arithmetic_and_memory() -> None:
    flops, num_bytes = SMALL.decode_flops(1, 1), SMALL.decode_bytes(1, 1, 4)
    floor = decode_floor_s(SMALL, 1, 1, 4, peak=flops, bandwidth=num_bytes * 10)
    assert floor == pytest.approx(1.0)
    floor = decode_floor_s(SMALL, 1, 1, 4, peak=flops * 10, bandwidth=num_bytes / 2)
    assert floor == pytest.approx(2.0)


def test_shape_of_a_model() -> None:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    shape = Shape.of(LlamaForCausalLM(config))
    projections = 16 * 16 + 2 * 16 * 8 + 16 * 16
    assert shape == Shape(
        layer_parameters=2 * (projections + 3 * 16 * 24),
        head_parameters=50 * 16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
    )
