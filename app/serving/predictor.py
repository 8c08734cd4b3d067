"""Trained models at work: pictures in, scores out. Keeps a bounded set of models loaded, those with an alias first.

Knows artifacts, pictures and numbers; not HTTP, not the database: callers say which model id they mean, so moving an
alias swaps models between two requests, and a request under way ends on the model it began with.

Models whose backbones are the same, weight for weight, share one in memory, and run in one batch: what is their own is
a head. Kinds of thread, so that none waits for another's kind of work: decoding (one per core), loading (one), forward
passes (one, because a device does one thing at a time; and one per core for an engine whose passes are best small), and
building faster engines (one).
"""

import asyncio
import contextlib
import math
import subprocess
import time
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import structlog
import torch
from torch import Tensor

from app.errors import FieldError, ImageRefused, InvalidRequest, Overloaded, StorageFull
from app.serving import engine_builder, engines
from app.serving.adaptation import Plan, advanced, by_neighbours, share_of, views_of
from app.serving.batcher import Batcher, fail, waited_too_long
from app.serving.engines import Engine
from app.serving.loaded import (
    LoadedModel,
    Network,
    bytes_of,
    memory_or_overloaded,
    open_built_engine,
    read_model,
)
from app.serving.scores import Adapted, Scores
from app.settings import ServingEngine
from app.storage import LocalStorage
from app.vision.classifier import Classifier
from app.vision.decoding import Decoders
from app.vision.device import usable_cores
from app.vision.heatmaps import drawn
from app.vision.images import Pixels
from app.vision.likeness import seen_alike
from app.vision.outputs import probabilities
from app.vision.preprocessing import Preprocessing, eval_pixels
from app.vision.reference import Features

# Pictures in one forward pass. More gain nothing on a CPU, and on a GPU only memory is left to lose.
FORWARD_BATCH_SIZE = 32
# A model that was asked for so many pictures will be asked for more: worth the seconds that an engine takes to build.
BUILD_AFTER_PICTURES = 100
# Built engines that are kept on disk for the next start; the oldest goes first.
KEPT_ENGINES = 32

T = TypeVar("T")

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class _Asked:
    """A picture on its way through the device. pixels: uint8 (3, S, S), or float32 and normalised already.

    is_compared: whether its similarities are asked for.
    """

    model: LoadedModel
    pixels: Tensor
    is_compared: bool


@dataclass
class _Lane:
    """A batcher, and the encoded pictures on their way to it.

    So many are begun, being decoded, decoded, or in a pass, that no pass waits for one. More would lie about until no
    cache has them any more, and decoding would take the cores from the passes. One whose deadline, on time.monotonic's
    clock, passes before it is begun is told so, and not decoded.
    """

    batcher: Batcher[_Asked, Scores]
    decoders: ThreadPoolExecutor
    _begun: int = 0
    _waiting: "deque[tuple[asyncio.Future[Scores], float, Callable[[], None]]]" = field(default_factory=deque)

    @property
    def most_begun(self) -> int:
        return 2 * self.batcher.max_batch * self.batcher.threads + usable_cores()

    def add(self, answer: "asyncio.Future[Scores]", decode: Callable[[], None], *, deadline: float) -> None:
        """decode: gives the picture to the batcher, whose word `answer` is; runs in one of the decoders."""
        self._waiting.append((answer, deadline, decode))
        self._begin()

    def _begin(self) -> None:
        while self._waiting and self._begun < self.most_begun:
            answer, deadline, decode = self._waiting.popleft()
            if deadline < time.monotonic():
                fail(answer, waited_too_long())
            elif not answer.done():  # else nobody waits for it any more
                self._begun += 1
                answer.add_done_callback(self._one_ended)
                self.decoders.submit(decode)

    def _one_ended(self, _answer: "asyncio.Future[Scores]") -> None:
        self._begun -= 1
        self._begin()


class Predictor:
    """Loads, keeps and runs models. All methods belong to one event loop; close with `close()`."""

    def __init__(
        self,
        *,
        storage: LocalStorage,
        device: torch.device,
        decoders: Decoders,
        max_loaded_bytes: int,
        max_pending: int,
        timeout_seconds: float,
        engine_policy: ServingEngine,
        check_pixels: Callable[[str, Preprocessing], Tensor | None] = lambda _model_id, _preprocessing: None,
        training_pictures: Callable[[str, Sequence[str | None], int], Sequence[Pixels | None]] = (
            lambda _dataset_id, ids, _side: [None for _ in ids]
        ),
        on_pending: Callable[[int], None] = lambda _count: None,
        on_load: Callable[[bool], None] = lambda is_loaded: None,
        on_batch: Callable[[int], None] = lambda _size: None,
    ) -> None:
        """max_loaded_bytes: of weights, the default model's aside. max_pending: pictures that may wait or be worked on.

        timeout_seconds: the longest that a picture waits for the device. engine_policy: what a busy network may be
        given that is faster than torch. check_pixels: validation pictures of a model, uint8 (N, 3, S, S), to compare
        engines on. training_pictures: a data set's, by their ids, with short sides of up to a model's preprocessing's
        `side`; None for those that are not to be had. on_pending:
        told how many pictures wait or are worked on, when that changes and with each batch. on_load: told of each load
        whether it succeeded. on_batch: told of each batch's size.
        """
        self._storage = storage
        self._device = device
        self._decoding = decoders
        self._max_loaded_bytes = max_loaded_bytes
        self._max_pending = max_pending
        self._timeout_seconds = timeout_seconds
        self._engine_policy: ServingEngine = engine_policy if device.type == "cpu" else "torch"
        self._check_pixels = check_pixels
        self._training_pictures = training_pictures
        self._on_load = on_load
        self._on_pending = on_pending
        self._pending = 0
        self._default: str | None = None
        self._aliased: frozenset[str] = frozenset()
        self._loaded: OrderedDict[str, LoadedModel] = OrderedDict()  # least recently used first
        self._loading: dict[str, asyncio.Task[LoadedModel]] = {}
        self._networks: weakref.WeakValueDictionary[str, Network] = weakref.WeakValueDictionary()
        self._building: dict[str, asyncio.Task[None]] = {}
        self._decoders = ThreadPoolExecutor(max_workers=max(2, usable_cores()), thread_name_prefix="decode")
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="load")
        self._build_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="build")
        self._builder = engine_builder.Builder()
        # What takes long for one picture is done for one at a time, so that what is short comes in between.
        self._long_work = asyncio.Semaphore(1)

        def batch_begins(size: int) -> None:
            on_pending(self._pending)
            on_batch(size)

        # Of the device, and of engines that like many small passes beside each other better than large ones.
        self._batcher: Batcher[_Asked, Scores] = Batcher(_run, max_batch=FORWARD_BATCH_SIZE, on_batch=batch_begins)
        self._side_by_side: Batcher[_Asked, Scores] = Batcher(
            _run, max_batch=engines.SMALL_BATCH, threads=usable_cores(), on_batch=batch_begins
        )
        self._lane = _Lane(self._batcher, self._decoders)
        self._lane_side_by_side = _Lane(self._side_by_side, self._decoders)

    async def predict(
        self, model: LoadedModel, pictures: Sequence[bytes], *, are_compared: bool = False
    ) -> list[Scores | ImageRefused]:
        """Scores for each encoded picture; in the place of one that cannot be read, the reason.

        model: from `load`; here and below it may have been deleted since, for who holds it ends on it.
        are_compared: whether the scores are to have similarities, where the model has a reference.
        Raises Overloaded when too much is waiting.
        """
        with self._place_for(len(pictures)):
            # All are on their way before the first is waited for.
            answers = [self._answer(model, picture, is_compared=are_compared) for picture in pictures]
            try:
                return [await _or_refusal(answer) for answer in answers]
            finally:
                for answer in answers:
                    if answer.done() and not answer.cancelled():
                        answer.exception()  # seen, even where another picture's error is told
                    answer.cancel()

    async def scores(self, model: LoadedModel, batch: Tensor) -> list[Scores]:
        """Scores for pictures that the caller has preprocessed as the model's `preprocessing` says.

        batch: float32 (N, 3, S, S), normalised.
        Raises InvalidRequest for another shape, for values that are not finite or that the network makes no numbers
        of, and what `predict` raises.
        """
        with self._place_for(len(batch)):
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._decoders, _check_preprocessed, batch, model.preprocessing)
            answers: list[asyncio.Future[Scores]] = [loop.create_future() for _ in batch]
            deadline = self._deadline()
            for pixels, answer in zip(batch, answers, strict=True):
                self._run(model, pixels, answer, deadline)
            found = await asyncio.gather(*answers)
            if not all(math.isfinite(value) for scores in found for value in scores.values):
                raise InvalidRequest("The network makes no numbers of this tensor: its values are far too large.")
            return found

    async def features(self, model: LoadedModel, pictures: Sequence[bytes]) -> Tensor:
        """What the model's head sees of each picture: float32 (N, D), N > 0; to the bit the same for the same pictures.

        Raises ImageRefused, which points at each picture that cannot be read, and what `predict` raises.
        """
        with self._place_for(len(pictures)):
            decoded = await asyncio.gather(*(self._decode(model, picture) for picture in pictures))
            refused = [(i, pixels) for i, pixels in enumerate(decoded) if isinstance(pixels, ImageRefused)]
            if refused:
                raise ImageRefused(
                    f"{len(refused)} of {len(pictures)} pictures cannot be read; send the others alone.",
                    errors=[FieldError(f"#/file/{i}", str(refusal.detail)) for i, refusal in refused],
                )
            readable = torch.stack([pixels for pixels in decoded if isinstance(pixels, Tensor)])
            # By themselves, since the last digits depend on what runs beside them, and by torch, as in training.
            parts = [
                await self._alone(model.network.torch.features, part)
                for part in torch.split(readable, FORWARD_BATCH_SIZE)
            ]
            return torch.cat(parts)

    async def features_of(self, model: LoadedModel, pictures: Sequence[Pixels]) -> Tensor:
        """The same of decoded pictures, uint8 (H, W, 3), as many as there are, a batch at a time between others'.

        Raises what `predict` raises.
        """
        with self._place_for(min(FORWARD_BATCH_SIZE, self._max_pending)):
            loop = asyncio.get_running_loop()

            def prepared(start: int) -> Tensor:
                some = pictures[start : start + FORWARD_BATCH_SIZE]
                return torch.stack([eval_pixels(picture, model.preprocessing) for picture in some])

            parts = []
            for start in range(0, len(pictures), FORWARD_BATCH_SIZE):
                batch = await loop.run_in_executor(self._decoders, prepared, start)
                parts.append(await self._alone(model.network.torch.features, batch))
            return torch.cat(parts)

    async def explain(self, model: LoadedModel, pictures: Sequence[bytes], labels: Sequence[int]) -> list[bytes]:
        """PNGs of the pictures, with a heat map of what speaks for these labels of the first task.

        One picture at a time, so that other forward passes come in between and memory holds one backward pass.
        Raises ImageRefused for a picture that cannot be read, and what `predict` raises.
        """
        with self._place_for(len(pictures)):
            asked = zip(pictures, labels, strict=True)
            return [await self._explain(model, picture, label) for picture, label in asked]

    async def adapt(
        self, model: LoadedModel, pictures: Sequence[bytes], scores: Sequence[Scores], plan: Plan
    ) -> list[Adapted]:
        """What copies of the model say, each tuned to one of the pictures. scores: the model's own, of each.

        One picture at a time on the device, so that other forward passes come in between.
        Raises Conflict where there is nothing to tune to, ImageRefused, and what `predict` raises.
        """
        with self._place_for(len(pictures)):
            known: Sequence[Pixels | None] = []
            if plan.method == "neighbors":
                # Looked for each time: what is kept mapped would outlive its deletion.
                loop = asyncio.get_running_loop()
                known = await loop.run_in_executor(self._decoders, self._neighbours, model)
            asked = zip(pictures, scores, strict=True)
            # One after the other, so that a request waits for others' turns and never for its own.
            return [await self._adapt(model, picture, own, plan, known) for picture, own in asked]

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

    async def keep(self, default: str | None, *, aliased: Collection[str] = ()) -> None:
        """Loads the default model and keeps it whatever else is used, instead of the one before.

        aliased: other models that have a name; they are the last to make room. Raises ModelUnavailable for the default.
        """
        if default is not None:
            await self.load(default)
        self._default, self._aliased = default, frozenset(aliased)
        self._evict()

    def is_loaded(self, model_id: str) -> bool:
        return model_id in self._loaded

    def engine_of(self, model_id: str) -> str | None:
        """The name of the engine that runs a loaded model."""
        model = self._loaded.get(model_id)
        return None if model is None else model.engine.name

    def engines_used(self) -> Counter[str]:
        """How many loaded models each engine runs, by its name. Safe to call from any thread."""
        return Counter(model.engine.name for model in list(self._loaded.values()))

    def forget(self, model_id: str) -> None:
        """Lets go of a deleted model, also of one that is being loaded; requests under way still end on it."""
        self._loaded.pop(model_id, None)
        self._loading.pop(model_id, None)

    @property
    def pending(self) -> int:
        """Pictures that wait or are worked on."""
        return self._pending

    @property
    def loaded_bytes(self) -> int:
        """Of weights in memory; a backbone that several models share counts once."""
        return bytes_of(self._loaded.values())

    def close(self) -> None:
        for task in self._building.values():
            task.cancel()
        self._builder.stop()
        for pool in (self._decoders, self._loader, self._build_thread):
            pool.shutdown(wait=True, cancel_futures=True)
        self._decoding.close()
        self._batcher.close()
        self._side_by_side.close()

    @contextlib.contextmanager
    def _place_for(self, count: int) -> Iterator[None]:
        if self._pending + count > self._max_pending:
            raise Overloaded("Too many pictures wait for prediction; try again soon.", retry_after_seconds=1)
        self._pending += count
        self._on_pending(self._pending)
        try:
            yield
        finally:
            self._pending -= count
            self._on_pending(self._pending)

    # One picture

    def _answer(self, model: LoadedModel, picture: bytes, *, is_compared: bool) -> "asyncio.Future[Scores]":
        """Gets the picture's scores, or ImageRefused. From thread to thread without a task of its own to wake between
        them: beside a small network's pass that is a good part of a picture's time."""
        loop, deadline = asyncio.get_running_loop(), self._deadline()
        answer: asyncio.Future[Scores] = loop.create_future()

        def decode() -> None:
            if answer.done():  # nobody waits for it any more
                return
            try:
                pixels = self._pixels(picture, model.preprocessing)
            except Exception as error:  # noqa: BLE001 (handed to the one who asked)
                loop.call_soon_threadsafe(fail, answer, error)
            else:
                loop.call_soon_threadsafe(self._run, model, pixels, answer, deadline, is_compared)

        self._lane_of(model.engine).add(answer, decode, deadline=deadline)
        return answer

    async def _decode(self, model: LoadedModel, picture: bytes) -> Tensor | ImageRefused:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._decoders, self._pixels, picture, model.preprocessing)
        except ImageRefused as refusal:
            return refusal

    def _pixels(self, picture: bytes, preprocessing: Preprocessing) -> Tensor:
        return eval_pixels(self._decoding.decode(picture, side=preprocessing.side), preprocessing)

    async def _explain(self, model: LoadedModel, picture: bytes, label: int) -> bytes:
        loop, preprocessing = asyncio.get_running_loop(), model.preprocessing
        side = preprocessing.side

        def seen_and_prepared() -> tuple[Pixels, Tensor]:
            seen = self._decoding.decode(picture, side=side)
            return seen, eval_pixels(seen, preprocessing)

        async with self._one_by_one():
            seen, pixels = await loop.run_in_executor(self._decoders, seen_and_prepared)
            heat = await self._alone(model.evidence, pixels, label)
        return await loop.run_in_executor(self._decoders, drawn, seen, heat, preprocessing)

    async def _adapt(
        self, model: LoadedModel, picture: bytes, own: Scores, plan: Plan, known: Sequence[Pixels | None]
    ) -> Adapted:
        loop, start = asyncio.get_running_loop(), time.perf_counter()
        features = own.features
        assert features is not None, "scores come with what they were made of"
        share = share_of(model.ood_score(features))

        def prepared() -> tuple[Tensor, list[int]]:
            """What the device is to look at: views of the picture, or it, and its neighbours as it was taken."""
            pixels = self._pixels(picture, model.preprocessing)
            if plan.method == "entropy":
                return views_of(pixels), []
            places, pictures = model.neighbours_of(features, known)
            found = [eval_pixels(each, model.preprocessing) for each in pictures]
            return torch.cat([pixels.unsqueeze(0), seen_alike(torch.stack(found), pixels)]), places

        def answered(logits: Tensor) -> Scores:
            plain = model.head.logits(features)
            blended = plain + share * (logits - plain)
            if not torch.isfinite(blended).all():
                detail = "is so large that the copy makes no numbers any more"
                raise InvalidRequest(
                    f"adapt_learning_rate {detail}; leave it out, or choose a smaller one.",
                    errors=[FieldError("#/adapt_learning_rate", detail)],
                )
            (row,) = probabilities(blended.unsqueeze(0), model.outputs).tolist()
            return Scores.of(row, model.outputs, features=features)

        async with self._one_by_one():
            images, places = await loop.run_in_executor(self._decoders, prepared)
            if plan.method == "entropy":
                logits = await self._advanced(model.entropy_steps(images, plan))
            elif plan.parameters == "last_stage":
                logits = await self._advanced(model.neighbour_steps(images, places, plan))
            else:
                assert model.reference is not None
                seen = await self._alone(model.network.features, images[1:])
                as_they_are = torch.from_numpy(model.reference.raw(places))
                logits = await loop.run_in_executor(
                    self._decoders, by_neighbours, model.head, features, seen, as_they_are, model.outputs, plan
                )
        return Adapted(plan, answered(logits), share, time.perf_counter() - start)

    async def _advanced(self, turns: Generator[None, None, Tensor]) -> Tensor:
        """What the turns come to; other pictures' batches run between them."""
        while (found := await self._alone(_advanced_in_memory, turns)) is None:
            pass
        return found

    @contextlib.asynccontextmanager
    async def _one_by_one(self) -> AsyncIterator[None]:
        """Raises Overloaded for what waited too long for its turn."""
        try:
            await asyncio.wait_for(self._long_work.acquire(), self._timeout_seconds)
        except TimeoutError:
            raise waited_too_long() from None
        try:
            yield
        finally:
            self._long_work.release()

    async def _alone(self, function: Callable[..., T], *arguments: Any) -> T:
        """Something else in the thread of the forward passes, between two batches; jobs hear of it."""
        self._on_pending(self._pending)
        return await self._batcher.alone(function, *arguments)

    def _neighbours(self, model: LoadedModel) -> Sequence[Pixels | None]:
        assert model.reference is not None, "checked by who asks for neighbours"
        image_ids = [image and image[0] for image in model.reference.images]
        return self._training_pictures(model.dataset_id or "", image_ids, model.preprocessing.side)

    def _lane_of(self, engine: Engine) -> _Lane:
        return self._lane if engine.passes_at_once == 1 else self._lane_side_by_side

    def _deadline(self) -> float:
        """Until when what is asked now may wait, on time.monotonic's clock."""
        return time.monotonic() + self._timeout_seconds

    def _run(
        self,
        model: LoadedModel,
        pixels: Tensor,
        answer: "asyncio.Future[Scores]",
        deadline: float,
        is_compared: bool = False,
    ) -> None:
        """answer: gets the scores."""
        if answer.done():
            return
        engine = model.engine_for(pixels)
        asked = _Asked(model, pixels, is_compared)
        # Pictures and what was made of pictures do not stack: levels would pass for numbers that are normalised.
        key = (engine, pixels.dtype)
        self._lane_of(engine).batcher.submit(key, asked, deadline=deadline, future=answer)
        model.asked += 1
        # Again after ten times as many: another model's build may have been under way, or this one's have failed.
        if model.asked == BUILD_AFTER_PICTURES * 10**model.builds and self._engine_policy != "torch":
            model.builds += 1
            self._build_soon(model)

    # Loading

    async def _load(self, model_id: str) -> LoadedModel:
        is_loaded = False
        try:
            loop = asyncio.get_running_loop()
            folder = self._storage.path(f"models/{model_id}")
            loaded, key = await loop.run_in_executor(self._loader, read_model, folder)
            network = self._networks.get(key)
            if network is None:
                # In the forward thread, since it makes a first pass; loads come one after the other.
                network = await self._batcher.alone(
                    _network_in_memory, key, loaded.classifier, loaded.preprocessing, self._device
                )
                network = self._networks.setdefault(key, network)
                await loop.run_in_executor(self._loader, open_built_engine, self._storage, network, self._engine_policy)
            model = LoadedModel(model_id, loaded, network)
            is_loaded = True
        finally:
            self._on_load(is_loaded)
        if self._loading.get(model_id) is asyncio.current_task():  # else it was forgotten meanwhile
            self._loaded[model_id] = model
            self._evict()
        return model

    def _forget_loading(self, model_id: str, task: asyncio.Task[LoadedModel]) -> None:
        if self._loading.get(model_id) is task:
            del self._loading[model_id]
        if not task.cancelled():
            task.exception()  # seen, even if everybody who waited for it has left

    def _evict(self) -> None:
        """Drops what was used least recently until the rest fits, models without a name before those with one.

        The newest stays, or nothing could be served.
        """
        newest = next(reversed(self._loaded), None)
        victims = [model_id for model_id in self._loaded if model_id not in (self._default, newest)]
        victims.sort(key=lambda model_id: model_id in self._aliased)  # stable: by use within each
        for victim in victims:
            if bytes_of(m for i, m in self._loaded.items() if i != self._default) <= self._max_loaded_bytes:
                return
            del self._loaded[victim]

    # Faster engines

    def _build_soon(self, model: LoadedModel) -> None:
        network, key = model.network, model.network.key
        is_untried = network.tries_half and model.id not in network.half_keeps
        if key not in self._building and (is_untried or not self._storage.exists(engine_builder.key_of(key))):
            self._building[key] = asyncio.create_task(self._build(model))
            self._building[key].add_done_callback(lambda _done: self._building.pop(key, None))

    async def _build(self, model: LoadedModel) -> None:
        await asyncio.get_running_loop().run_in_executor(self._build_thread, self._build_now, model)
        self._evict()  # engines take memory, too

    def _build_now(self, model: LoadedModel) -> None:
        """What goes wrong is told to the operator: the model is served as it was."""
        preprocessing = model.preprocessing
        try:
            pixels = self._check_pixels(model.id, preprocessing)
            are_own = pixels is not None
            if pixels is None:
                # Soft noise: every class of picture that a network tells apart has edges and plain parts.
                coarse = torch.randint(0, 256, (16, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
                side = (preprocessing.crop, preprocessing.crop)
                pixels = torch.nn.functional.interpolate(coarse, side, mode="bilinear").to(torch.uint8)
            key = engine_builder.key_of(model.network.key)
            earlier = self._storage.path(key) if self._storage.exists(key) else None
            with self._storage.staging() as folder:
                folder.mkdir()
                self._builder.build(
                    self._storage.path(f"models/{model.id}"), folder, pixels=pixels, are_own=are_own, earlier=earlier
                )
                self._storage.check_room()
                self._storage.publish(folder, key)
            self._drop_old_engines()
            open_built_engine(self._storage, model.network, self._engine_policy)
        except (OSError, subprocess.SubprocessError, StorageFull) as error:
            said = getattr(error, "stderr", None)
            log.warning("engine not built", model_id=model.id, error=type(error).__name__, said=said and said[-500:])

    def _drop_old_engines(self) -> None:
        folder = self._storage.path("engines")
        by_age = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
        for path in by_age[:-KEPT_ENGINES]:
            self._storage.delete(f"engines/{path.name}")


async def _or_refusal(answer: "asyncio.Future[Scores]") -> Scores | ImageRefused:
    try:
        return await answer
    except ImageRefused as refusal:
        return refusal


def _run(key: tuple[Engine, torch.dtype], asked: Sequence[_Asked]) -> list[Scores]:
    """One forward pass for pictures of any models on this engine's network, and then each model's head."""
    engine, _ = key
    features = engine.features(torch.stack([one.pixels for one in asked]))
    scores: list[Scores | None] = [None] * len(asked)
    for model in {one.model for one in asked}:
        places = [i for i, one in enumerate(asked) if one.model is model]
        rows = model.probabilities(features[places]).tolist()
        # Here, and not where the answer is put together, since that is in the event loop.
        likes: dict[int, Features] = {}
        compared = [i for i in places if asked[i].is_compared]
        if model.reference is not None and compared:
            likes = dict(zip(compared, model.reference.similarities(features[compared].numpy()), strict=True))
        for i, row in zip(places, rows, strict=True):
            scores[i] = Scores.of(row, model.outputs, features=features[i], similarities=likes.get(i))
    return [one for one in scores if one is not None]


def _network_in_memory(key: str, classifier: Classifier, preprocessing: Preprocessing, device: torch.device) -> Network:
    """Raises Overloaded where the device has no memory for it."""
    with memory_or_overloaded():
        return Network(key, classifier, preprocessing, device)


def _advanced_in_memory(turns: Generator[None, None, Tensor]) -> Tensor | None:
    """One turn more; see `advanced`. Raises Overloaded."""
    with memory_or_overloaded():
        return advanced(turns)


def _check_preprocessed(batch: Tensor, preprocessing: Preprocessing) -> None:
    side = preprocessing.crop
    if batch.dtype != torch.float32 or batch.dim() != 4 or batch.shape[1:] != (3, side, side):
        raise InvalidRequest(
            f"This model takes float32 of the shape [n, 3, {side}, {side}], not {list(batch.shape)}; send encoded "
            "pictures instead, and they are preprocessed here."
        )
    if not torch.isfinite(batch).all():
        raise InvalidRequest("The tensor holds values that are not finite numbers.")
