"""What happens to every request before it is routed, and to every answer: ASGI, so that nothing has read the body yet.

Outermost first: RequestContext (id, log line, metrics, last-resort answer), Tracing where that is on, BodyGuard (slow
and unread bodies), AccessGate (keys and scopes). FastAPI reads a whole body before any of its dependencies runs; that
is why these are not dependencies.
"""

import asyncio
import hashlib
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any
from urllib.parse import quote

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import access, telemetry, workspaces
from app.access import Caller
from app.api import failures, tus
from app.api.cookies import SAFE_METHODS, authorization_of
from app.api.deps import declared_bytes
from app.api.problems import INTERNAL_ERROR, Problem
from app.api.services import Services
from app.db.tables import DEFAULT_WORKSPACE
from app.db.tenancy import Actor
from app.errors import (
    Forbidden,
    GraftError,
    InvalidRequest,
    Overloaded,
    RequestTimeout,
    Unauthenticated,
    UnsupportedMediaType,
)
from app.names import has_control_characters
from app.workspaces import Limits, Workspace

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

# What a request is told that the server, which is to end, could not wait for; and one that may go on to its end in a
# thread, and would be done twice. The header is for the OpenAI SDK, which repeats every 503 unless told not to.
SEND_AGAIN = Problem.of(Overloaded("The server is being stopped; send the request again.", retry_after_seconds=5))
CUT_OFF = Problem(
    status=503,
    code="cut-off",
    title="Not waited for",
    detail="The server is being stopped and could not wait for this, which may have been done all the same. Look "
    "before you send it again.",
    headers={"x-should-retry": "false"},
)
PREDICTION_PATHS = ("/predict", "/hf/", "/v2/models/")

OPEN_PATHS = frozenset({"/healthz", "/readyz"})
OPERATORS_PATHS = frozenset({"/metrics"})
# What operators' machines ask every few seconds.
UNTRACED_PATHS = OPEN_PATHS | OPERATORS_PATHS

# Where a request's method may stand in a header: clients of tus that can send POST alone need it.
TUS_PATH = "/v1/uploads"
OVERRIDABLE = frozenset({"PATCH", "DELETE", "HEAD"})
TUS_HEADERS = {"Tus-Resumable": tus.VERSION, "Tus-Version": tus.VERSION}
# The page for signing in, and what pages look like.
OPEN_PAGES = ("/sign-in", "/static/")

SECURITY_HEADERS = {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"}


def services_of(scope: Scope) -> Services:
    services: Services = scope["app"].state.services
    return services


def request_id_of(scope: Scope) -> str:
    request_id: str = scope["state"]["request_id"]
    return request_id


async def answer(problem: Problem, scope: Scope, receive: Receive, send: Send) -> None:
    await failures.answer(Request(scope), problem)(scope, receive, send)


class RequestContext:
    """Gives each request its id, its log line and its metrics, and turns what nobody expected into a problem."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        method, started_at, status = _method(scope, headers), time.perf_counter(), 0
        scope["state"]["is_head"] = method == "HEAD"
        # HEAD is the same answer without its body, which the server has to know of.
        scope = {**scope, "method": "GET" if method == "HEAD" else method}
        own_headers = {**SECURITY_HEADERS, **(TUS_HEADERS if _is_of_tus(scope) else {})}

        async def send_tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                sent = MutableHeaders(scope=message)
                sent["X-Request-ID"] = request_id
                for name, value in own_headers.items():
                    sent.setdefault(name, value)
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


class Tracing:
    """The trace's id in a request's log lines, and its route in the name of its span, which FastAPI begins and ends."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        span = telemetry.current_span()
        if scope["type"] != "http" or not span.is_recording():
            await self.app(scope, receive, send)
            return
        telemetry.bind_trace_id(span)
        method = "HEAD" if scope["state"]["is_head"] else scope["method"]

        async def send_named(message: Message) -> None:
            route = getattr(scope.get("route"), "path", None)
            if message["type"] == "http.response.start" and route is not None:
                # FastAPI's router does it too, but /predict is answered without it.
                span.update_name(f"{method} {route}")
                span.set_attribute("http.route", route)
                span.set_attribute("graft.request", request_id_of(scope))
            await send(message)

        await self.app(scope, receive, send_named)


class BodyGuard:
    """Ends bodies that stall or trickle with 408, and answers in good order over a body that nobody read, also for
    requests that the server, which is to end, could not wait for."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        services = services_of(scope)
        body = _Body(scope, receive, idle_timeout_seconds=services.settings.body_idle_timeout_seconds)
        is_answering = is_closing = False

        async def send_over_unread_body(message: Message) -> None:
            nonlocal is_answering, is_closing
            is_answering = True
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

        try:
            await self.app(scope, body.receive, send_over_unread_body)
        except asyncio.CancelledError:
            if not services.stopping.is_set():
                raise
            if not is_answering:  # else the connection ends with what was sent of the answer
                is_again_the_same = not body.is_complete or _may_be_repeated(scope)
                await answer(SEND_AGAIN if is_again_the_same else CUT_OFF, scope, receive, send_over_unread_body)


class _Body:
    """A request body on its way in: how much has come, how long it was waited for, and whether it is complete."""

    def __init__(self, scope: Scope, receive: Receive, *, idle_timeout_seconds: float) -> None:
        headers = Headers(scope=scope)
        self.declared_bytes = declared_bytes(headers)
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
        services = scope["state"]["services"] = services_of(scope)
        try:
            if scope["path"] not in OPEN_PATHS and not scope["path"].startswith(OPEN_PAGES):
                caller, workspace = await self._admitted(services, scope, authorization_of(scope, headers))
                services.traffic.take_request(workspace)
                actor = Actor(f"{scope['method']} {scope['path']}", caller.key_id, request_id_of(scope))
                scope["state"]["caller"] = caller
                scope["state"]["services"] = services.within(workspace, actor)
            if headers.get("content-encoding", "identity").lower() != "identity":
                raise UnsupportedMediaType("Compressed request bodies are not read; send the body as it is.")
            # To a router a line break at its end is none, so that the path it finds is not the one asked about here.
            if has_control_characters(scope["path"]) or b"%00" in scope["query_string"]:
                raise InvalidRequest("The address holds a control character.")
        except GraftError as error:
            is_page = scope["method"] == "GET" and failures.is_for_a_person(Request(scope))
            if isinstance(error, Unauthenticated | Forbidden) and is_page and "hx-request" not in headers:
                place = quote(scope["path"] + ("?" + scope["query_string"].decode("latin-1")).rstrip("?"), safe="")
                await RedirectResponse(f"/sign-in?next={place}", status_code=303)(scope, receive, send)
            else:
                await answer(Problem.of(error), scope, receive, send)
            return
        await self.app(scope, receive, send)

    async def _admitted(self, services: Services, scope: Scope, authorization: str | None) -> tuple[Caller, Workspace]:
        """Who asks. Raises Unauthenticated, Forbidden, and TooManyRequests for an address that tries many keys."""
        known = None if authorization is None else hashlib.sha256(authorization.encode()).digest()
        try:
            admitted: tuple[Caller, Workspace] = await services.remembered.get(
                ("caller", known), _admit, services, authorization
            )
        except Unauthenticated:
            if authorization is not None:
                services.traffic.take_wrong_key((scope.get("client") or ("",))[0])
            raise
        caller, _ = admitted
        if caller.key_id is None:
            _check_host(scope, services.settings.allowed_hosts)
        needed = needed_scope(scope["method"], scope["path"])
        if not caller.may(needed):
            raise Forbidden(f"This needs a key with the scope `{needed}`; yours has not got it.")
        if scope["path"] in OPERATORS_PATHS and caller.workspace_id != DEFAULT_WORKSPACE:
            raise Forbidden("This tells of the whole server; only keys of the workspace `default` may read it.")
        return admitted


def _check_host(scope: Scope, allowed: Collection[str]) -> None:
    """Raises Misdirected. Clients without a name, of HTTP/1.0, are no browsers; a server that no connection of loopback
    came to is inside of a program."""
    host = Headers(scope=scope).get("host")
    if host is not None and access.is_loopback((scope.get("server") or ("",))[0]):
        access.check_called_by_its_name(host, allowed=allowed)


def needed_scope(method: str, path: str) -> access.Scope:
    """The least scope for a request. What is not listed here needs `train`: new paths are closed until thought of."""
    if path in ("/predict", "/try") or path.startswith(("/try/", "/v2", "/hf/", "/v1/batches")):
        return access.Scope.predict
    # Whoever asked may say what it was; to look at what others asked takes more.
    if method == "POST" and path.startswith("/v1/predictions/") and path.endswith("/feedback"):
        return access.Scope.predict
    if path in ("/v1/audit", "/v1/webhooks") or path.startswith("/v1/webhooks/"):
        return access.Scope.admin
    is_reading = method in SAFE_METHODS
    if path.endswith("/export"):
        return access.Scope.train  # who may ask a model may not therefore take it away
    if is_reading and (
        path in ("/", "/docs", "/openapi.json", "/metrics", "/models")
        or path in ("/v1/backbones", "/v1/aliases", "/v1/models", "/v1/usage")
        or path.startswith(("/models/", "/v1/models/", "/swagger/"))
    ):
        return access.Scope.predict
    return access.Scope.train


def _admit(services: Services, authorization: str | None) -> tuple[Caller, Workspace]:
    with services.database.read() as session:
        caller = access.authenticate(session, authorization)
        workspace = workspaces.load(session, caller.workspace_id, Limits.from_settings(services.settings))
        is_use_due = access.is_use_due(session, caller)
    if is_use_due:
        services.traffic.note_use(caller)
    return caller, workspace


def _may_be_repeated(scope: Scope) -> bool:
    """Whether a request comes to the same if it is done twice, as far as can be told from outside."""
    has_key = "idempotency-key" in Headers(scope=scope)
    return scope["method"] in SAFE_METHODS or has_key or scope["path"].startswith(PREDICTION_PATHS)


def _is_of_tus(scope: Scope) -> bool:
    path: str = scope["path"]
    return path == TUS_PATH or path.startswith(f"{TUS_PATH}/")


def _method(scope: Scope, headers: Headers) -> str:
    method: str = scope["method"]
    instead = headers.get("x-http-method-override", "").upper()
    return instead if method == "POST" and _is_of_tus(scope) and instead in OVERRIDABLE else method


def _request_id(headers: Headers) -> str:
    own = headers.get("x-request-id", "")
    return own if SANE_REQUEST_ID.fullmatch(own) else secrets.token_hex(16)


# For type checkers: each is a plain ASGI middleware class.
Middleware = Callable[..., Callable[[Scope, Receive, Send], Awaitable[Any]]]


def middleware() -> tuple[Middleware, ...]:
    """Outermost first. Without tracing a request does not even ask whether it is on."""
    return RequestContext, *([Tracing] if telemetry.is_on() else []), BodyGuard, AccessGate
