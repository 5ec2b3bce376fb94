"""A worker's adapters: which are held, and those whose tensors are on the device.

Held is an adapter whose file every process of the machine can read. Its tensors are brought to the
device when a request first uses it, and the least recently used ones go when the budget is spent;
a request keeps what it uses until its prompt is done, whatever happens here meanwhile.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import torch

from reft_core.adapter import Adapter, decode_adapter
from reft_core.errors import AdapterFileInvalid
from reft_core.vllm.files import AdapterFiles

log = logging.getLogger(__name__)


class WorkerStore:
    """Adapters by digest, for the layers and the device of one worker. Used by one thread."""

    def __init__(
        self,
        files: AdapterFiles,
        budget_bytes: int,
        layers: set[int],
        device: torch.device,
        check: Callable[[Adapter], None],
    ) -> None:
        self._files = files
        self._budget_bytes = budget_bytes
        self._layers = layers
        self._device = device
        self._check = check
        self._held: set[str] = set()
        self._resident: OrderedDict[str, Adapter] = OrderedDict()  # least recently used first
        self.resident_bytes = 0

    def held(self) -> list[str]:
        """Digests of the adapters held."""
        return sorted(self._held)

    def load(self, data: bytes, digest: str) -> None:
        """Hold an adapter and bring it to the device. Idempotent.

        Raises :class:`AdapterError` if the file is not the one of this digest, or not one of an
        adapter for this model.
        """
        arrived = hashlib.sha256(data).hexdigest()
        if arrived != digest:
            raise AdapterFileInvalid.because("body", arrived, f"the file of digest {digest}")
        adapter = decode_adapter(data, digest=digest)
        self._check(adapter)
        self._files.put(data, self._held)
        if digest not in self._resident:
            self._bring(adapter)
        self._held.add(digest)

    def unload(self, digest: str) -> None:
        """Hold an adapter no longer. Its file stays a while, for requests that wait."""
        self._held.discard(digest)
        self._drop(digest)

    def get(self, digest: str) -> Adapter | None:
        """An adapter for use, or None if its file is not to be had, is not for this model, or finds
        no room on the device."""
        adapter = self._resident.get(digest)
        if adapter is not None:
            self._resident.move_to_end(digest)
            return adapter
        try:
            data = self._files.get(digest)
            if data is None:
                log.error("adapter %s: no file of this digest is to be found", digest)
                return None
            adapter = decode_adapter(data, digest=digest)
            self._check(adapter)
            return self._bring(adapter)
        except Exception as error:  # it is this adapter's requests that fail, not the worker
            log.error("adapter %s: %s", digest, error)
            return None

    def _bring(self, adapter: Adapter) -> Adapter:
        """Put this rank's part of an adapter on the device, and make room for it."""
        edits = {key: edit for key, edit in adapter.edits.items() if key.layer in self._layers}
        here = replace(adapter, edits=edits).to(self._device)
        self._resident[adapter.digest] = here
        self.resident_bytes += _num_bytes(here)
        while self.resident_bytes > self._budget_bytes and len(self._resident) > 1:
            self._drop(next(iter(self._resident)))
        return here

    def _drop(self, digest: str) -> None:
        adapter = self._resident.pop(digest, None)
        if adapter is not None:
            self.resident_bytes -= _num_bytes(adapter)


def _num_bytes(adapter: Adapter) -> int:
    return sum(tensor.nbytes for edit in adapter.edits.values() for _, tensor in edit.parts())
