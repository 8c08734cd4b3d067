"""What ingest found out about a data set: exactly the fields that a caller sees."""

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
    warnings: list[dict[str, Any]] = field(default_factory=list)  # {"code", "detail", "paths"}
    error: GraftError | None = None


def warning(code: str, detail: str, paths: list[str] | None = None) -> dict[str, Any]:
    """A warning as callers see it; a long list of paths is cut, and the detail says how many there are."""
    paths = paths or []
    if len(paths) > MAX_LISTED_PATHS:
        detail = f"{detail} (The first {MAX_LISTED_PATHS} of {len(paths)} are listed.)"
    return {"code": code, "detail": detail, "paths": paths[:MAX_LISTED_PATHS]}
