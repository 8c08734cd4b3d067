"""/try: a picture, and what a model says of it; and to say what it really is."""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from app.api import feedback, models, predict
from app.api.deps import ServicesDep
from app.api.feedback import FeedbackRequest
from app.api.schemas import Model
from app.api.services import Services
from app.api.strict_json import parse_as
from app.errors import InvalidRequest, NotFound
from app.vision.artifact import REFERENCE_FILE
from app.web.datasets import dataset_names
from app.web.site import PageId, page, read_form

MODELS_OFFERED = 100

router = APIRouter(prefix="/try", include_in_schema=False)


@router.get("")
def try_page(
    request: Request, services: ServicesDep, model: Annotated[str | None, Query(max_length=100)] = None
) -> Response:
    chosen = _model(services, model or "default", is_asked_for=model is not None)
    offered = [each for each in models.list_models(services, limit=MODELS_OFFERED).data if each.classes]
    return page(
        request,
        "try.html",
        model=chosen,
        models=offered,
        names=dataset_names(services, [each.dataset for each in (*offered, *([chosen] if chosen else []))]),
        has_statistics=chosen is not None and services.storage.exists(f"models/{chosen.id}/{REFERENCE_FILE}"),
        may_store=services.settings.store_predictions,
    )


@router.post("")
async def answer_fragment(request: Request, services: ServicesDep) -> Response:
    """The body is a form as POST /predict takes it."""
    found = await predict.answered(request, services)
    model = await run_in_threadpool(models.get_model, services, found.model)
    return page(request, "try_answers.html", found=found, model=model)


@router.post("/{prediction_id}/feedback")
async def say(request: Request, services: ServicesDep, prediction_id: PageId) -> Response:
    given = {name: text for name, text in await read_form(request) if text}
    fields = {"label": given.get("label", ""), "task": given.get("task"), "new_class": given.get("new_class") == "true"}
    body = parse_as(FeedbackRequest, fields)
    try:
        stored = await run_in_threadpool(feedback.give_feedback, services, prediction_id, body)
    except InvalidRequest as error:
        sentence, of_api, _ = error.detail.partition(' With "new_class"')
        raise InvalidRequest(
            sentence + (" Tick “a class the model does not know” if it is one." if of_api else "")
        ) from None
    return page(request, "try_feedback.html", stored=stored)


def _model(services: Services, name: str, *, is_asked_for: bool) -> Model | None:
    """None where there is no default model yet."""
    try:
        return models.get_model(services, name)
    except NotFound:
        if is_asked_for:
            raise
        return None
