"""The paired comparison of two models, against values computed by hand."""

from math import comb

import pytest

from worker.training.compare import Predictions, is_promotable, mcnemar_p_value, of_task, pair


@pytest.mark.parametrize(
    ("candidate_only", "incumbent_only", "p_value"),
    [(0, 0, 1.0), (4, 0, 1 / 16), (5, 0, 1 / 32), (0, 5, 1.0), (9, 1, 11 / 1024), (5, 5, 638 / 1024)],
)
def test_p_values_are_those_of_a_fair_coin(candidate_only: int, incumbent_only: int, p_value: float) -> None:
    assert mcnemar_p_value(candidate_only, incumbent_only) == pytest.approx(p_value)


def test_p_values_of_thousands_of_images_are_numbers_too() -> None:
    exact = sum(comb(4000, heads) for heads in range(2060, 4001)) / 2**4000
    assert mcnemar_p_value(2060, 1940) == pytest.approx(exact, rel=1e-9)


def test_only_images_on_which_the_two_differ_are_counted() -> None:
    true = dict.fromkeys("abcd", "cat")
    candidate = {"a": "cat", "b": "cat", "c": "dog", "d": "dog", "e": "dog"}
    incumbent = {"a": "cat", "b": "dog", "c": "cat", "d": "fox"}
    found = pair(true, candidate, incumbent)
    assert (found.images, found.candidate_right_only, found.incumbent_right_only) == (4, 1, 1)


def test_labels_of_one_image_are_one_toss() -> None:
    true = {of_task(image, task): "cat" for image in "abcd" for task in ("animal", "place")}
    candidate = {**true, of_task("d", "place"): "dog"}
    incumbent = {**true, **{of_task(image, task): "fox" for image in "ab" for task in ("animal", "place")}}
    incumbent[of_task("c", "place")] = "fox"

    found = pair(true, candidate, incumbent)

    assert (found.images, found.candidate_right_only, found.incumbent_right_only) == (4, 3, 1)
    assert pair(true, true, incumbent).p_value == pytest.approx(1 / 8)  # and not 1/32, as of five


def test_a_candidate_wins_only_beyond_chance_and_ties_go_where_the_caller_says() -> None:
    def paired(candidate_only: int, incumbent_only: int):  # type: ignore[no-untyped-def]
        images = [str(i) for i in range(candidate_only + incumbent_only)]
        says = ["right" if i < candidate_only else "wrong" for i in range(len(images))]
        other = ["wrong" if i < candidate_only else "right" for i in range(len(images))]
        return pair(
            dict.fromkeys(images, "right"), dict(zip(images, says, strict=True)), dict(zip(images, other, strict=True))
        )

    assert is_promotable(paired(5, 0))
    assert not is_promotable(paired(4, 0))
    assert not is_promotable(paired(0, 0))
    assert is_promotable(paired(0, 0), ties="candidate")
    assert not is_promotable(paired(1, 2), ties="candidate")


def test_a_picture_that_is_there_twice_counts_once_and_one_of_two_classes_not_at_all() -> None:
    predictions = Predictions(["1", "1", "2", "2", "3"], ["a", "a", "a", "b", "b"], ["a", "a", "a", "a", "b"])
    assert predictions.true_classes() == {"1": "a", "3": "b"}


@pytest.mark.parametrize("record", [{}, None, {"digests": ["1"], "true": [], "predicted": []}])
def test_what_is_no_record_of_predictions_is_refused(record: object) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Predictions.from_record(record)  # type: ignore[arg-type]
