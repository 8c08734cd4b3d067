"""Learning curves with known answers are found again, and what cannot be known is not claimed."""

import numpy as np
import pytest

from worker.training.forecast import Forecast, Point, forecast

IMAGES = 1000


def points(
    limit: float, scale: float, exponent: float, *, noise: float = 0.0, val_images: int = 500, seed: int = 0
) -> list[Point]:
    """Trainings on 10, 25, 50 and 100 %, small subsets several times; noise of each, and of the validation images."""
    random = np.random.default_rng(seed)
    at_full = limit - scale * IMAGES**-exponent
    shift = random.normal() * (at_full * (1 - at_full) / val_images) ** 0.5 if noise else 0.0
    return [
        Point(n, float(np.clip(limit - scale * n**-exponent + shift + noise * random.normal(), 0, 1)), val_images)
        for n, times in ((100, 5), (250, 3), (500, 2), (1000, 1))
        for _ in range(times)
    ]


def found(of: list[Point]) -> Forecast:
    result = forecast(of)
    assert result is not None
    return result


@pytest.mark.parametrize(("limit", "scale", "exponent"), [(0.95, 1.2, 0.5), (0.9, 0.9, 0.3), (1.0, 2.0, 1.0)])
def test_a_curve_without_noise_is_found_again(limit: float, scale: float, exponent: float) -> None:
    result = found(points(limit, scale, exponent))

    assert (result.limit, result.exponent) == pytest.approx((limit, exponent), abs=1e-6)
    assert result.scale == pytest.approx(scale, rel=1e-6)
    assert result.now == pytest.approx(limit - scale * IMAGES**-exponent)
    assert (result.twice.train_images, result.four_times.train_images) == (2000, 4000)
    assert result.twice.accuracy == pytest.approx(limit - scale * 2000**-exponent)
    assert result.four_times.accuracy == pytest.approx(limit - scale * 4000**-exponent)


def test_the_forecast_is_one_plain_sentence() -> None:
    result = found(points(0.95, 1.2, 0.5))
    low, high = result.twice.accuracy_ci95

    expected = f"Twice as many training pictures would bring about 0.92 ({low:.2f} to {high:.2f}), now 0.91."
    assert result.sentence == expected


@pytest.mark.parametrize("accuracy", [0.9, 1.0])
def test_where_the_curve_is_flat_more_pictures_are_said_to_hardly_help(accuracy: float) -> None:
    result = found(points(accuracy, 0.0, 1.0))

    assert result.four_times.accuracy == pytest.approx(accuracy)
    assert result.sentence.startswith("More pictures would hardly help: even four times as many")


def test_a_curve_that_falls_by_chance_is_taken_for_flat() -> None:
    result = found([Point(100, 0.92, 200), Point(250, 0.91, 200), Point(500, 0.91, 200), Point(1000, 0.90, 200)])

    assert result.twice.accuracy == pytest.approx(0.91, abs=0.005)
    assert result.scale == 0


def test_forecasts_are_shares_whatever_the_points() -> None:
    result = found([Point(10, 0.1, 20), Point(20, 0.5, 20), Point(40, 1.0, 20)])

    for expected in (result.twice, result.four_times):
        low, high = expected.accuracy_ci95
        assert 0 <= low <= expected.accuracy <= high <= 1


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    results = [found(points(0.95, 1.2, 0.5, noise=0.01, val_images=200, seed=seed)) for seed in range(100)]

    for expected, truth in (
        ([r.twice for r in results], 0.95 - 1.2 * 2000**-0.5),
        ([r.four_times for r in results], 0.95 - 1.2 * 4000**-0.5),
    ):
        holding = sum(e.accuracy_ci95[0] <= truth <= e.accuracy_ci95[1] for e in expected)
        assert 90 <= holding <= 100
        assert np.mean([e.accuracy for e in expected]) == pytest.approx(truth, abs=0.01)


def test_fewer_validation_images_make_a_wider_interval() -> None:
    wide, narrow = (found(points(0.95, 1.2, 0.5, val_images=n)).twice.accuracy_ci95 for n in (50, 5000))

    assert wide[1] - wide[0] > 5 * (narrow[1] - narrow[0])


def test_one_bad_training_does_not_bend_the_curve() -> None:
    clean = points(0.95, 1.2, 0.5, val_images=2000)
    spoilt = [Point(100, 0.3, 2000), *clean[1:]]

    assert found(spoilt).twice.accuracy == pytest.approx(found(clean).twice.accuracy, abs=0.01)


def test_two_sizes_make_no_curve() -> None:
    assert forecast([]) is None
    assert forecast([Point(100, 0.8, 50), Point(100, 0.82, 50), Point(200, 0.85, 50)]) is None


def test_the_same_points_give_the_same_forecast_in_any_order() -> None:
    given = points(0.95, 1.2, 0.5, noise=0.01)

    assert found(given) == found(given)
    assert found(given[::-1]).twice.accuracy == pytest.approx(found(given).twice.accuracy)
