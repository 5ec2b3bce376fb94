"""Encoder-decoders: a batch of texts with different adapters equals each text alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from reft_core.adapter import Adapter
from reft_core.errors import AdapterMismatch, InvalidRequest
from reft_core.loading import LoadedModel, load_seq2seq
from reft_core.seq2seq import Seq2SeqGenerator
from reft_core.sites import describe_seq2seq
from tests.factories import (
    NoTokenizer,
    random_adapter,
    random_prefix_adapter,
    request_for,
    tiny_description,
)
from tests.reference.slow import Stack, reference_encode, reference_seq2seq

NUM_LAYERS = 3  # of the encoder; the decoder has 2
MAX_TOKENS = 6
KINDS = ("t5", "bart")


@cache
def loaded(kind: str) -> LoadedModel:
    torch.manual_seed(3)
    model: PreTrainedModel
    if kind == "t5":
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=96,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=NUM_LAYERS,
                num_decoder_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
                tie_word_embeddings=False,
            )
        )
    else:
        model = BartForConditionalGeneration(
            BartConfig(
                vocab_size=96,
                d_model=32,
                encoder_layers=NUM_LAYERS,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                max_position_embeddings=40,
                forced_eos_token_id=None,
            )
        )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.3)
    tokenizer: Any = NoTokenizer()
    model = model.eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, describe_seq2seq(model, f"tiny-{kind}"))


def adapters(kind: str) -> list[Adapter]:
    """Methods, positions and sites that an encoder can have."""
    model = loaded(kind).description
    linear = next(name for name in model.sites if name.startswith("linear:"))
    made = [
        random_adapter(model, seed=1, method="loreft", positions="f2+l2", tied=False),
        random_adapter(model, seed=2, method="direft", positions="prompt", rank=3),
        random_adapter(model, seed=3, method="red", positions="l1"),
        random_adapter(
            model,
            seed=4,
            method="series_adapter",
            sites=("block_output",),
            positions="f3",
            phase="prompt",
        ),
        random_adapter(
            model, seed=5, method="lora", sites=(linear,), positions="prompt", phase="prompt"
        ),
        random_adapter(model, seed=6, method="loreft", layers=[NUM_LAYERS - 1], positions="0,-2"),
    ]
    if "attn_output" in model.sites:
        made.append(random_adapter(model, seed=7, sites=("attn_output",), positions="prompt"))
    return made


def stacks(kind: str) -> list[Stack]:
    alone = adapters(kind)
    return [[], *([(one, 1.0)] for one in alone), [(alone[1], 0.5), (alone[0], -0.7)]]


def mixed(kind: str) -> list[tuple[Stack, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (stack, torch.randint(3, 96, (1 + (7 * index) % 19,), generator=generator).tolist())
        for index, stack in enumerate(stacks(kind) * 2)
    ]


@pytest.mark.parametrize("max_batch_tokens", [8192, 25])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_of_a_mixed_batch(kind: str, max_batch_tokens: int) -> None:
    model = loaded(kind).model
    pairs = mixed(kind)
    generator = Seq2SeqGenerator(loaded(kind), max_batch_tokens=max_batch_tokens)
    found = generator.generate([request_for(*pair) for pair in pairs], MAX_TOKENS)
    num_changed = 0
    for (stack, tokens), answer in zip(pairs, found, strict=True):
        expected = reference_seq2seq(model, tokens, MAX_TOKENS, stack, NUM_LAYERS)
        assert answer == expected, [adapter.spec.name for adapter, _ in stack]
        num_changed += expected != reference_seq2seq(model, tokens, MAX_TOKENS, [], NUM_LAYERS)
    assert num_changed > len(pairs) / 3, "the adapters of this test must matter"


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_states_of_a_mixed_batch(kind: str) -> None:
    model: Any = loaded(kind).model
    pairs = mixed(kind)
    encoded = Seq2SeqGenerator(loaded(kind)).encoder.encode([request_for(*pair) for pair in pairs])
    for row, (stack, tokens) in enumerate(pairs):
        expected = reference_encode(model.get_encoder(), tokens, stack, NUM_LAYERS)
        states = encoded.output.last_hidden_state[row, : len(tokens)]
        torch.testing.assert_close(states, expected.last_hidden_state[0], atol=1e-4, rtol=1e-4)


def test_beams_are_those_of_transformers() -> None:
    model: Any = loaded("t5").model
    tokens = [9, 8, 7, 6]
    found = Seq2SeqGenerator(loaded("t5")).generate([request_for([], tokens)], 5, num_beams=3)
    expected = model.generate(torch.tensor([tokens]), max_new_tokens=5, num_beams=3)[0].tolist()
    assert found[0] == [token for token in expected[1:] if token != model.config.eos_token_id]


def test_what_does_not_end_at_the_encoder_is_refused() -> None:
    model = loaded("t5").description
    generator = Seq2SeqGenerator(loaded("t5"))
    linear = next(name for name in model.sites if name.startswith("linear:"))
    everywhere = random_adapter(model, method="lora", sites=(linear,), positions="prompt")
    prefixed = random_prefix_adapter(model, "embedding")
    for adapter, message in ((everywhere, "phase: got 'all'"), (prefixed, "none with a prefix")):
        with pytest.raises(InvalidRequest, match=message):
            generator.generate([request_for([(adapter, 1.0)], [5])], 3)
    with pytest.raises(AdapterMismatch, match=r"base\.architecture"):
        generator.generate([request_for([(random_adapter(tiny_description()), 1.0)], [5])], 3)
    for options, message in (({"max_tokens": 0}, "max_tokens"), ({"num_beams": 0}, "num_beams")):
        with pytest.raises(InvalidRequest, match=f"{message}: got 0, expected at least 1"):
            generator.generate([request_for([], [5])], **({"max_tokens": 1} | options))


def test_the_encoder_is_described_and_not_the_decoder() -> None:
    for kind in KINDS:
        description = loaded(kind).description
        assert (description.num_layers, description.hidden_size) == (NUM_LAYERS, 32)
        assert description.architecture == kind
    assert "attn_output" in loaded("bart").description.sites


def test_a_saved_model_loads_with_the_same_description(tmp_path: Any) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    loaded("t5").model.save_pretrained(tmp_path / "tiny-t5")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "tiny-t5")
    again = load_seq2seq(str(tmp_path / "tiny-t5"))
    assert again.description == loaded("t5").description


@pytest.mark.parametrize("max_batch_tokens", [8192, 25])
@pytest.mark.parametrize("kind", KINDS)
def test_given_answers_are_scored_as_each_alone(kind: str, max_batch_tokens: int) -> None:
    model: Any = loaded(kind).model
    pairs = mixed(kind)[:8]
    given = [[[7, 1], [5, 9, 4, 1], [3]][: place % 4] for place in range(len(pairs))]
    generator = Seq2SeqGenerator(loaded(kind), max_batch_tokens=max_batch_tokens)
    found = generator.score([request_for(*pair) for pair in pairs], given)
    for (stack, tokens), answers, scores in zip(pairs, given, found, strict=True):
        encoded = reference_encode(model.get_encoder(), tokens, stack, NUM_LAYERS)
        expected = []
        for answer in answers:
            read = torch.tensor([[model.config.decoder_start_token_id, *answer[:-1]]])
            logits = model(encoder_outputs=encoded, decoder_input_ids=read).logits[0]
            logprobs = logits.double().log_softmax(-1)
            expected.append(float(logprobs[range(len(answer)), answer].sum()))
        assert scores == pytest.approx(expected, abs=1e-4)
    assert generator.score([request_for([], [5])], [[]]) == [[]]
