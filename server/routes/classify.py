"""``POST /v1/classify``: which label fits a text best."""

from __future__ import annotations

from functools import partial

from fastapi import Request, Response

from server.answering.labelling import ChooseLabels, LabelJob
from server.http.disconnect import unless_gone
from server.protocol.classify import ClassifiedText, ClassifyRequest, ClassifyResponse
from server.protocol.reports import ReftReport, Usage
from server.routes.answering import ANSWERED, new_id, now, report_headers
from server.routes.guards import ApiRoute, caller_of, make_router
from server.services import services_of

router = make_router(ApiRoute, tag="inference")


@router.post("/v1/classify", response_model=ClassifyResponse, responses=ANSWERED)
async def classify(body: ClassifyRequest, request: Request) -> Response:
    """Choose a label for each text: by an encoder's trained head, or by how likely a causal
    model finds each label as its answer. A head trained on numbers says one instead.
    """
    services = services_of(request)
    body.check(services.settings)
    scores = services.text_generator is not None
    by_likelihood = partial(body.choose_labels, services.settings.max_open)
    choose: ChooseLabels = by_likelihood if scores else body.labels_beside_head
    job = LabelJob(body.named, body.texts, choose, caller_of(request))
    labelled = await unless_gone(request.receive, services.labeller.run(job))
    answer = ClassifyResponse(
        id=new_id("classify"),
        created=now(),
        model=body.model,
        data=[ClassifiedText.of(*each) for each in enumerate(labelled.outcomes)],
        usage=Usage.counted(
            labelled.num_prompt_tokens, labelled.num_label_tokens, labelled.num_cached_tokens
        ),
        reft=ReftReport.about(
            labelled.resolved.versions, labelled.num_edits, leads=labelled.resolved.leads
        ),
    )
    headers = report_headers(labelled.resolved.versions, labelled.num_edits)
    return Response(answer.model_dump_json(), media_type="application/json", headers=headers)
