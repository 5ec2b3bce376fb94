"""LoRA, as PEFT stores it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from reft_core.adapter import EditKey
from reft_core.convert.assembling import check_layers
from reft_core.convert.linear_maps import LinearMap, lora_edit, place_linear_maps
from reft_core.convert.peft.folder import CONFIG_FILE, KEY_PREFIX
from reft_core.convert.peft.patterns import MAX_PATTERNS, parse_endings
from reft_core.convert.reading import invalid
from reft_core.convert.tensor_file import TensorFile
from reft_core.edits import Edit
from reft_core.errors import UnsupportedFeature
from reft_core.sites import ModelDescription
from reft_core.spec import MAX_RANK

_BASE_KEPT = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` that leave the base model's weights as they are."""

_KEY = re.compile(re.escape(KEY_PREFIX) + r"(?P<path>[\w.]{1,128})\.lora_(?P<side>[AB])\.weight")
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


def read_lora(
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
    modules = _linear_maps(tensors, base)
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
        if not isinstance(found, dict) or len(found) > MAX_PATTERNS:
            raise invalid(
                CONFIG_FILE,
                patterns,
                found,
                f"an object from at most {MAX_PATTERNS} module names to numbers",
            )
        endings = parse_endings(found, patterns)
        self._patterns = [
            (ending, _number(value, f"{patterns}.{text}"))
            for ending, (text, value) in zip(endings, found.items(), strict=True)
        ]

    def value(self, path: str) -> float:
        """The value of the first pattern that is the path or its ending, or the default."""
        return next((v for ending, v in self._patterns if ending.ends(path)), self._default)


def _number(value: Any, key: str) -> float:
    """A positive finite number of the config."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6:
        return value
    raise invalid(CONFIG_FILE, key, value, "a positive number")


def _linear_maps(tensors: TensorFile, base: ModelDescription) -> list[LinearMap]:
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
    check_layers(chosen or (), base, f"{CONFIG_FILE}: layers_to_transform")
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
