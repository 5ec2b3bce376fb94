"""transformers as a worker: ``generate`` over padded batches, or its continuous batching.

Also the judge of tokens: how far each is from the likeliest in plain transformers.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.peers.loop import serve


class Transformers:
    """One model, in one of two modes."""

    def __init__(self) -> None:
        self._model: Any = None
        self._continuous = False
        self._limits: tuple[int, int] | None = None

    def load(
        self, model: str, dtype: str, threads: int, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """``settings``: continuous (bool)."""
        torch.set_num_threads(threads)
        self._continuous = settings.get("continuous", False)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self._model = loaded.eval()
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"versions": versions}

    @torch.inference_mode()
    def run(
        self, prompts: list[list[int]], output_tokens: int, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """Seconds and tokens of all prompts; static batches hold ``settings["batch"]``."""
        if self._continuous:
            return self._run_continuous(prompts, output_tokens)
        batch = settings.get("batch", len(prompts))
        tokens: list[list[int]] = []
        started = time.perf_counter()
        for at in range(0, len(prompts), batch):
            tokens += generate_padded(self._model, prompts[at : at + batch], output_tokens)
        return {"seconds": time.perf_counter() - started, "tokens": tokens}

    @torch.inference_mode()
    def score(self, prompts: list[list[int]], tokens: list[list[int]]) -> dict[str, Any]:
        """For each sequence the largest of its tokens' distances, in logits, from the best."""
        gaps = []
        for prompt, answer in zip(prompts, tokens, strict=True):
            ids = torch.tensor([prompt + answer])
            logits = self._model(ids, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
            chosen = logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
            gaps.append((logits.amax(dim=1) - chosen).max().item())
        return {"gaps": gaps}

    def _run_continuous(self, prompts: list[list[int]], output_tokens: int) -> dict[str, Any]:
        """The manager is kept between runs that need no larger one."""
        limits = len(prompts), max(map(len, prompts)) + output_tokens
        if limits != self._limits:
            self._model.destroy_cached_continuous_batching_manager()
            self._limits = limits
        pages = limits[0] * -(-limits[1] // _PAGE_TOKENS)
        config = ContinuousBatchingConfig(
            page_size=_PAGE_TOKENS,
            num_blocks=pages + 2,
            max_batch_tokens=512,
            max_requests_per_batch=64,
            allow_block_sharing=False,  # every repeat sends the same prompts
        )
        started = time.perf_counter()
        outputs = self._model.generate_batch(
            prompts,
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=output_tokens, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=config,
            persistent_manager=True,
        )
        seconds = time.perf_counter() - started
        if len(outputs) != len(prompts):
            raise RuntimeError(f"{len(outputs)} of {len(prompts)} requests were answered")
        return {
            "seconds": seconds,
            "tokens": [list(output.generated_tokens) for output in outputs.values()],
        }


_PAGE_TOKENS = 64


def generate_padded(
    model: Any, prompts: list[list[int]], output_tokens: int, **arguments: Any
) -> list[list[int]]:
    """Answers of ``model.generate`` over one batch of prompts, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=output_tokens,
        min_new_tokens=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    output = model.generate(
        input_ids=ids, attention_mask=mask, generation_config=config, **arguments
    )
    tokens: list[list[int]] = output[:, width:].tolist()
    return tokens


if __name__ == "__main__":
    worker = Transformers()
    serve({"load": worker.load, "run": worker.run, "score": worker.score})
