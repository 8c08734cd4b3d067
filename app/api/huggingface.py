"""POST /hf/{model}: image classification as Hugging Face's `InferenceClient` sends it and expects it answered."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from app.api.classifiers import loaded_of, scores_of
from app.api.data_urls import bytes_of
from app.api.deps import ServicesDep, read_body, unless_disconnected
from app.api.openapi import json_request, problems
from app.api.schemas import DEFAULT_TOP_K, ClassScore
from app.api.strict_json import parse_as, strict_json
from app.errors import FieldError, ImageRefused, InvalidRequest
from app.serving.scores import Scores
from app.vision.images import sniff

# The least normal number of 32 bits: below it the network says nothing any more, and 0 has no logarithm.
LEAST_SCORE = 2.0**-126

router = APIRouter(tags=["hugging face"])


class ClassificationParameters(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    top_k: Annotated[int, Field(ge=1)] | None = Field(None, description=f"{DEFAULT_TOP_K} if left out.")
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = Field(
        None,
        description="softmax (the default): calibrated scores that sum to 1. none: their logits, which are the "
        "logarithms of these scores, less their mean. sigmoid: of these logits, each class by itself.",
    )


class ClassificationRequest(BaseModel):
    """The JSON form of POST /hf/{model}."""

    model_config = ConfigDict(extra="forbid", strict=True)

    inputs: Annotated[
        str, Field(json_schema_extra={"minLength": 1}, description="The picture in base64, or as a data URL.")
    ]
    parameters: ClassificationParameters | None = None
    options: dict[str, Any] | None = Field(None, description="Of the hosted service, such as use_cache; passed over.")


@router.post(
    "/hf/{model}",
    response_model=list[ClassScore],
    summary="Classify a picture",
    description="The best classes first.",
    responses=problems(404, 408, 409, 413),
    openapi_extra={
        "requestBody": {
            "required": True,
            "description": "A picture as it is, or JSON; told apart by the first bytes, whatever the Content-Type.",
            "content": {
                **json_request(ClassificationRequest)["requestBody"]["content"],
                **{
                    f"image/{kind}": {"schema": {"type": "string", "format": "binary"}}
                    for kind in ("jpeg", "png", "webp")
                },
            },
        }
    },
)
async def classify(
    request: Request,
    services: ServicesDep,
    model: Annotated[str, Path(max_length=100, description="A model's id or alias.")],
) -> list[ClassScore]:
    loaded = await loaded_of(services, model)
    body = await read_body(request, max_bytes=services.settings.max_predict_bytes)
    picture, parameters = await run_in_threadpool(_read, body)
    [outcome] = await unless_disconnected(request, scores_of(services, loaded, [picture]))
    if isinstance(outcome, ImageRefused):
        raise ImageRefused(f"The picture cannot be read: {outcome.detail}.", code=outcome.code, errors=outcome.errors)
    return ranked(outcome, parameters)


def ranked(scores: Scores, parameters: ClassificationParameters) -> list[ClassScore]:
    """The best classes first, with the values that were asked for."""
    values = scores.values
    if parameters.function_to_apply in ("none", "sigmoid"):
        values = _logits(values)
    if parameters.function_to_apply == "sigmoid":
        values = [1 / (1 + math.exp(-logit)) for logit in values]
    # Each of these functions grows with the score, so the order is the same.
    best = Scores(scores.classes, values).top(parameters.top_k or DEFAULT_TOP_K)
    return [ClassScore(label=label, score=value) for label, value in best]


def _read(body: bytes) -> tuple[bytes, ClassificationParameters]:
    if not body:
        raise InvalidRequest('The request has no body; send a picture, or JSON such as {"inputs": "<base64>"}.')
    if sniff(body[:16]) is not None or body.lstrip()[:1] != b"{":
        return body, ClassificationParameters()
    asked = parse_as(ClassificationRequest, strict_json(body))
    try:
        picture = bytes_of(asked.inputs)
    except ValueError:
        detail = "must be a picture in base64, or as a data URL"
        raise InvalidRequest(f"inputs {detail}.", errors=[FieldError("#/inputs", detail)]) from None
    return picture, asked.parameters or ClassificationParameters()


def _logits(probabilities: Sequence[float]) -> list[float]:
    """A softmax forgets what is added to all of its logits: their mean is taken as 0, as weight decay leaves it."""
    logarithms = [math.log(max(probability, LEAST_SCORE)) for probability in probabilities]
    mean = sum(logarithms) / len(logarithms)
    return [logarithm - mean for logarithm in logarithms]
