"""Another engine is built, compared with torch, and taken only where it is faster and says the same."""

import asyncio
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import builders
import pytest
import torch
from pydantic import TypeAdapter

from app.serving import engine_builder, engines, predictor
from app.serving.engine_builder import Report, Trial
from app.serving.engines import Threads, TorchEngine
from app.serving.predictor import Predictor
from app.serving.scores import Scores
from app.storage import LocalStorage
from app.vision import artifact
from app.vision.artifact import Artifact
from app.vision.classifier import Classifier
from app.vision.images import ImageLimits
from app.vision.preprocessing import Preprocessing

LIMITS = ImageLimits(
    max_bytes=10**7, max_pixels=10**7, max_side=10_000, max_aspect=100.0, max_jpeg_scans=100
)  # fmt: skip
SMALL = Preprocessing(
    resize=72, crop=64, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bilinear"
)
GOOD = Trial("onnxruntime", max_score_difference=1e-6, same_top=True, speedup=2.0, threads=Threads(1, 1))


def save(folder: Path, *, feature_layer: str | None = None) -> Artifact:
    """A network whose batch-norm statistics have moved: else its features are all but nothing."""
    classifier = Classifier.new("mobilenet_v3_small", 3, seed=0, feature_layer=feature_layer).train()
    for module in classifier.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.5
    with torch.no_grad():
        for _ in range(10):
            classifier(torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    classifier.eval()
    model = Artifact(classifier, ["x", "y", "z"], SMALL, temperature=0.7)
    artifact.save(folder, model)
    return model


def opened(storage: LocalStorage) -> Predictor:
    return Predictor(
        storage=storage,
        device=torch.device("cpu"),
        limits=LIMITS,
        max_loaded_bytes=10**9,
        max_pending=100,
        timeout_seconds=60,
        engine_policy="auto",
    )


@pytest.mark.slow
@pytest.mark.parametrize("feature_layer", [None, "all"])
def test_built_engines_give_torchs_features_for_batches_of_any_size(tmp_path: Path, feature_layer: str | None) -> None:
    model = save(tmp_path / "model", feature_layer=feature_layer)
    pixels = torch.randint(0, 256, (9, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (tmp_path / "built").mkdir()

    engine_builder.Builder().build(tmp_path / "model", tmp_path / "built", pixels=pixels)

    file = tmp_path / "built" / "engine.onnx"
    assert {path.name for path in (tmp_path / "built").iterdir()} == {"engine.onnx", "engine.json"}
    report = TypeAdapter(Report).validate_json((tmp_path / "built" / "engine.json").read_bytes())
    assert report.images == 9
    assert [trial.engine for trial in report.trials] == engines.names_here()
    ours = TorchEngine(model.classifier.backbone, SMALL, torch.device("cpu"))
    expected = ours.features(pixels.repeat(5, 1, 1, 1)[:40])
    assert expected.std() > 0.01
    for trial in report.trials:
        allowed = engine_builder.HALF_SCORE_TOLERANCE if trial.is_half else engine_builder.SCORE_TOLERANCE
        assert trial.max_score_difference < allowed
        assert trial.same_top or trial.is_half  # of noise, two classes may score all but the same
        # Half precision has three digits, and features that are small are sums of large numbers.
        largest = expected.abs().max().item()
        near = {"atol": 0.06 * largest, "rtol": 0.0} if trial.is_half else {"atol": 1e-3, "rtol": 1e-3}
        for threads in {trial.threads, Threads(1, 1), Threads(1, 2), Threads(2, 1)}:
            theirs = engines.open_engine(trial.engine, file, threads)
            assert theirs.name == trial.engine
            with ThreadPoolExecutor(theirs.passes_at_once) as pool:
                for count in (1, 3, 9, 40):
                    some = pixels.repeat(5, 1, 1, 1)[:count]
                    torch.testing.assert_close(engines.in_parts(theirs, some, pool), expected[:count], **near)
            asked = [(first, 1 + first % 5) for first in range(9)] * 10
            with ThreadPoolExecutor(8) as pool:
                answers = pool.map(theirs.features, [pixels.repeat(2, 1, 1, 1)[i : i + count] for i, count in asked])
                for (first, count), answer in zip(asked, answers, strict=True):
                    torch.testing.assert_close(answer, expected[first : first + count], **near)


@pytest.mark.parametrize(
    "trial",
    [
        replace(GOOD, same_top=False),
        replace(GOOD, max_score_difference=0.01),
        replace(GOOD, speedup=1.0),
        replace(GOOD, engine="openvino-bf16", max_score_difference=0.03),
    ],
    ids=["other answer", "other scores", "no faster", "other scores in half precision"],
)
def test_engine_that_is_not_worth_it_is_not_taken(tmp_path: Path, trial: Trial) -> None:
    assert GOOD.is_worth_it
    report = Report(images=9, trials=(trial,))
    (tmp_path / "engine.json").write_text(json.dumps(asdict(report)))
    assert engine_builder.open_built(tmp_path) == (None, report)


def test_the_fastest_is_chosen_of_those_that_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = replace(GOOD, engine="openvino", speedup=3.0)
    half = replace(GOOD, engine="openvino-bf16", speedup=6.0, max_score_difference=0.01)
    monkeypatch.setattr(engine_builder, "names_here", lambda: ["onnxruntime", "openvino", "openvino-bf16"])
    every = Report(images=9, trials=(GOOD, fast, half))

    assert every.chosen("auto") == half
    assert every.chosen("fp32") == fast
    # As fast within the noise: the one that is nearer to torch.
    assert Report(images=9, trials=(GOOD, fast, replace(half, speedup=3.2))).chosen("auto") == fast
    assert Report(images=9, trials=(GOOD, replace(fast, same_top=False))).chosen("auto") == GOOD
    # The folder of another machine, or of before a package was taken away.
    monkeypatch.setattr(engine_builder, "names_here", lambda: ["onnxruntime"])
    assert every.chosen("auto") == GOOD


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        engine_builder.open_built(tmp_path)
    (tmp_path / "engine.onnx").write_bytes(b"no network")
    for name in engines.names_here():
        report = Report(images=9, trials=(replace(GOOD, engine=name),))
        (tmp_path / "engine.json").write_text(json.dumps(asdict(report)))
        with pytest.raises(ValueError, match="cannot be read"):
            engine_builder.open_built(tmp_path)


def test_graft_runs_without_openvino_and_with_it_nothing_reports_to_its_maker() -> None:
    story = """
import sys
from importlib import metadata
from app.serving import engines
if sys.argv[1] == "without":
    def missing(name):
        raise metadata.PackageNotFoundError(name)
    metadata.version = missing
print(engines.names_here())
print([name for name, module in sys.modules.items() if "openvino_telemetry" in name and module is not None])
"""

    def told(how: str) -> list[str]:
        return subprocess.run(
            [sys.executable, "-c", story, how], capture_output=True, text=True, check=True
        ).stdout.splitlines()

    assert told("without") == ["['onnxruntime']", "[]"]
    assert told("with")[1] == "[]"


@pytest.mark.slow
def test_busy_network_changes_its_engine_between_two_requests_and_a_new_start_has_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor, "BUILD_AFTER_PICTURES", 3)
    # Which one is fastest here is not what is tested: ONNX Runtime is everywhere.
    monkeypatch.setattr(engine_builder.Report, "chosen", lambda report, _policy: report.trials[0])
    storage = LocalStorage(tmp_path)
    save(storage.path("models/a"))
    picture = builders.jpeg(1, size=(90, 80))

    async def until_changed(busy: Predictor) -> list[float]:
        (plain,) = await busy.predict("a", [picture])
        assert busy.engine_of("a") == "torch"
        assert isinstance(plain, Scores)
        async with asyncio.timeout(120):
            while busy.engine_of("a") == "torch":
                (outcome,) = await busy.predict("a", [picture])
                assert isinstance(outcome, Scores)
                await asyncio.sleep(0.05)
        (fast,) = await busy.predict("a", [picture])
        assert isinstance(fast, Scores)
        assert fast.values == pytest.approx(plain.values, abs=engine_builder.SCORE_TOLERANCE)
        return list(fast.values)

    async def at_once(fresh: Predictor) -> list[float]:
        await fresh.load("a")
        assert fresh.engine_of("a") == "onnxruntime"
        (outcome,) = await fresh.predict("a", [picture])
        assert isinstance(outcome, Scores)
        return list(outcome.values)

    found = []
    for story in (until_changed, at_once):
        running = opened(storage)
        try:
            found.append(asyncio.run(story(running)))
        finally:
            running.close()
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_build_under_way_is_ended_at_shutdown_and_a_later_one_never_begins(tmp_path: Path) -> None:
    save(tmp_path / "model")
    (tmp_path / "built").mkdir()
    builder = engine_builder.Builder()
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(
            builder.build, tmp_path / "model", tmp_path / "built", pixels=torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
        )
        while builder._process is None:
            assert not building.done()
        builder.stop()
        with pytest.raises(subprocess.CalledProcessError):
            building.result(timeout=30)
    with pytest.raises(subprocess.CalledProcessError):
        builder.build(tmp_path / "model", tmp_path / "built", pixels=torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_engine_that_cannot_be_built_leaves_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "BUILD_AFTER_PICTURES", 1)
    storage = LocalStorage(tmp_path)
    save(storage.path("models/a"))

    async def story(busy: Predictor) -> None:
        await busy.load("a")
        storage.delete("models/a")  # gone before its engine is built
        await busy.predict("a", [builders.jpeg(1)])
        await asyncio.gather(*busy._building.values())
        assert busy.engine_of("a") == "torch"
        assert len(await busy.predict("a", [builders.jpeg(1)])) == 1

    running = opened(storage)
    try:
        asyncio.run(story(running))
    finally:
        running.close()


@pytest.mark.parametrize("feature_layer", [None, "all"])
def test_recorded_passes_give_torchs_features_for_batches_of_any_size(
    cuda: torch.device, tmp_path: Path, feature_layer: str | None
) -> None:
    model = save(tmp_path / "model", feature_layer=feature_layer)
    plain = TorchEngine(model.classifier.backbone, SMALL, cuda)
    recorded = engines.GraphEngine(plain, side=64, device=cuda)
    pixels = torch.randint(0, 256, (70, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = plain.features(pixels)
    assert expected.std() > 0.01
    for count in (1, 2, 3, 4, 7, 8, 15, 32, 33, 70, 1):
        torch.testing.assert_close(recorded.features(pixels[:count]), expected[:count], atol=5e-3, rtol=5e-3)


def test_many_threads_may_ask_recorded_passes_at_once(cuda: torch.device, tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    plain = TorchEngine(model.classifier.backbone, SMALL, cuda)
    recorded = engines.GraphEngine(plain, side=64, device=cuda)
    pixels = torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = plain.features(pixels)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: recorded.features(pixels[i : i + 1 + i % 5]), list(range(60)) * 5))
    for i, features in zip(list(range(60)) * 5, found, strict=True):
        torch.testing.assert_close(features, expected[i : i + 1 + i % 5], atol=5e-3, rtol=5e-3)


def test_a_gpu_answers_as_a_cpu_does_and_loading_another_model_disturbs_nobody(
    cuda: torch.device, tmp_path: Path
) -> None:
    storage = LocalStorage(tmp_path)
    for name in ("mdl_a", "mdl_b"):
        save(storage.path(f"models/{name}"))
    pictures = [builders.jpeg(seed, size=(70 + seed, 66)) for seed in range(40)]

    async def answers(device: torch.device) -> list[list[float]]:
        predictor = Predictor(
            storage=storage,
            device=device,
            limits=LIMITS,
            max_loaded_bytes=10**9,
            max_pending=100,
            timeout_seconds=60,
            engine_policy="auto",
        )
        try:
            first = predictor.predict("mdl_a", pictures)
            second = predictor.predict("mdl_b", pictures)
            found = await asyncio.gather(first, second)
            assert predictor.engine_of("mdl_a") == ("cuda-graphs" if device.type == "cuda" else "torch")
            return [list(outcome.values) for outcomes in found for outcome in outcomes if isinstance(outcome, Scores)]
        finally:
            predictor.close()

    ours, theirs = asyncio.run(answers(cuda)), asyncio.run(answers(torch.device("cpu")))
    assert len(ours) == len(theirs) == 80
    assert max(abs(a - b) for o, t in zip(ours, theirs, strict=True) for a, b in zip(o, t, strict=True)) < 5e-3
