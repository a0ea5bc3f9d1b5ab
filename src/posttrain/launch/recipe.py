"""A recipe file and a user's overrides -> steps that are ready to be composed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import Field, ValidationError, field_validator

from posttrain.config.paths import root
from posttrain.config.schema import Guarded, Strict
from posttrain.config.stages import config_classes
from posttrain.errors import UserError, did_you_mean
from posttrain.launch.answers_step import GENERATE
from posttrain.launch.rounds import RawStep, in_round, unrolled
from posttrain.runs.yaml_files import read_yaml
from posttrain.stages.spec import stages

_SECTIONS = {*Guarded.model_fields, "experiment"}  # keys of every stage


class _Recipe(Strict):
    name: str = Field(pattern=r"^[\w-]+$")
    description: str
    overrides: tuple[str, ...] = ()
    steps: dict[str, RawStep] = Field(min_length=1)

    @field_validator("steps", mode="before")
    @classmethod
    def _bare_names(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: dict[str, Any]() if step is None else step for name, step in cast("dict[str, Any]", value).items()}


@dataclass(frozen=True)
class Step:
    """parent: the step above that it starts from. init: else a run's directory, a hub id, or None (the bare model). overrides:
    the recipe's; said: the user's, after them. round: its number, where it is done in rounds."""

    name: str
    stage: str
    parent: str | None
    init: str | None
    overrides: tuple[str, ...]
    said: tuple[str, ...] = ()
    round: int | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """What it is composed with."""
        return (*self.overrides, *self.said)


@dataclass(frozen=True)
class Recipe:
    """dir: where the steps' run directories go. names: the steps that a name of the file stands for, where it is not theirs:
    those of every round."""

    name: str
    description: str
    dir: Path
    steps: list[Step]
    names: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def of(self, name: str) -> list[str]:
        """The steps that a name stands for; none where nothing is called so."""
        return [name] if name in {step.name for step in self.steps} else self.names.get(name, [])


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in root("recipes").glob("*.yaml"))


def load_recipe(name_or_path: str, overrides: list[str]) -> Recipe:
    """Raises UserError for a recipe that does not exist, a file that is wrong, or an override that fits nowhere."""
    path = _find(name_or_path)
    raw = _read(path)
    unrolled_steps, names, overrides = unrolled(raw.steps, overrides, f"{path}: steps")
    numbers = {each: int(each.rpartition("-")[2]) for some in names.values() for each in some}  # NAME-2 is of the second round
    makers: list[str] = []  # the steps so far that make a model
    steps: list[Step] = []
    for name, spec in unrolled_steps.items():
        stage = _stage(path, name, spec)
        own = (*(() if stage == GENERATE else raw.overrides), *spec.overrides)
        step = Step(name, stage, None, None, own, round=numbers.get(name))
        before = makers[-1] if makers else None
        init = spec.init if "init" in spec.model_fields_set else before
        steps.append(_start(step, init, list(unrolled_steps), makers, f"{path}: steps.{name}.init"))
        makers += [name] * (stage != GENERATE)
    run_dir = Path("runs") / "recipes" / raw.name
    return _apply(Recipe(raw.name, raw.description, run_dir, steps, names), overrides)


def _find(name: str) -> Path:
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") or path.parent != Path():
        if not path.is_file():
            raise UserError(f"recipe: there is no file {path}")
        return path
    names = recipe_names()
    if name not in names:
        raise UserError(
            f"recipe: there is no '{name}'{did_you_mean(name, names)} (there are: {', '.join(names)}; or give a file)"
        )
    return root("recipes") / f"{name}.yaml"


def _read(path: Path) -> _Recipe:
    try:
        raw = read_yaml(path)
        return _Recipe.model_validate(raw)
    except ValidationError as e:
        raise UserError(f"{path}: {_complaint(e)}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:
        raise UserError(f"{path}: {' '.join(str(e).split())}") from None


def _complaint(error: ValidationError) -> str:
    # a misspelt key comes before the one that is missing because of it
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = list((RawStep if first["loc"][0] == "steps" else _Recipe).model_fields)
        return f"unknown key '{where}'{did_you_mean(str(first['loc'][-1]), known)} (there are: {', '.join(known)})"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{where}: {message}" if where else message


def _stage(path: Path, name: str, spec: RawStep) -> str:
    where = f"{path}: steps.{name}"
    if not re.fullmatch(r"[A-Za-z][\w-]*", name) or name in _SECTIONS:
        raise UserError(f"{where}: a step's name is letters, digits, - and _, and not a config key such as '{name}'")
    stage = spec.stage or name
    known = [*stages(), GENERATE]
    if stage not in known:
        raise UserError(f"{where}.stage: there is no stage '{stage}'{did_you_mean(stage, known)} (there are: {', '.join(known)})")
    return stage


def _start(step: Step, init: str | None, order: list[str], above: list[str], where: str) -> Step:
    """`init` as a step above, or as something outside of the recipe. above: the steps before that make a model."""
    if init in above:
        return replace(step, parent=init, init=None)
    if init in order[: order.index(step.name)]:
        raise UserError(f"{where}: '{init}' makes rows, not a model; say data.path={init} for those")
    if init in order:
        raise UserError(f"{where}: '{init}' is no step above '{step.name}'")
    if init and "/" not in init and (near := did_you_mean(init, above)) and not Path(init).exists():
        raise UserError(f"{where}: there is no step '{init}'{near}")
    return replace(step, parent=None, init=init)


def _apply(recipe: Recipe, overrides: list[str]) -> Recipe:
    """`sft.train.seed=1` (also `sft.+peft=lora`, `+sft.peft=lora`) goes to one step, `train.seed=1` to all."""
    order = [step.name for step in recipe.steps]
    steps = {step.name: step for step in recipe.steps}
    for line in overrides:
        found = re.fullmatch(r"([+~]*)([^=]+)(=.*)?", line, flags=re.DOTALL)
        if not found or not (found[3] or found[1] == "~"):
            raise UserError(f"'{line}' is no override: write key=value, or STEP.key=value for one step ({', '.join(order)})")
        sign, key, value = found[1], found[2], found[3] or ""
        if key == "run.dir":
            recipe = replace(recipe, dir=Path(value[1:]).expanduser())
            continue
        names, key = _addressed(recipe, key)
        for name in names:
            if key == "run.dir":
                raise UserError(f"{line}: steps lie in the recipe's directory; give run.dir={value[1:]} for all of it")
            if key == "init":
                above = [each for each in order[: order.index(name)] if steps[each].stage != GENERATE]
                steps[name] = _start(steps[name], None if value == "=null" else value[1:], order, above, line)
            else:
                word = in_round(f"{sign}{key}{value}", steps[name].round)
                steps[name] = replace(steps[name], said=(*steps[name].said, word))
    return replace(recipe, steps=[steps[name] for name in order])


def _addressed(recipe: Recipe, key: str) -> tuple[list[str], str]:
    """The steps that an override is for, and the key without their names. A bare `init` is for the first step; what names none is
    for those that train."""
    stage_of = {step.name: step.stage for step in recipe.steps}
    head, _, rest = key.partition(".")
    if (named := recipe.of(head)) and rest:
        if stage_of[named[0]] == GENERATE:
            return named, rest
        fields = config_classes()[stage_of[named[0]]].model_fields
        # dpo.beta=0.2 in a step called dpo: the step's own section, as nothing else there is called beta
        own = head in fields and rest.lstrip("+").split(".")[0] not in {*fields, *_SECTIONS}
        return named, key if own else rest
    training = [name for name, stage in stage_of.items() if stage != GENERATE]
    sections = _SECTIONS.union(*(config_classes()[stage_of[name]].model_fields for name in training))
    if head not in sections:
        known = [*stage_of, *recipe.names, *sorted(sections)]
        raise UserError(f"'{key}': '{head}' is neither a step nor a config key{did_you_mean(head, known)}")
    return ([next(iter(stage_of))] if key == "init" else training), key
