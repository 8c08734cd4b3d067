"""What can go wrong, as exceptions.

GraftError
├── ServerUnreachable          nothing answers at the address, or it went away
├── UnexpectedAnswer           what answers there does not speak as Graft does
├── WaitTimedOut               what was waited for has not ended in time; also a TimeoutError
└── ServerRefused              the server said no, as a problem (RFC 9457)
    ├── Unauthenticated   401  no valid API key
    ├── Forbidden         403  the key may not do this
    ├── NotFound          404
    ├── Conflict          409  not in this state
    ├── TooLarge          413
    ├── InvalidRequest    422  `errors` names each wrong field
    ├── TooManyRequests   429
    ├── Unavailable       503  busy or not ready
    └── StorageFull       507
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class GraftError(Exception):
    """Everything that this package raises, but for wrong arguments (ValueError, FileNotFoundError)."""


class ServerUnreachable(GraftError):
    """Nothing answers at this address."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"No Graft server answers at {url} ({reason}).")
        self.url = url


class UnexpectedAnswer(GraftError):
    """The answer is not what a Graft server sends."""


class WaitTimedOut(GraftError, TimeoutError):
    """What was waited for goes on; `last_seen` is its newest state."""

    def __init__(self, seconds: float, last_seen: Any) -> None:
        super().__init__(f"{last_seen.id} is still {last_seen.status} after {seconds:g} s.")
        self.last_seen = last_seen


@dataclass(frozen=True)
class FieldError:
    """One wrong field. pointer: RFC 6901 into the request, such as "#/hyperparameters/epochs"."""

    pointer: str
    detail: str


class ServerRefused(GraftError):
    """The server answered with a problem; its `detail` says what to do next.

    code: the stable slug at the end of its type, such as "not-found"; "" if the answer was no problem.
    request_id: under which the server's log has it. problem: the body as it came.
    """

    def __init__(
        self,
        status: int,
        problem: Mapping[str, Any],
        *,
        request_id: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        self.status = status
        self.problem = problem
        self.code = str(problem.get("type", "")).rsplit("/", 1)[-1]
        self.title: str = problem.get("title") or ""
        self.detail: str = problem.get("detail") or self.title or f"The server answered {status}."
        self.errors = [FieldError(each.get("pointer", ""), each.get("detail", "")) for each in _wrong_fields(problem)]
        self.request_id: str | None = problem.get("request_id") or request_id
        self.retry_after_seconds = retry_after_seconds
        super().__init__(self.detail)


class Unauthenticated(ServerRefused):
    pass


class Forbidden(ServerRefused):
    pass


class NotFound(ServerRefused):
    pass


class Conflict(ServerRefused):
    pass


class TooLarge(ServerRefused):
    pass


class InvalidRequest(ServerRefused):
    pass


class TooManyRequests(ServerRefused):
    pass


class Unavailable(ServerRefused):
    pass


class StorageFull(ServerRefused):
    pass


# Of other statuses the class is ServerRefused itself.
BY_STATUS: dict[int, type[ServerRefused]] = {
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    422: InvalidRequest,
    429: TooManyRequests,
    503: Unavailable,
    507: StorageFull,
}


def _wrong_fields(problem: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    errors = problem.get("errors")
    return [each for each in errors if isinstance(each, dict)] if isinstance(errors, list) else []
