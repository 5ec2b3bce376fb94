"""From vLLM's batch to the plan of one step: which rows of it get which edits.

A row's position is what its request had computed before the step, plus its place among the
request's tokens of this step. It is compared with the length of the original prompt, which
preemption, resumption and chunking leave as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from reft_core.batch import AdapterUse, EditPlan, PackedChunk, PromptEdits, build_plan
from reft_core.vllm.admitted import admitted_prompt_len, admitted_uses
from reft_core.vllm.store import WorkerStore


@dataclass(frozen=True)
class Chunk:
    """One request's tokens in a step, as far as edits are concerned."""

    request_id: str
    params: Any
    """vLLM's ``SamplingParams``."""
    prompt_len: int
    num_computed: int
    """Tokens of the request that were computed before this step."""
    row: int
    length: int

    @property
    def may_be_edited(self) -> bool:
        """Whether any of it is prompt, and its request has adapters."""
        return self.num_computed < self.prompt_len and bool(admitted_uses(self.params.extra_args))


class Planner:
    """Makes the plans of one worker's steps, and remembers what waiting prompts are edited by."""

    def __init__(self, store: WorkerStore, device: torch.device) -> None:
        self._store = store
        self._device = device
        self._edits: dict[str, PromptEdits] = {}
        """Of requests whose prompts are partly computed; so their adapters stay."""

    def plan(self, chunks: Iterable[Chunk]) -> tuple[EditPlan, list[str]]:
        """The plan of a step, and the requests that must fail, as an adapter cannot be had."""
        packed: list[PackedChunk] = []
        failed: list[str] = []
        for chunk in chunks:
            if not chunk.may_be_edited:
                continue
            edits = self._edits.get(chunk.request_id) or self._resolve(chunk)
            if edits is None:
                failed.append(chunk.request_id)
                continue
            packed.append(PackedChunk(chunk.row, chunk.num_computed, chunk.length, edits))
            if chunk.num_computed + chunk.length >= chunk.prompt_len:
                self._edits.pop(chunk.request_id, None)
            else:
                self._edits[chunk.request_id] = edits
        return (build_plan(packed, self._device) if packed else EditPlan()), failed

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop what is remembered of requests that have ended."""
        if self._edits:
            for request_id in request_ids:
                self._edits.pop(request_id, None)

    def _resolve(self, chunk: Chunk) -> PromptEdits | None:
        uses = []
        for use in admitted_uses(chunk.params.extra_args):
            adapter = self._store.get(use.digest)
            if adapter is None:
                return None
            uses.append(AdapterUse(adapter, use.strength, use.subspaces))
        reads: Literal["last", "all"]
        reads = "last" if chunk.params.prompt_logprobs is None else "all"
        return PromptEdits(tuple(uses), chunk.prompt_len, reads)


def chunks_of(runner: Any) -> list[Chunk]:
    """The chunks of the step that a V1 model runner has prepared, those without adapters left out.

    ``runner`` is a ``GPUModelRunner`` between ``_prepare_inputs`` and the end of its forward.
    """
    batch = runner.input_batch
    count = batch.num_reqs
    in_prompt = batch.num_computed_tokens_cpu[:count] < batch.num_prompt_tokens[:count]
    requests: Mapping[str, Any] = runner.requests
    starts = runner.query_start_loc.np
    chunks = []
    for index in in_prompt.nonzero()[0]:
        request_id = batch.req_ids[index]
        params = requests[request_id].sampling_params
        if params is not None and params.extra_args:
            chunks.append(
                Chunk(
                    request_id,
                    params,
                    admitted_prompt_len(params.extra_args),
                    int(batch.num_computed_tokens_cpu[index]),
                    int(starts[index]),
                    int(starts[index + 1] - starts[index]),
                )
            )
    return chunks
