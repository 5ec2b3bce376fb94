"""``POST /v1/classify``: which label is the likeliest answer."""

from __future__ import annotations

from fastapi import Request, Response
from transformers import PreTrainedTokenizerBase

from reft_core.engine.interface import SamplingParams
from reft_core.errors import InvalidRequest
from reft_core.spec import TemplateSpec
from reft_core.templates import encode_chat
from server.generation import FinishedChoice, Generation, Job
from server.protocol.classify import ClassifiedText, ClassifyRequest, ClassifyResponse
from server.protocol.common import ReftReport, Usage
from server.registry import Version
from server.routes.answering import answer_whole, new_id, now
from server.routes.guards import ApiRoute, make_router
from server.services import services_of

router = make_router(ApiRoute, tag="inference")


@router.post("/v1/classify", response_model=ClassifyResponse)
async def classify(body: ClassifyRequest, request: Request) -> Response:
    """Choose a label for each text by how likely the model finds it as the whole answer."""
    body.check(services_of(request).settings)
    labels: list[str] = []

    def encode(
        tokenizer: PreTrainedTokenizerBase, template: TemplateSpec | None
    ) -> list[list[int]]:
        return [
            encode_chat(tokenizer, [{"role": "user", "content": text}], template)
            for text in body.input
        ]

    def complete(
        tokenizer: PreTrainedTokenizerBase, version: Version | None
    ) -> list[tuple[int, ...]]:
        labels.extend(body.choose_labels(version.spec.task.labels if version else None))
        end = tokenizer.eos_token_id
        if end is None:
            raise InvalidRequest("model: its tokenizer has no end-of-text token", field="model")
        return [(*tokenizer(label, add_special_tokens=False)["input_ids"], end) for label in labels]

    def build(generation: Generation, choices: list[FinishedChoice]) -> ClassifyResponse:
        n = generation.n
        return ClassifyResponse(
            id=new_id("classify"),
            created=now(),
            model=body.model,
            data=[
                ClassifiedText.of(i, labels, choices[i * n : (i + 1) * n])
                for i in range(len(body.input))
            ],
            usage=Usage.of(generation),
            reft=ReftReport.of(generation),
        )

    params = SamplingParams(temperature=0, logprobs=0)
    return await answer_whole(request, Job(body.named, encode, params, complete=complete), build)
