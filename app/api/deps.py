"""What routes are given: the services they call, and requests read strictly.

Bodies are parsed here from their bytes, whatever the Content-Type says: `curl -d` names JSON a form, and stock clients
of the inference protocols name it nothing at all.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Header, Query, Request
from fastapi.dependencies.utils import get_flat_params
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from app.access import Caller
from app.api import idempotency
from app.api.services import Services
from app.api.strict_json import parse_as, strict_json
from app.errors import FieldError, InvalidRequest, TooLarge

MAX_JSON_BYTES = 64 * 1024

# Between two looks at a row that somebody waits for: short at first, since small jobs end soon.
FIRST_POLL_SECONDS = 0.05
LONGEST_POLL_SECONDS = 0.5
# Work that takes longer is given up when its client leaves.
WATCHED_AFTER_SECONDS = 0.25

T = TypeVar("T")
Body = TypeVar("Body", bound=BaseModel)


def _services(request: Request) -> Services:
    services: Services = request.state.services
    return services


def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


async def _services_dependency(request: Request) -> Services:  # async: FastAPI would give a plain function a thread
    return _services(request)


async def _caller_dependency(request: Request) -> Caller:
    return _caller(request)


ServicesDep = Annotated[Services, Depends(_services_dependency)]
CallerDep = Annotated[Caller, Depends(_caller_dependency)]

Limit = Annotated[int, Query(ge=1, le=200, description="Most entries in one page.")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        description="Same key and same request, same resource and answer; kept 24 hours.",
        json_schema_extra={"pattern": idempotency.KEY_PATTERN},
    ),
]
After = Annotated[
    str | None, Query(max_length=200, description="`last_id` of the page before; the list goes on after it.")
]
# Of ids that are numbers: a job's events, changes. None at all is the same as none given.
NUMBERED_ID = "[0-9]{0,18}"
Wait = Annotated[
    float, Query(ge=0, le=60, description="Hold the answer until a final state, for so many seconds at most.")
]


async def refuse_unknown_query(request: Request) -> None:
    """A mistyped parameter that is ignored does something else than was meant; so it is refused, naming those known."""
    route = request.scope.get("route")
    if not isinstance(route, APIRoute) or not request.query_params:
        return
    # Those that a route reads itself stand in its `openapi_extra`.
    declared = (route.openapi_extra or {}).get("parameters", [])
    # FastAPI has no parameters that are objects, written `metadata[color]=red`.
    objects = [parameter["name"] for parameter in declared if parameter.get("style") == "deepObject"]
    known = {name for name in (_query_name(f) for f in get_flat_params(route.dependant)) if name}
    known |= {parameter["name"] for parameter in declared} - set(objects)
    refuse_unknown([name for name in request.query_params if _object_name(name) not in objects], known)


def refuse_unknown(names: Collection[str], known: Collection[str]) -> None:
    """Raises InvalidRequest for query parameters that are not among those known."""
    unknown = [name for name in names if name not in known]
    if unknown:
        advice = f"known are: {', '.join(sorted(known))}" if known else "it takes none"
        raise InvalidRequest(
            f"This path does not have the query parameter {', '.join(map(repr, unknown))} in this version; {advice}.",
            errors=[FieldError(f"#/{name}", "there is no such query parameter") for name in unknown],
        )


def _object_name(name: str) -> str | None:
    return name.partition("[")[0] if name.endswith("]") else None


def _query_name(parameter: Any) -> str | None:
    return parameter.alias if parameter.field_info.in_.value == "query" else None


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; its cancellation once the client has left, so that nobody's picture is computed.

    The request's body has been read. Raises ClientDisconnect, and whatever the work raises.
    """
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    watching: asyncio.Task[None] | None = None
    has_left = False

    async def watch() -> None:
        nonlocal has_left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        has_left = True
        task.cancel()

    def begin_to_watch() -> None:
        nonlocal watching
        watching = asyncio.create_task(watch())

    # Most work is done before a task to watch would have cost its tenth of a millisecond.
    soon = loop.call_later(WATCHED_AFTER_SECONDS, begin_to_watch)
    try:
        return await work
    except asyncio.CancelledError:
        if has_left and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        soon.cancel()
        if watching is not None:
            watching.cancel()


async def read_body(request: Request, *, max_bytes: int) -> bytes:
    """The whole body. Raises TooLarge as soon as it is known to be larger."""
    refuse_declared_size(request, max_bytes=max_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def refuse_declared_size(request: Request, *, max_bytes: int) -> None:
    """Raises TooLarge where Content-Length says more, before any of the body is asked for."""
    declared = declared_bytes(request.headers)
    if declared is not None and declared > max_bytes:
        raise _too_large(max_bytes)


def declared_bytes(headers: Headers) -> int | None:
    """What Content-Length says; None where there is none, or none that can be read."""
    length = headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() else None


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"The request's body is larger than the {max_bytes:,} bytes that are read here.")


def json_body(
    parse: type[Body] | Callable[[Any], Body], *, max_bytes: int = MAX_JSON_BYTES
) -> Callable[[Request], Awaitable[Body]]:
    """A dependency that reads, checks and parses a JSON body. parse: a pydantic class, or a function of its own."""

    async def dependency(request: Request) -> Body:
        content = strict_json(await read_body(request, max_bytes=max_bytes))
        return parse_as(parse, content) if isinstance(parse, type) else parse(content)

    dependency.__annotations__["request"] = Request
    return dependency


async def wait_until(read: Callable[[], T], *, is_final: Callable[[T], bool], seconds: float, request: Request) -> T:
    """Reads until the answer is final, the time is up, the client has left or the server stops.

    Between two looks it holds neither a thread nor a database connection. read: blocking, runs in a thread.
    """
    services = _services(request)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    pause = FIRST_POLL_SECONDS
    while True:
        found = await run_in_threadpool(read)
        left = deadline - loop.time()
        if is_final(found) or left <= 0 or services.stopping.is_set() or await request.is_disconnected():
            return found
        await asyncio.sleep(min(pause, left))
        pause = min(pause * 1.5, LONGEST_POLL_SECONDS)
