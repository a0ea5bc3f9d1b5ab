"""What a loss knows of a whole step does not depend on how the step is cut into micro-batches and processes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.batch import PackedBatch
from posttrain.data.collate import pack_labelled, pack_mismatched, pack_pairs, zero_weight
from posttrain.data.examples import build
from posttrain.losses.preference.aot import same_rank
from posttrain.losses.preference.aot_unpaired import rivals
from posttrain.losses.preference.bco import shift
from posttrain.losses.preference.kto import drift
from posttrain.stages.dpo.whole_step import over_step

COUNT = 6
EXAMPLES = build(
    [([u + 1, u + 2, u + 3, u + 4], [0, 0, 1, 1], u) for u in range(COUNT)],
    splits=[(2, 3)] * COUNT,
    margins=[1.0, -1, -1, 1, 1, -1],
)
torch.manual_seed(0)
REFERENCE, MOVED = -9 * torch.rand(COUNT, 2), torch.randn(COUNT, 2) + 2


@dataclass(frozen=True)
class Several:
    """One of several processes, whose others are worked out beside it."""

    rank: int
    others: Callable[[], list[Any]]

    def gathered(self, mine: Any) -> list[Any]:
        return self.others()


def of(pack: Any, units: list[int], silent: bool = False) -> PackedBatch:
    """A batch with its reference; its policy is what `logps` says."""
    batch = pack(EXAMPLES, units)
    columns = 2 if pack is pack_pairs else 1
    batch = replace(batch, extra={**batch.extra, "reference": REFERENCE[units, :columns].reshape(-1)})
    return zero_weight(batch) if silent else batch


def logps(batch: PackedBatch) -> Tensor:
    units, columns = list(batch.rows), batch.num_answers // len(batch.rows)
    return (REFERENCE + MOVED)[units, :columns].reshape(-1)


CASES = [
    (drift, pack_labelled, pack_mismatched),
    (shift, pack_labelled, pack_labelled),
    (same_rank, pack_pairs, pack_pairs),
    (lambda pairs: rivals(pairs)[:, 0], pack_pairs, pack_pairs),
]


def values_of(case: Any, cut: list[list[tuple[list[int], bool]]]) -> list[dict[int, float]]:
    """By process, the value that each unit is given. cut: for each process its micro-batches, as units and whether silent."""
    values, pack, seen = case
    told: list[list[Any]] = []

    def collect(mine: Any) -> list[Any]:
        told.append(mine)
        return [mine]

    found = []
    for final in (False, True):
        for rank, parts in enumerate(cut):
            batches = [of(pack, units, silent) for units, silent in parts]
            asked = [of(seen, units, silent) for units, silent in parts]
            processes: Any = (
                Several(rank, lambda: told) if final else type("One", (), {"gathered": staticmethod(collect), "rank": 0})
            )
            done = over_step(values, logps, batches, asked, pack is not pack_pairs, processes)
            if final:
                loud = [batch for batch in done if batch.loss_denominator]
                found.append({u: float(v) for b in loud for u, v in zip(b.rows, b.extra["step"], strict=True)})
                assert all(len(batch.extra["step"]) == len(batch.rows) for batch in done)
    return found


@pytest.mark.parametrize("case", CASES, ids=["kto", "bco", "aot", "aot_unpaired"])
def test_however_a_step_is_cut(case: Any) -> None:
    (whole,) = values_of(case, [[([0, 1, 2, 3, 4, 5], False)]])
    assert set(whole) == set(range(COUNT)) and any(whole.values())
    for cut in (
        [[([5, 0], False), ([3], False), ([4, 1, 2], False)]],
        [[([0, 1], False), ([4], False)], [([2, 3], False), ([5], False)]],
        [[([0, 1, 2], False), ([3, 4, 5], False)], [([0], True), ([0], True)]],
    ):
        parts = values_of(case, cut)
        assert {unit: value for part in parts for unit, value in part.items()} == pytest.approx(whole, abs=1e-6)


def test_the_drift_is_that_of_the_step() -> None:
    (found,) = values_of(CASES[0], [[([0, 1], False), ([2, 3, 4, 5], False)]])
    assert list(found.values()) == pytest.approx([float(MOVED[:, 0].mean())] * COUNT, abs=1e-6)
