"""Everything that is expected to go wrong, as one tree.

An error carries what every reader needs: a stable `code` for programs (kebab-case, the slug at the end of the
problem's `type`; also a failed job's `error.code`), an HTTP `status`, a `title` that names the kind of problem, and a
`detail` that says what to do next. Knows nothing of HTTP libraries: `app/api/problems.py` turns these into answers.

    GraftError
    ├── InvalidRequest             422   a field is wrong; `errors` says which and why
    │   ├── InvalidHyperparameter
    │   ├── WeightsUnavailable           no pretrained weights can be had for this backbone
    │   ├── WeightsRefused               a weight file that is not what its backbone needs
    │   ├── ArchiveRefused               the upload is structurally wrong; `code` says how
    │   └── ImageRefused                 a picture that cannot be read, or is beyond the limits
    ├── Unauthenticated            401
    ├── Forbidden                  403
    ├── NotFound                   404
    ├── RequestTimeout             408   the client stopped sending
    ├── Conflict                   409   not in this state
    ├── PreconditionFailed         412   the client speaks another version of a protocol
    ├── TooLarge                   413
    ├── UnsupportedMediaType       415
    ├── Misdirected                421   the server is not called by a name of its own
    ├── Locked                     423   somebody else is at it; waiting helps
    ├── TooManyRequests            429
    ├── Overloaded                 503   waiting helps: `retry_after_seconds`
    ├── ModelUnavailable           503   a registered model whose files are missing or damaged
    ├── ExportUnavailable          503   a model's file cannot be made, or answers otherwise than the model
    ├── StorageFull                507
    ├── DatabaseMismatch           503   the database is older or newer than this code
    └── JobFailed                  500   why a job ended; never the answer to a request
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class FieldError:
    """One wrong field. pointer: RFC 6901 within the request body, such as "#/hyperparameters/epochs"."""

    pointer: str
    detail: str


class GraftError(Exception):
    """An expected failure. `detail` is shown to the caller: no paths, no library text, what to do next."""

    status: ClassVar[int] = 500
    code: str = "internal-error"
    title: str = "Internal error"

    def __init__(
        self,
        detail: str,
        *,
        code: str | None = None,
        title: str | None = None,
        errors: Sequence[FieldError] = (),
        retry_after_seconds: int | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code or self.code
        self.title = title or self.title
        self.errors = tuple(errors)
        self.retry_after_seconds = retry_after_seconds

    def as_record(self) -> dict[str, Any]:
        """The error as it is stored with a failed job or data set, and shown as its `error`."""
        record: dict[str, Any] = {
            "type": problem_type(self.code),
            "code": self.code,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }
        if self.errors:
            record["errors"] = [{"pointer": e.pointer, "detail": e.detail} for e in self.errors]
        return record


def problem_type(code: str) -> str:
    """The `type` URI of a problem: a relative reference whose last segment is the stable slug."""
    return f"/problems/{code}"


class InvalidRequest(GraftError):
    status = 422
    code = "invalid-request"
    title = "The request is not valid"


class InvalidHyperparameter(InvalidRequest):
    code = "invalid-hyperparameter"
    title = "Invalid hyperparameter"


class WeightsUnavailable(InvalidRequest):
    code = "weights-unavailable"
    title = "No pretrained weights for this backbone"


class WeightsRefused(InvalidRequest):
    code = "weights-refused"
    title = "The weight file cannot be used"


class ArchiveRefused(InvalidRequest):
    code = "archive-refused"
    title = "The archive cannot be used"


class ImageRefused(InvalidRequest):
    code = "unreadable-image"
    title = "The picture cannot be read"


class Unauthenticated(GraftError):
    status = 401
    code = "unauthenticated"
    title = "A valid API key is needed"


class Forbidden(GraftError):
    status = 403
    code = "scope-too-small"
    title = "The API key's scope does not allow this"


class NotFound(GraftError):
    status = 404
    code = "not-found"
    title = "Not found"


class RequestTimeout(GraftError):
    status = 408
    code = "request-timeout"
    title = "The request took too long to arrive"


class Conflict(GraftError):
    """Not possible in the present state. `retry_after_seconds` only where waiting helps."""

    status = 409
    code = "conflict"
    title = "Not possible in this state"


class PreconditionFailed(GraftError):
    status = 412
    code = "precondition-failed"
    title = "Another version of the protocol"


class TooLarge(GraftError):
    status = 413
    code = "too-large"
    title = "Too large"


class UnsupportedMediaType(GraftError):
    status = 415
    code = "unsupported-media-type"
    title = "Unsupported media type"


class Misdirected(GraftError):
    status = 421
    code = "unknown-host"
    title = "Not a name of this server"


class Locked(GraftError):
    status = 423
    code = "locked"
    title = "In use by another request"


class TooManyRequests(GraftError):
    status = 429
    code = "too-many-requests"
    title = "Too many requests"


class Overloaded(GraftError):
    status = 503
    code = "overloaded"
    title = "Busy, try again soon"


class ModelUnavailable(GraftError):
    status = 503
    code = "model-unavailable"
    title = "The model cannot be loaded"


class ExportUnavailable(GraftError):
    status = 503
    code = "export-unavailable"
    title = "The file cannot be made"


class StorageFull(GraftError):
    status = 507
    code = "storage-full"
    title = "The storage is full"


class DatabaseMismatch(GraftError):
    status = 503
    code = "database-mismatch"
    title = "The database belongs to another version of Graft"


class JobFailed(GraftError):
    """Why a job ended as failed: `code` is one of the underscored job failure codes in docs/job-states.md."""

    code = "job-failed"
    title = "The job failed"


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names for a sentence: all of them, or the first ones and how many more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
