"""What kinds of files a model is exported as, and the lines of Python that ask each about a picture, without Graft.

Text alone; each file carries its own lines. The tests run them where there is no Graft, beside /predict.
"""

from collections.abc import Sequence
from string import Template
from typing import Literal

from app.vision.outputs import Output

Format = Literal["safetensors", "onnx", "pt2"]

# Where space lies in a stage's output: what Backbone.pool and Backbone.summary average over.
_SPACE = {"NCHW": "(2, 3)", "NHWC": "(1, 2)", "tokens": "1"}

_OPEN = """\
with Image.open("picture.jpg") as image:
    image.draft(None, (side, side))  # a large JPEG is reduced while it is decoded, as Graft does
    image = ImageOps.exif_transpose(image)
if image.mode.startswith("I"):  # 16 bits
    image = image.point(lambda level: level / 257 + 0.5).convert("L")
if image.has_transparency_data:
    shown = Image.new("RGB", image.size, "white")
    shown.paste(image.convert("RGBA"), mask=image.convert("RGBA"))
    image = shown
image = image.convert("RGB")
"""

_ONNX = Template("""\
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("model.onnx")
facts = session.get_modelmeta().custom_metadata_map
side = json.loads(facts["preprocessing"])["side"]
${open}\
[[answer]] = session.run(None, {"pictures": np.array(image)[None]})
${show}""")

_PT2 = Template("""\
import json

import numpy as np
import torch
from PIL import Image, ImageOps

files = {"metadata.json": ""}
network = torch.export.load("model.pt2", extra_files=files).module()
facts = json.loads(files["metadata.json"])
side = json.loads(facts["preprocessing"])["side"]
${open}\
with torch.inference_mode():
    [answer] = network(torch.from_numpy(np.array(image))[None])
${show}""")

_SAFETENSORS = Template("""\
import json

import torch
import torchvision
from PIL import Image, ImageOps
from safetensors import safe_open
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import v2

with safe_open("model.safetensors", framework="pt") as file:
    facts = file.metadata()
    tensors = {name: file.get_tensor(name) for name in file.keys()}
${network}\
network.eval()

sizes = json.loads(facts["preprocessing"])
side = sizes["side"]
prepare = v2.Compose(
    [
        v2.PILToTensor(),
        v2.Resize(sizes["resize"], interpolation=v2.InterpolationMode(sizes["interpolation"])),
        v2.CenterCrop(sizes["crop"]),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(sizes["mean"], sizes["std"]),
    ]
)
${open}\
if min(image.size) > side:
    image = v2.functional.resize(image, [side])
with torch.inference_mode():
    output = network(prepare(image)[None])
${answer}\
${show}""")

_SUMMARY = Template("""\


def summary(activations):
    if activations.ndim == 2:
        return activations
${patches}\
    deviations = activations.var(${space}, correction=0).add(1e-8).sqrt()
    return torch.cat([activations.mean(${space}), deviations], 1)


""")

_FEATURES = "print(json.dumps(answer.tolist()))\n"
_ONE_TASK = 'print(json.dumps(dict(zip(json.loads(facts["classes"]), answer.tolist()))))\n'
_TASKS = """\
scores = iter(answer.tolist())
print(json.dumps({task["name"]: dict(zip(task["classes"], scores)) for task in json.loads(facts["tasks"])}))
"""


def of_graph(file_format: str, outputs: Sequence[Output]) -> str:
    """For "onnx" and "pt2", whose files hold the preprocessing too."""
    return {"onnx": _ONNX, "pt2": _PT2}[file_format].substitute(open=_OPEN, show=_show(outputs))


def of_weights(outputs: Sequence[Output], *, network: str, output: str = "output") -> str:
    """For weights under torchvision's names. network: lines that make a network of them.

    output: the expression that makes logits, or features, of what that network gives.
    """
    answer = f"[answer] = {output}\n"
    if len(outputs) > 1:
        answer = f"""\
tasks = json.loads(facts["tasks"])
parts = torch.split({output}, [len(task["classes"]) for task in tasks], 1)
[answer] = torch.cat([torch.softmax(part / task["temperature"], 1) for part, task in zip(parts, tasks)], 1)
"""
    elif _has_classes(outputs):
        answer = f'[answer] = torch.softmax({output} / float(facts["temperature"]), 1)\n'
    return _SAFETENSORS.substitute(
        network=network,
        open=_OPEN,
        answer=answer,
        show=_show(outputs),
    )


def pooled(layout: str, expression: str) -> str:
    """What Backbone.pool does to a stage's output that is not pooled yet."""
    patches = "[:, 1:]" if layout == "tokens" else ""
    return f"{expression}{patches}.mean({_SPACE[layout]})"


def summary(layout: str) -> str:
    """A function that does what Backbone.summary does."""
    patches = "    activations = activations[:, 1:]\n" if layout == "tokens" else ""
    return _SUMMARY.substitute(space=_SPACE[layout], patches=patches)


def _show(outputs: Sequence[Output]) -> str:
    if not _has_classes(outputs):
        return _FEATURES
    return _TASKS if len(outputs) > 1 else _ONE_TASK


def _has_classes(outputs: Sequence[Output]) -> bool:
    return any(output.classes for output in outputs)
