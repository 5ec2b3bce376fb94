"""Keys and values of running sequences: one contiguous slot each."""

from __future__ import annotations

from array import array
from functools import cached_property

import torch
from torch import Tensor

from reft_core.sites import ModelDescription


class SlotKV:
    """A fixed number of slots, each with room for ``slot_len`` tokens at every layer.

    Slots are rows of one tensor a layer, so decode attends over a *view* of the first rows
    and nothing is gathered; layers are parts of one tensor, so a slot is moved or cleared at once.
    Memory is zeroed: attention multiplies masked values by zero,
    and zero times an uninitialised NaN would be NaN.

    With ``spare``, every slot has one more position behind its ``slot_len``. Nobody reads it, so
    a row that stands in a batch for no sequence can store there, whosever slot it is.
    """

    def __init__(
        self,
        model: ModelDescription,
        num_slots: int,
        slot_len: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        spare: bool = False,
    ) -> None:
        slot = (model.num_kv_heads, slot_len + spare, model.head_dim)
        self._model = model
        self.num_slots = num_slots
        self.slot_len = slot_len
        self.has_spare = spare
        self.num_layers = model.num_layers
        shape = (2, model.num_layers, num_slots, *slot)
        self.all = torch.zeros(shape, dtype=dtype, device=device)
        """Keys, then values: (2, layers, slots, KH, slot_len, D)."""
        self.keys, self.values = (list(part.unbind()) for part in self.all)
        """Of each layer, (slots, KH, slot_len, D)."""

    @property
    def device(self) -> torch.device:
        """Where the keys and values are."""
        return self.all.device

    @cached_property
    def addresses(self) -> tuple[array[int], array[int]]:
        """Of each layer's keys, and of each layer's values, for compiled loops."""
        keys, values = (array("Q", [t.data_ptr() for t in ts]) for ts in (self.keys, self.values))
        return keys, values

    def bytes_of(self, num_tokens: int) -> int:
        """Bytes that the keys and values of this many tokens take."""
        per_layer = self._model.num_kv_heads * self._model.head_dim * self.all.itemsize
        return 2 * self.num_layers * per_layer * num_tokens

    def like(self, num_slots: int, slot_len: int) -> SlotKV:
        """Another store for the same model, with slots of another number and length."""
        dtype = self.all.dtype
        return SlotKV(self._model, num_slots, slot_len, dtype=dtype, device=self.device)

    def append(self, layer: int, slot: int, start: int, key: Tensor, value: Tensor) -> None:
        """Store key and value (KH, n, D) at positions start..start+n-1 of a slot."""
        end = start + key.shape[1]
        self.keys[layer][slot, :, start:end] = key
        self.values[layer][slot, :, start:end] = value

    def append_each(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Store key and value (B, KH, D) of slots 0..B-1, each at its own position (B,)."""
        rows = torch.arange(len(positions), device=positions.device)
        self.keys[layer][rows, :, positions] = key
        self.values[layer][rows, :, positions] = value

    def copy(self, layer: int, source: int, target: int, start: int, end: int) -> None:
        """Copy tokens start..end-1 of one slot over another's, at one layer."""
        for tensor in (self.keys[layer], self.values[layer]):
            tensor[target, :, start:end] = tensor[source, :, start:end]

    def append_rows(self, layer: int, places: Tensor, key: Tensor, value: Tensor) -> None:
        """Store key and value (N, KH, D), each row in its own slot and position, (2, N)."""
        slots, positions = places
        self.keys[layer][slots, :, positions] = key
        self.values[layer][slots, :, positions] = value

    def read_rows(self, layer: int, places: Tensor) -> tuple[Tensor, Tensor]:
        """Copies (N, KH, D) of the keys and values in these slots and positions, (2, N)."""
        slots, positions = places
        return self.keys[layer][slots, :, positions], self.values[layer][slots, :, positions]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of one slot over another."""
        self.all[:, :, target, :, :length] = self.all[:, :, source, :, :length]

    def clear(self, slot: int, length: int) -> None:
        """Zero the first ``length`` tokens of a slot.

        What one request leaves must not reach the next: not as values, and not as a NaN that
        survives being masked.
        """
        self.all[:, :, slot, :, :length] = 0

    def clear_position(self, num_slots: int, position: int) -> None:
        """Zero one position of the first ``num_slots`` slots."""
        self.all[:, :, :num_slots, :, position] = 0
