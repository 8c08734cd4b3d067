"""`/v1/models`, `/v1/aliases`, `/v1/backbones`: what was trained, what names point at, and what can be started from."""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from graft_client import shared
from graft_client.answers import Alias, Backbone, Deleted, Evaluation, Export, Model, ModelFeedback, Page
from graft_client.calls import Resource, call, stream
from graft_client.connection import Request, path_of
from graft_client.decoding import decode
from graft_client.uploads import PathLike, Picture, Pictures, as_sequence, form_part, named_picture
from graft_client.wire import W

MODELS = "/v1/models"
MODEL = "/v1/models/{}"
ALIAS = "/v1/aliases/{}"

ExportFormat = Literal["onnx", "pt2", "safetensors"]


class Models(Resource[W]):
    """A model is named by its id or by an alias, such as default."""

    @call
    async def get(self, model: str) -> Model:
        request = Request(method="GET", path=path_of(MODEL, model), is_repeatable=True)
        return decode(Model, await self._connection.json(request))

    @call
    async def list(
        self,
        *,
        limit: int | None = None,
        after: str | None = None,
        status: str | None = None,
        dataset: str | None = None,
        method: str | None = None,
    ) -> Page[Model]:
        """Newest first."""
        query = {"limit": limit, "after": after, "status": status, "dataset": dataset, "method": method}
        return await shared.page(self._connection, MODELS, Model, query)

    @stream
    def all(self, *, dataset: str | None = None, method: str | None = None) -> AsyncIterator[Model]:
        """Every one of `list`, page after page."""
        return shared.pages(self._connection, MODELS, Model, {"dataset": dataset, "method": method})

    @call
    async def delete(self, model_id: str) -> Deleted:
        """Of a model that no alias points at."""
        return decode(Deleted, await self._connection.json(Request(method="DELETE", path=path_of(MODEL, model_id))))

    @call
    async def evaluation(self, model: str) -> Evaluation:
        """How well it does on validation pictures: by class, which are confused, which are wrong."""
        request = Request(method="GET", path=path_of(MODEL + "/evaluation", model), is_repeatable=True)
        return decode(Evaluation, await self._connection.json(request))

    @call
    async def feedback(self, model: str) -> ModelFeedback:
        """Its accuracy by what people said of kept predictions."""
        request = Request(method="GET", path=path_of(MODEL + "/feedback", model), is_repeatable=True)
        return decode(ModelFeedback, await self._connection.json(request))

    @call
    async def card(self, model: str) -> str:
        """The model card, in Markdown."""
        request = Request(method="GET", path=path_of(MODEL + "/card", model), is_repeatable=True)
        return (await self._connection.answer(request)).text

    @call
    async def export(self, model: str, target: PathLike, *, format: ExportFormat) -> Export:
        """Writes a file that runs outside Graft, whole or not at all; the server may take minutes to make it."""
        request = Request(
            method="GET",
            path=path_of(MODEL + "/export", model),
            query={"format": format},
            is_repeatable=True,
            timeout_seconds=shared.MAKING_SECONDS,
        )
        headers = await shared.download(self._connection, request, Path(target))
        return Export(path=Path(target), verification=json.loads(headers.get("X-Graft-Verified", "{}")))

    @call
    async def add_class(self, model: str, name: str, pictures: Pictures) -> Model:
        """A new version of a few-shot model, with one class more."""
        files: list[tuple[str, Any]] = [("name", (None, name))]
        for picture in as_sequence(pictures):
            files.append(form_part(await self._connection.wire.in_thread(named_picture, picture)))
        request = Request(method="POST", path=path_of(MODEL + "/classes", model), files=files)
        return decode(Model, await self._connection.json(request))

    @call
    async def personalise(self, model: str, pictures: Sequence[tuple[str | Mapping[str, str], Picture]]) -> Model:
        """A new model that learnt a few pictures more. pictures: each with its class before it, or its classes by task
        where the model tells several things; those that are not known may be missing."""
        files: list[tuple[str, Any]] = []
        said: dict[str, str] = {}
        for label, picture in pictures:
            named = {"label": label} if isinstance(label, str) else {f"label:{task}": label[task] for task in label}
            # What is said of a picture holds for the next one, too, until something else is, or nothing.
            changed = [name for name in {**said, **named} if named.get(name) != said.get(name)]
            files += [(name, (None, named.get(name, ""))) for name in changed]
            files.append(form_part(await self._connection.wire.in_thread(named_picture, picture)))
            said = named
        request = Request(method="POST", path=path_of(MODEL + "/personalise", model), files=files)
        return decode(Model, await self._connection.json(request))

    @call
    async def backbones(self) -> Sequence[Backbone]:
        """What a job may name as its backbone."""
        request = Request(method="GET", path="/v1/backbones", is_repeatable=True)
        return [decode(Backbone, each) for each in (await self._connection.json(request))["data"]]


class Aliases(Resource[W]):
    """Names of models; `default` is the one that `predict` asks."""

    @call
    async def list(self) -> Page[Alias]:
        return await shared.page(self._connection, "/v1/aliases", Alias, {})

    @call
    async def point(self, name: str, model: str) -> Alias:
        """Lets a name, new or not, stand for a model. No request is lost on the way."""
        request = Request(method="PUT", path=path_of(ALIAS, name), json={"model": model}, is_repeatable=True)
        return decode(Alias, await self._connection.json(request))

    @call
    async def roll_back(self, name: str) -> Alias:
        """Back to the model from before; a second time undoes it."""
        request = Request(method="POST", path=path_of(ALIAS + "/rollback", name))
        return decode(Alias, await self._connection.json(request))

    @call
    async def delete(self, name: str) -> Deleted:
        return decode(Deleted, await self._connection.json(Request(method="DELETE", path=path_of(ALIAS, name))))
