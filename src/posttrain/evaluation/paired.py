"""How sure a loss's change is: both sides were measured on the same rows, so what the rows differ in falls out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

FEWEST = 5  # rows; of fewer the spread says nothing
COUNT = "_count"  # the name of a loss's counts: tokens (or pairs) of each row, by their weights
LOW, HIGH = "_change_low", "_change_high"  # behind a loss's name: the ends of its change's interval
Rows = Mapping[str, Sequence[float]]


def change_interval(before: Sequence[float], after: Sequence[float], counts: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of sum(after) / sum(counts) - sum(before) / sum(counts).

    before, after: each row's summed loss. The standard error is that of a ratio whose rows are drawn (delta method, Cochran 1977,
    section 2.11): with d_i the row's change, n_i its count and D the change, sqrt(k / (k - 1) sum (d_i - D n_i)^2) / sum n_i.
    None where there are too few rows, or they are not the same.
    """
    rows = len(counts)
    total = sum(counts)
    if not rows == len(before) == len(after) or rows < FEWEST or total <= 0:
        return None
    changes = [b - a for a, b in zip(before, after, strict=True)]
    change = sum(changes) / total
    spread = sum((each - change * count) ** 2 for each, count in zip(changes, counts, strict=True))
    half = _students(rows - 1) * math.sqrt(rows / (rows - 1) * spread) / total
    return (change - half, change + half) if math.isfinite(half) else None


def change_bounds(before: Rows, after: Rows) -> dict[str, float]:
    """Both ends of every loss's change, by the names of figures: eval/loss_change_low, general/loss_change_high, ...

    before, after: by name (`loss` of the run's own rows, `general/loss` of a set) each row's summed loss, and their counts. Where
    both have counts and they differ (other tokens), nothing is said.
    """
    found: dict[str, float] = {}
    for name, sums in before.items():
        counts = after.get(name + COUNT, ())
        if list(before.get(name + COUNT, counts)) != list(counts):
            continue
        if name in after and (ends := change_interval(sums, after[name], counts)):
            figure = name if "/" in name else f"eval/{name}"
            found |= {figure + LOW: ends[0], figure + HIGH: ends[1]}
    return found


def losses_of(rows: Rows) -> dict[str, list[float]]:
    """What a later measurement of the same rows is held against: each row's summed loss, without its count."""
    return {name: list(values) for name, values in rows.items() if name + COUNT in rows}


def _students(degrees: int) -> float:
    """Student's t at 97.5 %, by its expansion about the normal's (Fisher and Cornish 1960): within 1 % from 4 degrees on."""
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))
