"""What is found while the config of another tool is read into ours."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

UNKNOWN = "has no like here"


@dataclass
class Translation:
    """settings: our key -> (value, their words for it). notes: (their word, its value, why it is not taken over). template: the
    text of a chat template that stands in the config."""

    tool: str
    stage: str
    tree: dict[str, Any]
    settings: dict[str, tuple[Any, list[str]]] = field(default_factory=dict[str, Any])
    notes: list[tuple[str, Any, str]] = field(default_factory=list[Any])
    read: set[str] = field(default_factory=set[str])
    template: str = ""

    def has(self, word: str) -> bool:
        """Is it given, and not null?"""
        return self.tree.get(word) not in (None, "", [], {})

    def take(self, word: str) -> Any:
        """Its value, which is then read."""
        self.read.add(word)
        return self.tree.get(word) if self.has(word) else None

    def put(self, key: str, value: Any, word: str) -> None:
        """A setting of ours; where another word has given it another value, the later one is noted."""
        if key not in self.settings:
            self.settings[key] = (value, [word])
        elif self.settings[key][0] == value:
            self.settings[key][1].append(word)
        else:
            self.note(word, value, f"{key} comes from {self.settings[key][1][0]}")

    def note(self, word: str, value: Any, why: str) -> None:
        """Something that is not taken over."""
        self.notes.append((word, value, why))

    def refuse(self, key: str, why: str) -> None:
        """A setting of ours that does not fit becomes a note."""
        value, words = self.settings.pop(key)
        self.note(", ".join(words), value, f"{key}: {why}")


def looked_up(values: dict[Any, Any], value: Any) -> tuple[bool, Any]:
    """(whether a table has the value, ours). Numbers and truth values are told apart."""
    if not isinstance(value, Hashable):
        return False, None
    found = [ours for theirs, ours in values.items() if theirs == value and isinstance(theirs, bool) == isinstance(value, bool)]
    return (True, found[0]) if found else (False, None)
