"""Rows that repeat others, that are held out as well, or that are known from a test set: found before any is trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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


@dataclass
class Repeats:
    """Counts rows by `key_of`, piece by piece: 16 bytes of memory a row."""

    numbers: list[NDArray[np.int64]] = field(default_factory=list[NDArray[np.int64]])
    keys: list[NDArray[np.int64]] = field(default_factory=list[NDArray[np.int64]])

    def add(self, rows: list[tuple[int, int]]) -> None:
        """rows: number and key of each."""
        both = np.asarray(rows, dtype=np.int64).reshape(-1, 2)
        self.numbers.append(both[:, 0])
        self.keys.append(both[:, 1])

    def found(self, held: Iterable[int]) -> tuple[list[int], list[int]]:
        """Numbers of the rows that repeat an earlier one, and of those, among all others, that are held out as well."""
        keys, numbers = (
            np.concatenate([*self.keys, np.zeros(0, np.int64)]),
            np.concatenate([*self.numbers, np.zeros(0, np.int64)]),
        )
        order = np.argsort(keys, kind="stable")
        repeats = np.zeros(len(keys), bool)
        repeats[order[1:]] = keys[order[1:]] == keys[order[:-1]]
        apart = np.isin(keys, np.asarray(list(held), dtype=np.int64))
        return numbers[repeats & ~apart].tolist(), numbers[apart].tolist()


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
    """What rows are compared by. signatures: [n, NUMBERS], where near duplicates are looked for."""

    rows: list[tuple[int, int]]
    signatures: NDArray[np.uint32]
    known: list[tuple[int, list[str]]]


@dataclass
class Overlaps:
    """Numbers of rows that are left out, by why; known: by test set."""

    repeated: list[int] = field(default_factory=list[int])
    also_held: list[int] = field(default_factory=list[int])
    near: list[int] = field(default_factory=list[int])
    known: dict[str, list[int]] = field(default_factory=dict[str, list[int]])

    @property
    def numbers(self) -> frozenset[int]:
        """All of them."""
        return frozenset().union(self.repeated, self.also_held, self.near, *self.known.values())


def find_overlaps(
    train: Iterator[NumberedRow], held_out: Callable[[], list[NumberedRow]], sound: Sound, dedupe: str, tests: str | None
) -> Overlaps:
    """What of `train` is to be left out. held_out: called when that has been read. dedupe: none, exact or near. tests: paths."""
    work = partial(_marks, sound=sound, near=dedupe == "near", tests=TestTexts.read(tests))
    repeats, found = Repeats(), Overlaps()
    signatures: list[NDArray[np.uint32]] = []
    for marks in in_order(work, pieces(train)):
        repeats.add(marks.rows)
        signatures.append(marks.signatures)
        for number, names in marks.known:
            for name in names:
                found.known.setdefault(name, []).append(number)
    if dedupe == "none":
        return found
    held = work(held_out())
    found.repeated, found.also_held = repeats.found(key for _, key in held.rows)
    if dedupe == "near":
        like = nearest_before(np.concatenate([held.signatures, *signatures]), len(held.rows))[len(held.rows) :]
        gone = {*found.repeated, *found.also_held}
        numbers = np.concatenate([*repeats.numbers, np.zeros(0, np.int64)])
        found.near = [number for number in numbers[like >= 0].tolist() if number not in gone]
    return found


def _marks(rows: list[NumberedRow], sound: Sound, near: bool, tests: TestTexts) -> Marks:
    marks = Marks([], np.zeros((len(rows) if near else 0, NUMBERS), np.uint32), [])
    for k, (number, row) in enumerate(sound(rows)):
        marks.rows.append((number, key_of(row)))
        if not near and not tests.names:
            continue
        words = words_of(texts_of(row))
        if near:
            marks.signatures[k] = signature_of(words)
        if names := tests.known_from(words):
            marks.known.append((number, names))
    return marks._replace(signatures=marks.signatures[: len(marks.rows)])


PIECE = 1024  # rows that are tokenised, and for documents packed, together


def pieces(rows: Iterator[NumberedRow]) -> Iterator[list[NumberedRow]]:
    """Rows as they are worked on together."""
    while piece := list(islice(rows, PIECE)):
        yield piece
