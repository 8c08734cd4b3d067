"""The model card: what a model was made from, how well it does, and where it may fail, in Markdown for people.

After Mitchell et al. 2019. Written from what is stored, anew each time. Knows rows and records; not HTTP.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from app.db.tables import DatasetRow, ModelRow
from app.vision.backbones import BACKBONES

# Longer tables are cut, with the total said: a card is read by people.
_MOST_CLASSES = 100
# Below so many validation pictures a class's figures say little.
_FEW = 30


def card(model: ModelRow, dataset: DatasetRow | None, evaluation: Mapping[str, Any], spec: Mapping[str, Any]) -> str:
    """dataset: None where it was deleted. evaluation: as stored, empty for a backbone. spec: of the job."""
    sections = [
        [f"# {model.id}", "", *_summary(model)],
        ["## Data", "", *_data(model, dataset)],
        ["## Training", "", *_training(model, spec)],
        ["## How well it does", "", *_figures(model, evaluation)],
        ["## Limits", "", *_limits(model, dataset, evaluation)],
        ["## Use", "", *_use(model)],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def _summary(model: ModelRow) -> Iterator[str]:
    if not model.classes:
        yield f"A backbone, {model.backbone['name']}, to start training from; it tells no classes apart."
        return
    for task in model.each_task:
        told = f"{task['name']}: " if task["name"] else "An image classifier of "
        names = ", ".join(task["classes"][:20])
        more = f" and {len(task['classes']) - 20} more" if len(task["classes"]) > 20 else ""
        yield f"{told}{len(task['classes'])} classes: {names}{more}."


def _data(model: ModelRow, dataset: DatasetRow | None) -> Iterator[str]:
    if dataset is None:
        yield f"The data set {model.dataset_id} was deleted since."
        return
    splits = dataset.splits
    yield (
        f"{dataset.name} ({dataset.id}): {dataset.num_images} pictures, {splits['train']} to train, {splits['val']} to "
        f"validate, {splits['test']} to test; {dataset.num_rejected} files were left out. SHA-256 of the archive: "
        f"`{dataset.sha256}`."
    )
    if dataset.classes:
        yield ""
        yield from _table(
            ["class", "train", "validation", "test"],
            [[row["name"], row["train"], row["val"], row["test"]] for row in dataset.classes],
        )


def _training(model: ModelRow, spec: Mapping[str, Any]) -> Iterator[str]:
    name = model.backbone["name"]
    licence = BACKBONES[name].license if name in BACKBONES else "unknown"
    weights = model.backbone.get("weights")
    start = f"weights {weights} ({licence})" if weights else "its own or an earlier model's weights"
    yield f"Method `{model.method}` on {name}, from {start}."
    if spec:
        yield f"Recipe `{spec.get('recipe')}`, seed {spec.get('seed')}."
        yield ""
        values = {key: value for key, value in (spec.get("hyperparameters") or {}).items() if value is not None}
        yield from _table(["hyperparameter", "value"], [[key, value] for key, value in sorted(values.items())])


def _figures(model: ModelRow, evaluation: Mapping[str, Any]) -> Iterator[str]:
    metrics = model.metrics
    if not evaluation:
        yield "A backbone has no figures of its own; what it is worth shows in models that start from it."
        return
    yield from _table(
        ["figure", "validation", "95 % interval"],
        [
            ["accuracy", _rounded(metrics.get("val_accuracy")), _interval(metrics.get("val_accuracy_ci95"))],
            ["macro-F1", _rounded(metrics.get("macro_f1")), _interval(metrics.get("macro_f1_ci95"))],
            ["calibration error", _rounded(metrics.get("expected_calibration_error")), ""],
        ],
    )
    if "test_accuracy" in metrics:
        interval = _interval(metrics.get("test_accuracy_ci95"))
        yield ""
        yield f"On the test pictures, which chose nothing: accuracy {_rounded(metrics['test_accuracy'])} ({interval})."
    yield ""
    yield from _table(
        ["class", "precision", "recall", "F1", "validation pictures"],
        [
            [row["name"], *(_rounded(row[name]) for name in ("precision", "recall", "f1")), row["support"]]
            for row in evaluation["per_class"]
        ],
    )


def _limits(model: ModelRow, dataset: DatasetRow | None, evaluation: Mapping[str, Any]) -> Iterator[str]:
    yield "- It knows the classes above alone: a picture of anything else is given one of them."
    if evaluation:
        yield "- Validation pictures chose its best epoch and its calibration, so its figures are a little too good."
    for warning in evaluation.get("warnings", []):
        yield f"- {warning}"
    if few := [row["name"] for row in evaluation.get("per_class", []) if row["support"] < _FEW]:
        shown = ", ".join(few[:20]) + (f" and {len(few) - 20} more" if len(few) > 20 else "")
        yield f"- Fewer than {_FEW} validation pictures, so that the class's own figures are rough: {shown}."
    for warning in dataset.warnings if dataset else []:
        yield f"- {warning['detail']}"


def _use(model: ModelRow) -> Iterator[str]:
    if not model.classes:
        yield f'A job starts from it with `"backbone": "{model.id}"`.'
        return
    yield "```"
    yield f'curl -F file=@picture.jpg "localhost:8000/predict?model={model.id}"'
    yield f'curl -OJ "localhost:8000/v1/models/{model.id}/export?format=onnx"'
    yield "```"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"| {' | '.join('---' for _ in header)} |"
    for row in rows[:_MOST_CLASSES]:
        yield f"| {' | '.join(_cell(value) for value in row)} |"
    if len(rows) > _MOST_CLASSES:
        yield f"\nThe first {_MOST_CLASSES} of {len(rows)}."


def _cell(value: Any) -> str:
    """Class names are anybody's text: what would end a cell, or begin markup, does not."""
    text = str(value).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return " ".join(text.split())


def _rounded(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "-"


def _interval(values: Any) -> str:
    return f"{values[0]:.3f} to {values[1]:.3f}" if values else ""
