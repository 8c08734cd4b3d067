"""POST /v1/models/{model}/personalise: a model of one's own from a handful of labelled pictures, in seconds."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Path, Request
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from app.api.classifiers import find_classifier
from app.api.dataset_pictures import Validation, validation_of
from app.api.deps import ServicesDep, unless_disconnected
from app.api.derived_models import encoded_pictures, open_parent, publish
from app.api.openapi import problems
from app.api.picture_bodies import Picture, form_or_json, read_pictures
from app.api.schemas import Model, PersonaliseRequest
from app.api.services import Services
from app.db.tables import ModelRow
from app.errors import Conflict, FieldError, InvalidRequest, listed
from app.serving.personal import Labelled, personalise

router = APIRouter(tags=["models"])


@router.post(
    "/v1/models/{model}/personalise",
    status_code=201,
    response_model=Model,
    summary="Make a model of one's own from a few labelled pictures",
    description="A copy of the model's head learns the pictures and rehearses what it knew; measured on the same "
    "validation images, 1,000 of them at most, and on the pictures themselves by parts left out "
    "(`metrics.personal`). The model itself stays as it is, and aliases stay where they point. In a form a `label` is "
    "that of the files behind it.",
    responses=problems(404, 408, 409, 413, 507),
    openapi_extra=form_or_json(
        PersonaliseRequest, {"label": {"type": "array", "items": {"type": "string"}}}, required=["label"]
    ),
)
async def personalise_model(
    request: Request,
    services: ServicesDep,
    model: Annotated[str, Path(max_length=100, description="A model's id or alias.")],
) -> Model:
    settings = services.settings
    body = await read_pictures(request, schema=PersonaliseRequest, max_bytes=settings.max_predict_bytes)
    pictures = encoded_pictures(body, most=settings.max_predict_images)
    parent = await run_in_threadpool(_open, services, model)
    labels = _labels(body.pictures, parent.row.classes)
    predictor, model_id = services.predictor, parent.row.id
    mine = await unless_disconnected(request, predictor.features(model_id, pictures))
    known = await unless_disconnected(request, predictor.features_of(model_id, parent.validation.pictures))
    return await run_in_threadpool(_publish, services, parent, pictures, Labelled(mine, labels), known)


@dataclass(frozen=True)
class _Parent:
    row: ModelRow
    validation: Validation


def _open(services: Services, model: str) -> _Parent:
    row = find_classifier(services, model)
    if row.tasks:
        raise Conflict(
            "This model tells several things at once, and only one that tells one thing can be personalised.",
            code="several-tasks",
        )
    validation = validation_of(row.id, services.storage)
    if validation is None:
        raise Conflict(
            "The validation pictures of this model's data set are gone, and a new model could not be measured.",
            code="no-validation-pictures",
        )
    return _Parent(row, validation)


def _publish(services: Services, parent: _Parent, pictures: Sequence[bytes], mine: Labelled, known: Tensor) -> Model:
    validation = Labelled(known, parent.validation.labels, parent.validation.images)
    derived = personalise(open_parent(services, parent.row), mine, validation)
    return publish(services, derived, parent.row, role="personalised", shots=pictures)


def _labels(pictures: Sequence[Picture], classes: Sequence[str]) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Places among the classes. Raises InvalidRequest, which points at each picture without one."""
    places = {name: place for place, name in enumerate(classes)}
    found = [places.get(unicodedata.normalize("NFC", picture.label or "").strip()) for picture in pictures]
    unknown = [
        FieldError(f"#/images/{i}/label", "is required" if not picture.label else "is no class of the model")
        for i, (picture, place) in enumerate(zip(pictures, found, strict=True))
        if place is None
    ]
    if unknown:
        raise InvalidRequest(
            f"Each picture needs a label that is a class of the model: {listed(classes)}. "
            "In a form, `-F label=NAME` comes before its files.",
            errors=unknown,
        )
    return np.array(found, dtype=np.int64)
