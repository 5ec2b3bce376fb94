"""What a request's span says, by the semantic conventions for generative AI."""

from __future__ import annotations

from collections.abc import Sequence

from server.observability.record import RequestRecord
from server.observability.tracing.telemetry import Ended

PROVIDER = "reft-serve"
Value = str | bool | int | float | Sequence[str]

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/classify": "classify",
}


def operation_of(route: str) -> str | None:
    """The conventions' name of what a route does; None if it runs no model."""
    return _OPERATIONS.get(route)


def request_attributes(
    operation: str | None, ended: Ended, record: RequestRecord
) -> dict[str, Value]:
    """Attributes of a request's span. No prompt, answer or stop string is among them."""
    found: dict[str, Value | None] = {
        "http.request.method": ended.method,
        "http.route": ended.route,
        "http.response.status_code": ended.status,
        "error.type": record.error or (str(ended.status) if ended.status >= 400 else None),
    }
    if operation is not None:
        found |= {"gen_ai.operation.name": operation, "gen_ai.provider.name": PROVIDER}
    if operation is not None and record.model is not None:
        found |= _of_parameters(record) | _of_answer(record)
    return {name: value for name, value in found.items() if value is not None}


def _of_parameters(record: RequestRecord) -> dict[str, Value | None]:
    """What was asked for."""
    found: dict[str, Value | None] = {
        "gen_ai.request.model": record.model,
        "gen_ai.request.stream": record.is_stream or None,
        "gen_ai.request.choice.count": record.num_choices if record.num_choices != 1 else None,
    }
    if (params := record.params) is not None:
        found |= {
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": float(params.top_k) if params.top_k else None,
            "gen_ai.request.seed": params.seed,
            "gen_ai.request.presence_penalty": params.presence_penalty,
            "gen_ai.request.frequency_penalty": params.frequency_penalty,
        }
    return found


def _of_answer(record: RequestRecord) -> dict[str, Value | None]:
    """What came of it."""
    firsts = [c.first_token_at - c.submitted_at for c in record.choices if c.first_token_at]
    reasons = [c.finish_reason for c in record.choices if c.finish_reason]
    return {
        "gen_ai.response.id": record.response_id,
        "gen_ai.response.model": ",".join(record.adapters) or record.model,
        "gen_ai.response.finish_reasons": reasons or None,
        "gen_ai.response.time_to_first_chunk": (
            min(firsts) if firsts and record.is_stream else None
        ),
        "gen_ai.usage.input_tokens": record.num_prompt_tokens,
        "gen_ai.usage.output_tokens": record.num_completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.num_cached_tokens,
        "reft.adapters": list(record.adapters) or None,
        "reft.adapter.digests": list(record.digests) or None,
        "reft.edits": record.num_edits,
    }
