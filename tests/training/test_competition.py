"""Who may go on, who wins, and how that is told."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from worker.training.competition import (
    Contender,
    Dropped,
    heat_epochs,
    is_behind,
    no_room,
    reason,
    survives,
    table,
    winner,
)


def contender(method: str, *, right: int, images: int = 400, past: Sequence[float] = ()) -> Contender:
    return Contender(
        method=method,
        correct=np.arange(images) < right,
        accuracy_ci95=(0.5, 0.9),
        val_loss=0.1,
        macro_f1=0.9,
        val_accuracies=(*past, right / images),
        seconds=2.0,
        latency_seconds=0.01,
        size_bytes=1000,
    )


def test_the_most_accurate_wins_and_within_half_a_point_the_simplest() -> None:
    probe, tuned, full = (contender(name, right=n) for name, n in (("a", 380), ("b", 390), ("c", 392)))
    assert winner([probe, tuned, full]) is tuned
    assert winner([probe, full]) is full
    assert winner([contender("a", right=391), tuned, full]).method == "a"


@pytest.mark.parametrize(("epochs", "heat"), [(1, 1), (2, 2), (8, 2), (14, 4), (40, 10)])
def test_a_heat_is_a_quarter_of_the_epochs_and_two_at_least(epochs: int, heat: int) -> None:
    assert heat_epochs(epochs) == heat


def test_a_method_goes_on_unless_it_is_behind_where_the_leader_was_by_more_than_chance() -> None:
    tuned = contender("fine_tuning", right=384, past=[0.90, 0.92, 0.93])  # 0.96 in the end
    assert survives([0.95, 0.97], tuned)
    assert survives([0.91, 0.93], tuned)
    # A standard error of 0.92 on 400 images is 1.4 points.
    assert survives([0.90, 0.91], tuned)
    assert not survives([0.90, 0.905], tuned)


def test_a_solved_head_has_no_past_so_it_is_its_whole_accuracy_that_counts() -> None:
    probe = contender("feature_extraction", right=380)  # 0.95, give or take 1.1 points
    assert survives([0.90, 0.955], probe)
    assert survives([0.90, 0.94], probe)
    assert not survives([0.90, 0.935], probe)


def test_a_heat_that_was_won_is_not_lost_by_a_budget_that_proves_shorter() -> None:
    probe, trained = contender("feature_extraction", right=360), [0.70, 0.80, 0.86, 0.88, 0.89, 0.92]
    assert [is_behind(trained[:n], probe, epochs=20) for n in range(1, 7)] == [False] * 6  # a heat of five
    assert is_behind(trained[:2], probe, epochs=8)
    assert not is_behind(trained, probe, epochs=8)


def test_of_several_labels_an_image_counts_once_on_both_sides() -> None:
    # 50 images with one label, half of them right, and 50 with two, all right: 125 of 150 labels, and 0.75 an image.
    probe = replace(contender("feature_extraction", right=125, images=150), val_accuracies=(0.75,))
    assert probe.val_accuracy > 0.83
    assert survives([0.70, 0.80], probe)
    assert not survives([0.60, 0.70], probe)


@pytest.mark.parametrize(
    ("mistakes", "images", "why"),
    [
        (2, 400, "next to nothing to gain"),
        (4, 400, "next to nothing to gain"),
        (10, 1000, "next to nothing to gain"),
        (9, 150, "chance could explain"),  # 4 images more right: one of 16 even matches ends like that
        (10, 150, None),
        (6, 8, "chance could explain"),
    ],
)
def test_no_other_method_is_tried_where_half_the_mistakes_would_show_nothing(
    mistakes: int, images: int, why: str | None
) -> None:
    found = no_room(contender("a", right=images - mistakes, images=images))
    assert found is None if why is None else why in str(found)


def test_the_sentence_names_the_winner_its_figures_and_what_became_of_the_others() -> None:
    found = reason(
        [contender("feature_extraction", right=380), contender("fine_tuning", right=390)],
        [Dropped("full_fine_tuning", "budget_seconds is spent")],
    )
    assert found == (
        "fine_tuning wins with 0.975 (0.500 to 0.900) on 400 validation images; it is 2.5 points ahead of "
        "feature_extraction; full_fine_tuning was left: budget_seconds is spent."
    )


def test_methods_left_for_the_same_reason_are_told_of_together() -> None:
    left = [Dropped(name, "budget_seconds is spent") for name in ("fine_tuning", "full_fine_tuning")]
    assert reason([contender("feature_extraction", right=380)], left).endswith(
        "; fine_tuning and full_fine_tuning were left: budget_seconds is spent."
    )


def test_the_table_has_a_row_for_each_method_and_marks_the_winner() -> None:
    rows = table(
        [contender("a", right=380), contender("b", right=390)], [Dropped("c", "behind in its heat", 0.9, seconds=3.0)]
    )
    assert [(row["method"], row["val_accuracy"], row["is_winner"], row["dropped"]) for row in rows] == [
        ("a", 0.95, False, None),
        ("b", 0.975, True, None),
        ("c", 0.9, False, "behind in its heat"),
    ]
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
