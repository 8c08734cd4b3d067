"""Speaks to a Graft server over HTTP, for the command line and the demo.

Knows the HTTP contract; not the database, not the terminal. Answers are the JSON objects of the contract, as they are.
"""

import json
import mimetypes
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import httpx
from httpx_sse import EventSource, SSEError

JsonObject = dict[str, Any]

DEFAULT_URL = "http://127.0.0.1:8000"
LONGEST_WAIT_SECONDS = 60  # the most that `?wait=` takes
LARGEST_PREDICT_BATCH = 64  # pictures in one /predict request
UPLOAD_CHUNK_BYTES = 1024**2
EXPORT_SECONDS = 1800.0  # until the file is made, and others before it; large networks take minutes

# A server that is being restarted is back within seconds; a watcher that gave up at once would be a nuisance.
RECONNECT_FOR_SECONDS = 30.0
RECONNECT_PAUSE_SECONDS = 0.5


class ServerUnreachable(Exception):
    """Nothing answers at this address."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"No Graft server answers at {url} ({reason}).")
        self.url = url


class ServerRefused(Exception):
    """The server answered with a problem (RFC 9457); `problem` is its body, empty if it was none."""

    def __init__(self, status: int, problem: JsonObject) -> None:
        super().__init__(problem.get("detail") or problem.get("title") or f"The server answered {status}.")
        self.status = status
        self.problem = problem

    @property
    def code(self) -> str:
        """The stable slug at the end of the problem's type, such as "not-found"."""
        return str(self.problem.get("type", "")).rsplit("/", 1)[-1]


@dataclass(frozen=True)
class JobEvent:
    """One entry of a job's event log. event: status, progress, epoch, log or model."""

    id: str
    event: str
    data: JsonObject


class GraftClient:
    """One server, one API key. Raises ServerUnreachable and ServerRefused."""

    def __init__(
        self, url: str = DEFAULT_URL, *, api_key: str | None = None, transport: httpx.BaseTransport | None = None
    ) -> None:
        """transport: what carries the requests instead of the network, for tests."""
        self.url = url.rstrip("/")
        headers = {"User-Agent": "graft-cli"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        # Reads wait longer than the longest `?wait=` and than the 15 s between a stream's comments.
        timeout = httpx.Timeout(10.0, read=LONGEST_WAIT_SECONDS + 30.0, write=60.0)
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    # Data sets

    def upload_dataset(
        self,
        archive: Path,
        *,
        name: str,
        kind: str = "labelled",
        on_sent: Callable[[int], None] = lambda sent_bytes: None,
    ) -> JsonObject:
        """Streams an archive to the server. on_sent gets the number of bytes of each piece sent."""
        params = {"name": name} | ({} if kind == "labelled" else {"kind": kind})
        headers = {"Content-Length": str(archive.stat().st_size), "Idempotency-Key": secrets.token_hex(16)}
        return self._json("PUT", "/v1/datasets", params=params, headers=headers, content=_pieces(archive, on_sent))

    def wait_for_dataset(self, dataset_id: str) -> JsonObject:
        """The data set once it is ready or failed."""
        while True:
            dataset = self._json("GET", f"/v1/datasets/{dataset_id}", params={"wait": LONGEST_WAIT_SECONDS})
            if dataset["status"] != "processing":
                return dataset

    def dataset(self, dataset_id: str) -> JsonObject:
        return self._json("GET", f"/v1/datasets/{dataset_id}")

    def delete_dataset(self, dataset_id: str) -> None:
        self._request("DELETE", f"/v1/datasets/{dataset_id}")

    # Jobs

    def submit_job(self, request: JsonObject) -> JsonObject:
        return self._json("POST", "/v1/jobs", json=request, headers={"Idempotency-Key": secrets.token_hex(16)})

    def job(self, job_id: str, *, wait_seconds: int = 0) -> JsonObject:
        return self._json("GET", f"/v1/jobs/{job_id}", params={"wait": wait_seconds} if wait_seconds else None)

    def job_history(self, job_id: str) -> list[JsonObject]:
        history: list[JsonObject] = self._json("GET", f"/v1/jobs/{job_id}/history")["data"]
        return history

    def cancel_job(self, job_id: str) -> JsonObject:
        return self._json("POST", f"/v1/jobs/{job_id}/cancel")

    def stop_job(self, job_id: str) -> JsonObject:
        return self._json("POST", f"/v1/jobs/{job_id}/stop")

    def follow_job(self, job_id: str, *, clock: Callable[[], float] = time.monotonic) -> Iterator[JobEvent]:
        """Every event of a job from its first, then live ones as they come, until the job has ended.

        A broken stream is resumed after the last event seen. Raises ServerUnreachable once the server has been away
        for RECONNECT_FOR_SECONDS.
        """
        last_id: str | None = None
        silent_since = clock()
        while True:
            try:
                for event in self._stream_events(job_id, last_id):
                    silent_since = clock()
                    if event.event == "done":
                        return
                    last_id = event.id or last_id
                    yield event
            except (httpx.TransportError, SSEError, ServerUnreachable) as error:
                if clock() - silent_since > RECONNECT_FOR_SECONDS:
                    raise ServerUnreachable(self.url, str(error)) from error
            time.sleep(RECONNECT_PAUSE_SECONDS)

    def _stream_events(self, job_id: str, last_id: str | None) -> Iterator[JobEvent]:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_id} if last_id else {})
        with self._http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as response:
            if response.status_code == httpx.codes.NO_CONTENT:
                yield JobEvent("", "done", {})
                return
            _raise_for_problem(response)
            for sent in EventSource(response).iter_sse():
                yield JobEvent(sent.id, sent.event, sent.json() if sent.data else {})

    # Models

    def model(self, model_id_or_alias: str) -> JsonObject:
        return self._json("GET", f"/v1/models/{model_id_or_alias}")

    def point_alias(self, alias: str, model_id: str) -> JsonObject:
        return self._json("PUT", f"/v1/aliases/{alias}", json={"model": model_id})

    def roll_back_alias(self, alias: str) -> JsonObject:
        return self._json("POST", f"/v1/aliases/{alias}/rollback")

    def model_card(self, model: str) -> str:
        """In Markdown."""
        return self._request("GET", f"/v1/models/{model}/card").text

    def export_model(self, model: str, target: Path, *, file_format: str) -> JsonObject:
        """Writes the exported file to `target`, whole or not at all; the server may take minutes to make it.

        Returns what was found when it was compared with the model.
        """
        asked = self._http.stream(
            "GET", f"/v1/models/{model}/export", params={"format": file_format}, timeout=EXPORT_SECONDS
        )
        partial = target.with_name(f"{target.name}.part")
        try:
            with self._reached(), asked as response:
                _raise_for_problem(response)
                with partial.open("wb") as file:
                    file.writelines(response.iter_bytes())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        verification: JsonObject = json.loads(response.headers["X-Graft-Verified"])
        return verification

    def delete_model(self, model_id: str) -> None:
        self._request("DELETE", f"/v1/models/{model_id}")

    def backbones(self) -> list[JsonObject]:
        backbones: list[JsonObject] = self._json("GET", "/v1/backbones")["data"]
        return backbones

    # Prediction

    def predict(self, images: Sequence[Path], *, model: str | None = None, top_k: int = 5) -> JsonObject:
        """Predictions in the order of the images, sent in as many requests as they need."""
        params: JsonObject = {"top_k": top_k} | ({"model": model} if model else {})
        answer: JsonObject = {}
        for start in range(0, len(images), LARGEST_PREDICT_BATCH):
            batch = images[start : start + LARGEST_PREDICT_BATCH]
            files = [("file", (path.name, path.read_bytes(), _media_type(path))) for path in batch]
            part = self._json("POST", "/predict", params=params, files=files)
            answer = part | {"predictions": [*answer.get("predictions", []), *part["predictions"]]}
        return answer

    def add_class(self, model: str, name: str, images: Sequence[Path]) -> JsonObject:
        """A new version of a few-shot model, with one class more."""
        files = [("file", (path.name, path.read_bytes(), _media_type(path))) for path in images]
        return self._json("POST", f"/v1/models/{model}/classes", data={"name": name}, files=files)

    def personalise(self, model: str, images: Sequence[tuple[str, Path]]) -> JsonObject:
        """A model that learnt a few pictures more. images: label and file of each."""
        files: list[tuple[str, tuple[Any, ...]]] = []
        said = None
        for label, path in images:
            if label != said:
                files.append(("label", (None, label)))
            files.append(("file", (path.name, path.read_bytes(), _media_type(path))))
            said = label
        return self._json("POST", f"/v1/models/{model}/personalise", files=files)

    # Batches

    def submit_batch(
        self,
        archive: Path,
        *,
        model: str | None = None,
        top_k: int | None = None,
        on_sent: Callable[[int], None] = lambda sent_bytes: None,
    ) -> JsonObject:
        """Streams an archive of pictures to the server. on_sent gets the number of bytes of each piece sent."""
        params = {name: value for name, value in {"model": model, "top_k": top_k}.items() if value is not None}
        headers = {"Content-Length": str(archive.stat().st_size), "Idempotency-Key": secrets.token_hex(16)}
        return self._json("PUT", "/v1/batches", params=params, headers=headers, content=_pieces(archive, on_sent))

    def batch(self, batch_id: str, *, wait_seconds: int = 0) -> JsonObject:
        return self._json("GET", f"/v1/batches/{batch_id}", params={"wait": wait_seconds} if wait_seconds else None)

    def cancel_batch(self, batch_id: str) -> JsonObject:
        return self._json("POST", f"/v1/batches/{batch_id}/cancel")

    def delete_batch(self, batch_id: str) -> None:
        self._request("DELETE", f"/v1/batches/{batch_id}")

    def download_results(self, batch: JsonObject, target: Path, *, format: Literal["jsonl", "csv"]) -> None:
        """Streams a batch's results into a file, which is there when they are whole."""
        unfinished = target.with_name(f"{target.name}.part")
        try:
            with self._http.stream("GET", batch["results"][format]) as response:
                _raise_for_problem(response)
                with unfinished.open("wb") as file:
                    file.writelines(response.iter_bytes())
            unfinished.replace(target)
        except httpx.TransportError as error:
            raise ServerUnreachable(self.url, str(error)) from error
        finally:
            unfinished.unlink(missing_ok=True)

    # Any list, and the server itself

    def list(self, collection: str, *, limit: int = 50, **filters: str | None) -> list[JsonObject]:
        """The newest entries of "datasets", "jobs", "models" or "batches"; filters that are None are left out."""
        params = {"limit": limit} | {name: value for name, value in filters.items() if value is not None}
        entries: list[JsonObject] = self._json("GET", f"/v1/{collection}", params=params)["data"]
        return entries

    def is_alive(self) -> bool:
        """Whether a server answers here at all."""
        try:
            return self._http.get("/healthz", timeout=2.0).is_success
        except httpx.TransportError:
            return False

    def _json(self, method: str, path: str, **request: Any) -> JsonObject:
        body: JsonObject = self._request(method, path, **request).json()
        return body

    def _request(self, method: str, path: str, **request: Any) -> httpx.Response:
        with self._reached():
            response = self._http.request(method, path, **request)
        _raise_for_problem(response)
        return response

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException as error:
            raise ServerUnreachable(self.url, "it took too long to answer") from error
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise ServerUnreachable(self.url, str(error)) from error


def _pieces(path: Path, on_sent: Callable[[int], None]) -> Iterable[bytes]:
    with path.open("rb") as file:
        while piece := file.read(UPLOAD_CHUNK_BYTES):
            yield piece
            on_sent(len(piece))


def _media_type(path: Path) -> str:
    return mimetypes.guess_type(path.name)[0] or "application/octet-stream"


def _raise_for_problem(response: httpx.Response) -> None:
    if response.is_success:
        return
    response.read()
    try:
        problem = response.json()
    except ValueError:
        problem = {}
    raise ServerRefused(response.status_code, problem if isinstance(problem, dict) else {})
