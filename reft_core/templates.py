"""Chat messages to prompt tokens: one function, used by training and by serving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from reft_core.errors import InvalidRequest
from reft_core.spec import TemplateSpec

Message = Mapping[str, str]
"""``role`` (system, user or assistant) and ``content``."""

ROLES = ("system", "user", "assistant")

MAX_RENDERED_CHARS = 4 * 1024 * 1024
"""Most text that an adapter's template may make of a conversation: it comes from a stranger, and
what it writes around each of many empty messages is in no request's body."""


def render_text(template: TemplateSpec, messages: Sequence[Message]) -> str:
    """The prompt text an adapter's own template makes of ``messages``.

    Nothing in the template is code, and nothing in a message is a template. Raises
    :class:`InvalidRequest` for more than :data:`MAX_RENDERED_CHARS`.
    """
    length = sum(len(getattr(template, m["role"])) + len(m["content"]) for m in messages)
    if length > MAX_RENDERED_CHARS:
        raise InvalidRequest.because(
            "messages",
            f"{length} characters with the adapter's template",
            f"at most {MAX_RENDERED_CHARS}",
        )
    lines = [getattr(template, m["role"]).replace("{content}", m["content"]) for m in messages]
    return "".join(lines) + template.generation


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template: TemplateSpec | None = None,
) -> list[int]:
    """Prompt token ids of a conversation that the model is to answer.

    Uses ``template`` if given, else the tokenizer's own chat template. Raises
    :class:`InvalidRequest` for an empty conversation, an unknown role, or a base model
    that has no chat template.
    """
    if not messages:
        raise InvalidRequest.because("messages", [], "at least one message")
    for index, message in enumerate(messages):
        if message["role"] not in ROLES:
            raise InvalidRequest.because(
                f"messages[{index}].role", message["role"], "one of " + ", ".join(ROLES)
            )
    if template is not None:
        return encode_text(tokenizer, render_text(template, messages))
    if not tokenizer.chat_template:
        raise InvalidRequest(
            "messages: the base model has no chat template; use /v1/completions, or an adapter "
            "that brings a template",
            field="messages",
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template's own raise_exception arrives as a jinja2 error
        raise InvalidRequest(
            f"messages: the base model's chat template refused them ({error})", field="messages"
        ) from error
    # The template has written the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a plain prompt, with the special tokens the tokenizer adds by itself."""
    return list(tokenizer(text)["input_ids"])


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, text: str, text_pair: str | None = None
) -> tuple[list[int], list[int]]:
    """Token ids of a text, or of a pair, and the segment of each token: 0, or 1 of the second.

    All segments are 0 with a tokenizer that tells them apart by its special tokens alone.
    """
    encoded = tokenizer(text, text_pair)
    tokens = list(encoded["input_ids"])
    return tokens, list(encoded.get("token_type_ids", [0] * len(tokens)))
