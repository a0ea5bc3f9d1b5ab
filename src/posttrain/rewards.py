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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.config.schema import RewardConfig
from posttrain.console import say
from posttrain.errors import RunError, UserError
from posttrain.losses.policy import whiten
from posttrain.runs.earlier import current_function

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class RewardFunction:
    """A function of the user's: lists of prompts and answers as text in, as many numbers out."""

    name: str
    call: Callable[..., Any]
    takes_references: bool

    def __call__(self, prompts: list[str], answers: list[str], references: list[str]) -> Tensor:
        """float32 [A]. Raises RunError where the function raises, or gives something else than a finite number for each."""
        extra = {"references": references} if self.takes_references else {}
        try:
            found = [float(value) for value in self.call(prompts, answers, **extra)]
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
        parameters = inspect.signature(found).parameters
    except Exception as error:  # whatever the user's module raises
        raise UserError(f"{field}: '{name}' cannot be had ({type(error).__name__}: {error})") from error
    return RewardFunction(name, found, "references" in parameters)


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
