"""AdapterHub's own outputs, reproduced by its folders converted to our file."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig, MistralConfig, PreTrainedConfig

from reft_core.adapter import Adapter, EditKey, decode_adapter
from reft_core.convert import ConvertOptions, convert
from reft_core.convert.base import describe_config
from reft_core.errors import (
    AdapterFileInvalid,
    AdapterMismatch,
    InvalidRequest,
    ReftError,
    UnsupportedFeature,
)
from tests.reference.slow import reference_logits
from tests.reft_core.convert.support import (
    Case,
    assert_reproduces,
    case_description,
    case_names,
    load_case,
    options,
    tiny_base,
)

LLAMA_CASES = case_names("adapterhub")
GPT2_CASES = case_names("adapterhub", own_base=True)


def case_options(case: Case, **given: Any) -> ConvertOptions:
    """Of ReFT the method is not recorded in its folder, but in the case."""
    defaults = {"base": case_description(case), "method": case.facts.get("method")}
    return options(**(defaults | given))


def converted(case: Case, **given: Any) -> Adapter:
    return decode_adapter(convert(case.adapter_folder, "adapters", case_options(case, **given)))


@pytest.mark.parametrize("name", LLAMA_CASES + GPT2_CASES)
def test_reproduces_adapters(name: str) -> None:
    case = load_case("adapterhub", name)
    assert_reproduces(converted(case), case)


@pytest.mark.parametrize(
    ("name", "rule", "tied", "units", "activation"),
    [
        ("loreft-default", "f3", True, 1, "identity"),
        ("loreft-tied", "f2+l2", True, 1, "identity"),
        ("loreft-untied-pickle", "f1+l3", False, 2, "identity"),
        ("noreft-relu-suffix", "l2", True, 1, "relu"),
        ("direft-swish", "f3", True, 1, "silu"),
    ],
)
def test_reads_what_is_recorded(
    name: str, rule: str, tied: bool, units: int, activation: str
) -> None:
    spec = converted(load_case("adapterhub", name)).spec
    assert (spec.positions.rule, spec.positions.tied) == (rule, tied)
    assert spec.positions.to_rule().num_units == units
    assert spec.sites["block_output"].activation == activation
    assert spec.training.hyperparameters["source_version"] == "adapters.1.3.0"


def test_the_name_comes_from_the_folder_unless_given() -> None:
    case = load_case("adapterhub", "direft-tied")
    assert converted(case, name=None).spec.name == "fixture"
    assert converted(case, name="mine").spec.name == "mine"


def test_direft_must_be_told_from_noreft() -> None:
    """`adapters` stores both alike; the wrong method would be another function."""
    case = load_case("adapterhub", "direft-tied")
    stored = json.loads((case.adapter_folder / "adapter_config.json").read_text())
    assert "subtract_projection" not in stored["config"]
    assert not case.facts["subtracts"]
    as_noreft = converted(case, method="noreft")
    with pytest.raises(AssertionError):
        assert_reproduces(as_noreft, case)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("loreft-tied", {"method": None}, r"^method: got None, expected 'loreft' \(subtracts"),
        ("direft-tied", {"method": None}, r"^method: got None, expected 'noreft' .*'direft'"),
        ("loreft-tied", {"method": "noreft"}, "^method: got 'noreft'.*orthogonality=True"),
        ("direft-tied", {"method": "loreft"}, "^method: got 'loreft'.*orthogonality=False"),
        ("loreft-tied", {"template": None}, "^template: got None"),
        ("loreft-tied", {"positions": "f3"}, "^positions: got 'f3', expected 'f2[+]l2'"),
        ("loreft-tied", {"tied": False}, "^tied: got False, expected True"),
        ("loreft-tied", {"anchor": "before_last"}, "^anchor: got"),
        ("loreft-tied", {"activation": "relu"}, "^activation: got 'relu', expected 'identity'"),
        ("loreft-tied", {"layers": (1,)}, "^layers: "),
        ("loreft-tied", {"phase": "all"}, "^phase: got 'all', expected 'prompt'"),
    ],
)
def test_wrong_options_are_named(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        converted(load_case("adapterhub", name), **given)


@pytest.mark.parametrize("change", [{"hidden_size": 32}, {"architecture": "gpt2"}])
def test_another_base_model_is_refused(change: dict[str, Any]) -> None:
    base = replace(options().base, **change)
    with pytest.raises(AdapterMismatch, match=r"adapter_config\.json: (hidden_size|model_type)"):
        converted(load_case("adapterhub", "loreft-tied"), base=base)


def test_a_layer_beyond_the_base_is_refused() -> None:
    base = replace(options().base, num_layers=2)
    with pytest.raises(AdapterMismatch, match="layer: got 2, expected 0 to 1"):
        converted(load_case("adapterhub", "loreft-untied-pickle"), base=base)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "union"}, "architecture: got 'union', expected one of reft, lora.*MAM"),
        ({"architecture": "prompt_tuning"}, "architecture: got 'prompt_tuning', .*on no decoder"),
        ({"architecture": ["reft"]}, r"architecture: got \['reft'\]"),
        ({"architecture": None}, r"config: got \['dtype', .*expected only .*mh_adapter"),
        ({"prefix_positions": "3"}, "prefix_positions: got '3'"),
        ({"prefix_positions": True}, "prefix_positions: got True"),
        ({"prefix_positions": 0, "suffix_positions": 0}, "at least one position"),
        ({"prefix_positions": 99999}, "positions: got 'f99999"),
        ({"tied_weights": 1}, "tied_weights: got 1"),
        ({"tied_weights": False}, "unit 1"),
        ({"orthogonality": None}, "orthogonality: got None"),
        ({"non_linearity": "leakyrelu"}, "non_linearity: got 'leakyrelu', expected null or"),
        ({"non_linearity": ["relu"]}, "non_linearity"),
        ({"r": 5}, r"learned_source\.weight: got|original: got"),
        ({"r": 0}, "r: got 0, expected 1 to 24"),
        ({"layers": [0]}, r"layers: got \[0\], expected \[0, 1, 2\]"),
        ({"layers": "some"}, "layers: got 'some'"),
        ({"output_reft": False}, "output_reft: got False"),
        ({"extra": 1}, r"config: got \['extra'\]"),
        ({"subtract_projection": False}, "subtract_projection=False"),
    ],
)
def test_bad_configs_name_their_key(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = _copy("loreft-tied", tmp_path)
    _change_config(folder, fields)
    with pytest.raises(ReftError, match=message):
        convert(folder, "adapters", options(method="loreft"))


def _tensors(change: Any) -> Any:
    def damage(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


SOURCE = "model.layers.0.reft_layer.refts.fixture.units.0.learned_source.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_text("hello there"), "file: got .*expected a safetensors file"),
        (lambda p: p.write_bytes(b""), "a safetensors file"),
        (lambda p: p.write_bytes(p.read_bytes()[:-8]), "a safetensors file"),
        (lambda p: p.unlink(), r"exactly one of the files adapter\.safetensors"),
        (lambda p: torch.save({}, p.parent / "pytorch_adapter.bin"), "exactly one of the files"),
        (_tensors(lambda t: t.pop(SOURCE)), r"learned_source\.weight: got 'no such key"),
        (_tensors(lambda t: t.update(x=torch.ones(1))), "keys: got 'x'"),
        (_tensors(lambda t: t.update({SOURCE: torch.ones(3, 24)})), r"got 'shape \(3, 24\)'"),
        (_tensors(lambda t: t.update({SOURCE: torch.full((4, 24), torch.inf)})), "infinity"),
        (
            _tensors(lambda t: t.update({SOURCE.replace("fixture", "other"): torch.ones(4, 24)})),
            "one a layer|exactly one adapter",
        ),
        (
            _tensors(lambda t: t.update({SOURCE.replace("units.0", "units.1"): torch.ones(1)})),
            "keys: got",
        ),
    ],
)
def test_bad_tensor_files_name_their_key(damage: Any, message: str, tmp_path: Path) -> None:
    folder = _copy("loreft-tied", tmp_path)
    damage(folder / "adapter.safetensors")
    with pytest.raises(AdapterFileInvalid, match=message):
        convert(folder, "adapters", options(method="loreft"))


LAYERS_OF_DIGITS = {
    "loreft-tied": SOURCE.replace(".0.reft_layer", "." + "1" * 5000 + ".reft_layer"),
    "series-pfeiffer": f"model.layers.{'1' * 5000}.output_adapters.adapters.fixture.scaling",
    "lora": f"model.layers.{'1' * 5000}.self_attn.q_proj.loras.fixture.lora_A",
}
REPEATING = {
    "loreft-tied": "a." + "1.reft_layer.refts.x." * 100_000,
    "series-pfeiffer": "a." + "1.output_adapters.adapters.x." * 100_000,
    "lora": "a" + ".loras.x" * 100_000,
    "prefix-pickle": "a." + "prefix_tunings.x." * 100_000,
}
"""Names at which a pattern that tries every place to begin and end takes minutes or hours."""


@pytest.mark.parametrize(
    ("name", "key"), [*LAYERS_OF_DIGITS.items(), *REPEATING.items()], ids=lambda text: text[:16]
)
def test_names_made_to_be_slow_are_refused(name: str, key: str, tmp_path: Path) -> None:
    folder = _copy(name, tmp_path)
    path = folder / "adapter.safetensors"
    if path.exists():
        save_file(load_file(path) | {key: torch.ones(1)}, path)
    else:
        path = folder / "pytorch_adapter.bin"
        torch.save(torch.load(path, weights_only=True) | {key: torch.ones(1)}, path)
    given = {"method": "loreft"} if name == "loreft-tied" else {}
    with pytest.raises(ReftError, match=r"keys: got|expected a layer's|LoRA inside") as caught:
        convert(folder, "adapters", options(**given))
    assert len(str(caught.value)) < 1000


def test_a_prediction_head_is_refused(tmp_path: Path) -> None:
    folder = _copy("loreft-tied", tmp_path)
    (folder / "head_config.json").write_text("{}")
    with pytest.raises(UnsupportedFeature, match=r"head_config\.json"):
        convert(folder, "adapters", options(method="loreft"))


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, ""])
def test_a_config_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    folder = _copy("loreft-tied", tmp_path)
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(
        AdapterFileInvalid, match=r"adapter_config\.json: (not valid JSON|document)"
    ):
        convert(folder, "adapters", options(method="loreft"))


# -- LoRA --------------------------------------------------------------------------------------


def test_lora_follows_the_stored_names() -> None:
    """``intermediate_lora`` of a Llama is on down_proj, of other models on up_proj."""
    spec = converted(load_case("adapterhub", "lora-all-pickle")).spec
    attention = [f"linear:self_attn.{name}_proj" for name in "kqv"]
    assert sorted(spec.sites) == ["linear:mlp.down_proj", "linear:mlp.up_proj", *attention]
    assert {site.layers for site in spec.sites.values()} == {(0, 2)}
    assert {site.phase for site in spec.sites.values()} == {"all"}
    assert (spec.method, spec.positions.rule) == ("lora", "prompt")


def test_a_fused_map_holds_its_matrices_side_by_side() -> None:
    adapter = converted(load_case("adapterhub", "lora-gpt2"))  # q and v, rank 2 each
    up = adapter.edits[EditKey(0, "linear:attn.c_attn", 0)].up
    assert up is not None
    assert up.shape == (4, 48)
    q, k, v = up.chunk(3, dim=1)
    assert not k.any()
    assert not q[2:].any()
    assert not v[:2].any()


def test_lora_of_old_versions_is_not_scaled(tmp_path: Path) -> None:
    """`adapters` reads α as r there, because it was trained without α/r."""
    case = load_case("adapterhub", "lora")  # r 4, α 6
    folder = _copy("lora", tmp_path)
    path = folder / "adapter_config.json"
    key = EditKey(0, "linear:self_attn.q_proj", 0)
    scaled = converted(case).edits[key].up
    assert scaled is not None
    for version, factor in (("1.0.1", 1.5), ("0.2.2", 1.5), ("1.1.0", 1.0), ("1.10.0", 1.0)):
        _change(path, {"version": f"adapters.{version}"})
        up = decode_adapter(convert(folder, "adapters", options())).edits[key].up
        torch.testing.assert_close(up, scaled / factor)


LORA_A = "model.layers.1.self_attn.q_proj.loras.fixture.lora_A"


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"use_gating": True}, UnsupportedFeature, "use_gating: got True, expected False: a gate"),
        ({"use_dora": True}, UnsupportedFeature, "use_dora: got True, expected False: DoRA"),
        ({"vera_d": 0.1}, UnsupportedFeature, r"vera_d: got 0\.1, expected None: VeRA"),
        ({"vera_b": 0.0}, UnsupportedFeature, r"vera_b: got 0\.0, expected None: VeRA"),
        ({"composition_mode": "scale"}, UnsupportedFeature, "got 'scale', expected 'add'.*IA"),
        ({"architecture": "mtl_lora"}, UnsupportedFeature, "architecture: got 'mtl_lora'"),
        ({"new": 1}, AdapterFileInvalid, r"config: got \['new'\]"),
        ({"r": 0}, AdapterFileInvalid, "r: got 0, expected 1 to 1024"),
        ({"r": True}, AdapterFileInvalid, "r: got True"),
        ({"r": 3}, AdapterFileInvalid, r"lora_A: got 'shape \(4, 24\)', expected shape \(3, 24"),
        ({"alpha": "8"}, AdapterFileInvalid, "alpha: got '8', expected a positive number"),
        ({"alpha": 0}, AdapterFileInvalid, "alpha: got 0"),
        ({"attn_matrices": ["q", "o"]}, AdapterFileInvalid, r"attn_matrices: got \['q', 'o'\]"),
        ({"attn_matrices": "qv"}, AdapterFileInvalid, "attn_matrices: got 'qv'"),
        (
            {"attn_matrices": ["q"]},
            AdapterFileInvalid,
            r"expected maps of \['q'\] and 0 of the MLP",
        ),
        ({"attn_matrices": ["q", "k"]}, AdapterFileInvalid, r"expected maps of \['q', 'k'\] and 0"),
        ({"selfattn_lora": False}, AdapterFileInvalid, r"expected maps of \[\] and 0 of the MLP"),
        ({"selfattn_lora": 1}, AdapterFileInvalid, "selfattn_lora: got 1, expected true or false"),
        (
            {"output_lora": True},
            AdapterFileInvalid,
            r"expected maps of \['q', 'v'\] and 1 of the MLP",
        ),
        ({"leave_out": [1]}, AdapterFileInvalid, r"layer 1: got .*expected LoRA on \[\]"),
        ({"leave_out": [3]}, AdapterMismatch, "leave_out: layer: got 3, expected 0 to 2"),
        ({"leave_out": "1"}, AdapterFileInvalid, "leave_out: got '1'"),
    ],
)
def test_what_lora_cannot_be_is_refused(
    fields: dict[str, Any], error: type[ReftError], message: str, tmp_path: Path
) -> None:
    folder = _copy("lora", tmp_path)
    _change_config(folder, fields)
    with pytest.raises(error, match=message):
        convert(folder, "adapters", options())


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda t: t.pop(LORA_A), AdapterFileInvalid, "lora_A: got 'no such key'"),
        (lambda t: t.clear(), AdapterFileInvalid, "exactly one adapter"),
        (lambda t: t.update(x=torch.ones(1)), AdapterFileInvalid, "keys: got 'x'"),
        (lambda t: t.update({LORA_A: torch.ones(4, 23)}), AdapterFileInvalid, r"\(4, 23\)"),
        (lambda t: t.update({LORA_A: torch.full((4, 24), torch.nan)}), AdapterFileInvalid, "NaN"),
        (
            lambda t: t.update({LORA_A.replace("fixture", "b"): torch.ones(4, 24)}),
            AdapterFileInvalid,
            r"got \['b', 'fixture'\], expected exactly one adapter",
        ),
        (
            lambda t: t.update({LORA_A.replace("q_proj", "z_proj"): torch.ones(4, 24)}),
            AdapterMismatch,
            "z_proj.*expected a layer's .*q_proj",
        ),
        (
            lambda t: t.update({"model.lm_head.loras.fixture.lora_A": torch.ones(4, 24)}),
            UnsupportedFeature,
            "expected LoRA inside the decoder layers",
        ),
    ],
)
def test_bad_lora_tensors_name_their_key(
    damage: Any, error: type[ReftError], message: str, tmp_path: Path
) -> None:
    folder = _copy("lora", tmp_path)
    _tensors(damage)(folder / "adapter.safetensors")
    with pytest.raises(error, match=message):
        convert(folder, "adapters", options())


# -- bottleneck adapters -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method", "sites", "source", "activation"),
    [
        ("series-pfeiffer", "series_adapter", ["block_output"], "output", "relu"),
        ("series-adapterplus", "series_adapter", ["block_output"], "output", "gelu"),
        ("series-houlsby", "series_adapter", ["attn_output", "mlp_output"], "output", "silu"),
        ("series-attention", "series_adapter", ["attn_output"], "output", "tanh"),
        ("parallel", "parallel_adapter", ["mlp_output"], "input", "relu"),
        ("parallel-scaled", "scaled_parallel_adapter", ["mlp_output"], "input", "silu"),
        ("parallel-learned", "scaled_parallel_adapter", ["mlp_output"], "input", "relu"),
    ],
)
def test_bottleneck_adapters_have_their_site(
    name: str, method: str, sites: list[str], source: str, activation: str
) -> None:
    spec = converted(load_case("adapterhub", name)).spec
    assert (spec.method, sorted(spec.sites)) == (method, sites)
    assert {(s.source, s.activation, s.phase) for s in spec.sites.values()} == {
        (source, activation, "all")
    }


def test_ranks_of_a_layer_follow_its_reduction_factor() -> None:
    adapter = converted(load_case("adapterhub", "series-ranks"))
    downs = [adapter.edits[EditKey(layer, "mlp_output", 0)].down for layer in range(3)]
    used = [int(down.any(dim=0).sum()) for down in downs if down is not None]
    assert used == [2, 5, 2]  # 24/12, 24/4.5, padded to 5


DOWN = "model.layers.1.output_adapters.adapters.fixture.adapter_down.0.weight"
STREAM = "stream before the layer norm"


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("series-houlsby", {"use_gating": True}, "use_gating: got True, expected False"),
        ("series-houlsby", {"ln_before": True}, "ln_before: got True.*layer norm inside"),
        ("series-houlsby", {"ln_after": True}, "ln_after: got True"),
        ("series-houlsby", {"phm_layer": True}, "phm_layer: got True.*Compacter"),
        ("series-houlsby", {"inv_adapter": "nice"}, "inv_adapter: got 'nice', expected None"),
        ("series-houlsby", {"cross_adapter": True}, "cross_adapter: got True"),
        ("series-houlsby", {"original_ln_after": False}, "original_ln_after: got False.*lost"),
        ("series-houlsby", {"original_ln_before": True}, "mh_adapter: got True, expected False"),
        ("series-houlsby", {"residual_before_ln": "post_add"}, "residual_before_ln: got 'post_a"),
        ("series-houlsby", {"is_parallel": True}, f"is_parallel: got True.*{STREAM}"),
        ("series-pfeiffer", {"residual_before_ln": False}, "got False, expected True.*twice"),
        ("series-pfeiffer", {"original_ln_after": False}, "got True, expected False.*lost"),
        ("series-pfeiffer", {"residual_before_ln": "post_add"}, "residual_before_ln: got 'post_a"),
        ("parallel", {"mh_adapter": True}, "mh_adapter: got True, expected False: beside"),
        ("parallel", {"original_ln_after": False}, "original_ln_after: got False"),
        (
            "parallel",
            {"is_parallel": False, "original_ln_before": True},
            "layer_pre_ffn: got 'mlp', expected 'post_attention_layernorm'",
        ),
        ("series-interface", {"original_ln_after": False}, "original_ln_after: got False"),
        ("series-interface", {"is_parallel": True}, f"is_parallel: got True.*{STREAM}"),
    ],
)
def test_what_a_bottleneck_adapter_cannot_be_is_refused(
    name: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = _copy(name, tmp_path)
    _change_config(folder, fields)
    with pytest.raises(UnsupportedFeature, match=message):
        convert(folder, "adapters", options())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"new": 1}, r"config: got \['new'\]"),
        ({"mh_adapter": "yes"}, "mh_adapter: got 'yes', expected true or false"),
        ({"mh_adapter": False}, r"keys: got \['model.layers.1.attention_adapters"),
        ({"mh_adapter": False, "output_adapter": False}, "expected one of them"),
        ({"non_linearity": "gelu_new"}, "non_linearity: got 'gelu_new', expected one of linear"),
        ({"non_linearity": None}, "non_linearity: got None, expected one of"),
        ({"reduction_factor": 0.5}, r"reduction_factor: got 0\.5, expected a number of at least"),
        ({"reduction_factor": True}, "reduction_factor: got True"),
        ({"reduction_factor": {"1": 6}}, r"reduction_factor: got \{'1': 6\}.*layer 2"),
        ({"reduction_factor": 8}, r"got 'shape \(\d+, \d+\)', expected shape"),
        ({"scaling": 2}, "scaling: got 2, expected a number with a decimal point"),
        ({"scaling": float("nan")}, "scaling: got nan"),
        ({"scaling": "learned"}, "fixture.scaling: got 'no such key'"),
        ({"leave_out": []}, "layer 0: got 'no such adapter'"),
        ({"leave_out": [0, 1]}, "keys: got .*expected no further keys"),
    ],
)
def test_bad_bottleneck_configs_name_their_key(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = _copy("series-houlsby", tmp_path)
    _change_config(folder, fields)
    with pytest.raises(AdapterFileInvalid, match=message):
        convert(folder, "adapters", options())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(DOWN), r"adapter_down\.0\.weight: got 'no such key'"),
        (lambda t: t.clear(), "exactly one adapter"),
        (lambda t: t.update({DOWN: torch.ones(3, 23)}), r"got 'shape \(3, 23\)'"),
        (lambda t: t.update({DOWN.replace("fixture", "b"): torch.ones(1)}), "one a layer|exactly"),
        (lambda t: t.update({DOWN.replace("down.0", "down.1"): torch.ones(1)}), "keys: got"),
        (lambda t: t.update({DOWN.replace("layers.1", "layers.9"): torch.ones(1)}), "further"),
    ],
)
def test_bad_bottleneck_tensors_name_their_key(damage: Any, message: str, tmp_path: Path) -> None:
    folder = _copy("series-pfeiffer", tmp_path)
    _tensors(damage)(folder / "adapter.safetensors")
    with pytest.raises(AdapterFileInvalid, match=message):
        convert(folder, "adapters", options())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_pre_ffn": "mlp.gate_proj"}, "layer_pre_ffn: got 'mlp.gate_proj', expected one"),
        ({"layer_pre_ffn": None}, "layer_pre_ffn: got None"),
        ({"layer_output_proj": "mlp.up_proj"}, "layer_output_proj: got 'mlp.up_proj'"),
        ({"layer_ln_2": "norm"}, "layer_ln_2: got 'norm', expected None"),
        ({"attn_o_proj": "q_proj"}, "attn_o_proj: got 'q_proj'"),
    ],
)
def test_other_interfaces_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = _copy("parallel", tmp_path)
    path = folder / "adapter_interface.json"
    _change(path, {"interface": json.loads(path.read_text())["interface"] | fields})
    with pytest.raises(UnsupportedFeature, match=rf"adapter_interface\.json: .*{message}"):
        convert(folder, "adapters", options())
    path.write_text("[]")
    with pytest.raises(AdapterFileInvalid, match=r"adapter_interface\.json: document"):
        convert(folder, "adapters", options())


def test_layers_that_were_not_compared_are_refused(tmp_path: Path) -> None:
    """Gemma 2 has a norm behind each sublayer, which `adapters` reads from the wrong layer."""
    folder = _copy("series-pfeiffer", tmp_path)
    _change(folder / "adapter_config.json", {"model_type": "gemma2"})
    base = replace(options().base, architecture="gemma2")
    with pytest.raises(UnsupportedFeature, match="model_type: got 'gemma2', expected one of gpt2"):
        convert(folder, "adapters", options(base=base))


def test_a_model_without_classes_needs_its_interface(tmp_path: Path) -> None:
    folder = _copy("series-interface", tmp_path)
    _change(folder / "adapter_config.json", {"model_type": "qwen2"})
    base = replace(options().base, architecture="qwen2")
    assert convert(folder, "adapters", options(base=base))
    (folder / "adapter_interface.json").unlink()
    with pytest.raises(AdapterFileInvalid, match=r"adapter_interface\.json: file: got None"):
        convert(folder, "adapters", options(base=base))


# -- prefix tuning -----------------------------------------------------------------------------


def test_keys_are_turned_to_where_the_prompt_begins() -> None:
    """Behind n virtual tokens our prompts begin at n, those of `adapters` at 0."""
    case = load_case("adapterhub", "prefix-flat-pickle")
    adapter = converted(case)
    key = "model.prefix_tuning.prefix_tunings.fixture.self_prefix.control_trans"
    stored = torch.load(case.adapter_folder / "pytorch_adapter.bin")[key].view(4, 3, 2, 2, 6)
    assert adapter.prefix is not None
    torch.testing.assert_close(adapter.prefix.values[1], stored[:, 1, 1].transpose(0, 1))
    ours, theirs = adapter.prefix.keys[1], stored[:, 1, 0].transpose(0, 1)  # (KH, n, D)
    assert (ours - theirs).abs().max() > 0.1
    pairs = [torch.complex(*part.chunk(2, dim=-1)) for part in (ours, theirs)]
    expected = 4 * torch.tensor([10000 ** (-2 * i / 6) for i in range(3)])
    turned = pairs[1] * torch.polar(torch.ones(3), expected)
    torch.testing.assert_close(pairs[0], turned)
    assert adapter.spec.training.hyperparameters["source_attention"] == "eager"


_SMALL = {
    "vocab_size": 8,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=8),
        LlamaConfig(**_SMALL, rope_parameters=_DYNAMIC),
        MistralConfig(**_SMALL, sliding_window=8),
    ],
    ids=lambda config: config.model_type,
)
def test_a_prefix_needs_plain_rotary_positions(config: PreTrainedConfig, tmp_path: Path) -> None:
    base = describe_config(config, "other")
    folder = _copy("prefix-flat-pickle", tmp_path)
    fields = {"hidden_size": base.hidden_size, "model_type": base.architecture}
    _change(folder / "adapter_config.json", fields)
    with pytest.raises(UnsupportedFeature, match=r"model_type: got .*plain rotary"):
        convert(folder, "adapters", options(base=base))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"use_gating": True}, UnsupportedFeature, "use_gating: got True, expected False"),
        ({"leave_out": [1]}, UnsupportedFeature, r"leave_out: got \[1\], expected \[\]"),
        ({"new": 1}, AdapterFileInvalid, r"config: got \['new'\]"),
        ({"flat": "no"}, AdapterFileInvalid, "flat: got 'no'"),
        ({"flat": True}, AdapterFileInvalid, "control_trans: got 'no such key'"),
        ({"prefix_length": 0}, AdapterFileInvalid, "prefix_length: got 0, expected 1 to"),
        ({"prefix_length": "3"}, AdapterFileInvalid, "prefix_length: got '3'"),
        ({"prefix_length": 4}, AdapterFileInvalid, r"wte\.weight: got 'shape \(3, 24\)'"),
        (
            {"bottleneck_size": 9},
            AdapterFileInvalid,
            r"got 'shape \(8, 24\)', expected shape \(9, 24\)",
        ),
        ({"bottleneck_size": 10**6}, AdapterFileInvalid, "bottleneck_size: got 1000000"),
        ({"non_linearity": "leakyrelu"}, AdapterFileInvalid, "non_linearity: got 'leakyrelu'"),
    ],
)
def test_what_a_prefix_cannot_be_is_refused(
    fields: dict[str, Any], error: type[ReftError], message: str, tmp_path: Path
) -> None:
    folder = _copy("prefix-pickle", tmp_path)
    _change_config(folder, fields)
    with pytest.raises(error, match=message):
        convert(folder, "adapters", options())


PREFIX = "model.layers.1.self_attn.prefix_tuning.pool.prefix_tunings.fixture.self_prefix."


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.update({PREFIX + "wte.weight": torch.ones(3, 24)}), "got 'other numbers'"),
        (lambda t: t.pop(PREFIX + "wte.weight"), r"wte\.weight: got 'no such key'"),
        (lambda t: t.update({PREFIX.replace("fixture", "b") + "wte.weight": 1}), "exactly one"),
        (lambda t: t.update({PREFIX + "gate.weight": torch.ones(1)}), "keys: got .*gate"),
        (lambda t: t.update({PREFIX + "control_trans": torch.ones(1)}), "no further keys"),
        (lambda t: t.clear(), "exactly one adapter"),
    ],
)
def test_bad_prefix_tensors_name_their_key(damage: Any, message: str, tmp_path: Path) -> None:
    folder = _copy("prefix-pickle", tmp_path)
    path = folder / "pytorch_adapter.bin"
    tensors = torch.load(path)
    damage(tensors)
    torch.save(tensors, path)
    with pytest.raises(AdapterFileInvalid, match=message):
        convert(folder, "adapters", options())


# -- options of all three ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("lora", {"template": None}, "^template: got None"),
        ("lora", {"positions": "f1"}, "^positions: got 'f1', expected 'prompt'"),
        ("lora", {"method": "loreft"}, "^method: got 'loreft', expected 'lora'"),
        ("lora", {"activation": "relu"}, "^activation: got 'relu', expected 'identity'"),
        ("lora", {"layers": (1,)}, "^layers: "),
        ("series-houlsby", {"method": "lora"}, "^method: got 'lora', expected 'series_adapter'"),
        ("series-houlsby", {"activation": "relu"}, "^activation: got 'relu', expected 'silu'"),
        ("series-houlsby", {"anchor": "before_last"}, "^anchor: got"),
        ("prefix-pickle", {"phase": "all"}, "^phase: got 'all', expected nothing"),
        ("prefix-pickle", {"cap": "half"}, "^cap: got"),
    ],
)
def test_options_that_contradict_the_folder_are_named(
    name: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        converted(load_case("adapterhub", name), **given)


@pytest.mark.parametrize("name", ["lora", "series-houlsby", "parallel"])
def test_prompt_only_leaves_generated_tokens_alone(name: str) -> None:
    case = load_case("adapterhub", name)
    adapter = converted(case, phase="prompt")
    assert {site.phase for site in adapter.spec.sites.values()} == {"prompt"}
    prompt = case.prompts[-1]
    ours = reference_logits(tiny_base(), prompt, len(prompt), adapter)
    assert (ours - case.logits[-1]).abs().max() <= 1e-4
    longer = [*prompt, case.greedy[-1][0]]
    prompt_only, both = (
        reference_logits(tiny_base(), longer, len(prompt), used)[-1]
        for used in (adapter, converted(case))
    )
    assert (prompt_only - both).abs().max() > 0.1


@pytest.mark.parametrize("name", ["lora", "series-pfeiffer", "prefix-pickle"])
def test_the_other_methods_too_refuse_another_base_model(name: str) -> None:
    base = replace(options().base, hidden_size=32)
    with pytest.raises(AdapterMismatch, match=r"adapter_config\.json: hidden_size: got 24"):
        converted(load_case("adapterhub", name), base=base)


def _copy(name: str, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    shutil.copytree(load_case("adapterhub", name).adapter_folder, folder)
    return folder


def _change(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _change_config(folder: Path, fields: dict[str, Any]) -> None:
    path = folder / "adapter_config.json"
    _change(path, {"config": json.loads(path.read_text())["config"] | fields})
