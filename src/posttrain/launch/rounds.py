"""Steps of a recipe that are done several times, each round from what the one before has made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from posttrain.config.fields import Positive, Strict
from posttrain.errors import UserError
from posttrain.stages.spec import INIT, stages


class RawStep(Strict):
    """A step as a recipe's file has it. repeat: how often its own `steps` are done."""

    stage: str | None = None
    init: str | None = None
    overrides: tuple[str, ...] = ()
    repeat: Positive | None = None
    steps: dict[str, RawStep | None] = Field(default_factory=dict)


def unrolled(
    steps: Mapping[str, RawStep], overrides: Sequence[str], where: str
) -> tuple[dict[str, RawStep], dict[str, list[str]], list[str]]:
    """All steps one by one, those of the third round as NAME-3; which of them a name of the file stands for; and the overrides
    without those that say how often (`rounds.repeat=5`).

    Within a round a name is that of the same round where it stands above, else that of the round before; in the first round
    `init` then is the step before all rounds.
    """
    often = {name: spec.repeat for name, spec in steps.items() if spec.repeat}
    rest: list[str] = []
    for line in overrides:
        found = re.fullmatch(r"([^.=]+)\.repeat=(\d+)", line)
        if found and found[1] in often:
            often[found[1]] = max(int(found[2]), 1)
        else:
            rest.append(line)
    flat: dict[str, RawStep] = {}
    names: dict[str, list[str]] = {}
    for name, spec in steps.items():
        if not spec.repeat:
            if spec.steps:
                raise UserError(f"{where}.{name}: steps of a step are rounds; say repeat: 3, say")
            flat[name] = spec
            continue
        own = {inner: each or RawStep() for inner, each in spec.steps.items()}
        _check(name, spec, own, {*steps, *names}, where)
        before = next(reversed(flat), None)
        for number in range(1, often[name] + 1):
            for inner, each in own.items():
                flat[f"{inner}-{number}"] = _of_round(each, inner, number, list(own), before, f"{where}.{name}.steps.{inner}")
                names.setdefault(inner, []).append(f"{inner}-{number}")
        names[name] = [each for inner in own for each in names[inner]]
    return flat, names, rest


def in_round(word: str, number: int | None) -> str:
    """An override with the number of its step's round where it says `{round}`."""
    return word if number is None else word.replace("{round}", str(number))


def keys_that_name_steps(stage: str) -> list[str]:
    """Of a stage's config, beside `init`: other parents, and files, which may be the rows that a step has made."""
    spec = stages().get(stage)
    return [*(parent.key for parent in spec.parents if parent != INIT), *spec.files] if spec else []


def _check(name: str, spec: RawStep, own: Mapping[str, RawStep], taken: set[str], where: str) -> None:
    if not own:
        raise UserError(f"{where}.{name}: repeat: there are no steps in it to repeat")
    if spec.stage or spec.init or spec.overrides:
        raise UserError(f"{where}.{name}: rounds have repeat and steps alone; what each is made with stands at its own step")
    for inner, each in own.items():
        if each.repeat or each.steps:
            raise UserError(f"{where}.{name}.steps.{inner}: there are no rounds within rounds")
        if inner in taken:
            raise UserError(f"{where}.{name}.steps.{inner}: another step has this name; give it one of its own")


def _of_round(step: RawStep, name: str, number: int, own: list[str], before: str | None, where: str) -> RawStep:
    """The step as it is in this round."""

    def named(value: str) -> str | None:
        if value not in own:
            return value
        if own.index(value) < own.index(name):
            return f"{value}-{number}"
        return f"{value}-{number - 1}" if number > 1 else None

    words: list[str] = []
    naming = keys_that_name_steps(step.stage or name)
    for word in step.overrides:
        key, equals, value = in_round(word, number).partition("=")
        if (found := named(value) if key.lstrip("+") in naming else value) is None:
            raise UserError(f"{where}: {word}: in the first round '{value}' has made nothing yet; name a step above")
        words.append(f"{key}{equals}{found}")
    changed: dict[str, Any] = {"stage": step.stage or name, "overrides": tuple(words)}
    if "init" in step.model_fields_set and step.init is not None:
        changed["init"] = named(step.init) or before
    return step.model_copy(update=changed)
