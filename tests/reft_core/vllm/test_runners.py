"""What the plugin tells vLLM's runners and compiler on a GPU, by the values they decide on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from reft_core.vllm import runner, runner_v2
from reft_core.vllm.admitted import Admitted, Use
from reft_core.vllm.apply import OPERATOR, Step
from reft_core.vllm.plan import Chunk
from reft_core.vllm.startup import splitting_at_edits


def params(prompt_len: int) -> Any:
    """Of a request with an adapter, on a prompt of this length."""
    extra_args = Admitted((Use("ab" * 32, 1.0),), (), prompt_len).to_extra_args()
    return SimpleNamespace(extra_args=extra_args)


class Ours:
    """What is armed of a runner, noting the steps it begins and ends."""

    def __init__(self) -> None:
        self.requests = {"a": (params(10), 10), "b": (params(4), 4)}
        self.begun: list[list[Chunk]] = []
        self.ended: list[list[Chunk]] = []
        self.forgotten: list[str] = []
        self.planner = SimpleNamespace(forget=self.forgotten.extend)

    def begin(self, chunks: list[Chunk]) -> Step:
        self.begun.append(chunks)
        return Step({}, [])

    def end(self, chunks: list[Chunk], step: Step) -> None:
        self.ended.append(chunks)


class BatchState(NamedTuple):
    req_ids: list[str]
    num_scheduled_tokens: Any
    idx_mapping_np: Any
    decode_graph_eligible: bool


@pytest.fixture
def second() -> Any:
    """The second runner, with three requests in slots 2, 0 and 1."""
    computed = np.array([6, 4, 3])
    return SimpleNamespace(
        _reft=Ours(), req_states=SimpleNamespace(num_computed_tokens_np=computed)
    )


def do_nothing(*_: Any) -> None:
    """As any of vLLM's functions."""


def gathered(*request_ids: str) -> tuple[BatchState, int]:
    slots = {"a": 2, "plain": 0, "b": 1}
    lengths = {"a": 3, "plain": 1, "b": 1}
    return (
        BatchState(
            list(request_ids),
            np.array([lengths[name] for name in request_ids]),
            np.array([slots[name] for name in request_ids]),
            True,
        ),
        1,
    )


def test_prompts_with_adapters_are_edited_and_keep_their_step_from_a_whole_graph(
    second: Any,
) -> None:
    """b has been read to its end."""
    gather = runner_v2.beginning_a_step(lambda *_: gathered("plain", "a", "b"))
    state, uniform_count = gather(second, None, False)
    (chunks,) = second._reft.begun
    assert chunks == [Chunk("a", second._reft.requests["a"][0], 10, 3, 1, 3)]
    assert state.decode_graph_eligible is False
    assert uniform_count is None
    assert runner_v2.ending_the_step(lambda _: "output")(second) == "output"
    assert runner_v2.ending_the_step(lambda _: "output")(second) == "output"
    assert second._reft.ended == [chunks]


def test_other_steps_stay_as_they_are(second: Any) -> None:
    found = gathered("plain", "b")
    assert runner_v2.beginning_a_step(lambda *_: found)(second, None, False) == found
    assert second._reft.begun == []


def test_the_second_runner_knows_requests_from_their_first_step_to_their_last(second: Any) -> None:
    new = [
        SimpleNamespace(req_id="c", sampling_params=params(7)),
        SimpleNamespace(req_id="d", sampling_params=SimpleNamespace(extra_args=None)),
        SimpleNamespace(req_id="e", sampling_params=None),
    ]
    runner_v2.noting_requests(do_nothing)(second, SimpleNamespace(scheduled_new_reqs=new))
    assert second._reft.requests.keys() == {"a", "b", "c"}
    assert second._reft.requests["c"] == (new[0].sampling_params, 7)
    runner_v2.forgetting(do_nothing)(second, SimpleNamespace(finished_req_ids={"a", "d"}))
    assert second._reft.requests.keys() == {"b", "c"}
    assert set(second._reft.forgotten) == {"a", "d"}


@pytest.mark.parametrize(
    ("chunks", "asked", "told"),
    [([1], {}, False), ([], {}, None), ([1], {"force_uniform_decode": True}, True)],
)
def test_prefills_of_one_token_are_no_uniform_decode(
    monkeypatch: pytest.MonkeyPatch, chunks: list[int], asked: dict[str, bool], told: bool | None
) -> None:
    monkeypatch.setattr(runner, "chunks_of", lambda _: chunks)
    decide = runner.never_full_graph_of_edits(
        lambda _, force_uniform_decode=None: force_uniform_decode
    )
    assert decide(None, **asked) is told


@pytest.mark.parametrize(
    ("before", "after"),
    [(["attention"], ["attention", OPERATOR]), ([OPERATOR], [OPERATOR]), ([], []), (None, None)],
)
def test_graphs_are_split_at_edits_where_they_are_split(
    before: list[str] | None, after: list[str] | None
) -> None:
    config = SimpleNamespace(splitting_ops=before)
    splitting_at_edits(lambda _: None)(config)
    assert config.splitting_ops == after
