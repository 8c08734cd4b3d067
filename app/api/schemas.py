"""Every body that the API answers with, and its own request bodies (a job's is `app.jobs.request.JobRequest`).

Tables are never answered as they are: what callers see is written down here, and made from rows by the `of` methods.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from app.datasets.manifest import Record
from app.db.tables import AliasRow, DatasetRow, EpochRow, EventRow, JobRow, ModelRow
from app.serving.adaptation import Method, Parameters

T = TypeVar("T")
R = TypeVar("R")


def _finite(value: Any) -> Any:
    """JSON has no NaN: the loss of a run that diverged is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_finite(member) for member in value]
    return value


FiniteFloat = Annotated[float | None, BeforeValidator(_finite)]
JsonObject = Annotated[dict[str, Any], BeforeValidator(_finite)]


class Schema(BaseModel):
    """An answer. Further members may be added at any time."""

    model_config = ConfigDict(frozen=True)


class FieldProblem(Schema):
    pointer: str = Field(description="RFC 6901, into the body; a query parameter is shown like a top-level member.")
    detail: str


class ErrorObject(Schema):
    """The same failure for clients that read a member `error` only, such as the OpenAI SDK."""

    message: str
    type: str
    param: str | None
    code: str


class ProblemDocument(Schema):
    """RFC 9457. Every failure of every path looks like this."""

    type: str = Field(description="Ends in a stable slug to switch on, such as /problems/not-found.")
    title: str
    status: int
    detail: str = Field(description="What happened and what to do next.")
    request_id: str = Field(description="The answer's X-Request-ID; the server's log has it too.")
    errors: list[FieldProblem] | None = Field(None, exclude_if=lambda errors: errors is None)
    error: ErrorObject | str = Field(description="A text on /v2 and /hf, an object everywhere else.")


class Listing(Schema, Generic[T]):
    """One page. The next one is asked for with `after=<last_id>`."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool
    first_id: str | None
    last_id: str | None

    @classmethod
    def of(cls, rows: Sequence[R], *, limit: int, render: Callable[[R], T], id_of: Callable[[T], str]) -> Self:
        """rows: one more than `limit` where there are more."""
        data = [render(row) for row in rows[:limit]]
        return cls(
            data=data,
            has_more=len(rows) > limit,
            first_id=id_of(data[0]) if data else None,
            last_id=id_of(data[-1]) if data else None,
        )


class Deleted(Schema):
    id: str
    object: str
    deleted: Literal[True] = True


# Data sets


class SplitCounts(Schema):
    train: int
    val: int
    test: int


class ClassCounts(SplitCounts):
    name: str


class TaskCounts(Schema):
    """One of several things that the pictures are told apart by."""

    name: str
    classes: list[ClassCounts]


class RejectedFile(Schema):
    path: str
    reason: str


class DatasetWarning(Schema):
    code: str
    detail: str
    paths: list[str]
    groups: list[list[str]] = Field([], description="Which of the paths are copies of each other.")
    suggested: dict[str, str] = Field({}, description="For suspicious labels: the class that a path looks like.")


class DatasetProgress(Schema):
    """How far the checking of a data set is."""

    stage: str
    fraction: float | None = Field(description="0 to 1.")


class Dataset(Schema):
    id: str
    object: Literal["dataset"] = "dataset"
    name: str
    filename: str | None = Field(description="Of the archive, where the upload named it.")
    parent: str | None = Field(description="The data set that this one has more pictures than; it may be deleted.")
    kind: Literal["labelled", "unlabelled"] = Field(description="unlabelled: without classes, for self_supervised.")
    status: Literal["processing", "ready", "failed"]
    created_at: datetime
    size_bytes: int = Field(description="Of the archive.")
    sha256: str = Field(description="Of the archive.")
    packed_bytes: int | None = Field(
        description="Of the decoded pictures on the server's disk; stated before they are written, null until then."
    )
    val_fraction: float | None = Field(description="Share of each class that became validation, where Graft split.")
    seed: int | None = Field(description="Of the split that Graft made.")
    num_images: int
    num_rejected: int
    splits: SplitCounts
    classes: list[ClassCounts] = Field(description="Of several tasks, the first one's.")
    tasks: list[TaskCounts] = Field(description="All of them where a table has several label columns; else empty.")
    rejected: list[RejectedFile] = Field(description="Files that were left out, with the reason for each.")
    warnings: list[DatasetWarning]
    progress: DatasetProgress | None = Field(None, description="While its pictures are checked; null otherwise.")
    error: JsonObject | None = Field(description="Why it failed, as a problem.")

    @classmethod
    def of(cls, row: DatasetRow, *, progress: Mapping[str, Any] | None = None) -> Self:
        """progress: of its ingest."""
        return cls(
            id=row.id,
            name=row.name,
            filename=row.options.get("filename"),
            parent=row.parent_id,
            kind=row.kind,
            status=row.status,
            created_at=row.created_at,
            size_bytes=row.size_bytes,
            sha256=row.sha256,
            packed_bytes=row.packed_bytes,
            val_fraction=row.options.get("val_fraction"),
            seed=row.options.get("seed"),
            num_images=row.num_images,
            num_rejected=row.num_rejected,
            splits=SplitCounts(**row.splits),
            classes=row.classes,
            tasks=row.tasks,
            rejected=row.rejected,
            warnings=row.warnings,
            progress=None if progress is None else {name: progress[name] for name in DatasetProgress.model_fields},
            error=row.error,
        )


class DatasetImage(Schema):
    id: str
    object: Literal["image"] = "image"
    path: str = Field(description="Within the archive.")
    class_name: str | None = Field(serialization_alias="class", description="null in a data set without classes.")
    split: Literal["train", "val", "test"]
    width: int = Field(description="Of the stored picture, in pixels; large ones are stored smaller.")
    height: int
    thumbnail: str = Field(description="Where a small JPEG of it can be had.")

    @classmethod
    def of(cls, record: Record, class_name: str | None, *, dataset_id: str) -> Self:
        return cls(
            id=record.image_id,
            path=record.path,
            class_name=class_name,
            split=record.split,
            width=record.width,
            height=record.height,
            thumbnail=thumbnail_path(dataset_id, record.image_id),
        )


def thumbnail_path(dataset_id: str, image_id: str) -> str:
    return f"/v1/datasets/{dataset_id}/images/{image_id}/thumbnail"


# Jobs


class JobBackbone(Schema):
    name: str
    weights: str | None = Field(description="None when training starts from scratch, or from an earlier model.")


class Job(Schema):
    id: str
    object: Literal["job"] = "job"
    name: str | None
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    queue_position: int | None = Field(description="1 for the job that is taken next; null unless queued.")
    dataset: str
    method: str | None
    backbone: JobBackbone | None
    spec: JsonObject = Field(description="Every resolved value, with reasons for those that were chosen.")
    progress: JsonObject | None = Field(
        description="stage, epoch, epochs, fraction, images_per_second, eta_seconds; null before it starts."
    )
    metrics: JsonObject | None
    model: str | None = Field(description="The model it made.")
    attempt: int = Field(description="1 on the first run, one more for each time its worker died.")
    cancel_requested: bool
    stop_requested: bool
    error: JsonObject | None = Field(description="Why it failed, as a problem.")
    metadata: dict[str, str] = Field(description="The texts that came with the request.")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @classmethod
    def of(cls, row: JobRow, *, queue_position: int | None) -> Self:
        return cls(
            id=row.id,
            name=row.name,
            status=row.status,
            queue_position=queue_position,
            dataset=row.dataset_id,
            method=row.method,
            backbone=row.backbone,
            spec=row.spec,
            progress=row.progress,
            metrics=row.metrics,
            model=row.model_id,
            attempt=row.attempt,
            cancel_requested=row.cancel_requested,
            stop_requested=row.stop_requested,
            error=row.error,
            metadata=row.spec.get("requested", {}).get("metadata", {}),
            created_at=row.created_at,
            started_at=row.started_at,
            finished_at=row.finished_at,
        )


class Estimate(Schema):
    """seconds: as a rule. seconds_range: if all that may end the job early does so at once, and if nothing does."""

    seconds: float
    seconds_range: tuple[float, float]
    peak_memory_bytes: int


class DryRun(Estimate):
    """What a job would be. Nothing is queued."""

    object: Literal["job.dry_run"] = "job.dry_run"
    spec: JsonObject
    estimate: Estimate


class Epoch(Schema):
    epoch: int
    train_loss: FiniteFloat
    train_accuracy: FiniteFloat
    val_loss: FiniteFloat
    val_accuracy: FiniteFloat
    learning_rate: FiniteFloat
    seconds: FiniteFloat
    method: str | None = Field(None, description="Whose epoch it is, where several methods compete; else null.")
    figures: JsonObject | None = Field(None, description="Further ones: feature_std, knn_accuracy of self_supervised.")

    @classmethod
    def of(cls, row: EpochRow) -> Self:
        return cls(**{name: getattr(row, name) for name in cls.model_fields})


class History(Schema):
    object: Literal["list"] = "list"
    data: list[Epoch]


class Event(Schema):
    id: str = Field(description="Grows with time; the same as in the event stream.")
    object: Literal["event"] = "event"
    event: Literal["status", "progress", "epoch", "log", "model"]
    data: JsonObject
    created_at: datetime

    @classmethod
    def of(cls, row: EventRow) -> Self:
        return cls(id=str(row.id), event=row.event, data=row.data, created_at=row.at)


# Models


class Promotion(Schema):
    """What was decided when the model was registered. Numbers are null where there was nothing to compare."""

    promoted: bool = Field(description="Whether the model became the default.")
    reason: str
    incumbent: str | None = Field(description="The default at that time.")
    images: int | None = Field(description="Validation images, new to both, that they were compared on.")
    candidate_right_only: int | None = Field(
        description="Images that this model alone got right; of several tasks, those of which it got more labels right."
    )
    incumbent_right_only: int | None
    p_value: float | None = Field(description="One-sided exact McNemar test; below 0.05 it is better beyond chance.")


class TaskClasses(Schema):
    name: str
    classes: list[str]


class Model(Schema):
    id: str
    object: Literal["model"] = "model"
    job: str
    dataset: str
    method: str
    backbone: JobBackbone
    classes: list[str] = Field(description="Of several tasks, the first one's; empty for a backbone alone.")
    tasks: list[TaskClasses] = Field(description="All of them where the model tells several things; else empty.")
    aliases: list[str]
    metrics: JsonObject
    size_bytes: int
    sha256: str = Field(description="Of its weights file.")
    role: Literal["probe", "final", "extended", "personalised"] = Field(
        description="probe: served by a job of method auto until its final model was there; extended: another model "
        "with one class more; personalised: another model that learnt a few pictures more."
    )
    parent: str | None = Field(description="The model that this one was made from, without a job.")
    promotion: Promotion | None = Field(description="Whether it became the default and why; null if that is unknown.")
    created_at: datetime
    created: int = Field(description="The same in seconds since 1970, for clients that read only this.")
    owned_by: Literal["graft"] = "graft"

    @classmethod
    def of(cls, row: ModelRow, *, aliases: Sequence[str]) -> Self:
        return cls(
            id=row.id,
            job=row.job_id,
            dataset=row.dataset_id,
            method=row.method,
            backbone=row.backbone,
            classes=row.classes,
            tasks=row.tasks,
            aliases=sorted(aliases),
            metrics=row.metrics,
            size_bytes=row.size_bytes,
            sha256=row.sha256,
            role=row.role,
            parent=row.parent_id,
            promotion=row.promotion,
            created_at=row.created_at,
            created=int(row.created_at.timestamp()),
        )


class ClassQuality(Schema):
    """How well the model does on one class of the validation images; null where there is nothing to divide by."""

    name: str
    precision: FiniteFloat
    recall: FiniteFloat
    f1: FiniteFloat
    support: int = Field(description="Validation images of this class.")
    recall_ci95: tuple[FiniteFloat, FiniteFloat] | None = None


class Mistake(Schema):
    """An image that the model got wrong."""

    image_id: str
    path: str = Field(description="Within the archive.")
    true: str = Field(description="The class it belongs to.")
    predicted: str
    score: FiniteFloat = Field(description="Calibrated, of the predicted class.")
    thumbnail: str


class ReliabilityBin(Schema):
    """Images whose predicted class was given a score from `low` to `high`."""

    low: float
    high: float
    images: int
    confidence: float = Field(description="Mean score.")
    accuracy: float = Field(description="Share that is right; the scores are calibrated where the two agree.")


class SplitEvaluation(Schema):
    """How well the model does on one split."""

    model_config = ConfigDict(frozen=True, extra="allow")

    classes: list[str]
    images: int
    accuracy: FiniteFloat
    accuracy_ci95: tuple[FiniteFloat, FiniteFloat]
    loss: FiniteFloat
    macro_f1: FiniteFloat
    macro_f1_ci95: tuple[FiniteFloat, FiniteFloat] | None = None
    expected_calibration_error: FiniteFloat
    warnings: list[str] = Field([], description="Why the figures are to be taken with care; empty with images enough.")
    confusion_matrix: list[list[int]] = Field(description="Rows are true classes, columns predicted ones.")
    per_class: list[ClassQuality]
    mistakes: list[Mistake] = Field(description="What it got wrong, the most confident first.")
    reliability: list[ReliabilityBin] | None = Field(
        None, description="Of calibrated scores, bins without images left out; null for models of earlier versions."
    )


class TaskEvaluation(SplitEvaluation):
    """Of the validation images; `test` too where the data set has a test split."""

    test: SplitEvaluation | None = None


class Evaluation(TaskEvaluation):
    """Of several tasks, the first one's, and all of them as `tasks`."""

    object: Literal["evaluation"] = "evaluation"
    model: str
    dataset: str
    tasks: dict[str, TaskEvaluation] | None = Field(None, description="By name, where the model tells several things.")
    forecast: JsonObject | None = Field(
        None, description="What more training pictures would bring, by heads trained on fewer; null where unknown."
    )


class Alias(Schema):
    name: str
    object: Literal["alias"] = "alias"
    model: str
    previous_model: str | None = Field(description="What it pointed at before, and what a rollback makes it point at.")
    updated_at: datetime

    @classmethod
    def of(cls, row: AliasRow) -> Self:
        return cls(name=row.name, model=row.model_id, previous_model=row.previous_model_id, updated_at=row.updated_at)


class AliasRequest(BaseModel):
    """The body of PUT /v1/aliases/{name}."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=100, description="A model's id, or another alias of it.")]


class Backbone(Schema):
    name: str = Field(description="What a job names as its backbone; a model's id for one that was trained here.")
    object: Literal["backbone"] = "backbone"
    architecture: str = Field(description="torchvision's name of the network.")
    method: str | None = Field(None, description="How it was trained here; null for published and bundled weights.")
    parameters: int
    image_size: int = Field(description="Side of the square it was trained on, in pixels.")
    weights: list[str]
    available: Literal["bundled", "local", "download"] = Field(
        description="Where its weights come from; download: they are not on this machine."
    )
    is_obtainable: bool = Field(description="Whether its weights can be had now; without a network, only those here.")
    license: str


class Backbones(Schema):
    object: Literal["list"] = "list"
    data: list[Backbone]


# Prediction


class EncodedPicture(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    b64: Annotated[str, Field(description="The picture in base64, or as a data URL.")]
    filename: Annotated[str, Field(max_length=1024)] | None = None


class PicturesRequest(BaseModel):
    """The JSON form of a body with pictures."""

    model_config = ConfigDict(extra="forbid", strict=True)

    images: Annotated[list[EncodedPicture], Field(min_length=1)]


DEFAULT_TOP_K = 5


class PredictOptions(BaseModel):
    """What may be asked of POST /predict besides the pictures: in the query, as a form's fields, or in JSON."""

    model: Annotated[
        Annotated[str, Field(min_length=1, max_length=100)] | None,
        Field(description="A model's id or alias; `default` if left out."),
    ] = None
    top_k: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(description=f"Classes per picture, best first; {DEFAULT_TOP_K} if left out."),
    ] = None
    store: Annotated[
        bool | None, Field(description="Keep each picture and its prediction, under the `id` that is answered.")
    ] = None
    explain: Annotated[bool | None, Field(description="Show where in the picture the label was seen.")] = None
    coverage: Annotated[
        Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None,
        Field(description="Add a set of classes that holds the true one with this probability."),
    ] = None
    neighbors: Annotated[
        Annotated[int, Field(ge=1, le=50)] | None,
        Field(description="Add so many of the training pictures that are most like it."),
    ] = None
    adapt: Annotated[
        Method | None,
        Field(description="Tune a copy of the model to each picture before it answers; the model stays as it is."),
    ] = None
    adapt_parameters: Annotated[
        Parameters | None,
        Field(
            description="What is tuned: by neighbors head, the usual, or last_stage, with the head; by entropy "
            "normalisation, the usual, or all."
        ),
    ] = None
    adapt_steps: Annotated[Annotated[int, Field(ge=1, le=50)] | None, Field(description="Gradient steps.")] = None
    adapt_learning_rate: Annotated[
        Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | None, Field(description="Of these steps.")
    ] = None


class PredictRequest(PredictOptions, PicturesRequest):
    """The JSON form of POST /predict."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ClassRequest(PicturesRequest):
    """The JSON form of POST /v1/models/{model}/classes."""

    name: Annotated[str, Field(min_length=1, max_length=255, description="Of the new class.")]


_ClassName = Annotated[str, Field(min_length=1, max_length=255)]


class LabelledPicture(EncodedPicture):
    label: Annotated[
        _ClassName | Annotated[dict[Annotated[str, Field(max_length=255)], _ClassName], Field(min_length=1)],
        Field(
            description="One of the model's classes; where the model tells several things, one of the first, or an "
            'object of those that are known: `{"colour": "red", "shape": "round"}`.'
        ),
    ]


class PersonaliseRequest(PicturesRequest):
    """The JSON form of POST /v1/models/{model}/personalise."""

    images: Annotated[list[LabelledPicture], Field(min_length=1)]  # type: ignore[assignment]


class ClassScore(Schema):
    label: str
    score: float


def _unless_none(description: str) -> Any:
    """A member that is there only where it was asked for, or where the model has it."""
    return Field(None, exclude_if=lambda value: value is None, description=description)


class TaskPrediction(Schema):
    label: str
    score: float
    top: list[ClassScore] = Field(description="min(top_k, classes) rows, best first.")
    prediction_set: list[str] | None = _unless_none(
        "With `coverage`: classes, most probable first, that hold the true one with that probability. Never empty."
    )


class Neighbor(Schema):
    """A training picture that is like the one asked about."""

    id: str | None = Field(description="Of the image in its data set; null for one that was given to add a class.")
    path: str | None = Field(description="Within the archive.")
    label: str | None = Field(description="Its class; of several tasks, the first one's; null where it has none.")
    tasks: dict[str, str | None] | None = _unless_none("Its classes by task, where the model tells several things.")
    similarity: float = Field(description="Cosine of what the head sees of both; 1 for the same picture.")
    thumbnail: str | None = Field(description="Where a small JPEG of it can be had, while there is the data set.")


class Adaptation(Schema):
    """How a copy of the model was tuned to the picture before it answered."""

    method: Method
    parameters: Parameters
    steps: int
    learning_rate: float
    share: float = Field(
        description="How much the copy's answer counts beside the model's own, 0 to 1: the stranger the picture, the "
        "more, and all of it where in_distribution is false."
    )
    before: ClassScore = Field(description="What the model itself says.")
    seconds: float = Field(description="What it cost, waiting for the device included.")


class Prediction(TaskPrediction):
    """Of several tasks, the first one's, and all of them as `tasks`."""

    id: str | None = Field(
        None, exclude_if=lambda id: id is None, description="Under which it is kept, where store=true asked for that."
    )
    filename: str | None
    tasks: dict[str, TaskPrediction] | None = _unless_none("By name, where the model tells several things.")
    in_distribution: bool | None = _unless_none(
        "Whether the picture is of the kind that the model was trained on: false beyond what 95 % of validation "
        "pictures keep to. Then the label says little, however high its score."
    )
    ood_score: float | None = _unless_none(
        "How strange the picture is, 0 to 1: by its nearest training picture. Half of the validation pictures are at "
        "0.1 or below, and 0.5 is where in_distribution ends."
    )
    neighbors: list[Neighbor] | None = _unless_none("With `neighbors`: the training pictures most like it.")
    adaptation: Adaptation | None = _unless_none("With `adapt`.")
    explanation: str | None = _unless_none(
        "With `explain`: a PNG as data URL, the picture in grey and over it in colours what speaks for `label`; "
        "whitened where the network does not look."
    )


class FailedPrediction(Schema):
    filename: str | None
    error: ProblemDocument


class Coverage(Schema):
    """What the prediction sets were calibrated by."""

    asked: float
    images: int = Field(description="Validation pictures; of several tasks, of the one that has fewest.")
    largest: float = Field(description="So many pictures promise this much; beyond it a set holds all classes.")


class Predictions(Schema):
    model: str
    coverage: Coverage | None = _unless_none("With `coverage`.")
    predictions: list[Prediction | FailedPrediction]


# Operations


class Health(Schema):
    status: Literal["ok"] = "ok"


class Readiness(Schema):
    status: Literal["ready"] = "ready"
    checks: dict[str, str]
