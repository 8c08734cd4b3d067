"""Models are registered once, found by id and alias, and aliases move and move back."""

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app import registry
from app.db.engine import Database
from app.errors import Conflict, InvalidRequest, NotFound

CLASSES = ["daisy", "rose"]


def register(session: Session, number: int, **changes: Any) -> str:
    """A model mdl_<number> of job_<number>. Returns its id."""
    values: dict[str, Any] = {
        "model_id": f"mdl_{number}",
        "job_id": f"job_{number}",
        "dataset_id": "ds_flowers",
        "method": "fine_tuning",
        "backbone": {"name": "resnet18", "weights": "IMAGENET1K_V1"},
        "classes": CLASSES,
        "metrics": {"val_accuracy": 0.9},
        "size_bytes": 1000,
        "sha256": "0" * 64,
    }
    return registry.register(session, **(values | changes)).id


def test_a_registered_model_is_found_by_id_and_by_alias(database: Database) -> None:
    with database.write() as session:
        register(session, 1)
        registry.point_alias(session, "default", "mdl_1")

    with database.read() as session:
        by_id, by_alias = registry.find(session, "mdl_1"), registry.find(session, "default")
        assert by_id is by_alias
        assert (by_id.job_id, by_id.classes, by_id.metrics) == ("job_1", ["daisy", "rose"], {"val_accuracy": 0.9})
        assert registry.default_model_id(session) == "mdl_1"


def test_a_job_cannot_register_a_second_model(database: Database) -> None:
    with database.write() as session:
        register(session, 1)

    with pytest.raises(IntegrityError), database.write() as session:
        register(session, 2, job_id="job_1")

    with database.read() as session:
        assert [m.id for m in registry.list_models(session, limit=10)] == ["mdl_1"]


def test_with_no_model_yet_not_found_says_how_to_train_one(database: Database) -> None:
    with database.read() as session, pytest.raises(NotFound, match=r"no model yet.*/v1/datasets.*/v1/jobs"):
        registry.find(session, "default")


def test_with_no_default_not_found_says_how_to_choose_one(database: Database) -> None:
    with database.write() as session:
        register(session, 1)

    with database.read() as session:
        with pytest.raises(NotFound, match="PUT /v1/aliases/default"):
            registry.find(session, "default")
        with pytest.raises(NotFound, match="no model with this id or alias"):
            registry.find(session, "other")


def test_models_are_listed_newest_first_page_by_page(database: Database) -> None:
    with database.write() as session:
        for number in range(1, 6):
            register(session, number)

    with database.read() as session:
        first = [m.id for m in registry.list_models(session, limit=2)]
        second = [m.id for m in registry.list_models(session, limit=2, after=first[-1])]
        third = [m.id for m in registry.list_models(session, limit=2, after=second[-1])]

    assert (first, second, third) == (["mdl_5", "mdl_4"], ["mdl_3", "mdl_2"], ["mdl_1"])


def test_lists_are_filtered_by_data_set_and_method(database: Database) -> None:
    with database.write() as session:
        register(session, 1)
        register(session, 2, dataset_id="ds_other")
        register(session, 3, method="from_scratch")

    with database.read() as session:
        flowers = [m.id for m in registry.list_models(session, limit=10, dataset="ds_flowers")]
        tuned = [m.id for m in registry.list_models(session, limit=10, method="fine_tuning")]

    assert (flowers, tuned) == (["mdl_3", "mdl_1"], ["mdl_2", "mdl_1"])


def test_a_page_after_an_unknown_model_is_refused(database: Database) -> None:
    with database.read() as session, pytest.raises(InvalidRequest, match="first page"):
        registry.list_models(session, limit=2, after="mdl_gone")


def test_an_alias_moves(database: Database) -> None:
    with database.write() as session:
        register(session, 1)
        register(session, 2)
        first = registry.point_alias(session, "stable", "mdl_1").updated_at
        registry.point_alias(session, "default", "mdl_1")

    with database.write() as session:
        registry.point_alias(session, "stable", "mdl_2")

    with database.read() as session:
        assert registry.find(session, "stable").id == "mdl_2"
        assert registry.aliases_of(session) == {"mdl_1": ["default"], "mdl_2": ["stable"]}
        assert [alias.name for alias in registry.aliases(session)] == ["default", "stable"]
        assert registry.aliases(session)[1].updated_at > first


@pytest.mark.parametrize(
    "name", ["", "Default", "-x", "a b", "a/b", "a" * 64, "mdl_x", "ds_x", "job_x", "key_x", "x\n"]
)
def test_names_that_are_no_alias_are_refused(database: Database, name: str) -> None:
    with database.write() as session:
        register(session, 1)
        with pytest.raises(InvalidRequest, match="An alias has 1 to 63 characters"):
            registry.point_alias(session, name, "mdl_1")


@pytest.mark.parametrize("name", ["a", "default", "v1.2_final-3", "7", "a" * 63])
def test_names_that_are_an_alias_are_taken(database: Database, name: str) -> None:
    with database.write() as session:
        register(session, 1)
        assert registry.point_alias(session, name, "mdl_1").name == name


def test_an_alias_cannot_point_at_what_is_not_there(database: Database) -> None:
    with database.write() as session, pytest.raises(NotFound):
        registry.point_alias(session, "default", "mdl_gone")


def test_a_removed_alias_is_gone(database: Database) -> None:
    with database.write() as session:
        register(session, 1)
        registry.point_alias(session, "stable", "mdl_1")
        registry.remove_alias(session, "stable")

    with database.write() as session:
        assert registry.aliases(session) == []
        with pytest.raises(NotFound, match="no alias of this name"):
            registry.remove_alias(session, "stable")


def test_a_model_in_use_cannot_be_deleted(database: Database) -> None:
    with database.write() as session:
        register(session, 1)
        registry.point_alias(session, "stable", "mdl_1")
        registry.point_alias(session, "default", "mdl_1")

    with database.write() as session, pytest.raises(Conflict, match="in use as default, stable"):
        registry.delete(session, "mdl_1")

    with database.write() as session:
        registry.remove_alias(session, "stable")
        registry.remove_alias(session, "default")
        registry.delete(session, "mdl_1")

    with database.read() as session:
        assert registry.list_models(session, limit=10) == []
        with pytest.raises(NotFound):
            registry.delete(session, "mdl_1")


def test_a_model_keeps_what_was_said_of_its_promotion(database: Database) -> None:
    with database.write() as session:
        register(session, 1, promotion={"promoted": True, "reason": "There was none."})
        register(session, 2)

    with database.read() as session:
        assert registry.find(session, "mdl_1").promotion == {"promoted": True, "reason": "There was none."}
        assert registry.find(session, "mdl_2").promotion is None


def test_the_default_is_told_inside_the_transaction_that_may_move_it(database: Database) -> None:
    with database.write() as session:
        assert registry.lock_default(session) is None
        register(session, 1)
        registry.point_alias(session, "default", "mdl_1")
        assert registry.lock_default(session) == "mdl_1"


def test_of_two_first_models_that_end_together_the_second_sees_the_first(any_database: Database) -> None:
    def second_job() -> str | None:
        with any_database.write() as session:
            seen = registry.lock_default(session)
            is_decided.set()
            return seen

    is_decided = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        with any_database.write() as session:
            assert registry.lock_default(session) is None
            second = pool.submit(second_job)
            assert not is_decided.wait(1.0)  # while the first has not ended
            register(session, 1)
            registry.point_alias(session, "default", "mdl_1")
        assert second.result(timeout=30) == "mdl_1"


def test_a_new_alias_that_two_give_at_once_is_the_later_one_s(any_database: Database) -> None:
    with any_database.write() as session:
        for number in range(4):
            register(session, number)
    together = threading.Barrier(4)

    def point(number: int) -> None:
        together.wait(timeout=30)
        with any_database.write() as session:
            registry.point_alias(session, "champion", f"mdl_{number}")

    with ThreadPoolExecutor(4) as pool:
        for pointed in [pool.submit(point, number) for number in range(4)]:
            pointed.result(timeout=30)
    with any_database.read() as session:
        (alias,) = registry.aliases(session)
    assert {alias.model_id, alias.previous_model_id} < {f"mdl_{number}" for number in range(4)}


def test_a_model_that_is_just_given_an_alias_is_not_deleted(any_database: Database) -> None:
    def delete() -> None:
        with any_database.write() as session:
            registry.delete(session, "mdl_1")

    with any_database.write() as session:
        register(session, 1)
    with ThreadPoolExecutor(1) as pool:
        with any_database.write() as session:
            registry.point_alias(session, "champion", "mdl_1")
            deleting = pool.submit(delete)
            assert not wait([deleting], timeout=1.0).done  # while the alias is not there yet
        with pytest.raises(Conflict, match="in use as champion"):
            deleting.result(timeout=30)


def test_a_model_that_is_just_deleted_is_given_no_alias(any_database: Database) -> None:
    def point() -> None:
        with any_database.write() as session:
            registry.point_alias(session, "champion", "mdl_1")

    with any_database.write() as session:
        register(session, 1)
    with ThreadPoolExecutor(1) as pool:
        with any_database.write() as session:
            registry.delete(session, "mdl_1")
            pointing = pool.submit(point)
            assert not wait([pointing], timeout=1.0).done
        with pytest.raises(NotFound):
            pointing.result(timeout=30)


def test_an_alias_that_is_just_removed_is_given_anew(any_database: Database) -> None:
    def point() -> None:
        with any_database.write() as session:
            registry.point_alias(session, "champion", "mdl_2")

    with any_database.write() as session:
        register(session, 1)
        register(session, 2)
        registry.point_alias(session, "champion", "mdl_1")
    with ThreadPoolExecutor(1) as pool:
        with any_database.write() as session:
            registry.remove_alias(session, "champion")
            pointing = pool.submit(point)
            assert not wait([pointing], timeout=1.0).done
        pointing.result(timeout=30)
    with any_database.read() as session:
        assert registry.aliases_of(session) == {"mdl_2": ["champion"]}


def test_an_alias_remembers_what_it_pointed_at_before(database: Database) -> None:
    with database.write() as session:
        register(session, 1)
        register(session, 2)
        assert registry.point_alias(session, "stable", "mdl_1").previous_model_id is None
        assert registry.point_alias(session, "stable", "mdl_2").previous_model_id == "mdl_1"
        # Pointed at what it points at already, it has not moved.
        assert registry.point_alias(session, "stable", "mdl_2").previous_model_id == "mdl_1"


def test_a_second_rollback_undoes_the_first(database: Database) -> None:
    with database.write() as session:
        register(session, 1)
        register(session, 2)
        registry.point_alias(session, "stable", "mdl_1")
        registry.point_alias(session, "stable", "mdl_2")

    for expected in ("mdl_1", "mdl_2"):
        with database.write() as session:
            registry.point_alias(session, "stable", registry.previous_model_id(session, "stable"))
        with database.read() as session:
            assert registry.find(session, "stable").id == expected


def test_what_cannot_be_rolled_back_says_why(database: Database) -> None:
    with database.write() as session:
        register(session, 1)
        register(session, 2)
        registry.point_alias(session, "stable", "mdl_1")

    with database.read() as session:
        with pytest.raises(NotFound, match="no alias of this name"):
            registry.previous_model_id(session, "other")
        with pytest.raises(Conflict, match="never pointed at another model"):
            registry.previous_model_id(session, "stable")

    with database.write() as session:
        registry.point_alias(session, "stable", "mdl_2")
        registry.delete(session, "mdl_1")

    with database.read() as session, pytest.raises(Conflict, match=r"mdl_1, was deleted\..*PUT /v1/aliases/stable"):
        registry.previous_model_id(session, "stable")
