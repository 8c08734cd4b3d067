"""Every table. Constraints and indexes are named, so that migrations can speak of them.

Ids that callers see are opaque strings (`ds_…`, `job_…`, `mdl_…`); `seq` is what lists and the queue are ordered by,
because it grows whatever the clock does.
"""

import secrets
from datetime import UTC, date, datetime
from typing import Any, Literal

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Date,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    TypeDecorator,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

DatasetKind = Literal["labelled", "unlabelled"]


def new_id(prefix: str) -> str:
    """An opaque id of 120 random bits, such as `ds_1f0c…`. prefix: such as "ds", "job" or "mdl"."""
    return f"{prefix}_{secrets.token_hex(15)}"


def rfc3339(moment: datetime) -> str:
    """A moment in UTC as the API says it, ending in Z."""
    return moment.isoformat().replace("+00:00", "Z")


def utc_now() -> datetime:
    return datetime.now(UTC)


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime in UTC; SQLite forgets time zones, so it is put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a datetime without a time zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy's own way)
        dict[str, Any]: JSON,
        list[Any]: JSON,
        datetime: UtcDateTime,
        str: String,
    }


# SQLite gives automatic keys only to a column typed INTEGER; PostgreSQL should get 64 bits.
BigKey = BigInteger().with_variant(Integer, "sqlite")


# The workspace that is there from the start: the operator's own, and everybody's while there are no keys.
DEFAULT_WORKSPACE, FIRST_WORKSPACE_NAME = "ws_default", "default"


class WorkspaceRow(Base):
    """A tenant: what its keys make belongs to it, and nobody else sees it. Limits are null where the settings' hold."""

    __tablename__ = "workspaces"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    max_bytes: Mapped[int | None] = mapped_column(BigInteger)
    max_unfinished_jobs: Mapped[int | None]
    max_predictions_per_day: Mapped[int | None] = mapped_column(BigInteger)
    requests_per_second: Mapped[float | None] = mapped_column(Float)


class OfWorkspace:
    """What belongs to one workspace. A session of `Database.within` sees no other's, and makes none of another."""

    workspace_id: Mapped[str] = mapped_column(ForeignKey("workspaces.id"), index=True)


class DatasetRow(OfWorkspace, Base):
    """A data set. Its images are listed in its manifest, not here."""

    __tablename__ = "datasets"
    __table_args__ = (
        CheckConstraint("status IN ('processing', 'ready', 'failed')", name="status"),
        {"sqlite_autoincrement": True},
    )

    seq: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    status: Mapped[str] = mapped_column(default="processing", index=True)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    size_bytes: Mapped[int] = mapped_column(BigInteger)  # of the archive
    sha256: Mapped[str]  # of the archive
    kind: Mapped[DatasetKind] = mapped_column(String, default="labelled", server_default="labelled")
    options: Mapped[dict[str, Any]] = mapped_column(default=dict)  # val_fraction, seed
    num_images: Mapped[int] = mapped_column(default=0)
    num_rejected: Mapped[int] = mapped_column(default=0)
    splits: Mapped[dict[str, Any]]  # {"train": n, "val": n, "test": n}
    classes: Mapped[list[Any]] = mapped_column(default=list)  # [{"name", "train", "val", "test"}], by name
    tasks: Mapped[list[Any]] = mapped_column(default=list, server_default="[]")  # [{"name", "classes"}] if several
    rejected: Mapped[list[Any]] = mapped_column(default=list)  # [{"path", "reason"}]
    warnings: Mapped[list[Any]] = mapped_column(default=list)  # [{"code", "detail", "paths"}]
    error: Mapped[dict[str, Any] | None]
    packed_bytes: Mapped[int | None] = mapped_column(BigInteger)  # of the pixel store; stated before it is written
    parent_id: Mapped[str | None]  # the data set that this one has more pictures than; it may be deleted


class UploadRow(OfWorkspace, Base):
    """A data set's archive that comes in pieces. How much of it has come, the length of its file says."""

    __tablename__ = "uploads"
    __table_args__ = (
        CheckConstraint("status IN ('open', 'finished', 'refused')", name="status"),
        {"sqlite_autoincrement": True},
    )

    seq: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    status: Mapped[str] = mapped_column(default="open", index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)  # that it will have
    filename: Mapped[str | None]
    options: Mapped[dict[str, Any]]  # of the data set: name, kind, val_fraction, seed
    client_metadata: Mapped[str]  # as the client sent it, who may ask for it again
    attempts: Mapped[int] = mapped_column(default=0)  # at looking it through; more than one if processes died of it
    dataset_id: Mapped[str | None]  # what it became; no foreign key, since that may be deleted
    error: Mapped[dict[str, Any] | None]  # why it was refused
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    ended_at: Mapped[datetime | None]


class JobRow(OfWorkspace, Base):
    """A piece of work in the queue. Status moves only through `app/jobs/queue.py`."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint("status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name="status"),
        CheckConstraint("kind IN ('training', 'ingest', 'prediction')", name="kind"),
        Index("ix_jobs_kind_status_workspace_id_seq", "kind", "status", "workspace_id", "seq"),
        {"sqlite_autoincrement": True},
    )

    seq: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    kind: Mapped[str]
    name: Mapped[str | None]
    status: Mapped[str] = mapped_column(default="queued")
    # No foreign keys to data sets and models: a job's history outlives both.
    dataset_id: Mapped[str] = mapped_column(index=True)  # "" of a prediction
    model_id: Mapped[str | None]  # the one it made; of a prediction, the one it asks
    method: Mapped[str | None]
    backbone: Mapped[dict[str, Any] | None]  # {"name", "weights"}, resolved at submission
    spec: Mapped[dict[str, Any]]  # a TrainingSpec, an ingest's options, or a BatchSpec
    progress: Mapped[dict[str, Any] | None]
    metrics: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    trace_context: Mapped[dict[str, Any] | None]  # of the request that submitted it, for spans of the work on it
    attempt: Mapped[int] = mapped_column(default=1)  # 1 on the first run, one more after each crash
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None] = mapped_column(index=True)
    cancel_requested: Mapped[bool] = mapped_column(Boolean, default=False)
    stop_requested: Mapped[bool] = mapped_column(Boolean, default=False)

    # The claim. `fence` only grows; every write of a worker names the fence it was given.
    fence: Mapped[int] = mapped_column(default=0)
    beat: Mapped[int] = mapped_column(default=0)  # grows with each heartbeat; observers watch it change
    ticks: Mapped[int] = mapped_column(default=0)  # grows while work moves; the watchdog looks at it
    durable_step: Mapped[int] = mapped_column(default=0)  # last step whose checkpoint is on disk
    durable_step_at_claim: Mapped[int] = mapped_column(default=0)
    crashes: Mapped[int] = mapped_column(default=0)  # in a row, without a new durable step
    worker_id: Mapped[str | None]
    owner: Mapped[dict[str, Any] | None]  # the claiming process, as app/jobs/owner.py says it


class TurnRow(Base):
    """When a workspace was last given a worker for a kind of job: what the queue is fair by."""

    __tablename__ = "turns"

    workspace_id: Mapped[str] = mapped_column(ForeignKey("workspaces.id"), primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger)  # grows with each claim of the kind; 0: it is its turn at once


class EpochRow(Base):
    """One epoch of a job's history."""

    __tablename__ = "epochs"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    epoch: Mapped[int] = mapped_column(primary_key=True)
    train_loss: Mapped[float] = mapped_column(Float)
    train_accuracy: Mapped[float | None] = mapped_column(Float)  # null where nothing is told apart
    val_loss: Mapped[float] = mapped_column(Float)
    val_accuracy: Mapped[float | None] = mapped_column(Float)
    learning_rate: Mapped[float] = mapped_column(Float)
    seconds: Mapped[float] = mapped_column(Float)
    method: Mapped[str | None]  # of this epoch's candidate, in a job of method auto
    figures: Mapped[dict[str, Any] | None]  # further ones by name, such as a self-supervised training's


class EventRow(Base):
    """What happened to a job, in order: added in the transaction of the change itself, never changed after.

    Dropped are old progress, and long after the job's end all but the last one, as `app/jobs/events.py` says.
    """

    __tablename__ = "job_events"
    __table_args__ = (
        # A second final event of one job is impossible, whatever the code believes.
        Index(
            "uq_job_events_final",
            "job_id",
            unique=True,
            sqlite_where=text("is_final"),
            postgresql_where=text("is_final"),
        ),
        Index("ix_job_events_job_id_id", "job_id", "id"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    event: Mapped[str]  # status, progress, epoch, log or model
    fence: Mapped[int]
    is_final: Mapped[bool] = mapped_column(Boolean, default=False)
    data: Mapped[dict[str, Any]]
    at: Mapped[datetime] = mapped_column(default=utc_now)


class ModelRow(OfWorkspace, Base):
    """A trained, registered model. The unique (job_id, role) is what makes a second registration impossible."""

    __tablename__ = "models"
    __table_args__ = (
        Index(
            "uq_models_job_id_role",
            "job_id",
            "role",
            unique=True,
            sqlite_where=text("role IN ('probe', 'final')"),
            postgresql_where=text("role IN ('probe', 'final')"),
        ),
        {"sqlite_autoincrement": True},
    )

    seq: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    job_id: Mapped[str]
    dataset_id: Mapped[str] = mapped_column(index=True)
    method: Mapped[str]
    backbone: Mapped[dict[str, Any]]
    classes: Mapped[list[Any]]
    tasks: Mapped[list[Any]] = mapped_column(default=list, server_default="[]")  # [{"name", "classes"}] if several
    metrics: Mapped[dict[str, Any]]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]  # of weights.safetensors
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    # probe: the instant model that a job of method auto serves until its final one. Made without a job, whose id is the
    # other's: extended, another with one class more, and personalised, another that learnt a few pictures more.
    role: Mapped[str] = mapped_column(default="final", server_default="final")
    parent_id: Mapped[str | None]  # the model that this one extends; no foreign key, since that may be deleted
    promotion: Mapped[dict[str, Any] | None]  # {"promoted", "reason", ...}: what the promotion gate said

    @property
    def each_task(self) -> list[dict[str, Any]]:
        """{"name", "classes"} of all that it tells; the only one is called ""."""
        return self.tasks or [{"name": "", "classes": self.classes}]


class AliasRow(OfWorkspace, Base):
    """A movable name for a model; `default` is the one /predict uses."""

    __tablename__ = "aliases"

    workspace_id: Mapped[str] = mapped_column(ForeignKey("workspaces.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), index=True)
    updated_at: Mapped[datetime] = mapped_column(default=utc_now, onupdate=utc_now)
    previous_model_id: Mapped[str | None]  # what it pointed at before; no foreign key, since that may be deleted


class PredictionRow(OfWorkspace, Base):
    """A prediction that was kept, and what people say the picture is. Labels are by task; the only one's name is ""."""

    __tablename__ = "predictions"
    __table_args__ = (
        Index("ix_predictions_model_id_seq", "model_id", "seq"),
        Index("ix_predictions_seq_size_bytes", "seq", "size_bytes"),
        {"sqlite_autoincrement": True},
    )

    seq: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    # No foreign keys: what people said of a picture outlives the model, and the data set that this was trained on.
    model_id: Mapped[str]
    dataset_id: Mapped[str] = mapped_column(index=True)
    alias: Mapped[str | None]  # under which the model was asked
    filename: Mapped[str | None]
    size_bytes: Mapped[int] = mapped_column(BigInteger)  # of the picture
    sha256: Mapped[str]  # of the picture
    predicted: Mapped[dict[str, Any]]
    answer: Mapped[dict[str, Any]]  # as it was given: label, score, top, tasks
    feedback: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(default=utc_now, index=True)
    feedback_at: Mapped[datetime | None]


class WebhookRow(OfWorkspace, Base):
    """An address that is told what happens."""

    __tablename__ = "webhooks"
    __table_args__ = ({"sqlite_autoincrement": True},)

    seq: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    url: Mapped[str]
    events: Mapped[list[Any]]  # names of those it wants
    secret: Mapped[str]  # as it is: signing needs it. Never answered again, never logged
    is_enabled: Mapped[bool] = mapped_column(Boolean, default=True)
    disabled_reason: Mapped[str | None]  # where Graft turned it off
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class DeliveryRow(Base):
    """One event for one webhook: written with the change that it tells of, then sent until it has arrived."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        CheckConstraint("status IN ('pending', 'delivered', 'failed')", name="status"),
        Index("ix_webhook_deliveries_status_next_attempt_at", "status", "next_attempt_at"),
        Index("ix_webhook_deliveries_webhook_id_seq", "webhook_id", "seq"),
        {"sqlite_autoincrement": True},
    )

    seq: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)  # also the receiver's, the same in every attempt
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"))
    event: Mapped[str]
    body: Mapped[str]  # as it is signed
    status: Mapped[str] = mapped_column(default="pending")
    attempts: Mapped[int] = mapped_column(default=0)  # begun; the number of one is its claim
    next_attempt_at: Mapped[datetime]  # of one that is being made: when it is given up
    last_attempt_at: Mapped[datetime | None]
    response_status: Mapped[int | None]  # HTTP, of the last attempt
    error: Mapped[str | None]  # why the last attempt failed, in our words
    created_at: Mapped[datetime] = mapped_column(default=utc_now, index=True)
    ended_at: Mapped[datetime | None]


class IdempotencyRow(Base):
    """A request made under an Idempotency-Key: first as a claim, then with the answer to replay."""

    __tablename__ = "idempotency_keys"

    scope: Mapped[str] = mapped_column(primary_key=True)  # API key id, method and path
    key: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[str | None]  # sha256 of the request; unknown until an upload is complete
    resource_id: Mapped[str | None]  # set in the transaction that creates the resource
    response: Mapped[dict[str, Any] | None]  # the body first answered
    owner: Mapped[dict[str, Any]]  # process that works on it, as in jobs.owner
    created_at: Mapped[datetime] = mapped_column(default=utc_now, index=True)


class ApiKeyRow(OfWorkspace, Base):
    """An API key: only its hash is kept."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    secret_sha256: Mapped[str]
    scopes: Mapped[list[Any]]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    expires_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class AuditRow(OfWorkspace, Base):
    """A change that somebody asked for: added in the transaction of the change itself, never changed after."""

    __tablename__ = "audit_log"
    __table_args__ = ({"sqlite_autoincrement": True},)

    seq: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=True)
    at: Mapped[datetime] = mapped_column(default=utc_now, index=True)
    key_id: Mapped[str | None]  # null without keys, and at the command line
    action: Mapped[str]  # method and path of the request, or the command
    request_id: Mapped[str | None]
    changed: Mapped[list[Any]]  # ids of what was made, changed or deleted


class UsageRow(Base):
    """How many pictures a workspace had predicted on one day, in UTC."""

    __tablename__ = "usage"

    workspace_id: Mapped[str] = mapped_column(ForeignKey("workspaces.id"), primary_key=True)
    day: Mapped[date] = mapped_column(Date, primary_key=True)
    predictions: Mapped[int] = mapped_column(BigInteger)
