"""Trained models at work: pictures in, scores out. Keeps a bounded set of models loaded, the default one always.

Knows artifacts, pictures and numbers; not HTTP, not the database: callers say which model id they mean, so moving an
alias swaps models between two requests, and a request under way ends on the model it began with.

Three kinds of thread, so that none waits for another's kind of work: decoding (one per core), loading (one), and
forward passes (one, because a device does one thing at a time).
"""

import asyncio
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from app.errors import FieldError, ImageRefused, InvalidRequest, Overloaded
from app.vision import artifact, images
from app.vision.artifact import Artifact
from app.vision.images import ImageLimits
from app.vision.preprocessing import Preprocessing, eval_pixels, normalise

# Pictures in one forward pass. More gain nothing on a CPU, and on a GPU only memory is left to lose.
FORWARD_BATCH_SIZE = 32


@dataclass(frozen=True)
class Scores:
    """One picture's class probabilities. values: float per class, in the model's order; they sum to 1."""

    classes: Sequence[str]
    values: Sequence[float]

    def top(self, k: int) -> list[tuple[str, float]]:
        """The min(k, classes) most probable classes, best first; equals in the model's order."""
        order = sorted(range(len(self.values)), key=lambda i: -self.values[i])
        return [(self.classes[i], self.values[i]) for i in order[:k]]


class LoadedModel:
    """An artifact on its device, in eval mode, with one forward pass behind it."""

    def __init__(self, loaded: Artifact, device: torch.device) -> None:
        self._classifier = loaded.classifier.to(device).eval()
        self._device = device
        self._temperature = loaded.temperature
        self.classes: Sequence[str] = loaded.classes
        self.preprocessing = loaded.preprocessing
        self.size_bytes = sum(tensor.nbytes for tensor in self._classifier.state_dict().values())
        # The first pass allocates and, on a GPU, picks kernels: nobody's request should wait for that.
        side = self.preprocessing.crop
        self.probabilities(torch.zeros(1, 3, side, side, dtype=torch.uint8))

    def probabilities(self, pixels: Tensor) -> Tensor:
        """pixels: uint8 (N, 3, S, S) as eval_pixels makes them, or float32 and normalised already.

        Returns float32 (N, C) on the CPU.
        Raises Overloaded if the device has no memory left even for one picture.
        """
        try:
            return self._forward(pixels)
        except torch.OutOfMemoryError:
            pass  # retried outside of this block, whose traceback would hold the tensors
        if len(pixels) == 1:
            raise Overloaded("The device is out of memory; try again soon.", retry_after_seconds=5)
        half = len(pixels) // 2
        return torch.cat([self.probabilities(pixels[:half]), self.probabilities(pixels[half:])])

    def features(self, pixels: Tensor) -> Tensor:
        """What the head sees of pixels as above: float32 (N, D) on the CPU."""
        with torch.inference_mode():
            batch = normalise(pixels.to(self._device), self.preprocessing, torch.float32)
            found: Tensor = self._classifier.backbone(batch).float().cpu()
        return found.clone()  # a tensor that may be computed with outside of inference mode

    def _forward(self, pixels: Tensor) -> Tensor:
        with torch.inference_mode():
            batch = pixels.to(self._device)
            if batch.dtype == torch.uint8:
                batch = normalise(batch, self.preprocessing, torch.float32)
            return self._classifier.probabilities(batch, self._temperature).float().cpu()


class Predictor:
    """Loads, keeps and runs models. All methods belong to one event loop; close with `close()`."""

    def __init__(
        self,
        *,
        folder_of: Callable[[str], Path],
        device: torch.device,
        limits: ImageLimits,
        max_loaded_bytes: int,
        max_pending: int,
        on_load: Callable[[bool], None] = lambda is_loaded: None,
    ) -> None:
        """folder_of: where a model's artifact lies. max_loaded_bytes: of weights, the pinned model aside.

        max_pending: pictures that may wait or be worked on. on_load: told of each load whether it succeeded.
        """
        self._folder_of = folder_of
        self._device = device
        self._limits = limits
        self._max_loaded_bytes = max_loaded_bytes
        self._max_pending = max_pending
        self._on_load = on_load
        self._pending = 0
        self._pinned: str | None = None
        self._loaded: OrderedDict[str, LoadedModel] = OrderedDict()  # least recently used first
        self._loading: dict[str, asyncio.Task[LoadedModel]] = {}
        self._decoders = ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 1), thread_name_prefix="decode")
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="load")
        self._forwarder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forward")

    async def predict(self, model_id: str, pictures: Sequence[bytes]) -> list[Scores | ImageRefused]:
        """Scores for each encoded picture; in the place of one that cannot be read, the reason.

        Raises Overloaded when too much is waiting, ModelUnavailable if the model's files cannot be used.
        """
        if self._pending + len(pictures) > self._max_pending:
            raise Overloaded("Too many pictures wait for prediction; try again soon.", retry_after_seconds=1)
        self._pending += len(pictures)
        try:
            model = await self.load(model_id)
            inputs = await asyncio.gather(*(self._decode(picture, model) for picture in pictures))
            readable = [pixels for pixels in inputs if isinstance(pixels, Tensor)]
            scores = iter(await self._run(model, readable))
            return [next(scores) if isinstance(pixels, Tensor) else pixels for pixels in inputs]
        finally:
            self._pending -= len(pictures)

    async def scores(self, model_id: str, batch: Tensor) -> list[Scores]:
        """Scores for pictures that the caller has preprocessed as the model's `preprocessing` says.

        batch: float32 (N, 3, S, S), normalised.
        Raises InvalidRequest for another shape, for values that are not finite or that the network makes no numbers
        of, and what `predict` raises.
        """
        if self._pending + len(batch) > self._max_pending:
            raise Overloaded("Too many pictures wait for prediction; try again soon.", retry_after_seconds=1)
        self._pending += len(batch)
        try:
            model = await self.load(model_id)
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._decoders, _check_preprocessed, batch, model.preprocessing)
            scores = await self._run(model, list(batch))
        finally:
            self._pending -= len(batch)
        if not all(math.isfinite(value) for row in scores for value in row.values):
            raise InvalidRequest("The network makes no numbers of this tensor: its values are far too large.")
        return scores

    async def features(self, model_id: str, pictures: Sequence[bytes]) -> Tensor:
        """What the model's head sees of each picture: float32 (N, D), N > 0.

        Raises ImageRefused, which points at each picture that cannot be read, and what `predict` raises.
        """
        if self._pending + len(pictures) > self._max_pending:
            raise Overloaded("Too many pictures wait for prediction; try again soon.", retry_after_seconds=1)
        self._pending += len(pictures)
        try:
            model = await self.load(model_id)
            inputs = await asyncio.gather(*(self._decode(picture, model) for picture in pictures))
            refused = [(i, pixels) for i, pixels in enumerate(inputs) if isinstance(pixels, ImageRefused)]
            if refused:
                raise ImageRefused(
                    f"{len(refused)} of {len(pictures)} pictures cannot be read; send the others alone.",
                    errors=[FieldError(f"#/file/{i}", str(refusal.detail)) for i, refusal in refused],
                )
            loop = asyncio.get_running_loop()
            readable = torch.stack([pixels for pixels in inputs if isinstance(pixels, Tensor)])
            parts = [
                await loop.run_in_executor(self._forwarder, model.features, part)
                for part in torch.split(readable, FORWARD_BATCH_SIZE)
            ]
            return torch.cat(parts)
        finally:
            self._pending -= len(pictures)

    async def load(self, model_id: str) -> LoadedModel:
        """The model, ready for use; loaded first if need be, once however many ask. Raises ModelUnavailable."""
        model = self._loaded.get(model_id)
        if model is not None:
            self._loaded.move_to_end(model_id)
            return model
        task = self._loading.get(model_id)
        if task is None:
            task = asyncio.create_task(self._load(model_id))
            self._loading[model_id] = task
            task.add_done_callback(lambda done: self._forget_loading(model_id, done))
        # Shielded, since one waiting client that leaves must not take the model from the others.
        return await asyncio.shield(task)

    async def pin(self, model_id: str | None) -> None:
        """Loads a model and keeps it loaded whatever else is used, instead of the one pinned before."""
        if model_id is not None:
            await self.load(model_id)
        self._pinned = model_id
        self._evict()

    def is_loaded(self, model_id: str) -> bool:
        return model_id in self._loaded

    def forget(self, model_id: str) -> None:
        """Lets go of a deleted model; requests under way still end on it."""
        self._loaded.pop(model_id, None)

    @property
    def pending(self) -> int:
        """Pictures that wait or are worked on."""
        return self._pending

    def close(self) -> None:
        for pool in (self._decoders, self._loader, self._forwarder):
            pool.shutdown(wait=True, cancel_futures=True)

    async def _load(self, model_id: str) -> LoadedModel:
        is_loaded = False
        try:
            artifact_folder = self._folder_of(model_id)
            loop = asyncio.get_running_loop()
            loaded = await loop.run_in_executor(self._loader, artifact.load, artifact_folder)
            model = await loop.run_in_executor(self._forwarder, LoadedModel, loaded, self._device)
            is_loaded = True
        finally:
            self._on_load(is_loaded)
        self._loaded[model_id] = model
        self._evict()
        return model

    def _forget_loading(self, model_id: str, task: asyncio.Task[LoadedModel]) -> None:
        del self._loading[model_id]
        if not task.cancelled():
            task.exception()  # seen, even if everybody who waited for it has left

    def _evict(self) -> None:
        """Drops what was used least recently until the rest fits; the newest stays, or nothing could be served."""
        kept = {self._pinned, next(reversed(self._loaded), None)}
        while sum(m.size_bytes for i, m in self._loaded.items() if i != self._pinned) > self._max_loaded_bytes:
            victim = next((model_id for model_id in self._loaded if model_id not in kept), None)
            if victim is None:
                return
            del self._loaded[victim]

    async def _decode(self, picture: bytes, model: LoadedModel) -> Tensor | ImageRefused:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._decoders, self._pixels, picture, model)
        except ImageRefused as refusal:
            return refusal

    def _pixels(self, picture: bytes, model: LoadedModel) -> Tensor:
        preprocessing = model.preprocessing
        return eval_pixels(images.decode(picture, side=preprocessing.side, limits=self._limits), preprocessing)

    async def _run(self, model: LoadedModel, pixels: Sequence[Tensor]) -> list[Scores]:
        """The seam for batching across requests: all forward passes of this process go through here."""
        loop = asyncio.get_running_loop()
        scores: list[Scores] = []
        for start in range(0, len(pixels), FORWARD_BATCH_SIZE):
            batch = torch.stack(list(pixels[start : start + FORWARD_BATCH_SIZE]))
            rows = await loop.run_in_executor(self._forwarder, model.probabilities, batch)
            scores += [Scores(model.classes, row) for row in rows.tolist()]
        return scores


def _check_preprocessed(batch: Tensor, preprocessing: Preprocessing) -> None:
    side = preprocessing.crop
    if batch.dtype != torch.float32 or batch.dim() != 4 or batch.shape[1:] != (3, side, side):
        raise InvalidRequest(
            f"This model takes float32 of the shape [n, 3, {side}, {side}], not {list(batch.shape)}; send encoded "
            "pictures instead, and they are preprocessed here."
        )
    if not torch.isfinite(batch).all():
        raise InvalidRequest("The tensor holds values that are not finite numbers.")
