"""A model's card: one page of Markdown from what is stored of it. What data, how trained, what numbers, what limits.

Knows rows and records; not HTTP. It states, and concludes nothing that nobody measured. Names that callers chose are
escaped: a card is shown in web pages.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from app import registry
from app.api.evaluation import read_evaluation
from app.api.schemas import Evaluation, SplitEvaluation, TaskEvaluation
from app.datasets import catalog
from app.db.tables import DatasetRow, JobRow, ModelRow
from app.errors import ModelUnavailable, NotFound, listed
from app.jobs import queue
from app.storage import LocalStorage
from app.vision import artifact
from app.vision.backbones import BACKBONES
from app.vision.evaluate import FEWEST_IMAGES_PER_CLASS

Row = TypeVar("Row")

# Of a longer list the rest is counted: a data set may have thousands of rejected files.
MOST_LISTED = 10
# Largest class over smallest, from which on the small ones are worth a sentence.
NOTABLE_IMBALANCE = 3.0


@dataclass(frozen=True)
class Facts:
    """All that is known of a model. dataset, job: None once deleted. evaluation: None for a backbone, or if lost."""

    model: ModelRow
    dataset: DatasetRow | None
    job: JobRow | None
    evaluation: Evaluation | None
    description: Mapping[str, Any]  # the artifact's model.json

    @property
    def spec(self) -> Mapping[str, Any]:
        """As it was resolved; empty for a model of which that was not kept."""
        found: Mapping[str, Any] = self.description["metadata"].get("spec") or {}
        return found

    @property
    def title(self) -> str:
        return self.dataset.name if self.dataset else self.model.id


def gather(session: Session, storage: LocalStorage, name: str) -> Facts:
    """Raises NotFound, and ModelUnavailable if the model's own files are missing or damaged."""
    model = registry.find(session, name)
    return Facts(
        model=model,
        dataset=_unless_gone(lambda: catalog.find(session, model.dataset_id)),
        job=_unless_gone(lambda: queue.find(session, model.job_id)),
        evaluation=_evaluation(model, storage),
        description=artifact.load_description(storage.path(f"models/{model.id}")),
    )


def weights_license(model: ModelRow) -> str:
    """Of what training began with, in a sentence."""
    start, weights = model.backbone.get("model"), model.backbone.get("weights")
    if start:
        return f"It was begun from the model {start}, whose card says what that was made from."
    published = [w for w in BACKBONES[model.backbone["name"]].weights if w.name == weights]
    if not published:
        return "No pretrained weights: it was trained from nothing."
    return published[0].license


def render(facts: Facts) -> str:
    """The card, in Markdown."""
    sections = (_head, _data, _training, _numbers, _limits, _licence, _use)
    return "\n".join(line for section in sections for line in section(facts)).rstrip() + "\n"


_MADE_FROM = {"extended": "with one class more", "personalised": "after it learnt a few labelled pictures more"}


def _head(facts: Facts) -> list[str]:
    model = facts.model
    classes = f"tells {len(model.classes)} classes apart" if model.classes else "is a backbone without classes"
    if model.tasks:
        named = ", ".join(f"{_text(task['name'])} ({len(task['classes'])} classes)" for task in model.tasks)
        classes = f"tells several things of a picture: {named}"
    return [
        f"# Model card: {_text(facts.title)}",
        "",
        f"A {model.backbone['name']} that {classes}. Model `{model.id}`, made by Graft "
        f"{facts.description['graft_version']} on {model.created_at:%Y-%m-%d} with the method `{model.method}`.",
        *([f"It is `{model.parent_id}` {_MADE_FROM[model.role]}."] if model.parent_id else []),
        "",
    ]


# Data


def _data(facts: Facts) -> list[str]:
    dataset = facts.dataset
    if dataset is None:
        lines = [f"The data set `{facts.model.dataset_id}` has been deleted since; its counts went with it."]
    else:
        splits = ", ".join(f"{count} for {name}" for name, count in _split_counts(dataset) if count)
        lines = [
            f"Data set **{_text(dataset.name)}**, `{dataset.id}`: {dataset.num_images} pictures ({splits}).",
            f"Its archive has {dataset.size_bytes:,} bytes and the SHA-256 `{dataset.sha256}`.",
            *_split_origin(dataset),
            *_excluded(facts.spec),
            "",
            *_listed("Rejected files", [f"{r['path']}: {r['reason']}" for r in dataset.rejected], dataset.num_rejected),
            *_listed("Warnings", [f"{w['code']}: {w['detail']}" for w in dataset.warnings]),
        ]
    return ["## Data", "", *lines, "", *_class_table(facts), ""]


def _split_counts(dataset: DatasetRow) -> list[tuple[str, int]]:
    names = {"train": "training", "val": "validation", "test": "test"}
    return [(name, dataset.splits.get(split, 0)) for split, name in names.items()]


def _split_origin(dataset: DatasetRow) -> list[str]:
    fraction = dataset.options.get("val_fraction")
    if fraction is None:
        return []
    seed = dataset.options.get("seed", 0)
    return [f"Where the archive has no split, {fraction:.0%} of each class became validation (seed {seed})."]


def _excluded(spec: Mapping[str, Any]) -> list[str]:
    excluded = spec.get("exclude") or []
    return [f"{len(excluded)} images were left out at the job's request."] if excluded else []


def _class_table(facts: Facts) -> list[str]:
    model, dataset = facts.model, facts.dataset
    if not model.classes:
        return []
    counted = (dataset.tasks or [{"name": "", "classes": dataset.classes}]) if dataset else []
    counts = {(task["name"], row["name"]): row for task in counted for row in task["classes"]}
    rows = []
    for task in model.each_task:
        for name in task["classes"]:
            row = counts.get((task["name"], name))
            shown = f"{task['name']}: {name}" if model.tasks else name
            rows.append([_text(shown), *(str(row[split]) if row else "–" for split in ("train", "val", "test"))])
    return _table(["class", "training", "validation", "test"], rows)


# Training


def _training(facts: Facts) -> list[str]:
    model, spec, description = facts.model, facts.spec, facts.description
    preprocessing = description["preprocessing"]
    values = {name: value for name, value in (spec.get("hyperparameters") or {}).items() if value is not None}
    return [
        "## Training",
        "",
        *_bullets(
            [
                f"Method `{model.method}`" + (f", recipe `{spec['recipe']}`, seed {spec['seed']}." if spec else "."),
                f"Backbone `{model.backbone['name']}`, weights `{model.backbone.get('weights') or 'none'}`; its head "
                f"reads the layer `{description['feature_layer']}`.",
                *_duration(facts.job),
                f"Pictures: short side {preprocessing['resize']} pixels ({preprocessing['interpolation']}, "
                f"antialiased), central square of {preprocessing['crop']}, mean {preprocessing['mean']}, "
                f"standard deviation {preprocessing['std']}.",
                *([f"PyTorch {version}."] if (version := description["metadata"].get("torch")) else []),
                *map(_text, spec.get("reasons") or []),
            ]
        ),
        "",
        *(
            _table(["hyperparameter", "value"], [[f"`{k}`", f"`{json.dumps(v)}`"] for k, v in values.items()])
            if values
            else []
        ),
        "",
    ]


def _duration(job: JobRow | None) -> list[str]:
    if job is None or job.started_at is None or job.finished_at is None:
        return []
    seconds = (job.finished_at - job.started_at).total_seconds()
    again = f", in {job.attempt} attempts" if job.attempt > 1 else ""
    return [f"Job `{job.id}` took {seconds:.0f} s{again}."]


# Numbers


def _numbers(facts: Facts) -> list[str]:
    evaluation = facts.evaluation
    if not facts.model.classes:
        return ["## Numbers", "", *_figures(facts.model.metrics), ""]
    if evaluation is None:
        return ["## Numbers", "", "The evaluation is missing; what was recorded with the model:", "",
                *_figures(facts.model.metrics), ""]  # fmt: skip
    tasks: Mapping[str, TaskEvaluation] = evaluation.tasks or {"": evaluation}
    uncalibrated = facts.model.metrics.get("expected_calibration_error_uncalibrated")
    before = "" if uncalibrated is None else f" (before: {uncalibrated:.3f})"
    calibration = (
        f"Scores are calibrated with the temperature {facts.description['temperature']:.3f}, fitted on the validation "
        f"images; expected calibration error {_number(evaluation.expected_calibration_error)}{before}."
    )
    return [
        "## Numbers",
        "",
        *([] if evaluation.tasks else [calibration, ""]),
        *(line for name, task in tasks.items() for line in _task(name, task)),
    ]


def _task(name: str, found: TaskEvaluation) -> list[str]:
    return [
        *([f"### {_text(name)}", ""] if name else []),
        *_split("validation", found),
        *(_split("test", found.test) if found.test else []),
        *_confusions(found),
    ]


def _split(name: str, found: SplitEvaluation) -> list[str]:
    rows = [
        [_text(c.name), *map(_number, (c.precision, c.recall)), _interval(c.recall_ci95), _number(c.f1), str(c.support)]
        for c in found.per_class
    ]
    return [
        f"On {found.images} {name} images: accuracy **{_number(found.accuracy)}** "
        f"(95 % interval {_interval(found.accuracy_ci95)}), macro-F1 {_number(found.macro_f1)} "
        f"({_interval(found.macro_f1_ci95)}), loss {_number(found.loss)}.",
        "",
        *_table(["class", "precision", "recall", "95 % interval", "F1", "images"], rows),
        "",
    ]


def _confusions(found: SplitEvaluation) -> list[str]:
    pairs = [
        (count, true, predicted)
        for true, row in zip(found.classes, found.confusion_matrix, strict=True)
        for predicted, count in zip(found.classes, row, strict=True)
        if count and true != predicted
    ]
    most = sorted(pairs, key=lambda pair: -pair[0])
    lines = [f"{count} × {true} taken for {predicted}" for count, true, predicted in most]
    return _listed("Most frequent mistakes", lines)


def _figures(metrics: Mapping[str, Any]) -> list[str]:
    return _bullets(f"{name}: {_number(value)}" for name, value in metrics.items() if isinstance(value, int | float))


# Limits


def _limits(facts: Facts) -> list[str]:
    if not facts.model.classes:
        limits = ["It gives features, and no classes: a head has to be trained on them."]
    else:
        limits = [
            "It knows the classes above and nothing else: a picture of anything else gets one of them too.",
            "It was measured on pictures of its own data set. Other cameras, places, times or people were not looked "
            "at, nor whether it treats groups of them alike.",
            *_optimism(facts),
            *_small_classes(facts),
            *_imbalance(facts),
            *(map(_text, facts.evaluation.warnings) if facts.evaluation else []),
            *_doubts_about_data(facts.dataset),
            *_forecast(facts.evaluation),
        ]
    return ["## Limits", "", *_bullets(limits), ""]


def _optimism(facts: Facts) -> list[str]:
    advice = "the test figures are not" if facts.evaluation and facts.evaluation.test else "there was no test split"
    return [
        "The validation images were also used to calibrate, and where epochs or methods competed, to choose between "
        f"them: their figures are a little optimistic; {advice}."
    ]


def _small_classes(facts: Facts) -> list[str]:
    if facts.evaluation is None:
        return []
    small = [c for c in facts.evaluation.per_class if c.support < FEWEST_IMAGES_PER_CLASS]
    if not small:
        return []
    named = listed([f"{_text(c.name)} ({c.support})" for c in small], most=MOST_LISTED)
    return [f"Fewer than {FEWEST_IMAGES_PER_CLASS} validation images, so their figures say little: {named}."]


def _imbalance(facts: Facts) -> list[str]:
    counts = [(row["train"], row["name"]) for row in facts.dataset.classes if row["train"]] if facts.dataset else []
    if not counts or max(counts)[0] < NOTABLE_IMBALANCE * min(counts)[0]:
        return []
    (most, largest), (least, smallest) = max(counts), min(counts)
    return [f"Classes are uneven: {most} training pictures of {_text(largest)}, {least} of {_text(smallest)}."]


def _doubts_about_data(dataset: DatasetRow | None) -> list[str]:
    return ["The data set came with warnings; they are listed above."] if dataset and dataset.warnings else []


def _forecast(evaluation: Evaluation | None) -> list[str]:
    sentence = ((evaluation and evaluation.forecast) or {}).get("sentence")
    return [_text(sentence)] if sentence else []


# Licence and use


def _licence(facts: Facts) -> list[str]:
    return [
        "## Licence",
        "",
        f"Weights it began with: {_text(weights_license(facts.model))}",
        "What the pictures' owners allow is not known to Graft.",
        "",
    ]


def _use(facts: Facts) -> list[str]:
    address = "http://localhost:8000"
    ask = (
        f'curl -F file=@picture.jpg "{address}/predict?model={facts.model.id}"'
        if facts.model.classes
        else f"""curl {address}/v1/jobs -d '{{"dataset": "ds_…", "backbone": "{facts.model.id}"}}'"""
    )
    return [
        "## Use",
        "",
        "```bash",
        ask,
        f'curl -o model.onnx "{address}/v1/models/{facts.model.id}/export?format=onnx"',
        "```",
    ]


# Markdown


def _text(text: str) -> str:
    """A text as it is, whatever Markdown or HTML would make of it; on one line."""
    one_line = "".join(character if character.isprintable() else " " for character in str(text))
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", one_line)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _bullets(lines: Iterable[str]) -> list[str]:
    return [f"- {line}" for line in lines]


def _listed(title: str, lines: Sequence[str], count: int | None = None) -> list[str]:
    """A title and the first lines; nothing where there are none. count: of all, where `lines` are not all."""
    count = len(lines) if count is None else count
    if not count:
        return []
    shown = [_text(line) for line in lines[:MOST_LISTED]]
    rest = [f"and {count - len(shown)} more"] if count > len(shown) else []
    return [f"{title} ({count}):", "", *_bullets([*shown, *rest]), ""]


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _interval(bounds: Sequence[float | None] | None) -> str:
    return "–" if bounds is None else f"{_number(bounds[0])} to {_number(bounds[1])}"


def _unless_gone(find: Callable[[], Row]) -> Row | None:
    try:
        return find()
    except NotFound:
        return None


def _evaluation(model: ModelRow, storage: LocalStorage) -> Evaluation | None:
    try:
        return read_evaluation(model, storage) if model.classes else None
    except ModelUnavailable:
        return None
