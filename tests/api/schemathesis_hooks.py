"""What Schemathesis is told beside the document: rules that no schema can say, for what is to be accepted; files that
are what their fields ask for; and no long waits."""

import base64
import contextlib
import hashlib
import json
import os
import uuid
from typing import Any

import builders
import schemathesis

ARCHIVE = builders.zip_of(builders.class_folders(8))
PICTURE = builders.jpeg(1)
IN_BASE64 = base64.b64encode(PICTURE).decode()
UPLOADS = ("/v1/datasets", "/v1/batches", "/v1/files")
LABEL = "cat"  # that the model which is asked knows
# What an option of /predict means something beside.
BESIDE = {
    "head": "neighbors",
    "last_stage": "neighbors",
    "normalisation": "entropy",
    "all": "entropy",
}
THERE: dict[str, str] = json.loads(os.environ.get("GRAFT_TEST_THERE", "{}"))
LISTS = {f"/v1/{kind}s": kind for kind in ("dataset", "job", "model", "webhook")} | {"/v1/batches": "batch"}

schemathesis.serializer.alias("application/offset+octet-stream", "application/octet-stream")


@schemathesis.hook
def filter_body(context: schemathesis.HookContext, body: Any) -> bool:
    """Without forms that cannot show what is wrong in them: a text that reads as a number, a list of one or none."""
    if not (isinstance(body, dict) and "file" in body):
        return True
    return not any(_looks_right(value) for name, value in body.items() if name != "file")


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    return body if context.operation is None else _with_a_file(body, context.operation.path)


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, **kwargs: Any) -> None:
    _make_short(case)
    if case.meta is not None and case.meta.generation.mode.is_positive:
        _keep_unwritten_rules(case)
    # It would look at what was changed, find bytes where the schema has a text, and call the whole case an invalid one.
    case._record_starting_state()


def _with_a_file(body: Any, path: str) -> Any:
    if isinstance(body, dict) and "file" in body:
        own = ARCHIVE if path in UPLOADS else PICTURE
        body["file"] = [own for _ in body["file"]] if isinstance(body["file"], list) else own
    return body


def _make_short(case: schemathesis.Case) -> None:
    """Waits of a second, adaptation of one step: more of them takes long and shows nothing else."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        if 1 < float(case.query["wait"]) <= 60:
            case.query["wait"] = 1
    if "adapt" in case.query and "adapt_steps" not in case.query:
        case.query["adapt_steps"] = 1


def _keep_unwritten_rules(case: schemathesis.Case) -> None:
    """Has what fits the document keep the rules that no schema can say as well: then it must be accepted."""
    path = case.operation.path
    if "after" in case.query:
        case.query = {name: value for name, value in case.query.items() if name != "after"}
        if path in LISTS:
            case.query["after"] = THERE[LISTS[path]]
    for name in list(case.headers):
        if name.lower() == "idempotency-key":
            case.headers[name] = uuid.uuid4().hex  # one that came before belongs to another request
    case.query = _without_what_no_database_keeps(dict(case.query))
    if isinstance(case.body, dict | list):
        case.body = _with_a_file(_without_what_no_database_keeps(case.body), path)
    for name in ("name", "suffix"):
        if isinstance(case.body, dict) and isinstance(case.body.get(name), str):
            case.body[name] = "".join(c if c.isprintable() and not c.isspace() else "_" for c in case.body[name])
    if path in UPLOADS:
        case.body = case.body if isinstance(case.body, dict) else ARCHIVE
    elif path == "/v1/uploads" or path.startswith("/v1/uploads/"):
        _keep_to_tus(case)
    elif path.startswith("/v1/webhooks") and isinstance(case.body, dict) and case.body.get("url") is not None:
        case.body["url"] = "https://hooks.example/"
    elif path == "/v1/jobs" and isinstance(case.body, dict):
        for name in ("method", "backbone", "hyperparameters", "exclude"):  # as the data set and each other allow
            case.body.pop(name, None)
    elif path == "/v1/fine_tuning/jobs" and isinstance(case.body, dict):
        case.body["model"] = "auto"
        _ask_for_one_method(case.body)
    elif path.endswith("/feedback") and isinstance(case.body, dict):
        case.body.pop("task", None)  # the model tells one thing
        case.body["label"] = LABEL
    elif path.startswith("/hf/"):
        case.body = case.body | {"inputs": IN_BASE64} if isinstance(case.body, dict) else PICTURE
    elif path.endswith("/infer"):
        _send_a_picture(case)
    elif path == "/predict" or path.endswith(("/classes", "/personalise")):
        _send_pictures(case)


def _without_what_no_database_keeps(value: Any) -> Any:
    """No NUL and no half of a surrogate pair in any text."""
    if isinstance(value, dict):
        return {_without_what_no_database_keeps(k): _without_what_no_database_keeps(v) for k, v in value.items()}
    if isinstance(value, list):
        kept = [_without_what_no_database_keeps(member) for member in value]
        return list(dict.fromkeys(kept)) if all(isinstance(member, str) for member in kept) else kept
    if isinstance(value, str):
        return "".join("_" if c == "\0" or "\ud800" <= c <= "\udfff" else c for c in value)
    return value


def _keep_to_tus(case: schemathesis.Case) -> None:
    """A digest is that of the piece, which is no longer than the upload, and the metadata are options of one."""
    if case.operation.method.upper() in ("POST", "PATCH"):
        case.body = PICTURE
    for name in list(case.headers):
        if name.lower() == "upload-length":
            case.headers[name] = str(len(PICTURE) + 1 + int(case.headers[name]) % 1000)
        elif name.lower() == "upload-checksum":
            case.headers[name] = f"sha256 {base64.b64encode(hashlib.sha256(PICTURE).digest()).decode()}"
        elif name.lower() == "upload-metadata":
            case.headers[name] = f"name {base64.b64encode('Größe'.encode()).decode()}"


def _ask_for_one_method(body: dict[str, Any]) -> None:
    body.pop("validation_file", None)  # there is none beside training_file
    method = body.get("method")
    if isinstance(method, dict):
        body.pop("hyperparameters", None)
        body["method"] = {name: value for name, value in method.items() if name in ("type", method["type"])}
    for options in (body, *(value for value in (body.get("method") or {}).values() if isinstance(value, dict))):
        if options.get("hyperparameters"):
            options["hyperparameters"] = {"n_epochs": "auto", "batch_size": 8}  # the document leaves them open


def _send_a_picture(case: schemathesis.Case) -> None:
    """In JSON alone: then there is no header that says where the JSON ends."""
    case.headers = {n: v for n, v in case.headers.items() if n.lower() != "inference-header-content-length"}
    if isinstance(case.body, dict):
        tensor = {"name": "image", "datatype": "BYTES", "shape": [1, 1], "data": [IN_BASE64]}
        case.body |= {"inputs": [tensor], "outputs": [{"name": "scores"}]}
    else:
        case.body = PICTURE
        case.headers["Inference-Header-Content-Length"] = "0"


def _send_pictures(case: schemathesis.Case) -> None:
    body = case.body
    if isinstance(body, dict):
        if "images" in body:
            body["images"] = [image | {"b64": IN_BASE64} for image in body["images"][:2]]
            for image in body["images"]:
                if "label" in image:
                    image["label"] = LABEL
        if "label" in body:
            body["label"] = [LABEL]
        if "name" in body:
            body["name"] = f"new {len(body['name'])}"
    else:
        case.body = body = PICTURE
    if case.operation.path == "/predict":
        in_body = body if isinstance(body, dict) else {}
        for name in set(case.query) & set(in_body):  # given once
            del in_body[name]
        options = {**case.query, **in_body}
        if "adapt" in in_body:
            in_body["adapt_steps"] = 1
        for place in (case.query, in_body):
            for name in [name for name in place if name.startswith("adapt_") and _is_without_meaning(name, options)]:
                del place[name]


def _is_without_meaning(name: str, options: dict[str, Any]) -> bool:
    adapt = options.get("adapt")
    if adapt not in ("neighbors", "entropy"):
        return True
    return name == "adapt_parameters" and BESIDE.get(options[name]) != adapt


def _looks_right(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) < 2
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            float(value)
            return True
    return False
