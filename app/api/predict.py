"""POST /predict: pictures in any of three bodies, told apart by their first bytes, answered by a trained model."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from app import registry
from app.api.classifiers import model_id_of
from app.api.deps import ServicesDep, unless_disconnected
from app.api.openapi import problems
from app.api.picture_bodies import Picture, form_content, read_pictures
from app.api.problems import Problem, pointer_to
from app.api.schemas import ClassScore, FailedPrediction, Prediction, Predictions, PredictRequest, TaskPrediction
from app.api.services import Services
from app.errors import FieldError, ImageRefused, InvalidRequest, TooLarge
from app.serving.predictor import Scores

DEFAULT_TOP_K = 5

router = APIRouter(tags=["prediction"])


@router.post(
    "/predict",
    response_model=Predictions,
    summary="Classify pictures",
    responses=problems(404, 408, 409, 413, 507),
    openapi_extra={
        "requestBody": {
            "required": True,
            "description": "Told apart by the first bytes; the Content-Type matters for multipart/form-data only.",
            "content": {
                **form_content(
                    {
                        "model": {"type": "string"},
                        "top_k": {"type": "integer", "minimum": 1, "maximum": 1000},
                        "store": {"type": "boolean"},
                    },
                    required=[],
                ),
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
    store: Annotated[
        bool | None, Query(description="Keep each picture and its prediction, under the `id` that is answered.")
    ] = None,
) -> Response:
    asked = await read_pictures(request, schema=PredictRequest, max_bytes=services.settings.max_predict_bytes)
    asked_top_k = _top_k(asked.fields.get("top_k"))
    is_to_store = _flag("store", asked.fields.get("store")) if store is None else store
    if is_to_store:
        services.shelf.check_is_open()
    if len(asked.pictures) > services.settings.max_predict_images:
        raise InvalidRequest(
            f"{len(asked.pictures)} pictures are more than the {services.settings.max_predict_images} that one request "
            "may have; send several requests.",
            errors=[FieldError(pointer_to("images"), "too many")],
        )
    _refuse_large_single(asked.pictures, services.settings.max_image_bytes)
    name = model or asked.fields.get("model") or registry.DEFAULT_ALIAS
    model_id = await model_id_of(services, name)
    encoded = [picture.encoded for picture in asked.pictures if isinstance(picture.encoded, bytes)]
    outcomes = iter(await unless_disconnected(request, services.predictor.predict(model_id, encoded)))
    results = [
        (picture, next(outcomes) if isinstance(picture.encoded, bytes) else picture.encoded)
        for picture in asked.pictures
    ]
    refused = [(picture, outcome) for picture, outcome in results if isinstance(outcome, ImageRefused)]
    services.metrics.count_predictions(answered=len(results) - len(refused), refused=len(refused))
    if len(refused) == len(results):
        raise _nothing_readable(refused)
    predictions = [
        _prediction(picture, outcome, top_k=top_k or asked_top_k or DEFAULT_TOP_K)
        if isinstance(outcome, Scores)
        else FailedPrediction(
            filename=picture.filename,
            error=Problem.of(_explained(picture, outcome)).document(
                request_id=request.state.request_id, path=request.url.path
            ),
        )
        for picture, outcome in results
    ]
    if is_to_store:
        alias = None if name == model_id else name
        predictions = await run_in_threadpool(_kept, services, model_id, alias, asked.pictures, predictions)
    answer = Predictions(model=model_id, predictions=predictions)
    # Written as it is: FastAPI would check once more what was just made, for a quarter of the event loop's time.
    return Response(answer.model_dump_json(), media_type="application/json")


def _prediction(picture: Picture, scores: Scores, *, top_k: int) -> Prediction:
    tasks = {task: TaskPrediction(**_best(of_task, top_k)) for task, of_task in scores.tasks.items()}
    return Prediction(filename=picture.filename, tasks=tasks or None, **_best(scores, top_k))


def _kept(
    services: Services,
    model_id: str,
    alias: str | None,
    pictures: Sequence[Picture],
    predictions: Sequence[Prediction | FailedPrediction],
) -> list[Prediction | FailedPrediction]:
    """The same, those of readable pictures with the id under which they are kept."""
    answered = [
        (picture.encoded, prediction)
        for picture, prediction in zip(pictures, predictions, strict=True)
        if isinstance(prediction, Prediction) and isinstance(picture.encoded, bytes)
    ]
    kept = iter(services.shelf.keep(model_id, alias, answered))
    return [next(kept) if isinstance(prediction, Prediction) else prediction for prediction in predictions]


def _best(scores: Scores, top_k: int) -> dict[str, Any]:
    top = [ClassScore(label=label, score=score) for label, score in scores.top(top_k)]
    return {"label": top[0].label, "score": top[0].score, "top": top}


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


def _refuse_large_single(pictures: list[Picture], max_bytes: int) -> None:
    """One picture that is too large is a request that is too large; within a batch it fails in its own place."""
    encoded = pictures[0].encoded if len(pictures) == 1 else b""
    if isinstance(encoded, bytes) and len(encoded) > max_bytes:
        raise TooLarge(f"The picture is larger than the {max_bytes:,} bytes that are read here; send a smaller one.")


def _flag(name: str, asked: str | bool | None) -> bool:
    """From a form as text, from JSON as it is."""
    if isinstance(asked, bool) or not asked:
        return bool(asked)
    if asked.lower() not in ("true", "false", "1", "0"):
        raise InvalidRequest(f"{name}: must be true or false", errors=[FieldError(pointer_to(name), "not a boolean")])
    return asked.lower() in ("true", "1")


def _top_k(asked: str | int | None) -> int | None:
    """From a form as text, from JSON as a checked number."""
    if isinstance(asked, int) or not asked:
        return asked or None
    text = asked
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= 1000):
        raise InvalidRequest("top_k: must be an integer from 1 to 1000", errors=[FieldError("#/top_k", "out of range")])
    return int(text)
