"""A server made of the OpenAPI document: checks each request against it, and answers with every member it names."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

Json = Any


@dataclass
class Asked:
    """What was asked of one operation, by all requests together."""

    query: set[str] = field(default_factory=set)
    members: set[str] = field(default_factory=set)  # of a JSON body


class DocumentedServer:
    """is_sparse: answers only what is indispensable, with null wherever there may be null."""

    def __init__(self, document: dict[str, Any], *, is_sparse: bool = False) -> None:
        self.document = document
        self.is_sparse = is_sparse
        self.asked: dict[str, Asked] = {}
        self.answered: Json = None  # the last body in JSON

    def __call__(self, request: httpx.Request) -> httpx.Response:
        name, operation = self._operation(request)
        asked = self.asked.setdefault(name, Asked())
        assert set(request.url.params) <= parameters(operation, "query"), f"{name} knows no such parameter"
        asked.query |= set(request.url.params)
        self._check_body(name, operation, request, asked)
        if "text/event-stream" in request.headers.get("Accept", ""):
            return httpx.Response(200, headers={"Content-Type": "text/event-stream"}, content=EVENTS)
        status, schema = answer_of(operation, status=200 if "dry_run" in request.url.params else None)
        if schema is None:
            return httpx.Response(status, headers={"X-Graft-Verified": "{}"}, content=b"bytes")
        self.answered = self.fabricated(schema)
        return httpx.Response(status, json=self.answered)

    def fabricated(self, schema: Json) -> Json:
        """A value as the schema describes it."""
        if "$ref" in schema:
            return self.fabricated(self.resolved(schema))
        if "const" in schema or "enum" in schema:
            return schema.get("const", schema.get("enum", [None])[0])
        if "anyOf" in schema:
            is_nullable = {"type": "null"} in schema["anyOf"]
            return None if is_nullable and self.is_sparse else self.fabricated(schema["anyOf"][0])
        match schema.get("type"):
            case "object":
                return self._object(schema)
            case "array":
                items = schema.get("prefixItems") or self._variants(schema["items"])
                return [self.fabricated(each) for each in items]
            case "string":
                return "2026-11-01T10:00:00Z" if schema.get("format") == "date-time" else "text"
            case "integer":
                return 3
            case "number":
                return 0.5
            case "boolean":
                return False
            case "null":
                return None
        return {"anything": 1}

    def resolved(self, schema: Json) -> Json:
        name = schema["$ref"].rpartition("/")[2]
        return self.document["components"]["schemas"][name]

    def _object(self, schema: Json) -> Json:
        if "properties" not in schema:
            of_each = schema.get("additionalProperties")
            return {"name": self.fabricated(of_each)} if isinstance(of_each, dict) else {"anything": 1}
        needed = schema.get("required", [])
        return {
            name: self.fabricated(member)
            for name, member in schema["properties"].items()
            # Constants have a default, and are sent all the same.
            if not self.is_sparse or name in needed or "const" in member
        }

    def _variants(self, schema: Json) -> list[Json]:
        return [each for each in schema.get("anyOf", [schema]) if each != {"type": "null"}]

    def _operation(self, request: httpx.Request) -> tuple[str, Json]:
        for template, methods in self.document["paths"].items():
            pattern = re.sub(r"\{[^}]+\}", "[^/]+", template)
            if re.fullmatch(pattern, request.url.path) and request.method.lower() in methods:
                return f"{request.method} {template}", methods[request.method.lower()]
        raise AssertionError(f"there is no operation {request.method} {request.url.path}")

    def _check_body(self, name: str, operation: Json, request: httpx.Request, asked: Asked) -> None:
        if not request.content:
            return
        kind = request.headers["Content-Type"].partition(";")[0]
        schema = operation["requestBody"]["content"][kind]["schema"]
        if kind == "application/json":
            members = json.loads(request.content).keys()
            known = self.body_members(schema)
            assert members <= known, f"{name} knows no members {members - known}"
            asked.members |= members

    def body_members(self, schema: Json) -> set[str]:
        return set((self.resolved(schema) if "$ref" in schema else schema)["properties"])


EVENTS = b'id: 7\nevent: epoch\ndata: {"epoch": 1}\n\nevent: done\ndata: {"status": "succeeded"}\n\n'


def parameters(operation: Json, place: str) -> set[str]:
    return {each["name"] for each in operation.get("parameters", []) if each["in"] == place}


def answer_of(operation: Json, *, status: int | None) -> tuple[int, Json | None]:
    """The status of success, and the schema of its JSON; None where it is something else."""
    successes = [int(each) for each in operation["responses"] if each.startswith("2")]
    chosen = status or (201 if 201 in successes else 200)
    content = operation["responses"][str(chosen)].get("content", {})
    return chosen, content.get("application/json", {}).get("schema")


def operations(document: Json, is_wanted: Callable[[str], bool]) -> dict[str, Json]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if is_wanted(path)
    }
