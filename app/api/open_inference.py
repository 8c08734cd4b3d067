"""/v2: the Open Inference Protocol (V2), as the clients of Triton and KServe speak it.

A model's name is its id or an alias; it has one version, its id, which also answers to `1`. Bodies are read whatever
their Content-Type, since those clients name none. The protocol has no error for a single picture: all or none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from fastapi import APIRouter, Depends, Path, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from app import registry
from app.api import open_inference_wire as wire
from app.api.classifiers import find_classifier, scores_of
from app.api.deps import MAX_JSON_BYTES, ServicesDep, read_body, unless_disconnected
from app.api.open_inference_wire import ENCODED, PREPROCESSED, SCORES, InferRequest, OutputTensor, WantedOutput
from app.api.openapi import json_request, problems
from app.api.problems import Problem
from app.api.schemas import Schema
from app.api.services import Services
from app.api.strict_json import Body, parse_as, strict_json
from app.api.system import readiness
from app.db.tables import ModelRow
from app.errors import Conflict, FieldError, ImageRefused, InvalidRequest, NotFound
from app.serving.loaded import LoadedModel
from app.serving.scores import Scores
from app.vision import artifact

HEADER_LENGTH = "Inference-Header-Content-Length"
EXTENSIONS = ("binary_tensor_data", "classification", "model_repository")
PLATFORM = "graft"
# Every model is one version; clients that insist on a number say 1.
ONLY_VERSION = "1"
# The newest; nobody reads further, and each may have several names.
MAX_INDEXED_MODELS = 10_000

router = APIRouter(tags=["open inference protocol"])

ModelName = Annotated[str, Path(max_length=100, description="A model's id or alias.")]
ModelVersion = Annotated[str, Path(max_length=100, description="The model's id, or 1.")]


class ServerMetadata(Schema):
    name: Literal["graft"] = "graft"
    version: str
    extensions: list[str]


class ServerLive(Schema):
    live: Literal[True] = True


class ServerReady(Schema):
    ready: Literal[True] = True


class TensorMetadata(Schema):
    name: str
    datatype: Literal["BYTES", "FP32"]
    shape: list[int]


class ModelParameters(Schema):
    classes: list[str]


class ModelMetadata(Schema):
    """A request has one of the inputs."""

    name: str
    versions: list[str]
    platform: str = PLATFORM
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    parameters: ModelParameters


class ModelReady(Schema):
    name: str
    ready: Literal[True] = True


class InferAnswerTensor(Schema):
    name: str
    datatype: Literal["BYTES", "FP32"]
    shape: list[int]
    parameters: dict[str, Any] | None = None
    data: list[float] | list[str] | None = None


class InferAnswer(Schema):
    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[InferAnswerTensor]


class RepositoryModel(Schema):
    name: str
    version: str
    state: Literal["READY"] = "READY"
    reason: str = ""


class IndexRequest(BaseModel):
    """The body of POST /v2/repository/index; it may be left out."""

    model_config = ConfigDict(extra="ignore", strict=True)

    ready: bool | None = None


class LoadRequest(BaseModel):
    """The body of load; it may be left out."""

    model_config = ConfigDict(extra="ignore", strict=True)

    parameters: Annotated[dict[str, Any], Field(json_schema_extra={"maxProperties": 0})] | None = None


class UnloadRequest(BaseModel):
    """The body of unload; it may be left out."""

    model_config = ConfigDict(extra="ignore", strict=True)

    parameters: dict[str, Any] | None = Field(None, description="Passed over.")


@dataclass(frozen=True)
class Named:
    """A model under the name that it was asked for by."""

    name: str
    row: ModelRow


def _named(services: ServicesDep, name: ModelName) -> Named:
    return Named(name, find_classifier(services, name))


def _named_version(services: ServicesDep, name: ModelName, version: ModelVersion) -> Named:
    row = find_classifier(services, name)
    if version not in (row.id, ONLY_VERSION):
        raise NotFound(f"{name} is the version {row.id} now; name no version, or that model itself.")
    return Named(name, row)


ByName = Annotated[Named, Depends(_named)]
ByVersion = Annotated[Named, Depends(_named_version)]


@router.get("/v2", response_model=ServerMetadata, summary="What this server is")
async def server_metadata(request: Request) -> ServerMetadata:
    return ServerMetadata(version=request.app.version, extensions=list(EXTENSIONS))


@router.get("/v2/health/live", response_model=ServerLive, summary="Whether the server is alive")
async def server_live() -> ServerLive:
    return ServerLive()


@router.get(
    "/v2/health/ready", response_model=ServerReady, summary="Whether requests can be served", responses=problems(503)
)
def server_ready(request: Request, services: ServicesDep) -> Response:
    found = readiness(services)
    if isinstance(found, Problem):
        return found.response(request_id=request.state.request_id, path=request.url.path)
    return JSONResponse(ServerReady().model_dump())


@router.get(
    "/v2/models/{name}", response_model=ModelMetadata, summary="A model's tensors", responses=problems(404, 409)
)
def model_metadata(services: ServicesDep, model: ByName) -> ModelMetadata:
    return _metadata(services, model)


@router.get(
    "/v2/models/{name}/versions/{version}",
    response_model=ModelMetadata,
    summary="A version's tensors",
    responses=problems(404, 409),
)
def version_metadata(services: ServicesDep, model: ByVersion) -> ModelMetadata:
    return _metadata(services, model)


@router.get(
    "/v2/models/{name}/ready",
    response_model=ModelReady,
    summary="Whether a model answers; it is loaded first if need be",
    responses=problems(404, 409, 503),
)
async def model_ready(services: ServicesDep, model: ByName) -> ModelReady:
    await services.predictor.load(model.row.id)
    return ModelReady(name=model.name)


@router.get(
    "/v2/models/{name}/versions/{version}/ready",
    response_model=ModelReady,
    summary="Whether a version answers; it is loaded first if need be",
    responses=problems(404, 409, 503),
)
async def version_ready(services: ServicesDep, model: ByVersion) -> ModelReady:
    await services.predictor.load(model.row.id)
    return ModelReady(name=model.name)


_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_INFER: dict[str, Any] = {
    "response_model": InferAnswer,
    "responses": {
        200: {
            "content": _BINARY,
            "headers": {
                HEADER_LENGTH: {
                    "description": "Length of the JSON, where binary data was asked for.",
                    "schema": {"type": "integer"},
                }
            },
        },
        **problems(404, 408, 409, 413),
    },
    "description": f"Encoded pictures ({ENCODED}, BYTES [n, 1], base64 in JSON) or preprocessed ones ({PREPROCESSED}, "
    f"FP32 [n, 3, h, w]). With {HEADER_LENGTH} the JSON is followed by binary data; 0 is for a picture, or a "
    "preprocessed tensor, as it is. A picture that cannot be read refuses the whole request.",
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {**json_request(InferRequest)["requestBody"]["content"], **_BINARY},
        },
        "parameters": [
            {
                "name": HEADER_LENGTH,
                "in": "header",
                "description": "Length of the JSON, in bytes, before binary data.",
                "schema": {"type": "integer", "minimum": 0},
            }
        ],
    },
}


@router.post("/v2/models/{name}/infer", summary="Classify pictures", **_INFER)
async def infer(request: Request, services: ServicesDep, model: ByName) -> Response:
    return await _infer(request, services, model)


@router.post("/v2/models/{name}/versions/{version}/infer", summary="Classify pictures with a version", **_INFER)
async def infer_with_version(request: Request, services: ServicesDep, model: ByVersion) -> Response:
    return await _infer(request, services, model)


@router.post(
    "/v2/repository/index",
    response_model=list[RepositoryModel],
    summary="All models, each under its id and its aliases",
    description="All are READY: one that is not loaded is loaded by its first request.",
    responses=problems(408, 413),
    openapi_extra=json_request(IndexRequest, required=False),
)
async def repository_index(request: Request, services: ServicesDep) -> list[RepositoryModel]:
    await _optional_body(request, IndexRequest)
    return await run_in_threadpool(_index, services)


@router.post(
    "/v2/repository/models/{name}/load",
    response_class=Response,
    summary="Load a model, so that no request waits for it",
    responses=problems(404, 408, 409, 413, 503),
    openapi_extra=json_request(LoadRequest, required=False),
)
async def load_model(request: Request, services: ServicesDep, model: ByName) -> Response:
    if (await _optional_body(request, LoadRequest)).parameters:
        raise InvalidRequest(
            "A model is loaded as it was trained; leave out config and files.",
            errors=[FieldError("#/parameters", "must be left out")],
        )
    await services.predictor.load(model.row.id)
    return Response()


@router.post(
    "/v2/repository/models/{name}/unload",
    response_class=Response,
    summary="Free a model's memory until the next request for it",
    description="The default model stays loaded, since the server is ready only with it: 409.",
    responses=problems(404, 408, 409, 413),
    openapi_extra=json_request(UnloadRequest, required=False),
)
async def unload_model(request: Request, services: ServicesDep, model: ByName) -> Response:
    await _optional_body(request, UnloadRequest)
    if model.row.id == await run_in_threadpool(_default_model_id, services):
        raise Conflict("The default model stays loaded; point `default` at another one first.", code="model-in-use")
    services.predictor.forget(model.row.id)
    return Response()


async def _optional_body(request: Request, schema: type[Body]) -> Body:
    body = await read_body(request, max_bytes=MAX_JSON_BYTES)
    return parse_as(schema, strict_json(body) if body else {})


def _metadata(services: Services, model: Named) -> ModelMetadata:
    side = artifact.read_preprocessing(services.storage.path(f"models/{model.row.id}")).crop
    return ModelMetadata(
        name=model.name,
        versions=[model.row.id],
        inputs=[
            TensorMetadata(name=ENCODED, datatype="BYTES", shape=[-1, 1]),
            TensorMetadata(name=PREPROCESSED, datatype="FP32", shape=[-1, 3, side, side]),
        ],
        outputs=[TensorMetadata(name=SCORES, datatype="FP32", shape=[-1, len(model.row.classes)])],
        parameters=ModelParameters(classes=model.row.classes),
    )


def _default_model_id(services: Services) -> str | None:
    with services.database.read() as session:
        return registry.default_model_id(session)


def _index(services: Services) -> list[RepositoryModel]:
    with services.database.read() as session:
        rows = registry.list_models(session, limit=MAX_INDEXED_MODELS)
        aliases = registry.aliases_of(session)
    return [
        RepositoryModel(name=name, version=row.id)
        for row in rows
        if row.classes
        for name in (row.id, *aliases.get(row.id, []))
    ]


async def _infer(request: Request, services: Services, model: Named) -> Response:
    loaded = await services.predictor.load(model.row.id)
    body = await read_body(request, max_bytes=services.settings.max_predict_bytes)
    asked = await run_in_threadpool(
        wire.parse,
        body,
        header_length=request.headers.get(HEADER_LENGTH),
        max_pictures=services.settings.max_predict_images,
        raw_shape=(3, loaded.preprocessing.crop, loaded.preprocessing.crop),
    )
    scores = await unless_disconnected(request, _scores(services, loaded, asked))
    answer, header_length = wire.encode(
        _output(scores, asked.output), model_name=model.name, model_version=model.row.id, request_id=asked.id
    )
    if header_length is None:
        return Response(answer, media_type="application/json")
    headers = {HEADER_LENGTH: str(header_length)}
    return Response(answer, media_type="application/octet-stream", headers=headers)


async def _scores(services: Services, model: LoadedModel, asked: wire.Inference) -> list[Scores]:
    if not isinstance(asked.tensor, list):
        with services.traffic.predicting(services.workspace, len(asked.tensor)):
            scores = await services.predictor.scores(model, torch.from_numpy(asked.tensor))
        services.metrics.count_predictions(answered=len(scores), refused=0)
        return scores
    outcomes = await scores_of(services, model, asked.tensor)
    refused = [(index, outcome) for index, outcome in enumerate(outcomes) if isinstance(outcome, ImageRefused)]
    if refused:
        raise _unreadable(refused, of=len(outcomes))
    return [outcome for outcome in outcomes if isinstance(outcome, Scores)]


def _unreadable(refused: Sequence[tuple[int, ImageRefused]], *, of: int) -> ImageRefused:
    reasons = " ".join(f"Picture {index} cannot be read: {refusal.detail}." for index, refusal in refused[:3])
    more = f" And so for {len(refused) - 3} more." if len(refused) > 3 else ""
    advice = " The protocol answers all pictures or none: send the others alone." if of > len(refused) else ""
    return ImageRefused(
        f"{reasons}{more}{advice}",
        errors=[FieldError(f"#/inputs/0/data/{index}", refusal.detail) for index, refusal in refused],
    )


def _output(scores: Sequence[Scores], wanted: WantedOutput) -> OutputTensor:
    classes = len(scores[0].classes)
    if not wanted.classification:
        values = [value for row in scores for value in row.values]
        return OutputTensor(shape=(len(scores), classes), values=values, is_binary=wanted.is_binary)
    count = min(wanted.classification, classes)
    texts = [text for row in scores for text in _classification(row, count)]
    return OutputTensor(shape=(len(scores), count), values=texts, is_binary=wanted.is_binary)


def _classification(scores: Scores, count: int) -> list[str]:
    """`score:index:class`, best first."""
    index_of = {name: index for index, name in enumerate(scores.classes)}
    return [f"{score:.6g}:{index_of[name]}:{name}" for name, score in scores.top(count)]
