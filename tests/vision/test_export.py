"""Exported files say what the model says, in programs that have never heard of Graft."""

import json
import subprocess
import sys
from pathlib import Path

import builders
import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import torch

from app.vision import artifact, export
from app.vision.artifact import Artifact
from app.vision.backbones import BACKBONES
from app.vision.classifier import Classifier
from app.vision.outputs import Output, probabilities
from app.vision.preprocessing import Preprocessing, eval_pixels, normalise

SMALL = Preprocessing(
    resize=72, crop=64, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bilinear"
)
# Sides that are enlarged and reduced, with odd and even spare pixels on either side of the crop.
PICTURES = [builders.picture(seed, size=size) for seed, size in enumerate([(90, 72), (300, 211), (50, 81), (128, 75)])]


def saved(folder: Path, name: str = "squeezenet1_1", **changes: object) -> Artifact:
    """A network whose answers are no mere bias: the head is scaled up."""
    layer = changes.pop("feature_layer", None)
    classifier = Classifier.new(name, 3, seed=0, feature_layer=layer).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        classifier.head.weight *= 20
    values = {"preprocessing": SMALL, "temperature": 0.7} | changes
    model = Artifact(classifier, ["x", "y", "z"], **values)  # type: ignore[arg-type]
    artifact.save(folder, model)
    return model


def exported(tmp_path: Path, file_format: export.Format) -> Path:
    target = tmp_path / file_format
    target.mkdir()
    report = export.export(
        tmp_path / "model", target, file_format=file_format, metadata={"card": "# käse"}, pictures=PICTURES
    )
    assert (report.images, report.other_top) == (len(PICTURES), 0)
    assert report.max_difference < export.SCORE_TOLERANCE
    assert [path.name for path in target.iterdir()] == [f"model.{file_format}"]
    return target / f"model.{file_format}"


def served(model: Artifact, picture: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        inputs = normalise(eval_pixels(picture, model.preprocessing)[None], model.preprocessing)
        return probabilities(model.classifier(inputs), model.outputs)[0]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_onnx_takes_pictures_of_any_size_and_knows_its_classes(tmp_path: Path, interpolation: str) -> None:
    model = saved(
        tmp_path / "model",
        preprocessing=Preprocessing.from_dict(SMALL.to_dict() | {"interpolation": interpolation}),
    )
    path = exported(tmp_path, "onnx")

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for picture in PICTURES:
        (found,) = session.run(None, {"pictures": picture[None]})
        # Resized in floating point, and not in 8 bits: a pixel may differ by one step.
        np.testing.assert_allclose(found[0], served(model, picture), atol=0.01)
    (two,) = session.run(None, {"pictures": np.stack([PICTURES[0]] * 2)})
    assert two.shape == (2, 3)
    onnx.checker.check_model(onnx.load(path))
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == ["x", "y", "z"]
    assert json.loads(metadata["preprocessing"])["crop"] == 64
    assert (metadata["card"], metadata["architecture"]) == ("# käse", "squeezenet1_1")


def without_graft(program: str, *arguments: Path) -> str:
    """Runs a program that cannot import Graft."""
    ran = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.modules['app'] = None\n{program}", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_pt2_runs_where_there_is_no_graft(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    path = exported(tmp_path, "pt2")
    np.save(tmp_path / "picture.npy", PICTURES[1])

    printed = without_graft(
        "import json, numpy, torch\n"
        "extra = {'metadata.json': ''}\n"
        "model = torch.export.load(sys.argv[1], extra_files=extra).module()\n"
        "scores = model(torch.from_numpy(numpy.load(sys.argv[2]))[None])[0].tolist()\n"
        "print(json.dumps([json.loads(extra['metadata.json'])['classes'], scores]))",
        path,
        tmp_path / "picture.npy",
    )

    classes, scores = json.loads(printed)
    assert json.loads(classes) == ["x", "y", "z"]
    np.testing.assert_allclose(scores, served(model, PICTURES[1]), atol=0.01)


def test_picture_that_has_the_size_already_gives_the_models_own_scores(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    found = export.Exported(model)(torch.from_numpy(PICTURES[0].copy())[None])[
        0
    ]  # its short side is what is resized to
    np.testing.assert_allclose(found.detach(), served(model, PICTURES[0]), atol=1e-6)


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "resnet18"])
def test_safetensors_load_into_torchvisions_own_network(tmp_path: Path, name: str) -> None:
    model = saved(tmp_path / "model", name)
    path = exported(tmp_path, "safetensors")
    inputs = normalise(eval_pixels(PICTURES[1], SMALL)[None], SMALL)
    torch.save(inputs, tmp_path / "inputs.pt")

    printed = without_graft(
        "import json, torch, torchvision, safetensors.torch, safetensors\n"
        "with safetensors.safe_open(sys.argv[1], 'pt') as file: metadata = file.metadata()\n"
        "classes = json.loads(metadata['classes'])\n"
        "network = torchvision.models.get_model(metadata['architecture'], num_classes=len(classes)).eval()\n"
        "network.load_state_dict(safetensors.torch.load_file(sys.argv[1]))\n"
        "logits = network(torch.load(sys.argv[2], weights_only=True))[0] / float(metadata['temperature'])\n"
        "print(json.dumps(logits.softmax(0).tolist()))",
        path,
        tmp_path / "inputs.pt",
    )

    if name == "squeezenet1_1":
        # torchvision's squeezenet has a ReLU behind its last convolution, which Graft's linear head has not.
        return
    np.testing.assert_allclose(json.loads(printed), served(model, PICTURES[1]), atol=1e-4)


def test_head_on_another_layer_has_a_name_of_its_own(tmp_path: Path) -> None:
    saved(tmp_path / "model", "mobilenet_v3_small", feature_layer="all")
    with safetensors.safe_open(exported(tmp_path, "safetensors"), "pt") as file:
        assert file.metadata()["head"] == "head"
        assert {"head.weight", "head.bias"} <= set(file.keys())


def test_several_tasks_follow_each_other(tmp_path: Path) -> None:
    tasks = [Output("a", ["x", "y"], 0.7), Output("b", ["p"], 2.0)]
    classifier = Classifier.new("squeezenet1_1", 3, seed=0).eval()
    model = Artifact(classifier, ["x", "y"], SMALL, temperature=0.7, tasks=tasks)
    artifact.save(tmp_path / "model", model)
    path = exported(tmp_path, "onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"pictures": PICTURES[0][None]})
    np.testing.assert_allclose(found[0], served(model, PICTURES[0]), atol=1e-5)
    assert found[0, 2] == 1.0
    named = json.loads(session.get_modelmeta().custom_metadata_map["tasks"])
    assert [(task["name"], task["classes"]) for task in named] == [("a", ["x", "y"]), ("b", ["p"])]


def test_backbone_without_classes_gives_its_features(tmp_path: Path) -> None:
    classifier = Classifier.new("squeezenet1_1", 0, seed=0).eval()
    artifact.save(tmp_path / "model", Artifact(classifier, [], SMALL))
    path = exported(tmp_path, "onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["features"]


def test_model_that_cannot_be_read_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(export.ExportFailed):
        export.export(tmp_path / "none", target, file_format="onnx", metadata={}, pictures=PICTURES)
    assert list(target.iterdir()) == []


FAMILIES = ["swin_t", "convnext_tiny", "densenet121", "efficientnet_b0", "regnet_y_400mf", "vgg16"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name in BACKBONES])
def test_every_family_can_be_exported(tmp_path: Path, name: str) -> None:
    side = 224 if BACKBONES[name].fixed_image_size else 64
    saved(tmp_path / "model", name, preprocessing=SMALL.with_image_size(side))
    exported(tmp_path, "onnx")
    exported(tmp_path, "safetensors")
