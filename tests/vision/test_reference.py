"""What answers are held against: promises are kept to the letter where the letter can be computed."""

import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from app.vision import reference
from app.vision.reference import (
    MAX_IMAGES,
    Images,
    Neighbour,
    Novelty,
    Reference,
    choose,
    coded,
    errors_of,
    prediction_set,
)


def assert_is_share(hits: int, trials: int, expected: float) -> None:
    """Within four standard deviations of a binomial distribution."""
    assert hits / trials == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / trials))


def made(images: int = 6, *, width: int = 8, classes: int = 2) -> Reference:
    random = np.random.default_rng(0)
    return Reference.fit(
        random.normal(size=(images, width)),
        np.arange(images) % classes,
        [(f"img_{i}", f"{i}.jpg") for i in range(images)],
        held_out=random.normal(size=(4, width)),
        probability_of_true=[np.array([0.9, 0.5, 0.7, 0.8])],
    )


# How strange a picture is


def test_score_of_the_typical_picture_and_of_the_limit_are_as_stated() -> None:
    novelty = Novelty.of(np.linspace(0.1, 0.3, 99))

    assert novelty.typical == pytest.approx(0.2)
    assert novelty.score(novelty.typical) == pytest.approx(0.1)
    assert novelty.score(novelty.limit) == 0.5
    scores = [novelty.score(distance) for distance in np.linspace(0, 1, 50)]
    assert scores == sorted(set(scores))
    assert 0 < scores[0] < scores[-1] < 1


@pytest.mark.parametrize("count", [19, 20, 57])
def test_new_pictures_of_the_same_kind_are_beyond_the_limit_as_often_as_promised(count: int) -> None:
    random, trials = np.random.default_rng(count), 20_000
    beyond = 0
    for distances in random.gamma(2.0, size=(trials, count + 1)):
        beyond += distances[-1] > Novelty.of(distances[:-1]).limit

    rank = math.ceil((count + 1) * 0.95)
    assert_is_share(beyond, trials, 1 - rank / (count + 1))
    assert 1 - rank / (count + 1) <= 0.05 + 1e-12


@pytest.mark.parametrize("count", [2, 3, 8, 18])
def test_with_few_held_out_pictures_the_promise_holds_for_distances_that_are_log_normal(count: int) -> None:
    random, trials = np.random.default_rng(count), 20_000
    beyond = 0
    for distances in random.lognormal(-2.0, 0.4, size=(trials, count + 1)):
        beyond += distances[-1] > Novelty.of(distances[:-1]).limit

    assert_is_share(beyond, trials, 0.05)


@pytest.mark.parametrize("count", [2, 30])
def test_held_out_copies_of_training_pictures_leave_the_scores_finite(count: int) -> None:
    novelty = Novelty.of(np.zeros(count))

    assert novelty.score(0.0) < 0.5 == novelty.score(novelty.limit)
    assert novelty.score(0.5) == pytest.approx(1.0)


def test_training_picture_itself_is_not_strange_and_its_opposite_is() -> None:
    random = np.random.default_rng(0)
    pictures = random.normal(size=(60, 8)) + 3
    found = Reference.fit(
        pictures[:30], np.zeros(30, np.int64), [None] * 30, held_out=pictures[30:], probability_of_true=[np.ones(30)]
    )

    assert found.ood_score(found.similarities(pictures[3])) < 0.1
    assert found.ood_score(found.similarities(-pictures[3])) > 0.9


def test_length_of_the_features_does_not_matter() -> None:
    found, picture = made(), np.random.default_rng(5).normal(size=8)

    assert found.similarities(7 * picture) == pytest.approx(found.similarities(picture), abs=1e-6)
    assert np.isfinite(found.similarities(np.zeros(8))).all()


# Prediction sets


@pytest.mark.parametrize(("held_out", "coverage"), [(19, 0.9), (10, 0.8), (30, 0.95), (57, 0.85)])
def test_sets_hold_the_true_class_exactly_as_often_as_promised(held_out: int, coverage: float) -> None:
    """Of a model that is not calibrated and hardly knows anything, so that no set needs a class to not be empty."""
    random, trials, classes = np.random.default_rng(held_out), 5000, 6
    hits = 0
    for _ in range(trials):
        probabilities = random.dirichlet(np.full(classes, 8.0), size=held_out + 1)
        labels = (probabilities.cumsum(1) > random.random((held_out + 1, 1))).argmax(1)
        of_true = probabilities[np.arange(held_out + 1), labels]
        hits += labels[-1] in prediction_set(probabilities[-1].tolist(), errors_of(of_true[:-1]), coverage)

    assert_is_share(hits, trials, math.ceil((held_out + 1) * coverage - 1e-9) / (held_out + 1))


def test_set_is_of_the_most_probable_classes_the_best_first_and_never_empty() -> None:
    errors = errors_of(np.linspace(0.99, 0.6, 40))

    assert prediction_set([0.2, 0.5, 0.3], errors, 0.9) == [1]
    assert prediction_set([0.1, 0.8, 0.1], errors, 0.9) == [1]
    assert prediction_set([0.2, 0.5, 0.3], errors_of(np.linspace(0.99, 0.25, 40)), 0.97) == [1, 2]


def test_coverage_that_so_few_pictures_cannot_promise_takes_all_classes() -> None:
    errors = errors_of(np.array([0.99, 0.98, 0.97]))

    assert prediction_set([0.1, 0.2, 0.7], errors, 0.75) == [2]
    assert prediction_set([0.1, 0.2, 0.7], errors, 0.76) == [2, 1, 0]
    assert prediction_set([0.1, 0.2, 0.7], errors_of(np.zeros(0)), 0.01) == [2, 1, 0]


def test_next_to_no_coverage_takes_the_smallest_set() -> None:
    errors = errors_of(np.array([0.97, 0.9, 0.8, 0.1]))

    for coverage in (0.2, 1e-3, 1e-12):
        assert prediction_set([0.9, 0.06, 0.04], errors, coverage) == [0]


def test_products_that_are_whole_numbers_are_taken_as_whole_numbers() -> None:
    errors = np.arange(99, dtype=np.float32) / 100  # 100 * 0.55 is 55.00000000000001

    assert prediction_set([0.45, 0.46, 0.09], errors, 0.55) == [1]
    assert prediction_set([0.46, 0.465, 0.075], errors, 0.55) == [1, 0]


def test_more_coverage_never_takes_a_class_away() -> None:
    random = np.random.default_rng(1)
    errors = errors_of(random.random(200))
    for row in random.dirichlet(np.ones(8), size=20).tolist():
        sizes = [len(prediction_set(row, errors, coverage)) for coverage in np.linspace(0.01, 0.999, 60)]
        assert sizes == sorted(sizes)
        assert (sizes[0], sizes[-1]) == (1, 8)


# Neighbours


def test_nearest_training_pictures_come_first_with_their_labels() -> None:
    found = made(classes=3)

    (nearest, second) = found.nearest(found.similarities(found.codes[4].astype(np.float32)), 2)

    assert nearest == Neighbour((1,), ("img_4", "4.jpg"), pytest.approx(1.0, abs=1e-3))
    assert nearest.similarity <= 1.0
    assert second.similarity < nearest.similarity
    assert len(found.nearest(found.similarities(found.codes[4].astype(np.float32)), 50)) == 6


def test_equally_near_pictures_are_in_the_order_of_the_data_set() -> None:
    found = Reference.fit(
        np.ones((3, 4)),
        np.array([[0, 1], [1, -1], [0, 0]]),
        [("a", "a.jpg"), ("b", "b.jpg"), None],
        held_out=np.eye(4)[:2],
        probability_of_true=[np.ones(2), np.zeros(0)],
    )

    neighbours = found.nearest(found.similarities(np.ones(4)), 3)

    assert [(each.labels, each.image) for each in neighbours] == [
        ((0, 1), ("a", "a.jpg")),
        ((1, -1), ("b", "b.jpg")),
        ((0, 0), None),
    ]


# What is kept


def test_all_training_pictures_are_kept_up_to_the_limit() -> None:
    assert choose(np.arange(MAX_IMAGES) % 3, class_count=3, seed=0).tolist() == list(range(MAX_IMAGES))


def test_beyond_the_limit_small_classes_are_kept_whole_and_large_ones_alike() -> None:
    labels = np.repeat([0, 1, 2], [5000, 10, 3000])

    kept = choose(labels, class_count=3, seed=0)

    assert np.bincount(labels[kept]).tolist() == [MAX_IMAGES // 2 - 5, 10, MAX_IMAGES // 2 - 5]
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert kept.tolist() == choose(labels, class_count=3, seed=0).tolist()
    assert kept.tolist() != choose(labels, class_count=3, seed=1).tolist()


def test_with_more_classes_than_the_limit_each_has_one() -> None:
    labels = np.repeat(np.arange(MAX_IMAGES + 100), 2)

    kept = choose(labels, class_count=MAX_IMAGES + 100, seed=0)

    assert labels[kept].tolist() == list(range(MAX_IMAGES + 100))


@pytest.mark.parametrize("count", [1, 31, 32, 33, 100])
def test_codes_tell_the_cosine_of_what_they_stand_for(count: int) -> None:
    random = np.random.default_rng(0)
    features = np.abs(random.normal(size=(count, 1024))) * np.arange(1, count + 1)[:, np.newaxis]
    picture = features[0] + np.abs(random.normal(size=1024))
    found = replace(made(), codes=coded(features))

    exact = reference.unit(features) @ reference.unit(picture[np.newaxis])[0]
    assert found.codes.dtype == np.int8
    assert found.similarities(picture) == pytest.approx(exact, abs=1e-3)


def test_what_is_measured_is_what_is_stored() -> None:
    random = np.random.default_rng(0)
    features, held_out = random.normal(size=(50, 8)), random.normal(size=(99, 8))
    labels, images = np.zeros(50, dtype=np.int64), [None] * 50
    found = Reference.fit(features, labels, images, held_out=held_out, probability_of_true=[np.full(99, 0.5)])

    # By the codes to the last digit: exactly so many are beyond the limit as were promised.
    scores = [found.ood_score(found.similarities(each)) for each in held_out]
    assert sum(score > 0.5 for score in scores) == 4
    assert sum(score > 0.1 for score in scores) == 49


def test_a_picture_without_features_is_like_nothing() -> None:
    found = replace(made(), codes=coded(np.zeros((3, 8))))

    assert found.similarities(np.ones(8)).tolist() == [0, 0, 0]


def test_many_held_out_pictures_are_looked_at_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MAX_HELD_OUT", 5)

    assert errors_of(np.linspace(0, 1, 41)).tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_new_class_stands_beside_the_others() -> None:
    before = made(images=6, classes=2)
    shots = np.random.default_rng(9).normal(size=(3, 8))

    after = before.extended(shots, np.full((len(shots), 1), 2), probability_of_true=[np.array([0.25, 0.75])])

    assert after.labels[:, 0].tolist() == [0, 1, 0, 1, 0, 1, 2, 2, 2]
    assert after.images == [*before.images, None, None, None]
    assert after.errors[0].tolist() == [0.25, 0.75]
    nearest = after.nearest(after.similarities(shots[1]), 1)[0]
    assert (nearest.labels, nearest.image) == ((2,), None)


def test_what_counts_as_known_goes_as_far_as_the_new_pictures_lie_apart() -> None:
    known = np.eye(8)[:2].repeat(3, axis=0)
    before = replace(made(images=6, classes=2), codes=coded(known), novelty=Novelty(typical=0.01, limit=0.05))
    close, apart = np.eye(8)[[2, 2, 2]], np.eye(8)[[2, 2, 3]] + 0.5 * np.eye(8)[[4, 4, 4]]

    def limit(shots: NDArray[np.floating]) -> float:
        labels = np.full((len(shots), 1), 2)
        return before.extended(shots, labels, probability_of_true=[None]).novelty.limit

    assert limit(close) == 0.05
    assert limit(apart) == pytest.approx(0.8, abs=0.01)  # the third one's cosine to the first two is 0.25 / 1.25
    assert limit(apart[2:]) == 0.05  # one alone says nothing


def test_names_are_kept_in_one_block_and_read_like_any_sequence() -> None:
    pairs = [("img_1", "ants/a b.jpg"), None, ("img_2", 'bées/"\n".jpg'), ("img_3", "\udcff.jpg")]
    names = Images(pairs)

    assert list(names) == pairs
    assert (len(names), names[-1], names[1], names[1:3]) == (4, pairs[-1], None, pairs[1:3])
    with pytest.raises(IndexError):
        names[4]
    assert list(Images([])) == []


def test_pictures_beside_each_other_are_as_like_as_each_alone() -> None:
    found = made(images=300, width=1024)
    pictures = np.random.default_rng(5).normal(size=(5, 1024)).astype(np.float32)

    together = found.similarities(pictures)

    assert together.shape == (5, 300)
    for row, picture in zip(together, pictures, strict=True):
        assert np.array_equal(row, found.similarities(picture))
