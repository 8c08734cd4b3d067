"""What the OpenAPI document says beyond what FastAPI sees: bodies that we parse ourselves, problems, the key."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from app.api.problems import PROBLEM_JSON
from app.api.schemas import ProblemDocument

_REFERENCE = "#/components/schemas/{model}"

# In a parameter's schema: it is needed, though the route reads it as one that may be missing, to say that itself.
REQUIRED = "x-graft-required"

_MEANINGS = {
    400: "The request cannot be read.",
    401: "A valid API key is needed.",
    403: "The API key's scope does not allow this.",
    404: "Not found.",
    405: "The path does not take this method.",
    408: "The request's body stopped coming.",
    409: "Not possible in this state; with Retry-After where waiting helps.",
    412: "Another version of the protocol than the server's.",
    413: "Too large.",
    415: "The body is compressed.",
    416: "Range asks for a part behind the end.",
    421: "The server is called by a name that is not known to be its own.",
    422: "The request is not valid; `errors` points at each wrong field.",
    423: "Another request is at it; Retry-After says when to come back.",
    429: "Too many requests, or a quota is spent; Retry-After says when to come back, if waiting helps.",
    460: "The piece is not what its checksum says.",
    500: "Something went wrong in the server.",
    503: "Busy or not ready; Retry-After says when to come back.",
    507: "The server's disk is full.",
}

# Any path may answer these.
COMMON_STATUSES = (401, 403, 415, 421, 422, 429, 500, 503)

Responses = dict[int | str, dict[str, Any]]


def problems(*statuses: int) -> Responses:
    """The `responses` of a route that can fail with these statuses, besides the common ones."""
    content = {PROBLEM_JSON: {"schema": {"$ref": _REFERENCE.format(model=ProblemDocument.__name__)}}}
    return {status: {"description": _MEANINGS[status], "content": content} for status in statuses}


def json_request(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """The `openapi_extra` of a route whose JSON body we parse ourselves."""
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": _schema(model)}}}}


def options_of(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """The schemas of members that may all be left out, by name: without the null that stands for that."""
    found = {}
    for name, schema in _schema(model)["properties"].items():
        given = _without_null({"anyOf": schema.get("anyOf", [schema])})
        found[name] = given | {key: schema[key] for key in ("description",) if key in schema}
    return found


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of what may be left out, which in a query, a header or a form is not the same as null."""
    given = [kind for kind in schema.get("anyOf", ()) if kind.get("type") != "null"]
    if not given:
        return schema
    rest = {key: value for key, value in schema.items() if key != "anyOf"}
    return given[0] | rest if len(given) == 1 else {"anyOf": given} | rest


def as_form_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The schemas of members that may be left out, as fields of a form: an empty one counts as left out."""
    empty = {"type": "string", "enum": [""]}
    found = {}
    for name, schema in fields.items():
        described = {key: value for key, value in schema.items() if key == "description"}
        kind = {key: value for key, value in schema.items() if key != "description"}
        found[name] = {"anyOf": [kind, empty], **described}
    return found


def form(properties: Mapping[str, Any], *, required: Sequence[str], **more: Any) -> dict[str, Any]:
    """The `content` of a form that has these fields alone. more: further keywords of its schema."""
    schema = {"type": "object", "required": required, "properties": properties, "additionalProperties": False, **more}
    return {"multipart/form-data": {"schema": schema}}


def query_of(model: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads these options from its query itself."""
    return {
        "parameters": [
            {"name": name, "in": "query", "required": False, "description": schema.pop("description"), "schema": schema}
            for name, schema in options_of(model).items()
        ]
    }


def describe(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """A replacement for `app.openapi`."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    return openapi


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title="Graft",
        version=app.version,
        summary="Turns a zip of images into a served classifier.",
        description="Failures are RFC 9457 problem documents. Without any API key the server listens on this machine "
        "alone and asks for none; once there is one, every path but /healthz and /readyz needs it.",
        routes=app.routes,
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas.update(_schemas(ProblemDocument))
    document["components"]["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "An API key: `Authorization: Bearer ft_…`."}
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            # An empty requirement says that a key is optional, as it is until the first one is created.
            operation["security"] = [] if path in ("/healthz", "/readyz") else [{"key": []}, {}]
            for parameter in operation.get("parameters", ()):
                parameter["schema"] = _without_null(parameter["schema"])
                parameter["required"] = parameter["schema"].pop(REQUIRED, parameter.get("required", False))
            responses = operation["responses"]
            for status, problem in problems(*COMMON_STATUSES).items():
                if "application/json" in responses.get(str(status), {}).get("content", {}):
                    responses.pop(str(status))  # FastAPI's own description of a 422
                responses.setdefault(str(status), problem)
            _share_problems(responses, document["components"].setdefault("responses", {}))
            _collect_definitions(operation, schemas)
    _link_what_is_made(document["paths"])
    return document


def _link_what_is_made(paths: dict[str, Any]) -> None:
    """Says of each 201 what may be done with the new resource: its `id` is what the paths below the collection ask."""
    for path, operations in paths.items():
        below = re.compile(rf"{re.escape(path)}/{{(\w+)}}")
        links = {
            operation["operationId"]: {
                "operationId": operation["operationId"],
                "parameters": {f"path.{found[1]}": "$response.body#/id"},
            }
            for other, of_other in paths.items()
            if (found := below.match(other)) and other.count("{") == path.count("{") + 1
            for operation in of_other.values()
        }
        for operation in operations.values():
            if "201" in operation["responses"] and links:
                operation["responses"]["201"]["links"] = links


def _share_problems(responses: dict[str, Any], shared: dict[str, Any]) -> None:
    """Has every operation refer to one description of each problem, which they would all repeat."""
    for status, response in responses.items():
        if int(status) in _MEANINGS and response == problems(int(status))[int(status)]:
            name = f"Problem{status}"
            shared[name] = response
            responses[status] = {"$ref": f"#/components/responses/{name}"}


def _collect_definitions(operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    """Moves `$defs` of request bodies to where their references point."""
    for content in operation.get("requestBody", {}).get("content", {}).values():
        schemas.update(content.get("schema", {}).pop("$defs", {}))


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema(ref_template=_REFERENCE)


def _schemas(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template=_REFERENCE, mode="serialization")
    return {**schema.pop("$defs", {}), model.__name__: schema}
