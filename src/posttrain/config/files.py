"""A YAML file of settings, `--config my.yaml`: read into the words that would say the same on the command line. Imports no Hydra.

A run's own config.yaml is such a file. It holds every key, so only what differs from the defaults of its own choices is said
again, and what belongs to that one run (its directory, its resume) is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml

from posttrain.config.settings_text import Loader12, settings_text, why_not
from posttrain.console import say
from posttrain.errors import UserError
from posttrain.runs.earlier import NAMED_BY_USER, as_it_ran, current_config

OPTION = "--config="  # how a list of words names a file
CHOSEN_BY = {"peft": "method", "quant": "method", "optim": "name"}  # group -> the key that holds the choice
# the keys that no file of one's own has all of: a run's config, or what `--cfg job` prints
_WHOLE = {"stage", "init", "full_lr", "tracker", "model", "data", "train", "optim", "run", "launch"}
_OF_ONE_RUN = ("run", "resume", "track.id", "stage")


Options = Callable[[str], Collection[str]]  # of a group


@dataclass(frozen=True)
class ConfigFile:
    """What a file says. tree: as it is written. lines: of each key, by its dotted name. is_whole: a run's config."""

    path: Path
    tree: dict[str, Any]
    lines: dict[str, int]
    is_whole: bool

    def place(self, key: str) -> str:
        """`my.yaml, line 3`, of a key, of the section that it lies in, or of what lies below it."""
        below = next((each for each in self.lines if each.startswith(f"{key}.")), "")
        for name in (key, below, *(key.rsplit(".", cut)[0] for cut in range(1, key.count(".") + 1))):
            if name in self.lines:
                return f"{self.path}, line {self.lines[name]}"
        return ""


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """(the words that name files, the user's own settings)."""
    return [word for word in words if word.startswith(OPTION)], [word for word in words if not word.startswith(OPTION)]


def with_files(words: list[str], stage: str, options: Options, composed: Callable[[list[str]], dict[str, Any]]) -> list[str]:
    """The words, with a file's own in place of `--config=FILE`, before all else, of several files the last to win; a group that
    is chosen over a file takes the place of the file's. options: of a group. composed: the config that words lead to."""
    names, own = split_words(words)
    files = [read_file(Path(word.removeprefix(OPTION)).expanduser(), stage) for word in names]
    over, whose = _groups(own, options), "the command line"  # what lies over a file, and who chose it
    found: list[str] = []
    for file in reversed(files):
        if file.is_whole and file is not files[0]:
            raise UserError(f"{file.path} holds every key, so it comes first: --config {file.path} --config {files[0].path}")
        lines = _lines(file, options, composed)
        replaced = [line for line in lines if _key(line).split(".")[0] in over]
        _say_once(file, replaced, whose)
        found = [*(line for line in lines if line not in replaced), *found]
        over, whose = over | _groups(lines, options), f"{whose} or {file.path}"
    return [*found, *own]


def _lines(file: ConfigFile, options: Options, composed: Callable[[list[str]], dict[str, Any]]) -> list[str]:
    choices = chosen(file, options)
    if file.is_whole:
        return [*_needed(choices, composed), *changes_of(file, composed(_choosing(choices)))]
    return words_of(file, choices)


def _key(line: str) -> str:
    return line.lstrip("+~").partition("=")[0]


def _groups(lines: list[str], options: Options) -> set[str]:
    """The groups that lines choose, each of which takes the place of a whole section."""
    return {name for name in map(_key, lines) if "." not in name and options(name)}


@contextmanager
def naming_place(stage: str, words: list[str]) -> Generator[None]:
    """A complaint about a key that a file holds ends with the file and the line, unless the user has said it himself."""
    try:
        yield
    except UserError as error:
        files, own = split_words(words)
        named = re.findall(r"\w+(?:\.\w+)+|\w+(?=[:='/])", str(error)) if files and ", line" not in str(error) else []
        for key in (key for key in named if key not in _said(own)):
            places = [read_file(Path(word.removeprefix(OPTION)).expanduser(), stage).place(key) for word in files[::-1]]
            if place := next(filter(None, places), ""):
                raise UserError(f"{error} ({place})") from None
        raise


def _said(words: list[str]) -> set[str]:
    return set(map(_key, words))


def _choosing(choices: dict[str, str]) -> list[str]:
    return [f"{group}={name}" for group, name in choices.items()]


def _needed(choices: dict[str, str], composed: Callable[[list[str]], dict[str, Any]]) -> list[str]:
    """Of a run's choices those that its method does not bring by itself: another method brings others."""
    method = {"peft": choices["peft"]} if "peft" in choices else {}
    brought = composed(_choosing(method))
    others = {group: name for group, name in choices.items() if group != "peft" and brought[group][CHOSEN_BY[group]] != name}
    return _choosing(method | others)


@cache
def _tell(line: str) -> None:
    say(line)  # composing is done several times


def _say_once(file: ConfigFile, replaced: list[str], whose: str) -> None:
    if replaced:
        _tell(f"{file.path}: {whose} chooses instead of {', '.join(replaced)}"[:400])
    if file.is_whole and (gone := left_out(file)):
        _tell(f"{file.path}: {', '.join(gone)} belonged to that run alone, and {'is' if len(gone) == 1 else 'are'} left out")


def read_file(path: Path, stage: str) -> ConfigFile:
    """Raises UserError, with the line, for what is no tree of settings, or another stage's."""
    if path.is_dir():
        raise UserError(f"--config: {path} is a directory; name a file in it, such as {path / 'config.yaml'}")
    try:
        loader = Loader12(settings_text(path))
        node = loader.get_single_node()
        settings = list(_settings(loader, node, "", path)) if node else []
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"--config: {path} cannot be read ({why_not(error)})") from None
    tree: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, value, line in settings:
        if key in lines:
            raise UserError(f"{key} stands twice ({path}, lines {lines[key]} and {line}); take one out")
        tree[key], lines[key] = value, line
    top = {key.split(".")[0] for key in tree}
    for key in tree.keys() & {"defaults"} | {key for key in tree if key.startswith("hydra")}:
        raise UserError(f"{key} is Hydra's, and for the command line or a --config-dir ({path}, line {lines[key]}); leave it out")
    if tree.get("stage", stage) != stage:
        raise UserError(
            f"stage: {path} is for {tree['stage']}, not for {stage} (line {lines['stage']}); say posttrain {tree['stage']}"
        )
    return ConfigFile(path, tree, lines, top >= _WHOLE)


def _settings(loader: Loader12, node: yaml.Node, prefix: str, path: Path) -> Iterator[tuple[str, Any, int]]:
    """(dotted key, value, line) of every leaf; what the user names himself is one leaf, the mapping as it is."""
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"--config: {path} holds no settings; write lines such as optim.lr: 1e-4")
    loader.flatten_mapping(node)
    for key_node, value in node.value:
        key = f"{prefix}{loader.construct_object(key_node)}"
        if isinstance(value, yaml.MappingNode) and value.value and f"{key}." not in NAMED_BY_USER:
            yield from _settings(loader, value, f"{key}.", path)
        else:
            yield key, loader.construct_object(value, deep=True), key_node.start_mark.line + 1


def chosen(file: ConfigFile, options: Options) -> dict[str, str]:
    """The options of groups that a file names: by `peft: qlora`, or by `peft: {method: qlora}`."""
    found = {f"{group}": file.tree[key] for group, by in CHOSEN_BY.items() if (key := f"{group}.{by}") in file.tree}
    found |= {key: value for key, value in file.tree.items() if "." not in key and key != "stage" and options(key)}
    return {group: "none" if name is None else str(name) for group, name in found.items()}


def words_of(file: ConfigFile, choices: dict[str, str]) -> list[str]:
    """The words that say what a file says. choices: as `chosen` gives them."""
    by = {f"{group}.{CHOSEN_BY[group]}" for group in choices if group in CHOSEN_BY and group not in file.tree}
    left = {key: value for key, value in file.tree.items() if key not in choices and key not in by and key != "stage"}
    return [*_choosing(choices), *(_word(key, value) for key, value in left.items())]


def _word(key: str, value: Any) -> str:
    """What the user names himself is added to what there is."""
    return f"{'++' if isinstance(value, dict) and f'{key}.' in NAMED_BY_USER else ''}{key}={as_value(value)}"


def changes_of(file: ConfigFile, base: dict[str, Any]) -> list[str]:
    """Of a run's config what differs from `base`, which its choices alone lead to."""
    then = _units(as_it_ran(current_config(_nested(file.tree))))
    now = _units(base)
    then = {key: value for key, value in then.items() if not _is_of_one_run(key)}
    words = [_word(key, value) for key, value in then.items() if key not in now or now[key] != value]
    named = [unit.removesuffix(".") for unit in NAMED_BY_USER]
    gone = {key: set(now[key]) - set(then.get(key) or {}) for key in named if isinstance(now.get(key), dict)}
    return [*(f"~{key}.{name}" for key, names in gone.items() if then.get(key) for name in sorted(names)), *words]


def left_out(file: ConfigFile) -> list[str]:
    """The settings of a run's config that belong to that run alone, and that it was given."""
    return [key for key in file.tree if _is_of_one_run(key) and key != "stage" and file.tree[key] and key != "run.warm"]


def _is_of_one_run(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in _OF_ONE_RUN)


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *above, last = key.split(".")
        place = tree
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    return tree


def _units(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """As `flatten`, but that what the user names himself stays a mapping."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and f"{name}." not in NAMED_BY_USER:
            found |= _units(cast("dict[str, Any]", value), f"{name}.")
        else:
            found[name] = value
    return found


def as_value(value: Any) -> str:
    """A value of YAML as Hydra's grammar writes it."""
    if isinstance(value, dict):
        pairs = cast("dict[Any, Any]", value).items()
        return "{" + ",".join(f"{_escaped(str(key))}:{as_value(each)}" for key, each in pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(as_value(each) for each in cast("list[Any]", value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if isinstance(value, int | float) else in_quotes(str(value))


def in_quotes(text: str) -> str:
    """Between single quotes of Hydra's grammar, in which backslashes count before a quote alone."""
    return "'" + re.sub(r"(\\+)$", r"\1\1", re.sub(r"(\\*)'", r"\1\1\\'", text)) + "'"


def _escaped(key: str) -> str:
    return re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", key)
