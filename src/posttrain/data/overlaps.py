"""Rows that repeat others, that are held out as well, or that are known from a test set: found before any is trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from posttrain.data.likeness import (
    NUMBERS,
    RUN,
    SHORTEST,
    key_of,
    nearest_before,
    runs_of,
    signature_of,
    texts_of,
    words_of,
)
from posttrain.data.parallel import in_order
from posttrain.data.rows import CanonicalRow
from posttrain.data.sources.source import NumberedRow, parts_of, read_rows

Sound = Callable[[list[NumberedRow]], Iterable[tuple[int, CanonicalRow]]]  # rows -> those that can be read, as canonical ones


@dataclass(frozen=True)
class TestTexts:
    """The runs of words in test sets: of `RUN` words; and of a row that has no text of so many, all its words in a row."""

    names: list[str]
    runs: list[dict[int, NDArray[np.uint64]]]  # by set and length, sorted

    @classmethod
    def read(cls, path: str | None) -> TestTexts:
        """Raises UserError for a file that cannot be read."""
        names = parts_of(path) if path else []
        return cls(names, [_runs_of_set(name) for name in names])

    def known_from(self, words: NDArray[np.uint64]) -> list[str]:
        """The sets of which a row with these words has a run."""
        return [name for name, runs in zip(self.names, self.runs, strict=True) if _share_any(words, runs)]


def _runs_of_set(path: str) -> dict[int, NDArray[np.uint64]]:
    found: dict[int, list[NDArray[np.uint64]]] = {}
    for _, row in read_rows(path, split="eval" if path.startswith("builtin:") else "test"):
        texts = [words_of([text]) for text in texts_of(row)]
        whole = np.concatenate([*texts, np.zeros(0, np.uint64)])
        long = [runs_of(words, RUN) for words in texts if len(words) >= RUN]
        if long:
            found.setdefault(RUN, []).extend(long)
        elif len(whole) >= SHORTEST:
            found.setdefault(len(whole), []).append(runs_of(whole, len(whole)))
    return {length: np.unique(np.concatenate(runs)) for length, runs in found.items()}


def _share_any(words: NDArray[np.uint64], runs: dict[int, NDArray[np.uint64]]) -> bool:
    for length, known in runs.items():
        own = runs_of(words, length)
        places = np.minimum(np.searchsorted(known, own), len(known) - 1)
        if (known[places] == own).any():
            return True
    return False


class Marks(NamedTuple):
    """What rows are compared by. rows: int64 [n, 2], number and key (see `key_of`) of each: 16 bytes of memory a row. signatures:
    [n, NUMBERS], where near duplicates are looked for. known: rows that hold words of test sets, and of which."""

    rows: NDArray[np.int64]
    signatures: NDArray[np.uint32]
    known: list[tuple[int, list[str]]]


@dataclass
class Overlaps:
    """Numbers of rows that stand elsewhere too. shared, shared_near: by the earlier source; known: by test set."""

    repeated: list[int] = field(default_factory=list[int])
    also_held: list[int] = field(default_factory=list[int])
    near: list[int] = field(default_factory=list[int])
    shared: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    shared_near: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    known: dict[str, list[int]] = field(default_factory=dict[str, list[int]])

    @property
    def numbers(self) -> frozenset[int]:
        """All of them."""
        elsewhere = [*self.shared.values(), *self.shared_near.values(), *self.known.values()]
        return frozenset().union(self.repeated, self.also_held, self.near, *elsewhere)


def rows_of(pairs: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """int64 [n, 2]: number and key of each row."""
    return np.asarray(pairs, dtype=np.int64).reshape(-1, 2)


def marks_of(rows: Iterator[NumberedRow], sound: Sound, near: bool, tests: TestTexts) -> Marks:
    """Of all rows, found in pieces on all cores."""
    found = list(in_order(partial(_marks, sound=sound, near=near, tests=tests), pieces(rows)))
    known = [each for marks in found for each in marks.known]
    whole = np.concatenate([rows_of([]), *(marks.rows for marks in found)])
    return Marks(whole, np.concatenate([_unsigned(0), *(marks.signatures for marks in found)]), known)


def compared(sources: dict[str, NDArray[np.int64]], held: NDArray[np.int64]) -> dict[str, Overlaps]:
    """By source, rows that repeat one before them, in their source or an earlier one, and those that are held out as well.

    Args:
        sources: number and key of each row to train on, int64 [n, 2].
        held: the same of the rows that are held out.
    """
    names, rows = list(sources), np.concatenate([rows_of([]), *sources.values()])
    numbers, keys = rows[:, 0], rows[:, 1]
    owner = np.repeat(np.arange(len(names)), [len(each) for each in sources.values()])
    order = np.argsort(keys, kind="stable")
    begins = np.flatnonzero(np.append(True, keys[order[1:]] != keys[order[:-1]])) if len(keys) else order
    first = np.empty_like(order)
    first[order] = order[np.repeat(begins, np.diff(begins, append=len(order)))]
    apart = np.isin(keys, held[:, 1])
    repeats = (first != np.arange(len(keys))) & ~apart
    return {
        name: Overlaps(
            repeated=numbers[repeats & (owner == k) & (owner[first] == k)].tolist(),
            also_held=numbers[apart & (owner == k)].tolist(),
            shared=_by_name(names[:k], [numbers[repeats & (owner == k) & (owner[first] == i)] for i in range(k)]),
        )
        for k, name in enumerate(names)
    }


def note_near(found: dict[str, Overlaps], sources: dict[str, Marks], held: Marks) -> None:
    """Add to what `compared` has found the other rows that are nearly the same as one before them, or as one held out."""
    names, sizes = list(sources), [len(marks.rows) for marks in sources.values()]
    signatures = np.concatenate([held.signatures, *(marks.signatures for marks in sources.values())])
    like = nearest_before(signatures, len(held.rows))[len(held.rows) :]
    owner = np.repeat(np.arange(len(names)), sizes)
    of_like = np.append(owner, -1)[np.where(like >= len(held.rows), like - len(held.rows), -1)]  # -1: held out, or none
    for k, (name, marks) in enumerate(sources.items()):
        gone = found[name].numbers
        mine = slice(sum(sizes[:k]), sum(sizes[: k + 1]))
        numbers, near, whose = marks.rows[:, 0], like[mine] >= 0, of_like[mine]
        left = near & ~np.isin(numbers, np.fromiter(gone, np.int64, len(gone)))
        found[name].near = numbers[left & ((whose == k) | (whose < 0))].tolist()
        found[name].shared_near = _by_name(names[:k], [numbers[left & (whose == i)] for i in range(k)])


def _by_name(names: list[str], numbers: list[NDArray[np.int64]]) -> dict[str, list[int]]:
    return {name: each.tolist() for name, each in zip(names, numbers, strict=True) if len(each)}


def _marks(rows: list[NumberedRow], sound: Sound, near: bool, tests: TestTexts) -> Marks:
    keys: list[tuple[int, int]] = []
    signatures, known = _unsigned(len(rows) if near else 0), list[tuple[int, list[str]]]()
    for k, (number, row) in enumerate(sound(rows)):
        keys.append((number, key_of(row)))
        if not near and not tests.names:
            continue
        words = words_of(texts_of(row))
        if near:
            signatures[k] = signature_of(words)
        if names := tests.known_from(words):
            known.append((number, names))
    return Marks(rows_of(keys), signatures[: len(keys)], known)


def _unsigned(rows: int) -> NDArray[np.uint32]:
    return np.zeros((rows, NUMBERS), np.uint32)


PIECE = 1024  # rows that are tokenised, and for documents packed, together


def pieces(rows: Iterator[NumberedRow]) -> Iterator[list[NumberedRow]]:
    """Rows as they are worked on together."""
    while piece := list(islice(rows, PIECE)):
        yield piece
