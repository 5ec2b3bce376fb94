"""What is attacked: a tiny random model that reads bytes, and good adapter files of every kind."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.work import fresh_adapter
from reft_core.adapter import Head, Prefix, encode_adapter
from reft_core.loading import LoadedModel
from reft_core.sites import ModelDescription, describe_model
from reft_core.spec import (
    AdapterSpec,
    HeadSpec,
    PositionSpec,
    PrefixSpec,
    TaskSpec,
    TemplateSpec,
    TrainingSpec,
)

MODEL_NAME = "tiny"
_SIZE = 16
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte and two special ones: there is no text that it cannot read."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=_TEMPLATE
    )


def tiny_loaded() -> LoadedModel:
    """A random model of two layers, the same at every call."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=_SIZE,
        num_hidden_layers=2,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4)
    return LoadedModel(model, tokenizer, describe_model(model, MODEL_NAME))


@cache
def tiny_description() -> ModelDescription:
    """The description of :func:`tiny_loaded`."""
    return tiny_loaded().description


@dataclass(frozen=True)
class Good:
    """A good adapter file, and what kind it is."""

    name: str
    data: bytes
    serves: bool = True
    """Whether a causal engine can take it; one with a trained head is for encoders."""


@cache
def good_files() -> tuple[Good, ...]:
    """Adapter files for the tiny model that between them use every part of the format."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return (*_edit_files(), *_prefix_files(), _head_file())


def _edit_files() -> list[Good]:
    """Files of one method each, with all that a spec may say beside it."""
    template = TemplateSpec(system="S[{content}]", user="U[{content}]", assistant="A[{content}]")
    labels = TaskSpec(labels=("yes", "no", "perhaps"))
    training = TrainingSpec(
        tool="fuzz",
        command="train",
        created_at="2025-01-01T00:00:00Z",
        seed=7,
        data={"rows": 3, "name": "toy"},
        hyperparameters={"lr": 0.5, "warm": True, "steps": 3},
        metrics={"loss": 0.25},
    )
    two_units = PositionSpec(rule="f1+l1", tied=False)
    last = PositionSpec(rule="l2", anchor="before_last", cap="half")
    linear = ("linear:self_attn.q_proj", "linear:self_attn.v_proj")
    return [
        Good("loreft", _file("loreft", two_units, description="é\u2028", training=training)),
        Good("direft", _file("direft", last, template=template, task=labels)),
        Good("noreft", _file("noreft", PositionSpec(rule="prompt"), dtype="bfloat16")),
        Good("lora", _file("lora", PositionSpec(rule="prompt"), sites=linear, dtype="float16")),
        Good("red", _file("red", PositionSpec(rule="f2"), strength=0.5)),
        Good("steering", _file("steering", PositionSpec(rule="1,3,-1"), layers=(1,))),
        Good(
            "subspaces",
            _file("consreft", PositionSpec(rule="l1"), subspaces={"a": (0,), "b": (1,)}),
        ),
        Good("series", _file("series_adapter", PositionSpec(rule="l4"))),
        Good("interchange", _file("interchange", PositionSpec(rule="l1"))),
    ]


def _file(
    method: str,
    positions: PositionSpec,
    *,
    sites: tuple[str, ...] | None = None,
    layers: tuple[int, ...] = (0, 1),
    **fields: object,
) -> bytes:
    """One file with rank 2 edits, moved from where training starts."""
    spec, modules = fresh_adapter(
        tiny_description(), method, positions, layers=layers, rank=2, sites=sites
    )
    with torch.no_grad():
        for module in modules.values():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) / _SIZE**0.5)
    edits = {key: module.to_edit() for key, module in modules.items()}
    return encode_adapter(
        AdapterSpec(**{**dict(spec), "name": method.replace("_", "-"), **fields}), edits
    )


def _prefix_files() -> list[Good]:
    """Prefix tuning and prompt tuning."""
    model = tiny_description()
    length, heads = 3, (model.num_kv_heads, model.head_dim)
    kv = PrefixSpec(kind="kv", length=length, num_kv_heads=heads[0], head_dim=heads[1])
    shape = (heads[0], length, heads[1])

    def layers() -> tuple[Tensor, ...]:
        return tuple(torch.randn(shape) for _ in range(model.num_layers))

    spec = {"base": model.to_base_spec(), "positions": PositionSpec(rule="l1")}
    embedding = Prefix(embedding=torch.randn(length, model.hidden_size))
    return [
        Good(
            "prefix",
            encode_adapter(
                AdapterSpec(**spec, name="prefix", method="prefix_tuning", prefix=kv),
                {},
                Prefix(layers(), layers()),
            ),
        ),
        Good(
            "prompt",
            encode_adapter(
                AdapterSpec(
                    **spec,
                    name="prompt",
                    method="prompt_tuning",
                    prefix=PrefixSpec(kind="embedding", length=length),
                ),
                {},
                embedding,
            ),
        ),
    ]


def _head_file() -> Good:
    """A classifier: edits and a trained head with a dense layer."""
    spec, modules = fresh_adapter(
        tiny_description(), "loreft", PositionSpec(rule="f1"), layers=(0,), rank=1
    )
    head = Head(torch.randn(5, 2), torch.randn(2), torch.randn(_SIZE, 5), torch.randn(5), "tanh")
    fields = {
        **dict(spec),
        "name": "head",
        "head": HeadSpec(pooling="mean", hidden=5, activation="tanh"),
        "task": TaskSpec(kind="classification", labels=("no", "yes")),
    }
    edits = {key: module.to_edit() for key, module in modules.items()}
    return Good("head", encode_adapter(AdapterSpec(**fields), edits, head=head), serves=False)
