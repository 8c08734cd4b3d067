"""Trained models and the aliases that point at them. The worker registers; the API finds, lists and deletes.

Every function works in the caller's transaction. Knows rows; not files, not networks.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sqlalchemy import Select, select
from sqlalchemy import delete as delete_from
from sqlalchemy.orm import Session

from app import webhooks
from app.db.tables import AliasRow, ModelRow, WorkspaceRow, utc_now
from app.db.tenancy import TenantSession
from app.errors import Conflict, FieldError, InvalidRequest, NotFound

DEFAULT_ALIAS = "default"

# Not as ids begin.
ALIAS_NAME = r"^(?!mdl_|ds_|job_|key_)[a-z0-9][a-z0-9._-]{0,62}$"


def register(
    session: Session,
    *,
    model_id: str,
    job_id: str,
    dataset_id: str,
    method: str,
    backbone: Mapping[str, Any],
    classes: Sequence[str],
    tasks: Sequence[Mapping[str, Any]] = (),
    metrics: Mapping[str, Any],
    size_bytes: int,
    sha256: str,
    role: Literal["probe", "final", "extended", "personalised"] = "final",
    parent_id: str | None = None,
    promotion: Mapping[str, Any] | None = None,
) -> ModelRow:
    """Records a model whose artifact is published. promotion: what the promotion gate said of it. tasks: name and
    classes of each where there are several.

    role: probe for the one that a job of method auto serves until it has its final one; extended and personalised for
    those made from the model `parent_id`, of whose job there may be several.
    Raises sqlalchemy's IntegrityError if the job has one of this role already.
    """
    model = ModelRow(
        id=model_id,
        job_id=job_id,
        dataset_id=dataset_id,
        method=method,
        backbone=dict(backbone),
        classes=list(classes),
        tasks=[dict(task) for task in tasks],
        metrics=dict(metrics),
        size_bytes=size_bytes,
        sha256=sha256,
        role=role,
        parent_id=parent_id,
        promotion=None if promotion is None else dict(promotion),
    )
    session.add(model)
    session.flush()
    told = {"job": job_id, "dataset": dataset_id, "method": method, "role": role, "parent": parent_id}
    told |= {"id": model_id, "object": "model"}
    webhooks.emit(session, "model.registered", told, workspace_id=model.workspace_id)
    return model


def find(session: Session, name_or_id: str) -> ModelRow:
    """The model of this id or alias. Raises NotFound, which says how to get one where there is none yet."""
    model = session.scalar(select(ModelRow).where(ModelRow.id == name_or_id)) or session.scalar(
        select(ModelRow).join(AliasRow, AliasRow.model_id == ModelRow.id).where(AliasRow.name == name_or_id)
    )
    if model is not None:
        return model
    if session.scalar(select(ModelRow.seq).limit(1)) is None:
        raise NotFound(
            "There is no model yet. Train one: POST an archive of class folders to /v1/datasets, then "
            '{"dataset": "<its id>"} to /v1/jobs.',
            code="model-not-found",
        )
    if name_or_id == DEFAULT_ALIAS:
        raise NotFound(
            "No model is the default. Choose one of GET /v1/models: PUT /v1/aliases/default with "
            '{"model": "<its id>"}, or name it in the request.',
            code="model-not-found",
        )
    raise NotFound(
        "There is no model with this id or alias; GET /v1/models lists the models, GET /v1/aliases the aliases.",
        code="model-not-found",
    )


def hold(session: Session, model_id: str) -> ModelRow:
    """The model, and nobody deletes it until the transaction ends. Raises NotFound."""
    return _found(session.scalar(_row(model_id).with_for_update(read=True, key_share=True)))


def find_of_job(session: Session, job_id: str, *, role: Literal["probe", "final"]) -> str | None:
    """The id of the model that a job made in this role; None where there is none (any more)."""
    return session.scalar(select(ModelRow.id).where(ModelRow.job_id == job_id, ModelRow.role == role))


def list_models(
    session: Session,
    *,
    limit: int,
    after: str | None = None,
    dataset: str | None = None,
    method: str | None = None,
) -> list[ModelRow]:
    """Up to `limit` models, newest first, that come after the model `after`. Raises InvalidRequest if it is unknown."""
    models = select(ModelRow).order_by(ModelRow.seq.desc()).limit(limit)
    if dataset is not None:
        models = models.where(ModelRow.dataset_id == dataset)
    if method is not None:
        models = models.where(ModelRow.method == method)
    if after is not None:
        seq = session.scalar(select(ModelRow.seq).where(ModelRow.id == after))
        if seq is None:
            raise InvalidRequest("There is no model with the id given as `after`; start from the first page.")
        models = models.where(ModelRow.seq < seq)
    return list(session.scalars(models))


def list_of_methods(session: Session, methods: Sequence[str], *, limit: int) -> list[ModelRow]:
    """The newest models of these methods, newest first."""
    models = select(ModelRow).where(ModelRow.method.in_(methods)).order_by(ModelRow.seq.desc()).limit(limit)
    return list(session.scalars(models))


def list_of_job(session: Session, job_id: str) -> list[ModelRow]:
    """What a job itself made and is still there, newest first."""
    made = select(ModelRow).where(ModelRow.job_id == job_id, ModelRow.role.in_(("probe", "final")))
    return list(session.scalars(made.order_by(ModelRow.seq.desc())))


def delete(session: Session, model_id: str) -> None:
    """Forgets a model; its files are the caller's to remove, once this is committed.

    Raises NotFound, or Conflict while an alias points at it.
    """
    # Held before its aliases are looked at: whoever is giving it one comes before that, or finds no model.
    model = _found(session.scalar(_row(model_id).with_for_update()))
    names = list(session.scalars(select(AliasRow.name).where(AliasRow.model_id == model.id).order_by(AliasRow.name)))
    if names:
        raise Conflict(
            f"The model is in use as {', '.join(names)}. Point the alias at another model "
            "(PUT /v1/aliases/{name}) or delete the alias first.",
            code="model-in-use",
        )
    session.delete(model)
    session.flush()


def aliases(session: Session) -> list[AliasRow]:
    """All aliases, by name."""
    return list(session.scalars(select(AliasRow).order_by(AliasRow.name)))


def aliases_of(session: Session) -> dict[str, list[str]]:
    """Alias names by the id of the model they point at."""
    names: dict[str, list[str]] = {}
    for alias in aliases(session):
        names.setdefault(alias.model_id, []).append(alias.name)
    return names


def default_model_id(session: Session) -> str | None:
    """The model that /predict uses where none is named."""
    return session.scalar(select(AliasRow.model_id).where(AliasRow.name == DEFAULT_ALIAS))


def lock_default(session: Session) -> str | None:
    """The same, and nobody else makes or moves it until the transaction ends."""
    _lock_aliases(session)
    return session.scalar(select(AliasRow.model_id).where(AliasRow.name == DEFAULT_ALIAS).with_for_update())


def point_alias(session: Session, name: str, model_id: str, *, replaces_interim: bool = False) -> AliasRow:
    """Makes `name` mean this model from now on, and keeps in mind which it meant before.

    replaces_interim: the one before was only to bridge the time; what is kept in mind is the one before that.
    Raises InvalidRequest for a bad name, NotFound for an unknown model.
    """
    if not re.fullmatch(ALIAS_NAME, name):
        raise InvalidRequest(
            "An alias has 1 to 63 characters: small letters, digits, '.', '_' and '-', the first a letter or digit; "
            "and it does not begin as an id does (mdl_, ds_, job_, key_).",
            errors=[FieldError("#/name", "not a valid name for an alias")],
        )
    model = hold(session, model_id)
    _lock_aliases(session)
    alias = _alias(session, name)
    before = None if alias is None else alias.model_id
    if alias is None:
        alias = AliasRow(name=name, model_id=model.id)
        session.add(alias)
    elif alias.model_id != model.id:
        if not replaces_interim:
            alias.previous_model_id = alias.model_id
        alias.model_id = model.id
        alias.updated_at = utc_now()
    session.flush()
    if before != model.id:
        _tell_alias(session, alias.workspace_id, name, model_id=model.id, before=before)
    return alias


def previous_model_id(session: Session, name: str) -> str:
    """The model that the alias meant before; pointing it there rolls it back, and doing so twice undoes it.

    Raises NotFound for an unknown alias, Conflict if there was none before or it was deleted.
    """
    alias = _alias(session, name)
    if alias is None:
        raise _no_alias()
    if alias.previous_model_id is None:
        raise Conflict(
            f"The alias {name} has never pointed at another model. Choose one of GET /v1/models: "
            f"PUT /v1/aliases/{name} "
            'with {"model": "<its id>"}.',
            code="no-previous-model",
        )
    if session.scalar(select(ModelRow.seq).where(ModelRow.id == alias.previous_model_id)) is None:
        raise Conflict(
            f"The model that the alias {name} pointed at before, {alias.previous_model_id}, was deleted. Choose one of "
            f'GET /v1/models: PUT /v1/aliases/{name} with {{"model": "<its id>"}}.',
            code="no-previous-model",
        )
    return alias.previous_model_id


def remove_alias(session: Session, name: str) -> None:
    """Raises NotFound if there is none of this name."""
    _lock_aliases(session)
    of_name = delete_from(AliasRow).where(AliasRow.name == name)
    removed = session.execute(of_name.returning(AliasRow.model_id, AliasRow.workspace_id)).first()
    if removed is None:
        raise _no_alias()
    _tell_alias(session, removed.workspace_id, name, model_id=None, before=removed.model_id)


def _tell_alias(session: Session, workspace_id: str, name: str, *, model_id: str | None, before: str | None) -> None:
    told = {"name": name, "object": "alias", "model": model_id, "previous_model": before}
    webhooks.emit(session, "alias.changed", told, workspace_id=workspace_id)


def _lock_aliases(session: Session) -> None:
    """Makes others who give, move or take a name wait for this transaction's end, also for a name that nobody has yet.
    Whoever adds something else to the workspace does not wait. (SQLite's writers come one by one anyway.)"""
    assert isinstance(session, TenantSession)
    own = select(WorkspaceRow.id).where(WorkspaceRow.id == session.workspace_id)
    session.scalar(own.with_for_update(key_share=True))


def _alias(session: Session, name: str) -> AliasRow | None:
    return session.scalar(select(AliasRow).where(AliasRow.name == name))


def _no_alias() -> NotFound:
    return NotFound("There is no alias of this name; GET /v1/aliases lists them.", code="alias-not-found")


def _row(model_id: str) -> Select[ModelRow]:
    return select(ModelRow).where(ModelRow.id == model_id)


def _found(model: ModelRow | None) -> ModelRow:
    if model is None:
        raise NotFound("There is no model with this id; GET /v1/models lists them.", code="model-not-found")
    return model
