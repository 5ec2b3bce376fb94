"""Run a list of requests to the end and collect their tokens. For scripts, evaluation, tests."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass, field

from reft_core.engine.interface import Engine, FinishReason, Output, Request, Timings, Token
from reft_core.errors import EngineOverloaded


@dataclass
class Completion:
    """Everything one request produced."""

    tokens: list[Token] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    timings: Timings | None = None
    num_edits: int = 0
    prompt_logprobs: tuple[Token | None, ...] = ()
    """See :attr:`Output.prompt_logprobs`."""

    @property
    def token_ids(self) -> list[int]:
        """The generated ids, a stop token included."""
        return [token.token_id for token in self.tokens]


def generate(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """Completions of ``requests``, in their order; the engine must have been started.

    Submits as fast as the engine's queue takes them. Raises the first error that ends a
    request, after cancelling the others.
    """
    outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
    completions = {request.request_id: Completion() for request in requests}
    assert len(completions) == len(requests), "request ids must be unique"
    todo = list(reversed(requests))
    num_open = 0
    try:
        while todo or num_open:
            while todo:
                try:
                    ticket = engine.submit(todo[-1], outputs.put)
                except EngineOverloaded:
                    if num_open == 0:
                        raise
                    break
                completions[ticket.request_id].num_edits = ticket.num_edits
                todo.pop()
                num_open += 1
            output = outputs.get()
            completion = completions[output.request_id]
            if output.error is not None:
                raise output.error
            if output.token is not None:
                completion.tokens.append(output.token)
            completion.prompt_logprobs += output.prompt_logprobs
            if output.finish_reason is not None:
                completion.finish_reason = output.finish_reason
                completion.timings = output.timings
                num_open -= 1
    except BaseException:
        for request in requests:
            engine.cancel(request.request_id)
        raise
    return list(completions.values())
