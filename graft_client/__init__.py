"""A client of Graft: upload pictures, train, predict. Needs httpx and httpx-sse, and nothing of the server.

from graft_client import Graft

with Graft("http://localhost:8000") as graft:
    dataset = graft.datasets.upload("flowers/")
    job = graft.jobs.create(graft.datasets.wait(dataset.id).id)
    model = graft.models.get(graft.jobs.wait(job.id).model)
    print(model.metrics["val_accuracy"], graft.predict_one("daisy.jpg").label)

client.py        Graft and AsyncGraft
datasets.py jobs.py models.py predictions.py workspace.py   the calls, by noun; shared.py has what they do alike
requests.py      what may be asked for besides; answers.py: what comes back
errors.py        what can go wrong
uploads.py       archives, folders and pictures → bodies
connection.py    retries, problems, waiting; wire.py and calls.py: blocking or awaited, from one definition
decoding.py      JSON → answers.py
"""

from graft_client.answers import (
    Alias,
    Backbone,
    Batch,
    Change,
    Dataset,
    DatasetImage,
    Delivery,
    DryRun,
    Epoch,
    Evaluation,
    Event,
    Export,
    FailedPrediction,
    Job,
    Model,
    ModelFeedback,
    NewWebhook,
    Page,
    Prediction,
    Predictions,
    StoredPrediction,
    Usage,
    Webhook,
)
from graft_client.client import DEFAULT_URL, AsyncGraft, Graft
from graft_client.errors import (
    Conflict,
    FieldError,
    Forbidden,
    GraftError,
    InvalidRequest,
    NotFound,
    ServerRefused,
    ServerUnreachable,
    StorageFull,
    TooLarge,
    TooManyRequests,
    Unauthenticated,
    Unavailable,
    UnexpectedAnswer,
    WaitTimedOut,
)
from graft_client.requests import Hyperparameters, JobOptions, PredictOptions

__all__ = [
    "DEFAULT_URL",
    "Alias",
    "AsyncGraft",
    "Backbone",
    "Batch",
    "Change",
    "Conflict",
    "Dataset",
    "DatasetImage",
    "Delivery",
    "DryRun",
    "Epoch",
    "Evaluation",
    "Event",
    "Export",
    "FailedPrediction",
    "FieldError",
    "Forbidden",
    "Graft",
    "GraftError",
    "Hyperparameters",
    "InvalidRequest",
    "Job",
    "JobOptions",
    "Model",
    "ModelFeedback",
    "NewWebhook",
    "NotFound",
    "Page",
    "PredictOptions",
    "Prediction",
    "Predictions",
    "ServerRefused",
    "ServerUnreachable",
    "StorageFull",
    "StoredPrediction",
    "TooLarge",
    "TooManyRequests",
    "Unauthenticated",
    "Unavailable",
    "UnexpectedAnswer",
    "Usage",
    "WaitTimedOut",
    "Webhook",
]
