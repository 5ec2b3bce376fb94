"""PEFT folders (checked with 0.21.2): LoRA, prefix tuning, prompt tuning; peft_export writes LoRA.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` or ``.bin``. Row vectors::

    LoRA            xW + s·(xAᵀ)Bᵀ   base_model.model.<module>.lora_{A,B}.weight, (r, in), (out, r)
    prefix tuning   keys and values before the prompt's    prompt_embeddings, (n, 2·layers·KH·D)
    prompt tuning   embeddings before the prompt's         prompt_embeddings, (n, d)

s is α/r, or α/√r with ``use_rslora``; ``rank_pattern`` and ``alpha_pattern`` replace r and α for
the modules whose path they match. The shapes of A and B are the same for GPT-2's transposed
linear maps, so ``fan_in_fan_out`` changes nothing here. A row of prefix tuning is key of layer 0,
value of layer 0, key of layer 1, …, as attention uses them (no rotary embedding).

PEFT's LoRA acts on every token. Imported so, it has phase ``all``; the option ``phase="prompt"``
leaves generated tokens alone, which is how PreFT (arXiv 2605.14217) trains and serves it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reft_core.adapter import EditKey, Prefix
from reft_core.convert.common import (
    Conventions,
    Converted,
    ConvertOptions,
    TensorFile,
    ask_name,
    ask_template,
    assemble,
    field_of,
    find_file,
    invalid,
    kv_prefix,
    list_folder,
    read_json,
    read_pickle,
    read_safetensors,
    whole_prompt,
)
from reft_core.convert.linear_maps import LinearMap, lora_edit, place_linear_maps
from reft_core.edits import Edit
from reft_core.errors import AdapterMismatch, UnsupportedFeature, explain
from reft_core.methods.base import Phase
from reft_core.sites import ModelDescription
from reft_core.spec import MAX_PREFIX, MAX_RANK, PrefixSpec

CONFIG_FILE = "adapter_config.json"
SAFETENSORS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
KEY_PREFIX = "base_model.model."
METHOD_OF = {"LORA": "lora", "PREFIX_TUNING": "prefix_tuning", "PROMPT_TUNING": "prompt_tuning"}
"""Our method's name for each ``peft_type`` we read."""

_SOURCE = "a PEFT folder"
_PROMPT_TENSOR = "prompt_embeddings"
_ANY_TYPE = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}
_LORA_FIELDS = _ANY_TYPE | {
    "alpha_pattern",
    "bias",
    "corda_config",  # the next four say how weights were drawn; init_lora_weights is checked
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "ensure_weight_tying",  # of modules that are refused
    "exclude_modules",
    "fan_in_fan_out",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "qalora_group_size",  # of use_qalora
    "r",
    "rank_pattern",
    "runtime_config",
    "target_modules",
    "use_rslora",
}
_PROMPT_FIELDS = _ANY_TYPE | {
    "encoder_hidden_size",
    "init_weights",
    "num_attention_heads",
    "num_layers",
    "num_transformer_submodules",
    "num_virtual_tokens",
    "prefix_projection",  # multiplied out when PEFT saves
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "token_dim",
    "tokenizer_kwargs",
    "tokenizer_name_or_path",
}
_WHY_NOT = {
    "use_dora": "DoRA rescales the base model's weights",
    "modules_to_save": "trained copies of the base model's own modules",
    "lora_bias": "a bias on B",
    "trainable_token_indices": "trained rows of the embedding",
    "layer_replication": "another stack of layers than the base model's",
    "target_parameters": "LoRA on parameters that are no linear map's weight",
    "alora_invocation_tokens": "aLoRA starts at its invocation tokens",
}
_BASE_KEPT = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` that leave the base model's weights as they are."""

_KEY = re.compile(re.escape(KEY_PREFIX) + r"(?P<path>[\w.]{1,256})\.lora_(?P<side>[AB])\.weight")
_FOREIGN_KEYS = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "LoRA on an embedding",
    ".lora_B.bias": "a bias on B",
    "modules_to_save": "trained copies of the base model's own modules",
    "token_adapter": "trained rows of the embedding",
    "base_layer": "weights of the base model",
    "embed_tokens.weight": "weights of the base model",
    "lm_head.weight": "weights of the base model",
}


def from_peft(source: Path, options: ConvertOptions) -> Converted:
    """The adapter in a folder that PEFT saved.

    Needs the options template and name. Where it acts is recorded; ``phase`` may choose.
    """
    options.not_used(("layers",), f"{_SOURCE} records its layers")
    files = list_folder(source)
    config = read_json(find_file(files, CONFIG_FILE, source=source))
    kind = config.get("peft_type")
    if kind not in METHOD_OF:
        raise UnsupportedFeature.because(
            f"{CONFIG_FILE}: peft_type", kind, "one of " + ", ".join(METHOD_OF)
        )
    _check_config(config, _LORA_FIELDS if kind == "LORA" else _PROMPT_FIELDS)
    options.agreeing("activation", "identity", f"{CONFIG_FILE}: {kind}")
    positions = whole_prompt(options, METHOD_OF[kind], f"{CONFIG_FILE}: {kind}")
    phase: Phase = "prompt"
    if kind == "LORA":
        phase = options.phase or "all"
    else:
        options.not_used(("phase",), f"{kind} edits no hidden states")
    conventions = Conventions(
        method=METHOD_OF[kind],
        positions=positions,
        template=ask_template(options, _SOURCE),
        name=ask_name(options, _SOURCE),
        tool="converted from PEFT",
        phase=phase,
        facts={"source_version": str(config.get("peft_version", ""))[:256]},
    )
    path = find_file(files, SAFETENSORS_FILE, PICKLE_FILE, source=source)
    tensors = read_safetensors(path) if path.name == SAFETENSORS_FILE else read_pickle(path)
    if kind == "LORA":
        return assemble(_read_lora(config, tensors, options.base), conventions, options)
    read = _read_prefix if kind == "PREFIX_TUNING" else _read_prompt
    return assemble({}, conventions, options, read(config, tensors, options.base))


def _check_config(config: Mapping[str, Any], known: set[str]) -> None:
    """Refuse by name every setting that would change the function and that we do not have."""
    for key, value in config.items():
        if key not in known and value not in (None, False, "", [], {}):
            why = _WHY_NOT.get(key, "a setting this converter does not know")
            raise UnsupportedFeature.because(f"{CONFIG_FILE}: {key}", value, f"none: {why}")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise UnsupportedFeature.because(
            f"{CONFIG_FILE}: task_type", config["task_type"], "'CAUSAL_LM'"
        )


# -- LoRA ------------------------------------------------------------------------------------


def _read_lora(
    config: Mapping[str, Any], tensors: TensorFile, base: ModelDescription
) -> dict[EditKey, Edit]:
    """The edit of every linear map in the file."""
    if config.get("bias", "none") != "none":
        raise UnsupportedFeature.because(
            f"{CONFIG_FILE}: bias", config["bias"], "'none': trained biases are not imported"
        )
    init = config.get("init_lora_weights", True)
    if init not in _BASE_KEPT:
        raise UnsupportedFeature.because(
            f"{CONFIG_FILE}: init_lora_weights",
            init,
            "one that leaves the base model's weights alone; save with "
            "path_initial_model_for_weight_conversion",
        )
    use_rslora = config.get("use_rslora", False)
    if not isinstance(use_rslora, bool):
        raise invalid(CONFIG_FILE, "use_rslora", use_rslora, "true or false")
    ranks = _Patterns(config, "rank_pattern", "r")
    alphas = _Patterns(config, "alpha_pattern", "lora_alpha")
    modules = _modules(tensors, base)
    _check_targets(config, modules, base, tensors.file)
    edits = {}
    for module in modules:
        rank, alpha = ranks.value(module.path), alphas.value(module.path)
        if rank < 1 or rank > MAX_RANK or rank != int(rank):
            raise invalid(CONFIG_FILE, ranks.field, rank, f"a whole number, 1 to {MAX_RANK}")
        r = int(rank)
        in_size, out_size = base.sites[module.site]
        name = f"{KEY_PREFIX}{module.path}.lora_"
        a = tensors.take(f"{name}A.weight", (r, in_size))
        b = tensors.take(f"{name}B.weight", (out_size, r))
        scale = alpha / (math.sqrt(r) if use_rslora else r)
        edits[EditKey(module.layer, module.site, 0)] = lora_edit(a, b, scale)
    tensors.finish()
    return edits


class _Patterns:
    """A number of the config that patterns may replace for some modules."""

    def __init__(self, config: Mapping[str, Any], patterns: str, field: str) -> None:
        self.field = field
        self._default = _number(config.get(field), field)
        found = config.get(patterns) or {}
        if not isinstance(found, dict) or len(found) > 4096:
            raise invalid(CONFIG_FILE, patterns, found, "an object from module names to numbers")
        self._patterns = [
            (_pattern(text, patterns), _number(value, f"{patterns}.{text}"))
            for text, value in found.items()
        ]

    def value(self, path: str) -> float:
        """The value of the first pattern that is the path or its ending, or the default."""
        return next((v for p, v in self._patterns if p.match(path)), self._default)


def _number(value: Any, key: str) -> float:
    """A positive finite number of the config."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6:
        return value
    raise invalid(CONFIG_FILE, key, value, "a positive number")


def _pattern(text: str, key: str) -> re.Pattern[str]:
    """PEFT takes these as regular expressions. Those that could run for ever are refused."""
    num_repeats = sum(text.count(mark) for mark in "*+?{")
    if len(text) <= 256 and num_repeats <= 2 and not re.search(r"\(\?|\)[*+?{]", text):
        try:
            return re.compile(rf"(.*\.)?({text})$")
        except (re.error, RecursionError, OverflowError):
            pass
    raise invalid(CONFIG_FILE, key, text, "the end of a module's path, or a simple pattern of it")


def _modules(tensors: TensorFile, base: ModelDescription) -> list[LinearMap]:
    """The linear maps that the file's keys name, all in one list of layers."""
    paths = {}
    for key in tensors.keys:
        match = _KEY.fullmatch(key)
        if match is None:
            for part, meaning in _FOREIGN_KEYS.items():
                if part in key:
                    raise UnsupportedFeature.because(
                        f"{tensors.file}: {key}", meaning, "A and B of LoRA only"
                    )
            raise invalid(
                tensors.file, "keys", key, f"{KEY_PREFIX}<module>.lora_A.weight or lora_B.weight"
            )
        paths[match["path"]] = key
    if not paths:
        raise invalid(tensors.file, "keys", [], "at least one pair lora_A, lora_B")
    return place_linear_maps(paths, tensors.file, base)


def _check_targets(
    config: Mapping[str, Any], modules: list[LinearMap], base: ModelDescription, file: str
) -> None:
    """The modules in the tensor file are those the config targets, so that none was lost.

    Targets given as a regular expression, or with exceptions, are not compared.
    """
    targets = config.get("target_modules")
    chosen = config.get("layers_to_transform")
    if isinstance(targets, str) or config.get("exclude_modules"):
        return
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise invalid(CONFIG_FILE, "target_modules", targets, "a list of module names, or text")
    if isinstance(chosen, int) and not isinstance(chosen, bool):
        chosen = [chosen]
    if chosen is not None and not (
        isinstance(chosen, list) and all(type(layer) is int for layer in chosen)
    ):
        raise invalid(CONFIG_FILE, "layers_to_transform", chosen, "whole numbers or null")
    endings = tuple(f".{name}" for name in targets)
    expected = set()
    for layer in range(base.num_layers) if not chosen else sorted(set(chosen)):
        for site in base.sites:
            path = f"{modules[0].layers_path}.{layer}.{site.removeprefix('linear:')}"
            if site.startswith("linear:") and f".{path}".endswith(endings):
                expected.add(path)
    found = {module.path for module in modules}
    for path in sorted(expected - found):
        key = f"{KEY_PREFIX}{path}.lora_A.weight"
        raise invalid(file, key, "no such key", f"a tensor, since {CONFIG_FILE} targets its module")
    for path in sorted(found - expected):
        raise invalid(
            CONFIG_FILE, "target_modules", targets, f"one that matches {path}, found in {file}"
        )


# -- virtual tokens --------------------------------------------------------------------------


def _num_virtual(config: Mapping[str, Any], facts: Mapping[str, int], base: str) -> int:
    """``num_virtual_tokens``, once ``facts`` agree with what the config records."""
    n = field_of(config, CONFIG_FILE, "num_virtual_tokens", int, "a whole number of tokens")
    if not 1 <= n <= MAX_PREFIX:
        raise invalid(CONFIG_FILE, "num_virtual_tokens", n, f"1 to {MAX_PREFIX}")
    submodules = config.get("num_transformer_submodules", 1)
    if submodules not in (None, 1):
        raise UnsupportedFeature.because(
            f"{CONFIG_FILE}: num_transformer_submodules", submodules, "1, a decoder alone"
        )
    for key, expected in facts.items():
        if config.get(key) != expected:
            raise AdapterMismatch(
                explain(f"{CONFIG_FILE}: {key}", config.get(key), f"{expected}, as in {base}"),
                field=key,
            )
    return n


def _read_prefix(
    config: Mapping[str, Any], tensors: TensorFile, base: ModelDescription
) -> tuple[PrefixSpec, Prefix]:
    """Keys and values of every layer."""
    heads, head_dim = base.num_kv_heads, base.head_dim
    facts = {
        "num_layers": base.num_layers,
        "token_dim": heads * head_dim,
        "num_attention_heads": heads,
    }
    n = _num_virtual(config, facts, base.name)
    rows = tensors.take(_PROMPT_TENSOR, (n, 2 * base.num_layers * heads * head_dim))
    tensors.finish()
    return kv_prefix(rows, base)


def _read_prompt(
    config: Mapping[str, Any], tensors: TensorFile, base: ModelDescription
) -> tuple[PrefixSpec, Prefix]:
    """Embeddings before the prompt's."""
    n = _num_virtual(config, {"token_dim": base.hidden_size}, base.name)
    rows = tensors.take(_PROMPT_TENSOR, (n, base.hidden_size))
    tensors.finish()
    return PrefixSpec(kind="embedding", length=n), Prefix(embedding=rows)
