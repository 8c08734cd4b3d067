"""Exported files of models: made once when first asked for, by one process at a time, and kept beside the model.

Knows storage and tasks; not HTTP.
"""

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import structlog

from app.errors import ExportUnavailable, NotFound
from app.storage import LocalStorage
from app.vision import export
from app.vision.export import ExportFailed, Format, Picture

_DESCRIPTION = "export.json"
# Of a model whose data set is gone: pictures of chance say less, and still show that the file computes the same.
_MADE_UP = 8

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class ExportedFile:
    """path: of the file. verified_on: pictures; are_made_up: whether these are not the model's validation pictures."""

    path: Path
    sha256: str
    verified_on: int
    max_difference: float
    are_made_up: bool


class Exports:
    """Belongs to one event loop."""

    def __init__(self, storage: LocalStorage, pictures_of: Callable[[str], list[Picture]]) -> None:
        """pictures_of: validation pictures of a model, by its id; none where they are gone."""
        self._storage = storage
        self._pictures_of = pictures_of
        self._making: dict[tuple[str, Format], asyncio.Task[ExportedFile]] = {}
        self._one_at_a_time = asyncio.Semaphore(1)  # each takes a core for seconds, and a gigabyte

    async def get(self, model_id: str, file_format: Format, metadata: Mapping[str, str]) -> ExportedFile:
        """The file, made first if need be, once however many ask. Raises ExportUnavailable, NotFound, StorageFull."""
        found = await asyncio.to_thread(self._find, model_id, file_format)
        if found is not None:
            return found
        key = (model_id, file_format)
        task = self._making.get(key)
        if task is None:
            task = self._making[key] = asyncio.create_task(self._make(model_id, file_format, metadata))
            task.add_done_callback(lambda _done: self._making.pop(key, None))
        # Shielded: one client that leaves must not take the file from the others.
        return await asyncio.shield(task)

    async def _make(self, model_id: str, file_format: Format, metadata: Mapping[str, str]) -> ExportedFile:
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._make_now, model_id, file_format, metadata)

    def _make_now(self, model_id: str, file_format: Format, metadata: Mapping[str, str]) -> ExportedFile:
        pictures = self._pictures_of(model_id)
        are_made_up = not pictures
        if are_made_up:
            random = np.random.default_rng(0)
            pictures = [random.integers(0, 256, (256, 256 + 32 * i, 3), np.uint8) for i in range(_MADE_UP)]
        self._storage.check_room()
        model_folder = self._storage.path(f"models/{model_id}")
        with self._storage.staging() as staged:
            staged.mkdir()
            try:
                report = export.export(
                    model_folder, staged, file_format=file_format, metadata=metadata, pictures=pictures
                )
            except (ExportFailed, OSError) as error:
                if not model_folder.exists():
                    raise NotFound("The model was deleted meanwhile.", code="model-not-found") from error
                log.error("export failed", model_id=model_id, format=file_format, reason=str(error))
                raise ExportUnavailable(
                    f"This model cannot be exported as {file_format}; the server's log says why. Try another format."
                ) from error
            made = ExportedFile(
                path=self._folder(model_id, file_format) / f"model.{file_format}",
                sha256=_sha256(staged / f"model.{file_format}"),
                verified_on=report.images,
                max_difference=report.max_difference,
                are_made_up=are_made_up,
            )
            record = asdict(made) | {"path": made.path.name}
            (staged / _DESCRIPTION).write_text(json.dumps(record), "utf-8")
            if not model_folder.exists():  # deleted with its files; nothing is to lie where it was
                raise NotFound("The model was deleted meanwhile.", code="model-not-found")
            self._storage.publish(staged, self._key(model_id, file_format))
        return made

    def _find(self, model_id: str, file_format: Format) -> ExportedFile | None:
        folder = self._folder(model_id, file_format)
        try:
            record = json.loads((folder / _DESCRIPTION).read_bytes())
        except OSError:
            return None
        return ExportedFile(**{**record, "path": folder / record["path"]})

    def _folder(self, model_id: str, file_format: Format) -> Path:
        return self._storage.path(self._key(model_id, file_format))

    @staticmethod
    def _key(model_id: str, file_format: Format) -> str:
        # Below the model, so that it goes with it.
        return f"models/{model_id}/export-{file_format}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
