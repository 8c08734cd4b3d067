"""A trained model as one file that runs without Graft: safetensors, ONNX or torch.export's pt2.

Run as a program, for one file: tracing a network holds Python's lock for seconds and leaves hundreds of megabytes
behind, so the server has it done by a process of its own. The order is one line of JSON on standard input, which stays
open as long as the file is wanted; what came of it is written as a report.

No file is handed out before it has answered as Graft does. Knows artifacts, pictures and networks; not where models
lie, nor who asked.
"""

import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, TextIO

import numpy as np
import onnx
import onnxruntime
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from app.errors import ExportUnavailable, GraftError
from app.storage import file_sha256
from app.vision import artifact, images, torchvision_weights, usage
from app.vision.artifact import Artifact
from app.vision.backbones import BACKBONES
from app.vision.images import Pixels
from app.vision.outputs import of_outputs, probabilities
from app.vision.preprocessing import Preprocessing, affine, eval_pixels, normalise
from app.vision.usage import Format

Source = Literal["validation images", "generated pictures"]

# The first with an antialiased Resize is 18; what reads 20 reads all that is used here.
ONNX_OPSET = 20
# A score may differ by this. Resizing in floating point instead of integers moves a pixel in some hundreds by one level
# of 255: that moves scores by up to 0.0012 where ImageNet's networks see photographs, and by up to 0.006 where random
# networks with large logits see generated pictures. Anything forgotten, such as the antialias, moves them by more.
TOLERANCE = 0.02
# So many pictures are also asked for enlarged, since packed ones are too small for the first reduction to do anything.
ENLARGED_PICTURES = 4
ENLARGEMENT = 2.7
GENERATED_SIZES = ((640, 480), (300, 500), (100, 90), (1000, 1500), (257, 255), (64, 64), (224, 224), (480, 640))


@dataclass(frozen=True)
class Verification:
    """What was found when the file and Graft were asked the same pictures. differences: of scores, 0 to 1.

    For a backbone alone: of features, relative to the largest of Graft's; same_label is None.
    """

    pictures: int
    enlarged: int  # how many of them are enlarged copies of others
    source: Source
    same_label: int | None
    largest_difference: float
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class Order:
    """One file to be made. Paths are absolute; `pictures` is a .npz of uint8 (H, W, 3), or None for generated ones.

    facts: what else the file's metadata should say, by name.
    """

    model_folder: str
    file_format: Format
    target: str
    report: str
    pictures: str | None
    facts: Mapping[str, str]

    @classmethod
    def from_line(cls, line: str) -> Self:
        return cls(**json.loads(line))


def export(
    model: Artifact, file_format: Format, target: Path, *, pictures: Sequence[Pixels] | None, facts: Mapping[str, str]
) -> Verification:
    """Writes the file `target`, with metadata, and returns what was found when it was run.

    pictures: uint8 (H, W, 3), of validation images; None where there are none: generated ones are taken.
    Raises ExportUnavailable if the file does not answer as Graft does.
    """
    source: Source = "validation images" if pictures else "generated pictures"
    chosen = pictures or generated_pictures()
    enlarged = _enlarged(chosen)
    asked = [*chosen, *enlarged]
    writer = _WRITERS[file_format](model)
    writer.write(target, {})
    served = torch.cat([_served(model, pixels) for pixels in asked])
    same_label, largest_difference = _compared(model, served, torch.cat(list(writer.answers(target, asked))))
    verification = Verification(len(asked), len(enlarged), source, same_label, largest_difference)
    # Written again with what was found, which changes none of the file's numbers.
    writer.write(target, metadata(model, writer.usage(), verification) | dict(facts))
    return verification


def metadata(model: Artifact, lines: str, verification: Verification) -> dict[str, str]:
    """What a file says of itself, as strings: JSON where they are not plain text."""
    classifier = model.classifier
    spec = BACKBONES[classifier.backbone.name]
    return {
        "graft_export": "1",
        "classes": _json(model.classes),
        "preprocessing": _json(model.preprocessing.to_dict() | {"side": model.preprocessing.side}),
        "temperature": repr(model.temperature),
        "tasks": _json([asdict(output) for output in model.tasks]),
        "output": output_name(model),
        "backbone": spec.name,
        "architecture": spec.architecture,
        "feature_layer": classifier.feature_layer,
        "verification": _json(asdict(verification)),
        "usage": lines,
    }


def output_name(model: Artifact) -> str:
    """What a file answers with: a backbone alone tells no classes apart."""
    return "probabilities" if model.classes else "features"


class Portable(nn.Module):
    """The whole model with its preprocessing inside: pixels of any size in, probabilities (or features) out."""

    scale: Tensor
    shift: Tensor
    span: Tensor

    def __init__(self, model: Artifact) -> None:
        super().__init__()
        preprocessing = model.preprocessing
        assert preprocessing.crop <= preprocessing.resize, "no picture is enlarged by a border"
        self._preprocessing = preprocessing
        self._outputs = model.outputs if model.classes else ()
        self.network: nn.Module = model.classifier if model.classes else model.classifier.backbone
        # As buffers: what is made while a network is traced is no number, and would be kept by affine's cache.
        scale, shift = affine(preprocessing.mean, preprocessing.std, torch.device("cpu"))
        self.register_buffer("scale", scale.clone())
        self.register_buffer("shift", shift.clone())
        self.register_buffer("span", torch.arange(preprocessing.crop))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: uint8 (N, H, W, 3), RGB. Returns float32 (N, C), rows sum to 1; features (N, D) without classes."""
        record = self._preprocessing
        image = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        short = torch.sym_min(image.shape[2], image.shape[3])
        image = _resized(image, torch.sym_min(short, record.side), "bilinear")  # as the decoder does
        image = _resized(image, record.resize, record.interpolation)
        top, left = (_margin(image.shape[axis], record.crop) for axis in (2, 3))
        # Gathered and not sliced: a slice's strides depend on the picture's size, and torch.export would write down for
        # which sizes they are what they were for the example.
        image = image.index_select(2, top + self.span).index_select(3, left + self.span)
        output: Tensor = self.network(torch.addcmul(self.shift, image, self.scale))
        return probabilities(output, self._outputs) if self._outputs else output


def _resized(image: Tensor, short: int | torch.SymInt, mode: str) -> Tensor:
    """The short side made `short`, the long one rounded down, antialiased.

    In floating point, which every device has; rounded after each axis, as the integer kernels of Pillow and torch do.
    image: float32 (N, 3, H, W) with whole values from 0 to 255; returns such.
    """
    height, width = image.shape[2], image.shape[3]
    shorter = torch.sym_min(height, width)
    for size in ((height, width * short // shorter), (height * short // shorter, width * short // shorter)):
        image = functional.interpolate(image, size, mode=mode, antialias=True, align_corners=False)  # type: ignore[arg-type]
        image = image.clamp(0, 255).round()
    return image


def _margin(length: int, crop: int) -> int:
    """round((length - crop) / 2) as torchvision's centre crop has it, halves to even, in whole numbers."""
    half = (length - crop) // 2
    return half + ((length - crop) % 2) * (half % 2)


class _Traced:
    """Formats that hold a graph: the model is traced once, with the number and the size of pictures left open."""

    def __init__(self, model: Artifact) -> None:
        self._outputs = model.outputs
        self._answers = output_name(model)
        example = torch.zeros(2, 300, 400, 3, dtype=torch.uint8)
        names = [torch.export.Dim(name, min=1) for name in ("N", "H", "W")]
        self._program = torch.export.export(
            Portable(model).eval().requires_grad_(False), (example,), dynamic_shapes=(dict(enumerate(names)),)
        )
        for node in self._program.graph.nodes:
            node.meta.pop("stack_trace", None)  # has paths of this machine


class _Onnx(_Traced):
    def __init__(self, model: Artifact) -> None:
        super().__init__(model)
        made = torch.onnx.export(
            self._program,
            dynamo=True,
            opset_version=ONNX_OPSET,
            input_names=["pictures"],
            output_names=[self._answers],
            verbose=False,
        )
        assert made is not None
        self._proto = made.model_proto
        _tidy(self._proto.graph)

    def write(self, target: Path, facts: Mapping[str, str]) -> None:
        onnx.helper.set_model_props(self._proto, dict(facts))
        target.write_bytes(self._proto.SerializeToString())

    def answers(self, target: Path, pictures: Sequence[Pixels]) -> Iterator[Tensor]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(target, options, providers=["CPUExecutionProvider"])
        for pixels in pictures:
            [answer] = session.run(None, {"pictures": pixels[None]})
            yield torch.from_numpy(answer)

    def usage(self) -> str:
        return usage.of_graph("onnx", self._outputs)


def _tidy(graph: onnx.GraphProto) -> None:
    """Resizes as Pillow and torch do, which the exporter does not say, and without the exporter's notes of its work."""
    for node in graph.node:
        del node.metadata_props[:]  # has paths of this machine
        if node.op_type == "Resize":
            kept = [a for a in node.attribute if a.name not in ("exclude_outside", "cubic_coeff_a")]
            del node.attribute[:]
            node.attribute.extend(
                [
                    *kept,
                    onnx.helper.make_attribute("exclude_outside", 1),
                    onnx.helper.make_attribute("cubic_coeff_a", -0.5),
                ]
            )
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        for dimension, name in zip(value.type.tensor_type.shape.dim, ("N", "H", "W"), strict=False):
            if dimension.dim_param:
                dimension.dim_param = name


class _Pt2(_Traced):
    def write(self, target: Path, facts: Mapping[str, str]) -> None:
        torch.export.save(self._program, target, extra_files={"metadata.json": _json(dict(facts))})

    def answers(self, target: Path, pictures: Sequence[Pixels]) -> Iterator[Tensor]:
        module = torch.export.load(target).module()
        with torch.inference_mode():
            for pixels in pictures:
                yield module(torch.from_numpy(np.array(pixels))[None])

    def usage(self) -> str:
        return usage.of_graph("pt2", self._outputs)


class _Safetensors:
    """The weights alone, under torchvision's names; the file says in words what a graph would hold."""

    def __init__(self, model: Artifact) -> None:
        self._model = model
        self._tensors = torchvision_weights.state(model)

    def write(self, target: Path, facts: Mapping[str, str]) -> None:
        safetensors.torch.save_file(self._tensors, target, metadata={"format": "pt", **facts})

    def answers(self, target: Path, pictures: Sequence[Pixels]) -> Iterator[Tensor]:
        model = self._model
        network = torchvision_weights.network(model, safetensors.torch.load_file(target))
        with torch.inference_mode():
            for pixels in pictures:
                output = network(_served_input(pixels, model.preprocessing))
                yield probabilities(output, model.outputs) if model.classes else output

    def usage(self) -> str:
        return torchvision_weights.lines(self._model)


_WRITERS: dict[str, Callable[[Artifact], _Onnx | _Pt2 | _Safetensors]] = {
    "onnx": _Onnx,
    "pt2": _Pt2,
    "safetensors": _Safetensors,
}


def _served_input(pixels: Pixels, preprocessing: Preprocessing) -> Tensor:
    """What the network is fed when these pixels come to /predict as a picture: float32 (1, 3, S, S)."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG", compress_level=1)
    decoded = images.decode(encoded.getvalue(), side=preprocessing.side, limits=images.NO_LIMITS)
    return normalise(eval_pixels(decoded, preprocessing)[None], preprocessing)


def _served(model: Artifact, pixels: Pixels) -> Tensor:
    """What Graft itself answers for these pixels."""
    with torch.inference_mode():
        prepared = _served_input(pixels, model.preprocessing)
        if not model.classes:
            features: Tensor = model.classifier.backbone(prepared)
            return features
        return probabilities(model.classifier(prepared), model.outputs)


def _compared(model: Artifact, served: Tensor, found: Tensor) -> tuple[int | None, float]:
    """Of how many pictures the label is the same (None without classes), and the largest difference.

    A label may change only where the two best scores are within twice the tolerance of each other.
    Raises ExportUnavailable.
    """
    unit = 1.0 if model.classes else served.abs().max().item()
    difference = (found - served).abs().max().item() / unit
    if not difference <= TOLERANCE:
        raise ExportUnavailable(
            f"The file was made, but its answers to {len(served)} pictures differ from Graft's by up to "
            f"{difference:.2g}, so it is not handed out. Try another format."
        )
    if not model.classes:
        return None, difference
    parts = zip(of_outputs(served, model.outputs), of_outputs(found, model.outputs), strict=True)
    are_same = torch.stack([ours.argmax(1) == theirs.argmax(1) for ours, theirs in parts]).all(0)
    return int(are_same.sum()), difference


def _enlarged(pictures: Sequence[Pixels]) -> list[Pixels]:
    """The first few pictures, larger than what the decoder reduces to."""
    enlarged = []
    for pixels in pictures[:ENLARGED_PICTURES]:
        height, width, _ = pixels.shape
        size = (round(width * ENLARGEMENT), round(height * ENLARGEMENT))
        enlarged.append(np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)))
    return enlarged


def generated_pictures() -> list[Pixels]:
    """Soft blotches with some grain, the same each time: for a model whose data set is gone."""
    generator = np.random.default_rng(0)
    pictures = []
    for width, height in GENERATED_SIZES:
        coarse = Image.fromarray(generator.integers(0, 256, (7, 7, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int64)
        grain = generator.integers(-12, 13, (height, width, 3))
        pictures.append(np.clip(smooth + grain, 0, 255).astype(np.uint8))
    return pictures


def main() -> int:
    """Makes the file of one order. Returns the exit status; a refusal is 0, with a report that says so."""
    order = Order.from_line(sys.stdin.readline())
    threading.Thread(target=_end_with_server, args=(sys.stdin,), daemon=True).start()
    torch.set_num_threads(1)  # predictions go on beside it
    Path(order.report).write_text(_json(_report(order, Path(order.target))), encoding="utf-8")
    return 0


def _report(order: Order, target: Path) -> dict[str, Any]:
    try:
        model = artifact.load(Path(order.model_folder))
        found = export(model, order.file_format, target, pictures=_stored_pictures(order.pictures), facts=order.facts)
    except GraftError as error:
        return {"code": error.code, "detail": error.detail}
    return {"sha256": file_sha256(target), "size_bytes": target.stat().st_size, "verification": asdict(found)}


def _stored_pictures(path: str | None) -> list[Pixels] | None:
    if path is None:
        return None
    with np.load(path, allow_pickle=False) as stored:
        return [stored[name] for name in stored.files]


def _end_with_server(standard_input: TextIO) -> NoReturn:
    standard_input.read()
    os._exit(1)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
