"""Mutants of adapter files through the reader and a tiny engine, by many processes at once."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType

import torch

from benchmarks.fuzz.base import tiny_loaded
from benchmarks.fuzz.mutants import Mutant, mutant
from benchmarks.fuzz.oracle import Bad, judge
from reft_core.adapter import Adapter, check_fits, decode_adapter
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.generate import generate
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.errors import ReftError

_TIME_CAP_S = 10.0
_MAX_BYTES = 4 * 1024 * 1024
_RSS_CAP_BYTES = 256 * 1024 * 1024
_TRACED_CAP_BYTES = 64 * 1024 * 1024
_TRACE_EVERY = 97
_SERVE_EVERY = 4
_BATCH = 250
_MOST_KEPT = 50


class Hang(BaseException):
    """A file took longer than it may; no handler of errors holds it up."""


@dataclass
class Tally:
    """What became of some files."""

    files: int = 0
    accepted: int = 0
    served: int = 0
    accepted_bad: int = 0
    by_damage: Counter[str] = field(default_factory=Counter)
    """Accepted files, by what was done to them first."""
    problems: list[tuple[int, str]] = field(default_factory=list)
    """Index and what was wrong."""

    def add(self, other: Tally) -> None:
        """Count another's files too."""
        self.files += other.files
        self.accepted += other.accepted
        self.served += other.served
        self.accepted_bad += other.accepted_bad
        self.by_damage += other.by_damage
        self.problems += other.problems


class Target:
    """The reader, and an engine for what it accepts."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        loaded = tiny_loaded()
        self.engine = EmbeddedEngine(
            loaded, EngineConfig(max_model_len=64, max_num_seqs=2, num_threads=1)
        )
        self.engine.start()
        self._prompt = tuple(range(3, 12))
        self._baseline = 0

    def close(self) -> None:
        """Stop the engine."""
        self.engine.stop()

    def attack(self, index: int, made: Mutant, tally: Tally) -> None:
        """One file: refused as it should be, or accepted and good; else a problem of the tally."""
        tally.files += 1
        trace = index % _TRACE_EVERY == 0
        if trace:
            tracemalloc.start()
        try:
            with _within(_TIME_CAP_S):
                self._read(index, made, tally)
        except Bad as bad:
            tally.accepted_bad += 1
            tally.problems.append((index, f"{made.origin}, {made.damage}: accepted, but {bad}"))
        except Hang:
            tally.problems.append((index, f"{made.origin}, {made.damage}: over {_TIME_CAP_S} s"))
        except Exception as error:
            what = f"{type(error).__name__}: {error!s:.300}"
            tally.problems.append((index, f"{made.origin}, {made.damage}: {what}"))
        finally:
            if trace:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                if peak > _TRACED_CAP_BYTES:
                    tally.problems.append((index, f"{made.damage}: {peak} bytes of objects"))
        self._check_memory(index, made, tally)

    def _read(self, index: int, made: Mutant, tally: Tally) -> None:
        try:
            adapter = decode_adapter(made.data, max_bytes=_MAX_BYTES)
        except ReftError as refusal:
            _check_refusal(refusal)
            return
        tally.accepted += 1
        tally.by_damage[made.damage.split("+")[0]] += 1
        try:
            judge(made.data, adapter)
        except Bad:
            raise
        except Exception as error:  # the judge is written for good files alone
            raise Bad(f"the judge stumbled: {type(error).__name__}: {error}") from error
        try:
            check_fits(adapter.spec, self.engine.model)
            self.engine.load_adapter(adapter)
        except ReftError as refusal:
            _check_refusal(refusal)
            return
        try:
            if index % _SERVE_EVERY == 0:
                self._serve(adapter, index)
            tally.served += 1
        finally:
            self.engine.unload_adapter(adapter.digest)

    def _serve(self, adapter: Adapter, index: int) -> None:
        """Two tokens of an answer, or an error of the request's own."""
        chosen = (
            AdapterChoice(adapter.digest, source=self._prompt[:3] if _swaps(adapter) else ()),
        )
        params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
        try:
            (completion,) = generate(
                self.engine, [Request(f"fuzz-{index}", self._prompt, params, chosen)]
            )
        except ReftError:
            return
        vocab_size = self.engine.model.vocab_size
        if not all(0 <= token < vocab_size for token in completion.token_ids):
            raise Bad(f"tokens {completion.token_ids}")

    def _check_memory(self, index: int, made: Mutant, tally: Tally) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if not self._baseline:
            self._baseline = peak
        if peak > self._baseline + _RSS_CAP_BYTES:
            tally.problems.append((index, f"{made.damage}: the process grew to {peak} bytes"))
            self._baseline = peak


def _swaps(adapter: Adapter) -> bool:
    return any(site.interchange for site in adapter.spec.sites.values())


def _check_refusal(refusal: ReftError) -> None:
    """A refusal says what was wrong, in words that can be logged and answered."""
    for text in (refusal.message, refusal.field or ""):
        if len(text) > 2000:
            raise AssertionError(f"a refusal of {len(text)} characters: {text[:200]}")
    if not refusal.message:
        raise AssertionError("a refusal without a word")


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raise :class:`Hang` in the body once it has taken this long; main thread only."""

    def on_alarm(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attack_range(seed: int, indices: range) -> Tally:
    """These mutants of a seed, in this process."""
    target, tally = Target(), Tally()
    try:
        for index in indices:
            target.attack(index, mutant(seed, index), tally)
    finally:
        target.close()
    return tally


def attack_all(seed: int, count: int, num_workers: int, progress: bool = False) -> Tally:
    """``count`` mutants of a seed, over processes that are replaced should one crash."""
    pending = [range(i, min(i + _BATCH, count)) for i in range(0, count, _BATCH)][::-1]
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, _Worker] = {}
    total, began_at = Tally(), time.monotonic()
    try:
        while pending or workers:
            while pending and len(workers) < num_workers:
                worker = _Worker(context, seed)
                worker.give(pending.pop())
                workers[worker.pipe] = worker
            for ready in wait(list(workers)):
                assert isinstance(ready, Connection)
                worker = workers[ready]
                try:
                    total.add(ready.recv())
                except EOFError:
                    total.add(worker.post_mortem())
                    del workers[ready]
                    continue
                if pending:
                    worker.give(pending.pop())
                else:
                    worker.end()
                    del workers[ready]
                if progress and total.files % (40 * _BATCH) == 0:
                    rate = total.files / (time.monotonic() - began_at)
                    print(f"{total.files} of {count} files, {rate:.0f} a second", flush=True)
    finally:
        for worker in workers.values():
            worker.kill()
    return total


class _Worker:
    """A process that attacks ranges of mutants, and where it is."""

    def __init__(self, context: multiprocessing.context.SpawnContext, seed: int) -> None:
        self.pipe, theirs = context.Pipe()
        self._place = context.Value("q", 0)
        self._process = context.Process(target=_work, args=(theirs, self._place, seed), daemon=True)
        self._process.start()
        theirs.close()
        self._range = range(0)

    def give(self, indices: range) -> None:
        """Have it attack these."""
        self._range = indices
        self.pipe.send(indices)

    def end(self) -> None:
        """Have it end."""
        self.pipe.send(None)
        self._process.join()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.join()

    def post_mortem(self) -> Tally:
        """The process is gone: which file it had, and those it will not come to."""
        self._process.join()
        place = self._place.value
        what = f"the process ended with {self._process.exitcode}"
        return Tally(files=len(self._range), problems=[(place, what)])


def _work(pipe: Connection, place: object, seed: int) -> None:
    """The worker's own side."""
    target = Target()
    while (indices := pipe.recv()) is not None:
        tally = Tally()
        for index in indices:
            place.value = index  # type: ignore[attr-defined]  # a shared number
            target.attack(index, mutant(seed, index), tally)
        pipe.send(tally)
    target.close()


def keep(folder: Path, seed: int, problems: list[tuple[int, str]]) -> None:
    """Write the files behind the first problems, named by what brings them back."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, what in problems[:_MOST_KEPT]:
        (folder / f"{seed}-{index}.safetensors").write_bytes(mutant(seed, index).data)
        (folder / f"{seed}-{index}.txt").write_text(what + "\n")
