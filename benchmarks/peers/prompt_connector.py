"""A KV connector for vLLM that hands over whole prompts through files, told what by each request.

vLLM's ``ExampleConnector`` finds files by the tokens of whole blocks: adapters on one prompt would
find each other's, and a prompt's last tokens are left out. Here ``kv_transfer_params`` say which
file, and how many tokens: ``{"write": name, "tokens": n}`` or ``{"read": name, "tokens": n}``.
Prompts are to fit one step, and nothing may be preempted.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from typing_extensions import override
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import (
    ExampleConnector,
    ExampleConnectorMetadata,
    ReqMeta,
)


class PromptConnector(ExampleConnector):  # type: ignore[misc]  # mypy does not follow vllm
    """Copies the keys and values of a request's first tokens to files, or from them."""

    @override
    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        asked = request.kv_transfer_params or {}
        if "read" not in asked:
            return 0, False
        # As vLLM does it: a prompt's last token is computed where the next one is chosen.
        return min(asked["tokens"], request.num_tokens - 1) - num_computed_tokens, False

    @override
    def build_connector_meta(self, scheduler_output: Any) -> ExampleConnectorMetadata:
        found = ExampleConnectorMetadata()
        for request in scheduler_output.scheduled_new_reqs:
            asked = (request.sampling_params.extra_args or {}).get("kv_transfer_params")
            if asked:
                found.requests.append(self._copied(asked, request))
        self._requests_need_load.clear()
        return found

    def _copied(self, asked: dict[str, Any], request: Any) -> ReqMeta:
        """Which slots, and under which name: whole blocks, in which a CPU's keys lie in tiles."""
        num_blocks = -(-asked["tokens"] // self._block_size)
        blocks = torch.tensor(request.block_ids[0][:num_blocks])
        slots = (blocks.unsqueeze(1) * self._block_size + torch.arange(self._block_size)).flatten()
        tokens = torch.tensor(request.prompt_token_ids)[: asked["tokens"]]
        name = asked.get("write") or asked["read"]
        return ReqMeta(tokens, slots, is_store="write" in asked, mm_hashes=[name])

    @override
    def _generate_foldername_debug(
        self, token_ids: torch.Tensor, mm_hashes: list[str], create_folder: bool = False
    ) -> str:
        folder = os.path.join(self._storage_path, *mm_hashes)
        if create_folder:
            os.makedirs(folder, exist_ok=True)
        return folder
