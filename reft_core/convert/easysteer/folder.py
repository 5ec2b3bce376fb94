"""The folder that EasySteer's fork of pyreft saves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reft_core.adapter import EditKey
from reft_core.convert.easysteer.payload import at_layers, loreft_edit
from reft_core.convert.options import ConvertOptions
from reft_core.convert.reading import find_file, invalid, read_json
from reft_core.convert.tensor_file import read_pickle
from reft_core.edits import Edit
from reft_core.errors import AdapterFileInvalid

CONFIG_FILES = ("reft_config.json", "config.json")


def read_folder(
    files: Mapping[str, Path], source: Path, options: ConvertOptions
) -> tuple[str, dict[EditKey, Edit]]:
    """The one unit in a folder that EasySteer's pyreft fork saved.

    Its loader recognises LoReFT by ``rotate_layer`` and takes a lone vector as a direction.
    """
    config = read_json(find_file(files, *CONFIG_FILES, source=source))
    pickles = sorted(name for name in files if name.endswith(".bin"))
    if len(pickles) != 1:
        raise AdapterFileInvalid(
            f"{source}: got {pickles}, expected exactly one .bin file (kind 'pyreft' reads more)",
            field="source",
        )
    layer = _recorded_layer(config, pickles[0])
    tensors = read_pickle(files[pickles[0]])
    d = options.base.hidden_size
    if "rotate_layer" in tensors:
        r = tensors.shape("rotate_layer", 2, f"a ({d}, r) tensor")[1]
        prefix = "" if "weight" in tensors else "learned_source."
        weight = tensors.take(f"{prefix}weight", (r, d))
        bias = f"{prefix}bias"
        edit = loreft_edit(
            tensors,
            tensors.take("rotate_layer", (d, r)),
            weight,
            tensors.take(bias, (r,)) if bias in tensors else None,
        )
        method = "loreft"
    else:
        if len(tensors.keys) != 1:
            raise invalid(pickles[0], "keys", tensors.keys, "rotate_layer, or one vector alone")
        edit = Edit(shift=tensors.take(tensors.keys[0], (d,)))
        method = "steering"
    tensors.finish()
    return method, at_layers(edit, layer, options, pickles[0])


def _recorded_layer(config: Mapping[str, Any], pickle_name: str) -> int | None:
    """The layer of the first representation, or of the file's name; None if neither says."""
    rows = config.get("representations")
    first = rows[0] if isinstance(rows, list) and rows else None
    if isinstance(first, dict):
        first = [first.get("layer"), first.get("component", "block_output")]
    if isinstance(first, list) and first:
        if len(first) > 1 and first[1] != "block_output":
            raise invalid("config", "representations[0]", first[1], "'block_output'")
        if type(first[0]) is int:
            return first[0]
    named = re.match(r"intkey_layer[._](\d{1,5})[._]", pickle_name)
    return int(named[1]) if named else None
