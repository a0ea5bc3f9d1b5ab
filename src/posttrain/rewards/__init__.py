"""What an answer is worth: functions of the user's own by `reward.function=module:name`, or built in by their names.

rewards/builtin/ has one file for each that is built in. `posttrain.rewards:overlap`, `:brevity` and `:code_spans` are
functions to begin with. `reward.gold` and `rm.rule` take the same names.
"""

from __future__ import annotations

import re

from posttrain.rewards.builtin._words import word_f1
from posttrain.rewards.combined import best_and_worst, combined, unscored
from posttrain.rewards.function import RewardFunction, check_options, columns_by_name, load_function

__all__ = ["RewardFunction", "best_and_worst", "brevity", "check_options", "code_spans", "columns_by_name", "combined"]
__all__ += ["load_function", "overlap", "unscored"]
_WORD = re.compile(r"\w+")


def overlap(prompts: list[str], answers: list[str], references: list[str]) -> list[float]:
    """F1 of the words that an answer shares with the known one: 0 to 1 (as SQuAD scores answers, arXiv 1606.05250)."""
    return [word_f1(answer, reference) for answer, reference in zip(answers, references, strict=True)]


def brevity(prompts: list[str], answers: list[str]) -> list[float]:
    """1 for an empty answer, 0 for one of 100 words, and on below."""
    return [1 - len(_WORD.findall(answer)) / 100 for answer in answers]


def code_spans(prompts: list[str], answers: list[str]) -> list[float]:
    """How many `code` spans an answer has. It is easy to game, and here to show what that looks like."""
    return [float(answer.count("`") // 2) for answer in answers]
