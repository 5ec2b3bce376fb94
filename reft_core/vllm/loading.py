"""Adapters that come and go while vLLM runs, for whoever holds its engine.

An adapter is checked here before any worker sees it; then every worker holds it; only then may
requests name it. Each step may be repeated.
"""

from __future__ import annotations

import hashlib
from typing import Any

from reft_core.adapter import decode_adapter
from reft_core.vllm.admission import catalog_of
from reft_core.vllm.catalog import Catalog
from reft_core.vllm.worker import check_loaded


def load_adapter(llm: Any, data: bytes) -> str:
    """Have a ``vllm.LLM`` serve the adapter in a file's bytes; returns its digest.

    Raises :class:`AdapterError` or :class:`UnsupportedFeature` if it cannot.
    """
    catalog = catalog_of(llm.llm_engine)
    digest = _checked(catalog, data)
    check_loaded(llm.collective_rpc("reft_load", args=(data, digest)), digest)
    return catalog.add(data)


def unload_adapter(llm: Any, digest: str) -> None:
    """Have a ``vllm.LLM`` refuse an adapter to new requests; those accepted keep it."""
    catalog_of(llm.llm_engine).remove(digest)
    llm.collective_rpc("reft_unload", args=(digest,))


async def load_adapter_async(engine: Any, data: bytes) -> str:
    """:func:`load_adapter` for an ``AsyncLLM``: on every worker of every data-parallel rank."""
    catalog = catalog_of(engine)
    digest = _checked(catalog, data)
    check_loaded(await ask_workers(engine, "reft_load", data, digest), digest)
    return catalog.add(data)


async def unload_adapter_async(engine: Any, digest: str) -> None:
    """:func:`unload_adapter` for an ``AsyncLLM``."""
    catalog_of(engine).remove(digest)
    await ask_workers(engine, "reft_unload", digest)


async def ask_workers(engine: Any, method: str, *args: Any) -> list[Any]:
    """What all workers of an ``AsyncLLM`` answer, those of the first data-parallel rank first.

    ``AsyncLLM.collective_rpc`` asks all, and returns what those of the first rank say.
    """
    answers = await engine.engine_core.call_utility_all_async(
        "collective_rpc", method, None, args, None
    )
    return [answer for of_rank in answers for answer in of_rank]


def _checked(catalog: Catalog, data: bytes) -> str:
    """The digest of a file, once it is known to be an adapter that can be used."""
    digest = hashlib.sha256(data).hexdigest()
    catalog.check(decode_adapter(data, digest=digest))
    return digest
