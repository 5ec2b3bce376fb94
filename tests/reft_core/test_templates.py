"""Messages to tokens: an adapter's own template, the model's chat template, special tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from reft_core.errors import InvalidRequest
from reft_core.spec import TemplateSpec
from reft_core.templates import Message, encode_chat, encode_text, render_text

BOS, EOS = "<s>", "</s>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('system comes first') }}{% endif %}"
    "[{{ message.role }}]{{ message.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEMPLATE = TemplateSpec(
    system="S:{content};", user="U:{content};", assistant="A:{content};", generation="A:"
)


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE of bytes and one merge, which writes BOS before every text by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([BOS, EOS, *alphabet, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)
    fast.chat_template = chat_template
    return fast


def text_of(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([user("hi")], "U:hi;A:"),
        (
            [{"role": "system", "content": "s"}, user("u"), {"role": "assistant", "content": "a"}],
            "S:s;U:u;A:a;A:",
        ),
        ([user("")], "U:;A:"),
        # What a user writes is never a template.
        ([user("{content}")], "U:{content};A:"),
        ([user("a {content} b"), user("secret")], "U:a {content} b;U:secret;A:"),
        ([user("{{ 7 * 7 }} {system} %s \\1")], "U:{{ 7 * 7 }} {system} %s \\1;A:"),
    ],
)
def test_render_text(messages: list[Message], text: str) -> None:
    assert render_text(TEMPLATE, messages) == text


def test_other_braces_of_a_template_are_literal() -> None:
    template = TemplateSpec(user='{"q": "{content}"} {x}', generation="{content}")
    assert render_text(template, [user("{x}")]) == '{"q": "{x}"} {x}{content}'


@pytest.mark.parametrize(
    "hostile",
    [
        "{{ 7 * 7 }}",
        "{% for _ in range(10**9) %}x{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('x') }}{{ bos_token }}",
        "{0.__class__} %(content)s ${content!r} {contents} {content:>999999999} \\1",
    ],
)
def test_nothing_in_a_template_is_code(hostile: str) -> None:
    template = TemplateSpec(user=f"{hostile}[{{content}}]", generation=hostile)
    assert render_text(template, [user("{content}")]) == f"{hostile}[{{content}}]{hostile}"
    tokenizer = tiny_tokenizer()
    ids = encode_chat(tokenizer, [user("a")], template)
    assert text_of(tokenizer, ids) == f"{BOS}{hostile}[a]{hostile}"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "no place for it",
        "{content}{content}",
        "{Content}",
        "{ content }",
        5,
        None,
    ],
)
def test_a_line_without_exactly_one_place_is_refused(line: object) -> None:
    with pytest.raises(ValidationError):
        TemplateSpec(user=line)  # type: ignore[arg-type]


def test_other_fields_and_long_lines_are_refused() -> None:
    with pytest.raises(ValidationError):
        TemplateSpec(chat_template="{{ messages }}")  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        TemplateSpec(user="{content}" + "x" * 8192)


def test_a_template_makes_no_more_of_a_conversation_than_fits() -> None:
    """Kilobytes around each of many empty messages."""
    template = TemplateSpec(user="x" * 8000 + "{content}")
    render_text(template, [user("")] * 500)
    with pytest.raises(InvalidRequest, match="expected at most 4194304") as caught:
        render_text(template, [user("")] * 530)
    assert caught.value.field == "messages"


def test_an_adapters_template_comes_before_the_models() -> None:
    tokenizer = tiny_tokenizer()
    ids = encode_chat(tokenizer, [user("abc")], TEMPLATE)
    assert text_of(tokenizer, ids) == f"{BOS}U:abc;A:"
    assert ids == encode_text(tokenizer, "U:abc;A:")


def test_the_models_chat_template_asks_for_an_answer() -> None:
    tokenizer = tiny_tokenizer()
    messages: list[Message] = [{"role": "system", "content": "be ab"}, user("{content}")]
    ids = encode_chat(tokenizer, messages)
    expected = f"{BOS}[system]be ab{EOS}[user]{{content}}{EOS}[assistant]"
    assert text_of(tokenizer, ids) == expected


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_there_is_exactly_one_bos(template: TemplateSpec | None) -> None:
    """The chat template writes one; so the tokenizer must not add its own as well."""
    tokenizer = tiny_tokenizer()
    ids = encode_chat(tokenizer, [user("ab")], template)
    assert [i for i, token in enumerate(ids) if token == tokenizer.bos_token_id] == [0]


def test_encode_text_adds_what_the_tokenizer_adds() -> None:
    tokenizer = tiny_tokenizer()
    ids = encode_text(tokenizer, "xaby é")
    assert ids[0] == tokenizer.bos_token_id
    assert text_of(tokenizer, ids[1:]) == "xaby é"
    assert all(type(token) is int for token in ids)
    assert encode_text(tokenizer, "") == [tokenizer.bos_token_id]


def test_messages_are_not_changed() -> None:
    messages = [user("ab")]
    encode_chat(tiny_tokenizer(), messages)
    assert messages == [{"role": "user", "content": "ab"}]


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize(
    ("messages", "field", "message"),
    [
        ([], "messages", "messages: got [], expected at least one message"),
        (
            [user("a"), {"role": "tool", "content": "b"}],
            "messages[1].role",
            "messages[1].role: got 'tool', expected one of system, user, assistant",
        ),
        (
            [{"role": "User", "content": "b"}],
            "messages[0].role",
            "messages[0].role: got 'User', expected one of system, user, assistant",
        ),
    ],
)
def test_bad_conversations_are_refused(
    template: TemplateSpec | None, messages: list[Message], field: str, message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        encode_chat(tiny_tokenizer(), messages, template)
    assert caught.value.field == field
    assert str(caught.value) == message


def test_a_model_without_chat_template_needs_an_adapters() -> None:
    tokenizer = tiny_tokenizer(chat_template=None)
    with pytest.raises(InvalidRequest, match="messages: the base model has no chat template"):
        encode_chat(tokenizer, [user("ab")])
    assert text_of(tokenizer, encode_chat(tokenizer, [user("ab")], TEMPLATE)) == f"{BOS}U:ab;A:"


def test_a_refusal_by_the_chat_template_is_the_requests_fault() -> None:
    messages: list[Message] = [user("a"), {"role": "system", "content": "b"}]
    with pytest.raises(InvalidRequest, match=r"refused them \(system comes first"):
        encode_chat(tiny_tokenizer(), messages)
