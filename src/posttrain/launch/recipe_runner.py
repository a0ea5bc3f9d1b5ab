"""Runs a recipe: every step its own process, what is done already skipped, what has changed done again."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout

from posttrain.console import console, say
from posttrain.errors import RunError, Stopped, UserError, did_you_mean
from posttrain.launch.answers_step import GENERATE, ROWS, answers_command, answers_config
from posttrain.launch.named_files import require_files
from posttrain.launch.recipe import Recipe, Step, load_recipe, recipe_names
from posttrain.launch.rounds import keys_that_name_steps
from posttrain.launch.step_status import StepStatus, is_done, made_from, status_of
from posttrain.launch.subprocess_runner import in_group, own_command, run_child, run_command
from posttrain.reports.live import KeptLive
from posttrain.runs.files import PAGE, write_json
from posttrain.stages.spec import spec_of


@dataclass(frozen=True)
class Planned:
    """A step with its final config. parents: config key -> run directory of the step that it names; init: what it starts from."""

    step: Step
    dir: Path
    config: dict[str, Any]
    parents: dict[str, Path]

    @property
    def record(self) -> Path:
        """The file that says what the directory of the step was made from."""
        return self.dir.with_name(f"{self.dir.name}.digest.json")

    def entry(self, status: str, why: str, seconds: float) -> dict[str, Any]:
        """The step's line in the recipe's report."""
        place = str(self.dir)
        return {
            "name": self.step.name,
            "stage": self.step.stage,
            "dir": place,
            "status": status,
            "why": why,
            "seconds": seconds,
        }


def run_recipe(
    name_or_path: str, overrides: list[str], from_step: str | None, fresh: bool, list_only: bool = False
) -> list[dict[str, Any]]:
    """Run what is to be done of a recipe; returns {name, stage, dir, status, why, seconds} of every step.

    Every step is composed and checked before the first one starts. from_step: that and all later ones are done again.
    list_only: only say what would be done. Raises UserError, RunError or Stopped, as the step's process ended.
    """
    if not name_or_path:
        return _list_recipes(list_only)
    recipe = load_recipe(name_or_path, overrides)
    planned = _compose(recipe)
    again = _again(recipe, from_step, fresh)
    if list_only:
        return _preview(planned, again)
    with _locked(recipe.dir):
        return _run_all(recipe, planned, again)


def _list_recipes(list_only: bool) -> list[dict[str, Any]]:
    names = recipe_names()
    if not list_only:
        raise UserError(f"give a recipe: {', '.join(names)}, or a file")
    for name in names:
        recipe = load_recipe(name, [])
        say(f"{name:<20}{' -> '.join(step.name for step in recipe.steps)}   {recipe.description}")
    return []


def _compose(recipe: Recipe) -> list[Planned]:
    from posttrain.config.compose import validate

    found: dict[str, Planned] = {}
    for number, step in enumerate(recipe.steps, 1):
        directory, parent = recipe.dir / f"{number}-{step.name}", found[step.parent] if step.parent else None
        try:
            config = _answers(step, parent) if step.stage == GENERATE else _stage(step, parent, recipe, directory)
            parents = ({"init": parent.dir} if parent else {}) | _name_steps(config, found)
            if step.stage != GENERATE:
                validate(config)
                require_files(config, parents)
        except UserError as e:
            raise UserError(f"step {step.name}: {e}") from None
        found[step.name] = Planned(step, directory, config, parents)
    return list(found.values())


def _answers(step: Step, parent: Planned | None) -> dict[str, Any]:
    config = answers_config(step.overrides, step.said)
    if not parent and not step.init:
        raise UserError("init: nothing answers the prompts; put a step above that makes a model, or name one")
    return config | {"init": str(parent.dir) if parent else step.init}


def _stage(step: Step, parent: Planned | None, recipe: Recipe, directory: Path) -> dict[str, Any]:
    from posttrain.config.code import require_own_words
    from posttrain.config.compose import compose, inherit_model

    words = list(step.words)
    config = compose(step.stage, words)
    config["init"] = step.init
    config = {**config, "model": _model(parent, config, words)} if parent else inherit_model(config, words)
    config = in_group(config, recipe.dir.name)
    require_own_words(config, step.said)
    return config | {"init": str(parent.dir) if parent else step.init, "run": config["run"] | {"dir": str(directory)}}


def _name_steps(config: dict[str, Any], above: dict[str, Planned]) -> dict[str, Path]:
    """Put the directories of steps above where the config names them as reward models, and their rows where it names them as
    files; returns which they are."""
    found: dict[str, Path] = {}
    for key in keys_that_name_steps(config["stage"]):
        *sections, last = key.split(".")
        place: dict[str, Any] = config
        for section in sections:
            place = cast("dict[str, Any]", place.get(section, {}))
        named = above.get(place[last]) if isinstance(place.get(last), str) else None
        makes_rows, wants_rows = bool(named) and named.step.stage == GENERATE, key in spec_of(config["stage"]).files
        if named and makes_rows == wants_rows:
            found[key] = named.dir
            place[last] = str(named.dir / ROWS if wants_rows else named.dir)
    return found


def _model(parent: Planned, config: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """The model of the step that this one starts from, but for keys that the user has set."""
    said = {word.lstrip("+").split("=")[0] for word in words}
    own, theirs = config["model"], parent.config["model"]
    if said & {"model", "model.name"} and own["name"] != theirs["name"]:
        raise UserError(
            f"its input {parent.step.name} is trained from {theirs['name']}, not {own['name']}; give model to all steps"
        )
    return theirs | {key: own[key] for key in own if f"model.{key}" in said or key == "trust_remote_code"}


def _again(recipe: Recipe, from_step: str | None, fresh: bool) -> dict[str, str]:
    """Steps that the user wants done again, with the flag that says so."""
    order = [step.name for step in recipe.steps]
    if from_step is not None:
        if not (named := recipe.of(from_step)):
            near = did_you_mean(from_step, [*order, *recipe.names])
            raise UserError(f"--from: there is no step '{from_step}'{near} (there are: {', '.join(order)})")
        from_step = named[0]
    if fresh:
        return dict.fromkeys(order, "--fresh")
    return dict.fromkeys(order[order.index(from_step) :], f"--from {from_step}") if from_step else {}


def _preview(planned: list[Planned], again: dict[str, str]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    waiting: set[Path] = set()
    for each in planned:
        if late := [directory for directory in each.parents.values() if directory in waiting]:
            standing = StepStatus("redo", f"its input {late[0].name.partition('-')[2]} is to be done first")
        else:
            standing = status_of(each.dir, each.record, made_from(each.config, each.parents), again.get(each.step.name))
        if standing.action != "skip":
            waiting.add(each.dir)
        entries.append(each.entry("skipped" if standing.action == "skip" else "to do", standing.why, standing.seconds))
        say(f"{each.dir.name:<16}{entries[-1]['status']:<10}{standing.why}")
    return entries


def _locked(directory: Path) -> FileLock:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / ".lock", blocking=False)
        lock.acquire()
    except Timeout:
        raise UserError(f"run.dir: another process is at work in {directory}; wait for it or give another run.dir") from None
    except OSError as e:
        raise UserError(f"run.dir: cannot write to {directory}: {e.strerror or e}; give another run.dir") from None
    return lock


def _run_all(recipe: Recipe, planned: list[Planned], again: dict[str, str]) -> list[dict[str, Any]]:
    entries = [each.entry("to do", "", 0.0) for each in planned]
    page = recipe.dir / PAGE
    entries[0]["status"] = "running"
    with KeptLive(page, partial(_write_page, entries, page), "recipe"):
        try:
            for i, each in enumerate(planned):
                say(f"[{i + 1}/{len(planned)}] {each.step.name} -> {each.dir}")
                entries[i]["status"] = "running"
                _run_step(each, again.get(each.step.name), entries[i])
        except BaseException as error:
            for entry in entries:
                if entry["status"] == "running":
                    entry["status"] = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
            raise
    _show(entries)
    say(f"report {page}")
    return entries


def _write_page(entries: list[dict[str, Any]], page: Path, state: str | None, every: float) -> None:
    """state: the entries say it."""
    from posttrain.reports.recipe_page import recipe_page

    recipe_page(entries, page, every)


def _run_step(each: Planned, again: str | None, entry: dict[str, Any]) -> None:
    """Skip, resume or run a step; `entry` follows what becomes of it."""
    parts = made_from(each.config, each.parents)
    standing = status_of(each.dir, each.record, parts, again)
    entry |= {"why": standing.why, "seconds": standing.seconds, "status": "skipped"}
    if standing.action == "skip":
        say(f"{each.step.name}: {standing.why}, skipped")
        return
    if standing.why:
        say(f"{each.step.name}: {standing.why}")
    if standing.action == "redo":
        say(f"the old one is kept: {_move_aside(each.dir)}")
    write_json(each.record, {**parts, "seconds": standing.seconds})
    entry["status"] = "running"
    began = time.monotonic()
    try:
        _run_child(each)
        entry["status"] = "done"
    finally:
        entry["seconds"] = standing.seconds + time.monotonic() - began
        write_json(each.record, {**parts, "seconds": round(entry["seconds"], 2)})


def _move_aside(directory: Path) -> Path:
    """Out of the way, under a name that is not taken."""
    base = f"{directory.name}.old-{time.strftime('%Y%m%d-%H%M%S')}"
    names = [base, *(f"{base}-{i}" for i in range(2, 100))]
    target = next(path for name in names if not (path := directory.with_name(name)).exists())
    return directory.rename(target)


def _run_child(each: Planned) -> None:
    """Raise the error that the process's exit code means. The process has printed the details itself."""
    name, what = each.step.name, f"step {each.step.name}"
    if each.step.stage == GENERATE:
        code = run_command(own_command(answers_command(each.config, each.dir)), what)
    else:
        code = run_child(each.config, what)
    if code == Stopped.exit_code:
        raise Stopped(f"in step {name}; the same command goes on")
    if code == UserError.exit_code:
        raise UserError(f"step {name} was refused, its own message is above")
    goes_on = "the same command goes on from its last checkpoint"
    if code < 0:
        raise RunError(f"step {name} was killed by signal {-code} (out of memory?); {goes_on}")
    if code or not is_done(each.dir):
        raise RunError(f"step {name} failed (exit {code}), its own message is above; {goes_on}")


def _show(entries: list[dict[str, Any]]) -> None:
    """The recipe as a table: held-out figures of the base and after each step."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from posttrain.reports.run_records import chain_table, duration, read_record

    trained = [e for e in entries if e["stage"] != GENERATE]
    columns, rows = chain_table([(e["name"], read_record(Path(e["dir"]))) for e in trained])
    table = Table(
        "held out",
        *(column.replace("/", "\n") for column in columns),
        "time",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    times = ["", *(duration(e["seconds"]) for e in trained)]
    for row, spent in zip(rows, times, strict=True):
        changes = [row.change(column) for column in columns]
        style = {"better": "green", "worse": "red", "": "default"}
        table.add_row(row.label, *(Text(c.after, style[c.verdict]) for c in changes), spent)
    console.print(table)
