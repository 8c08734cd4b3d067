"""Another engine is built, compared with torch, and taken only where it is faster and says the same."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import builders
import onnx
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from app.serving import engine_builder, engines, predictor
from app.serving.engine_builder import Built, Report, Trial
from app.serving.engines import Threads, TorchEngine
from app.serving.predictor import Predictor
from app.serving.scores import Scores
from app.storage import LocalStorage
from app.vision import artifact
from app.vision.artifact import Artifact
from app.vision.classifier import Classifier
from app.vision.decoding import Decoders
from app.vision.images import ImageLimits
from app.vision.outputs import Output
from app.vision.preprocessing import Preprocessing, normalise

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


def noise(count: int) -> Tensor:
    """uint8 (count, 3, 64, 64)."""
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def opened(storage: LocalStorage, **options: Any) -> Predictor:
    return Predictor(
        storage=storage,
        device=torch.device("cpu"),
        decoders=Decoders.trusting(LIMITS),
        max_loaded_bytes=10**9,
        max_pending=100,
        timeout_seconds=60,
        engine_policy="auto",
        **options,
    )


def builds_engines(test: Callable[..., None]) -> Callable[..., None]:
    """Slow, and slower where the machine is busy with other tests: engines are built at low priority."""
    return pytest.mark.slow(pytest.mark.timeout(900)(test))


@builds_engines
def test_built_engines_give_torchs_features_for_batches_of_any_size(tmp_path: Path) -> None:
    model = save(tmp_path / "model", feature_layer="all")  # as the harder of the two ways to read a backbone
    pixels = torch.randint(0, 256, (9, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (tmp_path / "built").mkdir()

    engine_builder.Builder().build(tmp_path / "model", tmp_path / "built", pixels=pixels, are_own=True)

    file = tmp_path / "built" / "engine.onnx"
    assert {path.name for path in (tmp_path / "built").iterdir()} == {"engine.onnx", "engine.json"}
    report = TypeAdapter(Report).validate_json((tmp_path / "built" / "engine.json").read_bytes())
    assert (report.images, report.half_keeps) == (9, {"model": False})  # of nine pictures nobody can say
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
    [replace(GOOD, same_top=False), replace(GOOD, max_score_difference=0.01), replace(GOOD, speedup=1.0)],
    ids=["other answer", "other scores", "no faster"],
)
def test_engine_that_is_not_worth_it_is_not_taken(tmp_path: Path, trial: Trial) -> None:
    assert Report(images=9, trials=(GOOD,), half_keeps={}).exact == GOOD
    report = Report(images=9, trials=(trial,), half_keeps={})
    (tmp_path / "engine.json").write_text(json.dumps(asdict(report)))
    assert engine_builder.open_built(tmp_path) == Built(None, None, report)


def test_the_fastest_is_chosen_of_those_that_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = replace(GOOD, engine="openvino", speedup=3.0)
    half = replace(GOOD, engine="openvino-bf16", speedup=6.0, max_score_difference=0.01)

    def chosen(*trials: Trial) -> tuple[Trial | None, Trial | None]:
        report = Report(images=9, trials=trials, half_keeps={})
        return report.exact, report.half

    monkeypatch.setattr(engine_builder, "is_here", lambda _name: True)
    assert chosen(GOOD, fast, half) == (fast, half)
    assert chosen(GOOD, replace(fast, same_top=False), half) == (GOOD, half)
    assert chosen(replace(GOOD, speedup=1.0), half) == (None, half)
    # As fast within the noise: the one that is nearer to torch.
    assert chosen(GOOD, fast, replace(half, speedup=3.2)) == (fast, None)
    assert (half.is_right, replace(half, max_score_difference=0.03).is_right) == (True, False)
    # The folder of another machine, or of before a package was taken away.
    monkeypatch.setattr(engine_builder, "is_here", lambda name: name == "onnxruntime")
    assert chosen(GOOD, fast, half) == (GOOD, None)


def test_what_an_engine_takes_is_measured_where_it_comes_after_itself() -> None:
    """As under load: the run after another engine's pays for that one's threads and for empty caches."""
    before = None

    def run(name: str) -> None:
        nonlocal before
        time.sleep(0.001 if before == name else 0.05)
        before = name

    seconds = engine_builder._least_seconds([partial(run, "one"), partial(run, "another")])
    assert max(seconds) < 0.05, seconds


@builds_engines
def test_half_precision_answers_for_those_models_alone_that_it_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "openvino-bf16" not in engines.names_here():
        pytest.skip("needs a processor with bf16 instructions, and OpenVINO")
    monkeypatch.setattr(predictor, "BUILD_AFTER_PICTURES", 3)
    # How fast it is here is not what is tested: it counts as faster, and the exact ones as slower than torch.
    monkeypatch.setattr(engine_builder.Report, "exact", None)
    monkeypatch.setattr(
        engine_builder.Report, "half", property(lambda report: next(trial for trial in report.trials if trial.is_half))
    )
    storage, pixels = LocalStorage(tmp_path), noise(16)
    calm = save(storage.path("models/calm"))
    # On the same backbone, at the border between two classes: a rounding error a thousandfold is another score.
    with torch.no_grad():
        features = calm.classifier.backbone(normalise(pixels, SMALL, torch.float32))
        calm.classifier.head.weight.mul_(1000)
        calm.classifier.head.bias.copy_(-(features @ calm.classifier.head.weight.T).mean(0))
    artifact.save(storage.path("models/touchy"), calm)
    picture = builders.jpeg(1, size=(90, 80))

    async def tried(busy: Predictor, name: str) -> None:
        for _ in range(3):
            await busy.predict(await busy.load(name), [picture])
        async with asyncio.timeout(600):
            await asyncio.gather(*busy._building.values())
        await busy.predict(await busy.load(name), [picture])

    async def story(busy: Predictor) -> None:
        await tried(busy, "touchy")
        network = busy._loaded["touchy"].network
        assert (busy.engine_of("touchy"), network.half) == ("torch", None)  # nobody would use it
        await tried(busy, "calm")
        assert (busy.engine_of("calm"), busy.engine_of("touchy")) == ("openvino-bf16", "torch")
        assert network.half_keeps == {"calm": True, "touchy": False}

    async def after_a_new_start(fresh: Predictor) -> None:
        await fresh.load("touchy")
        await fresh.load("calm")
        assert (fresh.engine_of("calm"), fresh.engine_of("touchy")) == ("openvino-bf16", "torch")

    for each in (story, after_a_new_start):
        running = opened(storage, check_pixels=lambda _model_id, _preprocessing: pixels)
        try:
            asyncio.run(each(running))
        finally:
            running.close()


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        engine_builder.open_built(tmp_path)
    (tmp_path / "engine.onnx").write_bytes(b"no network")
    for name in engines.names_here():
        report = Report(images=9, trials=(replace(GOOD, engine=name, speedup=9.0),), half_keeps={"mdl_a": True})
        (tmp_path / "engine.json").write_text(json.dumps(asdict(report)))
        with pytest.raises(ValueError, match="cannot be read"):
            engine_builder.open_built(tmp_path)


NAMES_HERE = """
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


def broken_openvino(folder: Path, what: str) -> str:
    """PYTHONPATH with a package of this name that does something else."""
    (folder / "openvino").mkdir()
    (folder / "openvino" / "__init__.py").write_text(what)
    return os.pathsep.join([str(folder), str(Path(__file__).parents[2])])


@builds_engines
def test_graft_runs_without_openvino_and_with_it_nothing_reports_to_its_maker(tmp_path: Path) -> None:
    def told(how: str, path: str | None = None) -> list[str]:
        environment = dict(os.environ) | ({"PYTHONPATH": path} if path else {})
        command = [sys.executable, "-c", NAMES_HERE, how]
        ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return ran.stdout.splitlines()[-2:]

    assert told("without") == ["['onnxruntime']", "[]"]
    assert told("with")[1] == "[]"
    broken = broken_openvino(tmp_path, "raise ImportError('libsomething.so is missing')")
    assert told("with", broken) == ["['onnxruntime']", "[]"]


@builds_engines
@pytest.mark.skipif(engines.openvino_version() is None, reason="needs OpenVINO")
def test_engine_that_kills_the_build_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "model")
    (tmp_path / "built").mkdir()
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setenv("PYTHONPATH", broken_openvino(tmp_path, crash))

    engine_builder.Builder().build(tmp_path / "model", tmp_path / "built", pixels=noise(3), are_own=True)

    report = TypeAdapter(Report).validate_json((tmp_path / "built" / "engine.json").read_bytes())
    assert [trial.engine for trial in report.trials] == ["onnxruntime"]


ASKED_TO_STOP = """
import faulthandler, os, signal, sys, threading
from pathlib import Path
from app.serving import engines
faulthandler.enable()
faulthandler.dump_traceback_later(60, exit=True)  # where it stands still
assert engines.is_here("openvino")
held = [engines.OpenVinoEngine(Path(sys.argv[1]), engines.Threads(1, 1), bf16=False)]
dropping = threading.Thread(target=held.clear)
dropping.start()
dropping.join()
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append("to stop"))
os.kill(os.getpid(), signal.SIGTERM)
print(*asked)
"""


@builds_engines
@pytest.mark.skipif(engines.openvino_version() is None, reason="needs OpenVINO")
def test_process_whose_engine_another_thread_dropped_still_stops_when_asked_to(tmp_path: Path) -> None:
    shape = [None, 3, 8, 8]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Cast", ["pixels"], ["features"], to=onnx.TensorProto.FLOAT)],
        "network",
        [onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, shape)],
        [onnx.helper.make_tensor_value_info("features", onnx.TensorProto.FLOAT, shape)],
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "network.onnx")

    command = [sys.executable, "-c", ASKED_TO_STOP, str(tmp_path / "network.onnx")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (ran.returncode, ran.stdout.strip()) == (0, "to stop"), ran.stderr


def test_every_task_is_looked_at() -> None:
    outputs = [Output("kind", ["a", "b"], 1.0), Output("colour", ["x", "y"], 1.0)]
    expected = torch.tensor([[0.9, 0.1, 0.4, 0.6]])
    assert engine_builder._same_top(expected, torch.tensor([[0.8, 0.2, 0.3, 0.7]]), outputs)
    assert not engine_builder._same_top(expected, torch.tensor([[0.9, 0.1, 0.6, 0.4]]), outputs)


@builds_engines
def test_busy_network_changes_its_engine_between_two_requests_and_a_new_start_has_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor, "BUILD_AFTER_PICTURES", 3)
    # Which one is fastest here is not what is tested: ONNX Runtime is everywhere.
    monkeypatch.setattr(engine_builder.Report, "exact", property(lambda report: report.trials[0]))
    monkeypatch.setattr(engine_builder.Report, "half", None)
    storage = LocalStorage(tmp_path)
    save(storage.path("models/a"))
    picture = builders.jpeg(1, size=(90, 80))

    async def until_changed(busy: Predictor) -> list[float]:
        (plain,) = await busy.predict(await busy.load("a"), [picture])
        assert busy.engine_of("a") == "torch"
        assert isinstance(plain, Scores)
        async with asyncio.timeout(600):
            while busy.engine_of("a") == "torch":
                (outcome,) = await busy.predict(await busy.load("a"), [picture])
                assert isinstance(outcome, Scores)
                await asyncio.sleep(0.05)
        (fast,) = await busy.predict(await busy.load("a"), [picture])
        assert isinstance(fast, Scores)
        assert fast.values == pytest.approx(plain.values, abs=engine_builder.SCORE_TOLERANCE)
        return list(fast.values)

    async def at_once(fresh: Predictor) -> list[float]:
        await fresh.load("a")
        assert fresh.engine_of("a") == "onnxruntime"
        (outcome,) = await fresh.predict(await fresh.load("a"), [picture])
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
        building = pool.submit(builder.build, tmp_path / "model", tmp_path / "built", pixels=noise(1), are_own=True)
        while builder._process is None:
            assert not building.done()
        builder.stop()
        with pytest.raises(subprocess.CalledProcessError):
            building.result(timeout=30)
    with pytest.raises(subprocess.CalledProcessError):
        builder.build(tmp_path / "model", tmp_path / "built", pixels=noise(1), are_own=True)


@builds_engines
def test_engine_that_cannot_be_built_leaves_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "BUILD_AFTER_PICTURES", 1)
    storage = LocalStorage(tmp_path)
    save(storage.path("models/a"))

    async def story(busy: Predictor) -> None:
        await busy.load("a")
        storage.delete("models/a")  # gone before its engine is built
        await busy.predict(await busy.load("a"), [builders.jpeg(1)])
        await asyncio.gather(*busy._building.values())
        assert busy.engine_of("a") == "torch"
        assert len(await busy.predict(await busy.load("a"), [builders.jpeg(1)])) == 1

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
            decoders=Decoders.trusting(LIMITS),
            max_loaded_bytes=10**9,
            max_pending=100,
            timeout_seconds=60,
            engine_policy="auto",
        )
        try:
            first = predictor.predict(await predictor.load("mdl_a"), pictures)
            second = predictor.predict(await predictor.load("mdl_b"), pictures)
            found = await asyncio.gather(first, second)
            assert predictor.engine_of("mdl_a") == ("cuda-graphs" if device.type == "cuda" else "torch")
            return [list(outcome.values) for outcomes in found for outcome in outcomes if isinstance(outcome, Scores)]
        finally:
            predictor.close()

    ours, theirs = asyncio.run(answers(cuda)), asyncio.run(answers(torch.device("cpu")))
    assert len(ours) == len(theirs) == 80
    assert max(abs(a - b) for o, t in zip(ours, theirs, strict=True) for a, b in zip(o, t, strict=True)) < 5e-3
