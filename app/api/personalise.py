"""POST /v1/models/{model}/personalise: a model of one's own from a handful of labelled pictures, in seconds."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Path, Request
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from app.api.classifiers import find_classifier
from app.api.dataset_pictures import Validation, validation_of
from app.api.deps import ServicesDep, unless_disconnected
from app.api.derived_models import encoded_pictures, open_parent, publish
from app.api.openapi import problems
from app.api.picture_bodies import Picture, form_or_json, read_pictures
from app.api.problems import pointer_to
from app.api.schemas import Model, PersonaliseRequest
from app.api.services import Services
from app.datasets.manifest import digest_of
from app.db.tables import ModelRow
from app.errors import Conflict, FieldError, InvalidRequest, listed
from app.serving.personal import NO_LABEL, Labelled, personalise

router = APIRouter(tags=["models"])


@router.post(
    "/v1/models/{model}/personalise",
    status_code=201,
    response_model=Model,
    summary="Make a model of one's own from a few labelled pictures",
    description="A copy of the model's head learns the pictures and rehearses what it knew; measured on the same "
    "validation images but those that it learns, 1,000 at most, and on the pictures themselves by parts left out "
    "(`metrics.personal`). The model itself stays as it is, and aliases stay where they point. In a form a `label` is "
    "that of the files behind it. Of a model that tells several things a picture may have a label of each, "
    "`label:colour` and so on in a form; what no picture has a label of is answered as before.",
    responses=problems(404, 408, 409, 413, 507),
    openapi_extra=form_or_json(
        PersonaliseRequest, {"label": {"type": "array", "items": {"type": "string"}}}, required=[]
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
    parent = await run_in_threadpool(_open, services, model, pictures)
    labels = _labels(body.pictures, parent.row)
    predictor, loaded = services.predictor, await services.predictor.load(parent.row.id)
    mine = await unless_disconnected(request, predictor.features(loaded, pictures))
    known = await unless_disconnected(request, predictor.features_of(loaded, parent.validation.pictures))
    return await run_in_threadpool(_publish, services, parent, pictures, Labelled(mine, labels), known)


@dataclass(frozen=True)
class _Parent:
    row: ModelRow
    validation: Validation


def _open(services: Services, model: str, pictures: Sequence[bytes]) -> _Parent:
    row = find_classifier(services, model)
    validation = validation_of(row.id, services.storage, without=[digest_of(picture) for picture in pictures])
    if validation is None:
        raise Conflict(
            "The validation pictures of this model's data set are gone, or all of them are to be learnt: a new model "
            "could not be measured.",
            code="no-validation-pictures",
        )
    return _Parent(row, validation)


def _publish(services: Services, parent: _Parent, pictures: Sequence[bytes], mine: Labelled, known: Tensor) -> Model:
    labels = parent.validation.labels.reshape(len(known), -1)
    validation = Labelled(known, labels, parent.validation.images)
    derived = personalise(open_parent(services, parent.row), mine, validation)
    return publish(services, derived, parent.row, role="personalised", shots=pictures)


def _labels(pictures: Sequence[Picture], model: ModelRow) -> NDArray[np.int64]:
    """Places among the classes of each task, (N, T), -1 where a picture has no label of one.

    Raises InvalidRequest, which points at each label that the model does not know, and each picture without any.
    """
    tasks = {task["name"]: task["classes"] for task in model.each_task}
    first = next(iter(tasks))
    found = np.full((len(pictures), len(tasks)), NO_LABEL, dtype=np.int64)
    wrong = []
    for i, picture in enumerate(pictures):
        if not picture.labels:
            wrong.append(FieldError(f"#/images/{i}/label", "is required"))
        for task, label in picture.labels.items():
            name = task or first
            pointer = pointer_to("images", i, "label", *([task] if task else []))
            label = unicodedata.normalize("NFC", label).strip()
            if name not in tasks:
                wrong.append(FieldError(pointer, "is nothing that the model tells"))
            elif label not in tasks[name]:
                wrong.append(FieldError(pointer, "is no class of the model"))
            else:
                found[i, list(tasks).index(name)] = tasks[name].index(label)
    if wrong:
        of_each = "; ".join(
            f"{name}: {listed(classes)}" if name else listed(classes) for name, classes in tasks.items()
        )
        of_task = f":{first}" if first else ""
        raise InvalidRequest(
            f"Each picture needs a label that is a class of the model: {of_each}. "
            f"In a form, `-F label{of_task}=NAME` comes before its files.",
            errors=wrong,
        )
    return found
