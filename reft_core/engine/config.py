"""The engine's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from reft_core.errors import InvalidRequest

Forward = Literal["auto", "torch", "transformers"]
"""Whose code computes the model."""


@dataclass(frozen=True)
class EngineConfig:
    """Sizes and limits of one engine. Every value is checked on construction."""

    max_model_len: int = 2048
    """Most tokens of prompt and answer together; also capped by the model's positions."""
    max_num_seqs: int = 16
    """Requests that run at once; each has a slot of ``max_model_len`` tokens."""
    max_waiting: int = 1024
    """Requests that may wait for a slot before new ones are refused."""
    max_waiting_tokens: int = 256 * 1024
    """While the prompts of those have so many tokens together, new requests are refused; what is
    submitted together is accepted or refused together."""
    max_prefill_tokens: int = 512
    """Prompt tokens computed in one step; longer prompts are prefilled in chunks. What is left of
    prompts that share all else with another one may exceed it by a quarter."""
    kv_tokens: int | None = None
    """Tokens that all running requests may hold together, at least ``max_model_len``; beyond,
    requests lose their slot and are computed again. None: what the slots have room for."""
    prefix_cache_bytes: int = 256 * 1024 * 1024
    """Memory for the keys and values of prompts seen before; 0 remembers none."""
    forward: Forward = "auto"
    """``auto`` packs a copy of a Llama-like model's weights for a faster forward on a CPU, and
    compiles what lies between them if there is a compiler; ``torch`` compiles nothing;
    ``transformers`` saves the memory."""
    cuda_graphs: bool = True
    """On a GPU, decode replays recorded CUDA graphs instead of launching every operation. They
    are recorded when the engine starts, for some seconds, and take the memory of one step."""
    num_threads: int | None = None
    """CPU threads of the compute; None leaves torch's choice."""

    @property
    def max_open(self) -> int:
        """Most requests that may run or wait at once; beyond, new ones are refused."""
        return self.max_num_seqs + self.max_waiting

    def __post_init__(self) -> None:
        at_least_one = ("max_model_len", "max_num_seqs", "max_waiting", "max_prefill_tokens")
        for name in (*at_least_one, "max_waiting_tokens"):
            if getattr(self, name) < 1:
                raise InvalidRequest.because(name, getattr(self, name), "at least 1")
        if self.kv_tokens is not None and self.kv_tokens < self.max_model_len:
            allowed = f"at least max_model_len, {self.max_model_len}"
            raise InvalidRequest.because("kv_tokens", self.kv_tokens, allowed)
        if self.prefix_cache_bytes < 0:
            raise InvalidRequest.because("prefix_cache_bytes", self.prefix_cache_bytes, "0 or more")
        if self.forward not in get_args(Forward):
            allowed = f"one of {', '.join(get_args(Forward))}"
            raise InvalidRequest.because("forward", self.forward, allowed)
        if self.num_threads is not None and self.num_threads < 1:
            raise InvalidRequest.because("num_threads", self.num_threads, "at least 1")
