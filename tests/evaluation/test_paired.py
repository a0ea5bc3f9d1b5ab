"""The interval of a loss's change, by numbers worked out by hand, and in runs."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest

import posttrain
from posttrain.errors import Stopped
from posttrain.evaluation.paired import change_bounds, change_interval, losses_of
from posttrain.reports.pages import best_of
from posttrain.reports.run_records import before_and_after
from posttrain.runs.manifest import read_manifest

BEFORE = [10.0, 20.0, 30.0, 40.0, 50.0]
COUNTS = [5.0, 10.0, 15.0, 20.0, 25.0]  # 2 nats a token in each row
T4 = 2.7764  # Student's t, 4 degrees of freedom, 97.5 %


def test_rows_that_all_change_alike_leave_no_doubt() -> None:
    after = [sums - 0.1 * count for sums, count in zip(BEFORE, COUNTS, strict=True)]
    assert change_interval(BEFORE, after, COUNTS) == pytest.approx((-0.1, -0.1))


def test_the_interval_by_hand() -> None:
    """Changes -1, -3, -2, -4, -5 over 75 tokens: D = -0.2; residues d - D n: 0, -1, 1, 0, 0; their squares sum to 2."""
    after = [sums + change for sums, change in zip(BEFORE, (-1, -3, -2, -4, -5), strict=True)]
    half = T4 * math.sqrt(5 / 4 * 2) / 75
    low, high = change_interval(BEFORE, after, COUNTS) or (0, 0)
    assert (low, high) == pytest.approx((-0.2 - half, -0.2 + half), rel=2e-3)


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_too_few_rows_say_nothing(rows: int) -> None:
    assert change_interval(BEFORE[:rows], BEFORE[:rows], COUNTS[:rows]) is None


def test_other_rows_say_nothing_and_names_are_those_of_figures() -> None:
    after = {"loss": BEFORE, "loss_count": COUNTS, "general/loss": BEFORE[:4], "general/loss_count": COUNTS[:4], "chosen": [1.0]}
    before = losses_of(after) | {"general/loss": BEFORE}
    assert "chosen" not in losses_of(after)
    assert change_bounds(before, after) == {"eval/loss_change_low": 0.0, "eval/loss_change_high": 0.0}


def test_it_covers_what_it_says() -> None:
    """Drawn rows of many lengths, a true change of 0.05 nats a token: the interval has it in 95 % of 2,000 draws."""
    import numpy as np

    drawn = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        counts = drawn.integers(5, 200, 20).astype(float)
        changes = counts * (-0.05 + drawn.normal(0, 0.1, 20))
        low, high = change_interval([0.0] * 20, changes.tolist(), counts.tolist()) or (0, 0)
        inside += low <= -0.05 <= high
    assert 0.92 < inside / 2000 < 0.97


WORDS = ("model=tiny", "train.max_steps=4", "train.batch_size=2", "data.max_rows=30", "data.eval_rows=8", "optim.lr=0.02")
WORDS += ("train.save_steps=2", "eval.rows=6")


def _rows(run: Path) -> dict[str, list[float]]:
    return json.loads((run / "held_out.json").read_text())


def test_a_run_keeps_the_interval_and_its_rows_give_the_loss(tmp_path: Path) -> None:
    """Also where it was stopped and went on: the rows of before are in its checkpoints."""
    for name, more in (("whole", []), ("again", ["run.stop_after=2"])):
        with pytest.raises(Stopped) if more else nullcontext():
            posttrain.run("sft", *WORDS, f"run.dir={tmp_path / name}", *more)
    posttrain.run("sft", *WORDS, f"run.dir={tmp_path / 'again'}")
    metrics, rows = read_manifest(tmp_path / "whole").metrics, _rows(tmp_path / "whole")
    assert sum(rows["loss"]) / sum(rows["loss_count"]) == pytest.approx(metrics["eval/loss"], rel=1e-5)
    assert sum(rows["general/loss"]) / sum(rows["general/loss_count"]) == pytest.approx(metrics["general/loss"], rel=1e-5)
    assert (len(rows["loss"]), len(rows["general/loss"])) == (8, 6)
    for name in ("eval/loss", "general/loss"):
        low, high = metrics[f"{name}_change_low"], metrics[f"{name}_change_high"]
        change = metrics[name] - metrics[f"{name}_before"]
        assert (low + high) / 2 == pytest.approx(change, abs=1e-4) and low < high
    assert read_manifest(tmp_path / "again").metrics == metrics


def test_of_preferences_each_pair_is_a_row(tmp_path: Path) -> None:
    posttrain.run("dpo", *WORDS, f"run.dir={tmp_path / 'dpo'}")
    metrics, rows = read_manifest(tmp_path / "dpo").metrics, _rows(tmp_path / "dpo")
    assert rows["loss_count"] == [1.0] * 8
    assert sum(rows["loss"]) / 8 == pytest.approx(metrics["eval/loss"], rel=1e-5)
    low, high = change_interval([math.log(2)] * 8, rows["loss"], [1.0] * 8) or (0, 0)
    assert (metrics["eval/loss_change_low"], metrics["eval/loss_change_high"]) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "after", "ends", "verdict", "between"),
    [
        ("eval/loss", 1.999, (-0.002, -0.0005), "better", "-0.10 % to -0.03 %"),  # a tenth of what the floor asks
        ("eval/loss", 1.8, (-0.5, 0.1), "", "-25.00 % to +5.00 %"),  # twenty times the floor, and noise
        ("eval/perplexity", 1.999, (-0.002, -0.0005), "better", ""),  # by its loss
        ("eval/loss", 1.8, None, "better", ""),  # a run of before: the floor
    ],
)
def test_a_change_is_marked_beyond_its_own_interval(name, after, ends, verdict, between) -> None:
    bounds = {"eval/loss_change_low": ends[0], "eval/loss_change_high": ends[1]} if ends else {}
    (change,) = before_and_after({name: after, f"{name}_before": 2.0, **bounds})
    assert (change.verdict, change.between) == (verdict, between)


def test_the_best_of_two_runs_is_marked_beyond_their_rows_difference() -> None:
    """Means of 2 and 1.8, and of 2 and 1.999: by the floor the first pair differs and the second does not."""
    unsure = [a + b for a, b in zip(BEFORE, (-60, 40, -30, 40, -5), strict=True)]
    sure = [sums - 0.001 * count for sums, count in zip(BEFORE, COUNTS, strict=True)]
    for after, best in ((unsure, None), (sure, 1)):
        values = [sum(BEFORE) / 75, sum(after) / 75]
        assert best_of("eval/loss", values) == (1 if best is None else None)
        assert best_of("eval/loss", values, [{"sums": sums, "counts": COUNTS} for sums in (BEFORE, after)]) == best


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([1.0, 2.0, 3.0], 0),
        ([2.0, 1.0, 2.0], 1),
        ([1.0, 1.0, 3.0], None),  # one far behind makes neither of the others the best
        ([1.0, 1.004, 3.0], None),
        ([1.0, 1.0, math.inf], None),
        ([1.0, math.nan, math.inf], None),  # held against nothing
        ([1.0, None], None),
        ([], None),
    ],
)
def test_the_best_is_better_than_the_next(values: list[float | None], best: int | None) -> None:
    assert best_of("eval/loss", values) == best


def test_the_best_of_three_runs_is_held_against_the_next_row_by_row() -> None:
    sure = [sums - 0.001 * count for sums, count in zip(BEFORE, COUNTS, strict=True)]
    far = [sums + 3 * count for sums, count in zip(BEFORE, COUNTS, strict=True)]
    for three, best in (((BEFORE, sure, far), 1), ((BEFORE, BEFORE, far), None)):
        rows = [{"sums": sums, "counts": COUNTS} for sums in three]
        assert best_of("eval/loss", [sum(sums) / 75 for sums in three], rows) == best
