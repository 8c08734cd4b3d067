"""POST /v1/models/{model}/classes: a few-shot model with one class more, as a new version and without training."""

import unicodedata
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Path, Request
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from app import registry
from app.api.deps import ServicesDep
from app.api.derived_models import encoded_pictures, open_parent, publish
from app.api.openapi import problems
from app.api.picture_bodies import PictureBody, form_or_json, read_pictures
from app.api.schemas import ClassRequest, Model
from app.api.services import Services
from app.db.tables import ModelRow
from app.errors import Conflict, FieldError, InvalidRequest
from app.names import folded, has_control_characters
from app.serving.extension import extend
from app.vision import artifact
from app.vision.artifact import Support

MAX_NAME_CHARACTERS = 255

router = APIRouter(tags=["models"])


@router.post(
    "/v1/models/{model}/classes",
    status_code=201,
    response_model=Model,
    summary="Add a class from a few pictures, as a new version of the model",
    description="For models of method few_shot. The model itself stays as it is, and aliases stay where they point; "
    "the new version is measured on the same images, and on the new ones left out one by one.",
    responses=problems(404, 408, 409, 413, 507),
    openapi_extra=form_or_json(
        ClassRequest, {"name": {"type": "string", "maxLength": MAX_NAME_CHARACTERS}}, required=["name"]
    ),
)
async def add_class(
    request: Request,
    services: ServicesDep,
    model: Annotated[str, Path(max_length=100, description="A model's id or alias.")],
) -> Model:
    settings = services.settings
    body = await read_pictures(request, schema=ClassRequest, max_bytes=settings.max_predict_bytes)
    name, pictures = _name(body), encoded_pictures(body, most=settings.max_predict_images)
    parent = await run_in_threadpool(_open, services, model, name)
    loaded = await services.predictor.load(parent.row.id)
    features = await services.predictor.features(loaded, pictures)
    return await run_in_threadpool(_publish, services, parent, _NewClass(name, pictures, features))


@dataclass(frozen=True)
class _Parent:
    row: ModelRow
    support: Support


@dataclass(frozen=True)
class _NewClass:
    """pictures: encoded; features: float32 (N, D), of each."""

    name: str
    pictures: list[bytes]
    features: Tensor


def _open(services: Services, model: str, name: str) -> _Parent:
    """What can be refused by the model's row, first; its weights are not read here."""
    with services.database.read() as session:
        row = registry.find(session, model)
    _check_new(name, row.classes)
    support = artifact.load_support(services.storage.path(f"models/{row.id}"))
    if support is None:
        if row.role == "personalised":
            raise Conflict(
                "A model that was personalised keeps the classes that it has; add the class to its parent, and "
                "personalise that.",
                code="not-extensible",
            )
        raise Conflict(
            f'Classes can be added to models of method few_shot, and this one is {row.method}. Train one: {{"dataset": '
            f'"{row.dataset_id}", "method": "few_shot"}} to /v1/jobs.',
            code="not-extensible",
        )
    return _Parent(row, support)


def _publish(services: Services, parent: _Parent, new: _NewClass) -> Model:
    derived = extend(open_parent(services, parent.row), parent.support, new.name, new.features)
    return publish(services, derived, parent.row, role="extended", shots=new.pictures)


def _name(body: PictureBody) -> str:
    name = unicodedata.normalize("NFC", str(body.fields.get("name") or "")).strip()
    if not name or has_control_characters(name) or len(name) > MAX_NAME_CHARACTERS:
        detail = f"is required: the new class's name, 1 to {MAX_NAME_CHARACTERS} characters, no control characters"
        raise InvalidRequest(f"name {detail}.", errors=[FieldError("#/name", detail)])
    return name


def _check_new(name: str, classes: list[str]) -> None:
    same = next((known for known in classes if folded(known) == folded(name)), None)
    if same is not None:
        raise Conflict(
            f"The model has the class {same!r} already, and {name!r} is no other name; give the new one another.",
            code="class-exists",
        )
