"""Tokenised examples as flat arrays: small, quick to read back, and shared between the jobs of a sweep."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file


@dataclass(frozen=True)
class Examples:
    """Sequences of tokens, and the units in which they are drawn.

    tokens int32 [T] and weights float32 [T] are the sequences end to end; sequence i is offsets[i]:offsets[i+1] and came from
    row rows[i] of the source. Unit u, what a batch counts, is the sequences units[u]:units[u+1]: one conversation or pair, or for
    documents as many as fit max_length. For pairs only, splits int64 [n, 2]: length of the prompt, and of prompt and chosen;
    margins float32 [n]: by how much the chosen answer is better, 0 where the row does not say.
    """

    tokens: NDArray[np.int32]
    weights: NDArray[np.float32]
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


def save(path: Path, parts: dict[str, Examples], report: dict[str, object]) -> None:
    """Write all parts into one safetensors file, complete or absent."""
    arrays = {f"{part}.{name}": value for part, ex in parts.items() for name, value in vars(ex).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(arrays, temporary, metadata={"report": json.dumps(report)})
    os.replace(temporary, path)


def load(path: Path) -> tuple[dict[str, Examples], dict[str, object]]:
    """Read what `save` wrote."""
    parts: dict[str, dict[str, NDArray]] = {}
    with safe_open(path, framework="numpy") as f:
        report = json.loads(f.metadata()["report"])
        for key in f.keys():  # noqa: SIM118 (safe_open is no dict)
            part, name = key.split(".")
            parts.setdefault(part, {})[name] = f.get_tensor(key)
    return {part: Examples(**arrays) for part, arrays in parts.items()}, report
