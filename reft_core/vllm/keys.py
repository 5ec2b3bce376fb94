"""Names of vLLM's KV blocks under edits: what the block hash takes in besides the tokens.

The rule is that of :mod:`reft_core.engine.provenance`: a block is named by its tokens and by a
mark for each position in it that is edited. Blocks before the first edited position thus keep the
base model's names, and all later ones differ, because vLLM chains its hashes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from reft_core.vllm.admitted import Run, admitted_runs


def block_keys(runs: Iterable[Run], start: int, end: int) -> list[tuple[str, str]]:
    """Extra keys of the block of positions start..end-1; none if nothing in it is edited."""
    return [
        ("reft", f"{max(first, start) - start}:{min(stop, end) - start}:{mark}")
        for first, stop, mark in runs
        if first < end and stop > start
    ]


def with_edits(generate: Any) -> Any:
    """vLLM's ``generate_block_hash_extra_keys`` with :func:`block_keys` added."""

    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        keys, mm_idx = generate(request, start_token_idx, end_token_idx, start_mm_idx)
        params = request.sampling_params
        if params is None or not params.extra_args:
            return keys, mm_idx
        ours = block_keys(admitted_runs(params.extra_args), start_token_idx, end_token_idx)
        return ((*(keys or ()), *ours) if ours else keys), mm_idx

    return generate_block_hash_extra_keys
