"""What is drawn of a job, and of several: their epochs and events as series."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from app.api.schemas import Epoch, Event, Job
from app.web.charts import Chart, Series, line_chart
from app.web.words import spoken

# In the order of a table: what runs are told apart by first.
COMPARED_VALUES = ("method", "recipe", "backbone", "seed", "excluded")


def of_job(epochs: Sequence[Epoch], events: Sequence[Event]) -> list[Chart]:
    """Accuracy, loss, learning rate and speed; those of which there is something to see: one epoch is no curve."""
    epochs = epochs if len(epochs) > 1 else []
    accuracies = {"validation": "val_accuracy", "training": "train_accuracy"}
    losses = {"validation": "val_loss", "training": "train_loss"}
    charts = [
        line_chart("Accuracy", _by_method(epochs, accuracies), is_share=True),
        line_chart("Loss", _by_method(epochs, losses)),
        line_chart("Learning rate", _by_method(_stepped(epochs), {"": "learning_rate"})),
        line_chart("Pictures per second", [Series("pictures per second", _speeds(events))], x_name="second"),
    ]
    return [chart for chart in charts if chart is not None]


def compared(runs: Sequence[tuple[Job, Sequence[Epoch]]]) -> list[Chart]:
    """One plot of each figure, a line for each run; of a competition, the winner's."""

    def series(figure: str) -> list[Series]:
        return [
            Series(name_of(job), [(epoch.epoch, getattr(epoch, figure)) for epoch in _of_winner(job, epochs)], place)
            for place, (job, epochs) in enumerate(runs)
        ]

    charts = [
        line_chart("Validation accuracy", series("val_accuracy"), is_share=True),
        line_chart("Validation loss", series("val_loss")),
    ]
    return [chart for chart in charts if chart is not None]


def name_of(job: Job) -> str:
    return job.name or f"{spoken(_method_of(job))} {job.id.removeprefix('job_')[:6]}"


def differing_values(runs: Sequence[Job]) -> dict[str, list[Any]]:
    """Value by value what the runs were made with, only where they differ: for seeing what made the difference."""
    found = {name: [_values(job).get(name) for job in runs] for name in _names(runs)}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def _names(runs: Sequence[Job]) -> list[str]:
    return list(dict.fromkeys(name for job in runs for name in _values(job)))


def _values(job: Job) -> Mapping[str, Any]:
    spec = job.spec
    hyperparameters = {
        name: value for name, value in (spec.get("hyperparameters") or {}).items() if not isinstance(value, list)
    }
    first = {
        "method": spoken(job.method),
        "recipe": spec.get("recipe"),
        "backbone": job.backbone.name if job.backbone else None,
        "seed": spec.get("seed"),
        "excluded": len(spec.get("exclude") or []),
    }
    return {name: first[name] for name in COMPARED_VALUES} | hyperparameters


def _method_of(job: Job) -> str | None:
    return (job.metrics or {}).get("method") or job.method


def _of_winner(job: Job, epochs: Sequence[Epoch]) -> Sequence[Epoch]:
    winner = _method_of(job)
    won = [epoch for epoch in epochs if epoch.method in (None, winner)]
    return _renumbered(won or epochs)


def _renumbered(epochs: Sequence[Epoch]) -> Sequence[Epoch]:
    """From 1: in a competition the epochs of all are counted through."""
    first = epochs[0].epoch if epochs else 1
    return [epoch.model_copy(update={"epoch": epoch.epoch - first + 1}) for epoch in epochs]


def _stepped(epochs: Sequence[Epoch]) -> list[Epoch]:
    """Those of methods that take steps: a head that is solved for has one epoch, and no learning rate to speak of."""
    counts = Counter(epoch.method for epoch in epochs)
    return [epoch for epoch in epochs if counts[epoch.method] > 1]


def _by_method(epochs: Sequence[Epoch], figures: Mapping[str, str]) -> list[Series]:
    """A series for each figure of each method. A colour for each method where several compete, else for each figure."""
    methods = list(dict.fromkeys(epoch.method for epoch in epochs))

    def name(shown: str, method: str | None) -> str:
        words = [spoken(method)] if method and len(methods) > 1 else []
        return " ".join([*words, *([shown] if shown else [])]) or "learning rate"

    return [
        Series(
            name(shown, method),
            [(epoch.epoch, getattr(epoch, column)) for epoch in epochs if epoch.method == method],
            colour=place if len(methods) > 1 else number,
            is_dashed=number > 0,
        )
        for place, method in enumerate(methods)
        for number, (shown, column) in enumerate(figures.items())
    ]


def _speeds(events: Sequence[Event]) -> list[tuple[float, float | None]]:
    """Seconds since the first event shown, and pictures per second then."""
    told = [
        (event.created_at, event.data["images_per_second"])
        for event in events
        if event.event == "progress" and event.data.get("images_per_second")
    ]
    return [((at - told[0][0]).total_seconds(), speed) for at, speed in told] if len(told) > 1 else []
