"""An engine of either kind over one tiny model, and what its requests should get."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from reft_core.adapter import Adapter
from reft_core.engine.config import EngineConfig
from reft_core.engine.interface import (
    AdapterChoice,
    Engine,
    Output,
    Request,
    SamplingParams,
    Ticket,
)
from reft_core.loading import LoadedModel
from tests.factories import NoTokenizer, Recorder, random_adapter
from tests.reference.slow import reference_generate, reference_logits
from tests.vllm.tiny import TinyWorld

KINDS = ("embedded", "vllm")
MAX_MODEL_LEN, MAX_NUM_SEQS, MAX_WAITING = 512, 4, 12
CONFIG = EngineConfig(
    max_model_len=MAX_MODEL_LEN,
    max_num_seqs=MAX_NUM_SEQS,
    max_waiting=MAX_WAITING,
    max_prefill_tokens=17,
    cuda_graphs=False,
)
WAIT_S = 120.0
"""Longest a test waits for an engine; vLLM's first steps may take half a minute."""
_ids = itertools.count()


class Sink(Recorder):
    """Keeps what it is given, and lets a test wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()

    def __call__(self, output: Output) -> None:
        with self._changed:
            super().__call__(output)
            self._changed.notify_all()

    def wait(self, num_outputs: int = 1_000_000) -> Sink:
        """Return once it has so many outputs, or its last one."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: self.finish_reason is not None or len(self.outputs) >= num_outputs, WAIT_S
            ), f"still waiting after {len(self.outputs)} outputs"
        return self


@dataclass
class Lab:
    """One engine, started unless a test is about its start."""

    kind: str
    engine: Engine
    loaded: LoadedModel
    """As the engine has it."""
    world: TinyWorld

    @cached_property
    def adapters(self) -> dict[str, Adapter]:
        """Adapters of different methods and position rules, by name; none of them loaded."""
        found = {name: self.world.adapter(name) for name in self.world.files}
        found["voiced"] = random_adapter(
            self.world.description,
            name="voiced",
            seed=11,
            rank=4,
            size=2.0,
            positions="prompt",
            subspaces={"tone": (0, 2), "topic": (1, 3)},
        )
        return found

    def load(self, *names: str) -> None:
        """Have the engine hold these adapters."""
        for name in names:
            self.engine.load_adapter(self.adapters[name])

    def choice(self, name: str, strength: float | None = None, **rest: Any) -> AdapterChoice:
        """A loaded adapter as a request names it."""
        return AdapterChoice(self.adapters[name].digest, strength, **rest)

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *choices: AdapterChoice,
        **rest: Any,
    ) -> tuple[Ticket, Sink]:
        """Submit a request under a new id, unless ``rest`` has one."""
        sink = Sink()
        request_id = rest.pop("request_id", f"r{next(_ids)}")
        request = Request(request_id, tuple(prompt), params, choices, **rest)
        return self.engine.submit(request, sink), sink

    def run(
        self, prompt: Sequence[int], params: SamplingParams, *choices: AdapterChoice, **rest: Any
    ) -> Sink:
        """What a request gets, to its end."""
        return self.submit(prompt, params, *choices, **rest)[1].wait()

    def expected(
        self, prompt: Sequence[int], max_tokens: int, *stack: tuple[str, float]
    ) -> list[int]:
        """The slow reference's greedy answer, with adapters by name and strength."""
        used = [(self.adapters[name], strength) for name, strength in stack]
        return reference_generate(self.world.model, tuple(prompt), max_tokens, stack=used)

    def logprobs(self, tokens: Sequence[int], prompt_len: int, *names: str) -> Tensor:
        """The slow reference's log-probabilities (T, V) after each of ``tokens``."""
        stack = [(self.adapters[name], 1.0) for name in names]
        logits = reference_logits(self.world.model, list(tokens), prompt_len, stack=stack)
        return torch.log_softmax(logits, dim=-1)


def greedy(max_tokens: int, **rest: Any) -> SamplingParams:
    """Greedy, and no token ends the answer."""
    return SamplingParams(
        **({"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True} | rest)
    )


def make_lab(kind: str, world: TinyWorld, **options: Any) -> Lab:
    """An engine of this kind, not started; vLLM's takes ``options``, and half a minute."""
    # Of its own, as the reference's attention is not the embedded engine's.
    model = deepcopy(world.model)
    loaded = LoadedModel(model, NoTokenizer(), world.description)  # type: ignore[arg-type]
    return Lab(kind, _engine(kind, loaded, world, options), loaded, world)


def _engine(kind: str, loaded: LoadedModel, world: TinyWorld, options: dict[str, Any]) -> Engine:
    if kind == "embedded":
        from reft_core.engine.engine import EmbeddedEngine

        return EmbeddedEngine(loaded, CONFIG)
    from reft_core.vllm.arguments import VllmOptions
    from reft_core.vllm.engine import VllmEngine

    extra = {"block_size": 32, "additional_config": {"reft": {"spool": world.spool}}}
    spread = VllmOptions(extra=extra, **options)
    return VllmEngine(loaded, world.model_path, "float32", CONFIG, spread)
