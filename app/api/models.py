"""/v1/models, /v1/aliases, /v1/backbones: what was trained, what it is called, what training can start from."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app import holdings, registry
from app.api import training
from app.api.deps import After, Limit, ServicesDep, json_body
from app.api.evaluation import check_predicts, read_evaluation
from app.api.openapi import json_request, problems
from app.api.schemas import Alias, AliasRequest, Backbones, Deleted, Evaluation, Listing, Model
from app.api.services import Services
from app.errors import Conflict
from app.jobs import queue
from app.serving.exporter import exports_of

router = APIRouter(tags=["models"])

ModelName = Annotated[str, Path(max_length=100, description="A model's id or alias.")]
AliasName = Annotated[str, Path(max_length=100)]
NewAliasName = Annotated[str, Path(json_schema_extra={"pattern": registry.ALIAS_NAME}, max_length=63)]


@router.get("/v1/models", response_model=Listing[Model], summary="List models, newest first", responses=problems(404))
def list_models(
    services: ServicesDep,
    limit: Limit = 50,
    after: After = None,
    status: Annotated[str | None, Query(max_length=100, description="Every model is `ready`.")] = None,
    dataset: Annotated[str | None, Query(max_length=100)] = None,
    method: Annotated[str | None, Query(max_length=100)] = None,
) -> Listing[Model]:
    with services.database.read() as session:
        if after:
            registry.find(session, after)
        rows = registry.list_models(session, limit=limit + 1, after=after or None, dataset=dataset, method=method)
        names = registry.aliases_of(session)
    return Listing[Model].of(
        rows if status in (None, "ready") else [],
        limit=limit,
        render=lambda row: Model.of(row, aliases=names.get(row.id, [])),
        id_of=lambda model: model.id,
    )


@router.get("/v1/models/{model}", response_model=Model, summary="One model, by id or alias", responses=problems(404))
def get_model(services: ServicesDep, model: ModelName) -> Model:
    with services.database.read() as session:
        row = registry.find(session, model)
        return Model.of(row, aliases=registry.aliases_of(session).get(row.id, []))


@router.delete(
    "/v1/models/{model}",
    response_model=Deleted,
    summary="Delete a model that no alias points at",
    responses=problems(404, 409),
)
async def delete_model(services: ServicesDep, model: ModelName) -> Deleted:
    model_id = await run_in_threadpool(_delete_model, services, model)
    services.predictor.forget(model_id)
    return Deleted(id=model_id, object="model")


@router.get(
    "/v1/models/{model}/evaluation",
    response_model=Evaluation,
    summary="How well it does on its validation images, and which it got wrong",
    responses=problems(404),
)
def get_evaluation(services: ServicesDep, model: ModelName) -> Evaluation:
    with services.database.read() as session:
        row = registry.find(session, model)
    check_predicts(row)
    return read_evaluation(row, services.storage)


@router.get("/v1/aliases", response_model=Listing[Alias], summary="All aliases, by name")
def list_aliases(services: ServicesDep) -> Listing[Alias]:
    with services.database.read() as session:
        rows = registry.aliases(session)
    return Listing[Alias].of(rows, limit=len(rows), render=Alias.of, id_of=lambda alias: alias.name)


@router.put(
    "/v1/aliases/{name}",
    response_model=Alias,
    summary="Point an alias at a model",
    description="The model is loaded and warm before the alias moves, so no request to /predict is lost or slow.",
    responses=problems(404, 408, 413),
    openapi_extra=json_request(AliasRequest),
)
async def put_alias(
    services: ServicesDep, name: NewAliasName, body: Annotated[AliasRequest, Depends(json_body(AliasRequest))]
) -> Alias:
    model_id = await run_in_threadpool(_model_id, services, body.model)
    # A model that cannot be loaded is refused here, with 503, instead of becoming what /predict answers with.
    await services.predictor.load(model_id)
    return await run_in_threadpool(_point_alias, services, name, model_id)


@router.post(
    "/v1/aliases/{name}/rollback",
    response_model=Alias,
    summary="Point an alias back at the model it pointed at before",
    description="A second rollback undoes the first. The model is loaded and warm before the alias moves.",
    responses=problems(404, 409),
)
async def roll_back_alias(services: ServicesDep, name: AliasName) -> Alias:
    model_id = await run_in_threadpool(_previous_model_id, services, name)
    await services.predictor.load(model_id)
    return await run_in_threadpool(_point_alias, services, name, model_id)


@router.delete("/v1/aliases/{name}", response_model=Deleted, summary="Remove an alias", responses=problems(404))
def delete_alias(services: ServicesDep, name: AliasName) -> Deleted:
    services.database.free(lambda session: registry.remove_alias(session, name))
    return Deleted(id=name, object="alias")


@router.get("/v1/backbones", response_model=Backbones, summary="What training can start from")
def list_backbones(services: ServicesDep) -> Backbones:
    with services.database.read() as session:
        made = training.made_backbones(session, services.storage)
    return Backbones(data=[*training.list_backbones(services.weights), *made])


def _model_id(services: Services, name: str) -> str:
    """Of a model that can be predicted with: an alias names nothing else."""
    with services.database.read() as session:
        row = registry.find(session, name)
    check_predicts(row)
    return row.id


def _previous_model_id(services: Services, alias: str) -> str:
    with services.database.read() as session:
        return registry.previous_model_id(session, alias)


def _point_alias(services: Services, name: str, model_id: str) -> Alias:
    with services.database.write() as session:
        return Alias.of(registry.point_alias(session, name, model_id))


def _delete_model(services: Services, name: str) -> str:
    def delete(session: Session) -> None:
        registry.delete(session, model_id)
        # Asked last: who was just submitting a batch has held the model until then. A refusal takes all of it back.
        if queue.needs_model(session, model_id):
            raise Conflict(
                "A batch that has not ended asks this model, or a training job starts from it; cancel it, or wait for "
                "its end.",
                code="model-in-use",
            )

    with services.database.read() as session:
        model_id = registry.find(session, name).id
    holdings.delete(services.database, services.storage, f"models/{model_id}", exports_of(model_id), rows=delete)
    return model_id
