"""Tensors of foreign files: torch pickles, opened by the restricted unpickler, and safetensors."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from reft_core.adapter import MAX_ADAPTER_BYTES
from reft_core.convert.reading import invalid, read_bytes
from reft_core.errors import AdapterFileInvalid, AdapterTooLarge, explain

_FLOATS = frozenset(
    {
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    }
)
_INTEGERS = frozenset({torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8})
"""Dtypes that become float32 and int. Torch has others, some of which no operation takes."""


def _plain(value: object) -> Tensor | None:
    """``value`` if it is a tensor with numbers of its own in memory, else None.

    A pickle may hold a sparse, nested or quantised one, or one on the meta device, which has a
    shape and no numbers.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested:
        return None
    return value if value.device.type == "cpu" and not value.is_quantized else None


class TensorFile:
    """The tensors of one foreign file, taken one by one; what is left over is an error."""

    def __init__(self, file: str, tensors: Mapping[str, object]) -> None:
        self.file = file
        self._left = dict(tensors)

    def __contains__(self, key: str) -> bool:
        return key in self._left

    @property
    def keys(self) -> list[str]:
        """Names not yet taken."""
        return sorted(self._left)

    def take(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor ``key``, checked and in float32.

        The shape is compared before any arithmetic: a pickle can describe a tensor of any
        size over a storage of a few bytes.
        """
        if key not in self._left:
            raise invalid(self.file, key, "no such key", f"a {shape} tensor")
        held = self._left.pop(key)
        value = _plain(held)
        if value is None:
            raise invalid(self.file, key, _shown(held), f"a {shape} tensor")
        if tuple(value.shape) != shape:
            raise invalid(self.file, key, f"shape {tuple(value.shape)}", f"shape {shape}")
        if value.dtype not in _FLOATS:
            raise invalid(self.file, key, str(value.dtype), "a floating-point dtype")
        tensor = value.detach().float().contiguous()
        if not torch.isfinite(tensor).all():
            raise invalid(self.file, key, "NaN or infinity", "finite values only")
        return tensor

    def shape(self, key: str, dims: int, expected: str) -> tuple[int, ...]:
        """Shape of the tensor ``key``, which must have ``dims`` dimensions."""
        held = self._left.get(key)
        value = _plain(held)
        if value is None or value.dim() != dims:
            raise invalid(self.file, key, _shown(held) if key in self._left else None, expected)
        return tuple(value.shape)

    def take_int(self, key: str) -> int | None:
        """The whole number that ``key`` holds as a scalar tensor, or None without the key."""
        if key not in self._left:
            return None
        held = self._left.pop(key)
        value = _plain(held)
        if value is None or value.numel() != 1 or value.dtype not in _INTEGERS:
            raise invalid(self.file, key, _shown(held), "a tensor of one whole number")
        return int(value)

    def drop(self, key: str) -> None:
        """Forget an entry that no equation uses."""
        self._left.pop(key, None)

    def finish(self) -> None:
        """Raise if a tensor was not taken: it would be lost silently."""
        if self._left:
            raise AdapterFileInvalid(
                explain(f"{self.file}: keys", self.keys, "no further keys"), field=self.keys[0]
            )


def _shown(held: object) -> object:
    """What a file holds in place of the tensor that was looked for, for an error."""
    value = _plain(held)
    if value is not None:
        return f"shape {tuple(value.shape)}, {value.dtype}"
    if isinstance(held, Tensor):
        kind = "nested" if held.is_nested else str(held.layout)
        return f"a tensor that holds no plain numbers ({kind}, on {held.device.type})"
    return type(held).__name__


def read_pickle(path: Path) -> TensorFile:
    """A state dict saved by ``torch.save``, without running anything it says.

    ``weights_only=True`` refuses every global but torch's own tensor constructors. What a
    zip archive would inflate to is bounded before it is opened.
    """
    data = io.BytesIO(read_bytes(path))
    if zipfile.is_zipfile(data):
        try:
            with zipfile.ZipFile(data) as archive:
                inflated = sum(entry.file_size for entry in archive.infolist())
        except (zipfile.BadZipFile, OSError) as error:
            raise invalid(path.name, "file", str(error), "a torch.save archive") from None
        if inflated > MAX_ADAPTER_BYTES:
            raise AdapterTooLarge(
                explain(path.name, f"{inflated} bytes", f"at most {MAX_ADAPTER_BYTES} bytes"),
                field=path.name,
            )
    data.seek(0)
    try:
        state = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle raises nearly anything
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
        raise invalid(
            path.name,
            "file",
            f"{type(error).__name__}: {reason}",
            "a state dict of tensors saved by torch.save, loadable with weights_only=True",
        ) from None
    return _as_tensor_file(path.name, state)


def read_safetensors(path: Path) -> TensorFile:
    """The tensors of a safetensors file."""
    data = read_bytes(path)
    try:
        return _as_tensor_file(path.name, safetensors.torch.load(data))
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise invalid(path.name, "file", str(error), "a safetensors file") from None


def _as_tensor_file(file: str, state: object) -> TensorFile:
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise invalid(file, "content", type(state).__name__, "a dict from names to tensors")
    return TensorFile(file, state)
