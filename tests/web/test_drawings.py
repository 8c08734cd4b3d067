"""Where lines, bars and cells are drawn, and how figures are told: numbers in, coordinates and words out."""

from datetime import UTC, datetime, timedelta

import pytest

from app.api.schemas import Epoch, ReliabilityBin, SplitEvaluation
from app.web import charts, curves, figures, words
from app.web.charts import Series, line_chart


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.93, 0.99, [0.92, 0.94, 0.96, 0.98, 1.0]),
        (3, 3, [3, 4]),
        (0, 0, [0, 0.2]),
        (-2, 7, [-2, 0, 2, 4, 6, 8]),
        (1e-6, 3e-6, [1e-6, 1.5e-6, 2e-6, 2.5e-6, 3e-6]),
    ],
)
def test_steps_are_round_and_hold_the_range(low: float, high: float, expected: list[float]) -> None:
    found = charts.steps(low, high)

    assert found[0] <= low
    assert found[-1] >= high
    if low != high:
        assert found == pytest.approx(expected)


def test_a_line_runs_from_corner_to_corner_and_has_a_gap_where_a_number_is_missing() -> None:
    chart = line_chart("Loss", [Series("training", [(1, 4.0), (2, None), (3, 0.0)])])

    assert chart is not None
    (line,) = chart.lines
    assert line.path.count("M") == 2
    assert "L" not in line.path
    assert [dot.x for dot in line.dots] == [chart.left, chart.right]
    assert line.dots[0].y < line.dots[1].y  # more is higher up
    assert chart.summary == "Loss by epoch, at the end: training 0."


def test_shares_stay_within_0_and_100_percent() -> None:
    chart = line_chart("Accuracy", [Series("validation", [(1, 1.0), (2, 1.0)])], is_share=True)

    assert chart is not None
    assert chart.y_ticks[-1].text == "100 %"


@pytest.mark.parametrize("points", [[], [(1, None)], [(1, float("nan"))]])
def test_nothing_to_draw_is_no_chart_or_an_empty_one(points: list[tuple[float, float | None]]) -> None:
    chart = line_chart("Loss", [Series("training", points)])

    assert chart is None or chart.lines[0].path == ""


def test_a_head_that_is_solved_for_has_no_learning_rate_to_draw() -> None:
    def epoch(number: int, method: str) -> Epoch:
        numbers = dict.fromkeys(("train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds"), 0.5)
        return Epoch(epoch=number, method=method, learning_rate=1.0, **numbers)

    probe, tuned = epoch(1, "feature_extraction"), [epoch(n, "fine_tuning") for n in (2, 3)]

    assert curves.of_job([probe], []) == []
    accuracy, _, rate = curves.of_job([probe, *tuned], [])
    assert [line.name for line in rate.lines] == ["learning rate"]
    assert [(line.name, line.colour) for line in accuracy.lines] == [
        ("feature extraction validation", 0),
        ("feature extraction training", 0),
        ("fine tuning validation", 1),
        ("fine tuning training", 1),
    ]


def test_a_large_matrix_keeps_the_classes_that_are_confused() -> None:
    counts = [[5 if i == j else 0 for j in range(40)] for i in range(40)]
    counts[30][7] = 4
    shown = SplitEvaluation(
        classes=[str(i) for i in range(40)],
        images=204,
        accuracy=0.98,
        accuracy_ci95=(0.9, 1.0),
        loss=0.1,
        macro_f1=0.9,
        expected_calibration_error=0.0,
        confusion_matrix=counts,
        per_class=[],
        mistakes=[],
    )

    matrix = figures.matrix(shown, most=3)

    assert {"7", "30"} < set(matrix.classes)
    assert matrix.left_out == 37
    (cell,) = [cell for row in matrix.rows for cell in row if cell.count and not cell.is_right]
    assert (cell.true, cell.predicted, cell.count, cell.shade) == ("30", "7", 4, 4)


def test_bars_of_reliability_reach_what_is_right() -> None:
    drawn = figures.reliability([ReliabilityBin(low=0.8, high=1.0, images=10, confidence=0.9, accuracy=0.5)])

    (bar,), (dot,) = drawn.bars, drawn.dots
    assert bar.y + bar.height == drawn.side - figures.MARGIN
    assert bar.height == pytest.approx((drawn.side - figures.MARGIN - 12) / 2)
    assert bar.x < dot.x < bar.x + bar.width


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (words.percent(0.9342), "93.4 %"),
        (words.percent(None), "–"),
        (words.interval((0.908, 0.978)), "91 to 98 %"),
        (words.interval((None, 0.5)), "–"),
        (words.size(13_116_314), "13.1 MB"),
        (words.size(999), "999 B"),
        (words.duration(8.44), "8.4 s"),
        (words.duration(89), "89 s"),
        (words.duration(600), "10 min"),
        (words.duration(7260), "2 h 01 min"),
        (words.plural(1, "class", "classes"), "1 class"),
        (words.plural(2000, "picture"), "2,000 pictures"),
        (words.figure(0.000344), "0.000344"),
        (words.figure(4164.76), "4,165"),
        (words.ago(datetime.now(UTC) - timedelta(hours=5)), "5 h ago"),
        (words.ago(datetime.now(UTC) + timedelta(seconds=2)), "0 s ago"),
    ],
)
def test_figures_are_told_as_people_read_them(told: str, expected: str) -> None:
    assert told == expected
