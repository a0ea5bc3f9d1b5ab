"""Successive halving by hand: when trials are judged, who goes on, and that it costs a quarter of a grid."""

from __future__ import annotations

import itertools
import math

import pytest

from posttrain.launch.halving import best_first, cost_of, forecast, half_of, places_of, rungs_of, survivors


def test_survivors_by_hand() -> None:
    scores = dict(enumerate([2.0, 1.5, math.inf, 1.5, 1.9, 3.0, 1.8]))
    assert best_first(scores) == [1, 3, 6, 4, 0, 5]  # the first of equals first
    assert survivors(scores, {}, 3) == [1, 3, 6]  # where nothing is known of what comes
    coming = {0: 0.5, 1: 1.4, 3: 1.5, 4: 1.0, 6: 1.7}
    assert survivors(scores, coming, 4) == [1, 0, 3, 4], "the best now, the best to come, and so on"
    assert survivors(scores, coming, 1) == [1]
    assert survivors({4: math.inf, 5: 2.0, 6: math.inf}, {5: 1.0}, 2) == [5]
    assert best_first({1: math.inf}) == []


def test_forecast_by_hand() -> None:
    """A loss of a - b log(step) is foretold exactly, for each factor."""
    line = {i: (lambda step, b=b: 7 - b * math.log(step)) for i, b in enumerate((0.1, 0.5))}
    now, half = ({i: at(step) for i, at in line.items()} for step in (12, 6))
    for factor in (2, 3, 5):
        assert forecast(now, half, factor) == pytest.approx({i: at(12 * factor) for i, at in line.items()})
    assert forecast({0: 1.0, 1: 2.0, 2: math.inf}, {0: None, 1: math.inf, 2: 3.0}, 2) == {2: math.inf}


def test_forecast_from_another_part_than_the_half() -> None:
    line = {i: (lambda step, b=b: 7 - b * math.log(step)) for i, b in enumerate((0.1, 0.5))}
    now, before = ({i: at(step) for i, at in line.items()} for step in (15, 6))
    assert forecast(now, before, 3, 15 / 6) == pytest.approx({i: at(45) for i, at in line.items()})


def test_rungs_by_hand() -> None:
    """A quarter of 9 x 90 is 202; after 10, 30 and 90 steps it would be 9 x 10 + 3 x 20 + 60 = 210."""
    assert rungs_of(90, 9, 3) == [10, 25, 90]
    assert cost_of([10, 25, 90], 9, 3) == 9 * 10 + 3 * 15 + 65 == 200
    assert rungs_of(54, 12, 3) == [6, 18, 54]  # 24 % as it is
    assert cost_of([6, 18, 54], 12, 3) == 12 * 6 + 4 * 12 + 36 == 156
    assert rungs_of(48, 12, 3) == [6, 15, 48]  # a multiple of 3, as is 6: where trials are measured
    assert cost_of([6, 15, 48], 12, 3) == 12 * 6 + 4 * 9 + 33 == 141 <= 48 * 12 / 4
    assert rungs_of(48, 12, 2) == [6, 9, 15, 48]  # not after 3, a sixteenth
    assert cost_of([6, 9, 15, 48], 12, 2) == 12 * 6 + 6 * 3 + 3 * 6 + 33 == 141
    assert rungs_of(40, 8, 3) == [4, 10, 40]  # 6 steps of 8 trials and 34 more are 82 of 320
    assert rungs_of(48, 12, 5) == [8, 48]  # 10 steps of 12 trials and 38 more are 158
    # of five trials a whole run alone is a fifth: the usual lengths
    assert rungs_of(18, 5, 3) == [2, 6, 18] and rungs_of(40, 2, 3) == [14, 40]
    assert rungs_of(4, 27, 3) == [1, 3, 4]
    assert rungs_of(1, 4, 2) == [1]


@pytest.mark.parametrize("factor", [2, 3, 4, 5])
def test_a_tune_takes_at_most_a_quarter_of_a_grid(factor: int) -> None:
    """And judges nowhere before a tenth of the steps; six trials or fewer cannot, for 10 % of each and 90 % of one are more."""
    for steps, trials in itertools.product((20, 48, 50, 60, 90, 100, 333, 1000), range(7, 40)):
        rungs = rungs_of(steps, trials, factor)
        assert rungs[0] >= steps / 10 and rungs[-1] == steps and rungs == sorted(set(rungs))
        assert 4 * cost_of(rungs, trials, factor) <= steps * trials, (steps, trials, rungs)


def test_where_the_half_was_measured_by_hand() -> None:
    assert [half_of(rung, 6) for rung in (6, 9, 12, 15, 18)] == [3, 3, 6, 6, 9]
    assert half_of(1, 1) == 0 and half_of(3, 1) == 1


def test_places_by_hand() -> None:
    assert places_of(9, 3, 3) == [3, 1, 1]
    assert places_of(12, 4, 2) == [6, 3, 1, 1]
    assert places_of(27, 3, 3) == [9, 1, 1]
    assert places_of(5, 3, 3) == [2, 1, 1]  # a third, rounded up
    assert places_of(4, 1, 2) == [1]
