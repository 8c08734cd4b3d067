"""A trained model as one file that runs outside Graft: ONNX, torch.export's pt2, or torchvision's weights.

What goes in is a picture as a decoder gives it, uint8 (N, H, W, 3) in RGB and of any size; preprocessing, calibration
and class names are inside. Each file is run on pictures after it was written and compared with the model itself. Runs
in a process of its own, since exporting takes seconds and keeps memory. Knows a model's folder and numbers; not data
sets, not HTTP.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from app.vision import artifact, backbones
from app.vision.artifact import Artifact
from app.vision.backbones import ALL_LAYERS, BACKBONES
from app.vision.classifier import Classifier
from app.vision.outputs import of_outputs, probabilities
from app.vision.preprocessing import Preprocessing, eval_pixels, normalise

Format = Literal["safetensors", "onnx", "pt2"]
Picture = NDArray[np.uint8]  # (H, W, 3)

# Largest difference of any class's score between the file and the model. Where pictures have the size already, measured
# ones are below 1e-6; where they are resized, ours is computed in 8 bits and the file's in floating point, so that a
# pixel may differ by one of 255 steps, and scores by up to 0.004 (networks of chance with their logits scaled up).
SCORE_TOLERANCE = 0.02
TIMEOUT_SECONDS = 900.0
_METADATA, _PICTURES, _REPORT = "metadata.json", "pictures.npz", "report.json"


@dataclass(frozen=True)
class Report:
    """How the file compares with the model, on `images` pictures.

    max_difference: of any score (of any feature, of a backbone without classes, over the largest). other_top: pictures
    whose best class is another one, which within the tolerance only those are that have two equally good ones.
    """

    images: int
    max_difference: float
    other_top: int

    @property
    def is_right(self) -> bool:
        return self.max_difference <= SCORE_TOLERANCE


class ExportFailed(Exception):
    """Why there is no file: for the log."""


class Exported(nn.Module):
    """The model with everything around it.

    forward: uint8 (N, H, W, 3), RGB → float32 (N, C), calibrated probabilities of all classes, task after task; of a
    backbone without classes its features (N, D). Needs nothing of Graft's once it is traced.
    """

    def __init__(self, model: Artifact) -> None:
        super().__init__()
        self.classifier = model.classifier.eval()
        self._preprocessing, self._outputs = model.preprocessing, model.outputs
        mean, std = (
            torch.tensor(values).view(1, 3, 1, 1) for values in (model.preprocessing.mean, model.preprocessing.std)
        )
        self.scale, self.shift = nn.Buffer(1 / (255 * std)), nn.Buffer(-mean / std)
        self._has_classes = bool(model.classes)

    def forward(self, pictures: Tensor) -> Tensor:
        square = _square(pictures.permute(0, 3, 1, 2).float(), self._preprocessing)
        inputs = torch.addcmul(self.shift, square, self.scale)
        if not self._has_classes:
            return self.classifier.features(inputs)
        return probabilities(self.classifier(inputs), self._outputs)


def _square(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """What `eval_pixels` does, for sizes not known when it is traced. pixels: float32 (N, 3, H, W), 0 to 255."""
    height, width = pixels.shape[2], pixels.shape[3]
    short = torch.sym_min(height, width)
    # While it is traced these are symbols, of which more is asked than their types say.
    size: Any = ((height * preprocessing.resize) // short, (width * preprocessing.resize) // short)
    resized = functional.interpolate(
        pixels, size=size, mode=preprocessing.interpolation, antialias=True, align_corners=False
    )
    top, left = (_half(side - preprocessing.crop) for side in size)
    square = resized.narrow(2, top, preprocessing.crop).narrow(3, left, preprocessing.crop)
    return square.round().clamp(0, 255)  # as 8 bits hold it


def _half(spare: int) -> int:
    """round(spare / 2), a half to the even side as Python rounds it."""
    return spare // 2 + (spare % 2) * (spare // 2 % 2)


def export(
    model_folder: Path, target: Path, *, file_format: Format, metadata: Mapping[str, str], pictures: Sequence[Picture]
) -> Report:
    """Leaves `model.<format>` in the folder `target`, compared with the model on the pictures, at least one.

    metadata: further strings that go into the file. Raises ExportFailed, with nothing left, where the file cannot be
    made or does not say what the model says; OSError.
    """
    (target / _METADATA).write_text(json.dumps(dict(metadata)), "utf-8")
    np.savez(target / _PICTURES, *pictures)
    command = [sys.executable, "-m", "app.vision.export", str(model_folder), str(target), file_format]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_SECONDS)
        report = Report(**json.loads((target / _REPORT).read_bytes()))
    except subprocess.SubprocessError as error:
        said = getattr(error, "stderr", None) or b""
        raise ExportFailed(said.decode(errors="replace")[-1000:]) from error
    finally:
        for name in (_METADATA, _PICTURES, _REPORT):
            (target / name).unlink(missing_ok=True)
    if not report.is_right:
        (target / f"model.{file_format}").unlink()
        raise ExportFailed(f"the file says something else than the model: {report}")
    return report


# In the process of its own


def _export_here(model_folder: Path, target: Path, file_format: str) -> Report:
    model = artifact.load(model_folder)
    metadata = json.loads((target / _METADATA).read_bytes()) | _described(model)
    with np.load(target / _PICTURES) as stored:
        pictures: list[Picture] = [stored[name] for name in stored.files]
    expected = [_expected(model, picture) for picture in pictures]
    path = target / f"model.{file_format}"
    if file_format == "safetensors":
        _write_safetensors(model, path, metadata)
        found = _run_safetensors(model, path, pictures)
    else:
        program = _traced(model)
        if file_format == "onnx":
            _write_onnx(program, path, metadata, has_classes=bool(model.classes))
            found = _run_onnx(path, pictures)
        else:
            torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata)})
            loaded = torch.export.load(path).module()
            found = [loaded(torch.from_numpy(picture)[None])[0] for picture in pictures]
    return _compared(expected, found, model)


def _described(model: Artifact) -> dict[str, str]:
    """What a user of the file has to know, as strings."""
    backbone = BACKBONES[model.classifier.backbone.name]
    return {
        "classes": json.dumps(list(model.classes), ensure_ascii=False),
        "tasks": json.dumps(
            [{"name": o.name, "classes": list(o.classes), "temperature": o.temperature} for o in model.tasks],
            ensure_ascii=False,
        ),
        "temperature": repr(model.temperature),
        "preprocessing": json.dumps(model.preprocessing.to_dict()),
        "architecture": backbone.architecture,
        "feature_layer": model.classifier.feature_layer,
        "weights_license": backbone.license,
    }


def _expected(model: Artifact, picture: Picture) -> Tensor:
    """What /predict says of these pixels."""
    with torch.no_grad():
        inputs = normalise(eval_pixels(picture, model.preprocessing)[None], model.preprocessing)
        if not model.classes:
            return model.classifier.features(inputs)[0]
        return probabilities(model.classifier(inputs), model.outputs)[0]


def _compared(expected: Sequence[Tensor], found: Sequence[Tensor], model: Artifact) -> Report:
    whole, again = torch.stack(list(expected)), torch.stack([row.detach() for row in found])
    scale = 1.0 if model.classes else float(whole.abs().max().clamp(min=1e-6))
    other = torch.zeros(len(whole), dtype=torch.bool)
    if model.classes:
        for ours, theirs in zip(of_outputs(whole, model.outputs), of_outputs(again, model.outputs), strict=True):
            other |= ours.argmax(1) != theirs.argmax(1)
    return Report(len(whole), float((whole - again).abs().max()) / scale, int(other.sum()))


def _traced(model: Artifact) -> torch.export.ExportedProgram:
    side = model.preprocessing.resize
    example = torch.zeros(2, side + 45, side + 151, 3, dtype=torch.uint8)
    any_size = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        return torch.export.export(
            Exported(model).eval(), (example,), dynamic_shapes=({0: any_size, 1: any_size, 2: any_size},)
        )


def _write_onnx(
    program: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, str], *, has_classes: bool
) -> None:
    exported = torch.onnx.export(
        program,
        input_names=["pictures"],
        output_names=["probabilities" if has_classes else "features"],
        dynamo=True,
        verbose=False,
    )
    assert exported is not None
    exported.save(path)
    written = onnx.load(path)
    onnx.helper.set_model_props(written, dict(metadata))
    onnx.save(written, path)


def _run_onnx(path: Path, pictures: Sequence[Picture]) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(session.run(None, {"pictures": picture[None]})[0][0]) for picture in pictures]


def torchvision_names(classifier: Classifier) -> dict[str, str]:
    """Our name of each backbone tensor → torchvision's, which the modules have in its own network."""
    name = classifier.backbone.name
    network = backbones.hollow(name)
    theirs = {id(tensor): key for key, tensor in network.state_dict(keep_vars=True).items()}
    ours = backbones.rewrap(name, network).state_dict(keep_vars=True)
    kept = classifier.backbone.state_dict()
    return {key: theirs[id(ours[key])] for key in kept}


def _write_safetensors(model: Artifact, path: Path, metadata: Mapping[str, str]) -> None:
    """torchvision's own names, so that its network of the architecture loads the file; where the head does not sit on
    the network's end (another feature_layer), it is `head.weight` and `head.bias`, and what is behind the layer lacks.
    """
    classifier, names = model.classifier, torchvision_names(model.classifier)
    tensors = {names[key]: tensor for key, tensor in classifier.backbone.state_dict().items()}
    place = _head_place(classifier)
    weight = classifier.head.weight.detach()
    own = dict(backbones.hollow(classifier.backbone.name).state_dict()).get(f"{place}.weight")
    if own is not None and own.ndim == 4:  # a convolution of one pixel is a linear layer
        weight = weight[:, :, None, None]
    if model.classes:
        tensors |= {f"{place}.weight": weight, f"{place}.bias": classifier.head.bias.detach()}
    contiguous = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    safetensors.torch.save_file(contiguous, path, metadata={**metadata, "format": "pt", "head": place})


def _head_place(classifier: Classifier) -> str:
    spec = BACKBONES[classifier.backbone.name]
    is_at_end = classifier.feature_layer != ALL_LAYERS and classifier.feature_layer == spec.stage_names[-1]
    return spec.head if is_at_end else "head"


def _run_safetensors(model: Artifact, path: Path, pictures: Sequence[Picture]) -> list[Tensor]:
    """Read back by torchvision's names into a network of ours: what the file holds, and not what we hold."""
    tensors = safetensors.torch.load_file(path)
    names, place = torchvision_names(model.classifier), _head_place(model.classifier)
    state: dict[str, Any] = {f"backbone.{ours}": tensors[theirs] for ours, theirs in names.items()}
    head = model.classifier.head
    state |= {
        "head.weight": tensors[f"{place}.weight"].view_as(head.weight) if model.classes else head.weight,
        "head.bias": tensors[f"{place}.bias"] if model.classes else head.bias,
    }
    model.classifier.load_state_dict(state, strict=True)
    return [_expected(model, picture) for picture in pictures]


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    done = _export_here(Path(sys.argv[1]), folder, sys.argv[3])
    (folder / _REPORT).write_text(json.dumps(asdict(done)), "utf-8")
