"""Raw rows from files, the hub and the built-in sets, and which of them are held out."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import tee
from pathlib import Path
from typing import Any

from posttrain.data.builtin import PARTS, builtin_rows
from posttrain.errors import UserError, did_you_mean

Row = tuple[int, dict[str, Any]]  # number in the source from 1, columns

_BUILTIN = "builtin:"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_CONVERSATION_COLUMNS = ("messages", "conversations", "prompt")
_CONTENT = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str)
_LONGEST_CELL = 2**31 - 1  # csv's own limit of 128 KiB is less than many a document


def read_rows(path: str, *, subset: str | None = None, split: str = "train", revision: str | None = None) -> Iterator[Row]:
    """Rows of a local file, of a hub data set (`org/name`) or of `builtin:NAME`, numbered from 1.

    The number is that of the line in JSONL, else of the record. Files are told by their extension: .jsonl, .ndjson,
    .json (a list of objects, an object with one such list, or JSONL), .csv and .tsv with a header, .parquet. .txt is
    text: with blank lines in it, a document is what stands between them; without any, each line is a document. .md
    and .rst are one document. subset, split and revision are the hub's; split also names the part of a built-in set.

    Raises UserError, naming file and line, for whatever cannot be read.
    """
    if path.startswith(_BUILTIN):
        yield from enumerate(builtin_rows(path.removeprefix(_BUILTIN), split), 1)
    elif _is_hub_id(path):
        yield from _hub(path, subset, split, revision)
    else:
        yield from _file_rows(_local_file(path), path)


def split_rows(rows: Iterable[Row], eval_share: float) -> tuple[Iterator[Row], Iterator[Row]]:
    """(train, held out), both lazy: a row is held out if a hash of its content, in [0, 1), is below `eval_share`.

    So a row keeps its side when the data grows or is shuffled, and duplicates of it are on the same side.
    """
    marked = (((place(row) < eval_share), (number, row)) for number, row in rows)
    train, held_out = tee(marked)
    return (item for held, item in train if not held), (item for held, item in held_out if held)


def place(row: dict[str, Any]) -> float:
    """A number in [0, 1) from the sha256 of the row as JSON with sorted keys."""
    content = _CONTENT.encode(row).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(content).digest()[:6]) / 2**48


def fingerprint(path: str, subset: str | None = None, split: str = "train", revision: str | None = None) -> str:
    """What identifies the data: sha256 of a file's bytes or a built-in set's rows; a hub id with its revision."""
    if path.startswith(_BUILTIN):
        name = path.removeprefix(_BUILTIN)
        rows = [builtin_rows(name, part) for part in PARTS[name]] if name in PARTS else builtin_rows(name, "eval")
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    if _is_hub_id(path):
        return f"hub:{path}@{revision or 'main'}:{subset or ''}:{split}"
    with _opening(path), _local_file(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_hub_id(path: str) -> bool:
    return bool(_HUB_ID.fullmatch(path)) and Path(path).suffix.lower() not in _READERS and not Path(path).exists()


def _local_file(path: str) -> Path:
    """The file, checked to exist and to be of a kind that is read."""
    file = Path(path).expanduser()
    known = ", ".join(_READERS)
    if file.is_dir():
        inside = sorted(p.name for p in file.iterdir() if p.suffix.lower() in _READERS)
        raise UserError(f"{path}: is a directory; name one file in it, " + (f"such as {inside[0]}" if inside else known))
    if not file.exists():
        beside = [p.name for p in file.parent.iterdir() if p.is_file()] if file.parent.is_dir() else []
        near = did_you_mean(file.name, beside)
        raise UserError(f"{path}: no such file" + (near or "; give a file, a hub id org/name or builtin:NAME"))
    if file.suffix.lower() not in _READERS:
        raise UserError(f"{path}: unknown extension '{file.suffix}'; read are {known}")
    return file


def _file_rows(file: Path, name: str) -> Iterator[Row]:
    empty = True
    with _opening(name):
        for number, row in _READERS[file.suffix.lower()](file, name):
            if not isinstance(row, dict):
                raise UserError(f"{name}, row {number}: is {_kind(row)}, not an object with columns")
            empty = False
            yield number, row
    if empty:
        raise UserError(f"{name}: is empty; give a file with at least one row")


@contextmanager
def _opening(name: str) -> Iterator[None]:
    """Turns what the operating system says about a file (no permission, disk error) into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror or error})") from error


def _kind(value: object) -> str:
    names = {
        type(None): "null",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), type(value).__name__)


def _lines(file: Path, name: str) -> Iterator[tuple[int, str]]:
    """Lines with their ends, numbered from 1; only a line feed ends a line."""
    with file.open("rb") as raw:
        for number, line in enumerate(raw, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                wrong = f"byte 0x{line[error.start]:02x} at place {error.start + 1} of the line"
                raise UserError(f"{name}, line {number}: not UTF-8 ({wrong}); save the file as UTF-8") from error


def _whole(file: Path, name: str) -> str:
    return "".join(line for _, line in _lines(file, name))


def _jsonl(file: Path, name: str) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(file, name):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise UserError(f"{name}, line {number}: not valid JSON ({error})") from error


def _json(file: Path, name: str) -> Iterator[tuple[int, Any]]:
    text = _whole(file, name)
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise UserError(f"{name}, line {error.lineno}: not valid JSON ({error.msg}: column {error.colno})") from error
        yield from _jsonl(file, name)
        return
    if isinstance(value, dict):
        lists = [v for k, v in value.items() if isinstance(v, list) and k not in _CONVERSATION_COLUMNS]
        value = lists[0] if len(lists) == 1 else [value]
    yield from enumerate(value if isinstance(value, list) else [value], 1)


def _separated(delimiter: str) -> Callable[[Path, str], Iterator[tuple[int, Any]]]:
    def read(file: Path, name: str) -> Iterator[tuple[int, Any]]:
        csv.field_size_limit(_LONGEST_CELL)
        reader = csv.DictReader((line for _, line in _lines(file, name)), delimiter=delimiter, strict=True)
        try:
            for number, row in enumerate(reader, 1):
                if None in row or None in row.values():
                    cells = sum(v is not None for k, v in row.items() if k is not None) + len(row.get(None) or [])
                    header = len(reader.fieldnames or [])
                    raise UserError(f"{name}, line {reader.line_num}: has {cells} cells where the header has {header}")
                yield number, row
        except csv.Error as error:
            raise UserError(f"{name}, line {reader.line_num + 1}: not valid CSV ({error})") from error

    return read


def _parquet(file: Path, name: str) -> Iterator[tuple[int, Any]]:
    if not file.stat().st_size:
        return
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            rows = (row for batch in table.iter_batches(batch_size=1024) for row in batch.to_pylist())
            yield from enumerate(rows, 1)
    except pyarrow.ArrowException as error:
        raise UserError(f"{name}: not valid Parquet ({str(error).splitlines()[0]})") from error


def _text(file: Path, name: str) -> Iterator[tuple[int, Any]]:
    text = _whole(file, name).replace("\r\n", "\n").strip()
    documents = re.split(r"\n[^\S\n]*\n\s*", text)
    if len(documents) == 1:
        documents = text.split("\n")
    yield from ((number, {"text": document}) for number, document in enumerate(filter(None, documents), 1))


def _document(file: Path, name: str) -> Iterator[tuple[int, Any]]:
    if text := _whole(file, name).strip():
        yield 1, {"text": text}


def _hub(path: str, subset: str | None, split: str, revision: str | None) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        rows = load_dataset(path, name=subset, split=split, revision=revision)
    except Exception as error:  # the hub's client raises a dozen kinds, several of them private
        raise UserError(_hub_trouble(path, subset, split, revision, error)) from error
    yield from enumerate(map(dict, rows), 1)


def _hub_trouble(path: str, subset: str | None, split: str, revision: str | None, error: Exception) -> str:
    from datasets.exceptions import DatasetNotFoundError

    said = " ".join(str(error).split())[:200]
    if isinstance(error, ConnectionError) or "offline" in said.lower() or "connect" in type(error).__name__.lower():
        return f"data.path: no file {path} here, and cannot reach the hub for a data set of that name; give a local file"
    if isinstance(error, DatasetNotFoundError):
        at = f" at revision {revision}" if revision else ""
        return f"data.path: the hub has no data set {path}{at}, or it is private; check the name, or give a local file"
    if "split" in said.lower():
        return f"data.split: {path} has no split '{split}' ({said})"
    if "config" in said.lower():
        return f"data.subset: {path} has no subset '{subset}' ({said})"
    return f"data.path: cannot load {path} from the hub ({type(error).__name__}: {said}); give a local file"


_READERS: dict[str, Callable[[Path, str], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
    ".txt": _text,
    ".md": _document,
    ".rst": _document,
}
