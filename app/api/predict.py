"""POST /predict: pictures in any of three bodies, told apart by their first bytes, answered by a trained model."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from app import registry
from app.api.answers import DEFAULT_TOP_K, answer, check_has_reference, coverage_of, plan_of
from app.api.classifiers import model_id_of, refuse_large_single
from app.api.deps import ServicesDep, unless_disconnected
from app.api.openapi import problems
from app.api.picture_bodies import Picture, form_content, read_pictures
from app.api.problems import Problem, pointer_to
from app.api.schemas import FailedPrediction, Prediction, Predictions, PredictOptions, PredictRequest
from app.api.services import Services
from app.api.strict_json import parse_as
from app.errors import FieldError, ImageRefused, InvalidRequest
from app.serving.adaptation import Method, Parameters, Plan
from app.serving.predictor import Adapted, LoadedModel, Scores

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
                        "explain": {"type": "boolean"},
                        "coverage": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
                        "neighbors": {"type": "integer", "minimum": 1, "maximum": 50},
                        "adapt": {"type": "string", "enum": ["neighbors", "entropy"]},
                        "adapt_parameters": {"type": "string", "enum": ["head", "normalisation", "all"]},
                        "adapt_steps": {"type": "integer", "minimum": 1, "maximum": 50},
                        "adapt_learning_rate": {"type": "number", "exclusiveMinimum": 0, "maximum": 1000},
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
    explain: Annotated[bool | None, Query(description="Show where in the picture the label was seen.")] = None,
    coverage: Annotated[
        float | None,
        Query(gt=0, lt=1, description="Add a set of classes that holds the true one with this probability."),
    ] = None,
    neighbors: Annotated[
        int | None, Query(ge=1, le=50, description="Add so many of the training pictures that are most like it.")
    ] = None,
    adapt: Annotated[
        Method | None,
        Query(description="Tune a copy of the model to each picture before it answers; the model stays as it is."),
    ] = None,
    adapt_parameters: Annotated[
        Parameters | None,
        Query(description="What is tuned: head by neighbors; normalisation, the usual, or all by entropy."),
    ] = None,
    adapt_steps: Annotated[int | None, Query(ge=1, le=50, description="Gradient steps.")] = None,
    adapt_learning_rate: Annotated[float | None, Query(gt=0, le=1000, description="Of these steps.")] = None,
) -> Response:
    asked = await read_pictures(request, schema=PredictRequest, max_bytes=services.settings.max_predict_bytes)
    in_query: dict[str, Any] = {"model": model, "top_k": top_k, "store": store}
    in_query |= {"explain": explain, "coverage": coverage, "neighbors": neighbors}
    in_query |= {"adapt": adapt, "adapt_parameters": adapt_parameters}
    in_query |= {"adapt_steps": adapt_steps, "adapt_learning_rate": adapt_learning_rate}
    options = _options(in_query, asked.fields)
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
    model_id = await model_id_of(services, name)
    loaded = await services.predictor.load(model_id)
    check_has_reference(loaded, options)
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
        alias = None if name == model_id else name
        predictions = await run_in_threadpool(_kept, services, model_id, alias, asked.pictures, predictions)
    whole = Predictions(model=model_id, coverage=coverage_of(loaded, options), predictions=predictions)
    # Written as it is: FastAPI would check once more what was just made, for a quarter of the event loop's time.
    return Response(whole.model_dump_json(), media_type="application/json")


Results = Sequence[tuple[Picture, Scores | ImageRefused]]


def _options(in_query: Mapping[str, Any], in_body: Mapping[str, Any]) -> PredictOptions:
    """The query goes before the body; a form's fields are text, and empty ones count as left out."""
    given = {name: value for name, value in in_body.items() if value != ""}
    return parse_as(PredictOptions, given | {name: value for name, value in in_query.items() if value is not None})


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
        adapted = await unless_disconnected(request, services.predictor.adapt(loaded.id, encoded, own, plan))
    explanations: Sequence[bytes | None] = [None] * len(read)
    if options.explain:
        labels = [(copy.scores if copy else scores).best for (_, scores), copy in zip(read, adapted, strict=True)]
        explanations = await unless_disconnected(request, services.predictor.explain(loaded.id, encoded, labels))
    return [
        answer(scores, loaded, options, adapted=copy, filename=picture.filename, explanation=explanation)
        for (picture, scores), copy, explanation in zip(read, adapted, explanations, strict=True)
    ]


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
