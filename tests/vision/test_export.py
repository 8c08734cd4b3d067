"""An exported file answers as the model does, for every kind of network, where there is no Graft."""

import functools
import hashlib
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import builders
import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from exported_files import ask_without_graft, facts_of
from PIL import Image
from torch import Tensor

from app.errors import ExportUnavailable
from app.settings import Settings
from app.vision import artifact, export, images, torchvision_weights
from app.vision.artifact import Artifact
from app.vision.backbones import ALL_LAYERS, BACKBONES
from app.vision.classifier import Classifier
from app.vision.export import Order, Portable, Verification
from app.vision.images import ImageLimits
from app.vision.outputs import Output, probabilities
from app.vision.preprocessing import Preprocessing, eval_pixels, normalise

CLASSES = ["daisy", "Rose/red", "千日紅"]
TASKS = (Output("kind", CLASSES, 1.5), Output("colour", ["red", "blue"], 0.8))
SMALL = Preprocessing(
    resize=73, crop=64, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bilinear"
)
LIMITS = ImageLimits.from_settings(Settings(_env_file=None))
FORMATS = ("safetensors", "onnx", "pt2")

Files = Callable[[str], tuple[Path, Verification]]

# One network of each family, and what a head may read of it.
FAMILIES = [
    ("resnet18", "layer2"),
    ("mobilenet_v2", ALL_LAYERS),
    ("mobilenet_v3_large", None),
    ("graft_small", ALL_LAYERS),
    ("efficientnet_b0", None),
    ("efficientnet_v2_s", "stage3"),
    ("convnext_tiny", None),
    ("regnet_y_400mf", "block2"),
    ("densenet121", "block1"),
    ("squeezenet1_1", ALL_LAYERS),
    ("shufflenet_v2_x1_0", None),
    ("vgg16", "fc6"),
    ("vit_b_16", "stage2"),
    ("vit_b_16", None),
    ("swin_t", "stage2"),
    ("swin_v2_t", None),
    ("maxvit_t", None),
]
LARGE = ("vgg16", "vit_b_16", "swin_t", "swin_v2_t", "maxvit_t", "densenet121", "convnext_tiny", "efficientnet_v2_s")
# One of each kind of output (maps of either layout, tokens, features; one layer, all layers) in one format, which takes
# minutes; with GRAFT_TEST_EXPORTS=all each family in each format, eight times as many.
USUAL = [
    ("graft_small", ALL_LAYERS, "safetensors"),
    ("resnet18", "layer2", "safetensors"),
    ("mobilenet_v2", ALL_LAYERS, "onnx"),
    ("vit_b_16", None, "onnx"),
    ("densenet121", "block1", "pt2"),
    ("swin_t", "stage2", "pt2"),
]
ALL = [(name, layer, file_format) for name, layer in FAMILIES for file_format in FORMATS]
FAMILIES_AND_FORMATS = ALL if os.environ.get("GRAFT_TEST_EXPORTS") == "all" else USUAL


def model_of(
    name: str = "squeezenet1_1",
    *,
    layer: str | None = None,
    preprocessing: Preprocessing = SMALL,
    outputs: tuple[Output, ...] = (Output("", CLASSES, 1.5),),
) -> Artifact:
    """A random network whose scores differ much from picture to picture. outputs: none for a backbone alone."""
    count = sum(len(output.classes) for output in outputs)
    classifier = Classifier.new(name, count, feature_layer=layer, seed=0).eval()
    if outputs:
        side = preprocessing.crop
        batch = torch.stack([torch.from_numpy(builders.picture(i, size=(side, side)).copy()) for i in range(8)])
        with torch.no_grad():
            logits = classifier(normalise(batch.permute(0, 3, 1, 2), preprocessing))
            scale = 2 / logits.std(0)  # random networks hardly tell pictures apart
            classifier.head.weight.mul_(scale[:, None])
            classifier.head.bias.copy_(-logits.mean(0) * scale)
    return Artifact(
        classifier,
        classes=list(outputs[0].classes) if outputs else [],
        preprocessing=preprocessing,
        temperature=outputs[0].temperature if outputs else 1.0,
        tasks=outputs if len(outputs) > 1 else (),
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The file of `model_of()` in a format, made at its first use, and what was found when it was."""

    @functools.cache
    def made(file_format: str) -> tuple[Path, Verification]:
        return exported(model_of(), file_format, tmp_path_factory.mktemp(file_format))

    return made


def exported(model: Artifact, file_format: Any, folder: Path) -> tuple[Path, Verification]:
    path = folder / f"model.{file_format}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporters warn of their own insides
        return path, export.export(model, file_format, path, pictures=None, facts={"card": "# A card"})


def run_program(order: Order) -> dict[str, Any]:
    """Has the file made as the server does. Returns the report."""
    with subprocess.Popen(
        [sys.executable, "-m", "app.vision.export"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(json.dumps(asdict(order)) + "\n")
        process.stdin.flush()  # and left open, as long as the file is wanted
        said = process.stderr.read()
        assert process.wait() == 0, said
    report: dict[str, Any] = json.loads(Path(order.report).read_text())
    return report


def served(model: Artifact, picture: bytes) -> Tensor:
    """What /predict makes of an encoded picture: (C,), or features (D,)."""
    decoded = images.decode(picture, side=model.preprocessing.side, limits=LIMITS)
    with torch.inference_mode():
        batch = normalise(eval_pixels(decoded, model.preprocessing)[None], model.preprocessing)
        if not model.classes:
            return model.classifier.backbone(batch)[0]
        return probabilities(model.classifier(batch), model.outputs)[0]


@pytest.mark.slow
@pytest.mark.parametrize("file_format", FORMATS)
def test_a_file_answers_as_the_model_where_there_is_no_graft(files: Files, file_format: str) -> None:
    picture = builders.jpeg(3, size=(700, 530), tint=(200, 90, 60))
    path, found = files(file_format)

    answer = ask_without_graft(path, picture)

    expected = dict(zip(CLASSES, served(model_of(), picture).tolist(), strict=True))
    assert answer == pytest.approx(expected, abs=1e-2)
    assert math.fsum(answer.values()) == pytest.approx(1, abs=1e-5)
    assert (found.pictures, found.enlarged, found.same_label) == (12, 4, 12)
    assert found.source == "generated pictures"
    assert found.largest_difference < 1e-2


@pytest.mark.parametrize(
    "file_format", ["safetensors", *(pytest.param(other, marks=pytest.mark.slow) for other in ("onnx", "pt2"))]
)
def test_a_file_says_what_it_is(files: Files, file_format: str) -> None:
    path, found = files(file_format)

    facts = facts_of(path)

    assert json.loads(facts["classes"]) == CLASSES
    assert Preprocessing.from_dict(json.loads(facts["preprocessing"])) == SMALL
    assert json.loads(facts["preprocessing"])["side"] == 256
    assert (facts["temperature"], facts["backbone"], facts["architecture"]) == ("1.5", "squeezenet1_1", "squeezenet1_1")
    assert json.loads(facts["verification"]) == asdict(found)
    assert facts["card"] == "# A card"
    encoded = path.read_bytes()
    assert str(Path(export.__file__).parent).encode() not in encoded, "a path of this machine"
    assert b"site-packages" not in encoded


@pytest.mark.slow
def test_onnx_takes_pictures_of_any_size_several_at_once(files: Files) -> None:
    model = model_of()
    session = onnxruntime.InferenceSession(files("onnx")[0], providers=["CPUExecutionProvider"])

    [taken], [given] = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type, taken.shape) == ("pictures", "tensor(uint8)", ["N", "H", "W", 3])
    assert (given.name, given.type, given.shape) == ("probabilities", "tensor(float)", ["N", 3])
    for size in [(300, 300), (41, 87), (900, 31), (257, 256)]:
        pictures = [builders.picture(seed, size=size) for seed in range(3)]
        [answer] = session.run(None, {"pictures": np.stack(pictures)})
        expected = [served(model, builders.encoded(pixels)) for pixels in pictures]
        assert answer == pytest.approx(torch.stack(expected).numpy(), abs=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("side", [2, 64, 73, 224, 256, 672])
def test_pt2_takes_square_pictures_and_others(files: Files, side: int) -> None:
    """torch.export writes down what it takes for granted of a size, and refuses others."""
    model, network = model_of(), torch.export.load(files("pt2")[0]).module()
    for size in ((side, side), (side, side + 7), (3 * side, side)):
        pixels = builders.picture(side, size=size)

        found = network(torch.from_numpy(pixels.copy())[None])[0]

        assert found.tolist() == pytest.approx(served(model, builders.encoded(pixels)).tolist(), abs=1e-2)


@pytest.mark.slow
def test_several_tasks_are_told_apart(tmp_path: Path) -> None:
    model = model_of(outputs=TASKS)
    picture = builders.jpeg(5)
    expected = served(model, picture).tolist()

    for file_format in ("safetensors", "onnx"):  # pt2 is the same graph
        path, _ = exported(model, file_format, tmp_path)
        answer = ask_without_graft(path, picture)

        assert {name: list(scores) for name, scores in answer.items()} == {t.name: list(t.classes) for t in TASKS}
        assert [*answer["kind"].values(), *answer["colour"].values()] == pytest.approx(expected, abs=1e-2)


@pytest.mark.slow
def test_a_backbone_alone_answers_features(tmp_path: Path) -> None:
    model = model_of(outputs=())
    picture = builders.jpeg(5)
    expected = served(model, picture)

    for file_format in ("safetensors", "onnx"):  # pt2 is the same graph
        path, found = exported(model, file_format, tmp_path)
        answer = ask_without_graft(path, picture)

        assert facts_of(path)["output"] == "features"
        assert found.same_label is None
        assert torch.tensor(answer) == pytest.approx(expected, abs=1e-2 * expected.abs().max().item())


@pytest.mark.slow
def test_the_lines_see_pictures_as_graft_does(files: Files) -> None:
    """Turned, grey, without loss, of 16 bits, see-through in each way that there is."""
    model, (path, _) = model_of(), files("safetensors")
    turned = Image.Exif()
    turned[0x0112] = 6
    upright = Image.fromarray(builders.picture(7, size=(800, 600)))
    wide = Image.fromarray(np.asarray(upright.convert("L")).astype(np.uint16) * 257)
    see_through = Image.fromarray(np.dstack([np.asarray(upright), np.asarray(upright)[..., 0]]), "RGBA")
    for picture in (
        builders.encoded(upright, "JPEG", exif=turned),
        builders.encoded(upright.convert("L"), "JPEG"),
        builders.encoded(upright, "WEBP", lossless=True),
        builders.encoded(wide, "PNG"),
        builders.encoded(see_through, "PNG"),
        builders.encoded(upright.quantize(16), "PNG", transparency=0),
    ):
        answer = ask_without_graft(path, picture)

        assert list(answer.values()) == pytest.approx(served(model, picture).tolist(), abs=1e-2)


def test_validation_images_are_asked_where_there_are_any(tmp_path: Path) -> None:
    artifact.save(tmp_path / "model", model_of())
    np.savez(tmp_path / "pictures.npz", *(builders.picture(seed, size=(48 + seed, 40)) for seed in range(3)))

    report = run_program(order_in(tmp_path, pictures=str(tmp_path / "pictures.npz")))

    found = report["verification"]
    assert (found["source"], found["pictures"], found["enlarged"]) == ("validation images", 6, 3)
    encoded = (tmp_path / "model.safetensors").read_bytes()
    assert report["size_bytes"] == len(encoded)
    assert report["sha256"] == hashlib.sha256(encoded).hexdigest()
    assert facts_of(tmp_path / "model.safetensors")["card"] == "# A card"


@pytest.mark.slow
def test_a_damaged_model_is_reported_as_such(tmp_path: Path) -> None:
    artifact.save(tmp_path / "model", model_of())
    (tmp_path / "model" / artifact.WEIGHTS_FILE).write_bytes(b"nothing")

    report = run_program(order_in(tmp_path))

    assert report["code"] == "model-unavailable"
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
def test_a_file_that_answers_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = safetensors.torch.load_file
    monkeypatch.setattr(safetensors.torch, "load_file", lambda path: {name: -t for name, t in read(path).items()})

    with pytest.raises(ExportUnavailable, match="differ from Graft's by up to"):
        exported(model_of(), "safetensors", tmp_path)


def order_in(folder: Path, **changes: Any) -> Order:
    values: dict[str, Any] = {
        "model_folder": str(folder / "model"),
        "file_format": "safetensors",
        "target": str(folder / "model.safetensors"),
        "report": str(folder / "report.json"),
        "pictures": None,
        "facts": {"card": "# A card"},
    }
    return Order(**{**values, **changes})


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(640, 480), (300, 513), (90, 77), (256, 256), (1000, 1500)])
def test_resizing_in_floating_point_is_within_a_level_of_the_served_one(mode: Any, size: tuple[int, int]) -> None:
    preprocessing = Preprocessing(resize=96, crop=80, mean=(0, 0, 0), std=(1, 1, 1), interpolation=mode)
    pixels = builders.picture(3, size=size)
    decoded = images.decode(builders.encoded(pixels), side=preprocessing.side, limits=LIMITS)
    expected = eval_pixels(decoded, preprocessing).float() / 255
    portable = Portable(model_of("squeezenet1_1", preprocessing=preprocessing, outputs=()))
    portable.network = torch.nn.Identity()

    found = portable(torch.from_numpy(np.array(pixels))[None])[0]

    # Twice rounded: a level of the reduction can become two after a cubic resize.
    assert ((found - expected).abs() * 255).max().item() <= (2.01 if mode == "bicubic" else 1.01)
    assert ((found - expected).abs() > 1 / 512).float().mean().item() < 0.06


@pytest.mark.parametrize(
    ("name", "layer"),
    [pytest.param(*family, marks=pytest.mark.slow) if family[0] in LARGE else family for family in FAMILIES],
)
def test_torchvisions_network_takes_the_weights(name: str, layer: str | None) -> None:
    spec = BACKBONES[name]
    model = model_of(name, layer=layer, preprocessing=spec.preprocessing)
    side = spec.fixed_image_size or 64
    batch = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))

    network = torchvision_weights.network(model, torchvision_weights.state(model))

    with torch.inference_mode():
        expected = model.classifier(batch)
        assert network(batch) == pytest.approx(expected, abs=1e-5 * expected.abs().max().item())


@pytest.mark.slow
def test_the_lines_read_all_layers_of_a_model_that_was_cut(tmp_path: Path) -> None:
    cut = Classifier.new("squeezenet1_1", 2, feature_layer="stage2", seed=0)
    classifier = Classifier.from_earlier(cut, len(CLASSES), feature_layer=ALL_LAYERS, seed=0).eval()
    model = Artifact(classifier, CLASSES, SMALL)
    picture = builders.jpeg(5)

    path, _ = exported(model, "safetensors", tmp_path)

    assert list(ask_without_graft(path, picture).values()) == pytest.approx(served(model, picture).tolist(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layer", "file_format"), FAMILIES_AND_FORMATS)
def test_every_family_answers_as_the_model_where_there_is_no_graft(
    tmp_path: Path, name: str, layer: str | None, file_format: str
) -> None:
    model = model_of(name, layer=layer, preprocessing=BACKBONES[name].preprocessing)
    picture = builders.jpeg(3, size=(700, 530), tint=(200, 90, 60))

    path, _ = exported(model, file_format, tmp_path)
    answer = ask_without_graft(path, picture)

    assert list(answer.values()) == pytest.approx(served(model, picture).tolist(), abs=1e-2)
