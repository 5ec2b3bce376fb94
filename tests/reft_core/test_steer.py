"""Steering vectors are the difference of what two sets of prompts make of a state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reft_core.adapter import EditKey, decode_adapter
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.generate import generate
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.errors import InvalidRequest
from reft_core.steer import steer
from tests.factories import NUM_LAYERS, assert_close, random_prompt, tiny_loaded, tiny_model

POSITIVE = [random_prompt(length, seed=length) for length in (4, 7, 9)]
NEGATIVE = [random_prompt(length, seed=20 + length) for length in (5, 6)]


def means(family: str, prompts: list[tuple[int, ...]], layer: int, positions: list[int]) -> Tensor:
    """Mean over positions, then prompts, of a layer's output in transformers' own forward."""
    model = tiny_model(family)
    states = []
    for prompt in prompts:
        output = model(torch.tensor([prompt]), output_hidden_states=True, use_cache=False)
        states.append(output.hidden_states[layer + 1][0, positions].mean(0))
    return torch.stack(states).mean(0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("read", "positions"), [("l1", [-1]), ("f2", [0, 1]), ("0,-2", [0, -2])])
def test_the_vector_is_the_difference_of_means(
    family: str, read: str, positions: list[int]
) -> None:
    data = steer(
        tiny_loaded(family), POSITIVE, NEGATIVE, name="mood", layers=(0, 2), read=read, phase="all"
    )
    adapter = decode_adapter(data)
    assert adapter.spec.method == "steering"
    assert adapter.spec.sites["block_output"].phase == "all"
    assert str(adapter.rule) == "prompt"
    assert adapter.spec.training.data["positive_rows"] == 3
    assert set(adapter.edits) == {EditKey(layer, "block_output", 0) for layer in (0, 2)}
    for layer in (0, 2):
        shift = adapter.edits[EditKey(layer, "block_output", 0)].shift
        assert shift is not None
        expected = means(family, POSITIVE, layer, positions) - means(
            family, NEGATIVE, layer, positions
        )
        assert_close(shift, expected, tolerance=1e-4)


def test_steered_to_a_prompt_the_model_answers_as_to_that_one() -> None:
    """At the last layer and position, one prompt's state plus the difference is the other's."""
    one, other = POSITIVE[0], NEGATIVE[0]
    loaded = tiny_loaded()
    data = steer(loaded, [one], [other], name="pull", layers=(NUM_LAYERS - 1,), positions="l1")
    adapter = decode_adapter(data)
    engine = EmbeddedEngine(loaded, EngineConfig(max_model_len=32))
    engine.load_adapter(adapter)
    params = SamplingParams(max_tokens=1, temperature=0)
    engine.start()
    answers = generate(
        engine,
        [
            Request("one", one, params),
            Request("other", other, params),
            Request("steered", other, params, (AdapterChoice(adapter.digest),)),
            Request("back", one, params, (AdapterChoice(adapter.digest, -1.0),)),
        ],
    )
    engine.stop()
    tokens = [answer.token_ids for answer in answers]
    assert tokens[2] == tokens[0] != tokens[1] == tokens[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive": []}, "positive: got 0, expected at least one prompt"),
        ({"negative": POSITIVE}, "expected other prompts"),
        ({"negative": [(5,)], "read": "3"}, r"negative\[0\]: got '1 tokens'"),
        ({"negative": [(5,) * 257]}, "at most 256"),
        ({"layers": (9,)}, "layers"),
        ({"sites": ("nowhere",)}, "sites"),
        ({"read": "middle"}, "positions"),
    ],
)
def test_what_cannot_be_is_named(change: dict, message: str) -> None:
    options = {"positive": POSITIVE, "negative": NEGATIVE, "name": "mood", "layers": (0,)}
    with pytest.raises(InvalidRequest, match=message):
        steer(tiny_loaded(), **(options | change))
