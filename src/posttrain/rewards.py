"""What an answer is worth: functions of the user's own or built in, by `reward.function=module:name`, and their weighted sum.

Built in are `posttrain.rewards:overlap`, `:brevity` and `:code_spans`; any function with the same arguments will do.
`reward.gold` and `rm.rule` take the same names.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.config.schema import RewardConfig
from posttrain.console import say
from posttrain.errors import RunError, UserError, did_you_mean
from posttrain.losses.advantages import whiten
from posttrain.runs.earlier import current_function

_WORD = re.compile(r"\w+")


# what a function may call the list of answers
ANSWERS = ("answers", "completions", "responses")
Columns = Mapping[str, Sequence[Any]]  # of the rows, by name: a value for each answer, None where its row has none


@dataclass(frozen=True)
class RewardFunction:
    """A function of the user's: lists of prompts and answers as text in, as many numbers out.

    It gets by name what it names: prompts, answers (or completions, responses), references, and any column of the rows; all of
    them with **kwargs. Two arguments of other names at its beginning are prompts and answers.
    """

    name: str
    call: Callable[..., Any]

    def __call__(self, prompts: list[str], answers: list[str], references: list[str], columns: Columns | None = None) -> Tensor:
        """float32 [A]. Raises RunError where the function raises, or gives something else than a finite number for each."""
        try:
            found = [float(value) for value in self._called(prompts, answers, references, columns or {})]
        except Exception as error:
            raise RunError(
                f"reward function {self.name} raised {type(error).__name__}: {error}; the last checkpoint is kept"
            ) from error
        if len(found) != len(answers):
            raise RunError(
                f"reward function {self.name} gave {len(found)} scores for {len(answers)} answers; it must give one each"
            )
        wrong = next((i for i, value in enumerate(found) if not math.isfinite(value)), None)
        if wrong is not None:
            raise RunError(
                f"reward function {self.name} gave {found[wrong]} for {answers[wrong][:60]!r}; the last checkpoint is kept"
            )
        return torch.tensor(found)

    def _called(self, prompts: list[str], answers: list[str], references: list[str], columns: Columns) -> Any:
        more = {"prompts": prompts, "completions": answers, "references": references, **columns}
        known = more | {"prompts": prompts, "references": references} | dict.fromkeys(ANSWERS, answers)
        placed = [prompts, answers] if self._is_placed else []
        wanted = set(self._names[len(placed) :])
        if any(p.kind is p.VAR_KEYWORD for p in self._parameters):
            wanted |= {name for name in more if name not in self._names[: len(placed)]}
        return self.call(*placed, **{name: known[name] for name in wanted if name in known})

    def check(self, columns: Collection[str], field: str) -> None:
        """Raises UserError, about `field`, for an argument that is no column of the rows."""
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
        given = all(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in first)
        known = {"prompts", *ANSWERS, "references"}
        return len(first) == 2 and given and not {p.name for p in first} & known


def load_function(name: str, field: str) -> RewardFunction:
    """`module:name`, looked for where Python looks and in the current directory. Raises UserError, about `field`."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UserError(f"{field}: '{name}' is no function; write module:name, as in my_rewards:brevity")
    if (new := current_function(name)) != name:
        say(f"{field}: {name} is {new} now; the old name works until the next version")
        module_name = new.partition(":")[0]
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # last: it shadows no module
    try:
        found = getattr(importlib.import_module(module_name), attribute)
        inspect.signature(found)
    except Exception as error:  # whatever the user's module raises
        raise UserError(f"{field}: '{name}' cannot be had ({type(error).__name__}: {error})") from error
    return RewardFunction(name, found)


def combined(scores: Sequence[Tensor], ended: Tensor, cfg: RewardConfig) -> tuple[Tensor, Tensor]:
    """The weighted sum of several scores [A] each, and the shaped reward that is learnt from: whitened, clipped, and
    less the penalty for an answer without end (ended: bool [A])."""
    weights = cfg.weights or [1.0] * len(scores)
    reward = torch.stack([weight * score for weight, score in zip(weights, scores, strict=True)]).sum(0)
    shaped_reward = whiten(reward) if cfg.whiten else reward
    shaped_reward = shaped_reward if cfg.clip is None else shaped_reward.clamp(-cfg.clip, cfg.clip)
    return reward, shaped_reward - cfg.missing_eos_penalty * (~ended).float()


def overlap(prompts: list[str], answers: list[str], references: list[str]) -> list[float]:
    """F1 of the words that an answer shares with the known one: 0 to 1 (as SQuAD scores answers, arXiv 1606.05250)."""
    return [_f1(answer, reference) for answer, reference in zip(answers, references, strict=True)]


def brevity(prompts: list[str], answers: list[str]) -> list[float]:
    """1 for an empty answer, 0 for one of 100 words, and on below."""
    return [1 - len(_WORD.findall(answer)) / 100 for answer in answers]


def code_spans(prompts: list[str], answers: list[str]) -> list[float]:
    """How many `code` spans an answer has. It is easy to game, and here to show what that looks like."""
    return [float(answer.count("`") // 2) for answer in answers]


def _f1(answer: str, reference: str) -> float:
    said, known = (Counter(_WORD.findall(text.lower())) for text in (answer, reference))
    shared = sum((said & known).values())
    return 2 * shared / (said.total() + known.total()) if shared else 0.0
