"""vLLM on a CPU with this project's plugin and adapters, as a worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typing_extensions import override

from benchmarks.peers.loop import serve
from benchmarks.peers.vllm_worker import Vllm

_HITS, _QUERIES = "vllm:prefix_cache_hits", "vllm:prefix_cache_queries"


class VllmReft(Vllm):
    """One ``LLM`` that holds adapters by their digests."""

    @override
    def load(
        self, model: str, dtype: str, threads: int, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """``settings`` as of :class:`Vllm`; folder (str) has the adapters, by number."""
        folder = Path(settings["folder"])
        plugin = {"additional_config": {"reft": {"spool": str(folder / "spool")}}}
        engine = {**plugin, **settings.get("engine", {})}
        loaded = super().load(model, dtype, threads, {**settings, "engine": engine})
        for file in sorted(folder.glob("*.safetensors"), key=lambda path: int(path.stem)):
            self._adapters.append(
                self._llm.collective_rpc("reft_load", args=(file.read_bytes(),))[0]
            )
        return loaded

    def share(self, prompt: list[int], output_tokens: int, adapters: int) -> dict[str, Any]:
        """One prompt under each of so many adapters, in turn and with a common prefix cache.

        Tokens of each (``shared``); the prompt tokens that the cache was asked for and had
        (``queries``, ``hits``); then tokens with the cache emptied before each (``apart``), and
        of the base model (``base``).
        """
        self._llm.reset_prefix_cache()
        before = self._counters()
        shared = [
            self._answer(prompt, output_tokens, digest) for digest in self._adapters[:adapters]
        ]
        after = self._counters()
        apart = []
        for digest in self._adapters[:adapters]:
            self._llm.reset_prefix_cache()
            apart.append(self._answer(prompt, output_tokens, digest))
        self._llm.reset_prefix_cache()
        return {
            "shared": shared,
            "apart": apart,
            "base": self._answer(prompt, output_tokens, None),
            "hits": after[_HITS] - before[_HITS],
            "queries": after[_QUERIES] - before[_QUERIES],
        }

    @override
    def _asked(self, count: int, output_tokens: int, adapters: int) -> dict[str, Any]:
        if not adapters:
            return {"sampling_params": self._params(output_tokens)}
        chosen = [self._adapters[i % adapters] for i in range(count)]
        return {"sampling_params": [self._under(digest, output_tokens) for digest in chosen]}

    def _under(self, digest: str | None, output_tokens: int) -> Any:
        """Sampling parameters that name an adapter, or the base model."""
        return self._params(output_tokens, extra_args={"reft": digest} if digest else None)

    def _answer(self, prompt: list[int], output_tokens: int, digest: str | None) -> list[int]:
        inputs = [{"prompt_token_ids": prompt}]
        [output] = self._llm.generate(inputs, self._under(digest, output_tokens), use_tqdm=False)
        return list(output.outputs[0].token_ids)

    def _counters(self) -> dict[str, int]:
        """Totals of the prefix cache since the start."""
        found = {metric.name: metric for metric in self._llm.get_metrics()}
        return {name: found[name].value for name in (_HITS, _QUERIES)}


if __name__ == "__main__":
    worker = VllmReft()
    serve({"load": worker.load, "run": worker.run, "share": worker.share})
