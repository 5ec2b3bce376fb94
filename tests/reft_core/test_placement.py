"""A placement takes its method's defaults, refuses by name, and says what the file must hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from reft_core.adapter import EditKey, check_fits, decode_adapter, encode_adapter
from reft_core.errors import InvalidRequest
from reft_core.methods import METHODS, SiteSizes, get_method
from reft_core.methods.placement import Placement
from reft_core.sites import ModelDescription
from reft_core.spec import MAX_RANK, SiteSpec
from tests.factories import (
    FAMILIES,
    NUM_LAYERS,
    make_spec,
    moved_edits,
    tiny_description,
    tiny_loaded,
)

DOWN, UP, KEYS = "linear:mlp.down_proj", "linear:mlp.up_proj", "linear:self_attn.k_proj"
LINEARS = [name for name in tiny_description().sites if name.startswith("linear:")]


def place(method: str, **options: Any) -> Placement:
    """On layers 0 and 2 unless told otherwise; linear methods on two maps."""
    if METHODS[method].sites == ("linear",):
        options.setdefault("sites", (DOWN, UP))
    return Placement.on(tiny_description(), method, **{"layers": (0, 2)} | options)


# Defaults ---------------------------------------------------------------------------------

DEFAULTS = {
    "loreft": (("block_output",), "identity", "prompt"),
    "direft": (("block_output",), "identity", "prompt"),
    "direft_orthonormal": (("block_output",), "identity", "prompt"),
    "noreft": (("block_output",), "identity", "prompt"),
    "consreft": (("block_output",), "identity", "prompt"),
    "interchange": (("block_output",), "identity", "prompt"),
    "lobireft": (("block_output",), "identity", "prompt"),
    "red": (("block_output",), "identity", "prompt"),
    "steering": (("block_output",), "identity", "prompt"),
    "series_adapter": (("mlp_output",), "relu", "all"),
    "parallel_adapter": (("mlp_output",), "relu", "all"),
    "scaled_parallel_adapter": (("mlp_output",), "relu", "all"),
    "multi_head_parallel_adapter": (("heads",), "relu", "all"),
    "lora": ((DOWN, UP), "identity", "all"),
    "bitfit": ((DOWN, UP), "identity", "all"),
}


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_the_methods_own(method: str) -> None:
    placement = place(method)
    assert placement.method is get_method(method)
    assert (placement.sites, placement.activation, placement.phase) == DEFAULTS[method]
    assert (placement.layers, placement.rank) == ((0, 2), 4)


def test_every_option_may_be_chosen() -> None:
    placement = place(
        "series_adapter",
        layers=(3,),
        rank=7,
        sites=("attn_output", KEYS),
        activation="gelu",
        phase="prompt",
    )
    assert placement == Placement(
        get_method("series_adapter"),
        tiny_description(),
        ("attn_output", KEYS),
        (3,),
        7,
        "gelu",
        "prompt",
    )
    assert place("loreft", phase="all").phase == "all"


# What is refused --------------------------------------------------------------------------

SITES = ", ".join(tiny_description().sites)


@pytest.mark.parametrize(
    ("method", "options", "field", "message"),
    [
        *(
            (method, {"sites": sites}, "sites", f"sites: got {sites!r}, expected some of {linear}")
            for method in ("lora", "bitfit")
            for sites in (None, ("linear",), ())
            for linear in [", ".join(LINEARS)]
        ),
        (
            "lora",
            {"sites": ("linear:nope",)},
            "sites",
            f"got 'linear:nope', expected some of {SITES}",
        ),
        ("lora", {"sites": (DOWN, "linear")}, "sites", f"got 'linear', expected some of {SITES}"),
        ("loreft", {"sites": ("mlp",)}, "sites", f"sites: got 'mlp', expected some of {SITES}"),
        *(
            (
                "multi_head_parallel_adapter",
                {"sites": sites},
                "sites",
                "sites: got 'block_output', expected heads, the one site of "
                "multi_head_parallel_adapter",
            )
            for sites in (("block_output",), ("heads", "block_output"))
        ),
        (
            "consreft",
            {"activation": "relu"},
            "activation",
            "activation: got 'relu', expected one of identity",
        ),
        (
            "loreft",
            {"activation": "softmax"},
            "activation",
            "activation: got 'softmax', expected one of identity, relu, gelu, silu, tanh, sigmoid",
        ),
        *(
            (
                "loreft",
                {"layers": layers},
                "layers",
                f"layers: got {list(layers)}, expected some of 0 to 3, ascending, each once",
            )
            for layers in ((), (4,), (-1,), (0, 4), (2, 0), (1, 1))
        ),
        *(
            ("loreft", {"rank": rank}, "rank", f"rank: got {rank}, expected 1 to 32")
            for rank in (0, -1, 33)
        ),
        # The narrowest site decides.
        ("lora", {"rank": 17, "sites": (DOWN, KEYS)}, "rank", "rank: got 17, expected 1 to 16"),
        ("lora", {"rank": 33, "sites": (DOWN,)}, "rank", "rank: got 33, expected 1 to 32"),
        # Rank is that of one of four heads, and the file holds all of them.
        (
            "multi_head_parallel_adapter",
            {"rank": 9},
            "rank",
            "rank: got 9, expected 1 to 8",
        ),
    ],
)
def test_refusals_name_field_value_and_allowed(
    method: str, options: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Placement.on(tiny_description(), method, **{"layers": (0, 2)} | options)
    assert caught.value.field == field
    # The message shortens long values, never what is allowed.
    assert message in str(caught.value)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="method: got 'lorra', expected one of bitfit, "):
        Placement.on(tiny_description(), "lorra", layers=(0,))


def test_a_model_may_lack_a_default_site() -> None:
    """An architecture whose layers have no one MLP."""
    model = tiny_description()
    sites = {name: sizes for name, sizes in model.sites.items() if name != "mlp_output"}
    with pytest.raises(InvalidRequest, match="sites: got 'mlp_output', expected some of block"):
        Placement.on(replace(model, sites=sites), "series_adapter", layers=(0,))


@pytest.mark.parametrize("method", ["red", "steering", "bitfit"])
def test_methods_without_a_rank_ignore_it(method: str) -> None:
    for rank in (0, 10**6):
        placement = place(method, rank=rank)
        assert {spec.rank for spec in placement.site_specs().values()} == {0}


@pytest.mark.parametrize("method", [name for name, cls in METHODS.items() if cls.has_rank])
def test_the_largest_rank_can_be_built_stored_and_no_larger_one(method: str) -> None:
    """Of the widths and of the file format."""
    most = 8 if method == "multi_head_parallel_adapter" else 32
    placement = place(method, rank=most)
    spec = make_spec(placement.model, placement=placement, method=method)
    decode_adapter(encode_adapter(spec, moved_edits(placement)))
    with pytest.raises(InvalidRequest, match=f"rank: got {most + 1}, expected 1 to {most}"):
        place(method, rank=most + 1)


@pytest.mark.parametrize(
    ("method", "most"), [("loreft", MAX_RANK), ("multi_head_parallel_adapter", MAX_RANK // 64)]
)
def test_the_file_formats_largest_rank_holds_for_wide_models(method: str, most: int) -> None:
    size = 4096
    sites = {"block_output": (size, size), "heads": (size, size)}
    wide = replace(tiny_description(), hidden_size=size, head_dim=64, sites=sites)
    placement = Placement.on(wide, method, layers=(0,), rank=most)
    assert all(isinstance(spec, SiteSpec) for spec in placement.site_specs().values())
    with pytest.raises(InvalidRequest, match=f"expected 1 to {most}$"):
        Placement.on(wide, method, layers=(0,), rank=most + 1)


# What it builds ---------------------------------------------------------------------------


@pytest.mark.parametrize("num_units", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_one_module_a_layer_site_and_unit(method: str, num_units: int) -> None:
    """Each its own, of its site's widths."""
    placement = place(method)
    modules = placement.build(num_units)
    assert set(modules) == {
        EditKey(layer, site, unit)
        for site in placement.sites
        for layer in (0, 2)
        for unit in range(num_units)
    }
    for key, module in modules.items():
        assert type(module) is METHODS[method]
        head_dim = 8 if key.site == "heads" else 0
        assert module.sizes == SiteSizes(*tiny_description().sites[key.site], head_dim)
        assert module.activation == placement.activation
    parameters = [p for module in modules.values() for p in module.parameters()]
    assert len({p.data_ptr() for p in parameters}) == len(parameters)


@pytest.mark.parametrize("method", METHODS)
def test_site_specs_describe_the_edits(method: str) -> None:
    placement = place(method, rank=3)
    specs = placement.site_specs()
    assert tuple(specs) == placement.sites
    for key, module in placement.build(1).items():
        edit, spec = module.to_edit(), specs[key.site]
        assert (spec.layers, spec.phase) == ((0, 2), placement.phase)
        assert spec.rank == edit.rank
        assert (spec.activation, spec.source) == (edit.activation, edit.source)
        assert spec.scale == edit.scale
        assert spec.parts == tuple(part for part, _ in edit.parts())
        assert spec.sizes(32) == tiny_description().sites[key.site]
        for part, tensor in edit.parts():
            assert spec.shape(part, 32) == tensor.shape


def test_sizes_are_left_out_where_they_are_the_hidden_size() -> None:
    specs = place("lora", sites=(DOWN, UP, KEYS)).site_specs()
    assert {site: (spec.in_size, spec.out_size) for site, spec in specs.items()} == {
        DOWN: (48, None),
        UP: (None, 48),
        KEYS: (None, 16),
    }
    (block,) = place("loreft").site_specs().values()
    assert (block.in_size, block.out_size) == (None, None)


def test_wide_heads() -> None:
    """Four heads of 16 in a model 32 wide."""
    model = replace(
        tiny_description(), head_dim=16, sites={"heads": (32, 64), "block_output": (32, 32)}
    )
    placement = Placement.on(model, "multi_head_parallel_adapter", layers=(1,), rank=2)
    (spec,) = placement.site_specs().values()
    assert (spec.rank, spec.in_size, spec.out_size) == (8, None, 64)
    (module,) = placement.build(1).values()
    assert {part: tuple(tensor.shape) for part, tensor in module.to_edit().parts()} == {
        "down": (32, 8),
        "up": (8, 64),
        "bias": (8,),
        "shift": (64,),
    }
    with pytest.raises(InvalidRequest, match="rank: got 9, expected 1 to 8"):
        Placement.on(model, "multi_head_parallel_adapter", layers=(1,), rank=9)


def family_description(family: str) -> ModelDescription:
    return tiny_loaded(family).description


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_fits_every_site_of_every_family(family: str) -> None:
    """What a placement promises the file keeps, and the model takes."""
    model = family_description(family)
    for method, cls in METHODS.items():
        sites = ("heads",) if cls.sites == ("heads",) else tuple(sorted(model.sites))
        placement = Placement.on(
            model, method, layers=tuple(range(NUM_LAYERS)), rank=2, sites=sites
        )
        spec = make_spec(model, placement=placement, method=method)
        adapter = decode_adapter(encode_adapter(spec, moved_edits(placement)))
        check_fits(adapter.spec, model)
        assert len(adapter.edits) == NUM_LAYERS * len(sites)


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if kind.has_scale])
def test_the_scale_multiplies_what_is_served(method: str) -> None:
    """Trained and served Δ agree, and twice the scale is twice the Δ."""
    sites = ("linear:self_attn.q_proj",) if method == "lora" else None
    deltas = []
    for scale in (0.75, 1.5):
        torch.manual_seed(0)
        placement = Placement.on(
            tiny_description(), method, layers=(0,), rank=2, sites=sites, scale=scale
        )
        (module,) = placement.build(1).values()
        torch.nn.init.normal_(module.up)
        x, h = torch.randn(3, module.x_size), torch.randn(3, module.sizes.out_size)
        torch.testing.assert_close(module.to_edit().delta(h, x), module(h, x).detach())
        deltas.append(module.to_edit().delta(h, x))
    torch.testing.assert_close(deltas[1], 2 * deltas[0])
