"""PEFT's mixed batches of LoRA adapters as a worker."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.peers.loop import serve
from benchmarks.peers.random_lora import RANK, TARGETS
from benchmarks.peers.transformers_worker import generate_padded


class Peft:
    """The base model, and the same weights wrapped with adapters."""

    def __init__(self) -> None:
        self._base: Any = None
        self._wrapped: Any = None

    def load(
        self, model: str, dtype: str, threads: int, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """``settings``: num_adapters (int)."""
        from peft import LoraConfig, get_peft_model

        torch.set_num_threads(threads)
        self._base, wrapped = (
            AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
            for _ in range(2)
        )
        config = LoraConfig(
            r=RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM", init_lora_weights=False
        )
        as_base = {"autocast_adapter_dtype": False}  # adapters in the model's dtype are faster
        self._wrapped = get_peft_model(wrapped, config, adapter_name="0", **as_base)
        for index in range(1, settings["num_adapters"]):
            self._wrapped.add_adapter(str(index), config, **as_base)
        self._wrapped.eval()
        packages = ("peft", "torch", "transformers")
        return {"versions": {name: version(name) for name in packages}}

    @torch.inference_mode()
    def run(
        self,
        prompts: list[list[int]],
        output_tokens: int,
        settings: dict[str, Any],
        adapters: int = 0,
    ) -> dict[str, Any]:
        """Seconds and tokens of all prompts; prompt i uses adapter i modulo ``adapters``."""
        batch = settings["batch"]
        tokens: list[list[int]] = []
        started = time.perf_counter()
        for at in range(0, len(prompts), batch):
            part = prompts[at : at + batch]
            if adapters:
                names = [str((at + i) % adapters) for i in range(len(part))]
                tokens += generate_padded(self._wrapped, part, output_tokens, adapter_names=names)
            else:
                tokens += generate_padded(self._base, part, output_tokens)
        return {"seconds": time.perf_counter() - started, "tokens": tokens}


if __name__ == "__main__":
    worker = Peft()
    serve({"load": worker.load, "run": worker.run})
