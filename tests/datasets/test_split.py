"""The split that Graft makes: exact, stratified, a function of content and seed, and copies stay together."""

import hashlib
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from app.datasets.split import choose_validation, validation_count
from app.settings import MEBIBYTE


def digest(i: int) -> str:
    return hashlib.sha256(str(i).encode()).hexdigest()


def chosen(labels: list[int], *, groups: list[int] | None = None, fraction: float = 0.2, seed: int = 0) -> list[bool]:
    """The choice for pictures whose content is their index."""
    digests = [digest(i) for i in range(len(labels))]
    alone = list(range(len(labels)))
    return choose_validation(
        labels, groups=alone if groups is None else groups, digests=digests, fraction=fraction, seed=seed
    ).tolist()


@pytest.mark.parametrize(
    ("pictures", "fraction", "count"),
    [
        (0, 0.2, 0),
        (1, 0.2, 0),
        (2, 0.2, 1),
        (3, 0.9, 2),
        (7, 0.2, 1),
        (8, 0.2, 2),
        (10, 0.25, 3),
        (150, 0.2, 30),
        (2, 0.01, 1),
    ],
)
def test_count_is_rounded_half_up_and_leaves_one_to_train_on(pictures: int, fraction: float, count: int) -> None:
    assert validation_count(pictures, fraction) == count


@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
)
@hypothesis_settings(max_examples=100, deadline=None)
def test_each_class_gets_its_exact_count(labels: list[int], fraction: float, seed: int) -> None:
    validation = chosen(labels, fraction=fraction, seed=seed)
    for label in set(labels):
        of_class = [is_chosen for is_chosen, each in zip(validation, labels, strict=True) if each == label]
        assert sum(of_class) == validation_count(len(of_class), fraction)


@given(
    pictures=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12)), min_size=1, max_size=40),
    fraction=st.floats(0.05, 0.95),
    order=st.randoms(use_true_random=False),
)
@hypothesis_settings(max_examples=100, deadline=None)
def test_choice_is_of_content_not_of_order(
    pictures: list[tuple[int, int]], fraction: float, order: random.Random
) -> None:
    """pictures: label and group of each."""
    places = list(range(len(pictures)))
    order.shuffle(places)
    validation = chosen([p[0] for p in pictures], groups=[p[1] for p in pictures], fraction=fraction)
    shuffled = choose_validation(
        [pictures[i][0] for i in places],
        groups=[pictures[i][1] + 100 for i in places],
        digests=[digest(i) for i in places],
        fraction=fraction,
        seed=0,
    )
    assert [validation[i] for i in places] == shuffled.tolist()


@given(
    pictures=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 8)), min_size=1, max_size=40),
    fraction=st.floats(0.05, 0.95),
)
@hypothesis_settings(max_examples=100, deadline=None)
def test_groups_stay_whole_and_a_class_keeps_something_to_train_on(
    pictures: list[tuple[int, int]], fraction: float
) -> None:
    validation = chosen([p[0] for p in pictures], groups=[p[1] for p in pictures], fraction=fraction)
    for group in {p[1] for p in pictures}:
        assert len({v for v, p in zip(validation, pictures, strict=True) if p[1] == group}) == 1
    for label in {p[0] for p in pictures}:
        assert not all(v for v, p in zip(validation, pictures, strict=True) if p[0] == label)


def test_exact_count_is_met_wherever_groups_allow() -> None:
    groups = [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    for seed in range(20):
        assert sum(chosen([0] * 10, groups=groups, fraction=0.5, seed=seed)) == 5


def test_nearest_possible_count_is_taken_where_groups_do_not_allow_the_exact_one() -> None:
    assert sum(chosen([0] * 9, groups=[0, 0, 0, 1, 1, 1, 2, 2, 2], fraction=0.2)) == 3


def test_class_of_one_group_has_no_validation() -> None:
    assert chosen([0, 0, 0, 1, 1], groups=[0, 0, 0, 1, 2]).count(True) == 1


def test_group_of_two_classes_is_trained_on() -> None:
    for seed in range(10):
        validation = chosen([0, 0, 0, 1, 1, 1], groups=[0, 1, 2, 2, 3, 4], fraction=0.5, seed=seed)
        assert (validation[2], validation[3]) == (False, False)


def test_seed_changes_the_choice() -> None:
    choices = {tuple(chosen([0] * 30, seed=seed)) for seed in range(10)}
    assert len(choices) == 10


def test_large_class_is_split_quickly() -> None:
    labels = np.zeros(200_000, dtype=np.int64).tolist()
    assert sum(chosen(labels)) == 40_000


def test_large_class_of_pairs_whose_count_is_odd_takes_little_memory() -> None:
    pairs = 20_002
    labels, groups = [0] * (2 * pairs), [i // 2 for i in range(2 * pairs)]
    assert validation_count(2 * pairs, 0.2) % 2 == 1
    tracemalloc.start()
    try:
        count = sum(chosen(labels, groups=groups))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == validation_count(2 * pairs, 0.2) - 1
    assert peak_bytes < 24 * MEBIBYTE
