"""What may be said of a folder of `adapters` beside what it records."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from reft_core.errors import AdapterMismatch, InvalidRequest
from tests.reference.slow import reference_logits
from tests.reft_core.convert.adapterhub.cases import converted
from tests.reft_core.convert.support import load_case, options, tiny_base


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("lora", {"template": None}, "^template: got None"),
        ("lora", {"positions": "f1"}, "^positions: got 'f1', expected 'prompt'"),
        ("lora", {"method": "loreft"}, "^method: got 'loreft', expected 'lora'"),
        ("lora", {"activation": "relu"}, "^activation: got 'relu', expected 'identity'"),
        ("lora", {"layers": (1,)}, "^layers: "),
        ("series-houlsby", {"method": "lora"}, "^method: got 'lora', expected 'series_adapter'"),
        ("series-houlsby", {"activation": "relu"}, "^activation: got 'relu', expected 'silu'"),
        ("series-houlsby", {"anchor": "before_last"}, "^anchor: got"),
        ("prefix-pickle", {"phase": "all"}, "^phase: got 'all', expected nothing"),
        ("prefix-pickle", {"cap": "half"}, "^cap: got"),
    ],
)
def test_options_that_contradict_the_folder_are_named(
    name: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        converted(load_case("adapterhub", name), **given)


@pytest.mark.parametrize("name", ["lora", "series-houlsby", "parallel"])
def test_prompt_only_leaves_generated_tokens_alone(name: str) -> None:
    case = load_case("adapterhub", name)
    adapter = converted(case, phase="prompt")
    assert {site.phase for site in adapter.spec.sites.values()} == {"prompt"}
    prompt = case.prompts[-1]
    ours = reference_logits(tiny_base(), prompt, len(prompt), adapter)
    assert (ours - case.logits[-1]).abs().max() <= 1e-4
    longer = [*prompt, case.greedy[-1][0]]
    prompt_only, both = (
        reference_logits(tiny_base(), longer, len(prompt), used)[-1]
        for used in (adapter, converted(case))
    )
    assert (prompt_only - both).abs().max() > 0.1


@pytest.mark.parametrize("name", ["lora", "series-pfeiffer", "prefix-pickle"])
def test_the_other_methods_too_refuse_another_base_model(name: str) -> None:
    base = replace(options().base, hidden_size=32)
    with pytest.raises(AdapterMismatch, match=r"adapter_config\.json: hidden_size: got 24"):
        converted(load_case("adapterhub", name), base=base)
