"""Tokenised examples as flat arrays: small, quick to read back, and shared between the jobs of a sweep."""

from __future__ import annotations

import json
from bisect import bisect_left, insort
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Joined:
    """Arrays end to end without a copy: read by slices, none of which crosses a border."""

    def __init__(self, arrays: list[NDArray]) -> None:
        self._arrays = arrays
        self._starts = np.cumsum([0, *map(len, arrays)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, span: slice) -> NDArray:
        which = int(np.searchsorted(self._starts, span.start, side="right")) - 1
        start = int(self._starts[which])
        return self._arrays[which][span.start - start : span.stop - start]


@dataclass(frozen=True)
class Examples:
    """Sequences of tokens, and the units in which they are drawn.

    tokens int32 [T] and weights float32 [T] are the sequences end to end; sequence i is offsets[i]:offsets[i+1] and came from
    row rows[i] of the source. Unit u, what a batch counts, is the sequences units[u]:units[u+1]: one conversation or pair, or for
    documents as many as fit max_length. shared, int64 [sequences] or empty: so many of its first tokens are those of its unit's
    last sequence as well, and none of them counts; a pack has them once. For pairs only, splits int64 [n, 2]: length of the
    prompt, and of prompt and chosen; margins float32 [n]: by how much the chosen answer is better, 0 where the row does not say;
    pair_weights float32 [n]: how much the pair counts. Of labelled answers the same, with 1 (good) or -1 in margins. For prompts
    only, columns uint8 [bytes]: of each sequence the columns of its row as JSON, up to column_ends int64 [n].
    """

    tokens: NDArray[np.int32] | Joined
    weights: NDArray[np.float32] | Joined
    offsets: NDArray[np.int64]
    rows: NDArray[np.int64]
    units: NDArray[np.int64]
    splits: NDArray[np.int64]
    margins: NDArray[np.float32]
    pair_weights: NDArray[np.float32]
    shared: NDArray[np.int64]
    columns: NDArray[np.uint8] | Joined = field(default_factory=lambda: np.zeros(0, np.uint8))
    column_ends: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.units) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return len(self.tokens)

    def sequence(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Tokens and weights of sequence i."""
        span = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return self.tokens[span], self.weights[span]

    def columns_of(self, i: int) -> dict[str, Any]:
        """The columns of the row that sequence i is from; none where they are not kept."""
        if not len(self.column_ends):
            return {}
        start = int(self.column_ends[i - 1]) if i else 0
        return json.loads(self.columns[start : int(self.column_ends[i])].tobytes())

    def sequences(self, unit: int) -> range:
        """The numbers of the sequences of a unit."""
        return range(int(self.units[unit]), int(self.units[unit + 1]))

    def only(self, i: int) -> Examples:
        """Sequence i as a unit of its own, for what has no pairs."""
        tokens, weights = self.sequence(i)
        ends, none = np.array([0, len(tokens)]), self.margins[:0]
        return Examples(
            tokens, weights, ends, self.rows[i : i + 1], np.array([0, 1]), self.splits[:0], none, none, self.shared[:0]
        )

    def unit_lengths(self) -> NDArray[np.float64]:
        """Mean tokens of the sequences in each unit [len(self)]."""
        return self.unit_tokens() / np.maximum(np.diff(self.units), 1)

    def unit_tokens(self) -> NDArray[np.int64]:
        """Tokens of each unit [len(self)], what its sequences share once."""
        tokens = np.diff(self.offsets[self.units])
        return tokens - np.diff(np.concatenate([[0], np.cumsum(self.shared)])[self.units]) if len(self.shared) else tokens


def build(
    sequences: list[tuple[list[int], list[float], int]],
    splits: list[tuple[int, int]] | None = None,
    margins: list[float] | None = None,
    pair_weights: list[float] | None = None,
) -> Examples:
    """Lay (tokens, weights, row) end to end, one unit a sequence."""
    lengths = [len(tokens) for tokens, _, _ in sequences]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    flat = [np.asarray(tokens, dtype=np.int32) for tokens, _, _ in sequences]
    weight = [np.asarray(weights, dtype=np.float32) for _, weights, _ in sequences]
    return Examples(
        tokens=np.concatenate(flat) if flat else np.zeros(0, np.int32),
        weights=np.concatenate(weight) if weight else np.zeros(0, np.float32),
        offsets=offsets,
        rows=np.asarray([row for _, _, row in sequences], dtype=np.int64),
        units=np.arange(len(sequences) + 1, dtype=np.int64),
        splits=np.asarray(splits or np.zeros((0, 2)), dtype=np.int64).reshape(-1, 2),
        margins=np.asarray(margins or [0.0] * len(splits or []), dtype=np.float32),
        pair_weights=np.asarray(pair_weights or [1.0] * len(splits or []), dtype=np.float32),
        shared=np.zeros(0, np.int64),
    )


def with_columns(examples: Examples, rows: dict[int, Any]) -> Examples:
    """The same, with the columns of the row of each sequence. rows: by number."""
    texts = [json.dumps(rows[number], default=str).encode() for number in examples.rows.tolist()]
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    return replace(examples, columns=np.frombuffer(b"".join(texts), np.uint8), column_ends=ends)


def group(examples: Examples, max_length: int) -> Examples:
    """Best-fit decreasing: sequences into units of at most `max_length` tokens, none of them cut."""
    lengths = np.diff(examples.offsets)
    room_of: dict[int, list[int]] = {}  # free room -> units with just that much
    rooms: list[int] = []  # those of which there are any, the smallest first
    bins: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = int(lengths[i])
        fitting = bisect_left(rooms, size)
        if fitting == len(rooms):
            bins.append([])
            target, room = len(bins) - 1, max_length
        else:
            room = rooms[fitting]
            target = room_of[room].pop()
            if not room_of[room]:
                del rooms[fitting]
        bins[target].append(i)
        left = room_of.setdefault(room - size, [])
        if not left:
            insort(rooms, room - size)
        left.append(target)
    order = [i for members in bins for i in sorted(members)]
    sequences = [(*examples.sequence(i), int(examples.rows[i])) for i in order]
    laid = build(sequences)  # type: ignore[arg-type]
    units = np.concatenate([[0], np.cumsum([len(members) for members in bins])]).astype(np.int64)
    return replace(laid, units=units)


def by_row(examples: Examples, max_length: int) -> Examples:
    """Neighbouring sequences of one row as one unit, with its last one as what the others share their beginning with: as many as
    fit `max_length` tokens."""
    lengths, shared = np.diff(examples.offsets), np.zeros(len(examples.rows), np.int64)
    last, size, units = 0, 0, [len(lengths)]
    for i in reversed(range(len(lengths))):
        common = _common(examples, i, last) if size and examples.rows[i] == examples.rows[last] else 0
        if common and size + lengths[i] - common <= max_length:
            shared[i], size = common, size + lengths[i] - common
            continue
        units += [i + 1] if i + 1 < len(lengths) else []
        last, size = i, lengths[i]
    units = [0, *reversed(units)] if len(lengths) else [0]
    return replace(examples, units=np.asarray(units, np.int64), shared=shared)


def _common(examples: Examples, i: int, other: int) -> int:
    """Tokens that both sequences begin with, up to the first of sequence i that counts."""
    (tokens, weights), (others, _) = examples.sequence(i), examples.sequence(other)
    size = min(len(tokens), len(others), int(np.flatnonzero(weights)[0]))
    different = np.flatnonzero(tokens[:size] != others[:size])
    return int(different[0]) if len(different) else size


def join(parts: list[Examples]) -> Examples:
    """The sequences and units of all parts, one after the other; tokens and weights stay where they are."""
    if len(parts) == 1:
        return parts[0]
    tokens = np.cumsum([0, *(part.num_tokens for part in parts)])
    sequences = np.cumsum([0, *(len(part.rows) for part in parts)])
    columns = np.cumsum([0, *(len(part.columns) for part in parts)])
    return Examples(
        tokens=Joined([np.asarray(part.tokens) for part in parts]),
        weights=Joined([np.asarray(part.weights) for part in parts]),
        offsets=_ends([part.offsets + start for part, start in zip(parts, tokens, strict=False)]),
        rows=np.concatenate([part.rows for part in parts]),
        units=_ends([part.units + start for part, start in zip(parts, sequences, strict=False)]),
        splits=np.concatenate([part.splits for part in parts]),
        margins=np.concatenate([part.margins for part in parts]),
        pair_weights=np.concatenate([part.pair_weights for part in parts]),
        shared=_padded(parts),
        columns=Joined([np.asarray(part.columns) for part in parts]),
        column_ends=np.concatenate([part.column_ends + start for part, start in zip(parts, columns, strict=False)]),
    )


def _padded(parts: list[Examples]) -> NDArray[np.int64]:
    """`shared` of all parts, if any has it."""
    if not any(len(part.shared) for part in parts):
        return np.zeros(0, np.int64)
    return np.concatenate([part.shared if len(part.shared) else np.zeros(len(part.rows), np.int64) for part in parts])


def _ends(borders: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Borders that begin where the ones before end."""
    return np.concatenate([borders[0], *(more[1:] for more in borders[1:])])
