"""Tokenised examples as flat arrays: small, quick to read back, and shared between the jobs of a sweep."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DTYPES = {
    "tokens": np.int32,
    "weights": np.float32,
    "offsets": np.int64,
    "rows": np.int64,
    "units": np.int64,
    "splits": np.int64,
    "margins": np.float32,
}


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
    documents as many as fit max_length. For pairs only, splits int64 [n, 2]: length of the prompt, and of prompt and chosen;
    margins float32 [n]: by how much the chosen answer is better, 0 where the row does not say.
    """

    tokens: NDArray[np.int32] | Joined
    weights: NDArray[np.float32] | Joined
    offsets: NDArray[np.int64]
    rows: NDArray[np.int64]
    units: NDArray[np.int64]
    splits: NDArray[np.int64]
    margins: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.units) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def sequence(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        span = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return self.tokens[span], self.weights[span]

    def sequences(self, unit: int) -> range:
        return range(int(self.units[unit]), int(self.units[unit + 1]))

    def only(self, i: int) -> Examples:
        """Sequence i as a unit of its own, for what has no pairs."""
        tokens, weights = self.sequence(i)
        ends = np.array([0, len(tokens)])
        return Examples(tokens, weights, ends, self.rows[i : i + 1], np.array([0, 1]), self.splits[:0], self.margins[:0])

    def unit_lengths(self) -> NDArray[np.float64]:
        """Mean tokens of the sequences in each unit [len(self)]."""
        return self.unit_tokens() / np.maximum(np.diff(self.units), 1)

    def unit_tokens(self) -> NDArray[np.int64]:
        """Tokens of each unit [len(self)]."""
        return np.diff(self.offsets[self.units])


def build(
    sequences: list[tuple[list[int], list[float], int]],
    splits: list[tuple[int, int]] | None = None,
    margins: list[float] | None = None,
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
    )


def group(examples: Examples, max_length: int) -> Examples:
    """Best-fit decreasing: sequences into units of at most `max_length` tokens, none of them cut."""
    lengths = np.diff(examples.offsets)
    room_of: dict[int, list[int]] = {}  # free room -> units with just that much
    bins: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = int(lengths[i])
        room = next((r for r in range(size, max_length + 1) if room_of.get(r)), None)
        if room is None:
            bins.append([])
            target, room = len(bins) - 1, max_length
        else:
            target = room_of[room].pop()
        bins[target].append(i)
        room_of.setdefault(room - size, []).append(target)
    order = [i for members in bins for i in sorted(members)]
    sequences = [(*examples.sequence(i), int(examples.rows[i])) for i in order]
    laid = build(sequences)  # type: ignore[arg-type]
    units = np.concatenate([[0], np.cumsum([len(members) for members in bins])]).astype(np.int64)
    return Examples(laid.tokens, laid.weights, laid.offsets, laid.rows, units, laid.splits, laid.margins)


def join(parts: list[Examples]) -> Examples:
    """The sequences and units of all parts, one after the other; tokens and weights stay where they are."""
    if len(parts) == 1:
        return parts[0]
    tokens = np.cumsum([0, *(part.num_tokens for part in parts)])
    sequences = np.cumsum([0, *(len(part.rows) for part in parts)])
    return Examples(
        tokens=Joined([np.asarray(part.tokens) for part in parts]),
        weights=Joined([np.asarray(part.weights) for part in parts]),
        offsets=_ends([part.offsets + start for part, start in zip(parts, tokens, strict=False)]),
        rows=np.concatenate([part.rows for part in parts]),
        units=_ends([part.units + start for part, start in zip(parts, sequences, strict=False)]),
        splits=np.concatenate([part.splits for part in parts]),
        margins=np.concatenate([part.margins for part in parts]),
    )


def _ends(borders: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Borders that begin where the ones before end."""
    return np.concatenate([borders[0], *(more[1:] for more in borders[1:])])


class Store:
    """Writes examples piece by piece into a directory, complete or absent: an array a file, of which memory holds one piece.

    As a context it takes away what was not closed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        self._counts: dict[str, dict[str, int]] = {}

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)

    def add(self, part: str, piece: Examples) -> None:
        """To the end of `part` (train, held_out)."""
        counts = self._counts.setdefault(part, {"tokens": 0, "rows": 0, "units": 0})
        shifted = {"offsets": piece.offsets[1:] + counts["tokens"], "units": piece.units[1:] + counts["rows"]}
        for name in _DTYPES:
            value = np.asarray(shifted.get(name, getattr(piece, name)), dtype=_DTYPES[name])
            with (self._temporary / f"{part}.{name}").open("ab") as file:
                value.tofile(file)
        counts["tokens"] += piece.num_tokens
        counts["rows"] += len(piece.rows)
        counts["units"] += len(piece)

    def close(self, report: dict[str, object]) -> None:
        """Put the directory in its place; report: what JSON can hold."""
        (self._temporary / "report.json").write_text(json.dumps({"report": report, "counts": self._counts}))
        if not self._path.exists():
            with suppress(OSError):  # another process was quicker, with the same content
                self._temporary.rename(self._path)


def load(path: Path) -> tuple[dict[str, Examples], dict[str, Any]]:
    """Read what a Store wrote: tokens and weights stay on the disk until they are looked at."""
    found = json.loads((path / "report.json").read_text())
    parts = {}
    for part, counts in found["counts"].items():
        arrays = {name: _mapped(path / f"{part}.{name}", name in ("tokens", "weights")) for name in _DTYPES}
        if len(arrays["tokens"]) != counts["tokens"] or len(arrays["rows"]) != counts["rows"]:
            raise ValueError(f"{path}: {part} is not as long as it was written")
        for name in ("offsets", "units"):
            arrays[name] = np.concatenate([[0], arrays[name]]).astype(np.int64)
        arrays["splits"] = arrays["splits"].reshape(-1, 2)
        parts[part] = Examples(**arrays)
    return parts, found["report"]


def _mapped(path: Path, lazily: bool) -> NDArray:
    dtype = _DTYPES[path.suffix.removeprefix(".")]
    if not path.stat().st_size:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r") if lazily else np.fromfile(path, dtype=dtype)
