"""What Schemathesis is told beside the document: files that are what their fields ask for, and no long waits."""

import contextlib
from typing import Any

import builders
import schemathesis

ARCHIVE = builders.zip_of(builders.class_folders(4))
PICTURE = builders.jpeg(1)
UPLOADS = ("/v1/datasets", "/v1/batches", "/v1/files")

schemathesis.serializer.alias("application/offset+octet-stream", "application/octet-stream")


@schemathesis.hook
def filter_body(context: schemathesis.HookContext, body: Any) -> bool:
    """Without forms that cannot show what is wrong in them: a text that reads as a number, a list of one or none."""
    if not (isinstance(body, dict) and "file" in body):
        return True
    return not any(_looks_right(value) for name, value in body.items() if name != "file")


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    if isinstance(body, dict) and "file" in body and context.operation is not None:
        own = ARCHIVE if context.operation.path in UPLOADS else PICTURE
        body["file"] = [own for _ in body["file"]] if isinstance(body["file"], list) else own
    return body


@schemathesis.hook
def map_query(context: schemathesis.HookContext, query: Any) -> Any:
    if isinstance(query, dict) and isinstance(query.get("wait"), int | float) and query["wait"] > 1:
        query["wait"] = 1 if query["wait"] <= 60 else query["wait"]
    if isinstance(query, dict) and "adapt" in query and "adapt_steps" not in query:
        query["adapt_steps"] = 1  # more take seconds
    return query


def _looks_right(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) < 2
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            float(value)
            return True
    return False
