"""What happens to every request before it is routed, and to every answer: ASGI, so that nothing has read the body yet.

Outermost first: RequestContext (id, log line, metrics, last-resort answer), BodyGuard (slow and unread bodies),
AccessGate (keys and scopes). FastAPI reads a whole body before any of its dependencies runs; that is why these three
are not dependencies.
"""

import asyncio
import hashlib
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import access
from app.access import Caller
from app.api.cookies import authorization_of
from app.api.problems import INTERNAL_ERROR, Problem
from app.api.services import Services
from app.errors import Forbidden, GraftError, InvalidRequest, RequestTimeout, Unauthenticated, UnsupportedMediaType

log = structlog.get_logger("graft.requests")

SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)

# What a client gets before its body is called slow, and the least rate after that.
SLOW_BODY_AFTER_SECONDS = 20.0
MIN_BODY_BYTES_PER_SECOND = 2000

# A body this small that nobody wanted is read to its end, so that the connection can be used again.
SMALL_BODY_BYTES = 64 * 1024
SMALL_BODY_WAIT_SECONDS = 0.2
# A larger one is not waited for; but a connection closed at once can lose the answer on its way.
LINGER_SECONDS = 2.0

# Nginx's name for a client that left before its answer.
CLIENT_CLOSED_REQUEST = 499

OPEN_PATHS = frozenset({"/healthz", "/readyz"})
# The page for signing in, and what pages look like.
OPEN_PAGES = ("/sign-in", "/static/")
PAGES = re.compile(r"/(?:$|(?:datasets|jobs|models|try|docs)(?:/|$))")

SECURITY_HEADERS = {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"}


def services_of(scope: Scope) -> Services:
    services: Services = scope["app"].state.services
    return services


def request_id_of(scope: Scope) -> str:
    request_id: str = scope["state"]["request_id"]
    return request_id


async def answer(problem: Problem, scope: Scope, receive: Receive, send: Send) -> None:
    response = problem.response(request_id=request_id_of(scope), path=scope["path"])
    await response(scope, receive, send)


class RequestContext:
    """Gives each request its id, its log line and its metrics, and turns what nobody expected into a problem."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = request_id
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        method, started_at, status = scope["method"], time.perf_counter(), 0
        scope["state"]["is_head"] = method == "HEAD"
        if method == "HEAD":
            scope = {**scope, "method": "GET"}  # the same answer without its body, which the server has to know of

        async def send_tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        try:
            await self.app(scope, receive, send_tagged)
        except ClientDisconnect:
            status = CLIENT_CLOSED_REQUEST
        except Exception:  # the door around a request
            log.exception("request failed", method=method, path=scope["path"])
            if status == 0:
                await answer(INTERNAL_ERROR, scope, receive, send_tagged)
        finally:
            seconds = time.perf_counter() - started_at
            route = getattr(scope.get("route"), "path", "unmatched")
            services_of(scope).metrics.observe_request(method=method, route=route, status=status, seconds=seconds)
            log.info("request", method=method, path=scope["path"], status=status, seconds=round(seconds, 4))


class BodyGuard:
    """Ends bodies that stall or trickle with 408, and answers in good order over a body that nobody read."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _Body(scope, receive, idle_timeout_seconds=services_of(scope).settings.body_idle_timeout_seconds)
        is_closing = False

        async def send_over_unread_body(message: Message) -> None:
            nonlocal is_closing
            if message["type"] == "http.response.start" and not body.is_complete:
                if body.declared_bytes is not None and body.declared_bytes <= SMALL_BODY_BYTES:
                    await body.drain(SMALL_BODY_WAIT_SECONDS)
                is_closing = not body.is_complete
                if is_closing:
                    MutableHeaders(scope=message)["Connection"] = "close"
            elif message["type"] == "http.response.body" and is_closing and not message.get("more_body"):
                await send({**message, "more_body": True})
                await body.drain(LINGER_SECONDS)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await self.app(scope, body.receive, send_over_unread_body)


class _Body:
    """A request body on its way in: how much has come, how long it was waited for, and whether it is complete."""

    def __init__(self, scope: Scope, receive: Receive, *, idle_timeout_seconds: float) -> None:
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        self.declared_bytes = int(length) if length.isascii() and length.isdigit() else None
        self.is_complete = not self.declared_bytes and "transfer-encoding" not in headers
        self._receive = receive
        self._idle_timeout_seconds = idle_timeout_seconds
        self._received_bytes = 0
        self._waited_seconds = 0.0

    async def receive(self) -> Message:
        if self.is_complete:
            return await self._receive()  # from now on it only tells of the client's leaving
        waiting_since = time.monotonic()
        try:
            async with asyncio.timeout(self._idle_timeout_seconds):
                message = await self._receive()
        except TimeoutError:
            raise RequestTimeout(
                f"Nothing more of the request's body came for {self._idle_timeout_seconds:g} s; send it again."
            ) from None
        self._waited_seconds += time.monotonic() - waiting_since
        self._received_bytes += len(message.get("body", b""))
        self.is_complete = message["type"] != "http.request" or not message.get("more_body", False)
        if (
            not self.is_complete
            and self._waited_seconds > SLOW_BODY_AFTER_SECONDS
            and self._received_bytes < self._waited_seconds * MIN_BODY_BYTES_PER_SECOND
        ):
            raise RequestTimeout(f"The request's body came at less than {MIN_BODY_BYTES_PER_SECOND} bytes a second.")
        return message

    async def drain(self, seconds: float) -> None:
        """Reads and forgets the rest of the body, for so long at most."""
        try:
            async with asyncio.timeout(seconds):
                while not self.is_complete:
                    message = await self._receive()
                    self.is_complete = message["type"] != "http.request" or not message.get("more_body", False)
        except TimeoutError:
            return


class AccessGate:
    """Asks for a key where there are keys, checks its scope, and refuses what no route should have to think of."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            if scope["path"] not in OPEN_PATHS and not scope["path"].startswith(OPEN_PAGES):
                services, authorization = services_of(scope), authorization_of(scope, headers)
                known = None if authorization is None else hashlib.sha256(authorization.encode()).digest()
                caller = await services.remembered.get(("caller", known), _admit, services, authorization)
                scope["state"]["caller"] = caller
                needed = needed_scope(scope["method"], scope["path"])
                if not caller.may(needed):
                    raise Forbidden(f"This needs a key with the scope `{needed}`; yours has not got it.")
            if headers.get("content-encoding", "identity").lower() != "identity":
                raise UnsupportedMediaType("Compressed request bodies are not read; send the body as it is.")
            if "\x00" in scope["path"] or b"%00" in scope["query_string"]:
                raise InvalidRequest("The address holds a NUL character.")
        except GraftError as error:
            if isinstance(error, Unauthenticated | Forbidden) and _is_for_a_person(scope, headers):
                place = quote(scope["path"] + ("?" + scope["query_string"].decode("latin-1")).rstrip("?"), safe="")
                await RedirectResponse(f"/sign-in?next={place}", status_code=303)(scope, receive, send)
            else:
                await answer(Problem.of(error), scope, receive, send)
            return
        await self.app(scope, receive, send)


def _is_for_a_person(scope: Scope, headers: Headers) -> bool:
    is_page = scope["method"] == "GET" and PAGES.match(scope["path"]) is not None
    return is_page and "text/html" in headers.get("accept", "")


def needed_scope(method: str, path: str) -> access.Scope:
    """The least scope for a request. What is not listed here needs `train`: new paths are closed until thought of."""
    if path in ("/predict", "/try") or path.startswith(("/try/", "/v2", "/hf/", "/v1/batches")):
        return access.Scope.predict
    # Whoever asked may say what it was; to look at what others asked takes more.
    if method == "POST" and path.startswith("/v1/predictions/") and path.endswith("/feedback"):
        return access.Scope.predict
    is_reading = method in ("GET", "HEAD", "OPTIONS")
    if path.endswith("/export"):
        return access.Scope.train  # who may ask a model may not therefore take it away
    if is_reading and (
        path in ("/", "/docs", "/openapi.json", "/metrics", "/models", "/v1/backbones", "/v1/aliases", "/v1/models")
        or path.startswith(("/models/", "/v1/models/", "/swagger/"))
    ):
        return access.Scope.predict
    return access.Scope.train


def _admit(services: Services, authorization: str | None) -> Caller:
    with services.database.read() as session:
        caller = access.authenticate(session, authorization)
        is_use_due = access.is_use_due(session, caller)
    if is_use_due:
        with services.database.write() as session:
            access.note_use(session, caller)
    return caller


def _request_id(headers: Headers) -> str:
    own = headers.get("x-request-id", "")
    return own if SANE_REQUEST_ID.fullmatch(own) else secrets.token_hex(16)


# For type checkers: each is a plain ASGI middleware class.
MIDDLEWARE: tuple[Callable[..., Callable[[Scope, Receive, Send], Awaitable[Any]]], ...] = (
    RequestContext,
    BodyGuard,
    AccessGate,
)
