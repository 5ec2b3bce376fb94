"""Encoders: one padded batch of adapters with different heads equals each text alone."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedModel, RobertaConfig, RobertaModel

from reft_core.adapter import Adapter, Head, decode_adapter, encode_adapter
from reft_core.classification import HeadedEncoder
from reft_core.encoder import EncoderRequest
from reft_core.engine.engine import EmbeddedEngine
from reft_core.errors import AdapterFileInvalid, AdapterMismatch, InvalidRequest, PromptTooLong
from reft_core.loading import LoadedModel
from reft_core.sites import describe_model
from reft_core.spec import HeadSpec, TaskSpec
from tests.factories import (
    HIDDEN_SIZE,
    NoTokenizer,
    random_adapter,
    random_classifier_bytes,
    random_prefix_adapter,
    request_for,
    tiny_loaded,
)
from tests.reference.slow import Stack, reference_classify

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 42,
}
ENCODERS = ("bert", "roberta")


@cache
def encoder(kind: str) -> PreTrainedModel:
    torch.manual_seed(5)
    if kind == "bert":
        model: PreTrainedModel = BertModel(BertConfig(**_SIZES))
    else:
        model = RobertaModel(RobertaConfig(**_SIZES, pad_token_id=1, type_vocab_size=1))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.25)
    return model.eval().requires_grad_(False)


@cache
def loaded(kind: str) -> LoadedModel:
    tokenizer: Any = NoTokenizer()
    model = encoder(kind)
    return LoadedModel(model, tokenizer, describe_model(model, f"tiny-{kind}"))


def classifiers(kind: str) -> list[Adapter]:
    """Adapters that differ in labels, pooling, dense layer, positions and method."""
    dense = HeadSpec(hidden=HIDDEN_SIZE, activation="tanh")
    linear = next(name for name in loaded(kind).description.sites if name.startswith("linear:"))
    files = [
        random_classifier_bytes(loaded(kind).description, 2, HeadSpec(), seed=1, positions="f1"),
        random_classifier_bytes(loaded(kind).description, 3, dense, seed=2, positions="f3"),
        random_classifier_bytes(
            loaded(kind).description,
            5,
            HeadSpec(pooling="mean"),
            seed=3,
            positions="f2+l2",
            tied=False,
        ),
        random_classifier_bytes(
            loaded(kind).description, 2, HeadSpec(pooling="pooler"), seed=4, positions="prompt"
        ),
        random_classifier_bytes(
            loaded(kind).description,
            4,
            HeadSpec(pooling="mean", hidden=7, activation="gelu"),
            seed=5,
            method="lora",
            sites=(linear,),
            positions="prompt",
        ),
        random_classifier_bytes(
            loaded(kind).description, 3, dense, seed=6, method="red", positions="l1"
        ),
    ]
    return [decode_adapter(data) for data in files]


@pytest.mark.parametrize("max_batch_tokens", [8192, 30])
@pytest.mark.parametrize("kind", ENCODERS)
def test_a_mixed_batch_equals_each_text_alone(kind: str, max_batch_tokens: int) -> None:
    heads = classifiers(kind)
    steering = random_adapter(loaded(kind).description, method="steering", positions="prompt")
    stacks: list[Stack] = [[(adapter, 1.0)] for adapter in heads]
    stacks += [[(heads[0], 0.0)], [(heads[1], -0.5)], [(steering, 0.7), (heads[2], 1.0)]]
    generator = torch.Generator().manual_seed(1)
    texts = [
        torch.randint(3, 96, (1 + (7 * index) % 23,), generator=generator).tolist()
        for index in range(2 * len(stacks))
    ]
    pairs = list(zip(stacks * 2, texts, strict=True))
    classifier = HeadedEncoder(loaded(kind), max_batch_tokens=max_batch_tokens)
    found = classifier.logits([request_for(stack, tokens) for stack, tokens in pairs])
    num_changed = 0
    for (stack, tokens), logits in zip(pairs, found, strict=True):
        expected = reference_classify(encoder(kind), tokens, stack)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        plain = reference_classify(encoder(kind), tokens, [(used, 0.0) for used, _ in stack])
        num_changed += bool((plain - expected).abs().max() > 0.1)
    assert num_changed > len(pairs) / 2, "the adapters of this test must matter"


def test_padding_changes_nothing() -> None:
    adapter = classifiers("roberta")[2]
    short, long = (
        request_for([(adapter, 1.0)], [7, 9]),
        request_for([(adapter, 1.0)], [5] * 30),
    )
    classifier = HeadedEncoder(loaded("roberta"))
    alone = classifier.logits([short])[0]
    torch.testing.assert_close(classifier.logits([long, short])[1], alone, atol=1e-5, rtol=1e-5)


def test_strength_zero_leaves_the_encoder_alone() -> None:
    adapter = classifiers("bert")[1]
    still = replace(adapter, edits={})
    requests = [
        request_for([(adapter, 0.0)], [4, 5, 6]),
        request_for([(still, 1.0)], [4, 5, 6]),
    ]
    first, second = HeadedEncoder(loaded("bert")).logits(requests)
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("kind", ENCODERS)
def test_pairs_are_read_with_their_segments(kind: str) -> None:
    """BERT embeds which text a token belongs to; RoBERTa has no segments and ignores them."""
    adapter = classifiers(kind)[2]
    uses = request_for([(adapter, 1.0)], [5]).uses
    pairs = [([5, 6, 7, 8, 9], [0, 0, 1, 1, 1]), ([5, 6, 7], [0, 1, 1]), ([5, 6, 7, 8], [0] * 4)]
    requests = [EncoderRequest(tuple(tokens), uses, tuple(told)) for tokens, told in pairs]
    found = HeadedEncoder(loaded(kind)).logits([*requests, EncoderRequest((5, 6, 7, 8), uses)])
    for (tokens, told), logits in zip(pairs, found, strict=False):
        segments = told if kind == "bert" else None
        expected = reference_classify(encoder(kind), tokens, [(adapter, 1.0)], segments)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[2], found[3])
    unsaid = reference_classify(encoder(kind), pairs[0][0], [(adapter, 1.0)])
    assert bool((unsaid - found[0]).abs().max() > 0.01) == (kind == "bert")


def test_a_regression_puts_out_one_number() -> None:
    adapter = decode_adapter(
        random_classifier_bytes(loaded("bert").description, 1, HeadSpec(), positions="f1")
    )
    assert adapter.spec.task == TaskSpec(kind="regression")
    (found,) = HeadedEncoder(loaded("bert")).logits([request_for([(adapter, 1.0)], [5, 6])])
    expected = reference_classify(encoder("bert"), [5, 6], [(adapter, 1.0)])
    assert found.shape == (1,)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_head_needs_no_edits() -> None:
    """As a baseline that was trained on the frozen encoder."""
    edited = classifiers("bert")[1]
    spec = edited.spec.model_copy(update={"sites": {}, "method": "none"})
    alone = decode_adapter(encode_adapter(spec, {}, head=edited.head))
    assert alone.spec.num_tensors == len(alone.spec.tensor_shapes()) == 4
    found, base = HeadedEncoder(loaded("bert")).logits(
        [request_for([(alone, 1.0)], [5, 6]), request_for([(edited, 0.0)], [5, 6])]
    )
    torch.testing.assert_close(found, base)


def test_the_longest_text_fits() -> None:
    for kind, most in (("bert", 42), ("roberta", 40)):
        classifier = HeadedEncoder(loaded(kind))
        stack = [(classifiers(kind)[0], 1.0)]
        assert classifier.encoder.max_tokens == most
        assert classifier.logits([request_for(stack, [5] * most)])[0].shape == (2,)
        with pytest.raises(PromptTooLong, match=f"at most {most}"):
            classifier.logits([request_for(stack, [5] * (most + 1))])


def test_bad_requests_are_named() -> None:
    classifier = HeadedEncoder(loaded("bert"))
    good, other = classifiers("bert")[0], classifiers("bert")[1]
    for stack, tokens, message in [
        ([(good, 1.0)], [], "at least one token"),
        ([(good, 1.0)], [96], "input: got 96, expected token ids 0 to 95"),
        ([], [5], "exactly one that has a head"),
        ([(good, 1.0), (other, 1.0)], [5], "exactly one that has a head"),
    ]:
        with pytest.raises(InvalidRequest, match=message):
            classifier.logits([request_for(stack, tokens)])
    with pytest.raises(AdapterMismatch, match=r"base\.architecture"):
        classifier.logits([request_for([(classifiers("roberta")[0], 1.0)], [5])])
    prefixed = random_prefix_adapter(loaded("bert").description, "embedding")
    with pytest.raises(InvalidRequest, match="none with a prefix"):
        classifier.logits([request_for([(prefixed, 1.0), (good, 1.0)], [5])])


def test_the_head_is_in_the_file() -> None:
    head = HeadSpec(hidden=7, activation="tanh")
    adapter = decode_adapter(
        random_classifier_bytes(loaded("bert").description, 3, head, positions="f1")
    )
    assert adapter.spec.head == head
    assert adapter.head is not None
    assert set(adapter.head.tensors()) == set(head.tensor_shapes(HIDDEN_SIZE, 3))
    edits = sum(edit.num_parameters for edit in adapter.edits.values())
    assert adapter.spec.num_parameters == edits + HIDDEN_SIZE * 7 + 7 + 7 * 3 + 3


def test_a_causal_engine_refuses_a_head() -> None:
    llama = tiny_loaded()
    adapter = random_adapter(llama.description)
    spec = adapter.spec.model_copy(
        update={"head": HeadSpec(), "task": TaskSpec(kind="classification", labels=("a", "b"))}
    )
    head = Head(torch.zeros(HIDDEN_SIZE, 2), torch.zeros(2))
    data = encode_adapter(spec, adapter.edits, head=head)
    with pytest.raises(AdapterMismatch, match=r"task\.kind"):
        EmbeddedEngine(llama).load_adapter(decode_adapter(data))


@pytest.mark.parametrize(
    "changes",
    [
        {"head": None},
        {"task": TaskSpec()},
        {"task": TaskSpec(kind="regression")},
        {"task": TaskSpec(kind="classification", labels=("a", "b", "c"))},
        {"head": HeadSpec(hidden=7)},
    ],
)
def test_a_head_that_does_not_fit_its_spec_is_refused(changes: dict[str, Any]) -> None:
    adapter = decode_adapter(
        random_classifier_bytes(loaded("bert").description, 2, HeadSpec(), positions="f1")
    )
    spec = adapter.spec.model_copy(update=changes)
    with pytest.raises(AdapterFileInvalid, match="head"):
        encode_adapter(spec, adapter.edits, head=adapter.head)


def test_an_activation_needs_a_dense_layer() -> None:
    with pytest.raises(ValueError, match="needs a dense layer"):
        HeadSpec(activation="tanh")
