"""JSON → the dataclasses of `answers.py`. Tolerant: members that a class does not know are left in `raw`, values are
taken as they come, and a member that a server of another version does not send is None or empty where that may be.
"""

import dataclasses
import functools
import types
from datetime import datetime
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from graft_client.errors import UnexpectedAnswer

T = TypeVar("T")


def decode(kind: type[T], value: Any) -> T:
    """value: parsed JSON. Raises UnexpectedAnswer where a member is missing that cannot be."""
    decoded: T = _decode(kind, value)
    return decoded


def _decode(kind: Any, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, dict) and dataclasses.is_dataclass(kind):
        return _decode_members(kind, value)
    if kind is datetime:
        return _moment(value)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is list and isinstance(value, list):
        return [_decode(arguments[0], each) for each in value]
    if origin is tuple and isinstance(value, list):
        return tuple(value)
    if origin is dict and isinstance(value, dict):
        return {name: _decode(arguments[1], each) for name, each in value.items()}
    if origin in (types.UnionType, Union):
        return _decode(_fitting([each for each in arguments if each is not types.NoneType], value), value)
    return value


def _decode_members(kind: Any, value: dict[str, Any]) -> Any:
    members = {}
    for name, json_name, member_kind in _members(kind):
        if json_name in value:
            members[name] = _decode(member_kind, value[json_name])
        else:
            members[name] = _absent(kind, json_name, member_kind)
    return kind(**members, raw=value)


@functools.cache
def _members(kind: Any) -> list[tuple[str, str, Any]]:
    """Name, name in JSON, and type of each member."""
    hints = get_type_hints(kind)
    fields = [each for each in dataclasses.fields(kind) if each.name != "raw"]
    return [(each.name, each.metadata.get("json", each.name), hints[each.name]) for each in fields]


def _absent(kind: Any, json_name: str, member_kind: Any) -> Any:
    if types.NoneType in get_args(member_kind):
        return None
    if get_origin(member_kind) in (list, dict):
        return get_origin(member_kind)()
    raise UnexpectedAnswer(f"The answer is no {kind.__name__} as Graft sends it: it has no {json_name!r}.")


def _fitting(kinds: list[Any], value: Any) -> Any:
    """Of several classes the first one whose indispensable members are there; the last one otherwise."""
    for kind in kinds[:-1]:
        if not dataclasses.is_dataclass(kind) or not isinstance(value, dict):
            continue
        members: list[tuple[str, str, Any]] = _members(kind)  # type: ignore[arg-type]
        needed = [name for _, name, member in members if types.NoneType not in get_args(member)]
        if all(name in value for name in needed):
            return kind
    return kinds[-1]


def _moment(value: Any) -> datetime:
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise UnexpectedAnswer(f"{value!r} is no time.") from None
