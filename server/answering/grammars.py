"""Compiled grammars by what requests say: compiled in threads, kept while there is room.

Runs on the event loop and has no locks: between two awaits nothing else changes.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from reft_core.errors import EngineOverloaded, InvalidRequest, UnsupportedFeature, explain
from reft_core.grammar import Grammar, GrammarCompiler, GrammarSpec

_NUM_THREADS = 2
_MOST_COMPILING = 32


class Grammars:
    """The least recently used grammar goes first.

    A compilation cannot be interrupted, but its size is bounded by the compiler's limits. One
    that takes longer than ``timeout_s`` goes on for whoever asks next, and its request is told.
    """

    def __init__(self, compiler: GrammarCompiler, *, most: int, timeout_s: float) -> None:
        self._compiler = compiler
        self._most = most
        self._timeout_s = timeout_s
        self._known: OrderedDict[GrammarSpec, Grammar] = OrderedDict()
        self._compiling: dict[GrammarSpec, asyncio.Future[Grammar]] = {}
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="reft-grammar")
        self._prepared = False

    def __len__(self) -> int:
        """Grammars kept."""
        return len(self._known)

    async def get(self, spec: GrammarSpec) -> Grammar:
        """The grammar of a spec.

        Raises :class:`InvalidRequest` naming the spec's field if it is invalid, too large or
        takes too long, :class:`UnsupportedFeature` if this server cannot constrain answers, and
        :class:`EngineOverloaded` while too many grammars are being compiled.
        """
        known = self._known.get(spec)
        if known is not None and not known.is_worn:
            self._known.move_to_end(spec)
            return known
        self._compiler.check_size(spec)
        await self._prepare(spec)
        if spec not in self._compiling:
            self._begin(spec)
        try:
            # The others who wait for it are not to notice that this one gives up.
            shared = asyncio.shield(self._compiling[spec])
            return await asyncio.wait_for(shared, self._timeout_s)
        except TimeoutError:
            allowed = f"one that compiles within {self._timeout_s:g} s"
            raise InvalidRequest(
                explain(spec.field, spec.text, allowed), field=spec.field
            ) from None

    def close(self) -> None:
        """Take no more work; does not wait for what is being compiled."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _prepare(self, spec: GrammarSpec) -> None:
        """Have the compiler prepared; its reasons why not name the field that asked for it."""
        if self._prepared:
            return
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._threads, self._compiler.prepare)
        except UnsupportedFeature as error:
            raise UnsupportedFeature(f"{spec.field}: {error}", field=spec.field) from error
        self._prepared = True

    def _begin(self, spec: GrammarSpec) -> None:
        """Start to compile a spec."""
        if len(self._compiling) >= _MOST_COMPILING:
            raise EngineOverloaded(
                f"{spec.field}: {_MOST_COMPILING} grammars are being compiled; try again later"
            )
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._threads, self._compiler.compile, spec)
        self._compiling[spec] = future
        future.add_done_callback(lambda done: self._end(spec, done))

    def _end(self, spec: GrammarSpec, done: asyncio.Future[Grammar]) -> None:
        """Keep what was compiled, the most recent ones only."""
        del self._compiling[spec]
        if done.cancelled() or done.exception() is not None:
            return
        self._known[spec] = done.result()
        self._known.move_to_end(spec)
        while len(self._known) > self._most:
            self._known.popitem(last=False)
