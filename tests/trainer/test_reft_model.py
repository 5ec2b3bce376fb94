"""The training forward against a naive one: same loss, same gradients, less work."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from reft_core.errors import UnsupportedModel
from reft_core.loading import cache_argument, load_model
from reft_core.methods import METHODS
from reft_core.methods.placement import Placement
from reft_core.methods.virtual import VIRTUAL_METHODS, VirtualTokens
from reft_core.positions import PositionRule
from reft_core.sites import describe_model, edit_site, find_layers
from tests.factories import FAMILIES, NUM_LAYERS, VOCAB_SIZE, tiny_model
from trainer import row_attention
from trainer.below import begins_at
from trainer.collate import Collator
from trainer.data import TokenisedExample
from trainer.prefix import PrefixStore
from trainer.reft_model import ReftModel

TOLERANCE = 1e-5
RULES = [
    ("l1", True),
    ("l3", True),
    ("f2+l2", True),
    ("f2+l2", False),
    ("f3+l1", True),
    ("f3+l1", False),
    ("prompt", True),
    ("1,-2", True),
]


def make_rows(prompt_lens: list[int], completion_lens: list[int]) -> list[TokenisedExample]:
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist())

    lens = zip(prompt_lens, completion_lens, strict=True)
    return [TokenisedExample(tokens(p), tokens(c)) for p, c in lens]


ROWS = make_rows([9, 2, 14, 5], [3, 1, 2, 5])


def make_model(
    base: PreTrainedModel,
    rule: PositionRule,
    method: str = "loreft",
    layers: tuple[int, ...] = tuple(range(NUM_LAYERS)),
    prefixes: PrefixStore | None = None,
    sites: tuple[str, ...] | None = None,
) -> ReftModel:
    """A model whose interventions were moved well away from where they start."""
    torch.manual_seed(7)
    placement = Placement.on(
        describe_model(base, "tiny"), method, layers=layers, rank=2, sites=sites
    )
    model = ReftModel(base, placement, num_units=rule.num_units, prefixes=prefixes)
    with torch.no_grad():
        for parameter in model.trainable():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def naive_loss(model: ReftModel, rows: list[TokenisedExample], rule: PositionRule) -> Tensor:
    """One row at a time, whole and unpadded, no cache, one loop over positions."""
    layers = find_layers(model.base)
    losses = []
    for row in rows:
        units = rule.resolve(len(row.prompt))
        handles = []
        for key, intervention in zip(model.keys, model.interventions, strict=True):
            positions = list(units[key.unit])
            if model.placement.phase == "all" and key.unit == len(units) - 1:
                positions += range(len(row.prompt), len(row.prompt) + len(row.completion))

            def edit(hidden: Tensor, x: Tensor, intervention=intervention, positions=positions):
                states = list(hidden[0])
                for position in positions:
                    h = states[position].unsqueeze(0)
                    read = x[0, position].unsqueeze(0) if intervention.source == "input" else h
                    states[position] = (h + intervention(h, read))[0]
                return torch.stack(states).unsqueeze(0)

            handles.append(edit_site(layers[key.layer], key.site, edit))
        tokens = torch.tensor([row.prompt + row.completion])
        logits = model.base(input_ids=tokens, use_cache=False).logits[0]
        for handle in handles:
            handle.remove()
        predicted = logits[len(row.prompt) - 1 : -1]
        losses.append(F.cross_entropy(predicted, torch.tensor(row.completion), reduction="none"))
    return torch.cat(losses).mean()


def gradients(model: ReftModel, loss: Tensor) -> Tensor:
    """All gradients in one vector; zeros where a parameter has none."""
    found = torch.autograd.grad(loss, model.trainable(), allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(model.trainable(), found, strict=True)
        ]
    )


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    difference = (ours - theirs).abs().max().item()
    assert difference < TOLERANCE * max(1.0, theirs.abs().max().item()), f"differ by {difference}"


@pytest.mark.parametrize("text", ["prompt", "l2"])
@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_has_the_naive_gradients(method: str, text: str) -> None:
    """Methods of phase all edit the completion too, whatever the rule says of the prompt."""
    base = tiny_model()
    linears = ("linear:self_attn.v_proj", "linear:mlp.down_proj")
    sites = linears if METHODS[method].sites == ("linear",) else None
    rule = PositionRule.parse(text)
    model = make_model(base, rule, method, sites=sites)
    loss = model(**Collator(rule)(ROWS))["loss"]
    naive = naive_loss(model, ROWS, rule)
    assert_same(loss, naive)
    assert_same(gradients(model, loss), gradients(model, naive))


@pytest.mark.parametrize(("text", "tied"), RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_naive_forward(family: str, text: str, tied: bool) -> None:
    rule = PositionRule.parse(text, tied=tied)
    model = make_model(tiny_model(family), rule)
    batch = Collator(rule)(ROWS)

    ours = model(**batch)["loss"]
    theirs = naive_loss(model, ROWS, rule)

    assert_same(ours, theirs)
    ours_gradient, theirs_gradient = gradients(model, ours), gradients(model, theirs)
    assert theirs_gradient.abs().max() > 1e-3, "the edits must matter for this test to"
    assert_same(ours_gradient, theirs_gradient)


@pytest.mark.parametrize("method", ["direft", "direft_orthonormal"])
def test_other_methods_agree_too(method: str) -> None:
    rule = PositionRule.parse("l2")
    model = make_model(tiny_model(), rule, method, layers=(1, 3))
    ours, theirs = model(**Collator(rule)(ROWS))["loss"], naive_loss(model, ROWS, rule)

    assert_same(ours, theirs)
    assert_same(gradients(model, ours), gradients(model, theirs))


@pytest.mark.parametrize("text", ["l1", "l3"])
def test_kept_prefixes_change_nothing(text: str) -> None:
    rule = PositionRule.parse(text)
    model = make_model(tiny_model(), rule, prefixes=PrefixStore(tiny_model(), 2**20))
    for rows in (ROWS, ROWS[1:], ROWS[::-1]):  # all new, all kept, another order
        batch = Collator(rule)(rows)
        ours, theirs = model(**batch)["loss"], naive_loss(model, rows, rule)
        assert_same(ours, theirs)
        assert_same(gradients(model, ours), gradients(model, theirs))


def test_rows_without_an_edited_position_are_left_alone() -> None:
    rule = PositionRule.parse("4")  # two of the prompts are longer than that
    model = make_model(tiny_model(), rule)
    ours, theirs = model(**Collator(rule)(ROWS))["loss"], naive_loss(model, ROWS, rule)
    assert_same(ours, theirs)
    assert_same(gradients(model, ours), gradients(model, theirs))


@pytest.mark.parametrize("family", FAMILIES)
def test_states_below_the_first_edited_layer_are_computed_once(family: str) -> None:
    rule = PositionRule.parse("f1+l2", tied=False)
    base = tiny_model(family)
    store = PrefixStore(tiny_model(family), 2**20)
    model = make_model(base, rule, layers=(2, 3), prefixes=store)
    for rows in (ROWS, ROWS[1:], ROWS[::-1]):  # all new, all kept, another order
        ours, theirs = model(**Collator(rule)(rows))["loss"], naive_loss(model, rows, rule)
        assert_same(ours, theirs)
        assert_same(gradients(model, ours), gradients(model, theirs))


@pytest.mark.parametrize("method", ["loreft", "lora", "red"])
def test_below_methods_that_edit_what_is_generated_too(method: str) -> None:
    rule = PositionRule.parse("l1")
    sites = ("linear:self_attn.v_proj",) if method == "lora" else None
    store = PrefixStore(tiny_model(), 2**20)
    model = make_model(tiny_model(), rule, method, layers=(1,), prefixes=store, sites=sites)
    for rows in (ROWS, ROWS[:3]):
        ours, theirs = model(**Collator(rule)(rows))["loss"], naive_loss(model, rows, rule)
        assert_same(ours, theirs)
        assert_same(gradients(model, ours), gradients(model, theirs))


@pytest.mark.parametrize(("max_bytes", "again"), [(2**20, [2, 3]), (0, [0, 1, 2, 3, 0, 1, 2, 3])])
def test_what_is_below_the_first_edited_layer_has_no_graph_and_runs_once_if_it_fits(
    max_bytes: int, again: list[int]
) -> None:
    rule = PositionRule.parse("l2")
    base = tiny_model()
    model = make_model(base, rule, layers=(2,), prefixes=PrefixStore(base, max_bytes))
    ran: list[int] = []
    with_graph: list[int] = []
    for number, layer in enumerate(find_layers(model.base)):

        def note(_module: torch.nn.Module, args: tuple[Tensor, ...], number: int = number) -> None:
            ran.append(number)
            if args[0].requires_grad:
                with_graph.append(number)

        layer.mlp.register_forward_pre_hook(note)
    batch = Collator(rule)(ROWS)
    model(**batch)
    # The beginnings, the lower layers behind them, then the upper ones.
    assert ran == [0, 1, 2, 3, 0, 1, 2, 3]
    assert with_graph == [3]
    ran.clear()
    model(**batch)
    assert ran == again


def test_layers_that_look_past_states_are_not_left_out() -> None:
    base = tiny_model()
    first, *_, last = find_layers(base)
    assert begins_at(base, NUM_LAYERS - 1)
    # As in models whose last layers use what an early one computed of its own.
    seen: list[Tensor] = []
    first.mlp.register_forward_hook(lambda _m, _args, out: seen.append(out))
    last.mlp.register_forward_hook(lambda _m, _args, out: out + seen[-1])
    assert not begins_at(base, NUM_LAYERS - 1)


def test_only_cells_from_the_first_edited_one_run_and_only_loss_cells_have_logits() -> None:
    rule = PositionRule.parse("l1")
    model = make_model(tiny_model(), rule)
    batch = Collator(rule)(ROWS)
    num_cells = []
    find_layers(model.base)[0].register_forward_hook(
        lambda _m, args, _out: num_cells.append(args[0].shape[1])
    )
    logits = model(**batch)["logits"]
    num_answer = sum(len(row.completion) for row in ROWS)
    assert num_cells == [sum(len(row.prompt) - 1 for row in ROWS), num_answer]
    assert logits.shape == (num_answer, VOCAB_SIZE)


@pytest.mark.parametrize(("text", "tied"), RULES)
def test_what_rows_have_in_common_runs_once(text: str, tied: bool) -> None:
    """Rows share a template, a whole prompt, and the beginning of an answer."""
    rule = PositionRule.parse(text, tied=tied)
    first, second, third, fourth = make_rows([9, 9, 5, 1], [3, 2, 2, 1])
    rows = [
        first,
        TokenisedExample(first.prompt, (first.completion[0], *second.completion)),
        TokenisedExample(first.prompt[:6] + second.prompt[6:], second.completion),
        TokenisedExample(first.prompt[:5] + third.prompt, third.completion),
        fourth,
        first,
    ]
    model = make_model(tiny_model(), rule)
    num_cells = []
    find_layers(model.base)[0].register_forward_hook(
        lambda _m, args, _out: num_cells.append(args[0].shape[1])
    )
    ours = model(**Collator(rule)(rows))["loss"]
    assert sum(num_cells) < sum(len(row.prompt) + len(row.completion) - 1 for row in rows) - 15
    theirs = naive_loss(model, rows, rule)
    assert_same(ours, theirs)
    assert_same(gradients(model, ours), gradients(model, theirs))


def test_no_edit_is_computed_in_the_last_layer_where_nothing_is_read() -> None:
    rule = PositionRule.parse("f2+l2", tied=False)
    model = make_model(tiny_model(), rule)
    num_edited = dict.fromkeys(model.keys, 0)
    for key, intervention in zip(model.keys, model.interventions, strict=True):

        def note(_module: torch.nn.Module, args: tuple[Tensor, ...], key=key) -> None:
            num_edited[key] = len(args[0])

        intervention.register_forward_pre_hook(note)
    loss = model(**Collator(rule)(ROWS))["loss"]
    of_each_unit = sum(min(2, len(row.prompt) // 2) for row in ROWS)
    for key, count in num_edited.items():
        read = 0 if key.unit == 0 else len(ROWS)
        assert count == (read if key.layer == NUM_LAYERS - 1 else of_each_unit)
    loss.backward()
    # Processes that train together expect a gradient of every parameter.
    assert all(parameter.grad is not None for parameter in model.trainable())


def test_long_rows_have_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs go through another kernel, lest all their scores be kept."""
    monkeypatch.setattr(row_attention, "_MAX_SCORES", 0)
    for text in ("l1", "f2+l2"):
        rule = PositionRule.parse(text)
        model = make_model(tiny_model("mistral"), rule)
        ours, theirs = model(**Collator(rule)(ROWS))["loss"], naive_loss(model, ROWS, rule)
        assert_same(ours, theirs)
        assert_same(gradients(model, ours), gradients(model, theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_whose_rows_cannot_be_packed_is_refused(dtype: torch.dtype) -> None:
    base = tiny_model().to(dtype)
    base.model.layers[0].register_forward_hook(lambda _m, _a, out: out + out.mean(1, keepdim=True))
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM computes other logits"):
        make_model(base, PositionRule.parse("l1"))


@pytest.mark.parametrize("text", ["l1", "f7+l7"])
def test_the_demo_model_has_the_naive_gradients(text: str) -> None:
    """In its own size, 135 million parameters, of which three layers are edited."""
    base = load_model("demo").model
    rule = PositionRule.parse(text)
    model = make_model(base, rule, layers=(0, 14, 29))
    rows = make_rows([15, 9], [1, 2])
    ours, theirs = model(**Collator(rule)(rows))["loss"], naive_loss(model, rows, rule)
    assert_same(ours, theirs)
    assert_same(gradients(model, ours), gradients(model, theirs))


def test_the_base_stays_frozen_in_eval_mode_and_unhooked() -> None:
    rule = PositionRule.parse("l1")
    base = tiny_model("gpt2")  # has dropout
    model = make_model(base.train(), rule)
    model.train()
    assert not any(module.training for module in base.modules())
    assert all(i.training for i in model.interventions)
    model(**Collator(rule)(ROWS))["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in base.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_edits_of_a_bfloat16_base_are_summed_in_float32_and_rounded_once() -> None:
    rule = PositionRule.parse("l1")
    base = tiny_model().to(torch.bfloat16)
    model = make_model(base, rule, layers=(NUM_LAYERS - 1,))
    seen = {}
    layer = find_layers(base)[-1]
    layer.register_forward_hook(lambda _m, _a, out: seen.setdefault("before", out))
    handle = None

    def after(_module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["after"] = args[0]

    handle = base.model.norm.register_forward_pre_hook(after)
    row = make_rows([1], [1])  # no beginning to run first
    model(**Collator(rule)(row))
    handle.remove()

    h = seen["before"][0].float()
    (edit,) = model.to_edits().values()
    assert seen["after"].dtype == torch.bfloat16
    assert torch.equal(seen["after"][0], (h + edit.delta(h)).bfloat16())


def test_edits_are_exported_by_layer_and_unit() -> None:
    rule = PositionRule.parse("f1+l1", tied=False)
    model = make_model(tiny_model(), rule, layers=(1, 3))
    edits = model.to_edits()
    assert [(key.layer, key.unit) for key in edits] == [(1, 0), (1, 1), (3, 0), (3, 1)]
    h = torch.randn(5, model.interventions[0].sizes.out_size)
    for edit, intervention in zip(edits.values(), model.interventions, strict=True):
        torch.testing.assert_close(edit.delta(h), intervention(h, h), atol=1e-5, rtol=1e-5)


def naive_virtual_loss(model: ReftModel, rows: list[TokenisedExample]) -> Tensor:
    """One row at a time behind its virtual tokens; MAM's adapter edits every token."""
    assert model.virtual is not None
    layers, n = find_layers(model.base), model.virtual.length
    losses = []
    for row in rows:
        tokens = torch.tensor([row.prompt + row.completion])
        handles = []
        for key, intervention in zip(model.keys, model.interventions, strict=True):

            def edit(hidden: Tensor, x: Tensor, intervention=intervention) -> Tensor:
                states = [
                    h + intervention(h[None], x[0, at][None])[0] for at, h in enumerate(hidden[0])
                ]
                return torch.stack(states).unsqueeze(0)

            handles.append(edit_site(layers[key.layer], key.site, edit))
        if model.virtual.kind == "kv":
            cache = DynamicCache()
            for layer, (keys, values) in enumerate(model.virtual.keys_and_values()):
                cache.update(keys[None], values[None], layer)
            logits = model.base(input_ids=tokens, **cache_argument(model.base, cache)).logits[0]
        else:
            embedded = model.base.get_input_embeddings()(tokens[0])
            embeds = torch.cat([model.virtual.embedding, embedded])[None]
            logits = model.base(inputs_embeds=embeds, use_cache=False).logits[0, n:]
        for handle in handles:
            handle.remove()
        predicted = logits[len(row.prompt) - 1 : -1]
        losses.append(F.cross_entropy(predicted, torch.tensor(row.completion), reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize(
    ("method", "bottleneck"),
    [("prefix_tuning", None), ("prefix_tuning", 5), ("prompt_tuning", None), ("mam", 5)],
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gpt_neox"])
def test_virtual_tokens_have_the_naive_gradients(
    family: str, method: str, bottleneck: int | None
) -> None:
    kind, inner = VIRTUAL_METHODS[method].kind, VIRTUAL_METHODS[method].intervention
    base = tiny_model(family)
    description = describe_model(base, "tiny")
    torch.manual_seed(3)
    placement = None
    if inner is not None:
        layers = tuple(range(description.num_layers))
        placement = Placement.on(description, inner, layers=layers, rank=2)
    virtual = VirtualTokens(description, kind, 3, bottleneck=bottleneck)
    model = ReftModel(base, placement, num_units=1, virtual=virtual)
    with torch.no_grad():
        for parameter in model.trainable():
            parameter.add_(0.3 * torch.randn_like(parameter))
    rule = PositionRule.parse("prompt")
    ours, theirs = model(**Collator(rule)(ROWS))["loss"], naive_virtual_loss(model, ROWS)
    assert_same(ours, theirs)
    found = gradients(model, ours)
    assert found.abs().max() > 1e-3
    assert_same(found, gradients(model, theirs))


def test_virtual_tokens_end_in_the_file_as_trained() -> None:
    description = describe_model(tiny_model(), "tiny")
    drawn = VirtualTokens(description, "kv", 3, bottleneck=5)
    prefix, states = drawn.to_prefix(), drawn.keys_and_values()
    for layer in range(NUM_LAYERS):
        assert torch.equal(prefix.keys[layer], states[layer, 0])
        assert torch.equal(prefix.values[layer], states[layer, 1])
    shapes = drawn.spec().tensor_shapes(NUM_LAYERS, description.hidden_size)
    assert {name: tuple(t.shape) for name, t in prefix.tensors().items()} == shapes
    start = torch.randn(4, description.hidden_size)
    embedding = VirtualTokens(description, "embedding", 4, start=start).to_prefix().embedding
    assert embedding is not None
    assert torch.equal(embedding, start)


@pytest.mark.parametrize("method", ["loreft", "lora"])
def test_base_only_is_the_base_model(method: str) -> None:
    base, rule = tiny_model(), PositionRule.parse("prompt")
    sites = ("linear:mlp.up_proj",) if method == "lora" else None
    model = make_model(base, rule, method, sites=sites)
    batch = Collator(rule)(ROWS)
    with model.base_only():
        plain = model(**batch)["loss"]
    losses = []
    for row in ROWS:
        tokens = torch.tensor([row.prompt + row.completion])
        predicted = base(input_ids=tokens).logits[0, len(row.prompt) - 1 : -1]
        losses.append(F.cross_entropy(predicted, torch.tensor(row.completion), reduction="none"))
    assert_same(plain, torch.cat(losses).mean())
