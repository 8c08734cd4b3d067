"""The client against the OpenAPI document: every operation, parameter and member of an answer is within reach.

A new route, parameter or member makes this fail until the client has it: add the call and a line to CALLS, the member
to `graft_client/answers.py`, or, with the reason, a line to LEFT_OUT.
"""

import asyncio
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import httpx
import pytest
from openapi_server import DocumentedServer, operations, parameters
from pydantic import ConfigDict, TypeAdapter, create_model

from app.main import create_app
from app.settings import Settings
from graft_client import AsyncGraft, Graft, Hyperparameters, JobOptions, Page, PredictOptions
from graft_client.answers import Answer
from graft_client.calls import Resource, call, stream

LEFT_OUT = {
    "POST /v1/datasets": "PUT is the same",
    "POST /v1/batches": "PUT is the same",
    "OPTIONS /v1/uploads": "for clients of tus",
    "POST /v1/uploads": "for clients of tus",
    "GET /v1/uploads/{upload_id}": "for clients of tus",
    "PATCH /v1/uploads/{upload_id}": "for clients of tus",
    "DELETE /v1/uploads/{upload_id}": "for clients of tus",
    "POST /v1/files": "for OpenAI's client",
    "GET /v1/files": "for OpenAI's client",
    "GET /v1/files/{file_id}": "for OpenAI's client",
    "DELETE /v1/files/{file_id}": "for OpenAI's client",
    "POST /v1/fine_tuning/jobs": "for OpenAI's client",
    "GET /v1/fine_tuning/jobs": "for OpenAI's client",
    "GET /v1/fine_tuning/jobs/{job_id}": "for OpenAI's client",
    "POST /v1/fine_tuning/jobs/{job_id}/cancel": "for OpenAI's client",
    "POST /v1/fine_tuning/jobs/{job_id}/pause": "for OpenAI's client",
    "POST /v1/fine_tuning/jobs/{job_id}/resume": "for OpenAI's client",
    "GET /v1/fine_tuning/jobs/{job_id}/events": "for OpenAI's client",
    "GET /v1/fine_tuning/jobs/{job_id}/checkpoints": "for OpenAI's client",
}

PICTURE = ("cat.jpg", b"\xff\xd8\xff")
JOB: JobOptions = {
    "method": "auto",
    "backbone": "auto",
    "seed": 0,
    "name": "a name",
    "recipe": "modern",
    "hyperparameters": {"epochs": 3},
    "promote": "never",
    "budget_seconds": 60.0,
    "exclude": ["cat/1.jpg"],
    "metadata": {"mine": "yes"},
}
PREDICT: PredictOptions = {
    "model": "default",
    "top_k": 2,
    "store": True,
    "explain": True,
    "coverage": 0.9,
    "neighbors": 3,
    "adapt": "neighbors",
    "adapt_parameters": "head",
    "adapt_steps": 5,
    "adapt_learning_rate": 0.1,
}

# By name: a call with everything that it takes. folder: where files may be written.
CALLS: dict[str, Callable[[Any, Path], Any]] = {
    "datasets.upload": lambda graft, folder: graft.datasets.upload(
        b"PK", name="a name", kind="labelled", val_fraction=0.2, seed=1, wait=1
    ),
    "datasets.get": lambda graft, folder: graft.datasets.get("ds_1", wait=1),
    "datasets.wait": lambda graft, folder: graft.datasets.wait("ds_1", timeout=0),
    "datasets.list": lambda graft, folder: graft.datasets.list(limit=1, after="ds_1", status="ready"),
    "datasets.all": lambda graft, folder: graft.datasets.all(status="ready"),
    "datasets.delete": lambda graft, folder: graft.datasets.delete("ds_1"),
    "datasets.images": lambda graft, folder: graft.datasets.images(
        "ds_1", class_name="cat", split="val", limit=1, after="img_1"
    ),
    "datasets.all_images": lambda graft, folder: graft.datasets.all_images("ds_1", class_name="cat", split="val"),
    "datasets.thumbnail": lambda graft, folder: graft.datasets.thumbnail("ds_1", "img_1"),
    "datasets.make_version": lambda graft, folder: graft.datasets.make_version("ds_1", name="next", model="default"),
    "jobs.create": lambda graft, folder: graft.jobs.create("ds_1", wait=1, **JOB),
    "jobs.estimate": lambda graft, folder: graft.jobs.estimate("ds_1", **JOB),
    "jobs.get": lambda graft, folder: graft.jobs.get("job_1", wait=1),
    "jobs.wait": lambda graft, folder: graft.jobs.wait("job_1", timeout=0),
    "jobs.follow": lambda graft, folder: graft.jobs.follow("job_1", after="3"),
    "jobs.list": lambda graft, folder: graft.jobs.list(
        limit=1, after="job_1", status="running", dataset="ds_1", method="auto"
    ),
    "jobs.all": lambda graft, folder: graft.jobs.all(status="running", dataset="ds_1", method="auto"),
    "jobs.history": lambda graft, folder: graft.jobs.history("job_1"),
    "jobs.events": lambda graft, folder: graft.jobs.events("job_1", limit=1, after="3"),
    "jobs.cancel": lambda graft, folder: graft.jobs.cancel("job_1"),
    "jobs.stop": lambda graft, folder: graft.jobs.stop("job_1"),
    "jobs.delete": lambda graft, folder: graft.jobs.delete("job_1"),
    "models.get": lambda graft, folder: graft.models.get("default"),
    "models.list": lambda graft, folder: graft.models.list(
        limit=1, after="mdl_1", status="ready", dataset="ds_1", method="few_shot"
    ),
    "models.all": lambda graft, folder: graft.models.all(dataset="ds_1", method="few_shot"),
    "models.delete": lambda graft, folder: graft.models.delete("mdl_1"),
    "models.evaluation": lambda graft, folder: graft.models.evaluation("default"),
    "models.feedback": lambda graft, folder: graft.models.feedback("default"),
    "models.card": lambda graft, folder: graft.models.card("default"),
    "models.export": lambda graft, folder: graft.models.export("default", folder / "model.onnx", format="onnx"),
    "models.add_class": lambda graft, folder: graft.models.add_class("default", "wasp", [PICTURE]),
    "models.personalise": lambda graft, folder: graft.models.personalise("default", [("cat", PICTURE)]),
    "models.backbones": lambda graft, folder: graft.models.backbones(),
    "aliases.list": lambda graft, folder: graft.aliases.list(),
    "aliases.point": lambda graft, folder: graft.aliases.point("default", "mdl_1"),
    "aliases.roll_back": lambda graft, folder: graft.aliases.roll_back("default"),
    "aliases.delete": lambda graft, folder: graft.aliases.delete("canary"),
    "predictions.get": lambda graft, folder: graft.predictions.get("prd_1"),
    "predictions.list": lambda graft, folder: graft.predictions.list(limit=1, after="prd_1", model="default"),
    "predictions.all": lambda graft, folder: graft.predictions.all(model="default"),
    "predictions.picture": lambda graft, folder: graft.predictions.picture("prd_1"),
    "predictions.give_feedback": lambda graft, folder: graft.predictions.give_feedback(
        "prd_1", "rose", task="kind", new_class=True
    ),
    "predictions.delete": lambda graft, folder: graft.predictions.delete("prd_1"),
    "batches.submit": lambda graft, folder: graft.batches.submit(b"PK", model="default", top_k=2, wait=1),
    "batches.get": lambda graft, folder: graft.batches.get("batch_1", wait=1),
    "batches.wait": lambda graft, folder: graft.batches.wait("batch_1", timeout=0),
    "batches.list": lambda graft, folder: graft.batches.list(limit=1, after="batch_1", status="running"),
    "batches.all": lambda graft, folder: graft.batches.all(status="running"),
    "batches.download": lambda graft, folder: graft.batches.download("batch_1", folder / "told.csv", format="csv"),
    "batches.cancel": lambda graft, folder: graft.batches.cancel("batch_1"),
    "batches.delete": lambda graft, folder: graft.batches.delete("batch_1"),
    "webhooks.create": lambda graft, folder: graft.webhooks.create(
        "https://example.org/", events=["job.succeeded"], enabled=True
    ),
    "webhooks.get": lambda graft, folder: graft.webhooks.get("wh_1"),
    "webhooks.list": lambda graft, folder: graft.webhooks.list(limit=1, after="wh_1"),
    "webhooks.all": lambda graft, folder: graft.webhooks.all(),
    "webhooks.change": lambda graft, folder: graft.webhooks.change(
        "wh_1", url="https://example.org/", events=["job.failed"], enabled=False
    ),
    "webhooks.delete": lambda graft, folder: graft.webhooks.delete("wh_1"),
    "webhooks.test": lambda graft, folder: graft.webhooks.test("wh_1", wait=1),
    "webhooks.deliveries": lambda graft, folder: graft.webhooks.deliveries(
        "wh_1", limit=1, after="evt_1", status="failed"
    ),
    "workspace.usage": lambda graft, folder: graft.workspace.usage(),
    "workspace.changes": lambda graft, folder: graft.workspace.changes(limit=1, after="7"),
    "workspace.all_changes": lambda graft, folder: graft.workspace.all_changes(),
    "predict": lambda graft, folder: graft.predict(PICTURE, **PREDICT),
    "predict_one": lambda graft, folder: graft.predict_one(PICTURE, model="default"),
    "is_alive": lambda graft, folder: graft.is_alive(),
}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    written: dict[str, Any] = json.loads(json.dumps(create_app(Settings(_env_file=None)).openapi()))
    # For waiting, the end of what is waited for; its first status is the one that the fabricated answers have.
    for name in ("Dataset", "Job", "Batch"):
        written["components"]["schemas"][name]["properties"]["status"]["enum"].reverse()
    return written


@pytest.fixture(scope="module")
def asked(document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> DocumentedServer:
    """A server of which everything has been asked once, but page after page, which asks the same as one page."""
    server = DocumentedServer(document)
    for name in CALLS:
        if ".all" not in name:
            call_blocking(server, name, tmp_path_factory.mktemp("files"))
    return server


def test_every_call_of_the_client_is_here() -> None:
    client = Graft("http://graft.test")
    groups = {f"{name}.": group for name, group in vars(client).items() if isinstance(group, Resource)}
    found = {
        f"{prefix}{name}"
        for prefix, group in {"": client, **groups}.items()
        for kind in type(group).__mro__
        for name, member in vars(kind).items()
        if isinstance(member, call | stream)
    }

    assert found == CALLS.keys()


def test_every_operation_is_within_reach_or_left_out_for_a_reason(
    document: dict[str, Any], asked: DocumentedServer
) -> None:
    documented = operations(document, lambda path: path.startswith("/v1/") or path == "/predict")

    assert asked.asked.keys() - {"GET /healthz"} == documented.keys() - LEFT_OUT.keys()


def test_every_parameter_and_every_member_of_a_json_body_can_be_asked_for(
    document: dict[str, Any], asked: DocumentedServer
) -> None:
    documented = operations(document, lambda path: True)
    for name, of in asked.asked.items():
        assert of.query == parameters(documented[name], "query"), name
        if of.members:
            schema = documented[name]["requestBody"]["content"]["application/json"]["schema"]
            assert of.members == asked.body_members(schema), name


def test_hyperparameters_are_those_of_the_document(document: dict[str, Any]) -> None:
    documented = document["components"]["schemas"]["Hyperparameters"]["properties"]

    assert list(Hyperparameters.__annotations__) == list(documented)


def test_choices_are_those_of_the_document(document: dict[str, Any]) -> None:
    bodies = {
        Hyperparameters: document["components"]["schemas"]["Hyperparameters"],
        JobOptions: json_body_of(document, "/v1/jobs"),
        PredictOptions: json_body_of(document, "/predict"),
    }
    for options, schema in bodies.items():
        for name, hint in get_type_hints(options).items():
            assert choices_of_type(hint) == choices_of_schema(schema["properties"][name]), name


def json_body_of(document: dict[str, Any], path: str) -> dict[str, Any]:
    schema: dict[str, Any] = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return schema


def choices_of_type(hint: Any) -> set[str]:
    if get_origin(hint) is Literal:
        return set(get_args(hint))
    return {choice for each in get_args(hint) if each is not hint for choice in choices_of_type(each)}


def choices_of_schema(schema: dict[str, Any]) -> set[str]:
    own = set(schema.get("enum", [])) | {value for name, value in schema.items() if name == "const"}
    return own.union(*(choices_of_schema(each) for each in schema.get("anyOf", [])))


@pytest.mark.parametrize("name", CALLS)
def test_the_answer_has_every_documented_member_with_its_type(
    document: dict[str, Any], tmp_path: Path, name: str
) -> None:
    for is_sparse in (False, True):
        server = DocumentedServer(document, is_sparse=is_sparse)
        found = call_blocking(server, name, tmp_path)
        for answer in answers_in(found):
            TypeAdapter(strictly_typed(type(answer))).validate_python(members(answer))
        if server.answered is not None and not is_sparse and name not in ("predict_one", "is_alive"):
            assert as_json(found) == (server.answered["data"] if isinstance(found, Page | list) else server.answered)


@pytest.mark.parametrize("name", CALLS)
def test_the_awaited_client_gives_the_same(document: dict[str, Any], tmp_path: Path, name: str) -> None:
    server = DocumentedServer(document)

    assert call_awaited(server, name, tmp_path) == call_blocking(server, name, tmp_path)


def call_blocking(server: DocumentedServer, name: str, folder: Path) -> Any:
    with Graft("http://graft.test", max_retries=0, transport=httpx.MockTransport(server)) as graft:
        found = CALLS[name](graft, folder)
        return list(found) if isinstance(found, Iterator) else found


def call_awaited(server: DocumentedServer, name: str, folder: Path) -> Any:
    async def call_it() -> Any:
        async with AsyncGraft("http://graft.test", max_retries=0, transport=httpx.MockTransport(server)) as graft:
            found = CALLS[name](graft, folder)
            return await found if inspect.isawaitable(found) else [each async for each in found]

    return asyncio.run(call_it())


def answers_in(found: Any) -> list[Answer]:
    """It and everything in it."""
    if isinstance(found, Page):
        return answers_in(found.data)
    if isinstance(found, list):
        return [answer for each in found for answer in answers_in(each)]
    if isinstance(found, dict):
        return answers_in(list(found.values()))
    return [found, *answers_in(members(found))] if isinstance(found, Answer) else []


def members(answer: Answer) -> dict[str, Any]:
    return {each.name: getattr(answer, each.name) for each in fields(answer) if each.name != "raw"}


def strictly_typed(kind: type[Answer]) -> Any:
    """A model with the members of the class, which takes nothing but what they are annotated with."""
    hints = {name: (hint, ...) for name, hint in get_type_hints(kind).items() if name != "raw"}
    return create_model(kind.__name__, __config__=ConfigDict(strict=True), **hints)


def as_json(found: Any) -> Any:
    if isinstance(found, Page):
        return as_json(found.data)
    if isinstance(found, list | tuple):
        return [as_json(each) for each in found]
    if isinstance(found, dict):
        return {name: as_json(each) for name, each in found.items()}
    if isinstance(found, datetime):
        return found.isoformat().replace("+00:00", "Z")
    if isinstance(found, Answer) and is_dataclass(found):
        return {
            each.metadata.get("json", each.name): as_json(getattr(found, each.name))
            for each in fields(found)
            if each.name != "raw"
        }
    return found
