"""POST /predict: pictures in any of three bodies, told apart by their first bytes, answered by a trained model."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Receive, Scope, Send

from app import registry
from app.api import failures
from app.api.answers import answer, check_has_reference, coverage_of, plan_of
from app.api.classifiers import loaded_of, refuse_large_single
from app.api.deps import ServicesDep, refuse_unknown, unless_disconnected
from app.api.openapi import options_of, problems, query_of
from app.api.picture_bodies import Picture, form_content, read_pictures
from app.api.problems import Problem, pointer_to
from app.api.schemas import FailedPrediction, Prediction, Predictions, PredictOptions, PredictRequest
from app.api.services import Services
from app.api.strict_json import parse_as
from app.errors import FieldError, ImageRefused, InvalidRequest
from app.serving.adaptation import Plan
from app.serving.loaded import LoadedModel
from app.serving.scores import Adapted, Scores

router = APIRouter(tags=["prediction"])


class Shortcut:
    """From the gate straight to `predict`: what FastAPI does on the way, for any route, is a third of what the event
    loop spends on a small picture. ASGI; the innermost of what stands before the router."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/predict" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        (scope["route"],) = router.routes
        try:
            response = await predict(Request(scope, receive, send), scope["state"]["services"])
        except failures.EXPECTED as error:
            response = await failures.expected_failure(Request(scope), error)
        await response(scope, receive, send)


@router.post(
    "/predict",
    response_model=Predictions,
    summary="Classify pictures",
    responses=problems(404, 408, 409, 413, 507),
    openapi_extra={
        **query_of(PredictOptions),
        "requestBody": {
            "required": True,
            "description": "Told apart by the first bytes; the Content-Type matters for multipart/form-data only.",
            "content": {
                **form_content(options_of(PredictOptions), required=[]),
                **{
                    f"image/{kind}": {"schema": {"type": "string", "format": "binary"}}
                    for kind in ("jpeg", "png", "webp")
                },
                "application/json": {
                    "schema": PredictRequest.model_json_schema(ref_template="#/components/schemas/{model}")
                },
            },
        },
    },
)
async def predict(request: Request, services: ServicesDep) -> Response:
    # Written as it is: FastAPI would check once more what was just made, for a quarter of the event loop's time.
    return Response((await answered(request, services)).model_dump_json(), media_type="application/json")


async def answered(request: Request, services: Services) -> Predictions:
    """What is said of the pictures in the request's body, with the options in its query and body."""
    refuse_unknown(request.query_params, PredictOptions.model_fields)
    asked = await read_pictures(request, schema=PredictRequest, max_bytes=services.settings.max_predict_bytes)
    options = _options(request.query_params, asked.fields)
    plan = plan_of(options)
    if options.store:
        services.shelf.check_is_open()
    if len(asked.pictures) > services.settings.max_predict_images:
        raise InvalidRequest(
            f"{len(asked.pictures)} pictures are more than the {services.settings.max_predict_images} that one request "
            "may have; send several requests.",
            errors=[FieldError(pointer_to("images"), "too many")],
        )
    refuse_large_single([picture.encoded for picture in asked.pictures], services.settings.max_image_bytes)
    name = options.model or registry.DEFAULT_ALIAS
    loaded = await loaded_of(services, name)
    check_has_reference(loaded, options)
    encoded = [picture.encoded for picture in asked.pictures if isinstance(picture.encoded, bytes)]
    with services.traffic.predicting(services.workspace, len(asked.pictures)):
        predicting = services.predictor.predict(loaded, encoded, are_compared=True)
        outcomes = iter(await unless_disconnected(request, predicting))
    results = [
        (picture, next(outcomes) if isinstance(picture.encoded, bytes) else picture.encoded)
        for picture in asked.pictures
    ]
    refused = [(picture, outcome) for picture, outcome in results if isinstance(outcome, ImageRefused)]
    services.metrics.count_predictions(answered=len(results) - len(refused), refused=len(refused))
    if len(refused) == len(results):
        raise _nothing_readable(refused)
    answers = iter(await _answers(request, services, loaded, results, options, plan))
    predictions = [
        next(answers)
        if isinstance(outcome, Scores)
        else FailedPrediction(
            filename=picture.filename,
            error=Problem.of(_explained(picture, outcome)).document(
                request_id=request.state.request_id, path=request.url.path
            ),
        )
        for picture, outcome in results
    ]
    if options.store:
        alias = None if name == loaded.id else name
        predictions = await run_in_threadpool(_kept, services, loaded.id, alias, results, predictions)
    return Predictions(model=loaded.id, coverage=coverage_of(loaded, options), predictions=predictions)


Results = Sequence[tuple[Picture, Scores | ImageRefused]]


def _options(in_query: Mapping[str, Any], in_body: Mapping[str, Any]) -> PredictOptions:
    """The query goes before the body; a form's fields are text, and empty ones count as left out."""
    given = {name: value for name, value in in_body.items() if value != ""}
    return parse_as(PredictOptions, given | dict(in_query))


async def _answers(
    request: Request,
    services: Services,
    loaded: LoadedModel,
    results: Results,
    options: PredictOptions,
    plan: Plan | None,
) -> list[Prediction]:
    """What is said of each picture that could be read, by copies tuned as planned or by the model itself."""
    read = [(picture, scores) for picture, scores in results if isinstance(scores, Scores)]
    encoded = [picture.encoded for picture, _ in read if isinstance(picture.encoded, bytes)]
    adapted: Sequence[Adapted | None] = [None] * len(read)
    if plan is not None:
        own = [scores for _, scores in read]
        adapted = await unless_disconnected(request, services.predictor.adapt(loaded, encoded, own, plan))
    explanations: Sequence[bytes | None] = [None] * len(read)
    if options.explain:
        labels = [(copy.scores if copy else scores).best for (_, scores), copy in zip(read, adapted, strict=True)]
        explanations = await unless_disconnected(request, services.predictor.explain(loaded, encoded, labels))
    return [
        answer(scores, loaded, options, adapted=copy, filename=picture.filename, explanation=explanation)
        for (picture, scores), copy, explanation in zip(read, adapted, explanations, strict=True)
    ]


def _kept(
    services: Services,
    model_id: str,
    alias: str | None,
    results: Results,
    predictions: Sequence[Prediction | FailedPrediction],
) -> list[Prediction | FailedPrediction]:
    """The same, those of readable pictures with the id under which they are kept."""
    answered = [
        (picture.encoded, own, prediction)
        for (picture, own), prediction in zip(results, predictions, strict=True)
        if isinstance(prediction, Prediction) and isinstance(picture.encoded, bytes) and isinstance(own, Scores)
    ]
    kept = iter(services.shelf.keep(services.workspace, model_id, alias, answered))
    return [next(kept) if isinstance(prediction, Prediction) else prediction for prediction in predictions]


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
