"""What a training job is: what a caller may ask for (JobRequest), and every value it resolves to (TrainingSpec).

The two recipes are data here, each number with its reason. Resolving is pure: facts about the data set, the backbones
and the device come in as arguments. Knows no queue, no HTTP, no files.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

import annotated_types
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError

from app.errors import FieldError, InvalidHyperparameter, InvalidRequest, WeightsUnavailable
from app.vision import backbones
from app.vision.backbones import BackboneSpec, Family
from app.vision.preprocessing import Preprocessing

Method = Literal["feature_extraction", "fine_tuning", "full_fine_tuning", "from_scratch", "few_shot", "self_supervised"]
# Their models are made to be started from: GET /v1/backbones lists them.
BACKBONE_METHODS: tuple[Method, ...] = ("from_scratch", "self_supervised")
Recipe = Literal["classic", "modern"]
Promote = Literal["if_better", "always", "never"]
Optimizer = Literal["sgd", "adamw"]
# lbfgs, prototypes: the head is solved for, on features of the frozen backbone; not for a caller to ask for by name.
ResolvedOptimizer = Literal["sgd", "adamw", "lbfgs", "prototypes"]
HeadStart = Literal["random", "probe", "prototypes"]
Scheduler = Literal["step", "cosine", "constant"]
Augmentation = Literal["none", "classic", "strong"]
ClassWeights = Literal["none", "balanced"]

FROZEN_METHODS: tuple[Method, ...] = ("feature_extraction", "few_shot")  # they leave the whole backbone as it is

_ID = r"^[A-Za-z0-9_.\-]{1,100}$"
_NULLABLE = frozenset({"early_stopping_patience"})
MAX_EXCLUDED = 10_000


class Hyperparameters(BaseModel):
    """What a job may override; what is left out comes from the recipe."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    epochs: Annotated[int, Field(ge=1, le=1000)] | SkipJsonSchema[None] = Field(
        None, description="Passes over the training images."
    )
    batch_size: Annotated[int, Field(ge=1, le=4096)] | SkipJsonSchema[None] = Field(
        None, description="Images per optimiser step."
    )
    optimizer: Optimizer | SkipJsonSchema[None] = Field(None, description="How gradients become steps.")
    learning_rate: Annotated[float, Field(gt=0, le=10)] | SkipJsonSchema[None] = Field(
        None, description="Peak learning rate of the head, for one batch of batch_size images."
    )
    backbone_learning_rate: Annotated[float, Field(gt=0, le=10)] | SkipJsonSchema[None] = Field(
        None, description="Peak learning rate of the trained part of the backbone."
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] | SkipJsonSchema[None] = Field(
        None, description="Momentum; for sgd only."
    )
    weight_decay: Annotated[float, Field(ge=0, le=1)] | SkipJsonSchema[None] = Field(
        None, description="Weight decay; coupled in sgd, decoupled in adamw."
    )
    scheduler: Scheduler | SkipJsonSchema[None] = Field(None, description="How the learning rate goes down.")
    step_size: Annotated[int, Field(ge=1, le=1000)] | SkipJsonSchema[None] = Field(
        None, description="Epochs between two decays; for scheduler step only."
    )
    gamma: Annotated[float, Field(gt=0, le=1)] | SkipJsonSchema[None] = Field(
        None, description="Factor of each decay; for scheduler step only."
    )
    warmup_epochs: Annotated[float, Field(ge=0, le=1000)] | SkipJsonSchema[None] = Field(
        None, description="Epochs, fractions too, over which the learning rate rises linearly from 0."
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] | SkipJsonSchema[None] = Field(
        None, description="Share of each target spread over all classes."
    )
    unfreeze: Annotated[int, Field(ge=1, le=100)] | SkipJsonSchema[None] = Field(
        None, description="Trailing stages of the backbone that are trained; for fine_tuning only."
    )
    feature_layer: Annotated[str, Field(min_length=1, max_length=100)] | SkipJsonSchema[None] = Field(
        None, description="Layer whose features the head sees; for feature_extraction only."
    )
    image_size: Annotated[int, Field(ge=32, le=640)] | SkipJsonSchema[None] = Field(
        None, description="Side of the square that the network sees, in pixels."
    )
    augmentation: Augmentation | SkipJsonSchema[None] = Field(None, description="Random changes of training images.")
    augmented_views: Annotated[int, Field(ge=1, le=64)] | SkipJsonSchema[None] = Field(
        None,
        description="How many random views of each training image go through the frozen stages, once each, and are "
        "then used in turn; for feature_extraction and fine_tuning only.",
    )
    mixup: Annotated[float, Field(ge=0, le=8)] | SkipJsonSchema[None] = Field(
        None, description="Alpha of the Beta distribution that images are mixed by; 0 is off."
    )
    cutmix: Annotated[float, Field(ge=0, le=8)] | SkipJsonSchema[None] = Field(
        None,
        description="Alpha of the Beta distribution that boxes of other images are cut in by; 0 is off. With mixup on "
        "too, each batch takes one of the two.",
    )
    ema: bool | Annotated[float, Field(ge=0, lt=1)] | SkipJsonSchema[None] = Field(
        None, description="Decay per step of the moving average of the weights; true is 0.999, false and 0 are off."
    )
    class_weights: ClassWeights | SkipJsonSchema[None] = Field(
        None, description="balanced weighs each class's loss by the inverse of its number of images."
    )
    early_stopping_patience: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="Epochs without a better validation result after which training ends; null is never."
    )

    @field_validator("*", mode="before")
    @classmethod
    def refuse_null(cls, value: object, info: ValidationInfo) -> object:
        if value is None and info.field_name not in _NULLABLE:
            raise PydanticCustomError("null", "null is not a value; leave it out for the recipe's default")
        return value


class JobRequest(BaseModel):
    """The body of POST /v1/jobs."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    dataset: Annotated[str, Field(pattern=_ID)] = Field(description="Id of a ready data set.")
    method: Method | Literal["auto"] = Field("auto", description="What is trained; auto chooses from the data.")
    backbone: Annotated[str, Field(pattern=_ID)] = Field(
        "auto", description="A name from GET /v1/backbones, a model id to start from, or auto."
    )
    # 2^53 - 1 is the largest integer that every JSON reader keeps exactly.
    seed: Annotated[int, Field(ge=0, le=2**53 - 1)] = Field(0, description="Same seed, data and spec, same model.")
    name: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(None, description="A name for people.")
    recipe: Recipe = Field("modern", description="classic is the textbook's training, modern is our best.")
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters, description="Overrides of the recipe.")
    promote: Promote = Field("if_better", description="Whether the model becomes the default one.")
    budget_seconds: Annotated[float, Field(gt=0, le=30 * 24 * 3600)] | None = Field(
        None, description="Training time after which the best epoch so far is kept, in seconds."
    )
    # Ends at the first bad path: thousands of the same complaint help nobody.
    exclude: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=MAX_EXCLUDED, fail_fast=True)
    ] = Field(
        default_factory=list,
        description="Paths of images that are left out of training, validation and test, as the data set's images "
        "list them.",
    )

    @field_validator("exclude")
    @classmethod
    def refuse_repetition(cls, value: list[str]) -> list[str]:
        seen: set[str] = set()
        for place, path in enumerate(value):
            if path in seen:
                raise PydanticCustomError("repeated", "item {place} repeats an earlier one", {"place": place})
            seen.add(path)
        return value

    @field_validator("name")
    @classmethod
    def refuse_control_characters(cls, value: str | None) -> str | None:
        if value is not None and not value.isprintable():
            raise PydanticCustomError("not_printable", "control characters are not allowed")
        return value


def parse_request(body: object) -> JobRequest:
    """The request in a decoded JSON body. Raises InvalidHyperparameter or InvalidRequest that name each bad field."""
    try:
        return JobRequest.model_validate(body)
    except ValidationError as error:
        raise request_refusal(error.errors()) from error


def request_refusal(errors: Sequence[Any]) -> InvalidRequest:
    """The refusal for pydantic's errors on a JobRequest; a leading "body" in their locations is passed over."""
    found: dict[str, str] = {}
    for error in errors:
        location = [str(part) for part in error["loc"]]
        location = location[1:] if location[:1] == ["body"] else location
        if location[:1] == ["hyperparameters"]:
            # Members of unions append their types' names: the field is what the caller wrote.
            location = location[:2]
            fields, unknown = Hyperparameters.model_fields, "no such hyperparameter"
        else:
            # An item of a list keeps its place.
            location = location[: 2 if location[1:] and location[1].isdecimal() else 1]
            fields, unknown = JobRequest.model_fields, "no such field"
        name = location[-1] if location else ""
        if error["type"] == "extra_forbidden":
            detail = f"{unknown}; there are: {', '.join(fields)}"
        elif error["type"] == "missing":
            detail = "is needed"
        elif error["type"] in ("model_type", "model_attributes_type"):
            detail = "must be a JSON object"
        elif name in fields and (allowed := _allowed(fields[name])):
            detail = f"must be {allowed}"
        else:
            detail = str(error["msg"])
        found.setdefault(_pointer(location), detail)
    field_errors = [FieldError(pointer, detail) for pointer, detail in found.items()]
    summary = "; ".join(f"{_shown(e.pointer)}: {e.detail}" for e in field_errors[:3])
    if any(pointer.startswith("#/hyperparameters") for pointer in found):
        return InvalidHyperparameter(summary, errors=field_errors)
    return InvalidRequest(summary, errors=field_errors)


@dataclass(frozen=True)
class ClassFacts:
    name: str
    train: int
    val: int


@dataclass(frozen=True)
class DatasetFacts:
    """What resolving needs to know of a ready data set: images per class and split, or those without a class."""

    classes: tuple[ClassFacts, ...]
    unlabelled: int = 0

    @classmethod
    def from_counts(cls, classes: Sequence[Mapping[str, Any]]) -> Self:
        """classes: rows with name, train and val, as a data set's `classes` has them."""
        return cls(tuple(ClassFacts(row["name"], row["train"], row["val"]) for row in classes))

    @property
    def train(self) -> int:
        return self.unlabelled + sum(c.train for c in self.classes)

    @property
    def val(self) -> int:
        return sum(c.val for c in self.classes)

    def imbalance(self, split: Literal["train", "val"]) -> float:
        """Largest class over smallest, among classes that have images in this split; 1 for a balanced or empty one."""
        counts = [n for n in (getattr(c, split) for c in self.classes) if n > 0]
        return max(counts) / min(counts) if counts else 1.0


@dataclass(frozen=True)
class StartingModel:
    """An earlier model to start from: its id, and its own preprocessing, which its weights are used to."""

    model_id: str
    backbone_name: str
    preprocessing: Preprocessing


class ResolvedHyperparameters(BaseModel):
    """Every hyperparameter with its value; None where it has no meaning for this job, such as momentum under adamw."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int
    batch_size: int
    optimizer: ResolvedOptimizer
    head_start: HeadStart  # probe: the head begins as the logistic regression on the untrained backbone's features
    learning_rate: float
    backbone_learning_rate: float | None
    momentum: float | None
    weight_decay: float
    scheduler: Scheduler
    step_size: int | None
    gamma: float | None
    warmup_epochs: float
    label_smoothing: float
    unfreeze: int | None
    feature_layer: str | None
    image_size: int
    augmentation: Augmentation
    crop_scale: tuple[float, float]  # share of the image's area that a random crop covers
    horizontal_flip: bool
    augmented_views: int | None  # of each training image, through the frozen stages; None: fresh ones in each epoch
    mixup: float
    cutmix: float = 0.0  # jobs of earlier versions have none
    ema: float
    fixed_batch_norm: bool = False  # batch-norms keep the statistics that they were pretrained with
    class_weights: ClassWeights
    early_stopping_patience: int | None

    @property
    def is_solved(self) -> bool:
        """Whether the head is solved for, once and without steps."""
        return self.optimizer in ("lbfgs", "prototypes")


class BackboneRef(BaseModel):
    """The backbone a job starts from; weights is None for from_scratch, model is an earlier model's id."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    weights: str | None
    model: str | None = None


class TrainingSpec(BaseModel):
    """A job with nothing left open: stored with it as JSON, and all that training reads besides the data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    method: Method | Literal["auto"]
    backbone: BackboneRef
    seed: int
    recipe: Recipe
    hyperparameters: ResolvedHyperparameters
    preprocessing: Preprocessing
    promote: Promote
    budget_seconds: float | None
    exclude: list[str] = []  # paths of images that are neither trained on nor measured with
    requested: dict[str, Any]
    reasons: list[str]
    # For auto, which competes: a spec for each method, the simplest first. The values above are the last one's.
    candidates: list["TrainingSpec"] = []


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The textbook's: PyTorch's transfer-learning tutorial, with batch 32.
CLASSIC_PREPROCESSING = Preprocessing(256, 224, IMAGENET_MEAN, IMAGENET_STD, "bilinear")
CLASSIC: dict[str, Any] = {
    "epochs": 25,
    "batch_size": 32,
    "optimizer": "sgd",
    "head_start": "random",
    "learning_rate": 0.001,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "scheduler": "step",
    "step_size": 7,
    "gamma": 0.1,
    "warmup_epochs": 0.0,
    "label_smoothing": 0.0,
    "augmentation": "classic",
    "crop_scale": (0.08, 1.0),
    "horizontal_flip": True,
    "mixup": 0.0,
    "cutmix": 0.0,
    "ema": 0.0,
    "class_weights": "none",
    "early_stopping_patience": None,
}
# Who sets none of these under modern gets a head that is solved for, not stepped towards: it has no use for them.
ITERATIVE = frozenset(Hyperparameters.model_fields) - {"class_weights", "feature_layer", "image_size"}
DEFAULT_MOMENTUM = 0.9
DEFAULT_STEP_SIZE, DEFAULT_GAMMA = 7, 0.1
DEFAULT_EMA = 0.999


@dataclass(frozen=True)
class ModernDefaults:
    """First defaults of the modern recipe for one method and family. Rates are for adamw and a batch of 32."""

    learning_rate: float
    backbone_ratio: float  # backbone learning rate over the head's
    weight_decay: float
    steps: int  # optimiser steps aimed at; epochs follow from the number of images
    min_epochs: int
    max_epochs: int
    crop_scale: tuple[float, float]
    label_smoothing: float = 0.0
    ema: float = 0.0
    fixed_batch_norm: bool = False


# Where the numbers come from. Rates: 1e-3 for a new head and 3e-4 for a convolutional body are what AutoGluon, Geti
# and LightlyTrain ship within a factor of 3; transformers take a tenth of that (1e-4 to 5e-5 with weight decay 0.05).
# Steps by data size and not epochs, 500 for small sets: BiT's rule. Gentle crops: a crop of 8 % of the area is made
# for ImageNet from scratch, and hides the object in a few hundred photos. Scratch needs more steps, higher rates,
# stronger crops and label smoothing, as in torchvision's reference training. A moving average and the pretrained
# batch-norm statistics were measured for both fine-tunings (decision 6).
# From formulas' weights the backbone has further to go: on handwritten digits 0.981 in place of 0.935.
FORMULA_RATE_FACTOR = 4.0
SHORT_EMA = 0.98  # over the last 50 steps, where there are some hundreds
_HEAD = ModernDefaults(2e-3, 1.0, 0.01, 500, 10, 40, (0.5, 1.0))
_CNN_SCRATCH = ModernDefaults(2e-3, 1.0, 0.05, 2000, 20, 100, (0.35, 1.0), label_smoothing=0.1)
_TRANSFORMER_SCRATCH = ModernDefaults(5e-4, 1.0, 0.05, 2000, 20, 100, (0.35, 1.0), label_smoothing=0.1)
MODERN: dict[tuple[Method, Family], ModernDefaults] = {
    ("feature_extraction", "cnn"): _HEAD,
    ("feature_extraction", "transformer"): _HEAD,
    ("fine_tuning", "cnn"): ModernDefaults(
        1e-3, 0.3, 0.01, 500, 8, 40, (0.5, 1.0), ema=SHORT_EMA, fixed_batch_norm=True
    ),
    ("fine_tuning", "transformer"): ModernDefaults(1e-3, 0.1, 0.05, 500, 8, 40, (0.5, 1.0)),
    ("full_fine_tuning", "cnn"): ModernDefaults(
        1e-3, 0.5, 0.02, 600, 8, 40, (0.5, 1.0), ema=SHORT_EMA, fixed_batch_norm=True
    ),
    ("full_fine_tuning", "transformer"): ModernDefaults(1e-3, 0.05, 0.05, 600, 8, 40, (0.5, 1.0)),
    ("from_scratch", "cnn"): _CNN_SCRATCH,
    ("from_scratch", "transformer"): _TRANSFORMER_SCRATCH,
    ("few_shot", "cnn"): _HEAD,
    ("few_shot", "transformer"): _HEAD,
    # Crops as small as contrastive learning's: what two of them share is what the network is to find.
    ("self_supervised", "cnn"): ModernDefaults(1e-3, 0.1, 1e-4, 1500, 10, 200, (0.2, 1.0)),
    ("self_supervised", "transformer"): ModernDefaults(1e-3, 0.1, 0.05, 1500, 10, 200, (0.2, 1.0)),
}
# What two views of one picture have no use for.
OF_LABELS = frozenset(
    {
        "label_smoothing",
        "unfreeze",
        "feature_layer",
        "augmented_views",
        "mixup",
        "cutmix",
        "ema",
        "class_weights",
        "early_stopping_patience",
    }
)
SELF_SUPERVISED: dict[str, Any] = {
    "head_start": "random",
    "augmentation": "strong",
    "augmented_views": None,
    "label_smoothing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "ema": 0.0,
    "class_weights": "none",
    "early_stopping_patience": None,
    "fixed_batch_norm": True,
}
# A logistic regression has no rate, no batches and no epochs; one pass over the images, and its line search's step.
SOLVED: dict[str, Any] = {
    "epochs": 1,
    "optimizer": "lbfgs",
    "learning_rate": 1.0,
    "weight_decay": 0.0,
    "scheduler": "constant",
    "warmup_epochs": 0.0,
    "augmentation": "none",
    "augmented_views": None,
    "early_stopping_patience": None,
}
# Prototypes have not even a strength to choose. With more images a class a logistic regression has more to learn from.
PROTOTYPES = SOLVED | {"optimizer": "prototypes", "head_start": "prototypes", "class_weights": "none"}
MOST_SHOTS = 20
MODERN_AUGMENTED_VIEWS = 4
MODERN_BATCH_SIZE = 32
MODERN_WARMUP_SHARE = 0.1  # of all epochs; 5 to 10 % is common to every recipe read
SGD_RATE_FACTOR = 10.0  # sgd with momentum 0.9 wants about ten times adamw's rate: 0.01 beside 1e-3
SGD_WEIGHT_DECAY = 1e-4

# Below this many training images per class (median) a new head on frozen features is as good as anything, and cannot
# overfit much: 12 to 20 shots is where full fine-tuning overtakes linear probes in the transfer literature.
FEW_IMAGES_PER_CLASS = 20
# Below this many, auto trains the last stages only. Measured with about 120 images per class: on hymenoptera full
# fine-tuning loses 7 points to them (classic, 3 seeds: 0.858 and 0.932), on sign_digits it gains 1, on surface_defects
# nothing (docs/benchmarks.md). Where it overtakes was not measured yet; this is on the safe side.
ENOUGH_IMAGES_PER_CLASS = 500
# About 20 minutes on a CPU that does 50 GFLOP/s in training; beyond it, auto trains the last stages only.
MAX_CPU_TRAINING_GFLOPS = 60_000.0
# What auto trains where nothing pretrained can be had: small enough for the device, and known to train from nothing.
SCRATCH_BACKBONES = {"cpu": "mobilenet_v3_small"}
DEFAULT_SCRATCH_BACKBONE = "resnet18"
# A single character, or a word for a side: mirroring such pictures may change their class.
_SIDED_WORDS = frozenset({"left", "right", "leftward", "rightward", "clockwise", "counterclockwise", "anticlockwise"})


@dataclass(frozen=True)
class _Start:
    """What training starts from. weights: name of those that can be had, None where none can."""

    backbone: BackboneSpec
    weights: str | None
    model: StartingModel | None

    @property
    def is_pretrained(self) -> bool:
        return self.weights is not None or self.model is not None

    @property
    def is_from_formulas(self) -> bool:
        """Whether it starts from the bundled weights, which know edges and outlines but no photograph."""
        return self.model is None and any(w.is_bundled for w in self.backbone.weights if w.name == self.weights)

    @property
    def preprocessing(self) -> Preprocessing:
        """What the weights are used to."""
        if self.model is not None:
            return self.model.preprocessing
        named = {weights.name: weights.preprocessing for weights in self.backbone.weights}
        return named.get(self.weights or "", self.backbone.preprocessing)


def resolve(
    request: JobRequest,
    *,
    dataset: DatasetFacts,
    weights: Mapping[str, str],
    device_type: str,
    starting_model: StartingModel | None = None,
) -> TrainingSpec:
    """Every value of a job, with reasons for what was chosen rather than asked for.

    weights: backbones whose pretrained weights can be had here, each with the name of the weights, such as
    IMAGENET1K_V2. device_type: "cpu", "cuda" or "mps". starting_model: the model that request.backbone names, if it
    names one.
    Raises InvalidRequest, InvalidHyperparameter or WeightsUnavailable, naming the field.
    """
    reasons: list[str] = []
    if dataset.unlabelled and request.method == "auto":
        request = request.model_copy(update={"method": "self_supervised"})
        reasons.append("method self_supervised: the data set has no labels.")
    _check_dataset(dataset, request.method)
    start = _start(request, weights, device_type, starting_model, reasons)
    if methods := _contenders(request, dataset, start, device_type, reasons):
        rivals = [_resolved(_entered(request, m), m, dataset=dataset, start=start, reasons=[]) for m in methods]
        return rivals[-1].model_copy(
            update={
                "method": "auto",
                "requested": request.model_dump(mode="json", exclude_unset=True),
                "reasons": reasons,
                "candidates": rivals,
            }
        )
    method = _method(request, dataset, start, device_type, reasons)
    return _resolved(request, method, dataset=dataset, start=start, reasons=reasons)


def _contenders(
    request: JobRequest, dataset: DatasetFacts, start: _Start, device_type: str, reasons: list[str]
) -> list[Method]:
    """The methods that compete under auto, the simplest first; none where one method is given by what was asked for."""
    asked = request.hyperparameters.model_fields_set
    if request.method != "auto" or request.recipe == "classic" or not start.is_pretrained:
        return []
    if {"feature_layer", "unfreeze", "augmented_views"} & asked:
        return []
    methods: list[Method] = ["feature_extraction", "fine_tuning", "full_fine_tuning"]
    epochs = request.hyperparameters.epochs or _epochs_for_steps(
        MODERN["full_fine_tuning", start.backbone.family], dataset.train, MODERN_BATCH_SIZE
    )
    # A backward pass costs about two forward passes.
    if device_type == "cpu" and 3 * start.backbone.gflops * dataset.train * epochs > MAX_CPU_TRAINING_GFLOPS:
        methods.remove("full_fine_tuning")
        reasons.append(f"all of {start.backbone.name} on {dataset.train} images would take long on a CPU: left out.")
    reasons.append(f"method auto: {', '.join(methods)} compete on the validation images; ties go to the simpler.")
    return methods


def _entered(request: JobRequest, method: Method) -> JobRequest:
    """What was asked for, as far as it has a meaning for this method: the probe is solved for, whatever the epochs."""
    asked = request.hyperparameters
    if method == "feature_extraction":
        values = asked.model_dump(exclude_unset=True, exclude=set(ITERATIVE))
        asked = Hyperparameters.model_validate(values)
    return request.model_copy(update={"method": method, "hyperparameters": asked})


def _resolved(
    request: JobRequest, method: Method, *, dataset: DatasetFacts, start: _Start, reasons: list[str]
) -> TrainingSpec:
    _check_start(method, start)
    _check_combinations(request, method, start.backbone)
    preprocessing = _preprocessing(request, start)
    if request.recipe == "classic":
        values = _classic(request.hyperparameters, method)
    else:
        values = _modern(request.hyperparameters, method, start, dataset, reasons)
    if method == "self_supervised":
        values |= SELF_SUPERVISED | _given(request.hyperparameters)
    if method == "few_shot":
        reasons.append("the head is a prototype for each class: computed at once, without training.")
        values |= PROTOTYPES
        if (most := max(c.train for c in dataset.classes)) > MOST_SHOTS:
            reasons.append(f"up to {most} images a class: feature_extraction makes more of more than {MOST_SHOTS}.")
    hyperparameters = ResolvedHyperparameters.model_validate(values | {"image_size": preprocessing.crop})
    if hyperparameters.warmup_epochs > hyperparameters.epochs:
        raise _bad_hyperparameter("warmup_epochs", f"must be at most epochs, which is {hyperparameters.epochs}")
    return TrainingSpec(
        dataset=request.dataset,
        method=method,
        backbone=BackboneRef(
            name=start.backbone.name,
            weights=None if method == "from_scratch" else start.weights,
            model=start.model.model_id if start.model else None,
        ),
        seed=request.seed,
        recipe=request.recipe,
        hyperparameters=hyperparameters,
        preprocessing=preprocessing,
        promote=request.promote,
        budget_seconds=request.budget_seconds,
        exclude=request.exclude,
        requested=request.model_dump(mode="json", exclude_unset=True),
        reasons=reasons,
    )


def _check_dataset(dataset: DatasetFacts, method: str) -> None:
    if method == "self_supervised":
        return
    if dataset.unlabelled:
        raise InvalidRequest(
            f'The data set has no labels, and {method} learns from them. Train a backbone on it ("method": '
            '"self_supervised"), and then a classifier on a labelled data set that starts from it.',
            errors=[FieldError("#/method", "needs a data set with labels")],
        )
    trainable = sum(c.train > 0 for c in dataset.classes)
    if trainable < 2 or dataset.val == 0:
        lack = "validation images" if trainable >= 2 else "training images in at least two classes"
        raise InvalidRequest(
            f"The data set has no {lack}. Upload it with train and val folders that hold pictures of each class, or "
            "without a split, and Graft makes one.",
            errors=[FieldError("#/dataset", f"has no {lack}")],
        )


def _start(
    request: JobRequest,
    weights: Mapping[str, str],
    device_type: str,
    starting_model: StartingModel | None,
    reasons: list[str],
) -> _Start:
    if starting_model is not None:
        return _Start(backbones.find(starting_model.backbone_name), None, starting_model)
    if request.backbone != "auto":
        backbone = backbones.find(request.backbone)
        return _Start(backbone, weights.get(backbone.name), None)
    needs_weights = request.method not in ("auto", "from_scratch")
    if request.method != "from_scratch" and (weights or needs_weights):
        name, reason = backbones.choose(weights, device_type)
    else:
        name = SCRATCH_BACKBONES.get(device_type, DEFAULT_SCRATCH_BACKBONE)
        reason = f"backbone {name}: it trains from nothing in reasonable time."
    reasons.append(reason)
    return _Start(backbones.BACKBONES[name], weights.get(name), None)


def _check_start(method: Method, start: _Start) -> None:
    if method == "from_scratch" and start.model is not None:
        raise InvalidRequest(
            "method: from_scratch does not start from an earlier model; name a backbone, or choose another method.",
            errors=[FieldError("#/method", "contradicts a backbone that is an earlier model")],
        )
    if method != "from_scratch" and not start.is_pretrained:
        name = start.backbone.name
        raise WeightsUnavailable(
            f"There are no pretrained weights of {name} here, and none can be downloaded. Put them into "
            "GRAFT_WEIGHTS_DIR, allow downloads (GRAFT_ALLOW_DOWNLOADS), choose a backbone that GET /v1/backbones "
            'calls obtainable, or use "method": "from_scratch".',
            errors=[FieldError("#/backbone", f"no weights of {name} can be had")],
        )


def _method(request: JobRequest, dataset: DatasetFacts, start: _Start, device_type: str, reasons: list[str]) -> Method:
    if request.method != "auto":
        return request.method
    asked = request.hyperparameters.model_fields_set
    backbone = start.backbone
    counts = sorted(c.train for c in dataset.classes if c.train > 0)
    median = counts[len(counts) // 2]
    defaults = MODERN["full_fine_tuning", backbone.family]
    epochs = request.hyperparameters.epochs or _epochs_for_steps(defaults, dataset.train, MODERN_BATCH_SIZE)
    # A backward pass costs about two forward passes.
    full_gflops = 3 * backbone.gflops * dataset.train * epochs
    if not start.is_pretrained:
        method: Method = "from_scratch"
        reason = f"no pretrained weights of {backbone.name} can be had here."
    elif "feature_layer" in asked:
        method, reason = "feature_extraction", "feature_layer was given, which is for this method alone."
    elif "unfreeze" in asked:
        method, reason = "fine_tuning", "unfreeze was given, which is for this method alone."
    elif median < FEW_IMAGES_PER_CLASS:
        method = "feature_extraction"
        reason = f"with about {median} training images per class, training the backbone too would mostly overfit."
    elif median < ENOUGH_IMAGES_PER_CLASS:
        method = "fine_tuning"
        reason = f"with about {median} training images per class, adapting the last stage is the safest choice."
    elif device_type == "cpu" and full_gflops > MAX_CPU_TRAINING_GFLOPS:
        method = "fine_tuning"
        reason = (
            f"all of {backbone.name} on {dataset.train} images would take long on a CPU; the last stage adapts most."
        )
    else:
        method = "full_fine_tuning"
        reason = f"about {median} training images per class are enough to adapt every parameter of {backbone.name}."
    reasons.append(f"method {method}: {reason}")
    return method


def _check_combinations(request: JobRequest, method: Method, backbone: BackboneSpec) -> None:
    """Refuses values that could not change anything, or that this backbone cannot do."""
    asked = request.hyperparameters
    given = asked.model_fields_set
    default_optimizer = "sgd" if request.recipe == "classic" else "adamw"
    if "momentum" in given and (asked.optimizer or default_optimizer) != "sgd":
        raise _bad_hyperparameter("momentum", 'is for the optimizer sgd only; add "optimizer": "sgd", or leave it out')
    default_scheduler = "step" if request.recipe == "classic" else "cosine"
    for name in ("step_size", "gamma"):
        if name in given and (asked.scheduler or default_scheduler) != "step":
            raise _bad_hyperparameter(name, 'is for the scheduler step only; add "scheduler": "step", or leave it out')
    if "unfreeze" in given and method != "fine_tuning":
        raise _bad_hyperparameter("unfreeze", f"is for the method fine_tuning only, and this is {method}")
    stages = backbone.stage_names
    if asked.unfreeze is not None and asked.unfreeze > len(stages):
        raise _bad_hyperparameter(
            "unfreeze", f"must be from 1 to {len(stages)}, the stages of {backbone.name}: {', '.join(stages)}"
        )
    if "feature_layer" in given and method not in ("feature_extraction", "few_shot"):
        raise _bad_hyperparameter(
            "feature_layer", f"is for methods that freeze the whole backbone, and this is {method}"
        )
    if asked.feature_layer is not None and asked.feature_layer not in stages:
        raise _bad_hyperparameter("feature_layer", f"must be one of {backbone.name}'s layers: {', '.join(stages)}")
    if "augmented_views" in given and method not in ("feature_extraction", "fine_tuning"):
        raise _bad_hyperparameter("augmented_views", f"is for methods that freeze stages, and this is {method}")
    if method == "self_supervised" and (useless := sorted(OF_LABELS & given)):
        raise _bad_hyperparameter(useless[0], "has no meaning for self_supervised, which has no labels and no head")
    if method == "few_shot" and (useless := sorted((ITERATIVE | {"class_weights"}) & given)):
        raise _bad_hyperparameter(useless[0], "has no meaning for few_shot, which computes its head and trains nothing")
    if "backbone_learning_rate" in given and method == "feature_extraction":
        raise _bad_hyperparameter(
            "backbone_learning_rate", "has no meaning for feature_extraction, whose backbone is frozen"
        )


def _preprocessing(request: JobRequest, start: _Start) -> Preprocessing:
    """The weights' own preprocessing, or under classic the textbook's; image_size keeps the ratio of resize to crop."""
    backbone, size = start.backbone, request.hyperparameters.image_size
    fits_classic = backbone.fixed_image_size in (None, CLASSIC_PREPROCESSING.crop)
    is_classic = request.recipe == "classic" and start.model is None and fits_classic
    base = CLASSIC_PREPROCESSING if is_classic else start.preprocessing
    if size is None:
        return base
    if backbone.fixed_image_size is not None and size != backbone.fixed_image_size:
        raise _bad_hyperparameter("image_size", f"must be {backbone.fixed_image_size} for {backbone.name}")
    if size < backbone.min_image_size:
        raise _bad_hyperparameter("image_size", f"must be at least {backbone.min_image_size} for {backbone.name}")
    return base.with_image_size(size)


def _classic(asked: Hyperparameters, method: Method) -> dict[str, Any]:
    values = CLASSIC | _given(asked)
    if values["optimizer"] != "sgd":
        values["momentum"] = None
    if values["scheduler"] != "step":
        values["step_size"] = values["gamma"] = None
    return values | _per_method(asked, method, backbone_rate=values["learning_rate"])


def _modern(
    asked: Hyperparameters, method: Method, start: _Start, dataset: DatasetFacts, reasons: list[str]
) -> dict[str, Any]:
    defaults = MODERN[method, start.backbone.family]
    ratio = defaults.backbone_ratio * (FORMULA_RATE_FACTOR if start.is_from_formulas else 1.0)
    given = _given(asked)
    is_sgd = given.get("optimizer") == "sgd"
    batch_size = given.get("batch_size", MODERN_BATCH_SIZE)
    epochs = given.get("epochs", _epochs_for_steps(defaults, dataset.train, batch_size))
    is_solved = method == "few_shot" or (method == "feature_extraction" and not ITERATIVE & set(given))
    if "epochs" not in given and not is_solved:
        reasons.append(f"epochs {epochs}: about {defaults.steps} steps suit {dataset.train} images.")
    is_step = given.get("scheduler") == "step"
    values = {
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": "adamw",
        "head_start": "random" if method == "from_scratch" else "probe",
        "learning_rate": defaults.learning_rate * (SGD_RATE_FACTOR if is_sgd else 1.0),
        "momentum": DEFAULT_MOMENTUM if is_sgd else None,
        "weight_decay": SGD_WEIGHT_DECAY if is_sgd else defaults.weight_decay,
        "scheduler": "cosine",
        "step_size": DEFAULT_STEP_SIZE if is_step else None,
        "gamma": DEFAULT_GAMMA if is_step else None,
        "warmup_epochs": round(MODERN_WARMUP_SHARE * epochs, 3),
        "label_smoothing": defaults.label_smoothing,
        # One view of each image is one pass of the backbone, whatever the epochs; views gain a linear head nothing.
        "augmentation": "none" if method in FROZEN_METHODS else "classic",
        "crop_scale": defaults.crop_scale,
        "horizontal_flip": _flip_keeps_class(dataset, reasons),
        "mixup": 0.0,
        "cutmix": 0.0,
        "ema": defaults.ema,
        "fixed_batch_norm": defaults.fixed_batch_norm,
        "class_weights": _class_weights(dataset, reasons),
        # A third of the run without progress: the cosine's end, where most is gained, is then mostly still reached.
        "early_stopping_patience": max(5, math.ceil(epochs / 3)),
    } | given
    values |= _per_method(asked, method, backbone_rate=values["learning_rate"] * ratio)
    if method in ("feature_extraction", "fine_tuning") and values["augmentation"] != "none":
        values["augmented_views"] = min(given.get("augmented_views", MODERN_AUGMENTED_VIEWS), values["epochs"])
    if method == "feature_extraction" and is_solved:
        reasons.append("the head is solved for: a logistic regression, regularised as cross-validation says.")
        values |= SOLVED
    return values


def _per_method(asked: Hyperparameters, method: Method, *, backbone_rate: float) -> dict[str, Any]:
    """Values that only some methods have."""
    return {
        "unfreeze": (asked.unfreeze or 1) if method == "fine_tuning" else None,
        "feature_layer": asked.feature_layer,
        "augmented_views": asked.augmented_views,
        "backbone_learning_rate": (None if method in FROZEN_METHODS else asked.backbone_learning_rate or backbone_rate),
    }


def _given(asked: Hyperparameters) -> dict[str, Any]:
    values = asked.model_dump(exclude_unset=True)
    if "ema" in values:
        values["ema"] = {True: DEFAULT_EMA, False: 0.0}[asked.ema] if isinstance(asked.ema, bool) else asked.ema
    return values


def _epochs_for_steps(defaults: ModernDefaults, train_images: int, batch_size: int) -> int:
    steps_per_epoch = math.ceil(train_images / batch_size)
    return min(max(math.ceil(defaults.steps / steps_per_epoch), defaults.min_epochs), defaults.max_epochs)


def _flip_keeps_class(dataset: DatasetFacts, reasons: list[str]) -> bool:
    names = [c.name.lower() for c in dataset.classes]
    sided = [n for n in names if _SIDED_WORDS & set(n.replace("-", "_").replace(" ", "_").split("_"))]
    if (names and all(len(name) == 1 for name in names)) or sided:
        reasons.append("no horizontal flips: the class names are single characters or name a side.")
        return False
    return True


def _class_weights(dataset: DatasetFacts, reasons: list[str]) -> ClassWeights:
    """balanced where training is much more uneven than validation: what is then asked for is the even view."""
    train, val = dataset.imbalance("train"), dataset.imbalance("val")
    if train > 3 and val < train / 2:
        reasons.append(f"class_weights balanced: training is uneven ({train:.0f}:1), validation is not ({val:.0f}:1).")
        return "balanced"
    return "none"


def _bad_hyperparameter(name: str, detail: str) -> InvalidHyperparameter:
    return InvalidHyperparameter(f"{name} {detail}.", errors=[FieldError(f"#/hyperparameters/{name}", detail)])


def _pointer(location: Sequence[str]) -> str:
    return "#" + "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in location)


def _shown(pointer: str) -> str:
    """A pointer as a sentence names it: "epochs", "exclude/3"."""
    return pointer.removeprefix("#").removeprefix("/").removeprefix("hyperparameters/") or "body"


def _allowed(field: FieldInfo) -> str:
    """What a field accepts: "an integer from 1 to 1000", "one of sgd, adamw"; "" where pydantic says it best."""
    members = _members(field.annotation, tuple(field.metadata))
    choices = [str(choice) for kind, _ in members for choice in _choices(kind)]
    parts = [f"one of {', '.join(choices)}"] if choices else []
    parts += [part for part in (_allowed_member(*member) for member in members) if part]
    return " or ".join(parts)


def _members(annotation: Any, metadata: tuple[Any, ...]) -> list[tuple[Any, tuple[Any, ...]]]:
    """Members of a union as (type, constraints), None left out; nested Annotated forms are opened."""
    if hasattr(annotation, "__metadata__"):
        return _members(annotation.__origin__, metadata + tuple(annotation.__metadata__))
    arguments = get_args(annotation)
    if arguments and not _choices(annotation):
        return [member for argument in arguments for member in _members(argument, metadata)]
    return [] if annotation is type(None) else [(annotation, metadata)]


def _choices(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if getattr(annotation, "__origin__", None) is Literal else ()


def _allowed_member(kind: Any, metadata: tuple[Any, ...]) -> str:
    if kind is bool:
        return "true or false"
    if kind not in (int, float):
        return ""
    flat = [m for entry in metadata for m in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]
    words = ["an integer" if kind is int else "a number"]
    words += [f"from {m.ge}" for m in flat if isinstance(m, annotated_types.Ge)]
    words += [f"above {m.gt}" for m in flat if isinstance(m, annotated_types.Gt)]
    words += [
        f"to {m.le}" if kind is int or words[-1].startswith("from") else f"and at most {m.le}"
        for m in flat
        if isinstance(m, annotated_types.Le)
    ]
    words += [f"to below {m.lt}" for m in flat if isinstance(m, annotated_types.Lt)]
    return " ".join(words)
