"""The adapters that a front end of vLLM knows: by digest and by name, each checked once.

A front end needs no tensors. It learns of adapters from the places of the settings, from whoever
loads one through it, and, asked for a digest that it does not know, from the machine's spool.
"""

from __future__ import annotations

import json
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
            wanted = json.dumps({"reft": {"sites": [*sites, name]}})
            raise UnsupportedFeature(
                f"sites: {name!r} is not armed; --additional-config '{wanted}' of vLLM arms it",
                field=f"sites.{name}",
            )


def _unsupported(field: str, what: str) -> UnsupportedFeature:
    return UnsupportedFeature(f"{field}: vLLM does not run {what}; {EMBEDDED}", field=field)


class Catalog:
    """Thread-safe: vLLM checks requests on several threads.

    Adapters come from the shared places of the settings, where a name means the one file that now
    lies there under any path, and from :meth:`add`.
    """

    def __init__(self, vllm_config: Any) -> None:
        settings = Settings.of(vllm_config)
        self.base = describe_base(vllm_config)
        self._sites = settings.sites
        self._files = AdapterFiles(settings.spool, settings.spool_bytes, settings.adapters)
        self._has_places = bool(settings.adapters)
        self._look_interval_s = settings.look_interval_s
        self._lock = threading.Lock()
        self._known: dict[str, Adapter] = {}
        """Every adapter that was ever found and can be used, its edits without tensors."""
        self._added: set[str] = set()
        self._removed: set[str] = set()
        self._spooled: set[str] = set()
        self._names: dict[str, set[str]] = {}
        self._looked_at = float("-inf")
        self._look()

    def check(self, adapter: Adapter) -> None:
        """Raise :class:`AdapterMismatch` or :class:`UnsupportedFeature` unless it can be used."""
        check_fits(adapter.spec, self.base)
        check_servable(adapter.spec, self._sites)

    def add(self, data: bytes) -> str:
        """Know an adapter by its file from now on; returns its digest.

        Raises :class:`AdapterError` or :class:`UnsupportedFeature` if it cannot be used here.
        """
        adapter = decode_adapter(data)
        with self._lock:
            self._know(adapter)
            self._added.add(adapter.digest)
            self._files.put(data, held=self._added)
            self._spooled.add(adapter.digest)
            self._removed.discard(adapter.digest)
            self._name_all()
        return adapter.digest

    def remove(self, digest: str) -> None:
        """Refuse an adapter to new requests; no-op if it is not known."""
        with self._lock:
            self._added.discard(digest)
            self._removed.add(digest)
            self._name_all()

    def find(self, digest: str) -> Adapter:
        """An adapter by digest, its edits without tensors.

        Raises :class:`AdapterNotFound`, or what :meth:`check` raises.
        """
        with self._lock:
            self._look()
            is_gone = digest in self._known and digest not in self._served()
            if digest in self._removed or is_gone:
                raise AdapterNotFound(
                    explain("adapter", digest, "an adapter that is loaded"), field="adapter"
                )
            if digest not in self._spooled:
                data = self._files.get(digest)
                if data is None:
                    raise AdapterNotFound(
                        explain("adapter", digest, "a known digest"), field="adapter"
                    )
                self._know(decode_adapter(data, digest=digest))
                self._spooled.add(digest)
                if digest not in self._served():
                    self._added.add(digest)  # through another front end of this machine
            return self._known[digest]

    def resolve(self, name: str) -> str:
        """The digest of the adapter of this name.

        Raises :class:`AdapterNotFound` if there is none, or more than one.
        """
        with self._lock:
            self._look()
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
            self._look()
            return {
                name: next(iter(digests))
                for name, digests in sorted(self._names.items())
                if len(digests) == 1
            }

    def _look(self) -> None:
        """Learn of what has changed in the shared places, unless one has just looked."""
        if not self._has_places or time.monotonic() - self._looked_at < self._look_interval_s:
            return
        for digest, data in self._files.refresh().items():
            try:
                self._know(decode_adapter(data, digest=digest))
            except (AdapterError, UnsupportedFeature):
                continue  # other models' adapters may lie there too; asked for, it says why
        self._name_all()
        self._looked_at = time.monotonic()

    def _served(self) -> set[str]:
        """Digests that requests may name."""
        return (self._files.listed() | self._added) - self._removed

    def _know(self, adapter: Adapter) -> None:
        self.check(adapter)
        bare = {key: Edit() for key in adapter.edits}
        self._known[adapter.digest] = replace(adapter, edits=bare)

    def _name_all(self) -> None:
        self._names = {}
        for digest in self._served() & self._known.keys():
            self._names.setdefault(self._known[digest].spec.name, set()).add(digest)
