"""Where a step of a recipe stands: what its directory was made from, against what it would be made from today."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain.launch.answers_step import GENERATE, ROWS
from posttrain.reports.run_records import plain
from posttrain.runs.artifact import open_artifact
from posttrain.runs.earlier import as_of_today, same_base
from posttrain.runs.files import sha256
from posttrain.runs.identity import digest, flatten, part_of_a_run
from posttrain.runs.manifest import MANIFEST, is_finished
from posttrain.stages.spec import spec_of


@dataclass(frozen=True)
class StepStatus:
    """why: what to tell the user. seconds: time that went into the directory so far."""

    action: Literal["new", "skip", "resume", "redo"]
    why: str = ""
    seconds: float = 0.0


def made_from(config: dict[str, Any], parents: dict[str, Path]) -> dict[str, Any]:
    """Everything that decides a step's result: its config, the steps before, and the content of local files.

    parents: config key (init, init_reward, reward.gold) -> run directory of a step. The identity of one that has not run is
    None.
    """
    kept = flatten(part_of_a_run(config))
    flat = {key: value for key, value in kept.items() if key not in parents}  # where a parent lies does not matter
    identities = {key: _identity(parent) for key, parent in parents.items()}
    parts: dict[str, Any] = {"config": flat, "input": identities, "files": _local_files(config, parents)}
    return {"digest": digest(parts), **parts, "input_name": {key: p.name.partition("-")[2] for key, p in parents.items()}}


def status_of(directory: Path, record: Path, parts: dict[str, Any], again: str | None) -> StepStatus:
    """parts: of made_from, today. record: the file with those of `directory`. again: the flag that wants it redone."""
    if not directory.exists():
        return StepStatus("new")
    if again:
        return StepStatus("redo", f"redone, {again}")
    try:
        then = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return StepStatus("redo", "redone, there is no record of what it was made from")
    if then["digest"] != parts["digest"] and not _is_the_same(then, parts):
        return StepStatus("redo", f"redone, {_difference(then, parts)}")
    if not is_done(directory):
        return StepStatus("resume", "goes on where it stopped", then["seconds"])
    if not is_finished(directory):  # rows, which are there
        return StepStatus("skip", "done already (same settings, prompts and model)", then["seconds"])
    gone = [name for name in open_artifact(directory, "run.dir").weight_files if not (directory / name).exists()]
    if gone:
        return StepStatus("redo", f"redone, its {gone[0]} is missing")
    return StepStatus("skip", "done already (same config, data and input)", then["seconds"])


def is_done(directory: Path) -> bool:
    """Has the step made what it is for, a result or rows?"""
    return is_finished(directory) or (directory / ROWS).exists()


def _is_the_same(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Though its config lacks keys that an earlier version did not have, or calls them otherwise."""
    config, _ = as_of_today(then["config"], now["config"])
    files = then["files"].keys() == now["files"].keys() and all(
        same_base(then["files"][n], now["files"][n]) for n in then["files"]
    )
    return config == now["config"] and then["input"] == now["input"] and files


def _difference(then: dict[str, Any], now: dict[str, Any]) -> str:
    before, after = then["config"], now["config"]
    keys = [key for key in before | after if before.get(key) != after.get(key)]
    said = [f"{key} {plain(before.get(key))} -> {plain(after.get(key))}" for key in keys[:3]]
    said += [f"and {len(keys) - 3} more"] if len(keys) > 3 else []
    said += [f"{path} changed" for path in now["files"] if then["files"].get(path, "") not in ("", now["files"][path])]
    inputs: dict[str, Any] = then["input"] or {}
    changed = [now["input_name"][key] for key, identity in now["input"].items() if inputs.get(key) != identity]
    said += [f"its input {name} changed" for name in changed]
    return ", ".join(said) or "its files changed"


def _identity(run_dir: Path) -> dict[str, Any] | None:
    if (run_dir / ROWS).exists():
        return {"rows": sha256(run_dir / ROWS)}
    if not is_finished(run_dir):
        return None
    artifact = open_artifact(run_dir, "init")
    return {"config": artifact.finished().config_digest, "weights": artifact.weight_files}


def _local_files(config: dict[str, Any], parents: dict[str, Path]) -> dict[str, str]:
    """Hashes of the data, template and model that the config names and this disk has."""
    flat, is_stage = flatten(config), config["stage"] != GENERATE
    files, run_keys = ("prompts",), ["init"]
    if is_stage:
        spec = spec_of(config["stage"])
        files, run_keys = spec.files, [parent.key for parent in spec.parents]
    said = [flat.get(key) for key in files if key not in parents]
    said += [value for key, value in flat.items() if key.startswith("eval.sets.")]
    named: list[Any] = []
    for value in said:
        named += value if isinstance(value, list) else [value]
    models = [flat.get("model.name"), *(flat.get(key) for key in run_keys if key not in parents)]
    found = {str(name): _content(Path(name).expanduser()) for name in named if name}
    found |= {str(name): _model(Path(name).expanduser()) for name in models if name}
    return {name: value for name, value in found.items() if value}


def _content(path: Path) -> str:
    if path.is_file():
        return sha256(path)
    if not path.is_dir():
        return ""
    inside = sorted(p for p in path.rglob("*") if p.is_file())
    return hashlib.sha256("".join(f"{p.relative_to(path)} {sha256(p)}\n" for p in inside).encode()).hexdigest()


def _model(path: Path) -> str:
    """A finished run by its manifest, a model's directory by its weights (hashed once, then remembered)."""
    if is_finished(path):
        return sha256(path / MANIFEST)
    if not path.is_dir() or not list(path.glob("*.safetensors")):
        return ""
    from posttrain.models.hub import digest as weights_digest

    return weights_digest(path)
