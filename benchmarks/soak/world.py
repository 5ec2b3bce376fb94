"""What the soak serves: a base model, and adapter files of many kinds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.work import fresh_adapter
from reft_core.adapter import Adapter, Prefix, decode_adapter, encode_adapter
from reft_core.loading import LoadedModel, load_model
from reft_core.sites import ModelDescription
from reft_core.spec import AdapterSpec, PositionSpec, PrefixSpec
from reft_core.threads import run_in_own_thread

TINY = "tiny"
"""The model name that means: a random Llama made on the fly."""

_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Kind:
    """One kind of adapter: what it edits where."""

    method: str
    positions: str = "f7+l7"
    tied: bool = True
    sites: tuple[str, ...] | None = None


KINDS = (
    Kind("loreft"),
    Kind("direft", "l1"),
    Kind("lora", sites=("linear:self_attn.q_proj", "linear:self_attn.v_proj")),  # edits decode too
    Kind("loreft", "prompt"),
    Kind("noreft", "f3+l5", tied=False),
    Kind("red", "f2"),
    Kind("series_adapter", "l4"),
    Kind("steering", "prompt"),
)


@dataclass(frozen=True)
class World:
    """A base model, and adapters that all answer differently."""

    model: str
    """As ``reft serve --model`` takes it."""
    loaded: LoadedModel
    plain: list[bytes]
    """Files of adapters that may be stacked."""
    prefixed: list[bytes]
    """Files of adapters that bring virtual tokens."""
    foreign: bytes
    """A good file for another base model."""

    @property
    def adapters(self) -> dict[str, Adapter]:
        """All that fit the model, by digest."""
        decoded = map(decode_adapter, [*self.plain, *self.prefixed])
        return {adapter.digest: adapter for adapter in decoded}


def make_world(model: str, folder: Path, num_files: int, seed: int) -> World:
    """A world around ``model``: the tiny one, ``demo``, a hub id or a folder."""
    if model == TINY:
        model = str(folder / "tiny-llama")
        save_tiny_model(Path(model), seed)
    loaded = load_model(model)
    base = loaded.description
    other = replace(base, hidden_size=2 * base.hidden_size, fingerprint="0" * 64)

    def files() -> tuple[list[bytes], list[bytes], bytes]:
        torch.manual_seed(seed)
        plain = [_edit_file(base, KINDS[i % len(KINDS)]) for i in range(num_files)]
        prefixed = [_prefix_file(base, length) for length in (1, 3)]
        shift = Kind("steering")
        sites = {"block_output": (other.hidden_size, other.hidden_size)}
        return plain, prefixed, _edit_file(replace(other, sites=sites), shift)

    plain, prefixed, foreign = run_in_own_thread(files)
    return World(model, loaded, plain, prefixed, foreign)


def save_tiny_model(folder: Path, seed: int) -> None:
    """Save a random float32 Llama with a tokenizer of printable ASCII.

    Weights are drawn wider than a fresh model's, so that logits are well apart.
    """
    tokenizer = _ascii_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        tie_word_embeddings=False,  # tied, a random model mostly repeats its last token
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.6 if "embed" in name else 0.16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _ascii_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character, for those that are ASCII and print; any tokens make clean text."""
    characters = [chr(code) for code in range(0x21, 0x7F)] + ["\u0120", "\u010a"]  # space, newline
    tokenizer = Tokenizer(
        models.BPE(vocab={character: i for i, character in enumerate(characters)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=_CHAT_TEMPLATE
    )


def _edit_file(model: ModelDescription, kind: Kind) -> bytes:
    """An adapter of one kind in all layers, its parameters moved from where training starts."""
    rank = 8 if model.hidden_size > 256 else model.hidden_size // 2
    spec, modules = fresh_adapter(
        model,
        kind.method,
        PositionSpec(rule=kind.positions, tied=kind.tied),
        layers=range(model.num_layers),
        rank=rank,
        sites=kind.sites,
    )
    with torch.no_grad():
        for parameter in chain.from_iterable(m.parameters() for m in modules.values()):
            parameter.add_(torch.randn_like(parameter) / model.hidden_size**0.5)
    return encode_adapter(spec, {key: module.to_edit() for key, module in modules.items()})


def _prefix_file(model: ModelDescription, length: int) -> bytes:
    """Prefix tuning with random keys and values."""
    shape = (model.num_kv_heads, length, model.head_dim)
    spec = AdapterSpec(
        name="prefix",
        base=model.to_base_spec(),
        method="prefix_tuning",
        positions=PositionSpec(rule="l1"),
        prefix=PrefixSpec(
            kind="kv", length=length, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim
        ),
    )
    keys, values = (
        tuple(torch.randn(shape) for _ in range(model.num_layers)) for _ in ("keys", "values")
    )
    return encode_adapter(spec, {}, Prefix(keys, values))
