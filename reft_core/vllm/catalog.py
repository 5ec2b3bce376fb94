"""The adapters that a front end of vLLM knows: by digest and by name, each checked once.

A front end needs no tensors. It learns of adapters from the places of the settings, from whoever
loads one through it, and, asked for a digest that it does not know, from the machine's spool.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from reft_core.adapter import Adapter, check_fits, decode_adapter
from reft_core.edits import Edit
from reft_core.errors import AdapterError, AdapterNotFound, UnsupportedFeature, explain
from reft_core.sites import ModelDescription, describe_model
from reft_core.spec import AdapterSpec
from reft_core.vllm.files import AdapterFiles
from reft_core.vllm.settings import Settings

_SCAN_INTERVAL_S = 5.0
"""Least time between two looks at the shared places for names that are not known."""

EMBEDDED = "the embedded engine (reft serve without --engine vllm) does"


def describe_base(vllm_config: Any) -> ModelDescription:
    """The base model of a ``VllmConfig``, from its config alone."""
    model_config = vllm_config.model_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config.hf_text_config)
    return describe_model(model, str(model_config.model))


def check_servable(spec: AdapterSpec, sites: Iterable[str]) -> None:
    """Raise :class:`UnsupportedFeature` unless vLLM can run the adapter with these sites armed."""
    if spec.prefix is not None:
        raise _unsupported("prefix", f"virtual tokens ({spec.prefix.kind})")
    if spec.head is not None:
        raise _unsupported("head", "classification heads")
    for name, site in spec.sites.items():
        if site.phase == "all":
            raise _unsupported(f"sites.{name}.phase", "edits of generated tokens (phase 'all')")
        if name == "block_output" and site.source == "input":
            raise _unsupported(f"sites.{name}.source", "edits of a block that read its input")
        if name not in sites:
            known = [*sites, name]
            raise UnsupportedFeature(
                f"sites: {name!r} is not armed; start vLLM with --additional-config "
                f'\'{{"reft": {{"sites": {known}}}}}\''.replace("\\'", '"'),
                field=f"sites.{name}",
            )


def _unsupported(field: str, what: str) -> UnsupportedFeature:
    return UnsupportedFeature(f"{field}: vLLM does not run {what}; {EMBEDDED}", field=field)


class Catalog:
    """Thread-safe: vLLM checks requests on several threads."""

    def __init__(self, vllm_config: Any) -> None:
        settings = Settings.of(vllm_config)
        self.base = describe_base(vllm_config)
        self._sites = settings.sites
        self._files = AdapterFiles(settings.spool, settings.spool_bytes, settings.adapters)
        self._lock = threading.Lock()
        self._adapters: dict[str, Adapter] = {}
        self._names: dict[str, set[str]] = {}
        self._removed: set[str] = set()
        self._scanned_at = float("-inf")
        self._scan()

    def check(self, adapter: Adapter) -> None:
        """Raise :class:`AdapterMismatch` or :class:`UnsupportedFeature` unless it can be used."""
        check_fits(adapter.spec, self.base)
        check_servable(adapter.spec, self._sites)

    def add(self, data: bytes) -> str:
        """Know an adapter by its file from now on; returns its digest.

        Raises :class:`AdapterError` or :class:`UnsupportedFeature` if it cannot be used here.
        """
        adapter = decode_adapter(data)
        self.check(adapter)
        with self._lock:
            self._removed.discard(adapter.digest)
            self._know(adapter)
        return adapter.digest

    def remove(self, digest: str) -> None:
        """Refuse an adapter to new requests; no-op if it is not known."""
        with self._lock:
            self._removed.add(digest)
            if adapter := self._adapters.pop(digest, None):
                self._names[adapter.spec.name].discard(digest)

    def find(self, digest: str) -> Adapter:
        """An adapter by digest, its edits without tensors.

        Raises :class:`AdapterNotFound`, or what :meth:`check` raises.
        """
        with self._lock:
            if digest in self._removed:
                raise AdapterNotFound(explain("adapter", digest, "an adapter that is loaded"))
            if digest not in self._adapters:
                data = self._files.get(digest)
                if data is None:
                    raise AdapterNotFound(explain("adapter", digest, "a known digest"))
                adapter = decode_adapter(data, digest=digest)
                self.check(adapter)
                self._know(adapter)
            return self._adapters[digest]

    def resolve(self, name: str) -> str:
        """The digest of the adapter of this name.

        Raises :class:`AdapterNotFound` if there is none, or more than one.
        """
        with self._lock:
            if not self._names.get(name):
                self._scan()
            digests = self._names.get(name, set())
            if len(digests) != 1:
                held = f"{len(digests)} adapters of this name" if digests else "none of this name"
                raise AdapterNotFound(
                    explain("adapter", name, f"a name of one adapter, or its digest ({held})"),
                    field="adapter",
                )
            return next(iter(digests))

    def names(self) -> dict[str, str]:
        """The digest of each name that means one adapter, by name."""
        with self._lock:
            self._scan()
            return {
                name: next(iter(digests))
                for name, digests in sorted(self._names.items())
                if len(digests) == 1
            }

    def _scan(self) -> None:
        """Learn of new files in the shared places, unless one has just looked."""
        if time.monotonic() - self._scanned_at < _SCAN_INTERVAL_S:
            return
        for digest, data in self._files.scan():
            try:
                adapter = decode_adapter(data, digest=digest)
                self.check(adapter)
            except (AdapterError, UnsupportedFeature):
                continue  # other models' adapters may lie there too; asked for, it says why
            if digest not in self._removed:
                self._know(adapter)
        self._scanned_at = time.monotonic()

    def _know(self, adapter: Adapter) -> None:
        bare = {key: Edit() for key in adapter.edits}
        self._adapters[adapter.digest] = replace(adapter, edits=bare)
        self._names.setdefault(adapter.spec.name, set()).add(adapter.digest)
