"""The readers that meet hostile files, and the way from edits to our file."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
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

from reft_core.adapter import EditKey
from reft_core.convert import base_from_folder, reading, tensor_file
from reft_core.convert.assembling import Conventions, assemble
from reft_core.convert.base import layers_path
from reft_core.convert.reading import list_folder, read_json
from reft_core.convert.tensor_file import TensorFile, read_pickle
from reft_core.edits import Edit
from reft_core.errors import (
    AdapterFileInvalid,
    AdapterMismatch,
    AdapterTooLarge,
    InvalidRequest,
    UnsupportedModel,
)
from reft_core.loading import (
    LoadedModel,
    load_any,
    load_encoder,
    load_model,
    load_seq2seq,
)
from reft_core.spec import PositionSpec
from tests.reft_core.convert.support import FIXTURES, options
from tests.server.fakes import make_tokenizer


def test_a_file_over_the_cap_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{" + " " * 10 + "}")
    with pytest.raises(AdapterTooLarge, match=r"config\.json: got '12 bytes', expected at most 10"):
        read_json(path, max_bytes=10)
    path.write_text("{" + " " * reading.MAX_CONFIG_BYTES + "}")
    with pytest.raises(AdapterTooLarge, match="at most 1048576 bytes"):
        read_json(path)


def test_an_archive_that_inflates_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "MAX_ADAPTER_BYTES", 1_000_000)
    path = tmp_path / "bomb.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"\0" * 2_000_000)
    assert path.stat().st_size < 10_000
    with pytest.raises(AdapterTooLarge, match=r"bomb\.bin: got '2000000 bytes'"):
        read_pickle(path)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    torch.save({"weight": torch.ones(2)}, path)
    data = bytearray(path.read_bytes())
    for at in range(0, len(data) - 22, 7):
        data[at] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(AdapterFileInvalid, match=r"a\.bin: file: got .*expected"):
        read_pickle(path)


def test_a_folder_of_too_many_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_FILES", 1)
    for name in "ab":
        (tmp_path / name).touch()
    with pytest.raises(AdapterFileInvalid, match="files: got 2, expected at most 1"):
        list_folder(tmp_path)


def test_numbers_that_float32_cannot_hold_are_refused() -> None:
    tensors = TensorFile("f", {"w": torch.full((2,), 1e300, dtype=torch.float64)})
    with pytest.raises(AdapterFileInvalid, match="f: w: got 'NaN or infinity'"):
        tensors.take("w", (2,))


def _nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


ODD_TENSORS = [
    pytest.param(lambda: torch.empty(4, 24, device="meta"), id="meta"),
    pytest.param(_nested, id="nested"),
    pytest.param(lambda: torch.eye(4, 24).to_sparse(), id="sparse"),
    pytest.param(lambda: torch.ones(4, 24, dtype=torch.complex64), id="complex"),
    pytest.param(lambda: torch.empty(4, 24, dtype=torch.float4_e2m1fn_x2), id="float4"),
    pytest.param(lambda: torch.tensor(1j), id="complex-scalar"),
    pytest.param(lambda: torch.empty((), dtype=torch.long, device="meta"), id="meta-scalar"),
]


@pytest.mark.parametrize("make", ODD_TENSORS)
@pytest.mark.parametrize("reader", ["take", "take_int"])
def test_tensors_without_plain_numbers_are_refused(
    make: Callable[[], torch.Tensor], reader: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.bin"
    torch.save({"w": make()}, path)
    tensors = read_pickle(path)
    with pytest.raises(AdapterFileInvalid, match=r"^a\.bin: w: got .*, expected "):
        tensors.take("w", (4, 24)) if reader == "take" else tensors.take_int("w")


@pytest.mark.parametrize("make", ODD_TENSORS[:3])
def test_the_shape_of_a_tensor_without_plain_numbers_is_not_used(
    make: Callable[[], torch.Tensor],
) -> None:
    with pytest.raises(AdapterFileInvalid, match="f: w: got 'a tensor that holds no plain"):
        TensorFile("f", {"w": make()}).shape("w", 2, "a (4, 24) tensor")


def _conventions(rule: str = "l1", tied: bool = True, name: str = "a") -> Conventions:
    return Conventions("direft", PositionSpec(rule=rule, tied=tied), None, name, "test", "a.bin")


def _edit(rank: int, bias: bool = True) -> Edit:
    return Edit(
        down=torch.randn(24, rank),
        up=torch.randn(rank, 24),
        bias=torch.randn(rank) if bias else None,
        activation="sigmoid",
    )


def test_ranks_are_padded_without_changing_the_edit() -> None:
    """sigmoid(0) is not 0, yet a padded column contributes nothing."""
    edits = {EditKey(layer, "block_output", 0): _edit(rank) for layer, rank in ((0, 1), (2, 3))}
    result = assemble(edits, _conventions(), options())
    assert result.spec.sites["block_output"].rank == 3
    h = torch.randn(4, 24)
    for key, edit in edits.items():
        torch.testing.assert_close(result.edits[key].delta(h), edit.delta(h))


def test_missing_units_and_mixed_forms_are_refused() -> None:
    one = {EditKey(0, "block_output", 0): _edit(2)}
    with pytest.raises(AdapterFileInvalid, match=r"a\.bin: layer 0: got 'units without 1'"):
        assemble(one, _conventions("f1+l1", tied=False), options())
    two = one | {EditKey(1, "block_output", 0): _edit(2, bias=False)}
    with pytest.raises(AdapterFileInvalid, match=r"a\.bin: edits: .*one form for all"):
        assemble(two, _conventions(), options())


def test_a_name_our_files_refuse_is_an_option_error() -> None:
    with pytest.raises(InvalidRequest, match=r"name: got '\.\./x'"):
        assemble({EditKey(0, "block_output", 0): _edit(2)}, _conventions(name="../x"), options())


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


def test_a_site_the_base_lacks_is_refused() -> None:
    edits = {EditKey(0, "linear:mlp.c_fc", 0): Edit(shift=torch.ones(24))}
    with pytest.raises(AdapterMismatch, match=r"a\.bin: site: got 'linear:mlp\.c_fc', expected"):
        assemble(edits, _conventions(), options())
    with pytest.raises(UnsupportedModel, match="architecture: got 'nothing'"):
        layers_path("nothing", 2)
