"""`posttrain eval ... reward.function=NAME`: answers of several results to the same prompts, scored by the same rewards."""

from __future__ import annotations

import math
from typing import Any

from posttrain.commands.generate import KEYS as OF_REWARD
from posttrain.commands.generate import Wanted, generate
from posttrain.config.words import whole_number
from posttrain.console import say
from posttrain.errors import UserError
from posttrain.evaluation.calibration import wilson
from posttrain.models.language.loading import names_of, writing
from posttrain.models.language.one_base import OneBase
from posttrain.runs.artifact import open_artifact

KEYS = (*OF_REWARD, "max_new_tokens", "batch_size")
ROWS = 256  # of a file, unless a word says otherwise
DEFAULTS = {"rows": ROWS, "max_new_tokens": 256, "batch_size": 8}
Scores = dict[int, float]  # a prompt's row -> what its answer is worth


def answer_metrics(runs: list[str], settings: dict[str, str], of_data: dict[str, str]) -> dict[str, dict[str, float]]:
    """Mean score of every run's answers, and how often they win over the first run's. One answer a prompt, of the likeliest
    tokens. Answers are kept in the cache, by all that they were made from: what is there is not made again. Raises UserError
    before a model is loaded."""
    size = {key: whole_number(settings, key, 1) or default for key, default in DEFAULTS.items()}
    path = of_data.get("data.path")
    if path is None:
        raise UserError("reward.function: nothing says what is to be answered; give data.path=FILE, a file of prompts")
    wanted = Wanted(None, 1, 0.0, 1.0, size["max_new_tokens"], 0, size["batch_size"], most=size["rows"])
    words = [f"{key}={value}" for key, value in of_data.items() if key != "data.path"]
    words += [f"{key}={value}" for key, value in settings.items() if key.startswith("reward.")]
    names = names_of(runs)
    for run in runs:  # the last one's fault is no reason to hear of it after the first one's answers
        writing(open_artifact(run, "run").supported())
    load = OneBase()
    scores = {name: _scores(generate([run, path, *words], wanted, load)) for name, run in zip(names, runs, strict=True)}
    found = {name: _mean(each) for name, each in scores.items()}
    first = scores[names[0]]
    for name in names[1:]:
        found[name] |= win_rate(scores[name], first)
    if len(names) > 1:
        say(f"answers/win_rate: over the answers of {names[0]} to the same prompts, ties half; low, high: its 95 % interval")
    return found


def win_rate(scores: Scores, others: Scores) -> dict[str, float]:
    """Share of the prompts of both on which the score is higher, a tie being half a win, with its 95 % interval; nothing where
    they have no prompt in common."""
    both = scores.keys() & others.keys()
    if not both:
        return {}
    share = sum(0.5 if scores[row] == others[row] else float(scores[row] > others[row]) for row in both) / len(both)
    low, high = wilson(share, len(both))
    return {"answers/win_rate": share, "answers/win_rate_low": low, "answers/win_rate_high": high, "answers/compared": len(both)}


def _scores(lines: list[dict[str, Any]]) -> Scores:
    """Of the answers that a reward applies to."""
    return {line["row"]: score for line in lines if (score := line["answers"][0].get("score")) is not None}


def _mean(scores: Scores) -> dict[str, float]:
    """With its standard error."""
    values, count = list(scores.values()), len(scores)
    if not count:
        return {"answers/scored": 0}
    mean = sum(values) / count
    found = {"answers/score": mean}
    if count > 1:
        found["answers/score_stderr"] = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return found | {"answers/scored": count}
