"""What other tools call our settings: for errors, and for `posttrain import`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

_TABLE = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True)
class Word:
    """A word of another tool.

    key: ours; '' where there is none. values: theirs -> ours; None: the same. says: what stands for it here.
    """

    key: str = ""
    values: dict[Any, Any] | None = field(default=None)
    says: str = ""


@cache
def words() -> dict[str, Word]:
    """All that are known, by name."""
    table = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    return {name: Word(entry) if isinstance(entry, str) else Word(**entry) for name, entry in table.items()}


def meaning(word: str) -> str:
    """`learning_rate is optim.lr here`, or why there is no like; '' of a word that nobody knows."""
    name = word.lstrip("-").replace("-", "_")
    name = name if name in words() else name.rsplit(".", 1)[-1]
    if (known := words().get(name)) is None:
        return ""
    if not known.key:
        return f"{name} has no like here: {known.says}"
    return f"{name} is {known.key} here" + (f"; {known.says}" if known.says else "")


def option_meaning(option: str, value: str | None = None) -> str:
    """What is said of `--learning-rate 1e-4`, or of `--optim.lr`; '' of an option that nobody knows."""
    name, _, given = option.lstrip("-").partition("=")
    value = given or value or "..."
    if "." in name and not name.replace("-", "_").startswith("hydra"):
        return f"{option}: settings are words without dashes: {name}={value}"
    if not (said := meaning(name)):
        return ""
    known = words()[name.replace("-", "_")]
    same = known.key and known.values is None and "." in known.key
    return f"{option}: {said}" + (f"; say {known.key}={value}" if same else "")
