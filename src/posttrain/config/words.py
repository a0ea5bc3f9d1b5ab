"""KEY=VALUE words of a command that are no part of a config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from posttrain.errors import UserError


def whole_number(words: Mapping[str, str], key: str, least: int = 0) -> int | None:
    """The number of `key`; None where it is not given. Raises UserError for what is none, or is below `least` (0 or 1)."""
    if key not in words:
        return None
    if not words[key].isdecimal() or int(words[key]) < least:
        raise UserError(f"{key}: '{words[key]}' is no whole number{' above 0' if least else ''}")
    return int(words[key])


def value_of(text: str, key: str) -> Any:
    """A value as YAML has it. Raises UserError."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{key}: '{text}' is no value; put text with odd characters in quotes") from None


def part_of(text: str, key: str) -> tuple[int, int]:
    """`2/3` -> (2, 3). Raises UserError."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"{key}: '{text}' is no part; say 2/3 for the second of three")
    return int(found[1]), int(found[2])
