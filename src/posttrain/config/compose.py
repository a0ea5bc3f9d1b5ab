"""Hydra composes plain YAML, pydantic checks the result. No file imports Hydra but this one and parsed_files.py."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import yaml
from hydra._internal.core_plugins.bash_completion import BashCompletion
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.default_element import GroupDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.version import setbase
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from posttrain.config.code import refuse_targets, require_own_words
from posttrain.config.complaints import first_complaint, unknown_key
from posttrain.config.files import in_quotes, naming_place, split_words, with_files
from posttrain.config.inherit import inherit_model
from posttrain.config.interfaces import REGISTRIES
from posttrain.config.judged import require_measured
from posttrain.config.parsed_files import ParsedFiles
from posttrain.config.paths import root
from posttrain.config.stages import REGISTRY, typed_config
from posttrain.console import say
from posttrain.errors import UserError, did_you_mean
from posttrain.runs.directory import refuse_secrets
from posttrain.runs.earlier import NAMED_BY_USER, RENAMED_KEYS
from posttrain.runs.identity import flatten
from posttrain.runs.yaml_files import check_aliases

LORA_FACTOR = 10.0  # peft.lr_factor of lora, to which a stage's lora_lr belongs
OmegaConf.register_new_resolver("mul", lambda *factors: math.prod(factors), replace=True)
OmegaConf.register_new_resolver("by", lambda name, known, other: known.get(name, other), replace=True)
OmegaConf.register_new_resolver("rate", lambda full, lora, f: full if f == 1 else lora * f / LORA_FACTOR, replace=True)


def compose(stage: str, overrides: list[str], config_dir: Path | None = None) -> dict[str, Any]:
    """The config of one run, resolved, as a plain dict. Raises UserError, in one line, for an override that does not fit."""
    REGISTRY.get(stage)  # refuses a name that is none
    with opened(config_dir) as hydra, _in_one_line(hydra, stage, overrides):
        return _composed(hydra, stage, normalise(hydra, stage, overrides))


def _composed(hydra: Hydra, stage: str, lines: list[str]) -> dict[str, Any]:
    return plain(hydra.compose_config(stage, lines, RunMode.RUN, with_log_configuration=False))


def validate(config: dict[str, Any]) -> Any:
    """The typed config. Raises UserError naming the first field that is wrong, or that holds a secret."""
    refuse_secrets(config)
    try:
        cfg = typed_config(config)
    except ValidationError as error:
        raise UserError(first_complaint(error, config)) from None
    if metric := cfg.train.judged_by:
        require_measured(cfg, metric, "train.keep_best" if cfg.train.keep_best else "train.early_stopping.metric")
    return cfg


@contextmanager
def opened(config_dir: Path | None, task: str = "posttrain") -> Iterator[Hydra]:
    """A Hydra whose search path is the user's directory, the shipped one, and those that installed packages bring; an earlier one
    can shadow those after it."""
    setbase("1.3")
    path = create_config_search_path(str(root("configs")))
    for folder in (folder for registry in (REGISTRY, *REGISTRIES) for folder in registry.config_dirs()):
        path.prepend(provider="plugin", path=f"file://{folder.resolve()}", anchor=SearchPathQuery(provider="schema"))  # the last
    if config_dir:
        if not config_dir.is_dir():
            raise UserError(f"--config-dir: {config_dir} is no directory")
        try:
            check_aliases(config_dir)
        except yaml.YAMLError as error:
            raise UserError(f"--config-dir: {error}") from None
        path.prepend(provider="user", path=f"file://{config_dir.resolve()}", anchor=SearchPathQuery(provider="main"))
    GlobalHydra.instance().clear()
    try:
        hydra = Hydra.create_main_hydra2(task_name=task, config_search_path=path)
        cast(Any, hydra.config_loader).repository = ParsedFiles(path)
        yield hydra
    finally:
        GlobalHydra.instance().clear()


def plain(config: Any) -> dict[str, Any]:
    """Without Hydra's own part, all interpolations resolved."""
    whole = OmegaConf.to_container(config, resolve=False)
    assert isinstance(whole, dict)
    whole.pop("hydra", None)
    resolved = OmegaConf.to_container(OmegaConf.create(whole), resolve=True)
    assert isinstance(resolved, dict)
    if missing := sorted(OmegaConf.missing_keys(OmegaConf.create(whole))):
        raise UserError(f"{missing[0]} has no value; give {missing[0]}=...")
    return {str(key): value for key, value in resolved.items()}


def normalise(hydra: Hydra, stage: str, overrides: list[str]) -> list[str]:
    """`+peft=qlora`, `++peft=qlora`, `peft=qlora`, `peft=null` and `~peft` all mean what they say; odd values are quoted. What
    `--config=FILE` says stands before all else."""
    return [_normal(hydra, stage, quoted(hydra, _renamed(line))) for line in _with_files(hydra, stage, overrides)]


def _with_files(hydra: Hydra, stage: str, words: list[str]) -> list[str]:
    return with_files(words, stage, hydra.config_loader.get_group_options, partial(_composed, hydra, stage))


def _renamed(line: str) -> str:
    """With a key of an earlier version under its new name, which is said."""
    key, separator, value = line.partition("=")
    sign, name = key[: len(key) - len(key.lstrip("+~"))], key.lstrip("+~")
    if new := RENAMED_KEYS.get(name):
        say(f"{name} is {new} now; the old name works until the next version")
    return f"{sign}{new or name}{separator}{value}"


def quoted(hydra: Hydra, line: str) -> str:
    """The override, its value in quotes where Hydra's grammar would stumble over a plain path or text."""
    if parse(hydra, line) is not None:
        return line
    key, separator, value = line.partition("=")
    if not separator and line.lower().endswith((".yaml", ".yml", ".json")):
        raise UserError(f"'{line}' is no setting; a file of settings is given as --config {line.lstrip('@')}")
    candidate = f"{key}={in_quotes(value)}"
    unfinished = value[:1] in "[{(" and value[-1:] not in "]})"
    if not separator or unfinished or parse(hydra, candidate) is None:
        raise UserError(f"'{line}' is no override: write key=value, lists as [a,b], text with odd characters in quotes")
    return candidate


def parse(hydra: Hydra, line: str) -> Override | None:
    """An override as Hydra reads it; None where Hydra's grammar does not allow it."""
    try:
        return OverridesParser.create(hydra.config_loader).parse_override(line)
    except (HydraException, OmegaConfBaseException):
        return None


def _is_chosen_from(hydra: Hydra, stage: str, group: str) -> bool:
    """Whether a stage's defaults, or what they include, take one of a group's options."""
    own = cast(Any, hydra.config_loader).repository.load_config(stage).defaults_list
    if group in {default.group for default in own if isinstance(default, GroupDefault)}:
        return True  # nearly always; all of them takes Hydra as long as the composition itself
    return group in hydra.config_loader.compute_defaults_list(stage, [], RunMode.MULTIRUN).overrides.known_choices


def _normal(hydra: Hydra, stage: str, line: str) -> str:
    override = parse(hydra, line)
    assert override is not None
    group = override.key_or_group
    if not hydra.config_loader.get_group_options(group):
        # below these no + is needed
        return f"++{line.lstrip('+')}" if group.startswith(NAMED_BY_USER) and not override.is_delete() else line
    if override.is_delete():
        return f"{group}=none"
    value = line.split("=", 1)[1]
    if not override.is_sweep_override():
        _require_option(hydra, group, value)
    sign = "" if _is_chosen_from(hydra, stage, group) else "+"
    return f"{sign}{group}={'none' if value == 'null' else value}"


def _require_option(hydra: Hydra, group: str, value: str) -> None:
    options = hydra.config_loader.get_group_options(group)
    if value not in (*options, "null"):
        raise UserError(f"{group}: there is no '{value}'{did_you_mean(value, options)} (there are: {', '.join(options)})")


@contextmanager
def _in_one_line(hydra: Hydra, stage: str, words: list[str]) -> Iterator[None]:
    with naming_place(stage, words):
        try:
            yield
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            raise UserError(_explain(hydra, stage, str(error))) from None


def _explain(hydra: Hydra, stage: str, message: str) -> str:
    """What Hydra says over several lines, as one with the key and a near name."""
    found = re.search(r"[Kk]ey '([\w.]+)' is not in struct\s+full_key: ([\w.\[\]]+)", message)
    if found:
        return unknown_key(found.group(2), shipped_keys(hydra, stage))
    found = re.search(r"Could not override '([^']+)'", message)
    if found:
        return unknown_key(found.group(1), shipped_keys(hydra, stage))
    for pattern, said in _OF_VALUES.items():
        if found := re.search(pattern, message):
            return said.format(*found.groups())
    return " ".join(message.split())[:300]


# what Hydra and OmegaConf say of values -> ours
_OF_VALUES = {
    r"Ambiguous value for argument '([^'=]+)=(.*)'\s+1\.": "{0}: {1} is several values; write [{1}] for a list, -m for a sweep",
    r"Environment variable '(\w+)' not found.*\s+full_key: (\S+)": "{1}: the environment variable {0} is not set",
    r"Interpolation key '([^']+)' not found\s+full_key: (\S+)": "{1}: there is no setting {0}, which it names",
    r"Error merging override (.*)": "{0} cannot be taken: a ${{ names another setting, and ends with }}",
}


def shipped_keys(hydra: Hydra, stage: str) -> list[str]:
    """Every key that this stage knows, in any of its variants: {"optim.lr", "peft.r", ...}."""
    keys = set(flatten(plain(hydra.compose_config(stage, [], RunMode.RUN, with_log_configuration=False))))
    for group in ("peft", "quant"):
        keys |= {f"{group}.{key}" for key in cast(Any, hydra.config_loader).repository.keys(group)}
    return sorted(keys | {key.rsplit(".", 1)[0] for key in keys if "." in key})


def compose_run(stage: str, overrides: list[str], config_dir: Path | None = None) -> dict[str, Any]:
    """A config that is ready to run: composed, with the model of the run it starts from, and validated."""
    config = compose(stage, overrides, config_dir)
    with naming_place(stage, overrides):
        config = inherit_model(config, said_words(stage, overrides, config_dir))
        require_own_words(config, split_words(overrides)[1])
        validate(config)
    return config


def said_words(stage: str, overrides: list[str], config_dir: Path | None = None) -> list[str]:
    """The words, with those that say what `--config=FILE` does in its place."""
    if not split_words(overrides)[0]:
        return overrides
    with opened(config_dir) as hydra:
        return _with_files(hydra, stage, overrides)


def show(stage: str, overrides: list[str], config_dir: Path | None, cfg: str | None, info: str | None) -> str:
    """The composed config as YAML (`--cfg job`), or the defaults that made it (`--info defaults`)."""
    if cfg not in (None, "job"):
        raise UserError(f"--cfg: there is no '{cfg}'{did_you_mean(cfg or '', ['job'])} (there is: job)")
    if info not in (None, "defaults"):
        raise UserError(f"--info: there is no '{info}'{did_you_mean(info or '', ['defaults'])} (there is: defaults)")
    if cfg:
        return yaml.safe_dump(compose_run(stage, overrides, config_dir), sort_keys=False).rstrip()
    with opened(config_dir) as hydra, _in_one_line(hydra, stage, overrides):
        lines = normalise(hydra, stage, overrides)
        found = hydra.config_loader.compute_defaults_list(stage, lines, RunMode.RUN)
        return "\n".join(
            f"{entry.config_path}.yaml -> {entry.package or 'top level'}" for entry in found.defaults if entry.config_path
        )


def completions(stage: str, word: str) -> list[str]:
    """What Hydra's own completion of this stage offers for the beginning of an override."""
    with opened(None) as hydra:
        return BashCompletion(hydra.config_loader)._query(stage, word)


def expand(stage: str, overrides: list[str], config_dir: Path | None = None) -> list[list[str]]:
    """The jobs of a sweep: one list of overrides for every combination of `a=1,2`, the last key varying fastest."""
    REGISTRY.get(stage)  # refuses a name that is none
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    files, own = split_words(overrides)
    with opened(config_dir) as hydra, _in_one_line(hydra, stage, overrides):
        parsed = OverridesParser.create(hydra.config_loader).parse_overrides(normalise(hydra, stage, own))
        batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
        return [[*files, *job] for batch in batches for job in batch]  # a file's words are never the user's


def launch(stage: str, overrides: list[str], config_dir: Path | None, task: Any, sweep_dir: Path) -> None:
    """Call `task(config)` once a job, through the launcher that `hydra/launcher=` names (one after another by default)."""
    quiet = ["hydra/hydra_logging=none", "hydra/job_logging=none", "hydra.output_subdir=null", "hydra.mode=MULTIRUN"]
    place = [f"hydra.sweep.dir='{sweep_dir / '.hydra'}'", "hydra.sweep.subdir=${hydra.job.num}", f"run.dir='{sweep_dir}'"]
    with opened(config_dir) as hydra, _in_one_line(hydra, stage, overrides):
        lines = normalise(hydra, stage, [line for line in overrides if not line.lstrip("+").startswith("run.dir=")])
        refuse_targets(hydra.compose_config(stage, [*lines, *quiet, *place], RunMode.MULTIRUN, with_log_configuration=False))
        hydra.multirun(config_name=stage, task_function=task, overrides=[*lines, *quiet, *place], with_log_configuration=False)
