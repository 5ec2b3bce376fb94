"""Seeds of requests whose prompts are read in chunks, on a CPU.

vLLM draws a token at the end of every chunk, throws those of unfinished prompts away, and takes
their generators back by an offset, which generators of a CPU have not: the worker would die. Here
they get back the state they had.
"""

from __future__ import annotations

from functools import wraps
from typing import Any


def _unwanted(runner: Any) -> dict[int, Any]:
    """Generators, by row, of the CPU's requests whose token of this step is thrown away."""
    batch = runner.input_batch
    discarded = runner.discard_request_mask.np[: batch.num_reqs]
    return {
        row: generator
        for row, generator in batch.generators.items()
        if generator.device.type == "cpu" and row < len(discarded) and discarded[row]
    }


def rewinding(sample: Any) -> Any:
    """``GPUModelRunner._sample`` after which those generators are as before."""

    @wraps(sample)
    def sample_and_rewind(runner: Any, *args: Any, **kwargs: Any) -> Any:
        states = [(generator, generator.get_state()) for generator in _unwanted(runner).values()]
        output = sample(runner, *args, **kwargs)
        for generator, state in states:
            generator.set_state(state)
        return output

    return sample_and_rewind


def sparing(bookkeeping: Any) -> Any:
    """``GPUModelRunner._bookkeeping_sync`` that does not see those generators."""

    @wraps(bookkeeping)
    def keep_books(runner: Any, *args: Any, **kwargs: Any) -> Any:
        generators, unwanted = runner.input_batch.generators, _unwanted(runner)
        for row in unwanted:
            del generators[row]
        try:
            return bookkeeping(runner, *args, **kwargs)
        finally:
            generators.update(unwanted)

    return keep_books
