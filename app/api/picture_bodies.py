"""Pictures in a request's body: as a form, as raw bytes, or as JSON in base64, told apart by their first bytes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from app.api.data_urls import bytes_of
from app.api.deps import read_body, refuse_declared_size
from app.api.openapi import as_form_fields, form
from app.api.problems import pointer_to
from app.api.schemas import PicturesRequest
from app.api.strict_json import parse_as, strict_json
from app.errors import FieldError, ImageRefused, InvalidRequest, TooLarge
from app.vision.images import sniff

MAX_FORM_FIELDS = 20
MAX_FORM_FILES = 1000

_HOW_TO = (
    "Send pictures as `-F file=@cat.jpg` (one or many), as raw bytes `--data-binary @cat.jpg`, or as JSON "
    '`{"images": [{"b64": "…"}]}`.'
)


@dataclass(frozen=True)
class Picture:
    """A picture as it came. encoded: its bytes, or why there are none. labels: where the body may say what it is: by
    task, "" where it names none; none that are empty."""

    filename: str | None
    encoded: bytes | ImageRefused
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PictureBody:
    """What a request's body holds. fields: what it says besides, as text from a form; JSON's as they are parsed."""

    pictures: list[Picture]
    fields: dict[str, Any] = field(default_factory=dict)


async def read_pictures(request: Request, *, schema: type[PicturesRequest], max_bytes: int) -> PictureBody:
    """schema: of the JSON form; its members besides `images` are the fields that a form may have. Where the schema's
    pictures have a label, a form has one for the files behind it, `label:TASK` of each task; an empty one ends it.

    Raises InvalidRequest and TooLarge. A picture whose base64 is none is there as the reason for that.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        known = set(schema.model_fields) - {"images"}
        (of_picture,) = get_args(schema.model_fields["images"].annotation)
        has_labels = "label" in of_picture.model_fields
        return await _read_form(request, known=known, has_labels=has_labels, max_bytes=max_bytes)
    body = await read_body(request, max_bytes=max_bytes)
    if not body:
        raise InvalidRequest(f"The request has no body. {_HOW_TO}")
    if sniff(body[:16]) is None and (body.lstrip()[:1] == b"{" or media_type == "application/json"):
        return await run_in_threadpool(_read_json, body, schema)
    return PictureBody([Picture(filename=None, encoded=body)])


def form_content(fields: dict[str, Any], *, required: list[str]) -> dict[str, Any]:
    """The schemas of a form and of raw pictures, for a route's OpenAPI document. fields: besides the pictures."""
    pictures = {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}
    optional = as_form_fields({name: schema for name, schema in fields.items() if name not in required})
    of_tasks = {"patternProperties": {"^label:": fields["label"]}} if "label" in fields else {}
    return form({"file": pictures, **fields, **optional}, required=["file", *required], **of_tasks)


def form_or_json(
    schema: type[PicturesRequest], fields: dict[str, Any], *, required: list[str]
) -> dict[str, dict[str, Any]]:
    """The body of a route that takes pictures in a form or in JSON, for its `openapi_extra`. fields: as above."""
    in_json = {"schema": schema.model_json_schema(ref_template="#/components/schemas/{model}")}
    content = {**form_content(fields, required=required), "application/json": in_json}
    return {"requestBody": {"required": True, "content": content}}


async def _read_form(request: Request, *, known: set[str], has_labels: bool, max_bytes: int) -> PictureBody:
    refuse_declared_size(request, max_bytes=max_bytes)
    _, options = parse_options_header(request.headers["content-type"])
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"us-ascii"):
        # Python knows charsets that decode to what is no text, or to nothing at all.
        raise InvalidRequest("A form is read as UTF-8; leave `charset` out of its Content-Type.")
    counted = Request(request.scope, _counting(request.receive, max_bytes))
    pictures: list[Picture] = []
    fields: dict[str, Any] = {}
    labels: dict[str, str] = {}
    try:
        # The whole body is bounded, so a part need not be; large parts go to a temporary file, not into memory.
        # A label for each picture, where there are labels.
        max_fields = MAX_FORM_FIELDS + (MAX_FORM_FILES if has_labels else 0)
        async with counted.form(max_files=MAX_FORM_FILES, max_fields=max_fields) as form:
            for name, part in form.multi_items():
                if isinstance(part, UploadFile):
                    of_picture = {task: label for task, label in labels.items() if label}
                    pictures.append(Picture(_base_name(part.filename), await part.read(), of_picture))
                elif has_labels and (name == "label" or name.startswith("label:")):
                    labels[name.removeprefix("label").removeprefix(":")] = part
                else:
                    fields[name] = part
    except HTTPException as error:
        raise InvalidRequest(f"The form cannot be read: {error.detail} {_HOW_TO}") from None
    unknown = fields.keys() - known
    if unknown:
        known = known | ({"label"} if has_labels else set())
        raise InvalidRequest(
            f"There is no field {', '.join(sorted(unknown))} here; known are: {', '.join(['file', *sorted(known)])}. A "
            "picture's part needs a file name, as `-F file=@cat.jpg` gives it.",
            errors=[FieldError(pointer_to(name), "there is no such field") for name in sorted(unknown)],
        )
    if not pictures:
        raise InvalidRequest(f"The form has no picture. {_HOW_TO}", errors=[FieldError("#/file", "is required")])
    return PictureBody(pictures, fields)


def _counting(receive: Any, max_bytes: int) -> Any:
    received = 0

    async def counting() -> Any:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > max_bytes:
            raise TooLarge(f"The request's body is larger than the {max_bytes:,} bytes that are read here.")
        return message

    return counting


def _base_name(filename: str | None) -> str | None:
    """Only text for the answer; never a path of ours. Without NUL, which PostgreSQL keeps in no text."""
    return re.split(r"[/\\]", filename)[-1].replace("\0", "\N{REPLACEMENT CHARACTER}") if filename else None


def _read_json(body: bytes, schema: type[PicturesRequest]) -> PictureBody:
    content = strict_json(body)
    asked = parse_as(schema, content)
    pictures = [
        Picture(_base_name(image.filename), _decoded(image.b64, index), _labels(getattr(image, "label", {})))
        for index, image in enumerate(asked.images)
    ]
    return PictureBody(pictures, {name: getattr(asked, name) for name in asked.model_fields_set - {"images"}})


def _labels(label: str | Mapping[str, str]) -> Mapping[str, str]:
    return {"": label} if isinstance(label, str) else label


def _decoded(text: str, index: int) -> bytes | ImageRefused:
    try:
        return bytes_of(text)
    except ValueError:
        return ImageRefused("not valid base64", errors=[FieldError(f"#/images/{index}/b64", "is not valid base64")])
