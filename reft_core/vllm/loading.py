"""Adapters that come and go while vLLM runs, for whoever holds its engine.

An adapter is checked here before any worker sees it; then every worker holds it; only then may
requests name it. Each step may be repeated.
"""

from __future__ import annotations

from typing import Any

from reft_core.adapter import decode_adapter
from reft_core.vllm.admission import catalog_of
from reft_core.vllm.worker import digest_of


def load_adapter(llm: Any, data: bytes) -> str:
    """Have a ``vllm.LLM`` serve the adapter in a file's bytes; returns its digest.

    Raises :class:`AdapterError` or :class:`UnsupportedFeature` if it cannot.
    """
    catalog = catalog_of(llm.llm_engine)
    catalog.check(decode_adapter(data))
    digest_of(llm.collective_rpc("reft_load", args=(data,)))
    return catalog.add(data)


def unload_adapter(llm: Any, digest: str) -> None:
    """Have a ``vllm.LLM`` refuse an adapter to new requests; those accepted keep it."""
    catalog_of(llm.llm_engine).remove(digest)
    llm.collective_rpc("reft_unload", args=(digest,))


async def load_adapter_async(engine: Any, data: bytes) -> str:
    """:func:`load_adapter` for an ``AsyncLLM``: on every worker of every data-parallel rank."""
    catalog = catalog_of(engine)
    catalog.check(decode_adapter(data))
    digest_of(await engine.collective_rpc("reft_load", args=(data,)))
    return catalog.add(data)


async def unload_adapter_async(engine: Any, digest: str) -> None:
    """:func:`unload_adapter` for an ``AsyncLLM``."""
    catalog_of(engine).remove(digest)
    await engine.collective_rpc("reft_unload", args=(digest,))
