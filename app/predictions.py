"""Predictions that were kept because their request asked for it, and what people said of them since.

Every function works in the caller's transaction. Pictures lie elsewhere, under `picture_key`: before a row speaks of
them, and until the caller removes those of deleted rows. Labels are by task; the only task's name is "".
"""

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import delete as delete_from
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.db.tables import ModelRow, PredictionRow, utc_now
from app.errors import Conflict, FieldError, InvalidRequest, NotFound, listed
from app.names import folded, has_control_characters


@dataclass(frozen=True)
class Kept:
    """A prediction to be kept. predicted: labels by task. answer: as the caller was given it, JSON."""

    id: str
    filename: str | None
    size_bytes: int  # of the picture
    sha256: str  # of the picture
    predicted: Mapping[str, str]
    answer: Mapping[str, Any]


class Judged(NamedTuple):
    """What was predicted, and what people say it is, by task. alias: under which the model was asked."""

    alias: str | None
    predicted: Mapping[str, str]
    feedback: Mapping[str, str]


def picture_key(prediction_id: str) -> str:
    return f"predictions/{prediction_id}"


def add(session: Session, kept: Sequence[Kept], *, model_id: str, alias: str | None) -> None:
    """Raises NotFound if the model was deleted meanwhile."""
    model = _model(session, model_id)
    if model is None:
        raise NotFound("The model was deleted while it was asked; ask another.", code="model-not-found")
    for one in kept:
        session.add(
            PredictionRow(
                id=one.id,
                model_id=model_id,
                dataset_id=model.dataset_id,
                alias=alias,
                filename=one.filename,
                size_bytes=one.size_bytes,
                sha256=one.sha256,
                predicted=dict(one.predicted),
                answer=dict(one.answer),
            )
        )
    session.flush()


def find(session: Session, prediction_id: str, *, is_to_change: bool = False) -> PredictionRow:
    """is_to_change: nobody else changes it until the transaction ends. Raises NotFound."""
    query = select(PredictionRow).where(PredictionRow.id == prediction_id)
    row = session.scalar(query.with_for_update() if is_to_change else query)
    if row is None:
        raise NotFound("There is no prediction with this id, or it is kept no longer; GET /v1/predictions lists them.")
    return row


def list_predictions(
    session: Session, *, limit: int, after: str | None = None, model_id: str | None = None
) -> list[PredictionRow]:
    """Up to `limit` predictions, newest first, that come after the prediction `after`. Raises NotFound for that."""
    query = select(PredictionRow).order_by(PredictionRow.seq.desc()).limit(limit)
    if model_id is not None:
        query = query.where(PredictionRow.model_id == model_id)
    if after is not None:
        query = query.where(PredictionRow.seq < find(session, after).seq)
    return list(session.scalars(query))


def give_feedback(
    session: Session, prediction_id: str, label: str, *, task: str | None, is_new_class: bool
) -> PredictionRow:
    """Says what a picture is, instead of what was said before. task: the first one if None.

    is_new_class: whether the label may be one that the model does not know.
    Raises NotFound, Conflict if the model is gone, InvalidRequest for a label or a task that the model does not have.
    """
    row = find(session, prediction_id, is_to_change=True)
    model = _model(session, row.model_id)
    if model is None:
        raise Conflict(
            "The model that made this prediction was deleted, and with it what labels it may have.",
            code="model-deleted",
        )
    classes = {each["name"]: each["classes"] for each in model.each_task}
    of_task = next(iter(classes)) if task is None else task
    if of_task not in classes:
        known = ", ".join(classes) if model.tasks else "leave it out: the model tells one thing"
        raise InvalidRequest(
            f"The model has no such task; known are: {known}.", errors=[FieldError("#/task", "is no task of the model")]
        )
    row.feedback = {**(row.feedback or {}), of_task: _checked(label, classes[of_task], is_new_class=is_new_class)}
    row.feedback_at = utc_now()
    session.flush()
    return row


def judged(session: Session, model_id: str) -> list[Judged]:
    """All of a model's predictions that have feedback."""
    rows = session.execute(
        select(PredictionRow.alias, PredictionRow.predicted, PredictionRow.feedback).where(
            PredictionRow.model_id == model_id, PredictionRow.feedback_at.is_not(None)
        )
    )
    return [Judged(*row) for row in rows]


def count(session: Session, model_id: str) -> int:
    return session.scalar(select(func.count()).where(PredictionRow.model_id == model_id)) or 0


def with_feedback(
    session: Session, dataset_ids: Collection[str], *, model_id: str | None = None
) -> list[PredictionRow]:
    """Those by models of these data sets, or by one of them, in the order in which their feedback was given."""
    query = select(PredictionRow).where(
        PredictionRow.dataset_id.in_(dataset_ids), PredictionRow.feedback_at.is_not(None)
    )
    if model_id is not None:
        query = query.where(PredictionRow.model_id == model_id)
    return list(session.scalars(query.order_by(PredictionRow.feedback_at, PredictionRow.seq)))


def delete(session: Session, prediction_id: str) -> None:
    """Raises NotFound."""
    session.delete(find(session, prediction_id))


def expired(session: Session, *, max_bytes: int, before: datetime, limit: int) -> list[str]:
    """Ids of what was kept before a time, and of the oldest until the pictures' bytes fit: up to `limit`, oldest first.

    To be asked within one workspace: whose predictions are too much says nothing of another's."""
    too_old = session.scalar(select(func.max(PredictionRow.seq)).where(PredictionRow.created_at < before)) or 0
    last_to_go = max(too_old, _last_beyond(session, max_bytes))
    if not last_to_go:
        return []
    to_go = select(PredictionRow.id).where(PredictionRow.seq <= last_to_go)
    return list(session.scalars(to_go.order_by(PredictionRow.seq).limit(limit)))


def forget(session: Session, prediction_ids: Sequence[str]) -> None:
    """Those of them that are still there."""
    gone = delete_from(PredictionRow).where(PredictionRow.id.in_(prediction_ids))
    session.execute(gone, execution_options={"synchronize_session": False})


def _last_beyond(session: Session, max_bytes: int) -> int:
    """The newest seq that is too much, 0 if none is: bytes are counted from the newest on."""
    if (session.scalar(select(func.sum(PredictionRow.size_bytes))) or 0) <= max_bytes:
        return 0
    newer_bytes = func.sum(PredictionRow.size_bytes).over(order_by=PredictionRow.seq.desc())
    counted = select(PredictionRow.seq, newer_bytes.label("newer_bytes")).subquery()
    return session.scalar(select(func.max(counted.c.seq)).where(counted.c.newer_bytes > max_bytes)) or 0


def _model(session: Session, model_id: str) -> ModelRow | None:
    return session.scalar(select(ModelRow).where(ModelRow.id == model_id))


def _checked(label: str, classes: Sequence[str], *, is_new_class: bool) -> str:
    """The label as class names are written. Raises InvalidRequest."""
    written = unicodedata.normalize("NFC", label)
    label = written if written in classes else written.strip()  # a class may have blanks around its name
    if label in classes:
        return label
    twin = next((name for name in classes if folded(name) == folded(label)), None)
    if not folded(label) or has_control_characters(label) or twin is not None:
        differs = f"differs from the class {twin!r} only in case, accents' encoding, blanks or dots"
        said = differs if twin else "is empty or has control characters"
        raise InvalidRequest(f"The label {said}.", errors=[FieldError("#/label", said)])
    if not is_new_class:
        raise InvalidRequest(
            f"The model has no such class; its classes are: {listed(classes)}. "
            'With "new_class": true it is a class to come.',
            errors=[FieldError("#/label", "is no class of the model")],
        )
    return label
