"""The two clients: `Graft` blocks, `AsyncGraft` is awaited. The calls are the same, written once."""

import ipaddress
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, Unpack

import httpx

from graft_client.answers import Prediction, Predictions
from graft_client.calls import Resource, call, finished
from graft_client.connection import CONNECT_SECONDS, Connection
from graft_client.datasets import Datasets
from graft_client.decoding import decode
from graft_client.errors import GraftError, ServerUnreachable
from graft_client.jobs import Jobs
from graft_client.models import Aliases, Models
from graft_client.predictions import Batches, StoredPredictions, predict
from graft_client.requests import PredictOptions
from graft_client.uploads import OnProgress, Picture, Pictures
from graft_client.wire import AsyncWire, BlockingWire, W
from graft_client.workspace import Webhooks, Workspace

DEFAULT_URL = "http://127.0.0.1:8000"
MAX_RETRIES = 2
PATIENCE_SECONDS = 30.0  # a server that is being restarted is back within seconds
# Longer than the 15 s between a stream's comments, and than most models take to learn a few pictures.
TIMEOUT_SECONDS = 90.0
USER_AGENT = "graft-client"


class _Client(Resource[W]):
    """Every call of the API, over one connection."""

    def __init__(self, connection: Connection[W]) -> None:
        super().__init__(connection)
        self.url = connection.url
        self.datasets: Datasets[W] = Datasets(connection)
        self.jobs: Jobs[W] = Jobs(connection)
        self.models: Models[W] = Models(connection)
        self.aliases: Aliases[W] = Aliases(connection)
        self.predictions: StoredPredictions[W] = StoredPredictions(connection)
        self.batches: Batches[W] = Batches(connection)
        self.webhooks: Webhooks[W] = Webhooks(connection)
        self.workspace: Workspace[W] = Workspace(connection)

    @call
    async def predict(
        self, pictures: Pictures, *, on_progress: OnProgress | None = None, **options: Unpack[PredictOptions]
    ) -> Predictions:
        """Classifies pictures, one or any number, by the default model if none is named.

        Answers are in the order of the pictures; one that cannot be read has a FailedPrediction in its place. Raises
        InvalidRequest or TooLarge if none can be read. on_progress gets the numbers of pictures, answered and in all.
        """
        return await predict(self._connection, pictures, options, on_progress)

    @call
    async def predict_one(self, picture: Picture, **options: Unpack[PredictOptions]) -> Prediction:
        """Classifies one picture. Raises InvalidRequest or TooLarge if it cannot be read."""
        answer = await predict(self._connection, [picture], options, None)
        return decode(Prediction, answer.raw["predictions"][0])

    @call
    async def is_alive(self) -> bool:
        """Whether a server answers at all, by a single try."""
        try:
            request = self._connection.wire.http.build_request("GET", "/healthz", timeout=2.0)
            response = await self._connection.wire.send(request)
            await self._connection.wire.close(response)
        except (httpx.TransportError, httpx.InvalidURL):
            return False
        return response.is_success


class Graft(_Client[BlockingWire]):
    """The blocking client; safe to share between threads.

    url: GRAFT_URL or the server on this machine if left out. api_key: GRAFT_API_KEY if left out, none if empty.
    max_retries: beside the first try, of what may be sent again. patience_seconds: how long a server may be away while
    something is waited for. timeout_seconds: until an answer begins, beside what a call's `wait` asks for.
    transport: what carries the requests instead of the network.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        max_retries: int = MAX_RETRIES,
        patience_seconds: float = PATIENCE_SECONDS,
        timeout_seconds: float = TIMEOUT_SECONDS,
        user_agent: str = USER_AGENT,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        url = _url(url)
        options = _options(url, api_key, timeout_seconds, user_agent)
        with _usable_proxies():
            wire = BlockingWire(transport=transport, **options)
        super().__init__(Connection(url, wire, max_retries=max_retries, patience_seconds=patience_seconds))

    def close(self) -> None:
        finished(self._connection.wire.end())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncGraft(_Client[AsyncWire]):
    """The same for asyncio; arguments as of `Graft`."""

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        max_retries: int = MAX_RETRIES,
        patience_seconds: float = PATIENCE_SECONDS,
        timeout_seconds: float = TIMEOUT_SECONDS,
        user_agent: str = USER_AGENT,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        url = _url(url)
        options = _options(url, api_key, timeout_seconds, user_agent)
        with _usable_proxies():
            wire = AsyncWire(transport=transport, **options)
        super().__init__(Connection(url, wire, max_retries=max_retries, patience_seconds=patience_seconds))

    async def close(self) -> None:
        await self._connection.wire.end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


def _url(given: str | None) -> str:
    """Raises ServerUnreachable for what is no address."""
    url = (given or os.environ.get("GRAFT_URL") or DEFAULT_URL).rstrip("/")
    if "://" not in url:
        url = f"http://{url}"
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ServerUnreachable(url, str(error)) from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ServerUnreachable(url, "that is no address of a web server")
    return url


def _key(given: str | None) -> str:
    """Without the blanks around it that files have. Raises GraftError, which does not repeat it, for what is no key."""
    key = (os.environ.get("GRAFT_API_KEY", "") if given is None else given).strip()
    if not (key.isascii() and key.isprintable()):
        raise GraftError("The API key is none: it holds line breaks or other characters that no key has.")
    return key


def _options(url: str, api_key: str | None, timeout_seconds: float, user_agent: str) -> dict[str, Any]:
    headers = {"User-Agent": user_agent}
    if key := _key(api_key):
        headers["Authorization"] = f"Bearer {key}"
    timeout = httpx.Timeout(timeout_seconds, connect=min(timeout_seconds, CONNECT_SECONDS))
    return {"base_url": url, "headers": headers, "timeout": timeout, "is_direct": _is_this_machine(httpx.URL(url).host)}


def _is_this_machine(host: str) -> bool:
    """Which a proxy would look for at its own place."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


@contextmanager
def _usable_proxies() -> Iterator[None]:
    """httpx looks for HTTPS_PROXY and its like as a client is made. Raises GraftError for one that it cannot use."""
    try:
        yield
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise GraftError(f"The proxy that the environment names cannot be used: {error}") from error
