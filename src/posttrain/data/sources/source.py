"""Raw rows of a source: files, directories of them, the hub and the built-in sets; and which rows are held out."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from posttrain.config.schema.data import JOINT
from posttrain.data.rows import Row
from posttrain.data.sources.builtin.sets import PARTS, builtin_rows, require_builtin
from posttrain.data.sources.columnar import without_nulls
from posttrain.data.sources.files import COMPRESSIONS, KNOWN, READERS, NumberedRow, file_rows, kind_of
from posttrain.data.sources.hashing import fraction
from posttrain.data.sources.hub import hub_commit, hub_rows
from posttrain.errors import UserError, did_you_mean

__all__ = ["NumberedRow", "files_of", "fingerprint", "is_local", "parts_of", "place", "read_rows", "require_source", "row_name"]

_BUILTIN = "builtin:"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_CONTENT = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str)
_FILE = 2**40  # rows of the second file of a source are numbered from here, and so on
SAMPLED_FROM = 2**32  # bytes: of a larger file so many samples stand for the whole
_SAMPLES, _SAMPLE = 64, 2**16


def read_rows(
    path: str,
    *,
    subset: str | None = None,
    split: str = "train",
    revision: str | None = None,
    few: bool = False,
    sound: bool = True,
) -> Iterator[NumberedRow]:
    """Rows of a file, of all files of a directory or a pattern (`data/*.jsonl.gz`), of a directory that datasets has saved, of
    a hub data set (`org/name`), of `builtin:NAME`, or of several of these one after the other (see `parts_of`), read as they
    are needed.

    They are numbered from 1, by line in JSONL, else by record; `row_name` says where a number is. Files are told by their
    extension: .jsonl, .ndjson, .json (a list of objects, an object with one such list, or JSONL), .csv and .tsv with a header,
    .parquet, .arrow. .txt is text: with blank lines in it, a document is what stands between them; without any, each line is a
    document. .md and .rst are one document. Behind any of them may stand .gz, .bz2, .xz, .zst or .zip
    (an archive of one file). subset, split and revision
    are the hub's; split also names the part of a built-in or saved set. few: the caller will stop before the end, so a set of
    the hub need not be downloaded.

    sound: raise for a row that cannot be read; else it comes as the UserError that says why. Raises UserError, naming file and
    line, for a file that cannot be read at all.
    """
    before = 0
    for part in parts_of(path):
        for number, row in _rows(part, subset, split, revision, few):
            if sound and isinstance(row, UserError):
                raise row
            yield before + number, row
        before += _FILE * len(_names_once(part))


def require_source(path: str, split: str | None = None) -> None:
    """Raises UserError where a path of this machine, or a built-in set, is not there; what the hub has is not asked."""
    for part in parts_of(path):
        if part.startswith(_BUILTIN):
            require_builtin(part.removeprefix(_BUILTIN), split)
        elif not _is_hub_id(part) and not _is_saved(part):
            files_of(part)


def _rows(path: str, subset: str | None, split: str, revision: str | None, few: bool) -> Iterator[NumberedRow]:
    if path.startswith(_BUILTIN):
        yield from enumerate(builtin_rows(path.removeprefix(_BUILTIN), split), 1)
    elif _is_hub_id(path):
        yield from hub_rows(path, subset, split, revision, few)
    elif _is_saved(path):
        yield from _saved(path, split)
    else:
        for i, file in enumerate(files_of(path)):
            yield from ((i * _FILE + number, row) for number, row in file_rows(Path(file).expanduser(), file))


def parts_of(path: str) -> list[str]:
    """The sources that a path is made of: what the config has as a list stands as one text, `a.jsonl + b.jsonl`."""
    return [path] if JOINT not in path or Path(path).expanduser().exists() else path.split(JOINT)


def row_name(path: str, number: int) -> str:
    """Where row `number` of a source is, as messages say it."""
    names = _names_once(path)
    return f"{names[min(number // _FILE, len(names) - 1)]}, row {number % _FILE}"


@lru_cache(maxsize=16)
def _names_once(path: str) -> list[str]:
    """The files of a source that is made of files, else what it is itself; asked for every row, looked up once."""
    found = list[str]()
    for part in parts_of(path):
        several = is_local(part) and not _is_saved(part) and not part.startswith(_BUILTIN)
        found += files_of(part) if several else [part]
    return found


def is_local(path: str) -> bool:
    """False for what is on the hub."""
    return all(part.startswith(_BUILTIN) or not _is_hub_id(part) for part in parts_of(path))


def place(row: Row) -> float:
    """A number in [0, 1) from the sha256 of the row as JSON with sorted keys, without columns that hold nothing."""
    content = _CONTENT.encode({name: value for name, value in row.items() if value is not None}).encode("utf-8", "surrogatepass")
    return fraction(content)


def fingerprint(path: str, subset: str | None = None, split: str = "train", revision: str | None = None) -> str:
    """What identifies the data: sha256 of a file's bytes, of all files' or of a built-in set's rows; a hub id with its
    commit. Of a file above SAMPLED_FROM bytes its size and samples all over it stand for the whole."""
    if len(parts := parts_of(path)) > 1:
        return hashlib.sha256(json.dumps([fingerprint(part, subset, split, revision) for part in parts]).encode()).hexdigest()
    if path.startswith(_BUILTIN):
        name = path.removeprefix(_BUILTIN)
        rows = [builtin_rows(name, part) for part in PARTS[name]] if name in PARTS else builtin_rows(name, "eval")
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    if _is_hub_id(path):
        return f"hub:{path}@{hub_commit(path, subset, split, revision)}:{subset or ''}:{split}"
    directory = Path(path).expanduser()
    files = sorted(str(p) for p in directory.rglob("*") if p.is_file()) if _is_saved(path) else files_of(path)
    found = [_of_file(file) for file in files]
    return found[0] if len(found) == 1 else hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _of_file(name: str) -> str:
    file = Path(name).expanduser()
    try:
        with file.open("rb") as raw:
            size = file.stat().st_size
            if size <= SAMPLED_FROM:
                return hashlib.file_digest(raw, "sha256").hexdigest()
            found = hashlib.sha256(str(size).encode())
            for i in range(_SAMPLES):
                raw.seek(i * (size - _SAMPLE) // (_SAMPLES - 1))
                found.update(raw.read(_SAMPLE))
            return f"samples:{found.hexdigest()}"
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror or error})") from error


def files_of(path: str) -> list[str]:
    """The file, or all of a directory or a pattern, in order; each checked to exist and to be of a kind that is read."""
    place = Path(path).expanduser()
    if place.is_file():
        return [_known(path)]
    if place.is_dir():
        inside = sorted(str(p) for p in place.rglob("*") if p.is_file() and KNOWN.fullmatch(p.name) and p.name[0] != ".")
        if not inside:
            raise UserError(f"{path}: is a directory without a file that is read ({', '.join(READERS)})")
        return inside
    if glob.has_magic(path):
        found = sorted(p for p in glob.glob(str(place), recursive=True) if Path(p).is_file())
        if not found:
            raise UserError(f"{path}: no file is of this pattern")
        return [_known(p) for p in found]
    beside = [p.name for p in place.parent.iterdir() if p.is_file()] if place.parent.is_dir() else []
    near = did_you_mean(place.name, beside)
    raise UserError(f"{path}: no such file" + (near or "; give a file, a directory, a hub id org/name or builtin:NAME"))


def _known(path: str) -> str:
    if not kind_of(Path(path))[0]:
        known = f"{', '.join(READERS)}, all but .parquet and .arrow also with {', '.join(COMPRESSIONS)} behind"
        raise UserError(f"{path}: unknown extension '{Path(path).suffix}'; read are {known}")
    return path


def _is_hub_id(path: str) -> bool:
    return bool(_HUB_ID.fullmatch(path)) and not KNOWN.fullmatch(path) and not Path(path).exists()


def _is_saved(path: str) -> bool:
    """Is it a directory that datasets' save_to_disk has made?"""
    directory = Path(path).expanduser()
    return any((directory / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _saved(path: str, split: str) -> Iterator[NumberedRow]:
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(Path(path).expanduser()))
    except Exception as error:  # a damaged directory: any kind may come out of it
        raise UserError(f"{path}: cannot be read as a saved data set ({' '.join(str(error).split())[:200]})") from error
    if isinstance(found, DatasetDict):
        if split not in found:
            raise UserError(f"data.split: {path} has no split '{split}' (there are: {', '.join(map(str, found))})")
        found = found[split]
    if not len(found):
        raise UserError(f"{path}: is empty; give a data set with at least one row")
    yield from ((number, without_nulls(dict(row))) for number, row in enumerate(found, 1))
