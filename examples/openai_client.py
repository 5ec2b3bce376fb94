"""What OpenAI's own client does with a server that `make demo` has started.

    python examples/openai_client.py

Each part stands for itself; docs/clients.md shows what they print.
"""

# %% A client
import asyncio
import base64
from pathlib import Path
from typing import Literal

import openai
import pydantic

URL = "http://127.0.0.1:8000/v1"
BASE = "SmolLM2-135M-Instruct"
client = openai.OpenAI(base_url=URL, api_key="unused")
print([model.id for model in client.models.list()])
print(client.models.retrieve("sentiment").reft["positions"])

# %% Chat, with an adapter and without
complaint = [{"role": "user", "content": "The soup was cold and the waiter shrugged."}]
for model in (BASE, "sentiment", "emoji"):
    answer = client.chat.completions.create(
        model=model, messages=complaint, temperature=0, max_tokens=12
    )
    print(model, repr(answer.choices[0].message.content), answer.choices[0].finish_reason)
    print("   edits:", answer.reft["num_edits"], "by", answer.reft["adapter"])

# %% A stream that ends with its usage
for chunk in client.chat.completions.create(
    model=BASE,
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    temperature=0,
    max_tokens=12,
    stream=True,
    stream_options={"include_usage": True},
):
    for choice in chunk.choices:
        print(choice.delta.content or "", end="|")
print("\n", chunk.usage.prompt_tokens, chunk.usage.completion_tokens, chunk.usage.total_tokens)

# %% Several choices, a seed, a stop string
answer = client.completions.create(
    model=BASE, prompt="Three colours: red,", n=2, seed=7, stop=["\n", "."], max_tokens=12
)
for text in answer.choices:
    print(text.index, repr(text.text), text.finish_reason)

# %% Log-probabilities
answer = client.chat.completions.create(
    model="sentiment", messages=complaint, logprobs=True, top_logprobs=3, max_tokens=1
)
for token in answer.choices[0].logprobs.content[0].top_logprobs:
    print(repr(token.token), round(token.logprob, 3))


# %% An answer that is an object
class Pet(pydantic.BaseModel):
    """What to answer with."""

    kind: Literal["cat", "dog"]
    legs: Literal[2, 3, 4]


answer = client.chat.completions.parse(
    model=BASE,
    messages=[{"role": "user", "content": "Which pet do you have? As JSON."}],
    response_format=Pet,
    temperature=0,
)
print(repr(answer.choices[0].message.parsed))

# %% This server's own options: strength, several models at once
half = {"reft": {"strength": 0.5}}
answer = client.chat.completions.create(
    model="sentiment", messages=complaint, temperature=0, max_tokens=12, extra_body=half
)
print(repr(answer.choices[0].message.content))
several = {"reft": {"models": [BASE, "sentiment", "intent"]}}
answer = client.chat.completions.create(
    model=BASE, messages=complaint, temperature=0, max_tokens=12, extra_body=several
)
for choice in answer.choices:
    print(choice.reft["model"], repr(choice.message.content))

# %% An adapter that the request brings (REFT_ALLOW_INLINE_ADAPTERS=true)
file = Path("examples/emoji/emoji.safetensors").read_bytes()
inline = {"reft": {"inline": base64.b64encode(file).decode()}}
try:
    answer = client.chat.completions.create(
        model=BASE, messages=complaint, temperature=0, max_tokens=12, extra_body=inline
    )
    print(repr(answer.choices[0].message.content), answer.reft["adapter"])
except openai.BadRequestError as error:
    print(error.code, error.param)


# %% 64 streams at once
async def ask(client: openai.AsyncOpenAI, place: int) -> str:
    """The whole text of one stream."""
    model = ("sentiment", "intent", "emoji", BASE)[place % 4]
    stream = await client.chat.completions.create(
        model=model, messages=complaint, temperature=0, max_tokens=8, stream=True
    )
    return "".join(
        [choice.delta.content or "" async for chunk in stream for choice in chunk.choices]
    )


async def together() -> list[str]:
    """All of them."""
    async with openai.AsyncOpenAI(base_url=URL, api_key="unused") as client:
        return await asyncio.gather(*(ask(client, place) for place in range(64)))


texts = asyncio.run(together())
print(len(texts), "streams;", [repr(text) for text in sorted(set(texts))])

# %% Errors
for wrong in ({"model": "nope"}, {"temperature": 9}, {"tool_choice": "required"}, {"n": 99}):
    try:
        client.chat.completions.create(**({"model": BASE, "messages": complaint} | wrong))
    except openai.APIStatusError as error:
        print(type(error).__name__, error.status_code, error.code, error.param)
        print("  ", error.body["message"][:100])
