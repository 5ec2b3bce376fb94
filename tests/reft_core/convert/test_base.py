"""The base model of a conversion, described from its config alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from reft_core.convert import base_from_folder
from reft_core.convert.base import layers_path
from reft_core.errors import UnsupportedModel
from reft_core.loading import LoadedModel, load_any, load_encoder, load_model, load_seq2seq
from tests.reft_core.convert.support import FIXTURES, options
from tests.server.fakes import make_tokenizer


def test_the_base_is_described_from_its_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((FIXTURES / "base" / "config.json").read_text())
    assert base_from_folder(str(tmp_path), "tiny-fixture") == options().base
    with pytest.raises(UnsupportedModel, match="base: got") as caught:
        base_from_folder(str(tmp_path / "none"))
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UnsupportedModel, match="base: got 'clip', expected a model type with"):
        base_from_folder(str(tmp_path))


_BERT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
_BERT |= {"num_attention_heads": 2, "max_position_embeddings": 32}
_T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
_BART = {"vocab_size": 40, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
_BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 1}


@pytest.mark.parametrize(
    ("model", "load"),
    [
        (lambda: BertModel(BertConfig(**_BERT)), load_encoder),
        (lambda: BertForMaskedLM(BertConfig(**_BERT)), load_encoder),
        (lambda: RobertaModel(RobertaConfig(**_BERT)), load_encoder),
        (lambda: BertLMHeadModel(BertConfig(**_BERT, is_decoder=True)), load_model),
        (
            lambda: T5ForConditionalGeneration(T5Config(**_T5, num_layers=3, num_decoder_layers=2)),
            load_seq2seq,
        ),
        (
            lambda: BartForConditionalGeneration(
                BartConfig(**_BART, encoder_layers=3, decoder_layers=2)
            ),
            load_seq2seq,
        ),
        (
            lambda: BartForConditionalGeneration(
                BartConfig(**_BART, encoder_layers=2, decoder_layers=2)
            ),
            load_seq2seq,
        ),
    ],
    ids=["bert", "bert-mlm", "roberta", "bert-decoder", "t5", "bart-3-2", "bart-2-2"],
)
def test_bases_of_every_kind_are_described_as_they_are_loaded(
    model: Callable[[], PreTrainedModel], load: Callable[[str], LoadedModel], tmp_path: Path
) -> None:
    model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    loaded = load(str(tmp_path)).description
    assert base_from_folder(str(tmp_path)) == loaded
    assert load_any(str(tmp_path)).description == loaded


@pytest.mark.smollm2
def test_the_demo_is_described_as_it_is() -> None:
    """Its shape is written down, so that no command has to de-quantise it first."""
    expected = load_model("demo").description
    assert base_from_folder("demo") == expected


@pytest.mark.parametrize(
    ("architecture", "path", "transposed"),
    [
        ("llama", "model.layers", set()),
        ("gpt2", "transformer.h", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        ("gpt_neox", "gpt_neox.layers", set()),
    ],
)
def test_layers_are_found_from_the_model_type(
    architecture: str, path: str, transposed: set[str]
) -> None:
    assert layers_path(architecture, 2) == (path, transposed)


def test_a_model_type_that_transformers_lacks_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="architecture: got 'nothing'"):
        layers_path("nothing", 2)
