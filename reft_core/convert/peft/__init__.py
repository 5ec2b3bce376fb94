"""PEFT folders (checked with 0.21.2): LoRA, prefix tuning, prompt tuning; ``export`` writes LoRA.

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

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reft_core.convert.assembling import Conventions, Converted, assemble
from reft_core.convert.options import ConvertOptions, ask_name, ask_template, whole_prompt
from reft_core.convert.peft.folder import CONFIG_FILE, PICKLE_FILE, SAFETENSORS_FILE
from reft_core.convert.peft.lora import read_lora
from reft_core.convert.peft.virtual import read_prefix, read_prompt
from reft_core.convert.reading import find_file, list_folder, read_json
from reft_core.convert.tensor_file import read_pickle, read_safetensors
from reft_core.errors import UnsupportedFeature
from reft_core.methods.base import Phase

METHOD_OF = {"LORA": "lora", "PREFIX_TUNING": "prefix_tuning", "PROMPT_TUNING": "prompt_tuning"}
"""Our method's name for each ``peft_type`` we read."""

_SOURCE = "a PEFT folder"
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


def from_peft(source: Path, options: ConvertOptions) -> Converted:
    """The adapter in a folder that PEFT saved.

    Needs the options template and name. Where it acts is recorded; ``phase`` may choose.
    """
    options.not_used(("layers",), f"{_SOURCE} records its layers")
    files = list_folder(source)
    config = read_json(find_file(files, CONFIG_FILE, source=source))
    kind = config.get("peft_type")
    if kind not in list(METHOD_OF):  # a list, since kind may be unhashable
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
    path = find_file(files, SAFETENSORS_FILE, PICKLE_FILE, source=source)
    conventions = Conventions(
        method=METHOD_OF[kind],
        positions=positions,
        template=ask_template(options, _SOURCE),
        name=ask_name(options, _SOURCE),
        tool="converted from PEFT",
        file=path.name,
        phase=phase,
        facts={"source_version": str(config.get("peft_version", ""))[:256]},
    )
    tensors = read_safetensors(path) if path.name == SAFETENSORS_FILE else read_pickle(path)
    if kind == "LORA":
        return assemble(read_lora(config, tensors, options.base), conventions, options)
    read = read_prefix if kind == "PREFIX_TUNING" else read_prompt
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
