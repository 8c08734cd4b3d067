"""A batch: a job of kind prediction. What its uploader asked for, and where its files lie.

Written by the API and read by the worker; knows keys and records, not pictures, not models.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class BatchSpec(BaseModel):
    """Stored with the job. files: in the archive, each of which becomes a row; size_bytes, sha256: of the archive."""

    model_config = ConfigDict(frozen=True)

    top_k: Annotated[int, Field(ge=1)]
    files: int
    size_bytes: int
    sha256: str


def folder_key(batch_id: str) -> str:
    return f"batches/{batch_id}"


def archive_key(batch_id: str) -> str:
    return f"{folder_key(batch_id)}/archive"


def results_key(batch_id: str, fence: int) -> str:
    """A folder of `results.jsonl` and `results.csv`. Each run publishes under its own fence, so that one that lost its
    claim meanwhile replaces nothing; the fence of the job's row says which run it was that succeeded."""
    return f"{folder_key(batch_id)}/results-{fence}"
