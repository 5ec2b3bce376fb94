from __future__ import annotations

from benchmarks.spreads import spread, spread_of_ratios
from benchmarks.work import greedy_requests, random_adapter, random_prompts
from tests.factories import tiny_description


def test_spreads() -> None:
    assert spread([3, 1, 2.26], 1) == [1, 2.3, 3]
    assert spread_of_ratios([2, 9, 8], [1, 3, 2]) == [2, 3, 4]
    assert spread_of_ratios([1], [3], digits=4) == [0.3333] * 3


def test_prompts_are_the_same_every_time_and_inside_the_vocabulary() -> None:
    model = tiny_description()
    prompts = random_prompts(model, 4, 9)
    assert prompts == random_prompts(model, 4, 9)
    assert prompts != random_prompts(model, 4, 9, seed=1)
    assert [len(prompt) for prompt in prompts] == [9] * 4
    assert all(0 <= token < model.vocab_size for prompt in prompts for token in prompt)


def test_requests_use_adapters_in_turn() -> None:
    requests = greedy_requests([[1], [2], [3]], 5, ["x", "y"])
    assert [request.adapters[0].digest for request in requests] == ["x", "y", "x"]
    assert all(request.params.is_greedy and request.params.max_tokens == 5 for request in requests)
    assert not any(request.adapters for request in greedy_requests([[1]], 5))
    again = greedy_requests([[1]], 5)
    assert again[0].request_id not in {request.request_id for request in requests}


def test_adapters_differ_and_edit() -> None:
    model = tiny_description()
    one, other = (random_adapter(model, 2, seed, "l3", first_layer=1) for seed in (0, 1))
    assert one.digest != other.digest
    assert one.digest == random_adapter(model, 2, 0, "l3", first_layer=1).digest
    assert {key.layer for key in one.edits} == set(range(1, model.num_layers))
    assert all(edit.up.abs().max() > 0 for edit in one.edits.values())
