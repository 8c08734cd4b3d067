"""What ingest found out about a data set: the fields that a caller sees, and what looking closer needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.errors import GraftError

# Longer lists are cut, with the total said: a row of the database is no place for a million paths.
MAX_LISTED_PATHS = 100
MAX_LISTED_REJECTED = 1000


@dataclass(frozen=True)
class IngestReport:
    """The report of one ingest. With `error` the data set cannot be used, and the rest says as much as is known."""

    num_images: int
    num_rejected: int  # in all, however many are listed
    splits: dict[str, int]  # {"train", "val", "test"}
    classes: list[dict[str, Any]]  # {"name", "train", "val", "test"}, in the order of labels
    rejected: list[dict[str, str]]  # {"path", "reason"}, the first MAX_LISTED_REJECTED
    tasks: list[dict[str, Any]] = field(default_factory=list)  # {"name", "classes"}, where there are several
    warnings: list[dict[str, Any]] = field(default_factory=list)  # as `warning` makes them, each code once
    error: GraftError | None = None
    packed_bytes: int | None = None  # of the pixel store, where there is one
    # Not for callers: the group of near copies of each image, in the manifest's order; None without a manifest.
    groups: tuple[int, ...] | None = field(default=None, repr=False)


def warning(
    code: str,
    detail: str,
    paths: Sequence[str] = (),
    *,
    groups: Sequence[Sequence[str]] = (),
    suggested: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A warning as callers see it, but for the length of its lists.

    groups: which of the paths belong together, as copies of each other. suggested: path → class that it looks like.
    """
    found: dict[str, Any] = {"code": code, "detail": detail, "paths": list(paths)}
    if groups:
        found["groups"] = [list(group) for group in groups]
    return found | ({"suggested": dict(suggested)} if suggested else {})


def merged(warnings: Sequence[Mapping[str, Any]], more: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All of them, each code once: with the details of both, and each path once."""
    found = {each["code"]: dict(each) for each in warnings}
    for each in more:
        first = found.get(each["code"])
        found[each["code"]] = dict(each) if first is None else _united(first, each)
    return list(found.values())


def shortened(found: Mapping[str, Any]) -> dict[str, Any]:
    """The warning with a long list of paths cut, and the detail saying how many there are."""
    detail, paths = found["detail"], found["paths"]
    if len(paths) > MAX_LISTED_PATHS:
        detail = f"{detail} (The first {MAX_LISTED_PATHS} of {len(paths)} are listed.)"
    listed = paths[:MAX_LISTED_PATHS]
    kept = set(listed)
    groups = [[path for path in group if path in kept] for group in found.get("groups", [])]
    suggested = {path: name for path, name in found.get("suggested", {}).items() if path in kept}
    return warning(
        found["code"], detail, listed, groups=[group for group in groups if len(group) > 1], suggested=suggested
    )


def _united(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    paths = dict.fromkeys([*first["paths"], *second["paths"]])
    return warning(
        first["code"],
        f"{first['detail']} {second['detail']}",
        list(paths),
        groups=[*first.get("groups", []), *second.get("groups", [])],
        suggested=first.get("suggested", {}) | second.get("suggested", {}),
    )
