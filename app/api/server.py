"""uvicorn, made to end slow headers and long streams: it has no header timeout, and waits for streams at shutdown."""

import asyncio
import json
import secrets
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.api.problems import PROBLEM_JSON, Problem
from app.settings import Settings

# Between two requests of one connection; longer than the pauses of a client that polls each second or two.
KEEP_ALIVE_SECONDS = 20


def make_server(app: FastAPI, settings: Settings) -> uvicorn.Server:
    """A server for `app` on the settings' address; `await server.serve()` or `server.run()`."""
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="auto",  # uvloop where it is installed
        http=_protocol(settings.header_timeout_seconds),
        ws="none",
        lifespan="on",
        log_config=None,  # app.logs has set it up
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, int(settings.shutdown_grace_seconds)),
    )
    return _Server(config, on_shutdown=lambda: app.state.services.stop())


class _Server(uvicorn.Server):
    """Tells streams and waits to end before it waits for them."""

    def __init__(self, config: uvicorn.Config, *, on_shutdown: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_shutdown = on_shutdown

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        self._on_shutdown()
        await super().shutdown(sockets)


def _protocol(header_timeout_seconds: float) -> type[H11Protocol]:
    class Protocol(H11Protocol):
        """H11Protocol that gives a client so long from the first byte of a request to the end of its headers."""

        _headers_due: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect_headers()

        def data_received(self, data: bytes) -> None:
            if self._headers_due is None and (self.cycle is None or self.cycle.response_complete):
                self._expect_headers()
            cycle = self.cycle
            super().data_received(data)
            if self.cycle is not cycle:
                self._stop_expecting()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_expecting()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            self._stop_expecting()
            self._send_problem(Problem.of_status(400, detail="This is not a valid HTTP request."))

        def _expect_headers(self) -> None:
            self._headers_due = self.loop.call_later(header_timeout_seconds, self._headers_too_late)

        def _stop_expecting(self) -> None:
            if self._headers_due is not None:
                self._headers_due.cancel()
                self._headers_due = None

        def _headers_too_late(self) -> None:
            self._headers_due = None
            if not self.transport.is_closing():
                self._send_problem(
                    Problem(
                        status=408,
                        code="request-timeout",
                        title="The request took too long to arrive",
                        detail=f"The request's headers did not arrive within {header_timeout_seconds:g} s.",
                    )
                )

        def _send_problem(self, problem: Problem) -> None:
            """Written as it is: h11's state may not allow an answer any more, and the connection ends anyway."""
            request_id = secrets.token_hex(16)
            body = json.dumps(problem.document(request_id=request_id, path="/")).encode()
            head = (
                f"HTTP/1.1 {problem.status} {problem.title}\r\nContent-Type: {PROBLEM_JSON}\r\n"
                f"Content-Length: {len(body)}\r\nX-Request-ID: {request_id}\r\nConnection: close\r\n\r\n"
            )
            self.transport.write(head.encode("ascii") + body)
            self.transport.close()

    return Protocol
