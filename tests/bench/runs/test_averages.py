"""Means over seeds and differences by seed, against figures worked out by hand."""

import math
from pathlib import Path

import pytest
from bench_support import assert_chart

from bench.runs.averages import Mean, as_json, differences, means, save_chart, tables

# "better" is 2, 3 and 4 points above "first" seed by seed, though the seeds themselves lie further apart; "lost" has
# neither the second seed nor a segmentation.
AN = {
    "first": {
        0: {"seg_label_free": 40.0, "cam_best": 50.0, "cam_threshold": 0.25},
        1: {"seg_label_free": 44.0, "cam_best": 50.0, "cam_threshold": 0.35},
        2: {"seg_label_free": 48.0, "cam_best": 53.0, "cam_threshold": 0.30},
    },
    "better": {
        0: {"seg_label_free": 42.0, "cam_best": 49.0, "cam_threshold": 0.30},
        1: {"seg_label_free": 47.0, "cam_best": 52.0, "cam_threshold": 0.30},
        2: {"seg_label_free": 52.0, "cam_best": 53.0, "cam_threshold": 0.30},
    },
    "lost": {0: {"cam_best": 47.5}, 2: {"cam_best": 48.5}},
    "none": {},
}


def test_means_and_deviations_are_over_the_seeds_that_there_are() -> None:
    found = means(AN)
    assert found["first"]["seg_label_free"] == Mean(44.0, 4.0, 3)
    assert found["better"]["seg_label_free"] == Mean(47.0, 5.0, 3)
    assert found["lost"] == {"cam_best": Mean(48.0, pytest.approx(math.sqrt(0.5)), 2)}
    assert found["none"] == {}
    assert means({"one": {7: {"cam_best": 3.0}}})["one"]["cam_best"] == Mean(3.0, None, 1)


def test_differences_are_taken_seed_by_seed() -> None:
    found = differences(AN)
    assert list(found) == ["better", "lost", "none"]
    assert found["better"]["seg_label_free"] == Mean(3.0, 1.0, 3)
    assert found["better"]["cam_best"] == Mean(pytest.approx(1 / 3), pytest.approx(math.sqrt(7 / 3)), 3)  # -1, 2, 0
    assert found["lost"]["cam_best"] == Mean(-3.5, pytest.approx(math.sqrt(2)), 2)  # of seeds 0 and 2: -2.5, -4.5


def test_a_difference_counts_where_its_interval_leaves_out_0() -> None:
    """3 ± 1 over three seeds: t = 3·√3 = 5.2 > 4.303; over two it would be 4.2 < 12.7."""
    assert Mean(3.0, 1.0, 3).differs
    assert Mean(-3.0, 1.0, 3).differs
    assert not Mean(2.4, 1.0, 3).differs
    assert not Mean(3.0, 1.0, 2).differs
    assert not Mean(3.0, None, 1).differs
    assert Mean(0.6, 1.0, 20).differs
    assert not Mean(0.0, 0.0, 3).differs


def test_tables_say_n_and_leave_out_what_no_run_has() -> None:
    scores, points, thresholds, on = tables(AN, {row: {} for row in AN})
    assert scores.text().splitlines()[1:] == [
        "        n  seg l.-free    CAM best",
        "first   3   44.0 ± 4.0  51.0 ± 1.7",
        "better  3   47.0 ± 5.0  51.3 ± 2.1",
        "lost    2            -  48.0 ± 0.7",
        "none    0            -           -",
    ]
    assert points.title.startswith("AN: points above first")
    assert points.lines[:2] == [["better", "3", "+3.0* ± 1.0", "+0.3 ± 1.5"], ["lost", "2", "-", "-3.5 ± 1.4"]]
    assert thresholds.lines[0] == ["first", "3", "0.30 ± 0.05"]
    assert thresholds.head == ["", "n", "ξ"]
    assert on.head == ["", "n"]
    assert scores.markdown().splitlines()[2:5] == [
        "|  | n | seg l.-free | CAM best |", "| --- | ---: | ---: | ---: |", "| first | 3 | 44.0 ± 4.0 | 51.0 ± 1.7 |",
    ]  # fmt: skip


def test_a_figure_that_a_seed_lacks_shows_its_own_n() -> None:
    (scores, *_) = tables({"row": {0: {"cam_best": 1.0, "ensemble_best": 1.0}, 1: {"cam_best": 3.0}}}, {})
    assert scores.lines == [["row", "2", "2.0 ± 1.4", "1.0 (1)"]]


def test_a_difference_that_rounds_to_0_has_no_sign_of_its_own() -> None:
    assert Mean(-0.04, None, 1).text(1, 1, signed=True) == Mean(0.04, None, 1).text(1, 1, signed=True) == "+0.0"


def test_json_holds_the_same() -> None:
    found = as_json(AN)
    assert found["first"]["mean"]["seg_label_free"] == {"mean": 44.0, "std": 4.0, "n": 3}
    assert "difference" not in found["first"]
    assert found["better"]["difference"]["seg_label_free"] == {"mean": 3.0, "std": 1.0, "n": 3, "differs": True}


def test_chart_has_a_point_for_each_row(tmp_path: Path) -> None:
    save_chart(means(AN), tmp_path / "chart.png", "invented")
    assert_chart(tmp_path / "chart.png")
