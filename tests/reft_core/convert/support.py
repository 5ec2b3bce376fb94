"""What the conversion tests share: the stored cases and the two comparisons with them."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from reft_core.adapter import Adapter
from reft_core.convert import BASE_TEMPLATE, ConvertOptions, base_from_folder
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.generate import generate
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.loading import LoadedModel
from reft_core.sites import ModelDescription, describe_model
from tests.factories import NoTokenizer
from tests.fixtures.tiny import base_model
from tests.reference.slow import reference_generate, reference_logits

FIXTURES = Path(__file__).parents[2] / "fixtures"
TOLERANCE = 1e-5  # of the largest logit: float32 rounds otherwise on another CPU


@dataclass(frozen=True)
class Case:
    """One adapter saved by another library, with that library's own outputs."""

    folder: Path
    facts: dict[str, Any]
    logits: list[Tensor]
    greedy: list[list[int]]

    @property
    def adapter_folder(self) -> Path:
        return self.folder / "adapter"

    @property
    def prompts(self) -> list[list[int]]:
        return self.facts["prompts"]


def case_names(library: str, *, own_base: bool = False) -> list[str]:
    """Names of the stored cases that run on the tiny Llama, or else on a base of their own."""
    folders = sorted((FIXTURES / library).iterdir())
    return [folder.name for folder in folders if (folder / "base").is_dir() == own_base]


def load_case(library: str, name: str) -> Case:
    folder = FIXTURES / library / name
    facts = json.loads((folder / "case.json").read_text())
    outputs = load_file(folder / "outputs.safetensors")
    count = len(facts["prompts"])
    return Case(
        folder,
        facts,
        [outputs[f"logits.{i}"] for i in range(count)],
        [outputs[f"greedy.{i}"].tolist() for i in range(count)],
    )


def copied(case: Case, tmp_path: Path) -> Path:
    """A copy of the case's folder, for a test to damage."""
    return Path(shutil.copytree(case.adapter_folder, tmp_path / "adapter"))


def change_json(path: Path, fields: dict[str, Any]) -> None:
    """Replace some fields of the JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@functools.cache
def tiny_base() -> PreTrainedModel:
    """The model that most stored cases were run on."""
    return base_model(FIXTURES)


def fresh_base(case: Case) -> PreTrainedModel:
    """A new copy of the model a case was run on."""
    own = case.folder / "base"
    if not own.is_dir():
        return base_model(FIXTURES)
    return AutoModelForCausalLM.from_pretrained(own).eval().requires_grad_(False)


def case_description(case: Case) -> ModelDescription:
    """The description of the model a case was run on, from its config alone."""
    own = case.folder / "base"
    return _describe(own if own.is_dir() else FIXTURES / "base")


@functools.cache
def _describe(folder: Path) -> ModelDescription:
    return base_from_folder(str(folder), "tiny-fixture")


def options(**given: Any) -> ConvertOptions:
    """Options for the tiny base, with what every source needs."""
    defaults: dict[str, Any] = {
        "base": _describe(FIXTURES / "base"),
        "name": "converted",
        "template": BASE_TEMPLATE,
    }
    return ConvertOptions(**(defaults | given))


def assert_reproduces(adapter: Adapter, case: Case) -> None:
    """Reference and engine give the other library's logits and greedy tokens."""
    assert len(case.prompts) >= 2
    base = fresh_base(case)
    worst = 0.0
    changed = 0
    num_greedy = len(case.greedy[0])
    for prompt, logits, greedy in zip(case.prompts, case.logits, case.greedy, strict=True):
        ours = reference_logits(base, prompt, len(prompt), adapter)
        worst = max(worst, float((ours - logits).abs().max()))
        plain = reference_logits(base, prompt, len(prompt))
        changed += bool((plain - logits).abs().max() > 0.1)
        assert reference_generate(base, tuple(prompt), num_greedy, adapter) == greedy
    assert changed > len(case.prompts) / 2, "the adapters of these cases must matter"
    allowed = TOLERANCE * max(float(logits.abs().max()) for logits in case.logits)
    assert worst <= allowed, f"reference: largest difference {worst}, allowed {allowed}"
    worst, tokens = _through_the_engine(adapter, case)
    assert tokens == case.greedy
    assert worst <= allowed, f"engine: largest difference {worst}, allowed {allowed}"


def _through_the_engine(adapter: Adapter, case: Case) -> tuple[float, list[list[int]]]:
    """Largest log-probability difference at the first token, and the greedy tokens."""
    tokenizer: PreTrainedTokenizerBase = NoTokenizer()  # type: ignore[assignment]
    model = fresh_base(case)  # the engine changes its model's attention
    loaded = LoadedModel(model, tokenizer, describe_model(model, "tiny-fixture"))
    engine = EmbeddedEngine(
        loaded, EngineConfig(max_num_seqs=3, max_prefill_tokens=5, max_model_len=64)
    )
    engine.load_adapter(adapter)
    params = SamplingParams(
        max_tokens=len(case.greedy[0]), temperature=0, ignore_eos=True, logprobs=20
    )
    engine.start()
    try:
        completions = generate(
            engine,
            [
                Request(f"r{i}", tuple(prompt), params, (AdapterChoice(adapter.digest),))
                for i, prompt in enumerate(case.prompts)
            ],
        )
    finally:
        engine.stop()
    worst = 0.0
    for completion, logits in zip(completions, case.logits, strict=True):
        expected = torch.log_softmax(logits[-1], dim=-1)
        for entry in completion.tokens[0].top_logprobs:
            worst = max(worst, abs(entry.logprob - float(expected[entry.token_id])))
    return worst, [completion.token_ids for completion in completions]
