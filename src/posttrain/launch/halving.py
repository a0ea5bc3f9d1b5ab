"""Successive halving: after how many steps trials are judged, within a quarter of what a grid would take, and who goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product, zip_longest

EARLIEST = 10  # no judgement before a tenth of the steps: twice the usual warm-up, in which nothing is decided
BUDGET = 4  # a tune takes at most one in so many of the steps that all trials would take
Scores = dict[int, float]  # of trials by their numbers; infinite where there is none


def rungs_of(steps: int, trials: int, factor: int) -> list[int]:
    """After how many steps trials are judged; the last: all. Each has `factor` times the steps of the one before, or less, so
    that the whole keeps to the budget; six trials or fewer cannot, and have the longer ones."""
    rounds = math.ceil(math.log(trials, factor) - 1e-9)
    rounds = max(1, min(rounds, math.floor(math.log(EARLIEST, factor) + 1e-9)))
    latest = _even(math.ceil(steps / factor**rounds))
    firsts = range(latest, math.ceil(steps / EARLIEST) - 1, -2)
    ratios = (factor - (factor - 1) * k / 100 for k in range(101))
    for first, ratio in product(firsts, list(ratios)):
        found = _rungs(steps, first, ratio, rounds)
        if BUDGET * cost_of(found, trials, factor) <= steps * trials:
            return found
    return _rungs(steps, latest, factor, rounds)


def _even(step: int) -> int:
    """So that there is a half."""
    return step + (step % 2 if step > 1 else 0)


def _rungs(steps: int, first: int, ratio: float, rounds: int) -> list[int]:
    """Where trials are measured, so a multiple of the first one's half."""
    every = max(1, first // 2)
    found = {math.floor(first * ratio**i / every + 1e-9) * every for i in range(rounds)}
    return [*sorted(rung for rung in found if rung < steps), steps]


def cost_of(rungs: list[int], trials: int, factor: int) -> int:
    """Steps of all trials together."""
    alive, lengths = [trials, *places_of(trials, len(rungs), factor)], zip(rungs, [0, *rungs], strict=False)
    return sum(many * (rung - before) for many, (rung, before) in zip(alive, lengths, strict=False))


def half_of(rung: int, first: int) -> int:
    """Where a trial was measured that is nearest to half of these steps from below."""
    every = max(1, first // 2)
    return rung // (2 * every) * every


def places_of(trials: int, rungs: int, factor: int) -> list[int]:
    """How many go on after each judgement: one in `factor`, rounded up; after the last but one the best alone."""
    found = list[int]()
    for left in range(rungs - 1, -1, -1):
        found.append(math.ceil((found[-1] if found else trials) / factor) if left > 1 else 1)
    return found


def best_first(scores: Scores) -> list[int]:
    """Trials by score, lower first, the earlier of equals first; those that have none are left out."""
    return sorted((i for i, score in scores.items() if score < math.inf), key=lambda i: (scores[i], i))


def forecast(scores: Scores, earlier: Mapping[int, float | None], factor: float, ratio: float = 2) -> Scores:
    """What each will have at `factor` times the steps, if its score goes on in a line in the logarithm of the steps. earlier: at
    one in `ratio` of them; a trial without is left out."""
    known = {i: score for i, score in earlier.items() if score is not None and score < math.inf}
    return {i: scores[i] + (scores[i] - score) * math.log(factor, ratio) for i, score in known.items()}


def survivors(scores: Scores, coming: Scores, places: int) -> list[int]:
    """The best now and the best to come, in turn."""
    both = zip_longest(best_first(scores), best_first(coming))
    return list(dict.fromkeys(i for each in both for i in each if i is not None))[:places]
