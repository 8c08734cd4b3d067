"""Predictions that are kept because their request asks for it: pictures to the storage, rows to the database, and both
away again when there are too many or they are too old. Knows no requests.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from sqlalchemy.exc import SQLAlchemyError

from app import holdings, predictions
from app.api.schemas import Prediction
from app.clock import PatientClock
from app.datasets.manifest import digest_of
from app.db.engine import Database
from app.db.tables import new_id
from app.errors import FieldError, Forbidden, Overloaded, TooLarge
from app.predictions import Kept, picture_key
from app.serving.scores import Scores
from app.settings import Settings
from app.storage import LocalStorage
from app.workspaces import Workspace

# Of one transaction that deletes.
PICTURES_AT_A_TIME = 100


@dataclass(frozen=True)
class Shelf:
    """Where predictions are kept, and how many."""

    database: Database
    storage: LocalStorage
    settings: Settings
    clock: PatientClock

    def check_is_open(self) -> None:
        """Raises Forbidden where the operator keeps nothing."""
        if not self.settings.store_predictions:
            raise Forbidden(
                "This server keeps no pictures; send the request without store.",
                code="storing-is-off",
                title="Predictions are not kept here",
                errors=[FieldError("#/store", "is turned off on this server")],
            )

    def keep(
        self,
        workspace: Workspace,
        model_id: str,
        alias: str | None,
        answered: Sequence[tuple[bytes, Scores, Prediction]],
    ) -> list[Prediction]:
        """The predictions with ids, kept together with their encoded pictures and what the model itself said: all of
        them, or none.

        Raises TooLarge for more bytes than are ever kept, StorageFull, TooManyRequests where the workspace's quota has
        no room, and NotFound if the model was just deleted.
        """
        size_bytes = sum(len(picture) for picture, _, _ in answered)
        if size_bytes > self.settings.max_stored_prediction_bytes:
            raise TooLarge("The pictures are more than this server keeps; send the request without store.")
        self.storage.check_room(size_bytes)
        kept = [_kept(*one) for one in answered]
        keys = [picture_key(one.id) for one in kept]
        with self.storage.announced(*keys, is_wanted=partial(holdings.has_row, self.database)):
            for key, (picture, _, _) in zip(keys, answered, strict=True):
                with self.storage.staging() as staged:
                    staged.write_bytes(picture)
                    self.storage.publish(staged, key)
            with self.database.write() as session:
                workspace.check_room(session, size_bytes)
                predictions.add(session, kept, model_id=model_id, alias=alias)
        # They are kept whatever comes of others; what is not deleted now is in an hour.
        with suppress(OSError, SQLAlchemyError, Overloaded):
            self.expire()
        return [
            prediction.model_copy(update={"id": one.id}) for one, (_, _, prediction) in zip(kept, answered, strict=True)
        ]

    def expire(self) -> None:
        """Deletes what the workspace has that is too old, and the oldest of what is too much."""
        while ids := self._expired():
            holdings.delete(
                self.database,
                self.storage,
                *map(picture_key, ids),
                rows=partial(predictions.forget, prediction_ids=ids),
            )

    def _expired(self) -> list[str]:
        with self.database.read() as session:
            return predictions.expired(
                session,
                max_bytes=self.settings.max_stored_prediction_bytes,
                before=self.clock.before(timedelta(days=self.settings.max_stored_prediction_days)),
                limit=PICTURES_AT_A_TIME,
            )


def _kept(picture: bytes, own: Scores, prediction: Prediction) -> Kept:
    return Kept(
        id=new_id("prd"),
        filename=prediction.filename,
        size_bytes=len(picture),
        sha256=digest_of(picture),
        predicted=own.labels,  # and not what a copy of it said that was tuned to the picture
        answer=prediction.model_dump(mode="json", include={"label", "score", "top", "tasks"}),
    )
