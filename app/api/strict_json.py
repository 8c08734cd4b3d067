"""JSON from outside, read strictly: what readers disagree about, or what cannot be stored, is refused and pointed at.

Knows bytes and pydantic models; not requests.
"""

import json
import math
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from app.api.problems import invalid_fields
from app.errors import FieldError, InvalidRequest

MAX_JSON_DEPTH = 32
MAX_WHOLE = 2**53

Body = TypeVar("Body", bound=BaseModel)


def parse_as(model: type[Body], content: Any) -> Body:
    """Raises InvalidRequest that points at each wrong field."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise invalid_fields(error.errors(include_url=False, include_input=False)) from None


def strict_json(body: bytes) -> dict[str, Any]:
    """A JSON object, and nothing that readers disagree about or that cannot be stored. A member's 5.0 is 5.

    Raises InvalidRequest for invalid UTF-8, duplicate names, NaN and infinities, lone surrogates, NUL, nesting beyond
    32, and everything that is not an object.
    """
    if not body.strip():
        raise InvalidRequest("The request has no body; send a JSON object.")
    try:
        content = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_object_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except UnicodeDecodeError:
        raise InvalidRequest("The body is not valid UTF-8.") from None
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"The body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON: {_number_trouble(error)}.") from None
    if not isinstance(content, dict):
        raise InvalidRequest("The body must be a JSON object, such as {…}.")
    _check_values(content, depth=1, pointer="#")
    return content


class _RefusedNumber(ValueError):
    pass


def _number_trouble(error: ValueError) -> str:
    return str(error) if isinstance(error, _RefusedNumber) else "a number in it is too long"


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = {name: _whole(value) if type(value) is float else value for name, value in pairs}
    if len(members) != len(pairs):
        twice = _first_repeated([name for name, _ in pairs])
        raise InvalidRequest(
            f"The name {json.dumps(twice)} occurs twice in one object.",
            errors=[FieldError(f"#/{_printable(twice)}", "occurs twice")],
        )
    return members


def _whole(value: float) -> float | int:
    """JSON has numbers alone, and 5.0 is the same one as 5; only that far does every reader keep whole ones exactly."""
    return int(value) if value.is_integer() and abs(value) <= MAX_WHOLE else value


def _first_repeated(names: list[str]) -> str:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    raise AssertionError("no name is repeated")


def _refuse_constant(constant: str) -> float:
    raise _RefusedNumber(f"{constant} is not a JSON number")


def _finite_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _RefusedNumber(f"the number {digits[:20]} is too large")
    return number


_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def _check_values(value: Any, *, depth: int, pointer: str) -> None:
    if isinstance(value, dict | list):
        if depth > MAX_JSON_DEPTH:
            raise _too_deep()
        members = value.items() if isinstance(value, dict) else enumerate(value)
        for name, member in members:
            if isinstance(name, str):
                _check_values(name, depth=depth, pointer=pointer)
            if not isinstance(member, str | dict | list):
                continue  # a tensor has millions of numbers
            inner = f"{pointer}/{str(name).replace('~', '~0').replace('/', '~1')}" if depth < 8 else pointer
            _check_values(member, depth=depth + 1, pointer=inner)
    elif isinstance(value, str) and _UNSTORABLE.search(value):
        raise InvalidRequest(
            "A text in the body holds a NUL character or half of a surrogate pair.",
            errors=[FieldError(_printable(pointer), "holds a character that cannot be stored")],
        )


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"The body is nested deeper than {MAX_JSON_DEPTH} levels.")


def _printable(text: str) -> str:
    return _UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", text)
