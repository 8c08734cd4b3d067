"""POST /predict: pictures in any of three bodies, told apart by their first bytes, answered by a trained model."""

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from app import registry
from app.api.deps import ServicesDep, parse_as, read_body, refuse_declared_size, strict_json
from app.api.openapi import problems
from app.api.problems import Problem, pointer_to
from app.api.schemas import (
    ClassScore,
    FailedPrediction,
    Prediction,
    Predictions,
    PredictRequest,
)
from app.db.engine import Database
from app.errors import FieldError, ImageRefused, InvalidRequest, TooLarge
from app.serving.predictor import Scores
from app.vision.images import sniff

DEFAULT_TOP_K = 5

# Options of the contract that this version does not have yet: asked for, they must not be passed over in silence.
LATER_OPTIONS = ("explain", "coverage", "neighbors", "adapt")

MAX_FORM_FIELDS = 20
_DATA_URL = re.compile(r"data:[\w.+/-]*(;[\w.+=-]*)*,", re.ASCII)

_HOW_TO = (
    "Send pictures as `-F file=@cat.jpg` (one or many), as raw bytes `--data-binary @cat.jpg`, or as JSON "
    '`{"images": [{"b64": "…"}]}`.'
)

router = APIRouter(tags=["prediction"])


@dataclass(frozen=True)
class Picture:
    """A picture as it came. encoded: its bytes, or why there are none."""

    filename: str | None
    encoded: bytes | ImageRefused


@dataclass(frozen=True)
class Asked:
    """What a request asks for, whichever body it had. model and top_k are None where the body does not say."""

    pictures: list[Picture]
    model: str | None = None
    top_k: int | None = None


@router.post(
    "/predict",
    response_model=Predictions,
    summary="Classify pictures",
    responses=problems(404, 408, 413),
    openapi_extra={
        "requestBody": {
            "required": True,
            "description": "Told apart by the first bytes; the Content-Type matters for multipart/form-data only.",
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["file"],
                        "properties": {
                            "file": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}},
                            "model": {"type": "string"},
                            "top_k": {"type": "integer", "minimum": 1, "maximum": 1000},
                        },
                    }
                },
                **{
                    f"image/{kind}": {"schema": {"type": "string", "format": "binary"}}
                    for kind in ("jpeg", "png", "webp")
                },
                "application/json": {
                    "schema": PredictRequest.model_json_schema(ref_template="#/components/schemas/{model}")
                },
            },
        }
    },
)
async def predict(
    request: Request,
    services: ServicesDep,
    model: Annotated[
        str | None, Query(min_length=1, max_length=100, description="A model's id or alias; `default` if left out.")
    ] = None,
    top_k: Annotated[
        int | None, Query(ge=1, le=1000, description=f"Classes per picture, best first; {DEFAULT_TOP_K} if left out.")
    ] = None,
) -> Predictions:
    asked = await _read(request, max_bytes=services.settings.max_predict_bytes)
    if len(asked.pictures) > services.settings.max_predict_images:
        raise InvalidRequest(
            f"{len(asked.pictures)} pictures are more than the {services.settings.max_predict_images} that one request "
            "may have; send several requests.",
            errors=[FieldError(pointer_to("images"), "too many")],
        )
    _refuse_large_single(asked.pictures, services.settings.max_image_bytes)
    name = model or asked.model or registry.DEFAULT_ALIAS
    model_id = await run_in_threadpool(_model_id, services.database, name)
    encoded = [picture.encoded for picture in asked.pictures if isinstance(picture.encoded, bytes)]
    outcomes = iter(await services.predictor.predict(model_id, encoded))
    results = [
        (picture, next(outcomes) if isinstance(picture.encoded, bytes) else picture.encoded)
        for picture in asked.pictures
    ]
    refused = [(picture, outcome) for picture, outcome in results if isinstance(outcome, ImageRefused)]
    services.metrics.count_predictions(answered=len(results) - len(refused), refused=len(refused))
    if len(refused) == len(results):
        raise _nothing_readable(refused)
    return Predictions(
        model=model_id,
        predictions=[
            _prediction(picture, outcome, top_k=top_k or asked.top_k or DEFAULT_TOP_K)
            if isinstance(outcome, Scores)
            else FailedPrediction(
                filename=picture.filename,
                error=Problem.of(_explained(picture, outcome)).document(
                    request_id=request.state.request_id, path=request.url.path
                ),
            )
            for picture, outcome in results
        ],
    )


def _model_id(database: Database, name: str) -> str:
    with database.read() as session:
        return registry.find(session, name).id


def _prediction(picture: Picture, scores: Scores, *, top_k: int) -> Prediction:
    top = [ClassScore(label=label, score=score) for label, score in scores.top(top_k)]
    return Prediction(filename=picture.filename, label=top[0].label, score=top[0].score, top=top)


def _explained(picture: Picture, refusal: ImageRefused) -> ImageRefused:
    """The short reason of the decoder as a sentence for the caller."""
    name = picture.filename or "The picture"
    return ImageRefused(f"{name} cannot be read: {refusal.detail}.", code=refusal.code, errors=refusal.errors)


def _nothing_readable(refused: list[tuple[Picture, ImageRefused]]) -> ImageRefused:
    explained = [_explained(picture, refusal) for picture, refusal in refused]
    detail = " ".join(error.detail for error in explained[:3])
    if len(explained) > 3:
        detail += f" None of the {len(explained)} pictures can be read."
    return ImageRefused(detail, errors=[field for error in explained for field in error.errors])


async def _read(request: Request, *, max_bytes: int) -> Asked:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        return await _read_form(request, max_bytes=max_bytes)
    body = await read_body(request, max_bytes=max_bytes)
    if not body:
        raise InvalidRequest(f"The request has no body. {_HOW_TO}")
    if sniff(body[:16]) is None and (body.lstrip()[:1] == b"{" or media_type == "application/json"):
        return await run_in_threadpool(_read_json, body)
    return Asked([Picture(filename=None, encoded=body)])


def _refuse_large_single(pictures: list[Picture], max_bytes: int) -> None:
    """One picture that is too large is a request that is too large; within a batch it fails in its own place."""
    encoded = pictures[0].encoded if len(pictures) == 1 else b""
    if isinstance(encoded, bytes) and len(encoded) > max_bytes:
        raise TooLarge(f"The picture is larger than the {max_bytes:,} bytes that are read here; send a smaller one.")


async def _read_form(request: Request, *, max_bytes: int) -> Asked:
    refuse_declared_size(request, max_bytes=max_bytes)
    counted = Request(request.scope, _counting(request.receive, max_bytes))
    pictures: list[Picture] = []
    fields: dict[str, str] = {}
    try:
        # The whole body is bounded, so a part need not be; large parts go to a temporary file, not into memory.
        async with counted.form(max_files=1000, max_fields=MAX_FORM_FIELDS) as form:
            for name, part in form.multi_items():
                if isinstance(part, UploadFile):
                    pictures.append(Picture(filename=_base_name(part.filename), encoded=await part.read()))
                else:
                    fields[name] = part
    except HTTPException as error:
        raise InvalidRequest(f"The form cannot be read: {error.detail} {_HOW_TO}") from None
    _refuse_later_options(fields)
    unknown = fields.keys() - {"model", "top_k"}
    if unknown:
        raise InvalidRequest(
            f"There is no field {', '.join(sorted(unknown))} here; known are: file, model, top_k. A picture's "
            "part needs a file name, as `-F file=@cat.jpg` gives it.",
            errors=[FieldError(pointer_to(name), "there is no such field") for name in sorted(unknown)],
        )
    if not pictures:
        raise InvalidRequest(f"The form has no picture. {_HOW_TO}", errors=[FieldError("#/file", "is required")])
    return Asked(pictures, model=fields.get("model") or None, top_k=_top_k(fields.get("top_k")))


def _counting(receive: Any, max_bytes: int) -> Any:
    received = 0

    async def counting() -> Any:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > max_bytes:
            raise TooLarge(f"The request's body is larger than the {max_bytes:,} bytes that are read here.")
        return message

    return counting


def _base_name(filename: str | None) -> str | None:
    """Only text for the answer; never a path of ours."""
    return re.split(r"[/\\]", filename)[-1] if filename else None


def _top_k(text: str | None) -> int | None:
    if text is None or text == "":
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= 1000):
        raise InvalidRequest("top_k: must be an integer from 1 to 1000", errors=[FieldError("#/top_k", "out of range")])
    return int(text)


def _read_json(body: bytes) -> Asked:
    content = strict_json(body)
    _refuse_later_options(content)
    asked = parse_as(PredictRequest, content)
    pictures = [
        Picture(filename=_base_name(image.filename), encoded=_decoded(image.b64, index))
        for index, image in enumerate(asked.images)
    ]
    return Asked(pictures, model=asked.model, top_k=asked.top_k)


def _decoded(text: str, index: int) -> bytes | ImageRefused:
    """Base64, bare or in a data URL; line breaks are fine, as `base64` writes them."""
    prefix = _DATA_URL.match(text)
    payload = "".join((text[prefix.end() :] if prefix else text).split())
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        return ImageRefused("not valid base64", errors=[FieldError(f"#/images/{index}/b64", "is not valid base64")])


def _refuse_later_options(fields: Any) -> None:
    asked = [name for name in LATER_OPTIONS if name in fields]
    if asked:
        raise InvalidRequest(
            f"This version of Graft does not have {', '.join(asked)} yet; leave it out.",
            errors=[FieldError(pointer_to(name), "is not there yet") for name in asked],
        )
