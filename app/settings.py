"""Every knob of Graft, in one class. Read once per process from `GRAFT_…` variables or `.env`, then passed on.

Units are in the names. `graft settings` prints each with its value, default and meaning.
"""

from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, StringConstraints, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

MEBIBYTE = 1024**2
GIBIBYTE = 1024**3

ServingEngine = Literal["auto", "fp32", "torch"]
# As it is compared: a name alone, without scheme and port.
HostName = Annotated[str, StringConstraints(to_lower=True, pattern=r"^[0-9A-Za-z._-]+$")]


class Settings(BaseSettings):
    """Graft's settings; unknown `GRAFT_…` names in `.env` are refused so that a typo cannot pass unnoticed."""

    model_config = SettingsConfigDict(
        env_prefix="GRAFT_",
        env_file=".env",
        dotenv_filtering="match_prefix",  # other programs' lines may stand there, too
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
    )

    # Where things are
    data_dir: Path = Field(Path("data"), description="Folder for the database, data sets, jobs and models.")
    database_url: str = Field("", description="SQLAlchemy URL; empty means graft.db (SQLite) in the data folder.")
    storage_url: str = Field("", description="Where bytes are kept; empty means the data folder.")
    weights_dir: Path | None = Field(
        None, description="Folder of pretrained weight files, looked into before any download."
    )
    allow_downloads: bool = Field(True, description="Whether pretrained weights may be downloaded.")
    weights_url: str = Field(
        "https://download.pytorch.org/models",
        description="Base address that torchvision's weight files are downloaded from (a mirror, for example).",
    )

    # API
    host: str = Field("127.0.0.1", description="Address the API listens on; beyond loopback only with an API key.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="Port the API listens on; 0 picks one.")
    allowed_hosts: frozenset[HostName] = Field(
        frozenset(),
        description="Names of the internet by which a server without an API key may be called, as a proxy on the same "
        'machine passes them on, as JSON: ["graft.example.com"].',
    )
    max_upload_bytes: Annotated[int, Field(ge=1)] = Field(
        10 * GIBIBYTE, description="Largest upload of a data set, in bytes."
    )
    upload_expiry_hours: Annotated[float, Field(gt=0, le=8760)] = Field(
        72.0,
        description="Time without a new piece after which an unfinished resumable upload is removed, in hours; also "
        "how long what became of a finished one can be asked for.",
    )
    max_image_bytes: Annotated[int, Field(ge=1)] = Field(
        32 * MEBIBYTE, description="Largest encoded picture that /predict reads, in bytes."
    )
    max_predict_images: Annotated[int, Field(ge=1)] = Field(64, description="Most pictures in one /predict request.")
    max_predict_bytes: Annotated[int, Field(ge=1)] = Field(
        64 * MEBIBYTE, description="Largest /predict request, all its pictures together, in bytes."
    )
    max_pending_predictions: Annotated[int, Field(ge=1)] = Field(
        256, description="Pictures that may wait for prediction before new requests get 503."
    )
    max_loaded_model_bytes: Annotated[int, Field(ge=0)] = Field(
        2 * GIBIBYTE,
        description="Weights kept loaded for prediction, in bytes; the default model always stays, and models with an "
        "alias go last.",
    )
    predict_timeout_seconds: Annotated[float, Field(gt=0)] = Field(
        30.0, description="Longest that a picture waits for its turn on the device before 503, in seconds."
    )
    serving_engine: ServingEngine = Field(
        "auto",
        description="What runs networks for prediction on a CPU: auto tries ONNX Runtime and OpenVINO for a network "
        "that is used much, half precision too where the processor has it, and takes the fastest that gives the same "
        "answers; fp32 does without half precision; torch tries none.",
    )
    workspace_max_bytes: Annotated[int | None, Field(ge=0)] = Field(
        None,
        description="Most bytes that a workspace may keep: archives, pixels, models, pictures; one workspace may have "
        "limits of its own, see `graft workspaces`.",
    )
    workspace_max_unfinished_jobs: Annotated[int | None, Field(ge=0)] = Field(
        None, description="Most jobs and batches of a workspace that may wait or run at a time."
    )
    workspace_max_predictions_per_day: Annotated[int | None, Field(ge=0)] = Field(
        None, description="Most pictures that a workspace may have predicted on one day, in UTC."
    )
    workspace_requests_per_second: Annotated[float | None, Field(gt=0)] = Field(
        None, description="Requests a second that a workspace may make in the long run; twice as many come at once."
    )
    audit_days: Annotated[float, Field(gt=0, le=36500)] = Field(
        400.0, description="How long the audit log keeps a change, in days."
    )
    store_predictions: bool = Field(
        True, description="Whether /predict keeps pictures and answers of requests that ask for it with store=true."
    )
    max_stored_prediction_bytes: Annotated[int, Field(ge=1)] = Field(
        5 * GIBIBYTE, description="Pictures kept with predictions of each workspace, in bytes; the oldest go first."
    )
    max_stored_prediction_days: Annotated[float, Field(gt=0, le=36500)] = Field(
        90.0, description="How long a prediction and its picture are kept, in days."
    )
    job_events_days: Annotated[float, Field(gt=0, le=36500)] = Field(
        30.0,
        description="How long the events of a job that has ended are kept, in days; how it ended, its epochs, metrics "
        "and model stay.",
    )
    batch_days: Annotated[float, Field(gt=0, le=36500)] = Field(
        90.0, description="How long a batch that has ended is kept with its archive and results, in days."
    )
    failed_job_days: Annotated[float, Field(gt=0, le=36500)] | None = Field(
        None,
        description="How long a training job that failed or was cancelled is kept, in days; empty keeps it until "
        "somebody deletes it.",
    )
    header_timeout_seconds: Annotated[float, Field(gt=0)] = Field(
        15.0, description="Time a client has to send its request headers, in seconds."
    )
    body_idle_timeout_seconds: Annotated[float, Field(gt=0)] = Field(
        20.0, description="Longest silence within a request body, in seconds, before 408."
    )
    min_free_bytes: Annotated[int, Field(ge=0)] = Field(
        512 * MEBIBYTE, description="Free disk space below which uploads are refused with 507, in bytes."
    )

    ballast_bytes: Annotated[int, Field(ge=0)] = Field(
        16 * MEBIBYTE,
        description="File kept beside an SQLite database, which deleting on a full disk takes for its room, in bytes.",
    )

    # Webhooks
    webhooks: bool = Field(
        False,
        description="Whether webhooks may be made and are sent: this server then sends requests to addresses that "
        "holders of admin keys name.",
    )
    webhook_networks: frozenset[IPv4Network | IPv6Network] = Field(
        frozenset(),
        description="Networks that are not public and that webhooks may go to all the same, by http too, as JSON: "
        '["10.1.0.0/16"].',
    )

    # Data sets
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="Share of each class that becomes validation where the archive has no split."
    )
    max_unpacked_bytes: Annotated[int, Field(ge=1)] = Field(
        50 * GIBIBYTE, description="Largest total size of an archive's members, in bytes."
    )
    max_member_bytes: Annotated[int, Field(ge=1)] = Field(
        64 * MEBIBYTE, description="Largest archive member, and all tables of an archive together, in bytes."
    )
    max_members: Annotated[int, Field(ge=1)] = Field(1_000_000, description="Most members in an archive.")
    max_compression_ratio: Annotated[float, Field(gt=1)] = Field(
        200.0, description="Largest unpacked-to-packed ratio, once 16 MiB are unpacked."
    )
    max_image_pixels: Annotated[int, Field(ge=1)] = Field(40_000_000, description="Most pixels in a picture.")
    max_image_side: Annotated[int, Field(ge=1)] = Field(20_000, description="Longest side of a picture, in pixels.")
    max_image_aspect: Annotated[float, Field(ge=1)] = Field(100.0, description="Largest ratio of a picture's sides.")
    max_jpeg_scans: Annotated[int, Field(ge=1)] = Field(100, description="Most scans in a progressive JPEG.")
    decode_processes: Annotated[int, Field(ge=0, le=256)] | None = Field(
        None,
        description="Processes that decode pictures, of the API, and of each job that reads an archive; empty is one "
        "per core, 0 decodes within the program, for pictures that are trusted.",
    )
    decode_memory_bytes: Annotated[int, Field(ge=64 * MEBIBYTE)] = Field(
        GIBIBYTE, description="Memory that decoding one picture may take before it is refused, in bytes."
    )
    decode_cpu_seconds: Annotated[float, Field(gt=0, le=3600)] = Field(
        10.0, description="Processor time that decoding one picture may take before it is refused, in seconds."
    )
    extra_image_formats: frozenset[Literal["TIFF", "BMP"]] = Field(
        frozenset(), description='Formats accepted besides JPEG, PNG and WebP, as JSON: ["TIFF", "BMP"].'
    )

    # On one CPU core MobileNetV3-small takes about 14 ms a picture, so these take a minute and a half.
    quality_max_images: Annotated[int, Field(ge=0)] = Field(
        5_000,
        description="Most pictures in a data set that is looked at with a pretrained network after its upload, for "
        "changed copies and wrong labels; 0 turns this off.",
    )

    # Worker
    feature_cache_bytes: Annotated[int, Field(ge=0)] = Field(
        20 * GIBIBYTE,
        description="Features of frozen stages kept on disk for later jobs, all data sets together, in bytes; what was "
        "used least goes first.",
    )
    device: str = Field("auto", description="Device for training and prediction: auto, cpu, cuda, cuda:N or mps.")
    poll_interval_seconds: Annotated[float, Field(gt=0, le=60)] = Field(
        0.2, description="How often an idle worker looks for work, in seconds."
    )
    heartbeat_interval_seconds: Annotated[float, Field(gt=0)] = Field(
        5.0, description="How often a worker renews its lease, in seconds."
    )
    lease_seconds: Annotated[float, Field(gt=0)] = Field(
        45.0,
        description="Silence after which another worker takes a job over, in seconds; longer than the database's "
        "busy timeout, so that a healthy worker never loses its lease to a lock.",
    )
    stall_timeout_seconds: Annotated[float, Field(gt=0)] = Field(
        600.0, description="Time without a training step after which a job's process is killed, in seconds."
    )
    max_crashes_without_progress: Annotated[int, Field(ge=1)] = Field(
        3, description="Crashes in a row without a new checkpoint after which a job fails for good."
    )
    full_disk_retry_seconds: Annotated[float, Field(gt=0, le=3600)] = Field(
        60.0, description="How often a training job that waits for room on a full disk tries again, in seconds."
    )
    full_disk_patience_seconds: Annotated[float, Field(gt=0)] = Field(
        3600.0,
        description="Longest that a training job waits for room on a full disk before it fails with storage-full, in "
        "seconds.",
    )
    cancel_grace_seconds: Annotated[float, Field(gt=0)] = Field(
        5.0, description="Time a running job has to end itself after a cancel before it is killed, in seconds."
    )
    shutdown_grace_seconds: Annotated[float, Field(gt=0)] = Field(
        25.0, description="Time for checkpointing and draining after SIGTERM, in seconds."
    )

    # Logs
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe line logged.")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="json lines, or console for people; auto is console on a terminal."
    )

    # The command
    url: str = Field("", description="Server that the commands of `graft` ask; empty means http://127.0.0.1:8000.")
    api_key: SecretStr | None = Field(
        None, description="Key that these commands send; `graft keys create` on the server's side makes one."
    )

    # Traces, and metrics of jobs
    otlp_endpoint: str = Field(
        "",
        description="Base address of an OpenTelemetry collector (OTLP over HTTP) that traces are sent to, such as "
        "http://localhost:4318; empty leaves it to the standard variables OTEL_EXPORTER_OTLP_…, without which nothing "
        "is traced.",
    )
    mlflow_tracking_uri: str = Field(
        "", description="MLflow server that training jobs are told to, as runs of one experiment; empty tells none."
    )
    tensorboard_dir: Path | None = Field(
        None, description="Folder in which each training job has a folder of event files for TensorBoard."
    )

    @field_validator("storage_url")
    @classmethod
    def _is_served(cls, url: str) -> str:
        if url and not url.startswith("file://"):
            raise ValueError("only file:// addresses are supported")
        return url

    @property
    def resolved_database_url(self) -> str:
        return self.database_url or sqlite_url(self.data_dir.resolve() / "graft.db")

    @property
    def storage_root(self) -> Path:
        """Folder of the local storage."""
        return Path(self.storage_url.removeprefix("file://")).resolve() if self.storage_url else self.data_dir.resolve()


def sqlite_url(path: Path) -> str:
    """The SQLAlchemy URL of a file, whose name may hold what means something else in a URL."""
    return "sqlite:///" + str(path).replace("%", "%25").replace("?", "%3F")
