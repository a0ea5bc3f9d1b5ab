"""What is found while the config of another tool is read into ours."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

UNKNOWN = "has no like here"
DEFAULT = "'s default"
SECRET = re.compile(r"(hub|hf|ms|api|access|auth)_(token|key)$|secret|password")


@dataclass
class Translation:
    """settings: our key -> (value, their words for it). notes: (their word, its value, why it is not taken over). unsaid: (a
    word that the file has not, what the tool does there and we do not). template: the text of a chat template in the config."""

    tool: str
    stage: str
    tree: dict[str, Any]
    settings: dict[str, tuple[Any, list[str]]] = field(default_factory=dict[str, Any])
    notes: list[tuple[str, Any, str]] = field(default_factory=list[Any])
    unsaid: list[tuple[str, str]] = field(default_factory=list[Any])
    read: set[str] = field(default_factory=set[str])
    template: str = ""

    def has(self, word: str) -> bool:
        """Is it given, and not null?"""
        return self.tree.get(word) not in (None, "", [], {})

    def take(self, word: str) -> Any:
        """Its value, which is then read."""
        self.read.add(word)
        return self.tree.get(word) if self.has(word) else None

    def number(self, word: str) -> float | None:
        """Its value as a number, which is then read; None where it is not given, or is none, which is noted."""
        value = self.take(word)
        try:
            found = float(value) if not isinstance(value, bool | list | dict | None) else math.nan
        except (TypeError, ValueError):
            found = math.nan
        if math.isfinite(found):
            return found
        return None if value is None else self.note(word, value, "is no number")

    def put(self, key: str, value: Any, word: str) -> None:
        """A setting of ours; where another word has given it another value, the later one is noted."""
        if key not in self.settings:
            self.settings[key] = (value, [word])
        elif self.settings[key][0] == value:
            self.settings[key][1].append(word)
        else:
            self.note(word, value, f"{key} comes from {self.settings[key][1][0]}")

    def note(self, word: str, value: Any, why: str) -> None:
        """Something that is not taken over. What is secret is not written down again."""
        value = "..." if SECRET.search(word) else value
        self.notes.append((word, value, why))

    def refuse(self, key: str, why: str) -> None:
        """A setting of ours that does not fit becomes a note, unless it is but the tool's default."""
        value, words = self.settings.pop(key)
        if not words[0].endswith(DEFAULT):
            self.note(", ".join(words), value, f"{key}: {why}")


def whole(value: float) -> int | float:
    """4.0 as 4."""
    return int(value) if value == int(value) else value


def looked_up(values: dict[Any, Any], value: Any) -> tuple[bool, Any]:
    """(whether a table has the value, ours). Numbers and truth values are told apart."""
    if not isinstance(value, Hashable):
        return False, None
    found = [ours for theirs, ours in values.items() if theirs == value and isinstance(theirs, bool) == isinstance(value, bool)]
    return (True, found[0]) if found else (False, None)
