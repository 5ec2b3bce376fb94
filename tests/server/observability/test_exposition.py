"""vLLM's names, as vLLM spells them, for those who only know those."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.observability.exposition import VLLM_NAMES
from tests.server.fakes import MODEL, make_adapter

ASK = {"model": MODEL.name, "prompt": "hi", "max_tokens": 3}
MODEL_AND_ENGINE = {"model_name": MODEL.name, "engine": "0"}
COUNTERS = (
    *("prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "prompt_tokens"),
    *("generation_tokens", "request_success", "prompt_tokens_by_source"),
)
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
HISTOGRAMS = (
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
    *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
    *("request_inference_time_seconds", "request_time_per_output_token_seconds"),
    *("request_prompt_tokens", "request_generation_tokens", "request_params_max_tokens"),
)


def families(server):
    return {f.name: f for f in text_string_to_metric_families(server.http.get("/metrics").text)}


@pytest.fixture
def compatible(in_process):
    with in_process(metrics_compat="vllm") as server:
        server.upload("tone", make_adapter(1))
        server.http.post("/v1/completions", json=ASK | {"model": "tone"})
        yield server


def test_none_of_them_by_default(server):
    assert not any(name.startswith("vllm") for name in families(server))
    assert "reft_lora_requests_info" not in families(server)


def test_all_of_them_with_type_and_labels(compatible):
    found = families(compatible)
    for kind, names in (("counter", COUNTERS), ("gauge", GAUGES), ("histogram", HISTOGRAMS)):
        for name in names:
            family = found[f"vllm:{name}"]
            assert family.type == kind
            assert family.samples, name
            for sample in family.samples:
                assert MODEL_AND_ENGINE.items() <= sample.labels.items(), name
    others = {"lora_requests_info", "cache_config_info"}
    assert set(COUNTERS + GAUGES + HISTOGRAMS) | others == VLLM_NAMES
    assert {name for name in found if name.startswith("vllm:")} == {
        f"vllm:{name}" for name in VLLM_NAMES
    }


def test_the_lines_themselves(compatible):
    text = compatible.http.get("/metrics").text
    both = f'engine="0",model_name="{MODEL.name}"'
    for line in (
        "# TYPE vllm:prompt_tokens_total counter",
        f"vllm:prompt_tokens_total{{{both}}} 13.0",
        f'vllm:request_success_total{{engine="0",finished_reason="length",model_name="{MODEL.name}"'
        "} 1.0",
        "# TYPE vllm:num_requests_waiting gauge",
        f"vllm:num_requests_waiting{{{both}}} 3.0",
        f"vllm:kv_cache_usage_perc{{{both}}} 0.25",
        f"vllm:time_to_first_token_seconds_count{{{both}}} 1.0",
        'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="6"} 1.0',
    ):
        assert line in text.splitlines(), line


def test_what_both_have_is_the_same(compatible):
    found = families(compatible)
    for name in (*COUNTERS, *GAUGES, *HISTOGRAMS):
        ours, theirs = ([s.value for s in found[p + name].samples] for p in ("reft_", "vllm:"))
        assert ours == theirs, name


def test_the_gateway_is_told_which_adapters_run(compatible, engine):
    engine.pause()
    services = compatible.services
    services.metrics.adapters.begin([("", "tone")])
    (sample,) = families(compatible)["vllm:lora_requests_info"].samples
    assert sample.labels == {
        "max_lora": "4",
        "running_lora_adapters": "tone",
        "waiting_lora_adapters": "",
    }
    assert sample.value > 1e9
