"""/v1/predictions: what was kept, and what people say of it; and a model's accuracy by what they said."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Depends, Path, Query
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from app import holdings, predictions, registry
from app.api.deps import After, Limit, ServicesDep, json_body
from app.api.evaluation import check_predicts
from app.api.openapi import json_request, problems
from app.api.schemas import ClassScore, Deleted, Listing, Schema, TaskPrediction
from app.db.tables import PredictionRow
from app.errors import NotFound
from app.predictions import Judged, picture_key
from app.vision.evaluate import wilson_interval
from app.vision.images import sniff

router = APIRouter(tags=["feedback"])

PredictionId = Annotated[str, Path(max_length=100)]
ModelName = Annotated[str, Path(max_length=100, description="A model's id or alias.")]

MAX_LABEL_CHARACTERS = 255
# What browsers show; anything else is only to be downloaded.
_MEDIA_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}


class FeedbackRequest(BaseModel):
    """The body of POST /v1/predictions/{id}/feedback."""

    model_config = ConfigDict(extra="forbid", strict=True)

    label: Annotated[
        str, Field(min_length=1, max_length=MAX_LABEL_CHARACTERS, description="What the picture is: a class's name.")
    ]
    task: Annotated[str, Field(max_length=MAX_LABEL_CHARACTERS)] | None = Field(
        None, description="Of which of several tasks; the first one if left out."
    )
    new_class: bool = Field(False, description="Whether the label may be one that the model does not know.")


class Feedback(Schema):
    """What people say that the picture is."""

    label: str | None = Field(description="Of several tasks, the first one's; null if only others are told.")
    tasks: dict[str, str] | None = Field(description="Labels by name, where the model tells several things.")
    created_at: datetime


class StoredPrediction(Schema):
    id: str
    object: Literal["prediction"] = "prediction"
    model: str
    alias: str | None = Field(description="Under which the model was asked; null if by its id.")
    filename: str | None
    label: str
    score: float
    top: list[ClassScore]
    tasks: dict[str, TaskPrediction] | None
    picture: str = Field(description="Where the picture can be had.")
    size_bytes: int = Field(description="Of the picture.")
    feedback: Feedback | None
    created_at: datetime

    @classmethod
    def of(cls, row: PredictionRow) -> Self:
        return cls(
            id=row.id,
            model=row.model_id,
            alias=row.alias,
            filename=row.filename,
            picture=f"/v1/predictions/{row.id}/picture",
            size_bytes=row.size_bytes,
            feedback=_feedback_of(row),
            created_at=row.created_at,
            **{name: row.answer.get(name) for name in ("label", "score", "top", "tasks")},
        )


class Accuracy(Schema):
    """How often the model was right, of the predictions with feedback. The interval is Wilson's, of 95 %."""

    count: int = Field(description="Predictions with feedback.")
    right: int
    accuracy: float | None = Field(description="null without any.")
    accuracy_ci95: tuple[float, float] | None

    @classmethod
    def of(cls, outcomes: Iterable[bool], **more: Any) -> Self:
        counts = Counter(outcomes)
        count, right = counts.total(), counts[True]
        return cls(
            count=count,
            right=right,
            accuracy=right / count if count else None,
            accuracy_ci95=wilson_interval(right, count) if count else None,
            **more,
        )


class ClassAccuracy(Accuracy):
    """Of the pictures that people say are of this class."""

    name: str
    is_known: bool = Field(description="false for a class that the model does not have.")


class TaskAccuracy(Accuracy):
    classes: list[ClassAccuracy]


class ModelFeedback(TaskAccuracy):
    """Of several tasks, the first one's, and all of them as `tasks`."""

    object: Literal["feedback"] = "feedback"
    model: str
    stored: int = Field(description="Predictions that are kept, with feedback or without.")
    aliases: dict[str, Accuracy] = Field(description="By the name under which the model was asked.")
    tasks: dict[str, TaskAccuracy] | None = Field(description="By name, where the model tells several things.")


@router.get(
    "/v1/predictions",
    response_model=Listing[StoredPrediction],
    summary="List predictions that were kept, newest first",
    responses=problems(404),
)
def list_predictions(
    services: ServicesDep,
    limit: Limit = 50,
    after: After = None,
    model: Annotated[
        str | None, Query(max_length=100, description="Only this one's: an id, or an alias's model.")
    ] = None,
) -> Listing[StoredPrediction]:
    with services.database.read() as session:
        rows = predictions.list_predictions(
            session, limit=limit + 1, after=after or None, model_id=_id_of(session, model) if model else None
        )
    return Listing[StoredPrediction].of(rows, limit=limit, render=StoredPrediction.of, id_of=lambda one: one.id)


@router.get(
    "/v1/predictions/{prediction_id}", response_model=StoredPrediction, summary="One of them", responses=problems(404)
)
def get_prediction(services: ServicesDep, prediction_id: PredictionId) -> StoredPrediction:
    with services.database.read() as session:
        return StoredPrediction.of(predictions.find(session, prediction_id))


@router.get(
    "/v1/predictions/{prediction_id}/picture",
    response_class=Response,
    summary="Its picture, as it was sent",
    responses={
        200: {"content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in _MEDIA_TYPES.values()}},
        **problems(404),
    },
)
def get_picture(services: ServicesDep, prediction_id: PredictionId) -> Response:
    with services.database.read() as session:
        row = predictions.find(session, prediction_id)
    try:
        encoded = services.storage.path(picture_key(row.id)).read_bytes()
    except FileNotFoundError:
        raise NotFound("The prediction was just deleted, or its picture is missing.") from None
    # A stranger's file: shown as a picture or not at all, and running nothing.
    headers = {"Content-Security-Policy": "default-src 'none'; sandbox", "Content-Disposition": "inline"}
    media_type = _MEDIA_TYPES.get(sniff(encoded[:16]) or "", "application/octet-stream")
    return Response(encoded, media_type=media_type, headers=headers)


@router.delete(
    "/v1/predictions/{prediction_id}",
    response_model=Deleted,
    summary="Delete a kept prediction, its picture and its feedback",
    responses=problems(404),
)
def delete_prediction(services: ServicesDep, prediction_id: PredictionId) -> Deleted:
    with services.database.read() as session:
        found = predictions.find(session, prediction_id).id
    holdings.delete(
        services.database,
        services.storage,
        picture_key(found),
        rows=lambda session: predictions.delete(session, found),
    )
    return Deleted(id=found, object="prediction")


@router.post(
    "/v1/predictions/{prediction_id}/feedback",
    response_model=StoredPrediction,
    summary="Say what the picture is",
    description="A class of the model, or with `new_class` one to come. The last word counts.",
    responses=problems(404, 408, 409, 413),
    openapi_extra=json_request(FeedbackRequest),
)
def give_feedback(
    services: ServicesDep,
    prediction_id: PredictionId,
    body: Annotated[FeedbackRequest, Depends(json_body(FeedbackRequest))],
) -> StoredPrediction:
    with services.database.write() as session:
        row = predictions.give_feedback(session, prediction_id, body.label, task=body.task, is_new_class=body.new_class)
        return StoredPrediction.of(row)


@router.get(
    "/v1/models/{model}/feedback",
    response_model=ModelFeedback,
    summary="How often it was right, by what people said of its predictions",
    responses=problems(404, 409),
)
def get_feedback(services: ServicesDep, model: ModelName) -> ModelFeedback:
    with services.database.read() as session:
        row = registry.find(session, model)
        check_predicts(row)
        judged = predictions.judged(session, row.id)
        stored = predictions.count(session, row.id)
    tasks = {task["name"]: _of_task(task["name"], task["classes"], judged) for task in row.each_task}
    first = next(iter(tasks))
    names = sorted({each.alias for each in judged if each.alias is not None})
    return ModelFeedback(
        model=row.id,
        stored=stored,
        aliases={name: Accuracy.of(_outcomes(first, judged, alias=name)) for name in names},
        tasks=tasks if row.tasks else None,
        **tasks[first].model_dump(),
    )


def _of_task(task: str, known: Sequence[str], judged: Sequence[Judged]) -> TaskAccuracy:
    said = Counter(each.feedback[task] for each in judged if task in each.feedback)
    names = [*known, *sorted(said.keys() - set(known))]
    classes = [
        ClassAccuracy.of(_outcomes(task, judged, label=name), name=name, is_known=name in known) for name in names
    ]
    return TaskAccuracy.of(_outcomes(task, judged), classes=classes)


def _outcomes(
    task: str, judged: Iterable[Judged], *, label: str | None = None, alias: str | None = None
) -> Iterable[bool]:
    """Whether each was right; of those only that people say are `label`, or that were asked for under `alias`."""
    for each in judged:
        said = each.feedback.get(task)
        if said is not None and label in (None, said) and alias in (None, each.alias):
            yield each.predicted.get(task) == said


def _feedback_of(row: PredictionRow) -> Feedback | None:
    if row.feedback is None or row.feedback_at is None:
        return None
    labels: Mapping[str, str] = row.feedback
    has_tasks = "" not in row.predicted
    return Feedback(
        label=labels.get(next(iter(row.predicted))),
        tasks=dict(labels) if has_tasks else None,
        created_at=row.feedback_at,
    )


def _id_of(session: Session, model: str) -> str:
    """What a name means now; an id as it is, since predictions outlive their model."""
    try:
        return registry.find(session, model).id
    except NotFound:
        return model
