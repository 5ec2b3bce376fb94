"""What LoRA adapters cost the peers that serve them, each against itself without any.

The same question as :mod:`adapter_tax` asks of this project: K distinct adapters over 64
requests. Adapters are LoRA of rank 8 on the query and value maps of every layer, with random
weights. vLLM runs them in its own batches; PEFT in mixed static batches (``adapter_names``).
They get fewer requests and tokens than this project does, as they are slower, and each is
compared with itself alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.peers.contenders import Variant, start, wait_loaded
from benchmarks.peers.environments import PEFT, VLLM
from benchmarks.peers.protocol import PeerMissing, Worker
from benchmarks.spreads import spread_of_ratios

REQUESTS = 64
INPUT_TOKENS = 64
_RUN_S = 900.0


@dataclass(frozen=True)
class Peer:
    """A peer with adapters, and the one without that it is compared with."""

    name: str
    with_adapters: Variant
    without: Variant | None
    """None: the same worker, whose base model is a second copy."""
    output_tokens: int


def peers(num_adapters: int, scratch: str) -> tuple[Peer, ...]:
    """The peers, their workers holding this many adapters, written to the folder ``scratch``."""
    vllm, peft = "benchmarks.peers.vllm_worker", "benchmarks.peers.peft_worker"
    loras = {
        "eager": True,
        "max_loras": REQUESTS,
        "num_adapters": num_adapters,
        "folder": scratch,
    }
    return (
        Peer(
            "vllm",
            Variant("vllm", "lora", vllm, VLLM, loras),
            Variant("vllm", "no-lora", vllm, VLLM, {"eager": True}),
            output_tokens=16,
        ),
        Peer(
            "peft",
            Variant("peft", "", peft, PEFT, {"num_adapters": num_adapters}),
            None,
            output_tokens=8,
        ),
    )


def measure(
    folder: Path,
    model: str,
    dtype: str,
    threads: int,
    prompts: Sequence[Sequence[int]],
    counts: Sequence[int],
    repeats: int,
) -> dict[str, dict[str, Any]]:
    """By peer: ``throughput_ratio`` of each K, or why it is ``missing``."""
    results: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as scratch:
        for peer in peers(max(counts), scratch):
            try:
                with ExitStack() as stack:
                    workers = []
                    for variant in (peer.with_adapters, peer.without):
                        if variant is not None:
                            worker = start(variant, folder, model, dtype, threads)
                            workers.append(stack.enter_context(worker))
                            wait_loaded(worker)
                    results[peer.name] = _ratios(peer, workers, prompts, counts, repeats)
            except PeerMissing as error:
                results[peer.name] = {"missing": str(error)}
    return results


def _ratios(
    peer: Peer,
    workers: Sequence[Worker],
    prompts: Sequence[Sequence[int]],
    counts: Sequence[int],
    repeats: int,
) -> dict[str, Any]:
    """Each K in turn, as often as is asked; the first round warms up."""
    seconds: dict[int, list[float]] = {k: [] for k in (0, *counts)}
    answers: dict[int, list[list[int]]] = {}
    for _ in range(repeats + 1):
        for k, times in seconds.items():
            answer = workers[0 if k else -1].ask(
                "run",
                _RUN_S,
                prompts=prompts,
                output_tokens=peer.output_tokens,
                settings={"batch": REQUESTS},
                adapters=k,
            )
            times.append(answer["seconds"])
            answers[k] = answer["tokens"]
    tokens = len(prompts) * peer.output_tokens
    return {
        "output_tokens": peer.output_tokens,
        **{
            f"K={k}": {
                "tokens_per_s": round(tokens / median(times[1:]), 1),
                "throughput_ratio": spread_of_ratios(seconds[0][1:], times[1:]),
                "answers_changed": sum(a != b for a, b in zip(answers[0], answers[k], strict=True)),
            }
            for k, times in seconds.items()
        },
    }
