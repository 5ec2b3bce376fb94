"""vLLM on a CPU with this project's plugin and adapters, as a worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typing_extensions import override

from benchmarks.peers.loop import serve
from benchmarks.peers.vllm_worker import Vllm
from reft_core.vllm.loading import load_adapter

_HITS, _QUERIES = "vllm:prefix_cache_hits", "vllm:prefix_cache_queries"


class VllmReft(Vllm):
    """One ``LLM`` that holds adapters by their digests."""

    @override
    def load(
        self, model: str, dtype: str, threads: int, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """``settings`` as of :class:`Vllm`; folder (str) has the adapters, by number."""
        folder = Path(settings["folder"])
        engine = dict(settings.get("engine", {}))
        plugin: dict[str, Any] = {"spool": str(folder / "spool")}
        if "kv_transfer_config" in engine:
            plugin["allow_unproved"] = ["kv_connector"]
        engine["additional_config"] = {"reft": plugin}
        loaded = super().load(model, dtype, threads, {**settings, "engine": engine})
        for file in sorted(folder.glob("*.safetensors"), key=lambda path: int(path.stem)):
            self._adapters.append(load_adapter(self._llm, file.read_bytes()))
        return loaded

    def share(self, prompt: list[int], output_tokens: int, adapters: int) -> dict[str, Any]:
        """One prompt under each of so many adapters, in turn and with a common prefix cache.

        Tokens of each (``shared``); the prompt tokens that the cache was asked for and had
        (``queries``, ``hits``); then tokens with the cache emptied before each (``apart``), and
        of the base model (``base``).
        """
        self._llm.reset_prefix_cache()
        before = self._counters()
        shared = [self._answer(prompt, output_tokens, number) for number in range(adapters)]
        after = self._counters()
        apart = []
        for number in range(adapters):
            self._llm.reset_prefix_cache()
            apart.append(self._answer(prompt, output_tokens, number))
        self._llm.reset_prefix_cache()
        return {
            "shared": shared,
            "apart": apart,
            "base": self._answer(prompt, output_tokens, None),
            "hits": after[_HITS] - before[_HITS],
            "queries": after[_QUERIES] - before[_QUERIES],
        }

    def answer(self, requests: list[dict[str, Any]], output_tokens: int) -> dict[str, Any]:
        """Tokens of requests, submitted at once: prompt, and maybe adapter (its number) and kv
        (what a KV connector is told).
        """
        inputs = [{"prompt_token_ids": request["prompt"]} for request in requests]
        params = [
            self._under(request.get("adapter"), output_tokens, request.get("kv"))
            for request in requests
        ]
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        return {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}

    @override
    def _asked(self, count: int, output_tokens: int, adapters: int) -> dict[str, Any]:
        numbers = [i % adapters if adapters else None for i in range(count)]
        return {"sampling_params": [self._under(number, output_tokens) for number in numbers]}

    def _under(self, number: int | None, output_tokens: int, kv: Any = None) -> Any:
        """Sampling parameters that name an adapter, or the base model."""
        more = {} if number is None else {"reft": self._adapters[number]}
        more |= {} if kv is None else {"kv_transfer_params": kv}
        return self._params(output_tokens, extra_args=more or None)

    def _answer(self, prompt: list[int], output_tokens: int, number: int | None) -> list[int]:
        [tokens] = self.answer([{"prompt": prompt, "adapter": number}], output_tokens)["tokens"]
        return list(tokens)

    def _counters(self) -> dict[str, int]:
        """Totals of the prefix cache since the start."""
        found = {metric.name: metric for metric in self._llm.get_metrics()}
        return {name: found[name].value for name in (_HITS, _QUERIES)}


if __name__ == "__main__":
    worker = VllmReft()
    serve(
        {
            "load": worker.load,
            "run": worker.run,
            "share": worker.share,
            "answer": worker.answer,
        }
    )
