"""How long requests take on our engine with an adapter, beside the same ones without.

Every round asks one prompt once of the base and once of each adapter, one request after the
other in an order that turns from round to round, so that a machine that slows down slows all of
them. A ratio is taken within a round; the first rounds, which warm up, do not count. Nothing of a
prompt is kept between requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np

from reft_core.adapter import Adapter
from reft_core.engine.generate import generate
from reft_core.engine.interface import AdapterChoice, Engine, Request, SamplingParams
from reft_core.loading import LoadedModel
from trainer.compare.answering import serving_base
from trainer.data import TokenisedExample

_BASE = ""
_WARM_UP = 2
_TOKENS = 24
"""Of every answer, whatever its text; fewer where the base's context ends."""


def measure(
    loaded: LoadedModel,
    adapters: Mapping[str, Adapter],
    rows: Sequence[TokenisedExample],
    num_requests: int,
) -> dict[str, Any]:
    """For each adapter ``first_token`` and ``speed``, as JSON values.

    Each holds the median and the quartiles, over ``num_requests`` prompts of ``rows``, of the
    adapter's time to the first token, or its tokens a second after that, over the base's.
    """
    prompts = list(islice(cycle(row.prompt for row in rows), num_requests + _WARM_UP))
    longest = max(map(len, prompts)) + max(a.num_virtual_tokens for a in adapters.values())
    num_tokens = min(_TOKENS, loaded.description.max_positions - longest)
    asked: dict[str, Adapter | None] = {_BASE: None, **adapters}
    names = list(asked)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    room = longest + num_tokens
    with serving_base(loaded, adapters.values(), room, prefix_cache_bytes=0) as engine:
        for number, prompt in enumerate(prompts):
            turn = number % len(names)
            for name in (*names[turn:], *names[:turn]):
                seconds[name].append(_seconds(engine, prompt, asked[name], num_tokens))
    base = np.array(seconds[_BASE][_WARM_UP:])  # (n, 2)
    found = {}
    for name in adapters:
        ratios = np.array(seconds[name][_WARM_UP:]) / base  # (n, 2)
        found[name] = {
            "first_token": _spread(ratios[:, 0]),
            "speed": _spread(1 / ratios[:, 1]),
        }
    return {"requests": num_requests, "tokens": num_tokens, "ratios": found}


def _seconds(
    engine: Engine, prompt: Sequence[int], adapter: Adapter | None, num_tokens: int
) -> tuple[float, float]:
    """To the first token of one answer, and from there to its last."""
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    chosen = () if adapter is None else (AdapterChoice(adapter.digest),)
    (completion,) = generate(engine, [Request("timed", tuple(prompt), params, chosen)])
    timings = completion.timings
    assert timings is not None, "a request that ends has its times"
    return timings.queue_s + timings.prefill_s, timings.decode_s


def _spread(ratios: np.ndarray[Any, Any]) -> dict[str, float]:
    low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return {"median": round(median, 4), "low": round(low, 4), "high": round(high, 4)}
