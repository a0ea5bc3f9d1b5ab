"""What earlier versions called things: keys of configs that still work for one version, and runs that still open."""

from __future__ import annotations

from typing import Any, cast

RENAMED_KEYS = {"reward.missing_end": "reward.missing_eos_penalty"}  # old -> new, since 0.2

# new key -> a key beside it, and what runs without the new one did; since 0.2
ADDED_KEYS: dict[str, tuple[str, Any]] = {"model.kernels": ("attention", "auto"), "dpo.options": ("loss", None)}


def current_config(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config as today's version writes it. `config` stays as it is."""
    for old, new in RENAMED_KEYS.items():
        config = _moved(config, old.split("."), new.split("."))
    for added, (beside, value) in ADDED_KEYS.items():
        section, key = added.split(".")
        if beside in (config.get(section) or {}):
            config = {**config, section: {key: value, **config[section]}}
    return config


def _moved(tree: dict[str, Any], old: list[str], new: list[str]) -> dict[str, Any]:
    """With the value at `old` at `new`, which lies in the same section."""
    if len(old) == 1:
        return {new[0] if key == old[0] else key: value for key, value in tree.items()}
    section = tree.get(old[0])
    return {**tree, old[0]: _moved(cast("dict[str, Any]", section), old[1:], new[1:])} if isinstance(section, dict) else tree
