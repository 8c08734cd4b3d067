"""A scripted server, and a way to run the command in this process."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from scripted_server import Result, ScriptedServer, Sent

from app.cli import main
from app.cli.terminal import errors, output


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.read_body()
            scripted.requests.append(Sent(self.command, self.path, dict(self.headers), body))
            status, content = scripted.answers[self.command, self.path.partition("?")[0]]
            encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/event-stream" if isinstance(content, bytes) else "application/json")
            self.send_header("Content-Length", str(len(encoded)))
            self.end_headers()
            self.wfile.write(encoded)

        def read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while length := int(self.rfile.readline(), 16):
                body += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
            return body

        do_GET = do_POST = do_PUT = do_DELETE = answer

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        scripted = ScriptedServer(f"http://127.0.0.1:{listener.server_port}")
        monkeypatch.setenv("GRAFT_URL", scripted.url)
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
        thread.start()
        yield scripted
        listener.shutdown()
        thread.join()


@pytest.fixture
def graft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `graft` with these arguments, as from a pipe."""
    for console in (output, errors):
        monkeypatch.setattr(console, "width", 200)
    for name in ("GRAFT_API_KEY", "GRAFT_DATABASE_URL", "GRAFT_PORT"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> Result:
        umask = os.umask(0o022)  # commands on data change it
        try:
            with pytest.raises(SystemExit) as ended:
                main(arguments)
        finally:
            os.umask(umask)
        captured = capsys.readouterr()
        exit_code = ended.value.code
        assert isinstance(exit_code, int)
        return Result(exit_code, captured.out, captured.err)

    return run
