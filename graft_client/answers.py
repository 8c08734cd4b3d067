"""What the server answers, as frozen dataclasses with the names of the API.

Each has `raw`, the JSON as it came: members that a newer server sends are there before they are here. Times are aware
datetimes in UTC. What each member means says the server's own page, /docs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

T = TypeVar("T")

JsonObject = dict[str, Any]
DatasetStatus = Literal["processing", "ready", "failed"]
JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Split = Literal["train", "val", "test"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    raw: JsonObject = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Page(Generic[T]):
    """One page of a list; for the next one ask with `after=page.last_id`."""

    data: list[T]
    has_more: bool
    first_id: str | None
    last_id: str | None

    def __iter__(self) -> Iterator[T]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)


@dataclass(frozen=True, kw_only=True)
class Deleted(Answer):
    id: str
    object: str
    deleted: bool


# Data sets


@dataclass(frozen=True, kw_only=True)
class SplitCounts(Answer):
    train: int
    val: int
    test: int


@dataclass(frozen=True, kw_only=True)
class ClassCounts(SplitCounts):
    name: str


@dataclass(frozen=True, kw_only=True)
class TaskCounts(Answer):
    name: str
    classes: list[ClassCounts]


@dataclass(frozen=True, kw_only=True)
class RejectedFile(Answer):
    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class DatasetWarning(Answer):
    code: str
    detail: str
    paths: list[str]
    groups: list[list[str]]
    suggested: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class DatasetProgress(Answer):
    stage: str
    fraction: float | None


@dataclass(frozen=True, kw_only=True)
class Dataset(Answer):
    id: str
    object: str
    name: str
    filename: str | None
    parent: str | None
    kind: Literal["labelled", "unlabelled"]
    status: DatasetStatus
    created_at: datetime
    size_bytes: int
    sha256: str
    packed_bytes: int | None
    val_fraction: float | None
    seed: int | None
    num_images: int
    num_rejected: int
    splits: SplitCounts
    classes: list[ClassCounts]
    tasks: list[TaskCounts]
    rejected: list[RejectedFile]
    warnings: list[DatasetWarning]
    progress: DatasetProgress | None
    error: JsonObject | None

    @property
    def is_final(self) -> bool:
        return self.status != "processing"


@dataclass(frozen=True, kw_only=True)
class DatasetImage(Answer):
    id: str
    object: str
    path: str
    class_name: str | None = field(metadata={"json": "class"})
    split: Split
    width: int
    height: int
    thumbnail: str


# Jobs


@dataclass(frozen=True, kw_only=True)
class JobBackbone(Answer):
    name: str
    weights: str | None


@dataclass(frozen=True, kw_only=True)
class Job(Answer):
    id: str
    object: str
    name: str | None
    status: JobStatus
    queue_position: int | None
    dataset: str
    method: str | None
    backbone: JobBackbone | None
    spec: JsonObject
    progress: JsonObject | None
    metrics: JsonObject | None
    model: str | None
    attempt: int
    cancel_requested: bool
    stop_requested: bool
    error: JsonObject | None
    metadata: dict[str, str]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @property
    def is_final(self) -> bool:
        return self.status not in ("queued", "running")


@dataclass(frozen=True, kw_only=True)
class Estimate(Answer):
    seconds: float
    seconds_range: tuple[float, float]
    peak_memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class DryRun(Estimate):
    object: str
    spec: JsonObject
    estimate: Estimate


@dataclass(frozen=True, kw_only=True)
class Epoch(Answer):
    epoch: int
    train_loss: float | None
    train_accuracy: float | None
    val_loss: float | None
    val_accuracy: float | None
    learning_rate: float | None
    seconds: float | None
    method: str | None
    figures: JsonObject | None


@dataclass(frozen=True, kw_only=True)
class Event(Answer):
    """created_at: None where it came by a live stream."""

    id: str
    event: Literal["status", "progress", "epoch", "log", "model"]
    data: JsonObject
    created_at: datetime | None
    object: str | None


# Models


@dataclass(frozen=True, kw_only=True)
class Promotion(Answer):
    promoted: bool
    reason: str
    incumbent: str | None
    images: int | None
    candidate_right_only: int | None
    incumbent_right_only: int | None
    p_value: float | None


@dataclass(frozen=True, kw_only=True)
class TaskClasses(Answer):
    name: str
    classes: list[str]


@dataclass(frozen=True, kw_only=True)
class Model(Answer):
    id: str
    object: str
    job: str
    dataset: str
    method: str
    backbone: JobBackbone
    classes: list[str]
    tasks: list[TaskClasses]
    aliases: list[str]
    metrics: JsonObject
    size_bytes: int
    sha256: str
    role: Literal["probe", "final", "extended", "personalised"]
    parent: str | None
    promotion: Promotion | None
    created_at: datetime
    created: int
    owned_by: str


@dataclass(frozen=True, kw_only=True)
class ClassQuality(Answer):
    name: str
    precision: float | None
    recall: float | None
    f1: float | None
    support: int
    recall_ci95: tuple[float | None, float | None] | None


@dataclass(frozen=True, kw_only=True)
class Mistake(Answer):
    image_id: str
    path: str
    true: str
    predicted: str
    score: float | None
    thumbnail: str


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin(Answer):
    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class SplitEvaluation(Answer):
    classes: list[str]
    images: int
    accuracy: float | None
    accuracy_ci95: tuple[float | None, float | None]
    loss: float | None
    macro_f1: float | None
    macro_f1_ci95: tuple[float | None, float | None] | None
    expected_calibration_error: float | None
    warnings: list[str]
    confusion_matrix: list[list[int]]
    per_class: list[ClassQuality]
    mistakes: list[Mistake]
    reliability: list[ReliabilityBin] | None


@dataclass(frozen=True, kw_only=True)
class TaskEvaluation(SplitEvaluation):
    test: SplitEvaluation | None


@dataclass(frozen=True, kw_only=True)
class Evaluation(TaskEvaluation):
    object: str
    model: str
    dataset: str
    tasks: dict[str, TaskEvaluation] | None
    forecast: JsonObject | None


@dataclass(frozen=True, kw_only=True)
class Alias(Answer):
    name: str
    object: str
    model: str
    previous_model: str | None
    updated_at: datetime


@dataclass(frozen=True, kw_only=True)
class Backbone(Answer):
    name: str
    object: str
    architecture: str
    method: str | None
    parameters: int
    image_size: int
    weights: list[str]
    available: Literal["bundled", "local", "download"]
    is_obtainable: bool
    license: str


@dataclass(frozen=True, kw_only=True)
class Export:
    """A model's file. verification: what was found when its answers were held against the model's."""

    path: Path
    verification: JsonObject


# Prediction


@dataclass(frozen=True, kw_only=True)
class ClassScore(Answer):
    label: str
    score: float


@dataclass(frozen=True, kw_only=True)
class TaskPrediction(Answer):
    label: str
    score: float
    top: list[ClassScore]
    prediction_set: list[str] | None


@dataclass(frozen=True, kw_only=True)
class Neighbor(Answer):
    id: str | None
    path: str | None
    label: str | None
    tasks: dict[str, str | None] | None
    similarity: float
    thumbnail: str | None


@dataclass(frozen=True, kw_only=True)
class Adaptation(Answer):
    method: str
    parameters: str
    steps: int
    learning_rate: float
    share: float
    before: ClassScore
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Prediction(TaskPrediction):
    id: str | None
    filename: str | None
    tasks: dict[str, TaskPrediction] | None
    in_distribution: bool | None
    ood_score: float | None
    neighbors: list[Neighbor] | None
    adaptation: Adaptation | None
    explanation: str | None


@dataclass(frozen=True, kw_only=True)
class FailedPrediction(Answer):
    """Of a picture that cannot be read. error: a problem; its `detail` says why."""

    filename: str | None
    error: JsonObject


@dataclass(frozen=True, kw_only=True)
class Coverage(Answer):
    asked: float
    images: int
    largest: float


@dataclass(frozen=True, kw_only=True)
class Predictions(Answer):
    """predictions: in the order of the pictures."""

    model: str
    coverage: Coverage | None
    predictions: list[Prediction | FailedPrediction]


# What was kept, and what people say of it


@dataclass(frozen=True, kw_only=True)
class Feedback(Answer):
    label: str | None
    tasks: dict[str, str] | None
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class StoredPrediction(Answer):
    id: str
    object: str
    model: str
    alias: str | None
    filename: str | None
    label: str
    score: float
    top: list[ClassScore]
    tasks: dict[str, TaskPrediction] | None
    picture: str
    size_bytes: int
    feedback: Feedback | None
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class Accuracy(Answer):
    count: int
    right: int
    accuracy: float | None
    accuracy_ci95: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class ClassAccuracy(Accuracy):
    name: str
    is_known: bool


@dataclass(frozen=True, kw_only=True)
class TaskAccuracy(Accuracy):
    classes: list[ClassAccuracy]


@dataclass(frozen=True, kw_only=True)
class ModelFeedback(TaskAccuracy):
    object: str
    model: str
    stored: int
    aliases: dict[str, Accuracy]
    tasks: dict[str, TaskAccuracy] | None


# Batches


@dataclass(frozen=True, kw_only=True)
class BatchProgress(Answer):
    stage: str
    fraction: float | None
    images_per_second: float | None
    eta_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class BatchResults(Answer):
    jsonl: str
    csv: str


@dataclass(frozen=True, kw_only=True)
class Batch(Answer):
    id: str
    object: str
    status: JobStatus
    queue_position: int | None
    model: str
    top_k: int
    progress: BatchProgress | None
    num_files: int
    num_images: int
    num_rejected: int
    size_bytes: int
    sha256: str
    results: BatchResults | None
    attempt: int
    cancel_requested: bool
    error: JsonObject | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @property
    def is_final(self) -> bool:
        return self.status not in ("queued", "running")


# The workspace


@dataclass(frozen=True, kw_only=True)
class Amount(Answer):
    used: int
    limit: int | None


@dataclass(frozen=True, kw_only=True)
class Usage(Answer):
    object: str
    workspace: str
    bytes: Amount
    unfinished_jobs: Amount
    predictions_today: Amount
    requests_per_second: float | None


@dataclass(frozen=True, kw_only=True)
class Change(Answer):
    id: str
    object: str
    at: datetime
    key: str | None
    action: str
    request_id: str | None
    changed: list[str]


@dataclass(frozen=True, kw_only=True)
class Webhook(Answer):
    id: str
    object: str
    url: str
    events: list[str]
    enabled: bool
    disabled_reason: str | None
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class NewWebhook(Webhook):
    secret: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Delivery(Answer):
    id: str
    object: str
    webhook: str
    event: str
    status: Literal["pending", "delivered", "failed"]
    attempts: int
    next_attempt_at: datetime | None
    last_attempt_at: datetime | None
    response_status: int | None
    error: str | None
    payload: JsonObject
    created_at: datetime
    ended_at: datetime | None
