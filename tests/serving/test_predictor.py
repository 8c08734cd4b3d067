"""The predictor by itself: what it loads, keeps, refuses, and computes."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import builders
import pytest
import torch

from app.errors import ImageRefused, InvalidRequest, ModelUnavailable, Overloaded
from app.serving.adaptation import Plan
from app.serving.loaded import Network
from app.serving.predictor import Predictor
from app.serving.scores import Scores
from app.storage import LocalStorage
from app.vision import artifact, images
from app.vision.artifact import Artifact
from app.vision.classifier import Classifier
from app.vision.decoding import Decoders
from app.vision.images import ImageLimits
from app.vision.preprocessing import Preprocessing, eval_pixels, normalise

LIMITS = ImageLimits(
    max_bytes=10**7, max_pixels=10**7, max_side=10_000, max_aspect=100.0, max_jpeg_scans=100
)  # fmt: skip
SMALL = Preprocessing(
    resize=40, crop=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bilinear"
)
PICTURES = [builders.jpeg(seed, size=(60 + seed, 50)) for seed in range(5)]
BROKEN = PICTURES[0][:100]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage of models: a to d, and a twin of a that has the same backbone and another head."""
    storage = LocalStorage(tmp_path_factory.mktemp("storage"))
    for seed, name in enumerate("abcd"):
        classifier = Classifier.new("squeezenet1_1", 3, seed=seed).eval()
        artifact.save(storage.path(f"models/{name}"), Artifact(classifier, ["x", "y", "z"], SMALL, temperature=0.7))
    twin = Classifier.from_earlier(Classifier.new("squeezenet1_1", 3, seed=0).eval(), 3, seed=9).eval()
    artifact.save(storage.path("models/twin"), Artifact(twin, ["x", "y", "z"], SMALL, temperature=0.7))
    return storage.root


@pytest.fixture
def with_predictor(models: Path) -> Callable[..., list[int]]:
    """Runs an async story with a predictor, and closes it. Returns the sizes of its batches."""

    def run(story: Callable[[Predictor], Awaitable[None]], **options: Any) -> list[int]:
        sizes: list[int] = []

        async def main() -> None:
            predictor = Predictor(
                storage=LocalStorage(models),
                device=torch.device("cpu"),
                decoders=options.get("decoders") or Decoders.trusting(LIMITS),
                max_loaded_bytes=options.get("max_loaded_bytes", 10**9),
                max_pending=options.get("max_pending", 100),
                timeout_seconds=options.get("timeout_seconds", 60.0),
                engine_policy=options.get("engine_policy", "torch"),
                on_pending=options.get("on_pending", lambda _count: None),
                on_batch=sizes.append,
            )
            try:
                await story(predictor)
            finally:
                predictor.close()

        asyncio.run(main())
        return sizes

    return run


async def predicted(predictor: Predictor, name: str, pictures: Sequence[bytes]) -> list[Scores | ImageRefused]:
    return await predictor.predict(await predictor.load(name), pictures)


def values(outcome: Scores | ImageRefused) -> list[float]:
    assert isinstance(outcome, Scores)
    return list(outcome.values)


def expected(models: Path, name: str, picture: bytes) -> list[float]:
    """The same numbers by the same steps as validation takes them, one picture at a time."""
    loaded = artifact.load(models / "models" / name)
    pixels = eval_pixels(images.decode(picture, side=SMALL.side, limits=LIMITS), SMALL)
    with torch.inference_mode():
        logits = loaded.classifier(normalise(pixels[None], SMALL))
        row: list[float] = (logits / loaded.temperature).softmax(1)[0].tolist()
    return row


def test_scores_are_the_calibrated_probabilities_in_order(models: Path, with_predictor: Callable[..., None]) -> None:
    async def story(predictor: Predictor) -> None:
        outcomes = await predicted(predictor, "a", PICTURES)

        for picture, outcome in zip(PICTURES, outcomes, strict=True):
            assert values(outcome) == pytest.approx(expected(models, "a", picture), abs=1e-5)

    with_predictor(story)


def test_unreadable_picture_keeps_its_place(with_predictor: Callable[..., None]) -> None:
    async def story(predictor: Predictor) -> None:
        first, broken, last = await predicted(predictor, "a", [PICTURES[0], BROKEN, PICTURES[1]])
        alone = (await predicted(predictor, "a", [PICTURES[0]]), await predicted(predictor, "a", [PICTURES[1]]))

        assert isinstance(broken, ImageRefused)
        assert values(first) == pytest.approx(values(alone[0][0]), abs=1e-6)
        assert values(last) == pytest.approx(values(alone[1][0]), abs=1e-6)

    with_predictor(story)


def test_nothing_to_predict_is_answered_with_nothing(with_predictor: Callable[..., None]) -> None:
    async def story(predictor: Predictor) -> None:
        assert await predicted(predictor, "a", []) == []

    with_predictor(story)


def test_preprocessed_pictures_score_as_encoded_ones_do(models: Path, with_predictor: Callable[..., None]) -> None:
    async def story(predictor: Predictor) -> None:
        decoded = [images.decode(picture, side=SMALL.side, limits=LIMITS) for picture in PICTURES]
        batch = normalise(torch.stack([eval_pixels(pixels, SMALL) for pixels in decoded]), SMALL)

        for picture, scores in zip(PICTURES, await predictor.scores(await predictor.load("a"), batch), strict=True):
            assert list(scores.values) == pytest.approx(expected(models, "a", picture), abs=1e-5)
        assert await predictor.scores(await predictor.load("a"), batch[:0]) == []
        assert predictor.pending == 0

    with_predictor(story)


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (torch.zeros(2, 3, 33, 33), r"shape \[n, 3, 32, 32\], not \[2, 3, 33, 33\]"),
        (torch.zeros(2, 1, 32, 32), "shape"),
        (torch.zeros(3, 32, 32), "shape"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.float64), "float32"),
        (torch.full((1, 3, 32, 32), torch.nan), "not finite"),
        (torch.full((1, 3, 32, 32), -torch.inf), "not finite"),
        (torch.full((1, 3, 32, 32), 3e38), "far too large"),
    ],
)
def test_tensor_that_is_not_what_the_model_takes_is_refused(
    with_predictor: Callable[..., None], batch: torch.Tensor, reason: str
) -> None:
    async def story(predictor: Predictor) -> None:
        with pytest.raises(InvalidRequest, match=reason):
            await predictor.scores(await predictor.load("a"), batch)
        assert predictor.pending == 0

    with_predictor(story)


def test_tensors_and_pictures_that_wait_together_are_no_batch(
    models: Path, with_predictor: Callable[..., None]
) -> None:
    left, busy = threading.Event(), threading.Event()

    async def story(predictor: Predictor) -> None:
        model = await predictor.load("a")
        pixels = eval_pixels(images.decode(PICTURES[0], side=SMALL.side, limits=LIMITS), SMALL)
        occupied = asyncio.create_task(predictor._alone(lambda: busy.set() or left.wait(60)))
        await asyncio.to_thread(busy.wait, 60)
        # Of each two, since one may already have been taken for the batch that comes next.
        asked = [
            asyncio.create_task(ask)
            for _ in range(2)
            for ask in (
                predictor.scores(model, normalise(pixels[None], SMALL)),
                predictor.predict(model, PICTURES[:1]),
            )
        ]
        async with asyncio.timeout(60):
            while len(predictor._batcher._queue) < 2:
                await asyncio.sleep(0.01)
        left.set()
        await occupied
        for (outcome,) in await asyncio.gather(*asked):
            assert values(outcome) == pytest.approx(expected(models, "a", PICTURES[0]), abs=1e-5)

    with_predictor(story)


def test_tensors_wait_in_the_same_queue(with_predictor: Callable[..., None]) -> None:
    async def story(predictor: Predictor) -> None:
        with pytest.raises(Overloaded):
            await predictor.scores(await predictor.load("a"), torch.zeros(6, 3, 32, 32))

    with_predictor(story, max_pending=5)


def test_top_is_best_first_and_no_longer_than_the_classes() -> None:
    scores = Scores(["x", "y", "z"], [0.2, 0.5, 0.3])

    assert scores.top(2) == [("y", 0.5), ("z", 0.3)]
    assert scores.top(1000) == [("y", 0.5), ("z", 0.3), ("x", 0.2)]


def test_more_than_may_wait_is_refused_and_the_rest_is_answered(with_predictor: Callable[..., None]) -> None:
    async def story(predictor: Predictor) -> None:
        outcomes = await asyncio.gather(
            *(predicted(predictor, "a", PICTURES[:2]) for _ in range(4)), return_exceptions=True
        )

        refused = [outcome for outcome in outcomes if isinstance(outcome, Overloaded)]
        assert [len(outcome) for outcome in outcomes if isinstance(outcome, list)] == [2, 2]
        assert [error.retry_after_seconds for error in refused] == [1, 1]
        assert predictor.pending == 0
        assert len(await predicted(predictor, "a", PICTURES[:2])) == 2

    with_predictor(story, max_pending=5)


def test_many_that_ask_at_once_cause_one_load(models: Path, with_predictor: Callable[..., None]) -> None:
    async def story(predictor: Predictor) -> None:
        loaded = await asyncio.gather(*(predictor.load("a") for _ in range(10)))

        assert len({id(model) for model in loaded}) == 1

    with_predictor(story)


def test_least_recently_used_model_makes_room_and_the_pinned_one_stays(with_predictor: Callable[..., None]) -> None:
    async def story(predictor: Predictor) -> None:
        await predictor.keep("a")
        await predictor.load("b")
        assert (predictor.is_loaded("a"), predictor.is_loaded("b")) == (True, True)

        await predictor.load("c")
        assert [predictor.is_loaded(name) for name in "abc"] == [True, False, True]

        await predictor.keep(None)
        assert [predictor.is_loaded(name) for name in "abc"] == [False, False, True]

    with_predictor(story, max_loaded_bytes=1)


def test_request_under_way_ends_on_the_model_it_began_with(models: Path, with_predictor: Callable[..., None]) -> None:
    async def story(predictor: Predictor) -> None:
        under_way = asyncio.create_task(predicted(predictor, "a", PICTURES))
        await asyncio.sleep(0)
        await predictor.load("b")
        predictor.forget("a")

        assert values((await under_way)[0]) == pytest.approx(expected(models, "a", PICTURES[0]), abs=1e-5)

    with_predictor(story)


def test_model_that_is_forgotten_while_it_is_loaded_is_not_kept(with_predictor: Callable[..., None]) -> None:
    async def story(predictor: Predictor) -> None:
        loading = asyncio.create_task(predictor.load("a"))
        await asyncio.sleep(0)
        predictor.forget("a")

        (outcome,) = await predictor.predict(await loading, PICTURES[:1])

        assert isinstance(outcome, Scores)
        assert not predictor.is_loaded("a")
        await predictor.load("a")
        assert predictor.is_loaded("a")

    with_predictor(story)


def test_model_that_cannot_be_loaded_is_tried_again(with_predictor: Callable[..., None]) -> None:
    async def story(predictor: Predictor) -> None:
        for _ in range(2):
            with pytest.raises(ModelUnavailable):
                await predicted(predictor, "none", PICTURES[:1])
        assert predictor.pending == 0

    with_predictor(story)


def test_caller_that_leaves_does_not_take_the_model_from_others(with_predictor: Callable[..., None]) -> None:
    async def story(predictor: Predictor) -> None:
        leaving, staying = (asyncio.create_task(predicted(predictor, "a", PICTURES[:1])) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()

        assert len(await staying) == 1
        assert leaving.cancelled()
        assert predictor.pending == 0

    with_predictor(story)


def test_models_of_one_backbone_share_it_and_run_in_one_batch(
    models: Path, with_predictor: Callable[..., None]
) -> None:
    async def story(predictor: Predictor) -> None:
        await predictor.load("a")
        alone = predictor.loaded_bytes
        twin = await predictor.load("twin")
        assert twin.network is (await predictor.load("a")).network
        assert twin.network is not (await predictor.load("b")).network
        predictor.forget("b")
        assert predictor.loaded_bytes == alone + twin.size_bytes

        # The first picture occupies the device; the others, of two models, wait together.
        first, *rest = await asyncio.gather(
            predicted(predictor, "a", PICTURES[:1]),
            *(predicted(predictor, name, [picture]) for picture in PICTURES for name in ("a", "twin")),
        )
        assert values(first[0]) == pytest.approx(expected(models, "a", PICTURES[0]), abs=1e-5)
        for (picture, name), (outcome,) in zip([(p, n) for p in PICTURES for n in ("a", "twin")], rest, strict=True):
            assert values(outcome) == pytest.approx(expected(models, name, picture), abs=1e-5)

    sizes = with_predictor(story)
    assert sum(sizes) == 11
    assert len(sizes) < 11


def test_picture_that_waits_beyond_its_time_is_refused(with_predictor: Callable[..., None]) -> None:
    async def story(predictor: Predictor) -> None:
        await predictor.load("a")
        with pytest.raises(Overloaded, match="waited too long"):
            await predicted(predictor, "a", PICTURES[:1])

    with_predictor(story, timeout_seconds=-1.0)


class CountingDecoders(Decoders):
    """How many pictures were decoded."""

    count = 0

    def decode(self, encoded: bytes, *, side: int) -> images.Pixels:
        self.count += 1
        return super().decode(encoded, side=side)


async def asked_while_busy(
    predictor: Predictor, decoders: CountingDecoders, left: threading.Event
) -> tuple["asyncio.Task[Any]", list["asyncio.Task[Any]"]]:
    """A pass that lasts until `left`, and twice as many pictures as are begun beside it, when those are decoded."""
    busy = threading.Event()
    await predictor.load("a")
    most = predictor._lane.most_begun
    occupied = asyncio.create_task(predictor._alone(lambda: busy.set() or left.wait(60)))
    await asyncio.to_thread(busy.wait, 60)
    asked = [asyncio.create_task(predicted(predictor, "a", [PICTURES[i % 5]])) for i in range(2 * most)]
    while decoders.count < most:
        await asyncio.sleep(0.01)
    return occupied, asked


def test_time_in_which_a_picture_is_not_begun_counts_as_waiting(with_predictor: Callable[..., None]) -> None:
    decoders = CountingDecoders.trusting(LIMITS)
    left = threading.Event()

    async def story(predictor: Predictor) -> None:
        occupied, asked = await asked_while_busy(predictor, decoders, left)
        most = predictor._lane.most_begun
        await asyncio.sleep(1.0)
        left.set()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(answer) for answer in answers[most:]] == [Overloaded] * most
        assert decoders.count == most
        assert predictor._lane._begun == 0
        await occupied
        (outcome,) = await predicted(predictor, "a", PICTURES[:1])
        assert isinstance(outcome, Scores)

    with_predictor(story, decoders=decoders, max_pending=1000, timeout_seconds=1.0)


def test_no_more_is_decoded_than_passes_come_to_soon(with_predictor: Callable[..., None]) -> None:
    decoders = CountingDecoders.trusting(LIMITS)
    left = threading.Event()

    async def story(predictor: Predictor) -> None:
        occupied, asked = await asked_while_busy(predictor, decoders, left)
        most = predictor._lane.most_begun
        # Whoever leaves makes room for the next one, and what is left before it began costs nothing.
        asked[0].cancel()
        asked[-1].cancel()
        while decoders.count < most + 1:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        assert decoders.count == most + 1
        left.set()
        await occupied
        answers = await asyncio.gather(*asked[1:-1])
        assert all(isinstance(outcome, Scores) for (outcome,) in answers)
        assert decoders.count == 2 * most - 1
        assert predictor._lane._begun == 0

    with_predictor(story, decoders=decoders, max_pending=1000)


def test_pictures_that_wait_for_a_busy_device_keep_none_from_passes_beside_each_other(
    with_predictor: Callable[..., None],
) -> None:
    left, busy = threading.Event(), threading.Event()

    async def story(predictor: Predictor) -> None:
        await predictor.load("a")
        (await predictor.load("b")).network.torch.passes_at_once = 2
        occupied = asyncio.create_task(predictor._alone(lambda: busy.set() or left.wait(60)))
        await asyncio.to_thread(busy.wait, 60)
        waiting = [asyncio.create_task(predicted(predictor, "a", PICTURES[:1])) for _ in range(200)]
        await asyncio.sleep(0.05)
        (outcome,) = await asyncio.wait_for(predicted(predictor, "b", PICTURES[:1]), 30)
        assert isinstance(outcome, Scores)
        assert not any(task.done() for task in waiting)
        left.set()
        await asyncio.gather(occupied, *waiting)

    with_predictor(story, max_pending=1000)


def test_broken_pictures_make_room_for_those_behind_them(with_predictor: Callable[..., None]) -> None:
    async def story(predictor: Predictor) -> None:
        broken = [predicted(predictor, "a", [BROKEN]) for _ in range(2 * predictor._lane.most_begun)]
        (*refused, (last,)) = await asyncio.gather(*broken, predicted(predictor, "a", PICTURES[:1]))
        assert all(isinstance(outcome, ImageRefused) for (outcome,) in refused)
        assert isinstance(last, Scores)

    with_predictor(story, max_pending=1000)


def test_names_keep_models_longer_than_use_does(with_predictor: Callable[..., None]) -> None:
    async def story(predictor: Predictor) -> None:
        await predictor.load("b")
        await predictor.keep("a", aliased=["b"])
        room = (await predictor.load("b")).network.size_bytes * 5 // 2
        predictor._max_loaded_bytes = room
        await predictor.load("c")
        await predictor.load("d")
        assert [predictor.is_loaded(name) for name in "abcd"] == [True, True, False, True]

    with_predictor(story)


@pytest.fixture
def network(models: Path) -> Network:
    return Network("key", artifact.load(models / "models" / "a").classifier, SMALL, torch.device("cpu"))


def test_batch_that_does_not_fit_into_memory_is_halved(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.randint(0, 255, (5, 3, 32, 32), dtype=torch.uint8)
    whole = network.features(pixels)
    forward, sizes = network.torch._forward, []

    def short_of_memory(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return forward(batch)

    monkeypatch.setattr(network.torch, "_forward", short_of_memory)

    assert torch.allclose(network.features(pixels), whole, atol=1e-5)
    assert sizes == [5, 2, 3, 1, 2]


def test_device_without_memory_for_one_picture_is_overloaded(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(batch: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(network.torch, "_forward", out_of_memory)

    with pytest.raises(Overloaded):
        network.features(torch.zeros(3, 3, 32, 32, dtype=torch.uint8))


def test_how_many_pictures_wait_is_told_until_none_does(with_predictor: Callable[..., list[int]]) -> None:
    told: list[int] = []

    async def story(predictor: Predictor) -> None:
        await predicted(predictor, "a", PICTURES[:3])

    with_predictor(story, on_pending=told.append)

    assert (told[0], told[-1]) == (3, 0)
    assert set(told[1:-1]) == {3}  # each batch says it anew


def test_other_pictures_are_answered_between_those_that_are_adapted(with_predictor: Callable[..., list[int]]) -> None:
    ended: list[str] = []

    async def story(predictor: Predictor) -> None:
        own = [scores for scores in await predicted(predictor, "a", PICTURES) if isinstance(scores, Scores)]

        async def adapt() -> None:
            found = await predictor.adapt(await predictor.load("a"), PICTURES, own, Plan.of("entropy", steps=5))
            assert len(found) == len(PICTURES)
            ended.append("adapted")

        async def predict() -> None:
            await predicted(predictor, "b", PICTURES[:1])
            ended.append("predicted")

        await asyncio.gather(adapt(), predict())

    with_predictor(story)

    assert ended == ["predicted", "adapted"]


def test_adaptation_that_waits_too_long_for_its_turn_is_refused(with_predictor: Callable[..., list[int]]) -> None:
    async def story(predictor: Predictor) -> None:
        own = [scores for scores in await predicted(predictor, "a", PICTURES) if isinstance(scores, Scores)]
        async with predictor._one_by_one():  # somebody else's turn, which does not end
            with pytest.raises(Overloaded, match="waited too long"):
                await predictor.adapt(await predictor.load("a"), PICTURES[:1], own[:1], Plan.of("entropy"))
        assert len(await predictor.adapt(await predictor.load("a"), PICTURES[:1], own[:1], Plan.of("entropy"))) == 1

    with_predictor(story, timeout_seconds=5.0)
