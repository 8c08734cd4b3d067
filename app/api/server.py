"""uvicorn, made to end slow or endless headers and long streams: it has no limits for headers, and waits for streams at
shutdown."""

import asyncio
import json
import secrets
from collections.abc import Callable
from typing import Any

import httptools
import structlog
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.api.middleware import LINGER_SECONDS
from app.api.problems import PROBLEM_JSON, Problem
from app.settings import Settings

log = structlog.get_logger(__name__)

# Between two requests of one connection; longer than the pauses of a client that polls each second or two.
KEEP_ALIVE_SECONDS = 20
MAX_HEADER_BYTES = 64 * 1024
# Of the time to end: for closing what is open, and before that for telling whoever could not be waited for.
CLOSING_SECONDS = 1.0
LAST_WORDS_SECONDS = LINGER_SECONDS + 1.0


def make_server(app: FastAPI, settings: Settings) -> uvicorn.Server:
    """A server for `app` on the settings' address; `await server.serve()` or `server.run()`."""
    grace_seconds = settings.shutdown_grace_seconds
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="auto",  # uvloop where it is installed
        http=type("Protocol", (_Protocol,), {"header_timeout_seconds": settings.header_timeout_seconds}),
        ws="none",
        lifespan="on",
        log_config=None,  # app.logs has set it up
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, int(grace_seconds - CLOSING_SECONDS)),
    )
    return _Server(
        config,
        on_shutdown=lambda: app.state.services.stop(),
        drain_seconds=max(0.5, grace_seconds - CLOSING_SECONDS - LAST_WORDS_SECONDS),
    )


class _Server(uvicorn.Server):
    """Tells streams and waits to end before it waits for them, and ends what has not ended in time.

    uvicorn's own timeout comes after that: it would say 500, and wait for nobody to hear it.
    """

    def __init__(self, config: uvicorn.Config, *, on_shutdown: Callable[[], None], drain_seconds: float) -> None:
        super().__init__(config)
        self._on_shutdown = on_shutdown
        self._drain_seconds = drain_seconds

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        self._on_shutdown()
        running_out = asyncio.get_running_loop().call_later(self._drain_seconds, self._cut_off)
        await super().shutdown(sockets)
        running_out.cancel()

    def _cut_off(self) -> None:
        for request in self.server_state.tasks:
            request.cancel()  # BodyGuard answers it


class _Parser(httptools.HttpRequestParser):
    """Reads a request that offers another protocol as any other (RFC 9110, 7.8); httptools would leave its body to be
    read as the next request."""

    def __init__(self, protocol: "_Protocol") -> None:
        super().__init__(protocol)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        self._protocol = protocol

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]
        parser, rest = self, memoryview(data)
        while rest:
            try:
                super(_Parser, parser).feed_data(rest)
                return
            except httptools.HttpParserUpgrade as offer:
                rest = rest[offer.args[0] :]
                # Another one, since this may have been told that its connection ends.
                parser = self._protocol.parser = _Parser(self._protocol)
                head, self._protocol.plain_head = self._protocol.plain_head, b""
                super(_Parser, parser).feed_data(head)


class _Protocol(HttpToolsProtocol):
    """HttpToolsProtocol that gives a client so long from the first byte of a request to the end of its headers,
    which may not be endless, takes no other protocol, and refuses in Graft's words."""

    header_timeout_seconds: float  # of the subclass that a server makes, since uvicorn takes a class
    _headers_due: asyncio.TimerHandle | None = None
    _header_bytes = 0  # or of what stands behind a body's last piece
    _is_of_body = False  # what came last ended a head, or held some of a body
    url = b""  # of the request that is being read, as far as it has come
    plain_head = b""  # of one that offers another protocol: without the offer, to be read in place of what came
    _is_deaf = False  # something was sent that nothing can come after

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.parser = _Parser(self)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        self._is_of_body = False
        super().data_received(data)
        if self._headers_due is not None or not self._is_of_body:
            # The parser keeps what it has of a header until its end, however far that is; of a trailer, too.
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                detail = f"The request's headers are larger than {MAX_HEADER_BYTES:,} bytes."
                self._refuse(Problem.of_status(431, detail=detail))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_headers()

    def on_headers_complete(self) -> None:
        self._stop_expecting()
        # Whom a request is for, two servers on its way must not see differently (RFC 9112, 3.2).
        if self.parser.get_http_version() == "1.1" and sum(name == b"host" for name, _ in self.headers) != 1:
            raise ValueError("not one Host header")
        if any(name == b"upgrade" for name, _ in self.headers) and self.parser.should_upgrade():
            self.plain_head = self._head_without_offer()
            return
        super().on_headers_complete()
        self.headers = []  # of trailers, which nothing is told of: who let the request in has not seen them
        self._begin_to_count()

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._begin_to_count()

    def on_message_complete(self) -> None:
        if self.plain_head:
            return
        super().on_message_complete()
        self._begin_to_count()
        self.url = b""  # what comes next may never say its own

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_expecting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._refuse(Problem.of_status(400, detail="This is not a valid HTTP request."))

    def _head_without_offer(self) -> bytes:
        first = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        kept = (b"%s: %s" % header for header in self.headers if header[0] != b"upgrade")
        return b"\r\n".join([first, *kept, b"", b""])

    def _begin_to_count(self) -> None:
        self._header_bytes, self._is_of_body = 0, True

    def _expect_headers(self) -> None:
        if self._headers_due is None:
            self._header_bytes = 0
            self._headers_due = self.loop.call_later(self.header_timeout_seconds, self._headers_too_late)

    def _stop_expecting(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _headers_too_late(self) -> None:
        self._refuse(
            Problem(
                status=408,
                code="request-timeout",
                title="The request took too long to arrive",
                detail=f"The request's headers did not arrive within {self.header_timeout_seconds:g} s.",
            )
        )

    def _refuse(self, problem: Problem) -> None:
        """Written as it is, since there is no request yet that could be answered; and the connection ends.

        While the request before it is being answered, it ends with that answer instead.
        """
        if self._is_deaf:
            return
        self._stop_expecting()
        self._is_deaf = True
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            if not self.cycle.more_body:
                self.cycle.keep_alive = False
                return
            # It was the body that broke: whoever reads it is told that no more comes, and says nothing any more.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        request_id, path = secrets.token_hex(16), self.url.decode("latin-1").partition("?")[0] or "/"
        body = json.dumps(problem.document(request_id=request_id, path=path)).encode()
        headers = {
            "Content-Type": PROBLEM_JSON,
            "Content-Length": str(len(body)),
            "X-Request-ID": request_id,
            "Connection": "close",
            **problem.response_headers(path=path),
        }
        lines = [f"HTTP/1.1 {problem.status} {problem.title}", *(f"{name}: {text}" for name, text in headers.items())]
        self.transport.write("\r\n".join([*lines, "", ""]).encode("ascii") + body)
        log.info("request", request_id=request_id, path=path, status=problem.status)
        # A connection closed while more arrives can lose the answer on its way.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)
