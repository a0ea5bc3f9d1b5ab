"""What makes a run itself: its config by keys, a name for it, and the code and libraries that it was made with."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel

from posttrain.errors import UserError
from posttrain.runs.earlier import current_config

# what may differ between two starts of the same run: sections, and single keys of others
NOT_PART_OF_A_RUN = ("run", "tracker", "track", "resume", "launch", "train.launcher")
LIBRARIES = ("posttrain", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers")


def digest(config: BaseModel | dict[str, Any]) -> str:
    """sha256 of the canonical JSON of everything that can change the result."""
    plain = config.model_dump(mode="json") if isinstance(config, BaseModel) else config
    return hashlib.sha256(json.dumps(part_of_a_run(plain), sort_keys=True).encode()).hexdigest()


def part_of_a_run(config: dict[str, Any]) -> dict[str, Any]:
    """The config without what may differ between two starts of the same run."""
    kept = {key: value for key, value in config.items() if key not in NOT_PART_OF_A_RUN}
    for section, _, key in (name.partition(".") for name in NOT_PART_OF_A_RUN):
        if key and isinstance(found := kept.get(section), dict):
            kept[section] = {name: value for name, value in cast("dict[str, Any]", found).items() if name != key}
    return kept


def content_hash(*parts: Any) -> str:
    """A short name for what can be written as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> {"optim.lr": 0.001, ...}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in cast("dict[Any, Any]", tree).items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def identity_of(config: dict[str, Any]) -> dict[str, Any]:
    """By key as today's version calls it, every setting that makes a run itself."""
    return flatten(part_of_a_run(current_config(config)))


def allowed(config: dict[str, Any]) -> list[str]:
    """The keys that resume.allow names."""
    keys = config["resume"]["allow"]
    return [keys] if isinstance(keys, str) else list(keys or [])


def compare(then: dict[str, Any], now: dict[str, Any], allow: list[str], whose: str, field: str = "run.dir") -> list[str]:
    """A line for each key that has changed. Raises UserError unless `allow` has it, or a section of it."""
    changed = [key for key in sorted(then | now) if then.get(key) != now.get(key)]
    lines = [f"{key} was {then.get(key)}, is now {now.get(key)}" for key in changed]
    refused = [line for key, line in zip(changed, lines, strict=True) if not any(f"{key}.".startswith(f"{a}.") for a in allow)]
    if refused:
        more = f" (and {len(refused) - 3} more)" if len(refused) > 3 else ""
        allow_it = f"resume.allow={refused[0].split()[0]}"
        raise UserError(
            f"{field}: {whose}: {'; '.join(refused[:3])}{more}; give another {field}, the same settings, or {allow_it}"
        )
    return lines


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide results."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def code_state() -> dict[str, Any]:
    """Commit and dirtiness of the checkout this code runs from; nulls for an installed package."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        tracked = bool(git("ls-files", Path(__file__).name))
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))} if tracked else _NO_GIT
    except (OSError, subprocess.CalledProcessError):
        return _NO_GIT


_NO_GIT: dict[str, Any] = {"commit": None, "dirty": None}
