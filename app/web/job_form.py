"""The form of a new job: every option of JobRequest, explained by its own description, and read back from text."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import annotated_types
from pydantic.fields import FieldInfo

from app.errors import GraftError
from app.jobs.request import Hyperparameters, JobRequest, Method, Promote, Recipe, parse_request

METHODS: dict[Method | Literal["auto"], str] = {
    "auto": "Chooses from the data: a model at once, then the tunings compete with it, and the best one wins.",
    "feature_extraction": "A new head on a network that stays as it is. Seconds; the least to go wrong.",
    "fine_tuning": "The last stages of the network learn, too. Minutes; for pictures unlike photographs.",
    "full_fine_tuning": "All of the network learns. The longest; for large data sets.",
    "few_shot": "From one picture of a class on; classes can be added later, in a second.",
    "from_scratch": "Without anything learnt before. For comparison, or to make a backbone of one's own.",
    "self_supervised": "A backbone from pictures without labels, to start later jobs from.",
}
RECIPES: dict[Recipe, str] = {"modern": "Our best settings.", "classic": "The textbook's, to compare with."}
PROMOTIONS: dict[Promote, str] = {
    "if_better": "Becomes the default model if it beats the one before beyond chance.",
    "always": "Becomes the default model whatever it scores.",
    "never": "The default model stays.",
}
CHOICES: dict[str, dict[Any, str]] = {"method": {**METHODS}, "recipe": {**RECIPES}, "promote": {**PROMOTIONS}}
# Shown first; all others are one click away.
NUMBERS = ("seed", "budget_seconds")


@dataclass(frozen=True)
class Option:
    """A hyperparameter as a field of the form."""

    name: str
    description: str
    choices: Sequence[str]  # none for a number or a text
    allowed: str  # such as "1 to 1000"; "" where the description says it


@dataclass(frozen=True)
class JobForm:
    """The form's fields as they were typed; each may be there several times."""

    fields: Sequence[tuple[str, str]]

    @classmethod
    def of(cls, fields: Sequence[tuple[str, str]]) -> Self:
        return cls(fields)

    @property
    def options(self) -> list[Option]:
        return [_option(name, field) for name, field in Hyperparameters.model_fields.items()]

    @property
    def choices(self) -> dict[str, dict[Any, str]]:
        return CHOICES

    def describe(self, name: str) -> str:
        return JobRequest.model_fields[name].description or ""

    def one(self, name: str) -> str:
        """The last one of this name; "" where there is none."""
        return next((text for given, text in reversed(self.fields) if given == name), "")

    @property
    def exclude(self) -> list[str]:
        """Paths to leave out, of boxes that were ticked and of the lines of a text, each once."""
        lines = [line.strip() for name, text in self.fields if name == "exclude" for line in text.splitlines()]
        return list(dict.fromkeys(line for line in lines if line))

    def request(self) -> JobRequest:
        """Raises InvalidRequest that names each bad field; what was left empty is left out."""
        body: dict[str, Any] = {
            name: text.strip()
            for name in ("dataset", "method", "backbone", "recipe", "promote", "name")
            if (text := self.one(name))
        }
        body |= {name: _value(text) for name in NUMBERS if (text := self.one(name).strip())}
        hyperparameters = {
            name: _value(text) for name in Hyperparameters.model_fields if (text := self.one(name).strip())
        }
        return parse_request(
            body
            | ({"hyperparameters": hyperparameters} if hyperparameters else {})
            | ({"exclude": self.exclude} if self.exclude else {})
        )

    def errors(self, error: GraftError | None) -> dict[str, str]:
        """What is wrong, by the field's name."""
        return {} if error is None else {each.pointer.split("/")[-1]: each.detail for each in error.errors}


def _value(text: str) -> Any:
    """A number, true or false; any other text stays one, and is judged by the request."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, or deeper than Python goes
        return text
    return value if isinstance(value, int | float) else text


def _option(name: str, field: FieldInfo) -> Option:
    return Option(name, field.description or "", _choices(field.annotation), _allowed(field.annotation))


def _choices(annotation: Any) -> list[str]:
    if getattr(annotation, "__origin__", None) is Literal:
        return list(get_args(annotation))
    return [choice for member in get_args(annotation) for choice in _choices(member)]


def _allowed(annotation: Any) -> str:
    """The range of a number, of the constraints that any of the annotation's members has."""
    found = [_allowed(member) for member in get_args(annotation)]
    constraints = [
        each for entry in getattr(annotation, "__metadata__", ()) for each in getattr(entry, "metadata", [entry])
    ]
    lows = [str(each.ge) for each in constraints if isinstance(each, annotated_types.Ge)]
    lows += [f"above {each.gt}" for each in constraints if isinstance(each, annotated_types.Gt)]
    highs = [str(each.le) for each in constraints if isinstance(each, annotated_types.Le)]
    highs += [f"below {each.lt}" for each in constraints if isinstance(each, annotated_types.Lt)]
    own = f"{lows[0]} to {highs[0]}" if lows and highs else ""
    return own or next(filter(None, found), "")
