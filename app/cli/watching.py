"""Watching a job: a bar with what it reaches by now and a plot of its epochs, or lines where nobody looks on."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import plotille
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from app.cli.terminal import EXIT_INTERRUPTED, Failure, detail_of, errors, is_interactive, percent
from graft_client import Event, Graft, Job, Model

PLOT_ROWS = 9
PLOT_COLUMNS = 72
# Below so many rows of the terminal there is the bar alone.
LEAST_ROWS = 20
# What plotille writes to the left of its canvas.
MARGIN_COLUMNS = 20
COLOURS = ("green", "cyan", "magenta", "yellow", "blue", "red")


def watch(graft: Graft, job_id: str) -> Job:
    """Shows a job's events until it has ended, and returns it. Ctrl-C ends the watching, not the job."""
    errors.print(f"Job {job_id}")
    display = Display() if is_interactive() else Lines()
    try:
        with display.shown():
            for event in graft.jobs.follow(job_id):
                display.take(event)
    except KeyboardInterrupt:
        raise Failure(
            f"The job goes on. `graft jobs watch {job_id}` follows it, `graft jobs cancel {job_id}` ends it.",
            exit_code=EXIT_INTERRUPTED,
        ) from None
    return graft.jobs.get(job_id)


def model_of(graft: Graft, job: Job) -> Model:
    """The model that a job has made. Raises Failure, with the reason, for a job that made none."""
    if job.status == "succeeded" and job.model is not None:
        return graft.models.get(job.model)
    if job.status == "failed":
        raise Failure(f"Job {job.id} failed: {detail_of(job.error)}")
    raise Failure(f"Job {job.id} is {job.status}.")


class Lines:
    """Epochs and messages, a line each."""

    @contextmanager
    def shown(self) -> Iterator[None]:
        yield

    def take(self, event: Event) -> None:
        if event.event == "epoch":
            errors.print(epoch_line(event.data), soft_wrap=True)
        elif event.event == "log":
            errors.print(event.data.get("message", ""), markup=False, soft_wrap=True)


class Display:
    """What moves: the bar, and above it the plot once there are two epochs."""

    def __init__(self) -> None:
        self._epochs = Epochs()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[reached]}"),
            console=errors,
        )
        self._task = self._bar.add_task("queued", total=None, reached="")
        self._lock = threading.Lock()  # the screen is drawn by a thread of its own

    @contextmanager
    def shown(self) -> Iterator[None]:
        with Live(get_renderable=self._drawn, console=errors, refresh_per_second=8, vertical_overflow="visible"):
            yield

    def take(self, event: Event) -> None:
        match event.event:
            case "status":
                self._bar.update(self._task, description=event.data.get("status", ""))
            case "progress":
                self._show_progress(event.data)
            case "epoch":
                with self._lock:
                    self._epochs.add(event.data)
                self._bar.update(self._task, reached=self._epochs.reached)
            case "log":
                errors.print(event.data.get("message", ""), style="dim", markup=False, soft_wrap=True)

    def _show_progress(self, progress: dict[str, Any]) -> None:
        epochs, fraction = progress.get("epochs"), progress.get("fraction")
        self._bar.update(self._task, description=progress.get("stage", "train"), total=epochs)
        if epochs and fraction is not None:
            self._bar.update(self._task, completed=round(fraction * epochs, 2))

    def _drawn(self) -> RenderableType:
        if errors.height < LEAST_ROWS:
            return self._bar
        with self._lock:
            plot = self._epochs.plot(min(errors.width, PLOT_COLUMNS + MARGIN_COLUMNS) - MARGIN_COLUMNS)
        return self._bar if plot is None else Group(plot, self._bar)


@dataclass
class Epochs:
    """What a job's epochs reached. Where several methods compete, each has epochs of its own.

    curves: by what they are called, validation accuracies, or losses where nothing is told apart, by epoch.
    """

    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    reached: str = ""
    quantity: str = "accuracy"

    def add(self, epoch: dict[str, Any]) -> None:
        accuracy = epoch.get("val_accuracy")
        self.quantity = "loss" if accuracy is None else "accuracy"
        number, method = epoch["epoch"], epoch.get("method")
        for split, name in (("val", "validation"), ("train", "training")):
            value = epoch.get(f"{split}_{self.quantity}")
            # Of competing methods only what they are compared by, so that the curves can be told apart.
            if value is not None and (split == "val" or method is None):
                self.curves.setdefault(method or name, {})[number] = value
        if accuracy is None:
            loss = epoch.get("val_loss")
            self.reached = "" if loss is None else f"loss {loss:.4f}"
            return
        best = max(value for name, curve in self.curves.items() if name != "training" for value in curve.values())
        self.reached = f"accuracy {percent(accuracy)}" + ("" if accuracy == best else f" (best {percent(best)})")

    def plot(self, columns: int) -> RenderableType | None:
        """None for less than two epochs: a point is no curve."""
        if max((len(curve) for curve in self.curves.values()), default=0) < 2 or columns < 20:
            return None
        is_accuracy = self.quantity == "accuracy"
        figure = plotille.Figure()
        figure.width, figure.height = columns, PLOT_ROWS
        figure.color_mode = "names"
        figure.x_label, figure.y_label = "epoch", self.quantity
        figure.origin = False
        figure.set_x_limits(min_=1, max_=max(2, *(max(curve) for curve in self.curves.values())))
        figure.x_ticks_fkt = lambda value, _: f"{value:.1f}".removesuffix(".0")
        figure.y_ticks_fkt = lambda value, _: percent(value) if is_accuracy else f"{value:.3f}"
        values = [value for curve in self.curves.values() for value in curve.values()]
        margin = 0.05 * (max(values) - min(values)) or 0.01
        top = max(values) + margin
        figure.set_y_limits(min_=min(values) - margin, max_=min(top, 1.0) if is_accuracy else top)
        drawn = Text()
        for position, (name, curve) in enumerate(self.curves.items()):
            colour = COLOURS[position % len(COLOURS)]
            figure.plot(list(curve), list(curve.values()), lc=colour)
            drawn.append(f"  ── {name}", style=colour)
        drawn.append("\n")
        drawn.append_text(Text.from_ansi(figure.show()))
        return drawn


def epoch_line(epoch: dict[str, Any]) -> str:
    method = epoch.get("method")  # where several compete
    parts = [f"epoch {epoch['epoch']:3}", *([method] if method else [])]
    for split in ("train", "val"):
        accuracy = epoch[f"{split}_accuracy"]  # none where nothing is told apart
        shown = "" if accuracy is None else f" accuracy {percent(accuracy)}"
        loss = epoch[f"{split}_loss"]  # none where it is no number
        parts.append(
            f"{'validation' if split == 'val' else split} loss {'–' if loss is None else f'{loss:.4f}'}{shown}"
        )
    parts += [f"{name.replace('_', ' ')} {value:.3f}" for name, value in (epoch.get("figures") or {}).items()]
    return "   ".join(parts)
