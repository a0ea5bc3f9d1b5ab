"""Settings that have code run: the user's own words alone may hold them, never a file that somebody else may have written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from omegaconf import OmegaConf

from posttrain.errors import UserError, did_you_mean
from posttrain.runs.identity import flatten

# key -> what the user must have said to have it
NAMES_CODE = {
    "model.trust_remote_code": ("model.trust_remote_code", "model.revision"),
    "reward.function": ("reward.function",),
    "reward.gold": ("reward.gold",),
    "rm.rule": ("rm.rule",),
    "reward.options.judge.url": ("reward.options.judge.url",),
    "eval.generate.metrics": ("eval.generate.metrics",),
    "eval.generate.options.judge.url": ("eval.generate.options.judge.url",),
    "eval.harness.include": ("eval.harness.include",),
    "launch.sbatch": ("launch.sbatch",),
}
PLACES = ("eval.harness.include",)  # of code, whatever their value looks like
OURS = ("posttrain.rewards:", "posttrain.rules:")  # functions that come with the package
# what Hydra may call: its own parts, and the launchers that docs/configuration.md names
TARGETS = {
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
    "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher",
    "hydra_plugins.hydra_ray_launcher.ray_aws_launcher.RayAWSLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
}


def require_own_words(config: dict[str, Any], words: Sequence[str]) -> None:
    """Raises UserError where a setting that has code run stands in `config` and not in `words`, which the user has typed."""
    said = {line.lstrip("+~").partition("=")[0] for line in words}
    for key, value in _running_code(config).items():
        if not said.issuperset(needed := NAMES_CODE[key]):
            raise UserError(
                f"{key}: {value} has code run, which only you can ask for, and no run, recipe or config file; where you trust "
                f"it, say {'=... '.join(needed)}=... yourself"
            )


def refuse_own_code(config: dict[str, Any], field: str, instead: str) -> None:
    """Raises UserError, about `field`, where any setting of `config` has code run. instead: what to do then."""
    for key, value in _running_code(config).items():
        raise UserError(f"{field}: {key}={value} has code run, which its config alone may not ask for; {instead}")


def _running_code(config: dict[str, Any]) -> dict[str, Any]:
    flat = flatten(config)
    return {key: flat[key] for key in NAMES_CODE if (flat.get(key) if key in PLACES else _runs_code(flat.get(key)))}


def _runs_code(value: Any) -> bool:
    values = cast("list[Any]", value) if isinstance(value, list) else [value]
    return any(each is True or (isinstance(each, str) and _is_code(each)) for each in values)


def _is_code(value: str) -> bool:
    """A function by its module, or an option of another program."""
    return value.startswith("--") or (":" in value and not value.startswith(OURS))


def refuse_targets(composed: Any) -> None:
    """Hydra calls what its own section names: raises UserError where that is none of `TARGETS`."""
    for way, value in _targets(OmegaConf.to_container(composed.hydra, resolve=False), "hydra"):
        if value not in TARGETS:
            raise UserError(f"{way}: {value} would be run{did_you_mean(value, sorted(TARGETS))}; only Hydra's launchers are")


def _targets(tree: Any, way: str) -> Iterator[tuple[str, str]]:
    """Every `_target_`, at any depth of dicts and lists, with its key."""
    pairs = cast("dict[Any, Any]", tree).items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        if key == "_target_":
            yield f"{way}.{key}", str(value)
        else:
            yield from _targets(value, f"{way}.{key}")
