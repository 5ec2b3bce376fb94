"""Tiny random models and adapters for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from reft_core.adapter import Adapter, EditKey, Head, Prefix, decode_adapter, encode_adapter
from reft_core.batch import AdapterUse
from reft_core.edits import Activation, Edit
from reft_core.encoder import EncoderRequest
from reft_core.engine.interface import FinishReason, Output, Token
from reft_core.errors import ReftError
from reft_core.loading import LoadedModel
from reft_core.methods.base import Phase
from reft_core.methods.placement import Placement
from reft_core.sites import ModelDescription, describe_model
from reft_core.spec import AdapterSpec, HeadSpec, PositionSpec, PrefixSpec, SiteSpec, TaskSpec

VOCAB_SIZE = 96
HIDDEN_SIZE = 32
NUM_LAYERS = 4
SLIDING_WINDOW = 6

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": NUM_LAYERS,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,  # tied, a random model mostly repeats its last token
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}

_BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_GROUPED, sliding_window=SLIDING_WINDOW)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GROUPED)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_GROUPED, query_pre_attn_scalar=8, sliding_window=SLIDING_WINDOW)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**_GROUPED, query_pre_attn_scalar=8, sliding_window=SLIDING_WINDOW)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_embd=HIDDEN_SIZE,
            n_layer=NUM_LAYERS,
            n_head=4,
            n_positions=256,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        )
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZES)),
}
FAMILIES = tuple(_BUILDERS)


def tiny_model(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A random float32 model of ``family`` whose greedy output does not repeat one token.

    Weights are drawn wider than a fresh model's so that logits are well apart and an edit
    in one layer is felt in the next.
    """
    torch.manual_seed(seed)
    model = _BUILDERS[family]().eval().requires_grad_(False)
    model.set_attn_implementation("eager")  # the model's own definition of attention
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.6 if "embed" in name or "wte" in name else 0.25)
    model.generation_config.eos_token_id = 2
    return model


@cache
def tiny_description() -> ModelDescription:
    """The description of the tiny llama, for tests that need no model."""
    return describe_model(tiny_model(), "tiny-llama")


class NoTokenizer:
    """Stands where a tokenizer would, for tests that deal in token ids only."""

    eos_token_id = 2


def tiny_loaded(family: str = "llama", seed: int = 0) -> LoadedModel:
    """A tiny model as the engine takes it, without a usable tokenizer."""
    model = tiny_model(family, seed)
    tokenizer: PreTrainedTokenizerBase = NoTokenizer()  # type: ignore[assignment]
    return LoadedModel(model, tokenizer, describe_model(model, f"tiny-{family}"))


def make_spec(
    model: ModelDescription,
    *,
    placement: Placement | None = None,
    name: str = "test",
    method: str = "loreft",
    rank: int = 2,
    layers: Iterable[int] | None = None,
    sites: tuple[str, ...] | None = None,
    positions: str = "l1",
    tied: bool = True,
    activation: Activation | None = None,
    phase: Phase | None = None,
    **fields: object,
) -> AdapterSpec:
    """A complete spec for a model. A given placement stands for method, rank, sites and so on."""
    placement = placement or make_placement(
        model, method, rank=rank, layers=layers, sites=sites, activation=activation, phase=phase
    )
    return AdapterSpec(
        name=name,
        base=model.to_base_spec(),
        method=method,
        positions=PositionSpec(rule=positions, tied=tied),
        sites=placement.site_specs(),
        **fields,  # type: ignore[arg-type]
    )


def make_placement(
    model: ModelDescription, method: str, *, layers: Iterable[int] | None, **options: object
) -> Placement:
    """A placement on all layers unless told otherwise."""
    chosen = tuple(range(model.num_layers) if layers is None else layers)
    return Placement.on(model, method, layers=chosen, **options)  # type: ignore[arg-type]


def random_adapter_bytes(
    model: ModelDescription,
    *,
    seed: int = 0,
    size: float = 1.0,
    method: str = "loreft",
    rank: int = 2,
    layers: Iterable[int] | None = None,
    sites: tuple[str, ...] | None = None,
    activation: Activation | None = None,
    phase: Phase | None = None,
    **fields: object,
) -> bytes:
    """The file of an adapter whose parameters were moved away from their initial values."""
    torch.manual_seed(seed)
    placement = make_placement(
        model, method, rank=rank, layers=layers, sites=sites, activation=activation, phase=phase
    )
    spec = make_spec(model, placement=placement, method=method, **fields)  # type: ignore[arg-type]
    return encode_adapter(spec, moved_edits(placement, spec.positions.to_rule().num_units, size))


def moved_edits(placement: Placement, num_units: int = 1, size: float = 1.0) -> dict[EditKey, Edit]:
    """A placement's edits, their parameters moved away from the initial values."""
    modules = placement.build(num_units)
    with torch.no_grad():
        for module in modules.values():
            for parameter in module.parameters():
                noise = torch.randn_like(parameter) / placement.model.hidden_size**0.5
                parameter.add_(size * noise)
    return {key: module.to_edit() for key, module in modules.items()}


def random_adapter(model: ModelDescription, **options: object) -> Adapter:
    """A random adapter for ``model``, read from its own file."""
    return decode_adapter(random_adapter_bytes(model, **options))  # type: ignore[arg-type]


def random_classifier_bytes(
    model: ModelDescription,
    num_labels: int,
    head: HeadSpec,
    *,
    seed: int = 0,
    method: str = "loreft",
    sites: tuple[str, ...] | None = None,
    labels: tuple[str, ...] | None = None,
    **fields: object,
) -> bytes:
    """The file of an encoder's adapter with moved edits and a random head; 1 label: of a
    regression.
    """
    torch.manual_seed(seed)
    placement = make_placement(model, method, layers=None, rank=2, sites=sites)
    spec = make_spec(
        model,
        placement=placement,
        method=method,
        name=f"{method}-{seed}",
        head=head,
        task=TaskSpec(kind="regression")
        if num_labels == 1
        else TaskSpec(
            kind="classification", labels=labels or tuple(f"l{i}" for i in range(num_labels))
        ),
        **fields,  # type: ignore[arg-type]
    )
    shapes = head.tensor_shapes(model.hidden_size, num_labels)
    tensors = {
        name.removeprefix("head.").replace(".", "_"): torch.randn(shape) * 0.4
        for name, shape in shapes.items()
    }
    edits = moved_edits(placement, spec.positions.to_rule().num_units)
    return encode_adapter(spec, edits, head=Head(**tensors, activation=head.activation))


def random_prefix_adapter(
    model: ModelDescription,
    kind: Literal["kv", "embedding"],
    *,
    length: int = 3,
    seed: int = 0,
    size: float = 1.0,
    beside: Adapter | None = None,
) -> Adapter:
    """Prefix tuning or prompt tuning with random tensors of this size; with the edits of
    ``beside``, as in MAM, or with none.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = (model.num_kv_heads, model.head_dim) if kind == "kv" else (None, None)
    prefix_spec = PrefixSpec(kind=kind, length=length, num_kv_heads=heads[0], head_dim=heads[1])
    method = "prefix_tuning" if kind == "kv" else "prompt_tuning"
    spec = AdapterSpec(
        name=f"{kind}-prefix",
        base=model.to_base_spec(),
        method=method if beside is None else "mam",
        positions=PositionSpec(rule="l1") if beside is None else beside.spec.positions,
        sites={} if beside is None else beside.spec.sites,
        prefix=prefix_spec,
    )
    shapes = prefix_spec.tensor_shapes(model.num_layers, model.hidden_size)
    drawn = {name: size * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    layers = range(model.num_layers if kind == "kv" else 0)
    prefix = Prefix(
        tuple(drawn[f"prefix.{layer}.key"] for layer in layers),
        tuple(drawn[f"prefix.{layer}.value"] for layer in layers),
        drawn.get("prefix.embedding"),
    )
    edits = {} if beside is None else beside.edits
    return decode_adapter(encode_adapter(spec, edits, prefix))


def shift_adapter(
    model: ModelDescription,
    *,
    shift: float = 0.0,
    gain: float = 0.0,
    positions: str = "prompt",
    phase: Phase = "prompt",
) -> Adapter:
    """Adds ``shift`` and ``gain`` ∘ h to layer 0's output; 3e38 for both overflows float32."""
    site = SiteSpec(layers=(0,), rank=0, parts=("shift", "gain"), phase=phase)
    spec = make_spec(model, positions=positions).model_copy(
        update={"method": "shift and gain", "sites": {"block_output": site}}
    )
    width = model.hidden_size
    edit = Edit(shift=torch.full((width,), shift), gain=torch.full((width,), gain))
    return decode_adapter(encode_adapter(spec, {EditKey(0, "block_output", 0): edit}))


def random_prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist())


def request_for(stack: Iterable[tuple[Adapter, float]], tokens: list[int]) -> EncoderRequest:
    """A text for an encoder, with adapters in order, each with its strength."""
    uses = tuple(AdapterUse(adapter.to("cpu"), strength) for adapter, strength in stack)
    return EncoderRequest(tuple(tokens), uses)


class Recorder:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []

    def __call__(self, output: Output) -> None:
        self.outputs.append(output)

    @property
    def tokens(self) -> list[Token]:
        return [output.token for output in self.outputs if output.token is not None]

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.outputs[-1].finish_reason if self.outputs else None

    @property
    def error(self) -> ReftError | None:
        return self.outputs[-1].error if self.outputs else None


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal shape and dtype, and values within ``tolerance`` of the largest expected one."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if not expected.numel():
        return
    worst = (found.double() - expected.double()).abs().max().item()
    scale = max(1.0, expected.abs().max().item())
    # Written so that NaN fails too.
    assert worst <= tolerance * scale, f"largest difference {worst}, of values up to {scale}"
