"""A folder that AdapterHub's `adapters` saved, and what its methods have in common."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_core.convert.assembling import Conventions, check_layers
from reft_core.convert.options import ConvertOptions, ask_template
from reft_core.convert.reading import field_of, find_file, invalid, list_folder, read_json
from reft_core.convert.tensor_file import TensorFile, read_pickle, read_safetensors
from reft_core.edits import Activation
from reft_core.errors import AdapterMismatch, UnsupportedFeature, explain
from reft_core.methods.base import Phase
from reft_core.sites import ModelDescription
from reft_core.spec import PositionSpec

CONFIG_FILE = "adapter_config.json"
INTERFACE_FILE = "adapter_interface.json"
SAFETENSORS_FILE = "adapter.safetensors"
PICKLE_FILE = "pytorch_adapter.bin"
HEAD_FILES = ("head_config.json", "model_head.safetensors", "pytorch_model_head.bin")
SOURCE = "an `adapters` folder"

MODULE = r"(?:\w{1,256}\.){1,16}?"
"""Pattern of what a tensor's name begins with: the path of a module, with the dot behind it."""
NAME = r"(?P<name>[^.]{1,256})"
"""Pattern of an adapter's name; torch's ModuleDict takes none with a dot.

Neither matches at more places than one text has segments, so that no name takes long to refuse.
"""

ACTIVATIONS: Mapping[str, Activation] = {
    "linear": "identity",
    "relu": "relu",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}
"""Our name for each ``non_linearity`` that we have."""


@dataclass(frozen=True)
class SavedAdapter:
    """One folder, opened: its settings read and made for the base model, its tensors not yet."""

    document: dict[str, Any]
    config: dict[str, Any]
    """The method's own settings."""
    interface: dict[str, Any] | None
    """How `adapters` was told to find its way in a model that it has no classes for."""
    weights: Path

    @classmethod
    def open(cls, source: Path) -> SavedAdapter:
        """The folder's documents. Raises for a prediction head, which would be lost."""
        files = list_folder(source)
        document = read_json(find_file(files, CONFIG_FILE, source=source))
        weights = find_file(files, SAFETENSORS_FILE, PICKLE_FILE, source=source)
        heads = [name for name in HEAD_FILES if name in files]
        if heads:
            raise UnsupportedFeature.because("source", heads, "a folder without a prediction head")
        config = field_of(document, CONFIG_FILE, "config", dict, "an object")
        interface = None
        if INTERFACE_FILE in files:
            interface = field_of(
                read_json(files[INTERFACE_FILE]), INTERFACE_FILE, "interface", dict, "an object"
            )
        return cls(document, config, interface, weights)

    @property
    def version(self) -> str:
        """What saved it, such as ``adapters.1.3.0``."""
        return str(self.document.get("version", ""))[:256]

    def check_settings(self, known: frozenset[str], fixed: Mapping[str, tuple[Any, str]]) -> None:
        """Refuse by name what is not ``known``, and any other value of what is ``fixed``.

        ``fixed`` gives the one value of a setting that we can represent, and why.
        """
        unknown = sorted(set(self.config) - known - set(fixed) - {"architecture"})
        if unknown:
            allowed = ", ".join(sorted(known | set(fixed)))
            raise invalid(CONFIG_FILE, "config", unknown, f"only {allowed}")
        for key, (expected, why) in fixed.items():
            value = self.config.get(key, expected)
            if type(value) is not type(expected) or value != expected:
                raise UnsupportedFeature.because(
                    f"{CONFIG_FILE}: config.{key}", value, f"{expected!r}: {why}"
                )

    def check_base(self, base: ModelDescription) -> None:
        """Raise :class:`AdapterMismatch` unless the folder was saved from such a model."""
        for key, expected in (
            ("hidden_size", base.hidden_size),
            ("model_type", base.architecture),
        ):
            if self.document.get(key) != expected:
                raise AdapterMismatch(
                    explain(
                        f"{CONFIG_FILE}: {key}",
                        self.document.get(key),
                        f"{expected!r}, as in {base.name}",
                    ),
                    field=key,
                )

    def flag(self, key: str, default: bool) -> bool:
        """A setting that is true or false."""
        value = self.config.get(key, default)
        if not isinstance(value, bool):
            raise invalid(CONFIG_FILE, f"config.{key}", value, "true or false")
        return value

    def activation(self, *, nullable: bool = False) -> Activation:
        """Our name of ``non_linearity``; null is the identity where it may be null."""
        given = self.config.get("non_linearity")
        if given is None and nullable:
            return "identity"
        name = given.lower() if isinstance(given, str) else ""
        if name not in ACTIVATIONS:
            allowed = "null or " * nullable + "one of " + ", ".join(ACTIVATIONS)
            raise invalid(CONFIG_FILE, "config.non_linearity", given, allowed)
        return ACTIVATIONS[name]

    def layers(self, base: ModelDescription) -> list[int]:
        """The layers that ``leave_out`` leaves."""
        left_out = self.config.get("leave_out", [])
        if not isinstance(left_out, list) or not all(type(layer) is int for layer in left_out):
            raise invalid(
                CONFIG_FILE, "config.leave_out", left_out, "a list of whole numbers, of layers"
            )
        left_out = set(left_out)
        check_layers(left_out, base, f"{CONFIG_FILE}: config.leave_out")
        return [layer for layer in range(base.num_layers) if layer not in left_out]

    def read_tensors(self) -> TensorFile:
        """The adapter's tensors."""
        if self.weights.name == SAFETENSORS_FILE:
            return read_safetensors(self.weights)
        return read_pickle(self.weights)

    def conventions(
        self,
        method: str,
        positions: PositionSpec,
        options: ConvertOptions,
        *,
        phase: Phase = "prompt",
        facts: Mapping[str, str | int | float | bool] | None = None,
    ) -> Conventions:
        """What the edits do not say. The name comes from the folder unless given."""
        name = options.name or field_of(
            self.document, CONFIG_FILE, "name", str, "the adapter's name"
        )
        return Conventions(
            method=method,
            positions=positions,
            template=ask_template(options, SOURCE),
            name=name,
            tool="converted from adapters",
            file=self.weights.name,
            phase=phase,
            facts={"source_version": self.version, **(facts or {})},
        )


def module_prefixes(
    tensors: TensorFile, pattern: re.Pattern[str], form: str
) -> dict[tuple[int, str], str]:
    """For each module with tensors, what their names begin with.

    ``pattern`` must match every name, in groups layer, name, place and part; a module is a
    place in a layer. ``form`` says in words what the pattern accepts.
    """
    prefixes: dict[tuple[int, str], str] = {}
    names = set()
    for key in tensors.keys:
        match = pattern.fullmatch(key)
        if not match:
            raise invalid(tensors.file, "keys", key, form)
        names.add(match["name"])
        prefix = key[: match.start("part")]
        if prefixes.setdefault((int(match["layer"]), match["place"]), prefix) != prefix:
            raise invalid(tensors.file, key, "a second module of its place", "one a layer")
    check_one_name(names, tensors)
    return prefixes


def check_one_name(names: set[str], tensors: TensorFile) -> None:
    """Raise unless all tensors belong to one adapter."""
    if len(names) != 1:
        raise invalid(tensors.file, "keys", sorted(names), "exactly one adapter")
