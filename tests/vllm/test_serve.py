"""``reft serve --engine vllm`` as a process: our routes over vLLM, and an orderly end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.soak.server import ServerProcess
from reft_core.adapter import decode_adapter
from reft_core.sites import describe_model
from tests.factories import random_adapter_bytes
from tests.reference.slow import reference_generate
from tests.server.fakes import make_tokenizer

PROMPT = "ten green bottles hanging on the wall"
_START_S = 240.0


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Random, over the byte tokenizer's tokens, of a width that vLLM's CPU kernels take."""
    tokenizer = make_tokenizer()
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=96,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    made = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.4)
    return made


@pytest.fixture(scope="module")
def adapter_file(model: LlamaForCausalLM) -> bytes:
    return random_adapter_bytes(describe_model(model, "tiny"), size=2.0, name="tone")


@pytest.fixture(scope="module")
def server(
    model: LlamaForCausalLM, adapter_file: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("serve")
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    (folder / "tone.safetensors").write_bytes(adapter_file)
    settings = {
        "engine": "vllm",
        "dtype": "float32",
        "max_model_len": 256,
        "cuda_graphs": False,
        "adapters": folder / "tone.safetensors",
        "vllm_args": json.dumps({"block_size": 32}),
    }
    process = ServerProcess(str(folder / "model"), folder, settings)
    try:
        process.wait_ready(_START_S)
        yield process
    finally:
        process.kill()


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            r'\s*\{\s*"n"\s*:\s*\d\s*,\s*"ok"\s*:\s*(true|false)\s*\}\s*',
        ),
        ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
        ({"structured_outputs": {"regex": "[a-c]{3}x"}}, "[a-c]{3}x"),
        ({"structured_outputs": {"grammar": 'start: "yes" | "no" "!"'}}, "yes|no!"),
    ],
)
def test_answers_have_the_form_that_is_asked_for(
    server: ServerProcess, form: dict[str, Any], pattern: str
) -> None:
    """Of a random model's, which would never have it; beside one that has none."""
    url = server.wait_ready(_START_S)
    with httpx.Client(base_url=url, timeout=60) as http:
        for name in ("tone", "model"):
            body = {"model": name, "prompt": PROMPT, "max_tokens": 200, "temperature": 0}
            answer = http.post("/v1/completions", json=body | form)
            assert answer.status_code == 200, answer.text
            choice = answer.json()["choices"][0]
            assert choice["finish_reason"] == "stop"
            assert re.fullmatch(pattern, choice["text"]), choice["text"]
        refused = http.post("/v1/completions", json=body | {"structured_outputs": {"regex": "[a-"}})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "structured_outputs.regex"


def test_a_request_in_and_its_tokens_out(
    server: ServerProcess, model: LlamaForCausalLM, adapter_file: bytes
) -> None:
    """With the adapter and without; and the process ends as it should when it is told to."""
    prompt = make_tokenizer()(PROMPT, add_special_tokens=False)["input_ids"]
    url = server.wait_ready(_START_S)
    with httpx.Client(base_url=url, timeout=60) as http:
        before = _num_generated(http)
        for name, adapter in (("tone", decode_adapter(adapter_file)), ("model", None)):
            body = {"model": name, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
            answer = http.post("/v1/completions", json=body | {"ignore_eos": True})
            assert answer.status_code == 200, answer.text
            expected = reference_generate(model, tuple(prompt), 8, adapter, 1.0)
            assert answer.json()["choices"][0]["text"] == make_tokenizer().decode(expected)
        assert _num_generated(http) - before == 16
    assert server.stop() == 0
    assert not server.errors()


def _num_generated(http: httpx.Client) -> float:
    (found,) = re.findall(
        r'^reft_generation_tokens_total{model_name="model"} (.+)$', http.get("/metrics").text, re.M
    )
    return float(found)
