"""Fine-tuning jobs as OpenAI's clients ask for them and read them: their bodies, and how ours are told in them.

Pure: a request becomes a JobRequest, rows become answers. Times are seconds since 1970.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from app.api.files import dataset_id_of, file_id_of
from app.api.schemas import JsonObject, Schema
from app.db.tables import EventRow, JobRow, ModelRow, utc_now
from app.errors import FieldError, InvalidRequest
from app.jobs.request import JobRequest, parse_request

MethodName = Literal[
    "supervised",
    "auto",
    "feature_extraction",
    "fine_tuning",
    "full_fine_tuning",
    "from_scratch",
    "few_shot",
    "self_supervised",
]

_JOB, _OUR_JOB = "ftjob-", "job_"
_CHECKPOINT, _MODEL = "ftckpt_", "mdl_"
_EVENT = "ftevent-"

# Their name → ours. What else a method's hyperparameters may be has our names.
_THEIR_NAMES = {"n_epochs": "epochs", "batch_size": "batch_size", "learning_rate_multiplier": "learning_rate"}

# What goes on as it is.
_AS_IN_A_JOB = {
    "model": "backbone",
    "training_file": "dataset",
    **{name: name for name in ("seed", "metadata", "recipe", "promote", "budget_seconds", "exclude")},
}


class MethodOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    hyperparameters: dict[str, Any] = Field(
        default_factory=dict,
        description="n_epochs, batch_size, learning_rate_multiplier, and any hyperparameter of POST /v1/jobs; `auto` "
        "is the same as leaving one out.",
    )


class FineTuningMethod(BaseModel):
    """type, and under the same name its options. supervised and auto let Graft choose."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    type: MethodName
    supervised: MethodOptions | None = None
    auto: MethodOptions | None = None
    feature_extraction: MethodOptions | None = None
    fine_tuning: MethodOptions | None = None
    full_fine_tuning: MethodOptions | None = None
    from_scratch: MethodOptions | None = None
    few_shot: MethodOptions | None = None
    self_supervised: MethodOptions | None = None


def _say_limits_of_a_job(schema: dict[str, Any]) -> None:
    """Has the document say of what goes on into a JobRequest what it says there."""
    of_job = JobRequest.model_json_schema()["properties"]
    for name, ours in _AS_IN_A_JOB.items():
        said = schema["properties"][name]
        said = next((kind for kind in said.get("anyOf", ()) if kind["type"] != "null"), said)
        limits = next((kind for kind in of_job[ours].get("anyOf", ()) if kind["type"] != "null"), of_job[ours])
        said.update({key: value for key, value in limits.items() if key not in ("title", "description", "default")})


class FineTuningRequest(BaseModel):
    """The body of POST /v1/fine_tuning/jobs. Beyond OpenAI's: recipe, promote, budget_seconds, exclude, as in a job."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, json_schema_extra=_say_limits_of_a_job)

    model: str = Field(description="A backbone's name, a model's id to start from, or auto.")
    training_file: str = Field(description="Id of a file; if its images are still being checked, they are waited for.")
    validation_file: str | None = Field(None, description="Not possible: put train and val folders into one archive.")
    method: FineTuningMethod | None = None
    hyperparameters: dict[str, Any] | None = Field(
        None, description="As method.supervised.hyperparameters; the old way."
    )
    seed: int | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(None, description="The job's name.")
    metadata: dict[str, str] | None = None
    integrations: Annotated[list[Any], Field(json_schema_extra={"maxItems": 0})] | None = Field(
        None, description="There are none."
    )
    recipe: str | None = None
    promote: str | None = None
    budget_seconds: float | None = None
    exclude: list[str] | None = None


@dataclass(frozen=True)
class Translation:
    """request: as Graft says it, but for the multiplier, which needs the learning rate that it is of.

    pointers: where in the caller's body the fields of `request` came from.
    """

    request: JobRequest
    learning_rate_multiplier: float | None
    pointers: Mapping[str, str]

    def with_learning_rate(self, rate: float) -> JobRequest:
        values = self.request.model_dump(exclude_unset=True)
        return parse_request(values | {"hyperparameters": values.get("hyperparameters", {}) | {"learning_rate": rate}})

    @contextmanager
    def refusals_in_their_words(self) -> Iterator[None]:
        with _in_their_words(self.pointers):
            yield


def translate(asked: FineTuningRequest) -> Translation:
    """Raises InvalidRequest that points into the caller's body."""
    _refuse_what_is_not_there(asked)
    method, given, place = _method(asked)
    ours, multiplier = _hyperparameters(given, place)
    fields = {
        "dataset": dataset_id_of(asked.training_file),
        "method": method,
        "backbone": asked.model,
        "seed": asked.seed,
        "name": asked.suffix,
        "metadata": asked.metadata,
        "hyperparameters": ours or None,
        "recipe": asked.recipe,
        "promote": asked.promote,
        "budget_seconds": asked.budget_seconds,
        "exclude": asked.exclude,
    }
    pointers = {
        "#/dataset": "#/training_file",
        "#/backbone": "#/model",
        "#/name": "#/suffix",
        "#/method": "#/method/type",
        **{f"#/hyperparameters/{name}": f"{place}/{name}" for name in ours},
        **{
            f"#/hyperparameters/{ours}": f"{place}/{theirs}" for theirs, ours in _THEIR_NAMES.items() if theirs in given
        },
    }
    with _in_their_words(pointers):
        request = parse_request({name: value for name, value in fields.items() if value is not None})
    return Translation(request, multiplier, pointers)


def refused_multiplier(translation: Translation, detail: str) -> InvalidRequest:
    pointer = translation.pointers["#/hyperparameters/learning_rate"]
    return InvalidRequest(f"learning_rate_multiplier {detail}.", errors=[FieldError(pointer, detail)])


def _refuse_what_is_not_there(asked: FineTuningRequest) -> None:
    if asked.validation_file not in (None, asked.training_file):
        raise _refusal(
            "#/validation_file", "must be left out: put train and val folders into one archive, or Graft splits it"
        )
    if asked.integrations:
        raise _refusal("#/integrations", "must be left out: there are none; GET .../events tells all that happens")
    if asked.method is not None and asked.hyperparameters is not None:
        raise _refusal("#/hyperparameters", "must be left out beside `method`, which has its own")


def _method(asked: FineTuningRequest) -> tuple[str, dict[str, Any], str]:
    """Our method, what was asked of it, and where."""
    if asked.method is None:
        return "auto", dict(asked.hyperparameters or {}), "#/hyperparameters"
    chosen = asked.method.type
    others = [name for name in asked.method.model_fields_set - {"type", chosen} if getattr(asked.method, name)]
    if others:
        raise _refusal(f"#/method/{min(others)}", f"must be left out: the method is {chosen}")
    options: MethodOptions = getattr(asked.method, chosen) or MethodOptions()
    return (
        "auto" if chosen == "supervised" else chosen,
        dict(options.hyperparameters),
        f"#/method/{chosen}/hyperparameters",
    )


def _hyperparameters(given: dict[str, Any], place: str) -> tuple[dict[str, Any], float | None]:
    """Under our names, and the multiplier if it is one that changes anything."""
    wanted = {
        name: value for name, value in given.items() if value != "auto" and not (value is None and name in _THEIR_NAMES)
    }
    for theirs, ours in _THEIR_NAMES.items():
        if theirs != ours and theirs in wanted and ours in wanted:
            raise _refusal(f"{place}/{theirs}", f"must be left out beside {ours}")
    multiplier = wanted.pop("learning_rate_multiplier", None)
    # A whole number of JSON may be larger than any float.
    if multiplier is not None and (type(multiplier) not in (int, float) or not 0 < multiplier <= sys.float_info.max):
        raise _refusal(f"{place}/learning_rate_multiplier", "must be a number above 0, none too large, or auto")
    renamed = {_THEIR_NAMES.get(name, name): value for name, value in wanted.items()}
    return renamed, None if multiplier in (None, 1) else float(multiplier)


@contextmanager
def _in_their_words(pointers: Mapping[str, str]) -> Iterator[None]:
    """Turns a refusal of our fields into one of the caller's."""
    try:
        yield
    except InvalidRequest as error:
        errors = [FieldError(pointers.get(each.pointer, each.pointer), each.detail) for each in error.errors]
        detail = error.detail
        # A sentence that begins with the field's name, as most do; the others tell more than their fields.
        if error.errors and detail.startswith(_name(error.errors[0].pointer)):
            detail = "; ".join(f"{_name(each.pointer)}: {each.detail}" for each in errors[:3])
        raise type(error)(detail, code=error.code, title=error.title, errors=errors) from None


def _name(pointer: str) -> str:
    return pointer.rpartition("/")[2]


def _refusal(pointer: str, detail: str) -> InvalidRequest:
    return InvalidRequest(f"{pointer.removeprefix('#/')} {detail}.", errors=[FieldError(pointer, detail)])


class FineTuningError(Schema):
    code: str
    message: str
    param: None = None


class FineTuningJob(Schema):
    """method says what was asked for, hyperparameters what it came to: `auto` as long as methods compete."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str = Field(description="What training starts from: a backbone, or an earlier model's id.")
    status: Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
    fine_tuned_model: str | None
    training_file: str
    validation_file: None = None
    seed: int
    method: JsonObject
    hyperparameters: JsonObject
    suffix: str | None
    metadata: dict[str, str]
    error: FineTuningError | None
    result_files: list[str] = Field([], description="None; GET /v1/models/{id}/evaluation has the figures.")
    integrations: list[Any] = Field([], description="None.")
    organization_id: str = "org-graft"
    trained_tokens: None = None

    @classmethod
    def of(cls, row: JobRow) -> Self:
        requested = row.spec.get("requested", {})
        backbone = row.spec.get("backbone", {})
        return cls(
            id=fine_tuning_id_of(row.id),
            created_at=_seconds(row.created_at),
            finished_at=None if row.finished_at is None else _seconds(row.finished_at),
            estimated_finish=_estimated_finish(row),
            model=backbone.get("model") or backbone.get("name") or "auto",
            status=row.status,
            fine_tuned_model=row.model_id,
            training_file=file_id_of(row.dataset_id),
            seed=row.spec.get("seed", 0),
            method=_method_asked_for(requested),
            hyperparameters=_hyperparameters_used(row),
            suffix=row.name,
            metadata=requested.get("metadata", {}),
            error=None if row.error is None else FineTuningError(code=row.error["code"], message=row.error["detail"]),
        )


class FineTuningEvent(Schema):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    type: Literal["message", "metrics"]
    message: str
    data: JsonObject

    @classmethod
    def of(cls, row: EventRow) -> Self:
        is_metrics = row.event in ("epoch", "progress")
        return cls(
            id=f"{_EVENT}{row.id}",
            created_at=_seconds(row.at),
            level=_LEVELS.get(row.data.get("status", ""), "info"),
            type="metrics" if is_metrics else "message",
            message=_message(row),
            data=row.data | ({"step": row.data["epoch"]} if row.event == "epoch" else {}),
        )


class FineTuningCheckpoint(Schema):
    """A model that the job registered, and so one that predicts."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int = Field(description="The epoch whose weights it has.")
    metrics: JsonObject

    @classmethod
    def of(cls, row: ModelRow) -> Self:
        step = int(row.metrics.get("best_epoch") or 0)
        return cls(
            id=_CHECKPOINT + row.id.removeprefix(_MODEL),
            created_at=_seconds(row.created_at),
            fine_tuning_job_id=fine_tuning_id_of(row.job_id),
            fine_tuned_model_checkpoint=row.id,
            step_number=step,
            metrics={
                "step": step,
                "valid_loss": row.metrics.get("val_loss"),
                "full_valid_loss": row.metrics.get("val_loss"),
                **{name: value for name, value in row.metrics.items() if isinstance(value, int | float)},
            },
        )


def fine_tuning_id_of(job_id: str) -> str:
    return _JOB + job_id.removeprefix(_OUR_JOB)


def job_id_of(fine_tuning_id: str) -> str:
    """A job's own id is fine too."""
    return _OUR_JOB + fine_tuning_id.removeprefix(_JOB) if fine_tuning_id.startswith(_JOB) else fine_tuning_id


def event_number_of(event_id: str) -> int:
    """Raises InvalidRequest."""
    digits = event_id.removeprefix(_EVENT)
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 18):
        raise _refusal("#/after", "must be the id of an event")
    return int(digits)


_LEVELS: dict[str, Literal["warn", "error"]] = {"cancelled": "warn", "failed": "error"}
_STATUS_MESSAGES = {
    "queued": "The job is queued.",
    "running": "The job is running.",
    "succeeded": "The job has succeeded.",
    "failed": "The job has failed.",
    "cancelled": "The job was cancelled.",
}


def _message(row: EventRow) -> str:
    data = row.data
    match row.event:
        case "status":
            reason = data.get("reason") or (data.get("error") or {}).get("detail", "")
            return f"{_STATUS_MESSAGES[data['status']]} {reason}".strip()
        case "epoch":
            names = {
                "train_loss": "training loss",
                "val_loss": "validation loss",
                "val_accuracy": "validation accuracy",
            }
            figures = [f"{words} {data[name]:.4f}" for name, words in names.items() if data.get(name) is not None]
            return f"Epoch {data['epoch']}: {', '.join(figures)}."
        case "progress":
            return f"{str(data.get('stage') or 'work').capitalize()}: {100 * (data.get('fraction') or 0):.0f} % done."
        case "model":
            return f"The model {data['model']} is registered."
        case _:
            return str(data.get("message", row.event))


def _method_asked_for(requested: Mapping[str, Any]) -> dict[str, Any]:
    asked = dict(requested.get("hyperparameters", {}))
    theirs = {"n_epochs": asked.pop("epochs", "auto"), "batch_size": asked.pop("batch_size", "auto")}
    if "learning_rate" not in asked:
        theirs["learning_rate_multiplier"] = "auto"
    method = requested.get("method", "auto")
    name = "supervised" if method == "auto" else method
    return {"type": name, name: {"hyperparameters": theirs | asked}}


def _hyperparameters_used(row: JobRow) -> dict[str, Any]:
    specs = [row.spec, *row.spec.get("candidates", [])]
    used = next(
        (spec["hyperparameters"] for spec in reversed(specs) if spec.get("method") == row.method != "auto"), None
    )
    if used is None:
        return dict.fromkeys(_THEIR_NAMES, "auto")
    # The rate's default is not kept beside the rate that was asked for; `method` has that.
    is_default_rate = "learning_rate" not in row.spec.get("requested", {}).get("hyperparameters", {})
    multiplier = 1.0 if is_default_rate else None
    return {
        "n_epochs": used["epochs"],
        "batch_size": used["batch_size"],
        "learning_rate_multiplier": multiplier,
    }


def _estimated_finish(row: JobRow) -> int | None:
    eta_seconds = (row.progress or {}).get("eta_seconds")
    if row.status != "running" or eta_seconds is None:
        return None
    return _seconds(utc_now() + timedelta(seconds=eta_seconds))


def _seconds(time: datetime) -> int:
    return int(time.timestamp())
