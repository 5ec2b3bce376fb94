"""llama.cpp as a worker, through the C interface that llama-cpp-python exposes.

Its Python class decodes one sequence at a time; here a batch holds many, as llama.cpp's own
batched benchmark does. All prompts of a wave are prefilled, then every step decodes one token
of each. Answers are equally long, so no slot ever waits for a late one.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import numpy as np

from benchmarks.peers.loop import serve

_BATCH_TOKENS = 2048
_SEQUENCE_TOKENS = 512


class LlamaCpp:
    """One model, and one context for the settings of the last run."""

    def __init__(self) -> None:
        self._api: Any = None
        self._model: Any = None
        self._context: Any = None
        self._batch: Any = None
        self._settings: dict[str, Any] | None = None
        self._kv_type = 0
        self._vocab_size = 0
        self._threads = 1

    def load(
        self, model: str, dtype: str, threads: int, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """``model`` is a GGUF file; keys and values are float32 when the dtype is."""
        import llama_cpp

        self._api = llama_cpp
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        is_float32 = dtype == "float32"
        self._kv_type = llama_cpp.GGML_TYPE_F32 if is_float32 else llama_cpp.GGML_TYPE_F16
        self._threads = threads
        info = llama_cpp.llama_print_system_info().decode()
        return {
            "versions": {"llama-cpp-python": version("llama-cpp-python")},
            "features": info.strip(),
        }

    def run(
        self, prompts: list[list[int]], output_tokens: int, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """``settings``: wave (sequences that run at once), flash (bool)."""
        settings = {"wave": len(prompts), "flash": True, **settings}
        if settings != self._settings:
            self._open(settings)
            self._settings = settings
        wave = settings["wave"]
        tokens: list[list[int]] = []
        started = time.perf_counter()
        for at in range(0, len(prompts), wave):
            tokens += self._run_wave(prompts[at : at + wave], output_tokens)
        return {"seconds": time.perf_counter() - started, "tokens": tokens}

    def _open(self, settings: dict[str, Any]) -> None:
        """Make a context; the one before is freed."""
        api, wave = self._api, settings["wave"]
        if self._context is not None:
            api.llama_batch_free(self._batch)
            api.llama_free(self._context)
        params = api.llama_context_default_params()
        params.n_ctx = wave * _SEQUENCE_TOKENS
        params.n_batch = _BATCH_TOKENS
        params.n_seq_max = wave
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = self._kv_type
        params.flash_attn_type = int(settings["flash"])
        params.kv_unified = False
        params.no_perf = True
        self._context = api.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context with {settings}")
        self._batch = api.llama_batch_init(_BATCH_TOKENS, 0, 1)

    def _run_wave(self, prompts: list[list[int]], output_tokens: int) -> list[list[int]]:
        """Greedy answers to prompts that run at once."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)
        answers: list[list[int]] = [[] for _ in prompts]
        at = 0
        while at < len(prompts):
            end, count = at, 0
            while end < len(prompts) and count + len(prompts[end]) <= _BATCH_TOKENS:
                count += len(prompts[end])
                end += 1
            rows = [
                (token, position, sequence, position == len(prompts[sequence]) - 1)
                for sequence in range(at, end)
                for position, token in enumerate(prompts[sequence])
            ]
            for sequence, token in zip(range(at, end), self._decode(rows), strict=True):
                answers[sequence].append(token)
            at = end
        for step in range(output_tokens - 1):
            rows = [
                (answer[-1], len(prompt) + step, sequence, True)
                for sequence, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
            ]
            for answer, token in zip(answers, self._decode(rows), strict=True):
                answer.append(token)
        return answers

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """The likeliest token after each row that asks for one.

        A row is a token, its position, its sequence, and whether its logits are wanted.
        """
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        status = self._api.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        pointer = self._api.llama_get_logits(self._context)
        shape = sum(row[3] for row in rows), self._vocab_size
        chosen: list[int] = np.ctypeslib.as_array(pointer, shape=shape).argmax(axis=1).tolist()
        return chosen


if __name__ == "__main__":
    worker = LlamaCpp()
    serve({"load": worker.load, "run": worker.run})
