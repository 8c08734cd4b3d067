"""Failures as answers: RFC 9457 problem documents, the same from every path.

Stock clients read only a member `error`: the OpenAI SDK an object (`/v1`, `/predict`), the Open Inference Protocol and
Hugging Face a string (`/v2`, `/hf`). So every problem carries both forms of itself.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from app.errors import FieldError, GraftError, InvalidHyperparameter, InvalidRequest, problem_type

PROBLEM_JSON = "application/problem+json"
# Clients and proxies refuse headers of some kilobytes; the body has the whole text.
MAX_HEADER_CHARACTERS = 1000

# Slug and advice for what the framework refuses before any of our code runs.
_FRAMEWORK_PROBLEMS: dict[int, tuple[str, str]] = {
    400: ("bad-request", "The request could not be read; check how it is built."),
    404: ("not-found", "There is nothing at this path; /docs lists what there is."),
    405: ("method-not-allowed", "This path does not take this method; the Allow header lists those it takes."),
    413: ("too-large", "The request is too large."),
    415: ("unsupported-media-type", "The request's media type is not supported."),
    416: ("range-not-satisfiable", "The file ends before the part that Range asks for; ask for the whole."),
    431: ("headers-too-large", "The request's headers are too large."),
}

# The kinds that the OpenAI SDK's users switch on.
_ERROR_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}


@dataclass(frozen=True)
class Problem:
    """One problem document, ready to be written for any path. extra: further members, such as `checks` of /readyz."""

    status: int
    code: str
    title: str
    detail: str
    errors: tuple[FieldError, ...] = ()
    retry_after_seconds: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, error: GraftError) -> "Problem":
        return cls(
            status=error.status,
            code=error.code,
            title=error.title,
            detail=error.detail,
            errors=error.errors,
            retry_after_seconds=error.retry_after_seconds,
        )

    @classmethod
    def of_status(
        cls, status: int, *, detail: str | None = None, headers: Mapping[str, str] | None = None
    ) -> "Problem":
        """What the framework answered with a bare status."""
        phrase = HTTPStatus(status).phrase
        code, advice = _FRAMEWORK_PROBLEMS.get(status, (phrase.lower().replace(" ", "-"), f"{phrase}."))
        return cls(status=status, code=code, title=phrase, detail=detail or advice, headers=headers or {})

    def document(self, *, request_id: str, path: str) -> dict[str, Any]:
        document: dict[str, Any] = {
            "type": problem_type(self.code),
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "request_id": request_id,
            **self.extra,
        }
        if self.errors:
            document["errors"] = [{"pointer": error.pointer, "detail": error.detail} for error in self.errors]
        document["error"] = self.detail if _wants_string(path) else self._error_object()
        return document

    def response(self, *, request_id: str, path: str) -> Response:
        body = json.dumps(self.document(request_id=request_id, path=path), ensure_ascii=False).encode(
            "utf-8",
            "backslashreplace",  # a caller's lone surrogate may be quoted in the detail
        )
        return Response(
            body, status_code=self.status, headers=self.response_headers(path=path), media_type=PROBLEM_JSON
        )

    def response_headers(self, *, path: str) -> dict[str, str]:
        headers = dict(self.headers)
        if self.retry_after_seconds is not None:
            headers["Retry-After"] = str(self.retry_after_seconds)
        elif self.status == HTTPStatus.CONFLICT:
            # The OpenAI SDK repeats every 409 unless told that it is in vain.
            headers["x-should-retry"] = "false"
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        if _wants_string(path):
            headers["X-Error-Code"] = self.code
            headers["X-Error-Message"] = _header_text(self.detail)
        return headers

    def _error_object(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else _ERROR_KINDS.get(self.status, "invalid_request_error")
        param = self.errors[0].pointer.rpartition("/")[2] if self.errors else None
        return {"message": self.detail, "type": kind, "param": param or None, "code": self.code}


INTERNAL_ERROR = Problem(
    status=500,
    code="internal-error",
    title="Internal error",
    detail="Something went wrong on our side; it has been logged under this request_id.",
)


def invalid_fields(errors: Iterable[Mapping[str, Any]]) -> InvalidRequest:
    """Pydantic's findings as our error. errors: from `ValidationError.errors()`, locations relative to the body."""
    found = [FieldError(pointer=_pointer(error["loc"]), detail=_sentence(error)) for error in errors]
    kind = InvalidHyperparameter if found[0].pointer.startswith("#/hyperparameters") else InvalidRequest
    detail = "; ".join(f"{error.pointer.removeprefix('#/') or 'the body'}: {error.detail}" for error in found[:3])
    if len(found) > 3:
        detail += f"; and {len(found) - 3} more, see `errors`"
    return kind(detail, errors=found)


def pointer_to(*names: str | int) -> str:
    """RFC 6901 pointer to a field of the body: its name, or the names and places on the way to it."""
    return _pointer(names)


def _pointer(location: Iterable[str | int]) -> str:
    return "#" + "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in location)


def _sentence(error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "there is no such field"
    if error["type"] == "missing":
        return "is required"
    message = str(error["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _header_text(detail: str) -> str:
    """What a header may hold: ASCII on one line. A detail may quote what the caller sent."""
    printable = "".join(character if character.isprintable() else " " for character in detail[:MAX_HEADER_CHARACTERS])
    return " ".join(printable.encode("ascii", "replace").decode().split())


def _wants_string(path: str) -> bool:
    return path in ("/v2", "/hf") or path.startswith(("/v2/", "/hf/"))
