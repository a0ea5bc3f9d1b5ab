"""Curricula: difficulty by tenths of the run against the law, and every row once a pass where that is asked."""

import numpy as np
import pytest

from posttrain.data.mixture import draw_units, seen
from posttrain.data.queues import Curriculum

N, TENTHS = 40_000, 10
DIFFICULTY = np.random.default_rng(5).random(N)
RANK = np.argsort(np.argsort(DIFFICULTY)) / (N - 1)


def drawn(start: float, end: float, draws: int = N, seed: int = 3, every_row: bool = False) -> np.ndarray:
    return draw_units([np.full(N, 7)], [1.0], seed, None, draws, "repeat", Curriculum(DIFFICULTY, start, end, every_row))


def by_law(start: float, end: float) -> list[float]:
    """Mean rank in each tenth of a run that draws by p ~ exp(-beta rank), beta in a straight line."""
    means = []
    for tenth in range(TENTHS):
        betas = start + (end - start) * (tenth + (np.arange(50) + 0.5) / 50) / TENTHS
        law = np.exp(-betas[:, None] * RANK)
        means.append(float(((law * RANK).sum(1) / law.sum(1)).mean()))
    return means


def by_tenths(units: np.ndarray) -> list[float]:
    return [float(RANK[part].mean()) for part in np.array_split(units, TENTHS)]


@pytest.mark.parametrize(("start", "end"), [(2, 0), (0, -2), (0, 0), (4, -4)])
@pytest.mark.parametrize("draws", [N, 3 * N])
def test_difficulty_by_tenths_is_the_laws(start: float, end: float, draws: int) -> None:
    assert by_tenths(drawn(start, end, draws)) == pytest.approx(by_law(start, end), abs=0.015)


def test_the_promises_in_figures() -> None:
    """2 -> 0 ends uniform, 0 -> -2 ends with the hard rows."""
    assert by_law(2, 0)[-1] == pytest.approx(0.49, abs=0.01) and by_law(0, -2)[-1] == pytest.approx(0.65, abs=0.01)
    assert by_tenths(drawn(2, 0))[-1] == pytest.approx(0.49, abs=0.02)
    assert by_tenths(drawn(0, -2))[-1] == pytest.approx(0.65, abs=0.02)


def test_each_unit_comes_as_often_as_the_law_has_it_to_within_one() -> None:
    betas = 2 - 2 * (np.arange(100) + 0.5) / 100
    law = np.exp(-betas[:, None] * RANK)
    expected = (law / law.sum(1, keepdims=True)).sum(0) * 3 * N / 100
    counts = np.bincount(drawn(2, 0, 3 * N), minlength=N)
    assert np.abs(counts - expected).max() < 2  # it ends within a stretch
    assert counts.min() >= 1


def test_a_law_that_is_the_same_for_all_draws_each_once_a_pass_in_another_order() -> None:
    units = drawn(0, 0, 3 * N)
    passes = np.array_split(units, 3)
    assert all(len(np.unique(each)) > 0.98 * N for each in passes)  # the borders of passes are blurred by a draw or so
    assert np.bincount(units, minlength=N).min() >= 2
    place = [np.argsort(np.argsort(each[np.sort(np.unique(each, return_index=True)[1])])[: N * 9 // 10]) for each in passes]
    assert abs(np.corrcoef(place[0], place[1])[0, 1]) < 0.1


@pytest.mark.parametrize(("start", "end", "tenths"), [(2, 0, (0.435, 0.565)), (0, -2, (0.435, 0.565)), (4, -4, (0.277, 0.724))])
def test_every_row_once_a_pass_with_the_hard_ones_last(start: float, end: float, tenths: tuple[float, float]) -> None:
    """Where each comes once, their mean over the run is 0.5: that the law's is another is all that is given up."""
    units = drawn(start, end, 2 * N, every_row=True)
    assert [len(np.unique(each)) for each in np.array_split(units, 2)] == [N, N]
    means = by_tenths(drawn(start, end, every_row=True))
    assert (means[0], means[-1]) == pytest.approx(tenths, abs=0.01)
    assert means == pytest.approx(sorted(means), abs=0.005)
    law = by_law(start, end)
    if np.mean(law) == pytest.approx(0.5, abs=1e-3):
        assert means == pytest.approx(law, abs=0.03)


def test_how_many_were_drawn_at_all_is_counted() -> None:
    units = drawn(2, 0)
    assert seen(units, [np.full(N, 7)])[0]["coverage"] == round(len(np.unique(units)) / N, 4)
    assert 0.75 < seen(units, [np.full(N, 7)])[0]["coverage"] < 0.95
    assert seen(drawn(2, 0, every_row=True), [np.full(N, 7)])[0]["coverage"] == 1.0


def test_the_same_seed_draws_the_same() -> None:
    assert np.array_equal(drawn(2, 0), drawn(2, 0)) and not np.array_equal(drawn(2, 0), drawn(2, 0, seed=4))
