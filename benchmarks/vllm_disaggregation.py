"""Prefill under adapters in one vLLM, decode in another that has never heard of them.

What an adapter of prompt positions does is in the prompt's keys and values and in the first token.
So a vLLM with the plugin reads each prompt, answers with one token and writes the prompt's keys and
values to files; a vLLM without plugin and adapters reads them, gets the prompt and that token, and
answers the rest. Mixed adapters (f7+l7 and l1 in all layers) and the base model, prompts within and
across blocks, all at once, float32, greedy, no prefix cache on the decoding side.

Beside it the usual hand-over, where the decoding side is given the prompt alone and computes its
last token again: without the edit that acts there, which leaves some answers right, and with it, by
the first vLLM itself.

Correctness gate: with the first token, and with the plugin, every answer is that of the first vLLM
alone.

The last line printed is JSON; the same goes to ``results/vllm-disaggregation.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.peers.contenders import start, wait_loaded
from benchmarks.peers.plugin import expose_plugin
from benchmarks.peers.protocol import Worker
from benchmarks.peers.random_lora import RANK
from benchmarks.provenance import provenance, save
from benchmarks.vllm_tax import plugin_variant
from benchmarks.work import random_prompts, write_random_adapters
from reft_core.convert.base import base_from_folder
from reft_core.loading import DEMO_MODEL, materialise_demo_model

_ADAPTERS = 4
"""Of each rule."""
_BLOCK = 32
_LENGTHS = (20, 40, 63, 64, 65, 96, 97, 130)
_RUN_S = 600.0

Request = dict[str, Any]


def requests_of(prompts: Sequence[Sequence[int]]) -> list[Request]:
    """The prompts under each adapter in turn, every ninth under none."""
    count = 2 * _ADAPTERS + 1
    return [
        {"prompt": list(prompt), "adapter": i % count if i % count < 2 * _ADAPTERS else None}
        for i, prompt in enumerate(prompts)
    ]


def hand_over(
    prefill: Worker, decode: Worker, requests: Sequence[Request], output_tokens: int
) -> dict[str, list[list[int]]]:
    """Answers of the first worker alone, of both with the first token, of both with the prompt;
    and by the prompt's keys and values where the adapter is (``with_plugin``).
    """
    alone = _ask(prefill, requests, output_tokens)
    written = [
        {**request, "kv": {"write": str(i), "tokens": len(request["prompt"])}}
        for i, request in enumerate(requests)
    ]
    first = _ask(prefill, written, 1)
    with_token = [
        {"prompt": [*request["prompt"], *token], "kv": _read(i, len(request["prompt"]))}
        for i, (request, token) in enumerate(zip(requests, first, strict=True))
    ]
    rest = _ask(decode, with_token, output_tokens - 1)
    known = [
        {**request, "kv": _read(i, len(request["prompt"]))} for i, request in enumerate(requests)
    ]
    with_prompt = [{**request, "adapter": None} for request in known]
    return {
        "alone": alone,
        "with_token": [[*a, *b] for a, b in zip(first, rest, strict=True)],
        "with_prompt": _ask(decode, with_prompt, output_tokens),
        "with_plugin": _ask(prefill, known, output_tokens),
    }


def _read(number: int, tokens: int) -> dict[str, Any]:
    return {"read": str(number), "tokens": tokens}


def _ask(worker: Worker, requests: Sequence[Request], output_tokens: int) -> list[list[int]]:
    answer = worker.ask("answer", _RUN_S, requests=requests, output_tokens=output_tokens)
    tokens: list[list[int]] = answer["tokens"]
    return tokens


def main() -> None:
    """Run both vLLMs and compare their answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--output-tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3, help="prompts of each length")
    options = parser.parse_args()

    folder = materialise_demo_model() if options.model == DEMO_MODEL else Path(options.model)
    model = base_from_folder(options.model)
    prompts = [
        prompt
        for number, length in enumerate(_LENGTHS)
        for prompt in random_prompts(model, options.repeats, length, seed=number)
    ]
    with TemporaryDirectory() as name, ExitStack() as stack:
        scratch = Path(name)
        expose_plugin(scratch / "plugin")
        write_random_adapters(scratch / "reft", model, RANK, _ADAPTERS)
        write_random_adapters(scratch / "reft", model, RANK, _ADAPTERS, "l1", first=_ADAPTERS)
        (scratch / "none").mkdir()
        transfer = {
            "kv_connector": "PromptConnector",
            "kv_connector_module_path": "benchmarks.peers.prompt_connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(scratch / "kv")},
        }
        engine = {"kv_transfer_config": transfer, "block_size": _BLOCK}
        settings = {"eager": True, "engine": engine}
        prefill = plugin_variant("prefill", scratch, "reft", settings)
        decode = replace(plugin_variant("decode", scratch, "none", settings), plugins=None)
        workers, versions = [], {}
        for variant in (prefill, decode):
            worker = start(variant, folder, options.model, "float32", threads=2)
            workers.append(stack.enter_context(worker))
            versions[variant.label] = wait_loaded(worker)["versions"]
            print(variant.label, versions[variant.label], flush=True)
        requests = requests_of(prompts)
        found = hand_over(workers[0], workers[1], requests, options.output_tokens)
    alone = found["alone"]
    figures = {
        "requests": len(requests),
        "under_adapters": sum(request["adapter"] is not None for request in requests),
        "right_with_first_token": _num_equal(alone, found["with_token"]),
        "right_with_prompt_alone": _num_equal(alone, found["with_prompt"]),
        "right_with_prompt_and_plugin": _num_equal(alone, found["with_plugin"]),
    }
    document = {**provenance(), **vars(options), "lengths": _LENGTHS, "block_tokens": _BLOCK}
    document |= {"versions": versions, "summary": figures}
    print("saved to", save("vllm-disaggregation", document))
    print(json.dumps(figures))
    exact = figures["right_with_first_token"], figures["right_with_prompt_and_plugin"]
    if exact != (len(requests), len(requests)):
        raise SystemExit("correctness gate: an answer differs from that of one vLLM alone")


def _num_equal(some: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> int:
    return sum(list(a) == list(b) for a, b in zip(some, others, strict=True))


if __name__ == "__main__":
    main()
