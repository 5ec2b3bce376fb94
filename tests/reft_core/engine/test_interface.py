"""Sampling parameters and the engine's settings refuse values outside their range."""

from __future__ import annotations

import math
from typing import Any

import pytest

from reft_core.engine.config import EngineConfig
from reft_core.engine.interface import MAX_LOGPROBS, SamplingParams
from reft_core.errors import InvalidRequest


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_tokens": 1, "temperature": 0, "top_p": 1e-9, "top_k": 0, "min_p": 0},
        {"max_tokens": 1_000_000, "temperature": 2, "top_p": 1, "min_p": 1},
        {"repetition_penalty": 10, "presence_penalty": -2, "frequency_penalty": 2},
        {"logit_bias": {3: -100, 4: 100.0}, "logprobs": MAX_LOGPROBS},
        {"seed": 0, "logprobs": 0},
        {"seed": 2**63 - 1},
        {"seed": -(2**63 - 1)},
    ],
)
def test_sampling_params_accept(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    assert {name: getattr(params, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("max_tokens", -1, "from 0 to 1000000"),
        ("max_tokens", 1_000_001, "from 0 to 1000000"),
        ("temperature", -0.1, "from 0 to 2"),
        ("temperature", 2.1, "from 0 to 2"),
        ("top_p", 0, "above 0 up to 1"),
        ("top_p", 1.1, "above 0 up to 1"),
        ("top_k", -1, "from 0 to 10000000"),
        ("min_p", -0.1, "from 0 to 1"),
        ("min_p", 1.1, "from 0 to 1"),
        ("repetition_penalty", 0, "above 0 up to 10"),
        ("repetition_penalty", 10.1, "above 0 up to 10"),
        ("presence_penalty", -2.1, "from -2 to 2"),
        ("frequency_penalty", 2.1, "from -2 to 2"),
        ("seed", 2**63, "from -9223372036854775807 to 9223372036854775807"),
        ("logprobs", -1, f"from 0 to {MAX_LOGPROBS}"),
        ("logprobs", MAX_LOGPROBS + 1, f"from 0 to {MAX_LOGPROBS}"),
        *(
            (field, math.nan, "a number")
            for field in ("temperature", "top_p", "min_p", "repetition_penalty")
        ),
        # A fraction of a token would never be reached, and the request never end.
        ("max_tokens", 1.5, "from 0 to 1000000"),
        ("top_k", 1.5, "from 0 to 10000000"),
        ("seed", 1.5, "from -9223372036854775807 to 9223372036854775807"),
        ("logprobs", 1.5, f"from 0 to {MAX_LOGPROBS}"),
    ],
)
def test_sampling_params_refuse(field: str, value: float, allowed: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: got {value}, expected ")
    assert allowed in str(caught.value)


@pytest.mark.parametrize("bias", [-100.1, 101, math.nan])
def test_logit_bias_names_its_token(bias: float) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(logit_bias={5: 1.0, 17: bias})
    assert str(caught.value) == f"logit_bias[17]: got {bias}, expected a number from -100 to 100"


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (0.0, True), (1e-6, False)])
def test_zero_temperature_is_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).is_greedy == greedy


@pytest.mark.parametrize(
    "field", ["max_model_len", "max_num_seqs", "max_waiting", "max_prefill_tokens", "num_threads"]
)
@pytest.mark.parametrize("value", [0, -1])
def test_engine_config_refuses(field: str, value: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        EngineConfig(**{field: value})
    assert caught.value.field == field
    assert str(caught.value) == f"{field}: got {value}, expected at least 1"
    assert getattr(EngineConfig(**{field: 1}), field) == 1
