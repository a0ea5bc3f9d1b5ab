"""Which settings a tune tries: a grid, values at random, or what one of Optuna's samplers makes of the first judgements."""

from __future__ import annotations

import importlib.util
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

from posttrain.errors import UserError

# by our name, of optuna.samplers; each takes a seed
OPTUNAS = {"tpe": "TPESampler", "qmc": "QMCSampler"}
SAMPLERS = ("auto", "grid", "random", *OPTUNAS)
WAVES = 3  # in which a sampler that learns proposes: all it knows of a wave are those before


@dataclass(frozen=True)
class Range:
    """From low to high in the logarithm; whole: of whole numbers."""

    low: float
    high: float
    whole: bool

    def spelt(self, value: float) -> str:
        """To three digits, so that what is printed is what was run."""
        return str(round(value)) if self.whole else f"{value:.3g}"

    def at(self, share: float) -> str:
        """share: 0 at the low end, 1 at the high one."""
        return self.spelt(self.low * (self.high / self.low) ** share)

    def spaced(self, points: int) -> list[str]:
        """Evenly in the logarithm."""
        return list(dict.fromkeys(self.at(i / (points - 1)) for i in range(points)))


Space = Mapping[str, list[str] | Range]  # key -> its values
Setting = list[str]  # a word for each key


class Proposer(Protocol):
    """What to try, wave by wave."""

    count: int
    line: str

    def wave(self, scores: Sequence[float]) -> list[Setting]:
        """The next settings; none: that is all. scores: of those before, in their order, lower better, infinite where there is
        none."""
        ...


def proposer(name: str, over: Sequence[str], trials: int) -> Proposer:
    """`auto` is a grid of one key or of lists, and of more what is at hand: TPE with Optuna, values at random without. Raises
    UserError."""
    space = space_of(over)
    if name not in SAMPLERS:
        raise UserError(f"--sampler: there is no '{name}' (there are: {', '.join(SAMPLERS)})")
    here = importlib.util.find_spec("optuna") is not None
    if name in OPTUNAS and not here:
        raise UserError(
            f"--sampler: {name} is Optuna's, which is not installed; pip install 'posttrain[tune]', or say --sampler random"
        )
    if name == "grid" or (name == "auto" and (len(space) == 1 or not any(isinstance(each, Range) for each in space.values()))):
        return Grid(grid(space, trials))
    if name == "random" or not here:
        return Random(space, trials, "" if name == "random" else ", as Optuna is not installed (pip install 'posttrain[tune]')")
    return Optuna("tpe" if name == "auto" else name, space, trials)


class Grid:
    """All at once, and always the same."""

    def __init__(self, settings: list[Setting]) -> None:
        self.settings, self.count, self.line = settings, len(settings), f"a grid of {len(settings)}"

    def wave(self, scores: Sequence[float]) -> list[Setting]:
        """All of them."""
        return [] if scores else self.settings


class Random:
    """All at once, at random by a fixed seed: each key by itself, ranges evenly in the logarithm (Bergstra & Bengio 2012)."""

    def __init__(self, space: Space, trials: int, why: str = "") -> None:
        self.space, self.count, self.line = space, trials, f"{trials} at random{why}"

    def wave(self, scores: Sequence[float]) -> list[Setting]:
        """All of them."""
        numbers = random.Random(0)
        return [] if scores else [[f"{k}={_any(v, numbers)}" for k, v in self.space.items()] for _ in range(self.count)]


def _any(values: list[str] | Range, numbers: random.Random) -> str:
    return values.at(numbers.random()) if isinstance(values, Range) else numbers.choice(values)


class Optuna:
    """By one of Optuna's samplers, with the scores of the first judgement (as BOHB: Falkner et al. 2018, arXiv 1807.01774). The
    first wave is at random. What is proposed follows from seed and scores, so a tune that goes on proposes the same."""

    def __init__(self, name: str, space: Space, trials: int, seed: int = 0) -> None:
        self.name, self.space, self.count, self.seed = name, space, trials, seed
        self.line = f"{trials} by Optuna's {OPTUNAS[name]}, in {WAVES} waves"

    def wave(self, scores: Sequence[float]) -> list[Setting]:
        """A third of them at a time."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        size = math.ceil(self.count / WAVES)
        begins = {"n_startup_trials": size} if self.name != "qmc" else {}  # by its own it would begin to learn after ten
        with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):  # qmc, since version 3
            sampler = getattr(optuna.samplers, OPTUNAS[self.name])(seed=self.seed, **begins)
        study = optuna.create_study(sampler=sampler)
        for start in range(0, self.count, size):  # again from the first wave on
            asked = [study.ask() for _ in range(min(size, self.count - start))]
            spelt = [[f"{key}={self._value(trial, key, values)}" for key, values in self.space.items()] for trial in asked]
            if start >= len(scores):
                return spelt
            for trial, score in zip(asked, scores[start : start + size], strict=True):
                study.tell(trial, score)  # infinite too: of a trial that is told to have failed it would learn nothing
        return []

    def _value(self, trial: Any, key: str, values: list[str] | Range) -> str:
        if not isinstance(values, Range):
            return trial.suggest_categorical(key, values)
        suggest = trial.suggest_int if values.whole else trial.suggest_float
        ends = (int(values.low), int(values.high)) if values.whole else (values.low, values.high)
        return values.spelt(suggest(key, *ends, log=True))


def space_of(over: Sequence[str]) -> dict[str, list[str] | Range]:
    """Raises UserError."""
    found: dict[str, list[str] | Range] = {}
    for each in over:
        key, separator, text = each.partition("=")
        if not separator or not text:
            raise UserError(f"--over: '{each}' is none; write KEY=LOW..HIGH or KEY=a,b, as in optim.lr=1e-5..1e-3")
        if key in found:
            raise UserError(f"--over: {key} is given twice; join its values, as in {key}=a,b,c")
        found[key] = _range(each, text) if ".." in text else text.split(",")
    return found


def settings(over: Sequence[str], trials: int) -> list[Setting]:
    """The grid of what `over` names."""
    return grid(space_of(over), trials)


def grid(space: Space, trials: int) -> list[Setting]:
    """Every combination, the last key varying fastest. Ranges share what `trials` leaves them beside the lists. Raises
    UserError."""
    listed = math.prod(len(each) for each in space.values() if isinstance(each, list))
    ranges = sum(isinstance(each, Range) for each in space.values())
    points = int((trials / listed) ** (1 / ranges) + 1e-9) if ranges else 0
    if ranges and points < 2:
        raise UserError(f"--trials: {trials} leave a range of --over fewer than two values; give {listed * 2**ranges} or more")
    spelt = [each if isinstance(each, list) else each.spaced(points) for each in space.values()]
    found = [[f"{key}={value}" for key, value in zip(space, chosen, strict=True)] for chosen in product(*spelt)]
    if len(found) < 2:
        raise UserError("--over: there is one setting to try; give a range or several values")
    return found


def _range(said: str, text: str) -> Range:
    low, _, high = text.partition("..")
    try:
        ends = float(low), float(high)
    except ValueError:
        raise UserError(f"--over: '{said}' has ends that are no numbers; write KEY=1e-5..1e-3") from None
    if not 0 < ends[0] < ends[1] < math.inf:
        raise UserError(f"--over: '{said}' does not rise from a number above 0, as it must to be spaced in the logarithm")
    return Range(*ends, low.strip().isdigit() and high.strip().isdigit())
