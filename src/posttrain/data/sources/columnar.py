"""Rows of files that keep columns: Parquet and Arrow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from posttrain.errors import reading

ParsedRows = Iterator[tuple[int, Any]]  # what a file's reader yields: number from 1, and a value that may be no row


def parquet_rows(file: Path, name: str, _: str) -> ParsedRows:
    """Rows of a Parquet file with their numbers, or what is wrong with them."""
    from pyarrow import parquet

    def batches() -> Iterator[Any]:
        with parquet.ParquetFile(file) as table:
            yield from table.iter_batches(batch_size=1024)

    return _columnar(file, name, batches, "Parquet")


def arrow_rows(file: Path, name: str, _: str) -> ParsedRows:
    """Arrow's stream, which datasets writes, or its file format."""
    import pyarrow

    def batches() -> Iterator[Any]:
        with pyarrow.memory_map(str(file)) as source:
            try:
                yield from pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:
                reader = pyarrow.ipc.open_file(source)
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))

    return _columnar(file, name, batches, "Arrow")


def _columnar(file: Path, name: str, batches: Callable[[], Iterator[Any]], kind: str) -> ParsedRows:
    if not file.stat().st_size:
        return
    with reading(f"{name}: not valid {kind}", "write it again, as pyarrow or datasets does"):
        yield from enumerate((without_nulls(row) for batch in batches() for row in _checked(batch).to_pylist()), 1)


def _checked(batch: Any) -> Any:
    """The batch. Raises ArrowInvalid for one that reaches beyond its own buffers, where pyarrow would read on, or crash."""
    batch.validate(full=True)
    return batch


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Without the fields that an object within the row does not have: a column gives every object all fields of any, null where
    it has none, and a template would write them."""
    return {name: _within(value) for name, value in row.items()}


def _within(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _within(each) for name, each in value.items() if each is not None}
    return [_within(each) for each in value] if isinstance(value, list) else value
