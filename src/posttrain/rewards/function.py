"""A reward function: how it is found, tried out before a model loads, and asked."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from posttrain.config.choices import REWARDS
from posttrain.console import say
from posttrain.errors import BeforeStep, UserError, did_you_mean
from posttrain.rewards.given import NoScores, listed
from posttrain.rewards.limits import OutOfTime, within
from posttrain.runs.earlier import current_function

LIMIT = 600.0  # seconds that a function may take, where nobody says otherwise
# what a function may call the list of answers
ANSWERS = ("answers", "completions", "responses")
Columns = Mapping[str, Sequence[Any]]  # of the rows, by name: a value for each answer, None where its row has none


@dataclass(frozen=True)
class RewardFunction:
    """A function of the user's: lists of prompts and answers as text in, as many numbers out (rewards/given.py).

    It gets by name what it names: prompts, answers (or completions, responses), references, and any column of the rows; all of
    them with **kwargs. Two arguments of other names at its beginning, or *args alone, are prompts and answers. columns: of all
    rows (`of_rows`); it is given None where those that it is asked about lack one.
    """

    name: str
    call: Callable[..., Any]
    limit: float = LIMIT
    columns: frozenset[str] = frozenset()

    def __call__(self, prompts: list[str], answers: list[str], references: list[str], columns: Columns | None = None) -> Tensor:
        """float32 [A], not a number where the function says None: it does not apply to that answer.

        Raises BeforeStep where the function raises, takes longer than `limit` seconds, or gives something else than a finite
        number or None for each.
        """
        try:
            return self._scores(prompts, answers, references, columns or {})
        except _Failed as error:
            raise BeforeStep(f"reward function {error}") from error.__cause__

    def try_out(self, prompts: list[str], answers: list[str], references: list[str], columns: Columns, field: str) -> None:
        """Ask it once, before a model loads; what it remembers of that is forgotten. Raises UserError, about `field`."""
        try:
            tried = replace(self, call=copy.deepcopy(self.call))
        except Exception:  # it holds what cannot be copied
            tried = self
        try:
            tried._scores(prompts, answers, references, columns)
        except _Failed as error:
            raise UserError(f"{field}: tried out on the first rows, {error}") from error.__cause__

    def state(self) -> Any:
        """What an object with `state_dict` remembers, which JSON must hold; None of any other."""
        told: Any = getattr(self.call, "state_dict", None)
        return told() if told else None

    def load(self, state: Any) -> None:
        """Let it remember what `state` has given."""
        load: Any = getattr(self.call, "load_state_dict", None)
        if state is not None and load:
            load(state)

    @property
    def short_name(self) -> str:
        """As figures name it."""
        return self.name.rpartition(":")[2]

    def _scores(self, prompts: list[str], answers: list[str], references: list[str], columns: Columns) -> Tensor:
        try:
            with within(self.limit):
                found = listed(self._called(prompts, answers, references, columns))
                scores = [math.nan if value is None else float(value) for value in found]
        except OutOfTime:
            raise _Failed(f"{self.name} took longer than reward.timeout={self.limit:g} seconds") from None
        except UserError:  # of what is built in
            raise
        except NoScores as error:
            raise _Failed(f"{self.name} {error}") from None
        except (Exception, SystemExit) as error:
            said = " ".join(str(error).split())
            raise _Failed(f"{self.name} raised {type(error).__name__}: {said}") from error
        if len(scores) != len(answers):
            raise _Failed(f"{self.name} gave {len(scores)} scores for {len(answers)} answers; it must give one each")
        for value, score, answer in zip(found, scores, answers, strict=True):
            if value is not None and not math.isfinite(score):
                raise _Failed(f"{self.name} gave {score} for {answer[:60]!r}; give a number, or None where it does not apply")
        return torch.tensor(scores)

    def _called(self, prompts: list[str], answers: list[str], references: list[str], columns: Columns) -> Any:
        lacking: Columns = {name: [None] * len(answers) for name in sorted(self.columns - set(columns))}
        more = {"prompts": prompts, "completions": answers, "references": references, **columns, **lacking}
        known = more | {"prompts": prompts, "references": references} | dict.fromkeys(ANSWERS, answers)
        first = [prompts, answers] if self._is_placed else []
        by_place = [p.name for p in self._parameters[len(first) :] if p.kind is p.POSITIONAL_ONLY and p.name in known]
        placed = first + [known[name] for name in by_place]
        wanted = set(self._names[len(placed) :])
        if any(p.kind is p.VAR_KEYWORD for p in self._parameters):
            wanted |= {name for name in more if name not in self._names[: len(placed)]}
        return self.call(*placed, **{name: known[name] for name in wanted if name in known})

    def of_rows(self, columns: Collection[str], answered: bool, field: str) -> RewardFunction:
        """The same, for rows of which some have these columns. answered: has any of them an answer?

        Raises UserError, about `field`, for an argument that is no column of theirs, and for what is built in and finds nothing
        to compare with.
        """
        known = {*columns, "prompts", *ANSWERS, "references"}
        needed = [
            p.name for p in self._parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        for name in needed[2 * self._is_placed :]:
            if name not in known:
                have = ", ".join(sorted(columns)) or "none"
                raise UserError(
                    f"{field}: {self.name} asks for '{name}', which is no column of the rows{did_you_mean(name, sorted(known))}; "
                    f"their columns are {have}"
                )
        if not answered and (lacks := getattr(self.call, "lacks", lambda columns: "")(columns)):
            raise UserError(f"{field}: {self.name} {lacks}; their columns are {', '.join(sorted(columns)) or 'none'}")
        return replace(self, columns=frozenset(columns) - {"prompts", "references", *ANSWERS})

    @property
    def _parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.call).parameters.values())

    @property
    def _names(self) -> list[str]:
        """Of arguments that are not gathered in * or **."""
        return [p.name for p in self._parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]

    @property
    def _is_placed(self) -> bool:
        """Are its first two arguments prompts and answers by their places?"""
        first = self._parameters[:2]
        if [p.kind for p in first] == [inspect.Parameter.VAR_POSITIONAL]:
            return True
        given = all(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in first)
        known = {"prompts", *ANSWERS, "references"}
        return len(first) == 2 and given and not {p.name for p in first} & known


class _Failed(Exception):
    """What a function has done in place of scoring, in a line."""


def load_function(
    name: str, field: str, options: Mapping[str, Mapping[str, Any] | None] | None = None, limit: float = LIMIT
) -> RewardFunction:
    """A reward that is built in, with its own of `options`, or `module:name`, looked for where Python looks and in the current
    directory; of a class, an instance. Raises UserError, about `field`."""
    module_name, colon, attribute = name.partition(":")
    if not colon:
        with _about(field):
            return RewardFunction(name, _built_in(name, field, (options or {}).get(name) or {}), limit)
    if not module_name or not attribute:
        raise UserError(f"{field}: '{name}' is no function; write module:name, as in my_rewards:brevity")
    if (new := current_function(name)) != name:
        say(f"{field}: {name} is {new} now; the old name works until the next version")
        module_name = new.partition(":")[0]
    try:
        module = _module(module_name)
        if not hasattr(module, attribute):
            there = sorted(key for key, value in vars(module).items() if callable(value))
            raise UserError(f"{field}: there is no '{attribute}' in {module_name}{did_you_mean(attribute, there)}")
        found: Any = getattr(module, attribute)
        found = found() if inspect.isclass(found) else found
        inspect.signature(found)
    except UserError:
        raise
    except Exception as error:  # whatever the user's module raises
        raise UserError(f"{field}: '{name}' cannot be had ({type(error).__name__}: {error})") from error
    return RewardFunction(name, found, limit)


def _module(name: str) -> ModuleType:
    """As Python finds it, in the current directory too. A file there comes before an installed package of its name, for this
    function alone: all others keep the package."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # last: it shadows no module
    own = Path(here) / f"{name}.py"
    found = importlib.util.find_spec(name) if own.is_file() else None
    if found is None or Path(found.origin or "") == own:
        return importlib.import_module(name)
    alias = str(own)
    if alias not in sys.modules:
        spec = importlib.util.spec_from_file_location(alias, own)
        assert spec and spec.loader
        sys.modules[alias] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[alias])
        except BaseException:
            del sys.modules[alias]
            raise
    return sys.modules[alias]


def check_options(
    options: Mapping[str, Any] | None,
    names: Collection[str | None],
    key: str = "reward.options",
    where: str = "reward.function",
) -> None:
    """Raises UserError for options, which are those of `key`, of a reward that is not among the `names` of `where`."""
    if unused := sorted({*(options or {})} - {*names}):
        raise UserError(f"{key}.{unused[0]}: no {where} is so called; add it, or leave its options out")


def columns_by_name(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """As functions are given them: by name, a value for each row; None where it has none."""
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


@contextmanager
def _about(field: str) -> Generator[None]:
    """What is built in speaks of `reward`, whose words a function has elsewhere under other names."""
    try:
        yield
    except UserError as error:
        options = f"{field.rpartition('.')[0]}.options"
        raise UserError(str(error).replace("reward.options", options).replace("reward.function", field)) from None


def _built_in(name: str, field: str, options: Mapping[str, Any]) -> Any:
    if name not in REWARDS.names():
        known = ", ".join(REWARDS.names())
        raise UserError(
            f"{field}: there is no reward '{name}'{did_you_mean(name, REWARDS.names())}; built in are {known}; one of your own "
            "is module:name, as in my_rewards:brevity"
        )
    kind = REWARDS.get(name)
    known = list(inspect.signature(kind).parameters)
    if unknown := next((option for option in options if option not in known), None):
        raise UserError(
            f"reward.options.{name}.{unknown}: {name} has {', '.join(known) or 'no options'}{did_you_mean(unknown, known)}"
        )
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"reward.options.{name}: {error}") from None
