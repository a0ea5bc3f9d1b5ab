"""`posttrain import`: the config of another tool as a file of ours, with a comment for each key that has no like."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any, cast

import yaml

from posttrain.commands.bring.data import read_data
from posttrain.commands.bring.losses import read_losses
from posttrain.commands.bring.numbers import read_numbers
from posttrain.commands.bring.sampling import read_sampling
from posttrain.commands.bring.special import read_method, read_template
from posttrain.commands.bring.tools import TRL, stage_of, tool_of, with_defaults, with_sections_open
from posttrain.commands.bring.translation import DEFAULT, UNKNOWN, Translation, looked_up
from posttrain.commands.bring.unsaid import say_unsaid
from posttrain.config.compose import compose_run
from posttrain.config.files import OPTION
from posttrain.config.other_tools import words
from posttrain.config.settings_text import WithExponents
from posttrain.console import say
from posttrain.errors import UserError
from posttrain.runs.files import write_text
from posttrain.stages.spec import spec_of

_OF_STAGE = {
    "ppo": {"beta": "ppo.kl_coef", "rl_beta": "ppo.kl_coef", "loss_type": "ppo.loss"},
    "sft": {"loss_type": "sft.loss"},
}  # where a word has another meaning than with pairs


def import_config(path: Path, to: Path | None, stage: str | None = None) -> str:
    """Translate a file; returns the YAML, which is in `to` too where that is given.

    Raises UserError for a file of no tool that we know, a method or stage that has no like, and a `to` that is there already.
    """
    if to and to.exists():
        raise UserError(f"--to: {to} is there already; name another file")
    if stage:
        spec_of(stage)
    found, known_by = translate(_read(path), path.name, stage)
    beside = _beside(found, to)
    text = _checked(found, path, known_by)
    if to:
        for place, content in beside.items():
            write_text(place, content)
        write_text(to, text)
        say(f"wrote {to}: {len(found.settings)} settings of {found.tool}'s {path.name}, stage {found.stage} ({known_by})")
    for word, _, why in found.notes:
        say(f"not taken over: {word} - {why}")
    for word, why in found.unsaid:
        say(f"otherwise here: {word} - {why}")
    return text


def _beside(found: Translation, to: Path | None) -> dict[Path, str]:
    """What is written beside the file: a chat template that stands in the config."""
    place = to.with_suffix(".jinja") if to else None
    if found.template and place and not place.exists():
        found.put("model.chat_template", str(place), "chat_template, whose text is there")
        return {place: found.template}
    if found.template:
        why = f"{place} is there already; name another file with --to" if place else "with --to my.yaml its text becomes my.jinja"
        found.note("chat_template", "...", why)
    return {}


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8-sig").replace("\t", "    "), WithExponents)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        said = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({said})"[:400]) from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no settings")
    return {str(key): value for key, value in cast("dict[Any, Any]", tree).items()}


def translate(tree: dict[str, Any], name: str, asked: str | None) -> tuple[Translation, str]:
    """(all of it, how the stage is known)."""
    tool = tool_of(tree, name)
    tree = with_sections_open(tree, tool)
    stage, extra, known_by = stage_of(tree, tool, asked)
    usual = with_defaults(tree, tool, stage)
    found = Translation(tool, stage, tree | usual)
    found.read |= {"stage", "rl"} if tool != TRL else set()
    for key, value in extra.items():
        found.put(key, value, known_by)
    read_method(found)
    read_data(found)
    read_template(found)
    read_losses(found)
    read_sampling(found)
    read_numbers(found)
    for word, value in found.tree.items():
        if word not in found.read and found.has(word):
            _read_word(found, word, value)
    _mark_defaults(found, usual)
    say_unsaid(found, tree)
    return found, known_by


def _read_word(found: Translation, word: str, value: Any) -> None:
    known = words().get(word)
    if known is None:
        return found.note(word, value, UNKNOWN)
    key = _OF_STAGE.get(found.stage, {}).get(word, known.key)
    if not key:
        return found.note(word, value, known.says)
    if known.values is None and "." not in key and key not in ("data", "init"):
        return found.note(word, value, f"choose {key}= yourself")
    if known.values is None:
        return found.put(key, value, word)
    if value is False and False not in known.values:
        return None  # what is off asks for nothing
    has, ours = looked_up(known.values, value)
    return found.put(key, ours, word) if has else found.note(word, value, known.says or f"{key} has no such choice")


def _mark_defaults(found: Translation, usual: dict[str, Any]) -> None:
    for key, (value, given) in found.settings.items():
        if all(word in usual for word in given):
            found.settings[key] = (value, [f"{', '.join(given)}: {found.tool}{DEFAULT}"])
    found.notes = [note for note in found.notes if note[0] not in usual]


def _checked(found: Translation, path: Path, known_by: str) -> str:
    """The text, from which what our schema refuses is taken out, each with a note."""
    own = ["data.path=x.jsonl"] if found.settings.get("data", ("",))[0] == "file" else []
    own += ["reward.function=length"] if found.stage == "ppo" else []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(len(found.settings) + 1):
            text, keys = _written(found, path, known_by)
            file = Path(folder) / "import.yaml"
            file.write_text(text, encoding="utf-8")
            try:
                compose_run(found.stage, [f"{OPTION}{file}", *own])
                return text
            except UserError as error:
                line = re.search(r" \(\S*import\.yaml, line (\d+)\)$", str(error))
                said = str(error)[: line.start()] if line else str(error)
                key = keys.get(int(line[1])) if line else said.partition(": ")[0]
                if key not in found.settings:
                    raise UserError(f"{path}: {error}") from None
                found.refuse(key, said.removeprefix(f"{key}: "))
    raise AssertionError("each turn takes out a key")


def _written(found: Translation, path: Path, known_by: str) -> tuple[str, dict[int, str]]:
    """(the text, the key of each line)."""
    lines = [
        f"# {' '.join(path.name.split())} of {found.tool}, by posttrain import: posttrain {found.stage} --config ...",
        f"stage: {found.stage}  # {known_by}",
    ]
    keys: dict[int, str] = {}
    for key, (value, given) in sorted(found.settings.items(), key=lambda item: ("." in item[0], item[0])):
        lines.append(f"{key}: {_inline(value)}  # {', '.join(given)}")
        keys[len(lines)] = key
    if found.notes:
        lines += ["", "# Not taken over:"]
        said = [f"{word}: {_inline(value)[:200]} - {why}" for word, value, why in found.notes]
        lines += sorted(f"# {' '.join(line.split())}" for line in said)  # a line of theirs stays a comment
    if found.unsaid:
        lines += ["", f"# {found.tool} does otherwise where its file says nothing:"]
        lines += [f"# {word} - {why}" for word, why in found.unsaid]
    return "\n".join(lines) + "\n", keys


def _inline(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").rstrip("\n")
    return json.dumps(value, default=str) if "\n" in text else text
