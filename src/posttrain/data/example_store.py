"""Examples on the disk: an array a file, written piece by piece, complete or absent, and checked when they are read."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from posttrain.data.examples import Examples
from posttrain.runs.cache import refused
from posttrain.runs.earlier import OF_CONTENT
from posttrain.runs.files import sweep_leftovers, temporary_beside

BLOCK = 1 << 22  # bytes that are read at a time
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
    """Writes examples piece by piece into a directory, complete or absent: an array a file, of which memory holds one piece.

    As a context it takes away what was not closed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = temporary_beside(path)
        with self._in_cache():
            sweep_leftovers(path.parent)
            self._temporary.mkdir(parents=True)
        self._counts: dict[str, dict[str, int]] = {}
        self._sums: dict[str, int] = {}  # CRC-32 of each file
        self._hashes: dict[str, hashlib._Hash] = {}

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)

    def add(self, part: str, piece: Examples, read: NDArray[np.int64]) -> None:
        """To the end of `part` (train, held_out). read: see `Stored`."""
        counts = self._counts.setdefault(part, {"tokens": 0, "rows": 0, "units": 0, "columns": 0})
        shifted = {"offsets": piece.offsets[1:] + counts["tokens"], "units": piece.units[1:] + counts["rows"]}
        shifted["column_ends"] = piece.column_ends + counts["columns"]
        for name, dtype in _DTYPES.items():
            value = read if name == "read" else np.asarray(shifted.get(name, getattr(piece, name, None)), dtype=dtype)
            file_name = f"{part}.{name}"
            with self._in_cache(), (self._temporary / file_name).open("ab") as file:
                file.write(value.tobytes())
            self._sums[file_name] = zlib.crc32(value.tobytes(), self._sums.get(file_name, 0))
            if value.size or name not in _RARE:
                self._hashes.setdefault(file_name, hashlib.sha256()).update(value.tobytes())
        counts["tokens"] += piece.num_tokens
        counts["rows"] += len(piece.rows)
        counts["units"] += len(piece)
        counts["columns"] += len(piece.columns)

    @contextmanager
    def _in_cache(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise refused(self._path, error) from None

    def close(self, report: dict[str, object]) -> None:
        """Put the directory in its place; report: what JSON can hold."""
        hashes = {name: each.hexdigest() for name, each in sorted(self._hashes.items()) if not name.endswith(_ROWS)}
        content = OF_CONTENT + hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:32]
        found = {"report": report, "counts": self._counts, "crc32": self._sums, "content": content}
        with self._in_cache():
            text = json.dumps({"content": found, "crc32": _crc32_of(found)})
            (self._temporary / "report.json").write_text(text, encoding="utf-8")
        if not self._path.exists():
            with suppress(OSError):  # another process was quicker, with the same content
                self._temporary.rename(self._path)


def load(path: Path) -> Stored:
    """Read what a Store wrote: tokens and weights stay on the disk until they are looked at. Raises ValueError for what is not as
    it was written."""
    whole = json.loads((path / "report.json").read_text(encoding="utf-8"))
    found = whole["content"]
    if _crc32_of(found) != whole["crc32"]:
        raise ValueError(f"{path / 'report.json'} is not as it was written")
    for name, expected in found["crc32"].items():
        if _crc32(path / name) != expected:
            raise ValueError(f"{path / name} is not as it was written")
    parts, read = {}, {}
    for part in found["counts"]:
        arrays = {name: _mapped(path / f"{part}.{name}", name in ("tokens", "weights", "columns")) for name in _DTYPES}
        for name in ("offsets", "units"):
            arrays[name] = np.concatenate([[0], arrays[name]]).astype(np.int64)
        arrays["splits"] = arrays["splits"].reshape(-1, 2)
        read[part] = arrays.pop("read").reshape(-1, 2)
        parts[part] = Examples(**arrays)
    return Stored(parts, read, found["report"], found["content"])


def _crc32_of(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _crc32(path: Path) -> int:
    """Of a file that need not fit in memory."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found = zlib.crc32(block, found)
    return found


def _mapped(path: Path, lazily: bool) -> NDArray:
    dtype = _DTYPES[path.suffix.removeprefix(".")]
    if not path.stat().st_size:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r") if lazily else np.fromfile(path, dtype=dtype)
