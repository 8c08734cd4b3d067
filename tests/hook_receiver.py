"""A receiver of webhooks: a real server, which verifies signatures with the stock library and answers as it is told."""

import socket
import ssl
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from standardwebhooks.webhooks import Webhook

Answer = Callable[[BaseHTTPRequestHandler], None]


def status(code: int, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def megabytes(handler: BaseHTTPRequestHandler) -> None:
    """Answers 200, and then more than anybody reads."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(64):
        handler.wfile.write(b"x" * 1024**2)


class Receiver:
    """On loopback. requests: headers in small letters, and body, of each. Answers are used up; then it is 204."""

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[Answer] = []
        self.secret = ""
        self.released = threading.Event()  # lets `hang` end
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                body = self.rfile.read(length)
                if len(body) < length:  # its sender was killed
                    self.close_connection = True
                    return
                outer.requests.append(({name.lower(): value for name, value in self.headers.items()}, body))
                (outer.answers.pop(0) if outer.answers else status(204))(self)

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:  # a sender that has enough
                pass

        self._server = Server((host, port), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.port: int = self._server.server_address[1]
        self.url = f"{'http' if tls is None else 'https'}://{host}:{self.port}/hooks?a=b"

    def __enter__(self) -> "Receiver":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def hang(self, _handler: BaseHTTPRequestHandler) -> None:
        self.released.wait(30)

    def verified(self) -> list[dict[str, Any]]:
        """All that came, each held against its signature."""
        return [Webhook(self.secret).verify(body, headers) for headers, body in self.requests]

    def of_type(self, event: str) -> list[dict[str, Any]]:
        return [payload for payload in self.verified() if payload["type"] == event]

    def wait_for(self, count: int) -> list[dict[str, Any]]:
        deadline = time.monotonic() + 30
        while len(self.requests) < count:
            assert time.monotonic() < deadline, f"{len(self.requests)} of {count} came"
            time.sleep(0.01)
        return self.verified()


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port
