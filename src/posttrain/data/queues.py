"""In which order the units of one source come: at random, or easy ones first."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from posttrain.data.collate import permutation

LEVELS = 100  # of the run: within one of them the law of a curriculum stands still


@dataclass(frozen=True)
class Curriculum:
    """Easy units first (Bengio et al. 2009): the next one is drawn with p(x) ~ exp(-beta difficulty(x)), while beta goes in a
    straight line from start to end over the run.

    The lecture that this follows lets beta grow and says that late training favours hard samples; with the minus sign it is the
    other way round. 2 -> 0 is easy first, then uniform; 0 -> -2 is hard last.

    Args:
        difficulty: of all units, source after source; within its source each counts by its rank, from 0 to 1.
        every_row: each pass has every unit once, and the law only says when: it cannot then be followed to the letter.
    """

    difficulty: NDArray[np.floating]
    start: float
    end: float
    every_row: bool = False

    def beta(self, progress: float) -> float:
        """progress: of the run, from 0 to 1."""
        return self.start + (self.end - self.start) * min(progress, 1.0)


class Queue:
    """The units of one source in the order of their drawing: every pass is a fresh permutation.

    number: of the source; the first one is drawn as if it were alone.
    """

    def __init__(self, number: int, size: int, seed: int) -> None:
        self.number, self.size, self.seed, self.taken = number, size, seed, 0
        self.waiting: NDArray[np.int64] = np.zeros(0, np.int64)
        self.at = 0

    def next(self, progress: float) -> int:
        """progress: of the run, from 0 to 1."""
        while self.at == len(self.waiting):
            self.waiting, self.at = self._more(progress), 0
        self.taken, self.at = self.taken + 1, self.at + 1
        return int(self.waiting[self.at - 1])

    def _seeds(self, *more: int) -> list[int]:
        return [self.seed, self.taken // self.size, *([self.number] if self.number else []), *more]

    def _more(self, progress: float) -> NDArray[np.int64]:
        return permutation(self.size, *self._seeds())


class Steered(Queue):
    """By a curriculum. draws: how many the run will take of this source, about."""

    def __init__(self, number: int, size: int, seed: int, curriculum: Curriculum, start: int, draws: float) -> None:
        super().__init__(number, size, seed)
        own = curriculum.difficulty[start : start + size]
        self.rank = np.argsort(np.argsort(own, kind="stable"), kind="stable") / max(size - 1, 1)
        self.curriculum, self.draws = curriculum, max(draws, 1.0)


class ByLaw(Steered):
    """Each unit as often as the law has it, to within one draw, each time at random.

    How often a unit should have come by now adds up, draw by draw; in every stretch in which that grows by 1 it comes once, at a
    place drawn anew. So a law that is the same for all of them draws each unit once a pass.
    """

    def __init__(self, number: int, size: int, seed: int, curriculum: Curriculum, start: int, draws: float) -> None:
        super().__init__(number, size, seed, curriculum, start, draws)
        self.random = np.random.default_rng([seed, number, 1])
        self.due = np.zeros(size)  # how often each should have come
        self.place = self.random.random(size)  # of its next draw, on the same scale

    def _more(self, progress: float) -> NDArray[np.int64]:
        """The draws of the next hundredth of the run."""
        law = np.exp(-self.curriculum.beta(progress + 0.5 / LEVELS) * self.rank)
        rate = law / law.sum()
        after = self.due + math.ceil(self.draws / LEVELS) * rate
        units, times = [], []
        while len(come := np.flatnonzero(self.place <= after)):
            units.append(come)
            times.append((self.place[come] - self.due[come]) / rate[come])
            self.place[come] = np.floor(self.place[come]) + 1 + self.random.random(len(come))
        self.due = after
        return np.concatenate(units)[np.argsort(np.concatenate(times), kind="stable")] if units else np.zeros(0, np.int64)


class OncePerPass(Steered):
    """Every unit once a pass, each at a time of its own, which is drawn by how its law changes over the pass."""

    def _more(self, progress: float) -> NDArray[np.int64]:
        ends = [self.curriculum.beta(progress + share) for share in (0.0, self.size / self.draws)]
        # how the logarithm of the law grows over the pass, beyond the mean unit's, which moves all alike
        slope = (ends[0] - ends[1]) * (self.rank - 0.5)
        drawn = np.random.default_rng(self._seeds(1)).random(self.size)
        flat = np.abs(slope) < 1e-9
        steep = np.where(flat, 1.0, slope)
        times = np.where(flat, drawn, np.log1p(drawn * np.expm1(steep)) / steep)
        return np.argsort(times, kind="stable").astype(np.int64)


def queues_of(
    sizes: list[int], seed: int, curriculum: Curriculum | None, draws: list[float]
) -> list[Queue]:  # fmt: skip
    """One a source. draws: how many the run will take of each, about."""
    if curriculum is None:
        return [Queue(number, size, seed) for number, size in enumerate(sizes)]
    kind = OncePerPass if curriculum.every_row else ByLaw
    starts = np.cumsum([0, *sizes])
    return [kind(n, size, seed, curriculum, int(starts[n]), draws[n]) for n, size in enumerate(sizes)]
