"""Operations of a request, counted by hand: two layers of width 8 and a vocabulary of ten.

The embedding has 80 of the 500 parameters, and a layer's scores and weighted values of a pair of
tokens take 4 · 8 operations: 64 in both. The prompts have 4 and 8 tokens, the answer three, of
which the last one is written but not read.
"""

from __future__ import annotations

import pytest

from reft_core.adapter import Adapter, decode_adapter
from reft_core.sites import ModelDescription
from reft_core.spec import HeadSpec
from tests.factories import (
    random_adapter,
    random_classifier_bytes,
    random_prefix_adapter,
    shift_adapter,
)
from trainer.compare import serving
from trainer.compare.serving import Seq2SeqWorkload, Workload

MODEL = ModelDescription(
    name="by hand",
    architecture="llama",
    hidden_size=8,
    num_layers=2,
    vocab_size=10,
    fingerprint="0" * 64,
    num_kv_heads=2,
    head_dim=4,
    max_positions=64,
    num_parameters=500,
    sites={"block_output": (8, 8)},
)
WORK = Workload(MODEL, prompt_lengths=(4, 8), answer=3)
BASE = 2 * (420 * 8 + 3 * 80) + 64 * 8 * 4.5  # 8 tokens read, each sees 4.5 in the mean
LONGER_BY_TWO = 2 * (420 * 10 + 3 * 80) + 64 * 10 * 5.5
PROMPT_ALONE = 2 * 420 * 6 + 64 * 6 * 3.5
LOREFT = 8 * 2 + 2 * 8 + 2  # down, up and bias of rank 2: both projections are one


def test_the_bases_operations_are_those_of_what_is_read_and_written() -> None:
    assert WORK.base_flops() == BASE
    assert WORK.base_flops(2) == LONGER_BY_TWO
    assert WORK.base_flops(generates=False) == PROMPT_ALONE
    assert WORK.prefix_flops(3) == 64 * 3 * 8
    text = Workload(MODEL, prompt_lengths=(4, 8))
    assert text.base_flops() == 2 * 420 * 6 + 64 * 6 * 6, "each token of a text sees them all"


def test_an_encoder_decoder_reads_the_prompt_once_and_writes_the_answer() -> None:
    work = Seq2SeqWorkload(MODEL, (4, 8), 3, num_encoder=100, num_decoder=50)
    attended = 6 * 6 + 3 * (2 + 6)  # a token of the answer sees two of its own and the prompt
    assert work.base_flops() == 2 * (100 * 6 + (50 + 80) * 3) + 64 * attended


@pytest.mark.parametrize(
    ("adapter", "scope", "flops"),
    [
        (
            random_adapter(MODEL, layers=(0,), positions="f1+l2", tied=False),
            "prompt",
            2 * LOREFT * (1 + 2),
        ),
        (random_adapter(MODEL, positions="prompt"), "prompt", 2 * 2 * LOREFT * 6),
        (shift_adapter(MODEL, phase="all"), "every token", 2 * (8 + 8) * (6 + 2)),
        (random_prefix_adapter(MODEL, "kv", length=3), "prefix", 64 * 3 * 8),
        (random_prefix_adapter(MODEL, "embedding", length=2), "prefix", LONGER_BY_TWO - BASE),
        (
            random_prefix_adapter(MODEL, "kv", length=3, beside=shift_adapter(MODEL, phase="all")),
            "every token",
            2 * (8 + 8) * (6 + 2) + 64 * 3 * 8,
        ),
    ],
    ids=["two units", "both layers", "decode too", "keys and values", "embeddings", "mam"],
)
def test_an_adapter_costs_its_products_at_its_positions(
    adapter: Adapter, scope: str, flops: float
) -> None:
    found = serving.of_adapter(WORK, adapter)
    assert found.scope == scope
    assert found.extra_percent == pytest.approx(100 * flops / BASE)


def test_a_classifier_costs_its_edits_and_its_head() -> None:
    work = Workload(MODEL, prompt_lengths=(4, 8))
    adapter = decode_adapter(random_classifier_bytes(MODEL, 2, HeadSpec()))
    found = serving.of_adapter(work, adapter)
    flops = 2 * 2 * LOREFT * 1 + 2 * (8 * 2 + 2)
    assert found.scope == "text"
    assert found.extra_percent == pytest.approx(100 * flops / work.base_flops())


def test_what_is_no_adapter_is_counted_too() -> None:
    assert serving.longer_prompt(WORK, 2).extra_percent == pytest.approx(
        100 * (LONGER_BY_TWO - BASE) / BASE
    )
    head = serving.head(WORK, 18)
    assert head.extra_percent == pytest.approx(100 * (PROMPT_ALONE + 2 * 18 - BASE) / BASE)
    both = serving.of_both_sides(WORK, num_encoder=10, num_decoder=20)
    assert both.scope == "every token"
    assert both.extra_percent == pytest.approx(100 * 2 * (10 * 6 + 20 * 3) / BASE)
