"""A trained model as files: `weights.safetensors` and `model.json`, and others beside them. Saved by the worker, loaded
by the API.

No pickle: loading runs no code of the file. Nothing is believed unchecked: digest, names, shapes, finiteness. Knows a
folder; not where folders lie, nor who registers them.
"""

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from app.errors import InvalidRequest, JobFailed, ModelUnavailable
from app.storage import file_sha256
from app.vision.backbones import ALL_LAYERS, BACKBONES
from app.vision.classifier import Classifier
from app.vision.outputs import Output
from app.vision.preprocessing import Preprocessing
from app.vision.reference import Images, Novelty, Reference, coded

FORMAT_VERSION = 1
WEIGHTS_FILE = "weights.safetensors"
SUPPORT_FILE = "support.safetensors"
REFERENCE_FILE = "reference.safetensors"
MODEL_FILE = "model.json"


@dataclass(frozen=True)
class Support:
    """What a model of method few_shot needs to be given one more class, and to be measured with it.

    metric: float32 (D, D), as in Prototypes. features: float32 (N, D), what the head sees of the images that the model
    is measured on; labels: int64 (N,). is_shot: bool (N,), whether an image is one of those that its class was made
    of, and so is measured by a prototype without it. images: id and path of each; None for a shot, which is in no
    data set.
    """

    metric: Tensor
    features: Tensor
    labels: Tensor
    is_shot: Tensor
    images: list[tuple[str, str] | None]


@dataclass
class Artifact:
    """All that prediction needs, and how it came about.

    metadata: any JSON, such as method, job and data set ids, metrics and the name of the pretrained weights.
    """

    classifier: Classifier
    classes: list[str]  # in the order of the head's outputs; none for a backbone alone
    preprocessing: Preprocessing
    temperature: float = 1.0  # that logits are divided by before softmax
    tasks: Sequence[Output] = ()  # all of several; the first one's classes and temperature are those above
    support: Support | None = None  # written by `save`; read by `load_support`, since prediction does not need it
    reference: Reference | None = None  # what answers are held against; models of earlier versions have none
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def outputs(self) -> Sequence[Output]:
        """What the head's outputs mean, all of them."""
        return self.tasks or [Output("", self.classes, self.temperature)]


class Saved(NamedTuple):
    """Size and digest of weights.safetensors."""

    size_bytes: int
    sha256: str


class _WeightsRecord(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size_bytes: Annotated[int, Field(ge=1)]


class _SupportRecord(_WeightsRecord):
    images: list[tuple[str, str] | None]


class _ReferenceRecord(_WeightsRecord):
    images: list[tuple[str, str] | None]
    typical_distance: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    limit_distance: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _TaskRecord(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    classes: list[str]
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _ModelFile(BaseModel):
    """model.json. Later versions may add members; what changes their meaning raises format_version."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format_version: Literal[1]
    graft_version: str
    backbone: str
    feature_layer: str
    classes: list[str]  # none for a backbone alone
    preprocessing: dict[str, Any]
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    tasks: list[_TaskRecord] = []
    metadata: dict[str, Any]
    weights: _WeightsRecord
    support: _SupportRecord | None = None
    reference: _ReferenceRecord | None = None


def save(folder: Path, artifact: Artifact) -> Saved:
    """Writes an artifact into `folder`, which is made if need be; syncing and publishing are the storage's part.

    Raises JobFailed (code "diverged") if a weight or the temperature is not finite.
    """
    classifier = artifact.classifier
    named = sum(len(output.classes) for output in artifact.outputs)
    assert classifier.class_count == named, "one class name per output of the head"
    tensors = {name: _as_saved(tensor) for name, tensor in classifier.state_dict().items()}
    temperatures = [output.temperature for output in artifact.outputs]
    if not all(map(_is_finite, tensors.values())) or not all(0 < t < math.inf for t in temperatures):
        raise JobFailed(
            "Training diverged: weights are no longer finite numbers. Choose a smaller learning rate.", code="diverged"
        )
    folder.mkdir(parents=True, exist_ok=True)
    weights_path = folder / WEIGHTS_FILE
    safetensors.torch.save_file(tensors, weights_path, metadata={"format": "pt"})
    saved = Saved(size_bytes=weights_path.stat().st_size, sha256=file_sha256(weights_path))
    record = _ModelFile(
        format_version=FORMAT_VERSION,
        graft_version=importlib.metadata.version("graft"),
        backbone=classifier.backbone.name,
        feature_layer=classifier.feature_layer,
        classes=artifact.classes,
        preprocessing=artifact.preprocessing.to_dict(),
        temperature=artifact.temperature,
        tasks=[_TaskRecord(**asdict(output)) for output in artifact.tasks],
        metadata=artifact.metadata,
        weights=_WeightsRecord(sha256=saved.sha256, size_bytes=saved.size_bytes),
        support=None if artifact.support is None else _save_support(folder / SUPPORT_FILE, artifact.support),
        reference=None if artifact.reference is None else _save_reference(folder / REFERENCE_FILE, artifact.reference),
    )
    (folder / MODEL_FILE).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return saved


def load(folder: Path) -> Artifact:
    """The artifact in `folder`, on the CPU and in eval mode.

    Raises ModelUnavailable if anything is missing, damaged, or made by a later Graft.
    """
    record = _read_model_file(folder / MODEL_FILE)
    try:
        encoded = (folder / WEIGHTS_FILE).read_bytes()
    except OSError as error:
        raise _damaged("its weights are missing") from error
    if hashlib.sha256(encoded).hexdigest() != record.weights.sha256:
        raise _damaged("its weights differ from what was saved")
    try:
        tensors = safetensors.torch.load(encoded)
        preprocessing = Preprocessing.from_dict(record.preprocessing)
        class_count = sum(len(task.classes) for task in record.tasks) or len(record.classes)
        classifier = Classifier.hollow(
            record.backbone,
            class_count,
            feature_layer=record.feature_layer,
            last_stage=_last_stage(record.backbone, tensors),
        )
        _check_types(classifier, tensors)
        classifier.load_state_dict(tensors, strict=True, assign=True)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, InvalidRequest) as error:
        raise _damaged("its weights and its description do not belong together") from error
    if not all(map(_is_finite, tensors.values())):
        raise _damaged("its weights are not finite numbers")
    return Artifact(
        classifier=classifier.eval(),
        classes=record.classes,
        preprocessing=preprocessing,
        temperature=record.temperature,
        tasks=[Output(task.name, task.classes, task.temperature) for task in record.tasks],
        reference=_load_reference(folder / REFERENCE_FILE, record, feature_width=classifier.head.in_features),
        metadata=record.metadata,
    )


def read_preprocessing(folder: Path) -> Preprocessing:
    """Of the artifact in `folder`, whose weights stay unread. Raises ModelUnavailable."""
    try:
        return Preprocessing.from_dict(_read_model_file(folder / MODEL_FILE).preprocessing)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged("its description is missing or not readable") from error


def load_description(folder: Path) -> dict[str, Any]:
    """model.json of the artifact in `folder`, checked: all but the weights. Raises ModelUnavailable."""
    return _read_model_file(folder / MODEL_FILE).model_dump(mode="json")


def load_support(folder: Path) -> Support | None:
    """What the artifact in `folder` can be extended with; None for one that cannot be. Raises ModelUnavailable."""
    record = _read_model_file(folder / MODEL_FILE).support
    if record is None:
        return None
    tensors = _read_beside(folder / SUPPORT_FILE, record, names=_SUPPORT_TENSORS, what="what it can be extended with")
    return Support(**tensors, images=record.images)


_SUPPORT_TENSORS = ("metric", "features", "labels", "is_shot")


def _save_support(path: Path, support: Support) -> _SupportRecord:
    tensors = {name: getattr(support, name).contiguous() for name in _SUPPORT_TENSORS}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    return _SupportRecord(sha256=file_sha256(path), size_bytes=path.stat().st_size, images=support.images)


def _save_reference(path: Path, reference: Reference) -> _ReferenceRecord:
    tensors = {
        "codes": torch.from_numpy(reference.codes),
        "labels": torch.from_numpy(reference.labels),
        **{f"errors.{task}": torch.from_numpy(errors) for task, errors in enumerate(reference.errors)},
    }
    if reference.lengths is not None:
        tensors["lengths"] = torch.from_numpy(reference.lengths)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    return _ReferenceRecord(
        sha256=file_sha256(path),
        size_bytes=path.stat().st_size,
        images=list(reference.images),
        typical_distance=reference.novelty.typical,
        limit_distance=reference.novelty.limit,
    )


def _load_reference(path: Path, model: _ModelFile, *, feature_width: int) -> Reference | None:
    record, task_count = model.reference, len(model.tasks) or 1
    if record is None:
        return None
    errors = [f"errors.{task}" for task in range(task_count)]
    what = "what its answers are held against"
    # Models of earlier versions have features in half precision.
    tensors = _read_beside(
        path, record, names=["labels", *errors], if_there=["codes", "features", "lengths"], what=what
    )
    count, lengths = len(record.images), tensors.get("lengths")
    shape = (count, feature_width)
    shapes = {"codes": shape, "features": shape, "labels": (count, task_count), "lengths": (count,)}
    if any(tuple(tensors[name].shape) != shape for name, shape in shapes.items() if name in tensors):
        raise _damaged(f"{what} belongs to another model")
    if "codes" not in tensors and "features" not in tensors:
        raise _damaged(f"{what} is missing or damaged")
    codes = tensors["codes"].numpy() if "codes" in tensors else coded(tensors["features"].float().numpy())
    return Reference(
        codes=codes,
        labels=tensors["labels"].numpy(),
        images=Images(record.images),
        novelty=Novelty(record.typical_distance, record.limit_distance),
        errors=[tensors[name].numpy() for name in errors],
        lengths=None if lengths is None else lengths.numpy(),
    )


def _read_beside(
    path: Path, record: _WeightsRecord, *, names: Sequence[str], if_there: Sequence[str] = (), what: str
) -> dict[str, Tensor]:
    """These tensors of a file beside the weights; what: it is, as the refusal of a damaged one calls it."""
    try:
        if file_sha256(path) != record.sha256:
            raise _damaged(f"{what} differs from what was saved")
        # Mapped: what is large stays in the file, which the system takes out of memory where it needs room.
        tensors = safetensors.torch.load_file(path)
        return {name: tensors[name] for name in (*names, *(name for name in if_there if name in tensors))}
    except (OSError, SafetensorError, KeyError) as error:
        raise _damaged(f"{what} is missing or damaged") from error


def _read_model_file(path: Path) -> _ModelFile:
    try:
        content = json.loads(path.read_bytes())
        if isinstance(content, dict) and content.get("format_version") not in (None, FORMAT_VERSION):
            raise ModelUnavailable("This model was made by a later version of Graft; update Graft, or train it again.")
        record = _ModelFile.model_validate(content)
    except (OSError, ValueError, ValidationError) as error:
        raise _damaged("its description is missing or not readable") from error
    layers = (*BACKBONES[record.backbone].stages, ALL_LAYERS) if record.backbone in BACKBONES else ()
    if record.feature_layer not in layers:
        raise _damaged("its backbone is not one that this version of Graft has")
    return record


def _last_stage(backbone: str, tensors: Mapping[str, Tensor]) -> str | None:
    """Of those that the weights are of: a model that reads all layers may have begun from one that was cut."""
    there = {name.split(".")[2] for name in tensors if name.startswith("backbone.stages.")}
    return next((stage for stage in reversed(BACKBONES[backbone].stage_names) if stage in there), None)


def _check_types(classifier: Classifier, tensors: dict[str, Tensor]) -> None:
    # Assigned tensors keep their own type, so a file of another precision would change what the network computes in.
    for name, expected in classifier.state_dict().items():
        if tensors[name].dtype != expected.dtype:
            raise TypeError(f"{name} is {tensors[name].dtype}, not {expected.dtype}")


def _as_saved(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    # Copied, because safetensors refuses tensors that share memory, as tied weights and views do.
    return (tensor.float() if tensor.is_floating_point() else tensor).clone(memory_format=torch.contiguous_format)


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _damaged(what: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"This model cannot be loaded: {what}. Point the alias at another model, or train it again."
    )
