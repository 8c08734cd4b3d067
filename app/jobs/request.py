"""What a caller may ask for: the body of POST /v1/jobs, its fields' ranges, and refusals that name each bad field.

Knows no data set and no backbone: what a request resolves to follows in spec.py.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

import annotated_types
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError

from app.errors import FieldError, InvalidHyperparameter, InvalidRequest

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

# self_supervised compares a batch's pictures with each other: what fewer than these have in common is mostly chance.
FEWEST_TOGETHER = 16
# And after each epoch it is checked on the pictures of each split, or on so many of them.
MAX_CHECKED = 2000

_ID = r"^[A-Za-z0-9_.\-]{1,100}$"
_NULLABLE = frozenset({"early_stopping_patience"})
MAX_EXCLUDED = 10_000
MetadataKey = Annotated[str, Field(min_length=1, max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


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
        None, description="Momentum, of sgd, which it implies."
    )
    weight_decay: Annotated[float, Field(ge=0, le=1)] | SkipJsonSchema[None] = Field(
        None, description="Weight decay; coupled in sgd, decoupled in adamw."
    )
    scheduler: Scheduler | SkipJsonSchema[None] = Field(None, description="How the learning rate goes down.")
    step_size: Annotated[int, Field(ge=1, le=1000)] | SkipJsonSchema[None] = Field(
        None, description="Epochs between two decays, of the scheduler step, which it implies."
    )
    gamma: Annotated[float, Field(gt=0, le=1)] | SkipJsonSchema[None] = Field(
        None, description="Factor of each decay, of the scheduler step, which it implies."
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
        None,
        description="Layer whose features the head sees, or `all` of them; for feature_extraction only (a single "
        "layer for few_shot too).",
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
        json_schema_extra={"uniqueItems": True},
    )

    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] = Field(
        default_factory=dict, description="Up to 16 texts of your own, by names of your own; kept with the job."
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
