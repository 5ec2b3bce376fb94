"""How near the engine comes to what the machine can do.

Peaks are measured, not looked up: the fastest of several matrix products in the model's shapes,
and the fastest way found to read much memory. A decode step can take no less than its arithmetic
at the peak, nor less than reading its weights, keys and values once; a prefill no less than its
arithmetic.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.work import greedy_requests, random_prompts
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.generate import generate
from reft_core.engine.interface import Output
from reft_core.loading import Dtype, load_model
from reft_core.sites import find_layers
from reft_core.threads import run_in_own_thread

_BATCH = 16
_INPUT_TOKENS, _OUTPUT_TOKENS = 96, 64  # contexts from 96 to 160: 128 on average
_PREFILL_TOKENS = 1000
_READ_BYTES = 512 * 2**20  # well beyond any cache


@dataclass(frozen=True)
class Shape:
    """What a model's arithmetic depends on."""

    layer_parameters: int
    """Of the linear maps of all layers."""
    head_parameters: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Shape:
        """The shape of a causal model of transformers."""
        config: Any = model.config
        maps = [m for m in find_layers(model)[0].modules() if isinstance(m, nn.Linear)]
        heads = config.num_attention_heads
        return cls(
            layer_parameters=config.num_hidden_layers * sum(m.weight.numel() for m in maps),
            head_parameters=config.vocab_size * config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )

    def attention_flops(self, num_pairs: float) -> float:
        """Of scores and weighted sums over this many pairs of query and key."""
        return 4.0 * self.num_layers * self.num_heads * self.head_dim * num_pairs

    def decode_flops(self, batch: int, context: int) -> float:
        """Floating-point operations of one decode step."""
        products = 2.0 * batch * (self.layer_parameters + self.head_parameters)
        return products + self.attention_flops(batch * context)

    def decode_bytes(self, batch: int, context: int, itemsize: int) -> float:
        """Bytes that one decode step must read: weights, keys and values."""
        kv = 2 * self.num_layers * self.num_kv_heads * self.head_dim * batch * context
        return float(itemsize * (self.layer_parameters + self.head_parameters + kv))

    def prefill_flops(self, num_tokens: int) -> float:
        """Floating-point operations of one prompt; logits are of its last token alone."""
        products = 2.0 * (self.layer_parameters * num_tokens + self.head_parameters)
        return products + self.attention_flops(num_tokens * (num_tokens + 1) / 2)


def decode_floor_s(
    shape: Shape, batch: int, context: int, itemsize: int, peak: float, bandwidth: float
) -> float:
    """Seconds below which no decode step can be: peak in FLOP/s, bandwidth in bytes/s."""
    arithmetic = shape.decode_flops(batch, context) / peak
    memory = shape.decode_bytes(batch, context, itemsize) / bandwidth
    return max(arithmetic, memory)


def measure(model: str, dtype: Dtype, threads: int, repeats: int) -> dict[str, float]:
    """Peaks, the engine's decode step and prefill, and both against their floors."""
    loaded = load_model(model, dtype=dtype)
    shape = Shape.of(loaded.model)
    peak, bandwidth = run_in_own_thread(
        lambda: _peaks(loaded.model, getattr(torch, dtype), threads, repeats)
    )
    config = EngineConfig(max_model_len=2048, prefix_cache_bytes=0, num_threads=threads)
    engine = EmbeddedEngine(loaded, config)
    engine.start()
    try:
        step_s = median(_decode_step_s(engine) for _ in range(repeats))
        prompt_s = median(_prompt_s(engine) for _ in range(repeats))
    finally:
        engine.stop()
    itemsize = getattr(torch, dtype).itemsize
    context = _INPUT_TOKENS + _OUTPUT_TOKENS // 2
    floor_s = decode_floor_s(shape, _BATCH, context, itemsize, peak, bandwidth)
    prefill_rate = shape.prefill_flops(_PREFILL_TOKENS) / prompt_s
    return {
        "peak_gflops": round(peak / 1e9, 1),
        "read_gb_per_s": round(bandwidth / 1e9, 1),
        "decode_floor_ms": round(1e3 * floor_s, 2),
        "decode_step_ms": round(1e3 * step_s, 2),
        "decode_over_roofline": round(step_s / floor_s, 2),
        "prefill_tokens_per_s": round(_PREFILL_TOKENS / prompt_s, 1),
        "prefill_fraction_of_peak": round(prefill_rate / peak, 3),
    }


def _decode_step_s(engine: EmbeddedEngine) -> float:
    """Median seconds between tokens of a full batch."""
    outputs: queue.SimpleQueue[tuple[float, Output]] = queue.SimpleQueue()
    prompts = random_prompts(engine.model, _BATCH, _INPUT_TOKENS)
    for request in greedy_requests(prompts, _OUTPUT_TOKENS):
        engine.submit(request, lambda output: outputs.put((time.perf_counter(), output)))
    last: dict[str, float] = {}
    gaps = []
    for _ in range(_BATCH * _OUTPUT_TOKENS):
        now, output = outputs.get(timeout=300)
        if output.error is not None:
            raise output.error
        if output.request_id in last:
            gaps.append(now - last[output.request_id])
        last[output.request_id] = now
    return median(gaps)


def _prompt_s(engine: EmbeddedEngine) -> float:
    """Seconds to the first token of one long prompt, the mean of a few sent together."""
    requests = greedy_requests(random_prompts(engine.model, 4, _PREFILL_TOKENS), 1)
    started = time.perf_counter()
    generate(engine, requests)
    return (time.perf_counter() - started) / len(requests)


@torch.inference_mode()
def _peaks(
    model: PreTrainedModel, dtype: torch.dtype, threads: int, repeats: int
) -> tuple[float, float]:
    """FLOP/s of the fastest matrix product, and bytes/s of the fastest reading."""
    torch.set_num_threads(threads)
    maps = [m.weight for m in find_layers(model)[0].modules() if isinstance(m, nn.Linear)]
    sizes = {tuple(weight.shape) for weight in maps} | {(2048, 2048), (4096, 4096)}
    best = 0.0
    for out_size, in_size in sorted(sizes):
        for num_rows in (512, 2048):
            x = torch.randn(num_rows, in_size).to(dtype)
            weight = torch.randn(out_size, in_size).to(dtype)
            seconds = min(_fastest_s(product, repeats) for product in _products(x, weight))
            best = max(best, 2.0 * num_rows * in_size * out_size / seconds)
    numbers = torch.ones(_READ_BYTES // 4096 // 4, 4096)
    vector = torch.ones(4096)
    reading = [lambda: numbers.sum(), lambda: torch.mv(numbers, vector)]
    read_s = min(_fastest_s(read, repeats) for read in reading)
    return best, numbers.numel() * numbers.itemsize / read_s


def _products(x: Tensor, weight: Tensor) -> list[Callable[[], Tensor]]:
    """Ways to compute x Wᵀ: plain, and with the weight laid out for oneDNN's kernels."""
    ways: list[Callable[[], Tensor]] = [lambda: x @ weight.mT]
    if hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
    return ways


def _fastest_s(function: Callable[[], Tensor], repeats: int) -> float:
    """Least seconds of a call, after one that warms up."""
    function()
    took = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        took.append(time.perf_counter() - started)
    return min(took)
