"""This project's engine as a worker."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
import transformers

from benchmarks.peers.loop import serve
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.generate import generate
from reft_core.engine.interface import Request, SamplingParams
from reft_core.loading import Dtype, LoadedModel, load_model


class Reft:
    """One loaded model and one engine over it."""

    def __init__(self) -> None:
        self._loaded: LoadedModel | None = None
        self._engine: EmbeddedEngine | None = None
        self._slots = 0
        self._threads = 1
        self._ids = itertools.count()

    def load(self, model: str, dtype: Dtype, threads: int, settings: Any) -> dict[str, Any]:
        """Load the weights; the engine is built by the first run."""
        self._loaded = load_model(model, dtype=dtype)
        self._threads = threads
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"versions": versions}

    def run(
        self, prompts: list[list[int]], output_tokens: int, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """Seconds and tokens of all prompts, submitted at once."""
        engine = self._with_slots(settings.get("slots", EngineConfig().max_num_seqs))
        params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
        requests = [Request(str(next(self._ids)), tuple(p), params) for p in prompts]
        started = time.perf_counter()
        completions = generate(engine, requests)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": [c.token_ids for c in completions]}

    def _with_slots(self, slots: int) -> EmbeddedEngine:
        """The engine, built again when it is to have another number of slots."""
        if self._engine is None or slots != self._slots:
            if self._engine is not None:
                self._engine.stop()
            assert self._loaded is not None, "load comes first"
            config = EngineConfig(
                max_model_len=512,
                max_num_seqs=slots,
                prefix_cache_bytes=0,  # every repeat sends the same prompts
                num_threads=self._threads,
            )
            self._engine, self._slots = EmbeddedEngine(self._loaded, config), slots
            self._engine.start()
        return self._engine


if __name__ == "__main__":
    worker = Reft()
    serve({"load": worker.load, "run": worker.run})
