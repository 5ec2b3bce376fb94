from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner

from reft_core.adapter import Adapter, EditKey, decode_adapter, encode_adapter
from reft_core.convert import base_from_folder
from reft_core.edits import Edit
from reft_core.sites import ModelDescription, edit_site, find_layers
from reft_core.spec import AdapterSpec, HeadSpec, PositionSpec, SiteSpec, TemplateSpec
from server.cli.inspection import (
    dead_edits,
    is_zero,
    spec_differences,
    tensor_differences,
    tensors_of,
)
from server.cli.main import app
from server.cli.norms import delta_norms, delta_norms_on
from tests.factories import (
    random_adapter,
    random_classifier_bytes,
    random_prefix_adapter,
    tiny_description,
    tiny_loaded,
)
from tests.server.fakes import make_adapter, make_tokenizer

runner = CliRunner()


def run(*args: str):
    return runner.invoke(app, ["adapter", *args], env={"COLUMNS": "200"})


def shown(*args: str) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.output


# -- what is found out ---------------------------------------------------------------------


def shift_at(model: ModelDescription, sizes: dict[int, float], **spec: object) -> Adapter:
    """A constant vector of this length in these layers."""
    width = model.hidden_size
    site = SiteSpec(layers=tuple(sizes), rank=0, parts=("shift",))
    fields = {
        "name": "x",
        "base": model.to_base_spec(),
        "method": "steering",
        "positions": PositionSpec(rule="prompt"),
        "sites": {"block_output": site},
    }
    edits = {
        EditKey(layer, "block_output", 0): Edit(shift=torch.full((width,), size / width**0.5))
        for layer, size in sizes.items()
    }
    return decode_adapter(encode_adapter(AdapterSpec(**(fields | spec)), edits))


def test_norms_are_relative_to_the_state_and_include_the_strength():
    model = tiny_description()
    length = model.hidden_size**0.5
    adapter = shift_at(model, {0: 0.5 * length, 2: length}, strength=-0.5)
    norm = delta_norms(adapter)["block_output"]
    assert norm.largest_layer == 2
    assert norm.largest == pytest.approx(0.5, rel=0.05)
    assert norm.mean == pytest.approx(0.375, rel=0.05)
    assert delta_norms(adapter)["block_output"] == norm


def test_norms_know_sites_of_two_widths():
    adapter = random_adapter(
        tiny_description(), method="lora", sites=("linear:mlp.up_proj", "linear:mlp.down_proj")
    )
    assert set(delta_norms(adapter)) == {"linear:mlp.up_proj", "linear:mlp.down_proj"}


def test_norms_on_a_prompt_are_of_the_bases_own_states():
    """Counted again from transformers' hidden states, the second layer behind the first's edit."""
    loaded = tiny_loaded()
    adapter = random_adapter(loaded.description, layers=[0, 1], positions="f1+l2", strength=0.5)
    tokens = [3, 7, 1, 9, 4, 2]
    rows = [0, 4, 5]
    first, second = (adapter.edits[EditKey(layer, "block_output", 0)] for layer in (0, 1))

    def hidden(layer: int) -> torch.Tensor:
        with torch.no_grad():
            out = loaded.model(input_ids=torch.tensor([tokens]), output_hidden_states=True)
        return out.hidden_states[layer + 1][0, rows]

    def ratio(delta: torch.Tensor, h: torch.Tensor) -> float:
        return float((delta.norm(dim=1) / h.norm(dim=1)).mean())

    h = hidden(0)
    expected = [ratio(0.5 * first.delta(h), h)]

    def edit(output: torch.Tensor, _x: torch.Tensor) -> torch.Tensor:
        output[0, rows] += 0.5 * first.delta(output[0, rows])
        return output

    handles = edit_site(find_layers(loaded.model)[0], "block_output", edit)
    h = hidden(1)
    handles.remove()
    expected.append(ratio(0.5 * second.delta(h), h))
    norm = delta_norms_on(adapter, loaded, tokens)["block_output"]
    assert norm.mean == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert norm.largest == pytest.approx(max(expected), rel=1e-4)
    assert norm.mean != pytest.approx(delta_norms(adapter)["block_output"].mean, rel=0.05)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_norms_on_a_prompt_know_every_site(family):
    loaded = tiny_loaded(family)
    linear = next(site for site in loaded.description.sites if site.startswith("linear:mlp"))
    sites = ("block_output", "attn_output", "mlp_output", "heads", linear)
    for site in sites:
        adapter = random_adapter(loaded.description, method="direft", sites=(site,), positions="l1")
        assert 0 < delta_norms_on(adapter, loaded, [3, 7, 1])[site].mean < 100


def test_norms_on_a_prompt_leave_out_sites_without_a_token():
    loaded = tiny_loaded()
    adapter = random_adapter(loaded.description, positions="9")
    assert delta_norms_on(adapter, loaded, [3, 7, 1]) == {}


W, Z = torch.ones(4, 2), torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("edit", "zero"),
    [
        (Edit(shift=torch.zeros(4)), True),
        (Edit(shift=torch.zeros(4), gain=torch.ones(4)), False),
        (Edit(down=W, up=W.mT), False),
        (Edit(down=W, up=Z.mT), True),
        (Edit(down=Z, up=W.mT), True),
        (Edit(down=Z, up=W.mT, bias=torch.ones(2)), False),
        (Edit(down=Z, up=W.mT, bias=-torch.ones(2), activation="relu"), True),
        (Edit(down=Z, up=W.mT, activation="sigmoid"), False),
        (Edit(down=Z, up=W.mT, skip=W, activation="relu"), False),
        (Edit(down=W, up=W.mT, skip=W), True),
        (Edit(down=W, up=W.mT, scale=0.0), True),
        (Edit(down=W, up=W.mT, scale=0.0, shift=torch.ones(4)), False),
        (
            Edit(
                down=torch.tensor([[1.0, 0], [0, 0], [0, 0], [0, 0]]),
                up=torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1]]),
            ),
            True,
        ),
    ],
)
def test_zero_edits_are_recognised(edit, zero):
    assert is_zero(edit) == zero
    assert zero == (not edit.delta(torch.randn(3, 4)).any())


@pytest.mark.parametrize(
    ("rule", "unread"), [("f3", (3, 3)), ("l2", (1, 2)), ("f1+l1", (1, 2)), ("l1", None)]
)
def test_last_layer_edits_are_read_at_the_last_token_only(rule, unread):
    model = tiny_description()
    adapter = random_adapter(model, positions=rule)
    dead = dead_edits(adapter)
    last = EditKey(model.num_layers - 1, "block_output", 0)
    assert dead.unread == ({} if unread is None else {last: unread})
    assert dead.zero == ()
    assert dead_edits(adapter, 1).prompt_len == 1


def test_a_default_strength_of_zero_is_named(tmp_path):
    adapter = shift_at(tiny_description(), {0: 1.0}, strength=0.0)
    assert dead_edits(adapter).switched_off
    output = shown("inspect", written(tmp_path / "a", adapter))
    assert "dead: every edit, unless a request gives a strength: the default is 0" in output
    assert "dead: no edit" not in output


def test_dead_zero_edits_are_named():
    adapter = shift_at(tiny_description(), {0: 0.0, 1: 1.0})
    assert dead_edits(adapter).zero == (EditKey(0, "block_output", 0),)


def test_differences_of_specs_and_tensors():
    model = tiny_description()
    one = random_adapter(model, seed=1, layers=[0, 1])
    other = random_adapter(model, seed=1, layers=[0, 2], positions="f1")
    fields = {name: (a, b) for name, a, b in spec_differences(one, other)}
    assert fields["positions.rule"] == ("l1", "f1")
    assert fields["sites.block_output.layers"] == ([0, 1], [0, 2])
    assert set(fields) == {"positions.rule", "sites.block_output.layers"}
    notes = {entry.name.split(".")[1]: entry.note for entry in tensor_differences(one, other)}
    assert notes == {"1": "only in A", "2": "only in B"}
    assert tensor_differences(one, one) == []


def test_the_largest_relative_difference_comes_first():
    model = tiny_description()
    a, b = (shift_at(model, sizes) for sizes in ({0: 1.0, 1: 10.0}, {0: 2.0, 1: 11.0}))
    first, second = tensor_differences(a, b)
    width = model.hidden_size**0.5
    assert first.name == "layers.0.block_output.0.shift"
    assert (first.largest, first.relative) == pytest.approx((1 / width, 0.5))
    assert (second.largest, second.relative) == pytest.approx((1 / width, 1 / 11), rel=1e-5)


def test_prefixes_are_compared_too():
    one, other = (random_prefix_adapter(tiny_description(), "kv", seed=seed) for seed in (0, 1))
    assert len(tensor_differences(one, other)) == len(tensors_of(one)) > 0


# -- the commands --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model's config and a byte tokenizer; no weights."""
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM.config_class(
        vocab_size=260,
        hidden_size=16,
        num_hidden_layers=3,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
    ).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def written(path: Path, adapter: Adapter) -> str:
    path.write_bytes(encode_adapter(adapter.spec, adapter.edits, adapter.prefix))
    return str(path)


def test_inspect_shows_sites_share_and_norms(base, tmp_path):
    model = base_from_folder(str(base))
    path = written(tmp_path / "a", random_adapter(model, layers=[0, 1], positions="f2+l1"))
    output = shown("inspect", path, "--base", str(base))
    size = 2 * (16 * 2 + 2 * 16 + 2)
    share = 100 * size / model.num_parameters
    assert f"{size} ({share:.4g} % of the {model.num_parameters:,} of {base.name})" in output
    for expected in ("f2+l1 (tied, prompt_end, cap shared)", "block_output", "0-1", "‖Δ‖/‖h‖"):
        assert expected in output
    assert f"fits        {base.name}" in output
    assert "dead: no edit" in output


def test_inspect_says_why_a_base_does_not_fit(base, tmp_path):
    path = written(tmp_path / "a", random_adapter(tiny_description()))
    output = shown("inspect", path, "--base", str(base))
    assert f"not {base.name}: base.hidden_size: got 32, expected 16" in output


def test_inspect_names_dead_edits(tmp_path):
    adapter = shift_at(tiny_description(), {0: 0.0, 3: 1.0}, positions=PositionSpec(rule="f4"))
    output = shown("inspect", written(tmp_path / "a", adapter))
    assert "dead: Δ is zero at layer 0 block_output\n" in output
    assert "dead: 4 of 4 positions at layer 3 block_output, on a prompt of 32 tokens" in output


def test_inspect_draws_the_tokens_each_unit_edits(base, tmp_path):
    model = base_from_folder(str(base))
    template = TemplateSpec(user="U {content}", generation="\n")
    adapter = random_adapter(model, positions="f2+l1", tied=False, template=template)
    path = written(tmp_path / "a", adapter)
    output = shown("inspect", path, "--base", str(base), "--prompt", "he x")
    assert "unit 0 edits 2 of 6 prompt tokens\n⟦U⟧⟦·⟧he│·│x│⏎\n" in output
    assert "unit 1 edits 1 of 6 prompt tokens\nU│·│he│·│x⟦⏎⟧\n" in output
    plain = shown("inspect", path, "--base", str(base), "--prompt", "he x", "--raw")
    assert "unit 0 edits 1 of 3 prompt tokens\n⟦he⟧·│x\n" in plain  # at most half


def test_inspect_measures_on_the_prompt_where_the_base_has_weights(base, tmp_path):
    adapter = random_adapter(base_from_folder(str(base)), positions="l2", layers=[0])
    path = written(tmp_path / "a", adapter)
    flags = ("--base", str(base), "--prompt", "he x", "--raw")
    random_ones = "on 64 random states, not the base's"
    assert f"{random_ones} (no prompt was given)" in shown("inspect", path)
    assert f"{random_ones} (model: got '{base}'" in shown("inspect", path, *flags)
    whole = tmp_path / "whole"
    shutil.copytree(base, whole)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(whole)).save_pretrained(whole)
    flags = ("--base", str(whole), "--prompt", "he x", "--raw")
    measured = shown("inspect", path, *flags)
    assert "‖Δ‖/‖h‖: mean over the edited tokens of this prompt\n" in measured
    assert "(no prompt" not in measured
    other = written(tmp_path / "b", random_adapter(tiny_description()))
    assert f"{random_ones} (base.hidden_size: got 32" in shown("inspect", other, *flags)
    nothing = shown("inspect", path, "--base", str(whole), "--prompt", "", "--raw")
    assert f"{random_ones} (0 prompt tokens, not 1 to" in nothing


@pytest.mark.parametrize(
    "model",
    [
        lambda: BertModel(BertConfig(vocab_size=260, hidden_size=24, num_hidden_layers=2)),
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=260, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        ),
    ],
    ids=["bert", "t5"],
)
def test_inspect_knows_bases_that_are_no_causal_model(model, tmp_path):
    folder = tmp_path / "base"
    model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    described = base_from_folder(str(folder))
    path = written(tmp_path / "a", random_adapter(described, positions="f1"))
    output = shown("inspect", path, "--base", str(folder), "--prompt", "he x", "--raw")
    assert "fits        base" in output
    assert f"of the {described.num_parameters:,} of base" in output
    assert "mean over the edited tokens of this prompt" in output


def test_inspect_draws_chat_templates_phases_and_prefixes(base, tmp_path):
    model = base_from_folder(str(base))
    lora = random_adapter(model, method="lora", sites=("linear:mlp.up_proj",), positions="prompt")
    output = shown(
        "inspect", written(tmp_path / "a", lora), "--base", str(base), "--prompt", "a\x1b[31m"
    )
    assert "and every generated token" in output
    assert "⟦<|im_start|>⟧⟦u⟧⟦s⟧⟦e⟧⟦r⟧⟦⏎⟧⟦a⟧⟦\N{REPLACEMENT CHARACTER}⟧" in output
    assert "\x1b" not in output
    prefix = random_prefix_adapter(model, "embedding", length=5)
    path = written(tmp_path / "b", prefix)
    output = shown("inspect", path, "--base", str(base), "--prompt", "a")
    assert "before the prompt: 5 virtual tokens" in output
    assert "5 virtual tokens, embedding" in output


def test_a_prompt_needs_a_base_with_a_tokenizer(base, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(make_adapter(1))
    without = run("inspect", str(path), "--prompt", "x")
    assert (without.exit_code, without.output[:16]) == (1, "error: base: got")
    LlamaConfig().save_pretrained(tmp_path / "bare")
    bare = run("inspect", str(path), "--prompt", "x", "--base", str(tmp_path / "bare"))
    assert bare.exit_code == 1
    assert "a model with a tokenizer" in bare.output.splitlines()[-1]


@pytest.mark.parametrize("command", ["inspect", "diff"])
def test_damaged_files_end_in_one_clear_line(tmp_path, command):
    """Bytes changed, cut or doubled anywhere: an answer, or one line; never a traceback."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    data = make_adapter(1, description="\x1b[31m" * 3)
    good.write_bytes(data)
    rng = random.Random(0)
    refused = 0
    for _ in range(60):
        at = rng.randrange(len(data)) if rng.random() < 0.3 else rng.randrange(1200)
        damage = rng.choice(
            [
                data[:at],
                data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
                data[:at] + data[at // 2 :],
                data[:at] + b'"\\ud800\\u001b[2J' + data[at:],
            ]
        )
        bad.write_bytes(damage)
        result = run(command, str(bad), *([str(good)] if command == "diff" else []))
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert "\x1b" not in result.output
        if result.exit_code:
            refused += 1
            assert result.output.startswith("error: ")
            assert len(result.output.strip().splitlines()) == 1
    assert refused > 30


def test_diff_of_equal_and_of_different_files(tmp_path):
    model = tiny_description()
    adapter = random_adapter(model)
    one, other = tmp_path / "a", tmp_path / "b"
    written(one, adapter)
    assert shown("diff", str(one), str(one)) == f"identical files, digest {adapter.digest}\n"
    spec = adapter.spec.model_copy(update={"description": "[red]\x1b[31m"})
    written(other, replace(adapter, spec=spec))
    output = shown("diff", str(one), str(other))
    assert "description" in output
    assert "[red]\N{REPLACEMENT CHARACTER}[31m" in output
    assert "0 of 12 tensors differ" in output
    written(other, random_adapter(model, seed=1))
    output = shown("diff", str(one), str(other), "--limit", "2")
    assert "specs are equal" in output
    assert "12 of 12 tensors differ, 2 of them listed" in output
    assert output.count("block_output") == 2


def test_a_head_is_shown_and_keeps_last_layer_edits_alive(tmp_path):
    model = tiny_description()
    head = HeadSpec(hidden=7, activation="tanh")
    data = random_classifier_bytes(model, 3, head, positions="prompt")
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    adapter = decode_adapter(data)
    assert dead_edits(adapter).unread == {}
    assert "head.out.bias" in tensors_of(adapter)
    shown = run("inspect", str(path)).output
    assert "pooling first, dense 7 with tanh" in shown
    assert "l0, l1, l2" in shown
