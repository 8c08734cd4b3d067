"""POST /v1/models/{model}/classes: a few-shot model with one class more, as a new version and without training."""

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from safetensors import SafetensorError
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from app import registry
from app.api.deps import ServicesDep
from app.api.openapi import problems
from app.api.picture_bodies import PictureBody, form_content, read_pictures
from app.api.schemas import ClassRequest, Model
from app.api.services import Services
from app.datasets.layout import folded
from app.db.tables import ModelRow, new_id
from app.errors import Conflict, FieldError, ImageRefused, InvalidRequest, StorageFull
from app.serving.extension import Extension, extend
from app.storage import LocalStorage
from app.vision import artifact
from app.vision.artifact import Artifact, Saved, Support

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
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                **form_content({"name": {"type": "string", "maxLength": MAX_NAME_CHARACTERS}}, required=["name"]),
                "application/json": {
                    "schema": ClassRequest.model_json_schema(ref_template="#/components/schemas/{model}")
                },
            },
        }
    },
)
async def add_class(
    request: Request,
    services: ServicesDep,
    model: Annotated[str, Path(max_length=100, description="A model's id or alias.")],
) -> Model:
    settings = services.settings
    body = await read_pictures(request, schema=ClassRequest, max_bytes=settings.max_predict_bytes)
    name, pictures = _name(body), _encoded(body, most=settings.max_predict_images)
    parent = await run_in_threadpool(_open, services, model, name)
    features = await services.predictor.features(parent.row.id, pictures)
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
        raise Conflict(
            f'Classes can be added to models of method few_shot, and this one is {row.method}. Train one: {{"dataset": '
            f'"{row.dataset_id}", "method": "few_shot"}} to /v1/jobs.',
            code="not-extensible",
        )
    return _Parent(row, support)


def _publish(services: Services, parent: _Parent, new: _NewClass) -> Model:
    """Files first, whole and synced; then the model's row."""
    storage = services.storage
    folder = storage.path(f"models/{parent.row.id}")
    # The version is as large as the model, but for a class and its pictures' features.
    storage.check_room(sum(file.stat().st_size for file in folder.glob("*")))
    extension = extend(artifact.load(folder), parent.support, new.name, new.features)
    model_id = new_id("mdl")
    key = f"models/{model_id}"
    try:
        made = _described(extension, new, model_id, parent_id=parent.row.id)
        saved = _stored(storage, key, made, extension.evaluation)
        with services.database.write() as session:
            row = registry.register(
                session,
                model_id=model_id,
                job_id=parent.row.job_id,
                dataset_id=parent.row.dataset_id,
                method=parent.row.method,
                backbone=parent.row.backbone,
                classes=extension.artifact.classes,
                metrics=extension.metrics,
                size_bytes=saved.size_bytes,
                sha256=saved.sha256,
                role="extended",
                parent_id=parent.row.id,
            )
            return Model.of(row, aliases=[])
    finally:
        # Asked of the database and not concluded from an exception: a commit may succeed and its answer get lost.
        with services.database.read() as session:
            is_kept = registry.exists(session, model_id)
        storage.settle(key, is_wanted=is_kept)


def _stored(storage: LocalStorage, key: str, made: Artifact, evaluation: Mapping[str, Any]) -> Saved:
    """Raises StorageFull where the disk does not take it."""
    try:
        storage.announce(key)
        with storage.staging() as folder:
            saved = artifact.save(folder, made)
            (folder / "evaluation.json").write_text(json.dumps(evaluation, ensure_ascii=False), "utf-8")
            storage.publish(folder, key)
            return saved
    except (OSError, SafetensorError) as error:
        raise StorageFull("The server could not store the model: its disk is full or failing.") from error


def _described(extension: Extension, new: _NewClass, model_id: str, *, parent_id: str) -> Artifact:
    """shots: digests as a manifest has them, so that the promotion gate knows what the model has seen."""
    made = extension.artifact
    shots = [hashlib.sha256(picture).hexdigest() for picture in new.pictures]
    made.metadata = {
        **made.metadata,
        "model": model_id,
        "parent": parent_id,
        "shots": [*made.metadata.get("shots", []), *shots],
        "metrics": extension.metrics,
    }
    return made


def _name(body: PictureBody) -> str:
    name = unicodedata.normalize("NFC", str(body.fields.get("name") or "")).strip()
    if not name or not name.isprintable() or len(name) > MAX_NAME_CHARACTERS:
        detail = f"is required: the new class's name, 1 to {MAX_NAME_CHARACTERS} printable characters"
        raise InvalidRequest(f"name {detail}.", errors=[FieldError("#/name", detail)])
    return name


def _check_new(name: str, classes: list[str]) -> None:
    same = next((known for known in classes if folded(known) == folded(name)), None)
    if same is not None:
        raise Conflict(
            f"The model has the class {same!r} already, and {name!r} is no other name; give the new one another.",
            code="class-exists",
        )


def _encoded(body: PictureBody, *, most: int) -> list[bytes]:
    if len(body.pictures) > most:
        raise InvalidRequest(
            f"{len(body.pictures)} pictures are more than the {most} that one request may have.",
            errors=[FieldError("#/file", "too many")],
        )
    refused = [picture.encoded for picture in body.pictures if isinstance(picture.encoded, ImageRefused)]
    if refused:
        raise ImageRefused(
            "A picture is not valid base64.", errors=[error for refusal in refused for error in refusal.errors]
        )
    return [picture.encoded for picture in body.pictures if isinstance(picture.encoded, bytes)]
