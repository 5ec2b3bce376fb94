"""What a scrape reads: our metrics with the model's name, and on request vLLM's names too.

With the same meaning under the names that dashboards and the Kubernetes gateway know, those read
this server without being told about it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

_PREFIX = "reft_"
_VLLM_PREFIX = "vllm:"
VLLM_NAMES = frozenset(
    {
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "num_preemptions",
        "prompt_tokens",
        "prompt_tokens_by_source",
        "generation_tokens",
        "request_success",
        "request_prompt_tokens",
        "request_generation_tokens",
        "request_params_max_tokens",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_inference_time_seconds",
        "cache_config_info",
        "lora_requests_info",
    }
)
"""Metrics that vLLM has too, with the same type, labels and meaning."""
_WITHOUT_MODEL = frozenset({"lora_requests_info", "cache_config_info"})
"""Those that vLLM gives no ``model_name``."""
_COMPAT_ONLY = frozenset({"lora_requests_info"})
"""Those whose form is only good for who expects it: every value is a series of its own."""


class Exposition(Collector):
    """Some metrics as others are to see them."""

    def __init__(self, own: Collector | CollectorRegistry, as_vllm: bool) -> None:
        self._own = own
        self._as_vllm = as_vllm
        self.model_name = ""
        """Label of everything; known once the model is."""

    def collect(self) -> Iterator[Metric]:
        """One snapshot."""
        model = {"model_name": self.model_name}
        for family in self._own.collect():
            name = family.name.removeprefix(_PREFIX)
            if name not in _COMPAT_ONLY:
                yield _as(family, _PREFIX, model)
            if self._as_vllm and name in VLLM_NAMES:
                labels = {} if name in _WITHOUT_MODEL else model
                # One process has one engine, and vLLM counts them from 0.
                engine = {} if name in _COMPAT_ONLY else {"engine": "0"}
                yield _as(family, _VLLM_PREFIX, labels | engine)


def _as(family: Metric, prefix: str, labels: Mapping[str, str]) -> Metric:
    """The same metric with another prefix and more labels."""
    renamed = Metric(
        prefix + family.name.removeprefix(_PREFIX), family.documentation, family.type, family.unit
    )
    renamed.samples = [
        sample._replace(
            name=prefix + sample.name.removeprefix(_PREFIX), labels={**sample.labels, **labels}
        )
        for sample in family.samples
        if not sample.name.endswith("_created")  # times of creation, which nothing reads
    ]
    return renamed
