"""Examples in a directory: an array a file, written piece by piece and read from the disk (runs/cache.py keeps it whole)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from posttrain.data.examples import Examples
from posttrain.runs.earlier import OF_CONTENT

REPORT = "report.json"
_DTYPES = {
    "tokens": np.int32,
    "weights": np.float32,
    "offsets": np.int64,
    "rows": np.int64,
    "units": np.int64,
    "splits": np.int64,
    "margins": np.float32,
    "pair_weights": np.float32,
    "shared": np.int64,
    "columns": np.uint8,
    "column_ends": np.int64,
    "read": np.int64,
}
_RARE = ("shared", "columns", "column_ends")  # which most data has nothing of; then they are no part of its content
_ROWS = (".rows", ".read")  # of files that say where tokens are from, not what they are


class Stored(NamedTuple):
    """What lies in a directory. content: names tokens, weights, and how they are cut and drawn, by their bytes. read: number and
    key of each row that a part was made of, int64 [n, 2]."""

    parts: dict[str, Examples]
    read: dict[str, NDArray[np.int64]]
    report: dict[str, Any]
    content: str


class Store:
    """Writes examples piece by piece into a new directory: an array a file, of which memory holds one piece.

    An OSError names the file that could not be written.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True)
        self._path = path
        self._counts: dict[str, dict[str, int]] = {}
        self._hashes: dict[str, hashlib._Hash] = {}

    def add(self, part: str, piece: Examples, read: NDArray[np.int64]) -> None:
        """To the end of `part` (train, held_out). read: see `Stored`."""
        counts = self._counts.setdefault(part, {"tokens": 0, "rows": 0, "units": 0, "columns": 0})
        shifted = {"offsets": piece.offsets[1:] + counts["tokens"], "units": piece.units[1:] + counts["rows"]}
        shifted["column_ends"] = piece.column_ends + counts["columns"]
        for name, dtype in _DTYPES.items():
            value = read if name == "read" else np.asarray(shifted.get(name, getattr(piece, name, None)), dtype=dtype)
            file_name = f"{part}.{name}"
            with _named(self._path / file_name) as path, path.open("ab") as file:
                file.write(value.tobytes())
            if value.size or name not in _RARE:
                self._hashes.setdefault(file_name, hashlib.sha256()).update(value.tobytes())
        counts["tokens"] += piece.num_tokens
        counts["rows"] += len(piece.rows)
        counts["units"] += len(piece)
        counts["columns"] += len(piece.columns)

    def close(self, report: dict[str, object]) -> None:
        """Write what is told of all of it; report: what JSON can hold."""
        hashes = {name: each.hexdigest() for name, each in sorted(self._hashes.items()) if not name.endswith(_ROWS)}
        content = OF_CONTENT + hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:32]
        text = json.dumps({"report": report, "counts": self._counts, "content": content})
        with _named(self._path / REPORT) as path:
            path.write_text(text, encoding="utf-8")


@contextmanager
def _named(path: Path) -> Iterator[Path]:
    """A disk that is full does not say which file it was."""
    try:
        yield path
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def load(path: Path) -> Stored:
    """Read what a Store wrote: tokens and weights stay on the disk until they are looked at."""
    found = json.loads((path / REPORT).read_text(encoding="utf-8"))
    parts, read = {}, {}
    for part in found["counts"]:
        arrays = {name: _mapped(path / f"{part}.{name}", name in ("tokens", "weights", "columns")) for name in _DTYPES}
        for name in ("offsets", "units"):
            arrays[name] = np.concatenate([[0], arrays[name]]).astype(np.int64)
        arrays["splits"] = arrays["splits"].reshape(-1, 2)
        read[part] = arrays.pop("read").reshape(-1, 2)
        parts[part] = Examples(**arrays)
    return Stored(parts, read, found["report"], found["content"])


def _mapped(path: Path, lazily: bool) -> NDArray:
    dtype = _DTYPES[path.suffix.removeprefix(".")]
    if not path.stat().st_size:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r") if lazily else np.fromfile(path, dtype=dtype)
