"""How many words two texts share."""

from __future__ import annotations

import re
from collections import Counter

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """In small letters, without punctuation."""
    return _WORD.findall(text.lower())


def f1_of(shared: int, said: int, known: int) -> float:
    """The harmonic mean of shared / said and shared / known."""
    return 2 * shared / (said + known) if shared else 0.0


def word_f1(answer: str, right: str) -> float:
    """Of the words of both, in any order."""
    said, known = Counter(words(answer)), Counter(words(right))
    return f1_of((said & known).total(), said.total(), known.total())


def longest_common(one: list[str], other: list[str]) -> int:
    """Length of the longest sequence of words that both have in this order, with others between them or not."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for i, known in enumerate(other, 1):
            before, row[i] = row[i], before + 1 if word == known else max(row[i], row[i - 1])
    return row[-1]
