"""Exported files of models: each made once, by a process of its own, checked, and kept beside the model.

Knows the storage, model ids and the program app/vision/export.py; not HTTP, not the database: callers say whether a
model is still there, and what its file should tell of it.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from app.errors import ExportUnavailable, ModelUnavailable, NotFound, Overloaded
from app.storage import LocalStorage
from app.vision.usage import Format

# Raised whenever files of earlier versions should be made anew.
VERSION = 2
# One keeps a core busy and takes a gigabyte or more; predictions need the rest.
PARALLEL_EXPORTS = 1
MOST_WAITING = 8
# The largest network takes some two minutes on one slow core.
LONGEST_EXPORT_SECONDS = 900.0

REPORT_FILE = "report.json"  # written by the program, and kept beside the file
PICTURES_FILE = "pictures.npz"
PROGRAM = (sys.executable, "-m", "app.vision.export")

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Exported:
    """A finished file. verification: what was found when it was run, as app/vision/export.py's Verification."""

    path: Path
    size_bytes: int
    sha256: str
    verification: Mapping[str, Any]


@dataclass(frozen=True)
class Contents:
    """What goes into a file beside the model. pictures: uint8 (H, W, 3), to verify it with; none if there are none."""

    facts: Mapping[str, str]
    pictures: Sequence[NDArray[np.uint8]]


class Exporter:
    """Finds and makes exported files. All methods but `find` belong to one event loop; end with `stop()`."""

    def __init__(
        self, storage: LocalStorage, *, is_wanted: Callable[[str], bool], program: Sequence[str] = PROGRAM
    ) -> None:
        """is_wanted: whether the model is (still) there that a key of the storage belongs to; called in threads."""
        self._storage = storage
        self._is_wanted = is_wanted
        self._program = program
        self._making: dict[tuple[str, Format], asyncio.Task[Exported]] = {}
        self._turn = asyncio.Semaphore(PARALLEL_EXPORTS)

    def find(self, model_id: str, file_format: Format) -> Exported | None:
        """The file, if it was made before."""
        folder = self._storage.path(_key(model_id, file_format))
        try:
            report = json.loads((folder / REPORT_FILE).read_bytes())
            path = folder / _file_name(file_format)
            if path.stat().st_size != report["size_bytes"]:
                return None
            return Exported(path, report["size_bytes"], report["sha256"], report["verification"])
        except (OSError, ValueError, KeyError, TypeError):
            return None  # to be made, again if need be

    async def make(self, model_id: str, file_format: Format, contents: Callable[[], Contents]) -> Exported:
        """The file, made once however many ask for it. contents: called in a thread when its turn has come.

        Raises Overloaded when too many wait, ExportUnavailable, and NotFound if the model is deleted meanwhile.
        """
        key = (model_id, file_format)
        task = self._making.get(key)
        if task is None:
            if len(self._making) >= MOST_WAITING:
                raise Overloaded("Too many exports wait for their turn; try again soon.", retry_after_seconds=30)
            task = self._making[key] = asyncio.create_task(self._make(model_id, file_format, contents))
            task.add_done_callback(lambda done: self._forget(key, done))
        try:
            # Shielded: the file is wanted by others, or by the same client when it comes again.
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise Overloaded("The server is being stopped; ask again soon.", retry_after_seconds=5) from None
            raise

    def stop(self) -> None:
        """Ends what is being made; those who wait are told to come again."""
        for task in self._making.values():
            task.cancel()

    def _forget(self, key: tuple[str, Format], task: asyncio.Task[Exported]) -> None:
        del self._making[key]
        if not task.cancelled():
            task.exception()  # seen, even if everybody who waited for it has left

    async def _make(self, model_id: str, file_format: Format, contents: Callable[[], Contents]) -> Exported:
        async with self._turn:
            with self._storage.staging() as folder:
                order = await asyncio.to_thread(self._prepare, folder, model_id, file_format, contents)
                await self._run(order, model_id=model_id)
                return await asyncio.to_thread(self._publish, folder, model_id, file_format)

    def _prepare(
        self, folder: Path, model_id: str, file_format: Format, contents: Callable[[], Contents]
    ) -> dict[str, Any]:
        self._storage.check_room()
        found = contents()
        folder.mkdir()
        if found.pictures:
            np.savez(folder / PICTURES_FILE, *found.pictures)
        return {
            "model_folder": str(self._storage.path(f"models/{model_id}")),
            "file_format": file_format,
            "target": str(folder / _file_name(file_format)),
            "report": str(folder / REPORT_FILE),
            "pictures": str(folder / PICTURES_FILE) if found.pictures else None,
            "facts": dict(found.facts),
        }

    async def _run(self, order: dict[str, Any], *, model_id: str) -> None:
        """One run of the program, which ends when its standard input does."""
        process = await asyncio.create_subprocess_exec(
            *self._program,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},  # its memory is the predictions'
        )
        assert process.stdin is not None
        assert process.stderr is not None
        try:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            async with asyncio.timeout(LONGEST_EXPORT_SECONDS):
                said = await process.stderr.read()
                status = await process.wait()
        except TimeoutError:
            raise _failed("it took too long") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            process.stdin.close()
        if status != 0:
            last = said.decode("utf-8", "replace")[-4000:]
            log.error("export failed", model_id=model_id, status=status, said=last)
            was_killed = status == -signal.SIGKILL
            raise _failed(
                "its process was killed, perhaps for its memory" if was_killed else "the server's log says why"
            )

    def _publish(self, folder: Path, model_id: str, file_format: Format) -> Exported:
        report = json.loads((folder / REPORT_FILE).read_bytes())
        if "code" in report:
            log.error("export refused", model_id=model_id, file_format=file_format, **report)
            raise (ModelUnavailable if report["code"] == ModelUnavailable.code else ExportUnavailable)(report["detail"])
        (folder / PICTURES_FILE).unlink(missing_ok=True)
        # The model may be deleted at any time; no file of it must come to be after that.
        with self._storage.announced(exports_of(model_id), is_wanted=self._is_wanted):
            self._storage.publish(folder, _key(model_id, file_format))
        exported = self.find(model_id, file_format)
        if exported is None:
            raise _deleted()
        return exported


def exports_of(model_id: str) -> str:
    """The storage's key of all exported files of a model; to be deleted with it."""
    return f"exports/{model_id}"


def _key(model_id: str, file_format: Format) -> str:
    return f"{exports_of(model_id)}/{file_format}-{VERSION}"


def _file_name(file_format: Format) -> str:
    return f"model.{file_format}"


def _failed(why: str) -> ExportUnavailable:
    return ExportUnavailable(f"The file could not be made: {why}.")


def _deleted() -> NotFound:
    return NotFound("The model was deleted while it was being exported.", code="model-not-found")
